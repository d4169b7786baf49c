"""The bodies of the integer functions as text: standard operators, in int64 without overflow.

Not all is straightforward there. ONNX shifts unsigned integers only, and its integer division truncates. ONNX Runtime
(1.24 to 1.31 on x86) gets Max, Min, Clip and Sign of int64 wrong for sizes from 2^31 to 2^32, so comparisons and Where
stand for these; and its ReduceSum of int64 adds up in double, which is exact below 2^53. Casts name types by number:
6 is int32, 7 int64, 13 uint64.
"""

from __future__ import annotations

from collections.abc import Mapping

from qgraph.passes._requantize_bodies import LIMIT, SHIFT_RIGHT

__all__ = ["BODIES"]

_POWERS = ", ".join(str(1 << bit) for bit in range(33))
_POWERS_OF_FOUR = ", ".join(str(1 << 2 * bit) for bit in range(32))
_NEWTON_STEPS = 5
_NEWTON = "".join(
    f"""
    quotient{step} = Div (number, root{step})
    sum{step} = Add (root{step}, quotient{step})
    root{step + 1} = Div (sum{step}, two)
"""
    for step in range(_NEWTON_STEPS)
)
_INTEGER_SQRT = f"""
IntegerSqrt (x) => (y)
{{
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    last = Constant <value_ints = [-1]> ()
    powers = Constant <value_ints = [{_POWERS}]> ()
    powers_of_four = Constant <value_ints = [{_POWERS_OF_FOUR}]> ()
    some = Greater (x, one)
    number = Where (some, x, one)
    column = Unsqueeze (number, last)
    reached = GreaterOrEqual (column, powers_of_four)
    reached_ones = Cast <to = 7> (reached)
    digits = ReduceSum <keepdims = 0> (reached_ones, last)
    root0 = Gather (powers, digits)
{_NEWTON}
    square = Mul (root{_NEWTON_STEPS}, root{_NEWTON_STEPS})
    above = Greater (square, x)
    correction = Cast <to = 7> (above)
    y = Sub (root{_NEWTON_STEPS}, correction)
}}
"""
"""A number of n digits in base four starts at 2^n: above the root s, and not above 2 s. Newton's step takes a relative
error e above s to at most e^2 / 2 above it: 1, 1/2, 1/8, 1/128, 2^-15, 2^-31, so that after five steps less than 2^31 *
2^-31 = 1 is left. Rounding down keeps a step at or above floor(s), and from floor(s) it goes no further than to
floor(s) + 1. The last line tells these two apart; it also takes the root of 0, computed as that of 1, down to 0."""

_ROUNDED_DIVIDE = """
RoundedDivide (a, b) => (y)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    b_size = Abs (b)
    b_zero = Equal (b, zero)
    divisor = Where (b_zero, one, b_size)
    half = Div (divisor, two)
    a_size = Abs (a)
    nudged = Add (a_size, half)
    size = Div (nudged, divisor)
    a_negative = Less (a, zero)
    b_negative = Less (b, zero)
    negative = Xor (a_negative, b_negative)
    opposite = Neg (size)
    y = Where (negative, opposite, size)
}
"""

_TABLE_INTERPOLATE = """
TableInterpolate (x, table) => (y)
{
    one = Constant <value = int32 {1}> ()
    steps = Constant <value = int32 {128}> ()
    lowest = Constant <value = int32 {32768}> ()
    wide = Cast <to = 6> (x)
    position = Add (wide, lowest)
    index = Div (position, steps)
    next = Add (index, one)
    whole = Mul (index, steps)
    fraction = Sub (position, whole)
    start = Gather (table, index)
    end = Gather (table, next)
    difference = Sub (end, start)
    start_scaled = Mul (start, steps)
    rise = Mul (difference, fraction)
    between = Add (start_scaled, rise)
    nudge_and_bias = Constant <value = int32 {1073750016}> ()
    positive = Add (between, nudge_and_bias)
    scale = Constant <value = int32 {16384}> ()
    shifted = Div (positive, scale)
    excess = Constant <value = int32 {65536}> ()
    y = Sub (shifted, excess)
}
"""
"""In int32: 2^30, a multiple of 2^14, makes what is divided positive; 2^13 rounds."""

