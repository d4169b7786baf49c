"""Decide the groups of a rounded weight matrix again, each with the errors of all others known.

With all other groups fixed, the output error is a quadratic in one group's error, whose least is at a target that the
Hessian gives. The group is rounded to it with error feedback at several scales; the best one wins, row by row, where it
beats what stands there; then scale and zero point are fitted to the codes by least squares. Every step lowers the
output error. It is block coordinate descent as in QuantEase (Behdin et al. 2023), with blocks of whole groups that are
rounded as GPTQ does, and with the group's parameters among what is chosen.
"""

from __future__ import annotations

import numpy as np

from qgraph.numerics.column_loop import visit
from qgraph.numerics.hessian import factorize
from qgraph.numerics.products import product
from qgraph.numerics.rounding import Grid, Rounder
from qgraph.numerics.weights import levels

__all__ = ["refine"]

_WIDEST = 256
"""Inputs that are decided together at most; longer groups are decided part by part at the scale they have."""
_PART = 128
_COLUMNS = 4096
"""Columns (outputs times candidates) that are worked on at a time, so that a group of them stays in the cache."""
_SPREAD = {2: 0.3, 3: 0.25, 4: 0.2, 5: 0.12, 6: 0.06, 8: 0.02}
"""How far below its old scale a group looks for a better one, by bits."""
_STEPS = (0.0, -1.0, -0.75, -0.5, -0.25, 0.25)
_NARROWEST = 0.3
_FREE_SCALES = ("int", "nf4", "fp8e4m3", "fp8e5m2")


def refine(
    rounder: Rounder,
    rows: np.ndarray,
    error: np.ndarray,
    hessian: np.ndarray,
    rounds: int,
    mask: np.ndarray | None = None,
) -> float:
    """Improve the codes and parameters in `rounder`; return by how much tr(E H E^T) has fallen.

    Call it inside `products.steady`.

    Args:
        rounder: a rounded matrix; changed in place.
        rows: the weights, float [K, N].
        error: the weights less what the codes stand for, [K, N]; kept up to date.
        hessian: [K, K], damped, of the dtype of `rows`.
        rounds: passes over all groups.
        mask: bool [K, N]: what may be other than zero; zero points then stay as they are.
    """
    free = rounder.grid.scheme.format in _FREE_SCALES
    whole = rounder.group <= _WIDEST
    size = rounder.group if whole else _PART
    parts = [
        _Part(rounder, start, min(start + size, stop), hessian, search=whole and free)
        for first in range(0, len(rows), rounder.group)
        for stop in (min(first + rounder.group, len(rows)),)
        for start in range(first, stop, size)
    ]
    gain = 0.0
    for _ in range(rounds):
        for part in parts:
            gain += part.decide(rows, error, mask)
    return gain


