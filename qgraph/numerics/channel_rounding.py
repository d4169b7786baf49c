"""Symmetric integers with one positive scale for each output, rounded so that a layer's outputs change least.

    W [N, K]  ~  scale [N] * q [N, K],      q whole numbers from -2^(bits-1) to 2^(bits-1) - 1

This is what integer convolutions read. Rows are long, or very short (a depthwise kernel has nine elements), and a scale
serves all of one, so that its choice decides more than in groups. For each of several scales a row is rounded with
GPTQ's error feedback, the best one is kept, and then single numbers and the scale are decided again in turn, which
only ever lowers the error (coordinate descent, as in QuantEase, Behdin et al. 2023). All of it in the metric of the
layer's outputs, tr((W - Q) H (W - Q)^T).

Layers in groups (a depthwise convolution is one group for each channel) have a Hessian for each group; they are worked
on together, as stacks of small matrices.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qgraph.numerics.column_loop import transposed, visit
from qgraph.numerics.hessian import factorize
from qgraph.numerics.products import each, product, steady
from qgraph.numerics.weights import QuantizedWeight, WeightScheme

__all__ = [
    "better_rows",
    "channel_scales",
    "check_rows",
    "damped",
    "descend",
    "nearest",
    "no_worse",
    "quantized",
    "round_channels",
    "round_stack",
]

_TINY = float(np.finfo(np.float32).tiny)
_SHARES = np.linspace(1.0, 0.4, 25)
"""Of the full range, that the search of scales tries."""
_FACTORS = (0.8, 0.88, 0.94, 1.0, 1.06, 1.14)
"""Of the scale that suits the weights, that rounding with error feedback tries."""
_COLUMNS = 2048
"""Columns (outputs times factors) that are visited at a time."""
_ROWS = 256


def quantized(numbers: np.ndarray, scale: np.ndarray, scheme: WeightScheme) -> QuantizedWeight:
    """Return whole numbers [N, K] with a scale for each row, [N], as codes of a symmetric scheme of whole rows."""
    centre = scheme.centre
    codes = (numbers + centre).astype(np.uint8)
    column = np.asarray(scale, np.float32)[:, None]
    return QuantizedWeight(codes, column, np.full(column.shape, centre, np.uint8), scheme)


def nearest(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Return the whole numbers nearest to weight / scale, of the dtype of `weight`; shapes broadcast."""
    half = 1 << (bits - 1)
    return np.asarray(np.clip(np.rint(weight / scale), -half, half - 1))


def channel_scales(weight: np.ndarray, bits: int, importance: np.ndarray | None = None) -> np.ndarray:
    """Return the positive scales of least squared error of rounding to the nearest, float32 [..., N].

    Tried are shares of the full range, then the scale that fits the best one's numbers by least squares.

    Args:
        weight: [..., N, K].
        bits: of a number.
        importance: what an input's squared error counts, not negative, [..., 1, K]; equal when None.
    """
    half = 1 << (bits - 1)
    weight = np.asarray(weight, np.float32)
    counts = np.ones((1,) * weight.ndim, np.float32) if importance is None else np.asarray(importance, np.float32)
    full = np.maximum(weight.max(axis=-1) / np.float32(half - 1 or 1), -weight.min(axis=-1) / np.float32(half))
    full = np.where(full > 0, np.maximum(full, _TINY), 1.0).astype(np.float32)
    best, gain = full.copy(), np.full(full.shape, -1.0, np.float32)
    weighted = weight * counts
    for share in _SHARES:
        numbers = nearest(weight, (full * np.float32(share))[..., None], bits)
        along = np.einsum("...k,...k->...", weighted, numbers)
        square = np.einsum("...k,...k->...", numbers * counts, numbers)
        fitted = along / np.maximum(square, np.float32(1e-30))
        better = (along * fitted > gain) & (fitted > 0)
        np.copyto(gain, along * fitted, where=better)
        np.copyto(best, fitted, where=better)
    return np.asarray(np.maximum(best, np.float32(_TINY)))


