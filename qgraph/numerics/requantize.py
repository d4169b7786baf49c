"""Accumulators to integers of few bits by a fixed-point multiplier: integer arithmetic only, exact to the bit.

    y = clamp(round(x * multiplier * 2^-shift) + zero_point, low, high)

`multiplier` is an int32 in [2^30, 2^31) and `shift` lies in [0, 62], so a scale in [2^-32, 2^31) is represented with a
relative error of at most 2^-31. All that differs between the runtimes is how they round; each way is written out below
from the definition that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

__all__ = ["LARGEST_SHIFT", "MULTIPLIER_BITS", "ROUNDINGS", "fixed_point", "requantize"]

MULTIPLIER_BITS = 31
"""A multiplier is a fraction in [1/2, 1) with this many bits."""
LARGEST_SHIFT = 62
_LEAST_MULTIPLIER = 1 << (MULTIPLIER_BITS - 1)
_INT32 = np.iinfo(np.int32)

Rounding: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""x, multiplier, shift -> the rounded product: int64 each, of shapes that broadcast."""


def fixed_point(scale: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Represent positive scales as `multiplier * 2^-shift`.

    The multiplier is rounded to nearest, ties upwards, as TensorFlow Lite's `QuantizeMultiplier` does
    (tensorflow/lite/kernels/internal/quantization_util.cc); its shift is 31 less ours.

    Args:
        scale: float64, any shape.

    Returns:
        multiplier: int32 in [2^30, 2^31), in the shape of `scale`.
        shift: int32 in [0, 62], likewise.

    Raises:
        ValueError: a scale is not positive and finite, or outside what a multiplier and a shift represent.
    """
    scales = np.asarray(scale, dtype=np.float64)
    _refuse(scales, ~np.isfinite(scales) | (scales <= 0), "is no positive number")
    fraction, exponent = np.frexp(scales)
    # Exact: a double has 53 bits, and neither the product nor the sum needs more.
    multiplier = np.floor(np.ldexp(fraction, MULTIPLIER_BITS) + 0.5).astype(np.int64)
    carried = multiplier == 1 << MULTIPLIER_BITS
    multiplier = np.where(carried, _LEAST_MULTIPLIER, multiplier)
    shift = MULTIPLIER_BITS - exponent.astype(np.int64) - carried
    _refuse(scales, shift > LARGEST_SHIFT, "is below 2^-32, the least that a 31-bit multiplier and a shift represent")
    _refuse(scales, shift < 0, "is not below 2^31, the limit of a 31-bit multiplier")
    return multiplier.astype(np.int32), shift.astype(np.int32)


def _refuse(scales: np.ndarray, wrong: np.ndarray, why: str) -> None:
    if np.any(wrong):
        index = np.argwhere(wrong)[0]
        place = f" of channel {', '.join(map(str, index))}" if index.size else ""
        raise ValueError(f"the scale {scales[tuple(index)]:g}{place} {why}")


def requantize(
    x: np.ndarray,
    multiplier: np.ndarray,
    shift: np.ndarray,
    zero_point: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    rounding: str,
) -> np.ndarray:
    """Scale integers by `multiplier * 2^-shift`, add the zero point and clamp.

    The rounded product saturates to int32 before the zero point is added, which a shift below 31 can make happen.

    Args:
        x: int32, any shape.
        multiplier: int32 in [2^30, 2^31), or 0; of a shape that broadcasts to that of `x`.
        shift: int32 in [0, 62], of the shape of `multiplier`.
        zero_point: scalar of the wanted type.
        low: least result, scalar of that type.
        high: largest result, scalar of that type.
        rounding: one of `ROUNDINGS`.

    Returns:
        The shape of `x`, the type of `zero_point`.

    Raises:
        ValueError: there is no such rounding, or a multiplier or shift is outside its range.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"there is no rounding '{rounding}' (there are: {', '.join(ROUNDINGS)})")
    wide, factor, places = (np.asarray(array).astype(np.int64) for array in (x, multiplier, shift))
    if np.any((factor != 0) & ((factor < _LEAST_MULTIPLIER) | (factor >= 1 << MULTIPLIER_BITS))):
        raise ValueError("a multiplier is neither 0 nor in [2^30, 2^31)")
    if np.any((places < 0) | (places > LARGEST_SHIFT)):
        raise ValueError(f"a shift is not in [0, {LARGEST_SHIFT}]")
    rounded = np.clip(ROUNDINGS[rounding](wide, factor, places), _INT32.min, _INT32.max)
    moved = rounded + np.asarray(zero_point).astype(np.int64)
    clamped = np.clip(moved, np.asarray(low).astype(np.int64), np.asarray(high).astype(np.int64))
    return np.asarray(clamped.astype(np.asarray(zero_point).dtype))


def _half_up(x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Round once, ties upwards: floor(v + 1/2).

    Source: `MultiplyByQuantizedMultiplier` of TensorFlow Lite built with TFLITE_SINGLE_ROUNDING
    (tensorflow/lite/kernels/internal/common.cc). The product is below 2^62 and the half at most 2^61: int64 holds both.
    """
    half = (np.int64(1) << shift) >> 1
    return np.asarray((x * multiplier + half) >> shift)


def _half_even(x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Round once, ties to the even integer.

    Source: QuantizeLinear, QLinearConv and QLinearMatMul of ONNX, https://onnx.ai/onnx/operators/.
    """
    product = x * multiplier
    quotient = product >> shift
    remainder = product - (quotient << shift)
    half = (np.int64(1) << shift) >> 1
    above = (remainder > half) | ((remainder == half) & (shift > 0) & (quotient & 1 == 1))
    return np.asarray(quotient + above)


def _gemmlowp(x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Round twice: to a multiple of 2^-right, ties upwards, then to an integer, ties away from zero.

    Source: `MultiplyByQuantizedMultiplier` of TensorFlow Lite without TFLITE_SINGLE_ROUNDING, on the two functions of
    gemmlowp/fixedpoint/fixedpoint.h below. There `x << left` must not leave int32; here it saturates.
    """
    left, right = np.maximum(MULTIPLIER_BITS - shift, 0), np.maximum(shift - MULTIPLIER_BITS, 0)
    shifted = np.clip(x << left, _INT32.min, _INT32.max)
    return _rounding_divide_by_power_of_two(_saturating_rounding_doubling_high_mul(shifted, multiplier), right)


def _saturating_rounding_doubling_high_mul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (a * b + nudge) / 2^31, the nudge being 2^30 or 1 - 2^30 by the sign, the division towards zero.

    The one overflow, -2^31 times -2^31, cannot happen: no multiplier is negative.
    """
    product = a * b
    nudged = product + np.where(product >= 0, np.int64(1 << 30), np.int64(1 - (1 << 30)))
    return np.asarray(np.where(nudged >= 0, nudged >> MULTIPLIER_BITS, -(-nudged >> MULTIPLIER_BITS)))


def _rounding_divide_by_power_of_two(x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Return x / 2^exponent, ties away from zero: gemmlowp's `RoundingDivideByPOT`."""
    mask = (np.int64(1) << exponent) - 1
    threshold = (mask >> 1) + (x < 0)
    return np.asarray((x >> exponent) + ((x & mask) > threshold))


ROUNDINGS: Mapping[str, Rounding] = {"half-up": _half_up, "gemmlowp": _gemmlowp, "half-even": _half_even}
"""How the product is rounded, by name."""
