"""The bodies of Requantize as text, one for each rounding, and of the two functions that they call.

On what is not straightforward in them see `qgraph.passes._integer_bodies`.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["LIMIT", "REQUANTIZE_BODY", "ROUNDED", "SHIFT_RIGHT"]

SHIFT_RIGHT = """
ShiftRight (x, places) => (y)
{
    bias = Constant <value = uint64 {4611686018427387904}> ()
    unsigned = Cast <to = 13> (x)
    positive = Add (unsigned, bias)
    shifted = BitShift <direction = "RIGHT"> (positive, places)
    bias_shifted = BitShift <direction = "RIGHT"> (bias, places)
    above = Cast <to = 7> (shifted)
    excess = Cast <to = 7> (bias_shifted)
    y = Sub (above, excess)
}
"""
"""floor(x / 2^places) for int64 x in [-2^62, 2^62 + 2^61], uint64 places: 2^62, a multiple of 2^places, makes x
positive meanwhile. If places is 0, x is below 2^62."""

LIMIT = """
Limit (x, low, high) => (y)
{
    below = Less (x, low)
    raised = Where (below, low, x)
    above = Greater (raised, high)
    y = Where (above, high, raised)
}
"""
"""Clip of int64."""

_PRODUCT = """
    wide = Cast <to = 7> (x)
    factor = Cast <to = 7> (multiplier)
    places = Cast <to = 13> (shift)
    one = Constant <value = uint64 {1}> ()
    power = BitShift <direction = "LEFT"> (one, places)
    half_unsigned = BitShift <direction = "RIGHT"> (power, one)
    half = Cast <to = 7> (half_unsigned)
    product = Mul (wide, factor)
    nudged = Add (product, half)
"""
_HALF_UP = f"""
{_PRODUCT}
    rounded = qgraph.ShiftRight (nudged, places)
"""
_HALF_EVEN = f"""
{_PRODUCT}
    up = qgraph.ShiftRight (nudged, places)
    up_unsigned = Cast <to = 13> (up)
    restored = BitShift <direction = "LEFT"> (up_unsigned, places)
    nudged_unsigned = Cast <to = 13> (nudged)
    exact = Equal (restored, nudged_unsigned)
    tie = Cast <to = 13> (exact)
    odd = BitwiseAnd (up_unsigned, one)
    shifts = Min (places, one)
    odd_tie = Mul (tie, odd)
    too_far = Mul (odd_tie, shifts)
    correction = Cast <to = 7> (too_far)
    rounded = Sub (up, correction)
"""
"""Where the half made the sum a multiple of 2^shift, there was a tie, which was rounded up."""
_GEMMLOWP = """
    wide = Cast <to = 7> (x)
    factor = Cast <to = 7> (multiplier)
    bits = Constant <value = int32 {31}> ()
    zero = Constant <value = int32 {0}> ()
    one = Constant <value = uint64 {1}> ()
    left_signed = Sub (bits, shift)
    left_positive = Max (left_signed, zero)
    left = Cast <to = 13> (left_positive)
    scale_unsigned = BitShift <direction = "LEFT"> (one, left)
    scale = Cast <to = 7> (scale_unsigned)
    shifted = Mul (wide, scale)
    shifted_least = Constant <value_int = -2147483648> ()
    shifted_most = Constant <value_int = 2147483647> ()
    shifted_saturated = qgraph.Limit (shifted, shifted_least, shifted_most)
    doubled = Mul (shifted_saturated, factor)
    nudge = Constant <value_int = 1073741824> ()
    nudged = Add (doubled, nudge)
    high_places = Constant <value = uint64 {31}> ()
    high_part = qgraph.ShiftRight (nudged, high_places)
    right_signed = Sub (shift, bits)
    right_positive = Max (right_signed, zero)
    right = Cast <to = 13> (right_positive)
    power = BitShift <direction = "LEFT"> (one, right)
    half_unsigned = BitShift <direction = "RIGHT"> (power, one)
    half = Cast <to = 7> (half_unsigned)
    size = Abs (high_part)
    size_nudged = Add (size, half)
    size_unsigned = Cast <to = 13> (size_nudged)
    size_shifted = BitShift <direction = "RIGHT"> (size_unsigned, right)
    size_rounded = Cast <to = 7> (size_shifted)
    origin = Constant <value_int = 0> ()
    negative = Less (high_part, origin)
    opposite = Neg (size_rounded)
    rounded = Where (negative, opposite, size_rounded)
"""
"""SaturatingRoundingDoublingHighMul rounds ties upwards and RoundingDivideByPOT away from zero."""
ROUNDED: Mapping[str, str] = {"half-up": _HALF_UP, "half-even": _HALF_EVEN, "gemmlowp": _GEMMLOWP}
"""Rounding -> the lines that compute `rounded`, int64."""

REQUANTIZE_BODY = """
Requantize <rounding> (x, multiplier, shift, zero_point, low, high) => (y)
{{
{rounded}
    offset = Cast <to = 7> (zero_point)
    low_wide = Cast <to = 7> (low)
    high_wide = Cast <to = 7> (high)
    low_moved = Sub (low_wide, offset)
    high_moved = Sub (high_wide, offset)
    int32_least = Constant <value_int = -2147483648> ()
    int32_most = Constant <value_int = 2147483647> ()
    least = qgraph.Limit (int32_least, low_moved, high_moved)
    most = qgraph.Limit (int32_most, low_moved, high_moved)
    limited = qgraph.Limit (rounded, least, most)
    moved = Add (limited, offset)
    y = CastLike (moved, zero_point)
}}
"""
"""To be formatted with the lines that compute `rounded`. The limits of int32 and those of the result, less the zero
point, are one pair of limits: the former within the latter."""