def round_channels(
    weight: np.ndarray, hessian: np.ndarray, scheme: WeightScheme, *, damping: float = 0.01, rounds: int = 3
) -> QuantizedWeight:
    """Round the weights of a layer.

    Args:
        weight: [N, K].
        hessian: [K, K], as `Hessian.matrix`.
        scheme: symmetric integers, group 0.
        damping: share of the mean diagonal that is added to the Hessian's diagonal.
        rounds: of deciding every number again.

    Raises:
        ValueError: shapes do not fit, or the Hessian is not finite or far from positive semidefinite.
    """
    check_rows(weight, hessian, scheme)
    with steady():
        matrix = damped(hessian[None], damping)[0].astype(np.float32)
        order = np.argsort(-matrix.diagonal(), kind="stable")
        lower = factorize(matrix[np.ix_(order, order)], 0.0)
        rows = transposed(weight, np.float32)
        start = channel_scales(weight, scheme.bits, matrix.diagonal()[None])
        numbers, scale = np.empty_like(rows), np.empty_like(start)
        width = max(_COLUMNS // len(_FACTORS), 1)
        for first in range(0, rows.shape[1], width):
            part = slice(first, first + width)
            numbers[:, part], scale[part] = _feed_back(
                rows[:, part], start[part], order, lower.lower, lower.pivots, scheme.bits
            )
        descent = _Descent(rows, matrix, order, scheme.bits)
        numbers, scale = descent.run(numbers, scale, rounds)
    return no_worse(weight[None], hessian[None], scheme, np.ascontiguousarray(numbers.T)[None], scale[None])


def descend(
    weight: np.ndarray, matrix: np.ndarray, numbers: np.ndarray, scale: np.ndarray, bits: int, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decide numbers [N, K] and scales [N] again, one by one, as often as `rounds`; return better ones.

    Call it inside `products.steady`.

    Args:
        weight: [N, K].
        matrix: damped Hessian, [K, K].
        numbers: to start from.
        scale: to start from.
        bits: of a number.
        rounds: over all numbers.
    """
    order = np.argsort(-matrix.diagonal(), kind="stable")
    descent = _Descent(transposed(weight, np.float32), matrix.astype(np.float32), order, bits)
    found, fitted = descent.run(transposed(numbers, np.float32), scale, rounds)
    return np.ascontiguousarray(found.T), fitted


def check_rows(weight: np.ndarray, hessian: np.ndarray, scheme: WeightScheme) -> None:
    """Raise ValueError unless weight [.., N, K], Hessian [.., K, K] and scheme fit and are finite."""
    if not (scheme.is_integer and scheme.symmetric and scheme.group == 0):
        raise ValueError(f"one scale for an output needs symmetric integers and group 0, not {scheme}")
    if hessian.shape != (*weight.shape[:-2], weight.shape[-1], weight.shape[-1]):
        raise ValueError(f"a Hessian of shape {hessian.shape} does not fit a weight of shape {weight.shape}")
    if not (np.isfinite(hessian).all() and np.isfinite(weight).all()):
        raise ValueError("a weight, or an element of the Hessian, is not finite")


def damped(hessian: np.ndarray, damping: float) -> np.ndarray:
    """Return Hessians [G, K, K] with more on the diagonal, float64; inputs that were always zero count a little."""
    matrix = np.array(hessian, np.float64)
    diagonal = np.einsum("gkk->gk", matrix)  # a view
    mean = diagonal.mean(axis=1, keepdims=True)
    diagonal += np.where(mean > 0, max(damping, 1e-6) * mean, 1.0)
    return matrix


def _feed_back(
    rows: np.ndarray, start: np.ndarray, order: np.ndarray, lower: np.ndarray, pivots: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Round rows [K, n] with error feedback at several scales; return the best numbers [K, n] and scales [n]."""
    count, width = len(_FACTORS), rows.shape[1]
    scales = (start * np.array(_FACTORS, np.float32)[:, None]).reshape(-1)
    ordered = np.tile(rows[order], count)
    target, error, numbers = ordered.copy(), np.empty_like(ordered), np.empty_like(ordered)

    def choose(index: int, wanted: np.ndarray, made: np.ndarray) -> None:
        numbers[index] = nearest(wanted, scales, bits)
        np.multiply(numbers[index], scales, out=made)
        np.subtract(ordered[index], made, out=made)

    visit(target, lower, error, choose)
    target -= ordered
    target += error
    cost = np.einsum("k,kn->n", pivots.astype(np.float32), np.square(target, out=target)).reshape(count, width)
    best = np.argmin(cost, axis=0) * width + np.arange(width)
    result = np.empty_like(rows)
    result[order] = numbers[:, best]
    return result, scales[best]


class _Descent:
    """Deciding single numbers, and the scales, again: blocks of inputs at a time, most important inputs first."""

    def __init__(self, rows: np.ndarray, matrix: np.ndarray, order: np.ndarray, bits: int) -> None:
        self._rows = rows[order]
        self._matrix = np.ascontiguousarray(matrix[np.ix_(order, order)])
        self._order = order
        self._half = 1 << (bits - 1)

    def run(self, numbers: np.ndarray, scale: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray]:
        """Return better numbers [K, N] and scales [N]."""
        numbers = numbers[self._order]
        for _ in range(rounds):
            scale = self._fitted(numbers, scale)
            error = self._rows - numbers * scale
            for first in range(0, len(numbers), _ROWS):
                self._decide(slice(first, first + _ROWS), numbers, scale, error)
        scale = self._fitted(numbers, scale)
        result = np.empty_like(numbers)
        result[self._order] = numbers
        return result, scale

    def _decide(self, part: slice, numbers: np.ndarray, scale: np.ndarray, error: np.ndarray) -> None:
        """Move each number of `part` to where the error is least, given all others."""
        square = self._matrix[part, part]
        pull = product(self._matrix[part], error)
        reach = square.diagonal()
        inner, inner_numbers = error[part], numbers[part]
        for index in range(len(square)):
            move = pull[index] / reach[index]
            wanted = inner_numbers[index] + move / scale
            new = np.clip(np.rint(wanted), -self._half, self._half - 1)
            change = (inner_numbers[index] - new) * scale
            if change.any():
                inner[index] += change
                pull += square[:, index, None] * change
                inner_numbers[index] = new

    def _fitted(self, numbers: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Return the scales of least error for `numbers`."""
        image = product(self._matrix, numbers)
        along = np.einsum("kn,kn->n", image, self._rows)
        square = np.einsum("kn,kn->n", image, numbers)
        return _sound(along, square, scale)


def _sound(along: np.ndarray, square: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return along / square where that is a positive scale, else the old one; as it will be stored."""
    fitted = along / np.where(square > 0, square, 1)
    usable = (square > 0) & (fitted > _TINY) & np.isfinite(fitted)
    return np.where(usable, fitted, scale).astype(np.float32)


def no_worse(
    weight: np.ndarray, hessian: np.ndarray, scheme: WeightScheme, numbers: np.ndarray, scale: np.ndarray
) -> QuantizedWeight:
    """Return a rounding, with those rows rounded to the nearest for which that is better after all.

    Args:
        weight: [G, M, K].
        hessian: [G, K, K], not damped.
        scheme: symmetric integers, group 0.
        numbers: whole numbers [G, M, K].
        scale: of each row, [G, M].
    """
    plain_scale = channel_scales(weight, scheme.bits)
    plain = nearest(np.asarray(weight, np.float32), plain_scale[..., None], scheme.bits)
    inputs = weight.shape[-1]
    made = quantized(numbers.reshape(-1, inputs), scale.reshape(-1), scheme)
    return better_rows(weight, hessian, made, quantized(plain.reshape(-1, inputs), plain_scale.reshape(-1), scheme))


def better_rows(
    weight: np.ndarray, hessian: np.ndarray, one: QuantizedWeight, other: QuantizedWeight
) -> QuantizedWeight:
    """Return for each row of a weight [G, M, K] the better of two roundings, in the metric of `hessian` [G, K, K]."""
    take = (_row_errors(weight, other, hessian) < _row_errors(weight, one, hessian))[:, None]
    return QuantizedWeight(
        np.where(take, other.codes, one.codes), np.where(take, other.scale, one.scale), one.zero_point, one.scheme
    )


def _row_errors(weight: np.ndarray, found: QuantizedWeight, hessian: np.ndarray) -> np.ndarray:
    error = np.asarray(weight, np.float64) - found.dequantize().reshape(weight.shape)
    moments = np.asarray(hessian, np.float64)
    with steady():
        image = product(error[0], moments[0])[None] if len(error) == 1 else error @ moments
    return np.asarray(np.einsum("gmk,gmk->gm", image, error)).reshape(-1)


def round_stack(
    weight: np.ndarray, hessian: np.ndarray, scheme: WeightScheme, *, damping: float = 0.01, rounds: int = 4
) -> QuantizedWeight:
    """Round a layer in groups.

    Args:
        weight: [G, M, K]: the M outputs of each group.
        hessian: [G, K, K].
        scheme: symmetric integers, group 0.
        damping: as for `round_channels`.
        rounds: of deciding every number again.

    Returns:
        The G * M rows.

    Raises:
        ValueError: as `round_channels`.
    """
    check_rows(weight, hessian, scheme)
    groups, outputs, inputs = weight.shape
    numbers = np.empty(weight.shape, np.float32)
    scale = np.empty(weight.shape[:2], np.float32)
    # As many groups at a time as fit into the cache with all their candidates.
    size = max(1, (1 << 18) // (inputs * (inputs + outputs * len(_SHARES))))
    with steady():
        matrix = damped(hessian, damping)

        def compute(first: int) -> None:
            part = slice(first, first + size)
            stack = _Stack(np.asarray(weight[part], np.float64), matrix[part], hessian[part], scheme.bits)
            numbers[part], scale[part] = stack.run(rounds)

        each(compute, range(0, groups, size))
    return no_worse(weight, hessian, scheme, numbers, scale)


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Groups of a layer: every row is tried at all shares of its range at once, in float64.

    Attributes:
        weight: [G, M, K].
        matrix: damped, [G, K, K].
        plain: not damped.
        bits: of a number.
    """

    weight: np.ndarray
    matrix: np.ndarray
    plain: np.ndarray
    bits: int

    def run(self, rounds: int) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers [G, M, K] and scales [G, M]."""
        groups, outputs, inputs = self.weight.shape
        half = 1 << (self.bits - 1)
        full = channel_scales(self.weight, self.bits)
        largest = np.abs(self.weight).max(axis=-1) / half
        shares = np.where(largest > 0, largest, 1.0)[..., None] * (_SHARES * half / max(half - 1, 1))
        # The last is the scale that suits rounding to the nearest, so that the result is never worse than that.
        scales = np.concatenate([np.maximum(shares, _TINY), full[..., None]], axis=-1).astype(np.float32)
        tried = scales.shape[-1]
        weight = np.repeat(self.weight, tried, axis=1)
        scale = scales.reshape(groups, outputs * tried).astype(np.float64)
        order = np.argsort(-np.einsum("gkk->gk", self.matrix).mean(axis=0), kind="stable")
        numbers = self._feed_back(weight, scale, order)
        pull = (weight - numbers * scale[..., None]) @ self.matrix
        for _ in range(rounds):
            for index in order:
                reach = self.matrix[:, index, index, None]
                wanted = numbers[..., index] + pull[..., index] / reach / scale
                new = np.clip(np.rint(wanted), -half, half - 1)
                change = (numbers[..., index] - new) * scale
                numbers[..., index] = new
                pull += change[..., None] * self.matrix[:, None, index]
            image = numbers @ self.matrix
            along = np.einsum("gmk,gmk->gm", image, weight)
            scale = _sound(along, np.einsum("gmk,gmk->gm", image, numbers), scale).astype(np.float64)
            pull = (weight - numbers * scale[..., None]) @ self.matrix
        cost = self._cost(weight - numbers * scale[..., None]).reshape(groups, outputs, tried)
        best = cost.argmin(axis=-1)[..., None]
        scale = np.take_along_axis(scale.reshape(groups, outputs, tried), best, axis=-1)[..., 0]
        rows = numbers.reshape(groups, outputs, tried, inputs)
        numbers = np.take_along_axis(rows, best[..., None], axis=2)[:, :, 0]
        return numbers, scale

    def _feed_back(self, weight: np.ndarray, scale: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Round with error feedback, input after input."""
        turned = order[::-1]
        # H = T T^T with T upper triangular: the factor of the matrix from its last input to its first.
        upper = np.linalg.cholesky(self.matrix[:, turned[:, None], turned])[:, ::-1, ::-1]
        upper = upper / np.einsum("gkk->gk", upper)[:, None]
        numbers, error = np.empty_like(weight), np.zeros_like(weight)
        for place, index in enumerate(order):
            coupling = upper[:, :place, place, None]
            target = weight[..., index] + (error[..., :place] @ coupling)[..., 0]
            numbers[..., index] = nearest(target, scale, self.bits)
            error[..., place] = weight[..., index] - numbers[..., index] * scale
        return numbers

    def _cost(self, error: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("gmk,gmk->gm", error @ self.plain, error))
