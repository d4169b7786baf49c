"""Half-quadratic quantization: zero points and scales of least l_p error, p < 1, without data.

    minimise    sum |W - (Q - z) s|^p      with    Q = clip(rint(W / s) + z)

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": an auxiliary error E splits the
problem into a shrinkage of the error and a least-squares fit of what is left,

    E = shrink(W - (Q - z) s)        shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    z = mean(Q - (W - E) / s)

repeated with growing beta. It lets a few outliers keep large errors so that the many get small ones. Three things
differ from the paper. Errors are taken in units of the scale, so that beta means the same for every weight (in the
paper's units it depends on how large the weights are). The scale is fitted too, by the same least squares. Zero
points are whole numbers at the end, as kernels for integer arithmetic need them, and the scale is fitted once more to
each of the two whole numbers beside the real one. Of everything met on the way, from the full range and from the range
of least squared error on, each group keeps what has the least l_p error among what has no larger squared error than
round-to-nearest: with heavy tails the norm alone would give up outliers that the output needs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qgraph.numerics.weight_tiles import tiles
from qgraph.numerics.weights import (
    QuantizedWeight,
    WeightScheme,
    encode,
    integer_parameters,
    require_matrix,
    search_integer,
    tile_ranges,
)

__all__ = ["hqq", "lp_error"]

_WORTHWHILE = 1e-3
"""Share of the error that a step must gain for another one to be tried."""
_LEAST_ERROR = np.float32(1e-6)
"""In units of the scale: below it |x|^(p-1) grows without bound and nothing is left to gain."""


def hqq(
    weight: np.ndarray,
    scheme: WeightScheme,
    *,
    iterations: int = 20,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
) -> QuantizedWeight:
    """Quantize a weight matrix to integers by half-quadratic splitting.

    Args:
        weight: real numbers [N, K].
        scheme: integers; symmetric ones have their scale fitted only.
        iterations: most steps for each start.
        p: the norm, above 0 and at most 1.
        beta: of the first shrinkage, in units of the scale.
        growth: by which beta grows from step to step.

    Raises:
        ValueError: the scheme is a code book, a weight is NaN or infinite, or an argument is out of range.
    """
    if not scheme.is_integer:
        raise ValueError(f"half-quadratic quantization fits zero points, which {scheme.format} does not have")
    if not 0 < p <= 1 or iterations < 0 or beta <= 0 or growth < 1:
        raise ValueError(f"p {p}, iterations {iterations}, beta {beta}, growth {growth}: one is out of range")
    require_matrix(weight)
    fit = _Fit(scheme, iterations, p, beta, growth)
    grid = (weight.shape[0], scheme.groups(weight.shape[1]))
    scale, zero_point = np.empty(grid, np.float32), np.empty(grid, np.uint8)
    for tile in tiles(weight, scheme.group):
        low, high = tile_ranges(tile, weight)
        found_scale, found_zero = fit.parameters(tile.values, low, high)
        tile.put_groups(scale, found_scale)
        tile.put_groups(zero_point, found_zero)
    return QuantizedWeight(encode(weight, scale, zero_point, scheme), scale, zero_point, scheme)


def lp_error(weight: np.ndarray, approximation: np.ndarray, p: float = 0.7) -> float:
    """Return the sum of |weight - approximation|^p, in float64."""
    return float((np.abs(weight.astype(np.float64) - approximation) ** p).sum())


@dataclasses.dataclass
class _Best:
    """The parameters of least error that each group has met, with no larger squared error than `limit`."""

    limit: np.ndarray | None
    error: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    @classmethod
    def of(cls, scale: np.ndarray, zero: np.ndarray, limit: np.ndarray | None) -> _Best:
        """Begin with parameters whose error is not known yet."""
        return cls(limit, np.full(scale.shape, np.inf, np.float32), scale.copy(), zero.copy())

    def consider(
        self, at: np.ndarray, error: np.ndarray, square: np.ndarray, scale: np.ndarray, zero: np.ndarray
    ) -> np.ndarray:
        """Keep what is better for the groups `at` (indices), and tell for each whether that was worth the step."""
        least = self.error[0, at]
        better = error[0] < least
        if self.limit is not None:
            better &= square[0] <= self.limit[0, at]
        kept = at[better]
        self.error[0, kept], self.scale[0, kept], self.zero[0, kept] = (
            error[0, better],
            scale[0, better],
            zero[0, better],
        )
        return np.asarray(better & ~(least - error[0] <= _WORTHWHILE * least))


@dataclasses.dataclass(frozen=True)
class _Fit:
    scheme: WeightScheme
    iterations: int
    p: float
    beta: float
    growth: float

    def parameters(self, values: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and zero point (uint8) of the columns of a tile, [1, columns] each."""
        full, zero_point = integer_parameters(low, high, self.scheme)
        zero = zero_point.astype(np.float32)
        # In units of the full range's scale no weight is too small or too large to be raised to a power.
        unit = values * (np.float32(1) / full)
        one = np.ones_like(full)
        limit = self._squared(unit, one, zero) * np.float32(1 + 1e-6)
        best = _Best.of(one, zero, limit)
        self._descend(unit, one, zero, best, free=False)
        searched, searched_zero = search_integer(values, low, high, self.scheme)
        self._descend(unit, searched / full, searched_zero.astype(np.float32), best, free=False)
        if not self.scheme.symmetric:
            real = _Best.of(one, zero, None)
            self._descend(unit, best.scale.copy(), best.zero.copy(), real, free=True)
            for whole in (np.floor(real.zero), np.ceil(real.zero)):
                self._descend(unit, real.scale, np.clip(whole, 0, self.scheme.top), best, free=False)
        scale = best.scale * full
        scale = np.copysign(np.maximum(np.abs(scale), np.finfo(np.float32).tiny), scale)
        return np.where(low == high, full, scale), best.zero.astype(np.uint8)

    def _squared(self, unit: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        codes = np.clip(np.rint(unit / scale + zero), 0, np.float32(self.scheme.top)) - zero
        error = unit - codes * scale
        return np.add.reduce(error * error, axis=0, keepdims=True)

    def _descend(self, unit: np.ndarray, scale: np.ndarray, zero: np.ndarray, best: _Best, *, free: bool) -> None:
        """Alternate between shrinking the error and fitting the parameters; the zero point too if it is `free`."""
        beta = self.beta
        at = np.arange(unit.shape[1])
        top = np.float32(self.scheme.top)
        for step in range(self.iterations + 1):
            real = unit * (np.float32(1) / scale)
            codes = np.clip(np.rint(real + zero), 0, top) - zero
            error = real - codes
            square = np.einsum("ij,ij->j", error, error)[None] * scale**2
            magnitude = np.abs(error)
            np.maximum(magnitude, _LEAST_ERROR, out=magnitude)
            power = magnitude ** np.float32(self.p)
            total = np.add.reduce(power, axis=0, keepdims=True) * np.abs(scale) ** np.float32(self.p)
            worth = best.consider(at, total, square, scale, zero)
            if step == self.iterations or not worth.any():
                return
            if not worth.all():
                # Groups come to their ends at different times; each alone decides when.
                at, unit, scale, zero = at[worth], unit[:, worth], scale[:, worth], zero[:, worth]
                real, codes, error = real[:, worth], codes[:, worth], error[:, worth]
                power, magnitude = power[:, worth], magnitude[:, worth]
            # |x| - |x|^(p-1) / beta, with the power at hand: |x|^(p-1) = |x|^p / |x|
            power /= magnitude
            magnitude -= power * np.float32(1 / beta)
            np.maximum(magnitude, 0, out=magnitude)
            wanted = real - np.copysign(magnitude, error)
            shift = np.float32(0)
            if free:
                shift = codes.mean(axis=0, keepdims=True)
                codes = codes - shift
            square = np.add.reduce(codes * codes, axis=0, keepdims=True)
            ratio = np.add.reduce(wanted * codes, axis=0, keepdims=True) / np.maximum(square, np.float32(1e-30))
            ratio = np.where(ratio > np.float32(0.1), ratio, np.float32(1))
            if free:
                zero = zero + shift - wanted.mean(axis=0, keepdims=True) / ratio
            scale = scale * ratio
            beta *= self.growth