_SOFTMAX = """
Softmax (x, table, divisor, one) => (y)
{
    last_axis = Constant <value_ints = [-1]> ()
    step = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    scores = Cast <to = 7> (x)
    values = Cast <to = 7> (table)
    distance_step = Cast <to = 7> (divisor)
    unit = Cast <to = 7> (one)
    greatest_score = ReduceMax (x, last_axis)
    greatest = Cast <to = 7> (greatest_score)
    distance = Sub (greatest, scores)
    index = Div (distance, distance_step)
    whole = Mul (index, distance_step)
    fraction = Sub (distance, whole)
    next = Add (index, step)
    count = Shape (table)
    last = Sub (count, step)
    start_inside = Less (index, last)
    start_index = Where (start_inside, index, last)
    end_inside = Less (next, last)
    end_index = Where (end_inside, next, last)
    start = Gather (values, start_index)
    end = Gather (values, end_index)
    rest = Sub (distance_step, fraction)
    start_part = Mul (start, rest)
    end_part = Mul (end, fraction)
    between = Add (start_part, end_part)
    half_step = Div (distance_step, two)
    nudged = Add (between, half_step)
    exponentials = Div (nudged, distance_step)
    total = ReduceSum (exponentials, last_axis)
    shares = Mul (exponentials, unit)
    half_total = Div (total, two)
    shares_nudged = Add (shares, half_total)
    probabilities = Div (shares_nudged, total)
    y = Cast <to = 6> (probabilities)
}
"""

_SCALED = """
    last_axis = Constant <value_ints = [-1]> ()
    length = Shape <start = -1> (x)
    wide = Cast <to = 7> (x)
    scaled = Mul (wide, fraction)
"""
_OVER_DEVIATION = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    squares = Mul (centred, centred)
    unit = Constant <value_int = 2147483648> ()
    squares_high = Div (squares, unit)
    squares_whole = Mul (squares_high, unit)
    squares_low = Sub (squares, squares_whole)
    high_sum = ReduceSum (squares_high, last_axis)
    low_sum = ReduceSum (squares_low, last_axis)
    high_sum_whole = Mul (high_sum, unit)
    square_sum = Add (high_sum_whole, low_sum)
    mean_square = Div (square_sum, length)
    variance = Add (mean_square, epsilon)
    root = qgraph.IntegerSqrt (variance)
    none = Equal (root, zero)
    deviation = Where (none, one, root)
    dividend = Mul (centred, numerator)
    quotient = qgraph.RoundedDivide (dividend, deviation)
    y = Cast <to = 6> (quotient)
"""
"""The squares are added up in two halves of 31 bits."""
_LAYER_NORMALIZE = f"""
LayerNormalize (x, fraction, epsilon, numerator) => (y)
{{
{_SCALED}
    plain_sum = ReduceSum (wide, last_axis)
    sum = Mul (plain_sum, fraction)
    mean = qgraph.RoundedDivide (sum, length)
    centred = Sub (scaled, mean)
{_OVER_DEVIATION}
}}
"""
_RMS_NORMALIZE = f"""
RMSNormalize (x, fraction, epsilon, numerator) => (y)
{{
{_SCALED}
    centred = Identity (scaled)
{_OVER_DEVIATION}
}}
"""

BODIES: Mapping[str, str] = {
    "IntegerSqrt": _INTEGER_SQRT,
    "LayerNormalize": _LAYER_NORMALIZE,
    "Limit": LIMIT,
    "RMSNormalize": _RMS_NORMALIZE,
    "RoundedDivide": _ROUNDED_DIVIDE,
    "ShiftRight": SHIFT_RIGHT,
    "Softmax": _SOFTMAX,
    "TableInterpolate": _TABLE_INTERPOLATE,
}
"""Function -> its text, without a head. Requantize has a body for each rounding instead."""
