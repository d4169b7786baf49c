"""Code books of the small float formats: their levels, how a number finds its level, and what their scales may be.

    nf4        16 quantiles of the normal distribution, scaled by the largest magnitude of the block
               (Dettmers et al. 2023, QLoRA, appendix E)
    fp8e4m3    the finite values of float8_e4m3fn, up to 448
    fp8e5m2    the finite values of float8_e5m2, up to 57344
    mxfp4      float4_e2m1fn in blocks of 32 that share a power of two (OCP Microscaling Formats 1.0, 5.3 and 6.3)
    nvfp4      float4_e2m1fn in blocks of 16 that share a float8_e4m3fn, and one float32 for the tensor (NVIDIA)
    ternary    -1, 0, 1 times the mean magnitude (Ma et al. 2024, BitNet b1.58)

A number goes to the nearest level; halfway between two it goes to the one with the even mantissa, as IEEE casts do.
"""

from __future__ import annotations

import dataclasses
import functools

import ml_dtypes
import numpy as np

__all__ = ["CODE_BOOKS", "CodeBook", "nearest_level", "round_to_e4m3", "round_to_e8m0"]

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEAST_EXPONENT, _LARGEST_EXPONENT = -127, 127
_E4M3_LEAST, _E4M3_LARGEST = 2.0**-9, 448.0


@dataclasses.dataclass(frozen=True)
class CodeBook:
    """What a format fixes.

    Attributes:
        bits: of storage for one element.
        group: inputs that share a scale where the format says so, else None.
        scale_bits: of storage for one scale.
        levels: the representable numbers, ascending.
        information: bits that one element carries.
    """

    bits: int
    group: int | None
    scale_bits: int
    levels: tuple[float, ...]
    information: float

    @property
    def largest(self) -> float:
        """The largest level."""
        return self.levels[-1]


def _finite_levels(dtype: np.dtype) -> tuple[float, ...]:
    """Return the distinct finite values of an 8-bit float type, ascending."""
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return tuple(float(value) for value in np.unique(values[np.isfinite(values)]))


def _mirrored(positive: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-value for value in reversed(positive[1:])) + positive


CODE_BOOKS: dict[str, CodeBook] = {
    "nf4": CodeBook(4, None, 32, tuple(float(np.float32(level)) for level in _NF4), 4.0),
    "fp8e4m3": CodeBook(8, None, 32, _finite_levels(np.dtype(ml_dtypes.float8_e4m3fn)), 8.0),
    "fp8e5m2": CodeBook(8, None, 32, _finite_levels(np.dtype(ml_dtypes.float8_e5m2)), 8.0),
    "mxfp4": CodeBook(4, 32, 8, _mirrored(_E2M1), 4.0),
    "nvfp4": CodeBook(4, 16, 8, _mirrored(_E2M1), 4.0),
    "ternary": CodeBook(2, None, 32, (-1.0, 0.0, 1.0), float(np.log2(3.0))),
}


@functools.cache
def _thresholds(name: str) -> np.ndarray:
    """Return float32 [levels - 1]: the least number that goes to the level above each gap."""
    levels = np.asarray(CODE_BOOKS[name].levels)
    halves = ((levels[:-1] + levels[1:]) / 2).astype(np.float32)
    # Magnitudes in ascending order are consecutive bit patterns, so that their rank has the parity of the mantissa.
    zero = int(np.searchsorted(levels, 0.0))
    upper_is_even = np.abs(np.arange(1, len(levels)) - zero) % 2 == 0
    return np.where(upper_is_even, halves, np.nextafter(halves, np.float32(np.inf)))


def nearest_level(values: np.ndarray, name: str) -> np.ndarray:
    """Return the index (uint8) of the level of format `name` that is nearest to each value; beyond the ends, the end.

    Args:
        values: float32 of any shape, already divided by their scale; no NaN.
        name: a key of `CODE_BOOKS`.
    """
    return np.searchsorted(_thresholds(name), values, side="right").astype(np.uint8)


def round_to_e4m3(values: np.ndarray) -> np.ndarray:
    """Return positive values rounded to float8_e4m3fn, as float32: at least its least denormal, at most 448."""
    held = np.clip(np.asarray(values, np.float32), _E4M3_LEAST, _E4M3_LARGEST)
    return np.asarray(held.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


def round_to_e8m0(values: np.ndarray) -> np.ndarray:
    """Return the largest power of two that is not above each positive value, as float32; E8M0 has 2^-127 to 2^127."""
    _, exponent = np.frexp(np.asarray(values, np.float32))
    return np.ldexp(np.float32(1.0), np.clip(exponent - 1, _LEAST_EXPONENT, _LARGEST_EXPONENT)).astype(np.float32)