class _Part:
    """Neighbouring inputs of one group that are decided together."""

    def __init__(self, rounder: Rounder, start: int, stop: int, hessian: np.ndarray, *, search: bool) -> None:
        self.rounder = rounder
        self.inputs = slice(start, stop)
        self.group = start // rounder.group
        self.search = search
        self.hessian = hessian[start:stop]
        self.square = self.hessian[:, start:stop]
        # Inputs that cost most come first, as in GPTQ's activation order.
        self.order = np.argsort(-self.square.diagonal(), kind="stable")
        triangle = factorize(self.square[np.ix_(self.order, self.order)].astype(np.float64), 0.0, np.float64)
        self.lower = triangle.lower.astype(hessian.dtype)
        self.pivots = triangle.pivots
        inverse = np.empty_like(triangle.lower)
        inverse[np.ix_(self.order, self.order)] = triangle.inverse()
        self.inverse = inverse.astype(hessian.dtype)

    def decide(self, rows: np.ndarray, error: np.ndarray, mask: np.ndarray | None = None) -> float:
        """Choose codes and parameters again; return the gain."""
        now = rows[self.inputs] - error[self.inputs]
        target = now + product(self.inverse, product(self.hessian, error))
        steps = _STEPS if self.search else _STEPS[:1]
        factors = (1 + _SPREAD[self.rounder.grid.scheme.bits] * np.array(steps)).astype(rows.dtype)
        width = _COLUMNS // len(factors)
        gain = 0.0
        for first in range(0, rows.shape[1], width):
            outputs = slice(first, first + width)
            stays = None if mask is None else mask[self.inputs, outputs]
            gain += self._decide(now[:, outputs], target[:, outputs], factors, outputs, stays)
        np.subtract(rows[self.inputs], now, out=error[self.inputs])
        return gain

    def _decide(
        self,
        now: np.ndarray,
        target: np.ndarray,
        factors: np.ndarray,
        outputs: slice,
        stays: np.ndarray | None,
    ) -> float:
        """Choose for some outputs; `now` is what their codes stand for, and is brought up to date."""
        grid = self.rounder.grid
        scale = grid.scale[self.group, outputs]
        zero_point = None if grid.zero_point is None else grid.zero_point[self.group, outputs]
        count, width = len(factors), now.shape[1]
        # Scales are stored in single precision: what is tried here has to be what is stored.
        scales = (scale * factors[:, None]).astype(np.float32).astype(now.dtype).reshape(1, -1)
        tried = Grid(grid.scheme, scales, None if zero_point is None else np.tile(zero_point, count)[None])
        numbers, cost = self._round(np.tile(target, count), tried, None if stays is None else np.tile(stays, count))
        before = self._cost(target - now)
        best = np.argmin(cost.reshape(count, width), axis=0) * width + np.arange(width)
        better = cost[best] < before
        codes = self.rounder.codes[self.inputs, outputs]
        np.copyto(codes, tried.codes(0, numbers)[:, best], where=better)
        scale = np.where(better, scales[0, best], scale)
        numbers = self._numbers(codes, zero_point)
        if self.search:
            scale, shift = self._fit(target, numbers, scale, zero_point, shifts=stays is None)
            numbers -= shift
            zero_point = None if zero_point is None else zero_point + shift
        grid.put(slice(self.group, self.group + 1), outputs, scale, zero_point)
        np.multiply(numbers, scale, out=now)
        return float((before - self._cost(target - now)).sum(dtype=np.float64))

    def _round(self, target: np.ndarray, grid: Grid, stays: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers [n, M] and what they cost [M], rounded with error feedback inside the part."""
        numbers = np.empty_like(target)
        error = np.empty_like(target)
        ordered = target[self.order]
        work = ordered.copy()

        def choose(index: int, wanted: np.ndarray, made: np.ndarray) -> None:
            number = numbers[self.order[index]]
            grid.round(0, wanted, number)
            if stays is not None:
                number *= stays[self.order[index]]
            np.multiply(number, grid.scale[0], out=made)
            np.subtract(ordered[index], made, out=made)

        visit(work, self.lower, error, choose)
        work -= ordered
        work += error
        np.square(work, out=work)
        return numbers, np.einsum("i,ij->j", self.pivots.astype(work.dtype), work)

    def _numbers(self, codes: np.ndarray, zero_point: np.ndarray | None) -> np.ndarray:
        if zero_point is None:
            return np.asarray(levels(self.rounder.grid.scheme)[codes], self.square.dtype)
        return np.asarray(codes.astype(self.square.dtype) - zero_point)

    def _cost(self, error: np.ndarray) -> np.ndarray:
        """Return the output error [M] of errors [n, M] of this part."""
        return np.asarray(np.einsum("ij,ij->j", error, product(self.square, error)))

    def _fit(
        self, target: np.ndarray, numbers: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, *, shifts: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the scale that fits `numbers` best, and a move of the zero point by one where that fits better."""
        image = product(self.square, numbers)
        along = np.einsum("ij,ij->j", image, target)
        square = np.einsum("ij,ij->j", image, numbers)
        best_gain, best_scale, best_shift = _fitted(along, square, scale)
        if shifts and zero_point is not None and not self.rounder.grid.scheme.symmetric:
            sums = self.square.sum(axis=0)
            for shift in (-1, 1):
                moved_square = square - 2 * shift * image.sum(axis=0) + sums.sum()
                moved = _fitted(along - shift * (sums @ target), moved_square, scale)
                usable = (zero_point + shift >= 0) & (zero_point + shift <= self.rounder.grid.scheme.top)
                better = usable & (moved[0] > best_gain * (1 + 1e-6))
                np.copyto(best_gain, moved[0], where=better)
                np.copyto(best_scale, moved[1], where=better)
                np.copyto(best_shift, shift, where=better)
        return best_scale, best_shift


def _fitted(along: np.ndarray, square: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gain over a scale of zero, the scale of least squared error, and a shift of zero.

    A fit that is far from the old scale comes from a nearly empty group; the old scale stays then.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        fitted = (along / square).astype(np.float32).astype(scale.dtype)
        sound = (square > 0) & (fitted / scale > _NARROWEST) & (fitted / scale < 1 / _NARROWEST)
    fitted = np.where(sound, fitted, scale)
    return fitted * (2 * along - fitted * square), fitted, np.zeros_like(scale)
