"""Sums that compare a stream of arrays with another, and the figures drawn from them.

With s the reference's values and r the result's, over the whole stream:

    SQNR    10 log10( sum s^2 / sum (s - r)^2 ) in dB
    cosine  sum s r / sqrt( sum s^2 * sum r^2 )
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

__all__ = ["ErrorSums", "round_figure"]

_PIECE = 1 << 15
"""Elements that stay in the processor's cache with all that is computed from them."""


def round_figure(value: float, digits: int = 5) -> float:
    """Round to significant digits; infinities and NaN stay."""
    return float(f"{value:.{digits - 1}e}")


@dataclasses.dataclass
class ErrorSums:
    """Running sums that compare a stream of arrays with another, in float64 and in pieces of bounded size."""

    values: int = 0
    signal: float = 0.0
    result_power: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0
    broken: int = 0
    """Values that are finite in the source and not in the result."""
    excluded: int = 0
    """Values left out of the sums because one side or both are not finite."""

    def add(self, source: np.ndarray, result: np.ndarray) -> None:
        """Take in two float arrays of one shape (any shape, any float dtype)."""
        flat_source, flat_result = source.reshape(-1), result.reshape(-1)
        for start in range(0, flat_source.size, _PIECE):
            self._add_piece(
                flat_source[start : start + _PIECE].astype(np.float64),
                flat_result[start : start + _PIECE].astype(np.float64),
            )

    def _add_piece(self, source: np.ndarray, result: np.ndarray) -> None:
        self.values += source.size
        sums = _Sums.of(source, result)
        if not sums.finite:
            finite = np.isfinite(source) & np.isfinite(result)
            self.excluded += int(source.size - finite.sum())
            self.broken += int((np.isfinite(source) & ~np.isfinite(result)).sum())
            source, result = source[finite], result[finite]
            sums = _Sums.of(source, result)
        if not source.size:
            return
        self.signal += sums.signal
        self.result_power += sums.result_power
        self.product += sums.product
        self.noise += sums.noise
        self.max_abs = max(self.max_abs, sums.max_abs)

    @property
    def sqnr_db(self) -> float | None:
        """The SQNR in dB, rounded; infinite for equal streams, None where the source is all zero or empty."""
        if self.values == self.excluded:
            return None
        if self.noise == 0:
            return math.inf
        return round_figure(10 * math.log10(self.signal / self.noise), 4) if self.signal > 0 else None

    @property
    def cosine(self) -> float | None:
        """The cosine similarity, rounded; None where one side is all zero or empty."""
        if self.values == self.excluded:
            return None
        if self.noise == 0:
            return 1.0
        power = math.sqrt(self.signal) * math.sqrt(self.result_power)
        return round_figure(self.product / power, 6) if power > 0 else None


class _Sums(NamedTuple):
    """What is summed of two pieces."""

    signal: float
    result_power: float
    product: float
    noise: float
    max_abs: float

    @classmethod
    def of(cls, source: np.ndarray, result: np.ndarray) -> _Sums:
        # np.sum adds in one fixed order; a BLAS dot product splits its sum by threads.
        with np.errstate(over="ignore", invalid="ignore"):
            error = source - result
            return cls(
                signal=float(np.sum(source * source)),
                result_power=float(np.sum(result * result)),
                product=float(np.sum(source * result)),
                noise=float(np.sum(error * error)),
                max_abs=max(float(error.max(initial=0.0)), -float(error.min(initial=0.0))),
            )

    @property
    def finite(self) -> bool:
        """Whether every value is finite; a sum may overflow without."""
        return math.isfinite(self.signal + self.result_power)
