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

__all__ = [
    "CODE_BOOKS",
    "CodeBook",
    "code_book_scale",
    "nearest_level",
    "nvfp4_tensor_scale",
    "round_to_e4m3",
    "round_to_e8m0",
]

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
_LEAST_EXPONENT, _LARGEST_EXPONENT = -126, 127
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
    return np.asarray(np.where(upper_is_even, halves, np.nextafter(halves, np.float32(np.inf))))


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
    """Return the largest power of two that is not above each positive value, as float32; at least 2^-126."""
    _, exponent = np.frexp(np.asarray(values, np.float32))
    exponent = np.clip(exponent - 1, _LEAST_EXPONENT, _LARGEST_EXPONENT)
    return np.asarray(np.ldexp(np.float32(1.0), exponent), np.float32)


def nvfp4_tensor_scale(weight: np.ndarray) -> float:
    """Return the float32 that stands in front of a tensor's block scales: the largest block then has scale 448."""
    largest = max(float(weight.max()), -float(weight.min()))
    return float(np.float32(largest / (_E4M3_LARGEST * _E2M1[-1]))) or 1.0


def code_book_scale(
    values: np.ndarray,
    largest: np.ndarray,
    name: str,
    tensor_scale: float,
    weights: np.ndarray | None,
    *,
    search: bool,
) -> np.ndarray:
    """Return the scale of each block, [1, blocks], as the format defines it or by search of the least squared error.

    Definitions: nf4 and fp8 bring the largest magnitude to the largest level; mxfp4 takes the power of two that brings
    it between 4 and 8 (OCP 6.3: what lies beyond 6 saturates); nvfp4 rounds to float8 what brings it to 6; ternary has
    the mean magnitude. The search tries shares of it, with the scale that fits the levels best where scales are free.

    Args:
        values: float32 [elements, blocks].
        largest: the largest magnitude of each block, [1, blocks].
        name: a key of `CODE_BOOKS`.
        tensor_scale: of nvfp4.
        weights: what each squared error counts, broadcasting against `values`; equal when None.
        search: for the least squared error, instead of the definition.

    Returns:
        float32, what levels are multiplied with: with nvfp4, the block's float8 times `tensor_scale`.
    """
    start = np.maximum(largest / np.float32(CODE_BOOKS[name].largest), np.finfo(np.float32).tiny)
    if name == "ternary":
        mean = np.abs(values).mean(axis=0, keepdims=True, dtype=np.float64)
        start = np.maximum(mean.astype(np.float32), np.finfo(np.float32).tiny)
    if name == "mxfp4":
        start = round_to_e8m0(largest) / np.float32(4)
        candidates = [start * np.float32(factor) for factor in (1.0, 2.0, 0.5)]
    elif name == "nvfp4":
        tensor = np.float32(tensor_scale)
        candidates = [round_to_e4m3(start / tensor * np.float32(factor)) * tensor for factor in _NVFP4_FACTORS]
    else:
        candidates = [start * np.float32(factor) for factor in _FACTORS[name]]
    candidates = [np.maximum(candidate, np.finfo(np.float32).tiny) for candidate in candidates]
    refit = CODE_BOOKS[name].group is None
    chosen = _best_scale(values, candidates, name, weights, refit=refit) if search else candidates[0]
    chosen = np.maximum(chosen, np.finfo(np.float32).tiny)
    return np.where(largest == 0, np.float32(1), chosen).astype(np.float32)


_NVFP4_FACTORS = (1.0, 0.8, 0.9, 1.1, 1.25, 1.5)
"""The last puts the largest magnitude on level 4, whose neighbours are nearer than those of 6."""
_FACTORS = {
    "nf4": (1.0, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1),
    "fp8e4m3": (1.0, 1.15, 1.3, 1.5, 1.75),
    "fp8e5m2": (1.0, 1.15, 1.3, 1.5, 1.75),
    "ternary": (1.0, 0.8, 0.9, 1.1, 1.2, 1.35, 1.5),
}
"""Shares of the defined scale that are tried; the first is the definition. Wider fp8 ranges lose no level."""


def _best_scale(
    values: np.ndarray, candidates: list[np.ndarray], name: str, weights: np.ndarray | None, *, refit: bool
) -> np.ndarray:
    """Return for each block the candidate of least squared error; with `refit`, the scale that fits its levels best.

    Of levels q at scale s the squared error is <x, x> - (2 s <x, q> - s^2 <q, q>), and the best s is <x, q> / <q, q>.
    Levels are looked up on a fine grid here, which may miss the nearest one by a hair.
    """
    table = _level_table(name)
    half = np.float32(len(table) // 2)
    steps = np.float32((half - 1) / CODE_BOOKS[name].largest)
    # Errors are taken in units of the first candidate: squares of very small or large weights leave float32.
    unit = np.float32(1) / candidates[0]
    real = values * unit
    weighed = real if weights is None else real * weights
    work = np.empty_like(real)
    index = np.empty(real.shape, np.intp)
    best, most = candidates[0], np.full(candidates[0].shape, -np.inf, np.float32)
    for candidate in candidates:
        ratio = candidate * unit
        np.multiply(real, steps / ratio, out=work)
        work += half
        np.clip(work, 0, 2 * half - 1, out=work)
        np.copyto(index, work, casting="unsafe")
        held = table.take(index)
        square = np.einsum("ij,ij->j", held, held if weights is None else held * weights)[None]
        product = np.einsum("ij,ij->j", held, weighed)[None]
        if refit:
            ratio = np.where(product > 0, product / np.maximum(square, np.float32(1e-30)), ratio)
            candidate = ratio * candidates[0]
        gain = ratio * (2 * product - ratio * square)
        best = np.where(gain > most, candidate, best)
        most = np.maximum(gain, most)
    return best


@functools.cache
def _level_table(name: str) -> np.ndarray:
    """Return the levels nearest to a grid of 2^16 steps from end to end, float32."""
    levels = np.asarray(CODE_BOOKS[name].levels, np.float32)
    half = 1 << 15
    grid = (np.arange(2 * half, dtype=np.float32) - half + np.float32(0.5)) * (CODE_BOOKS[name].largest / (half - 1))
    return np.asarray(levels[nearest_level(grid.astype(np.float32), name)])
