"""Roots, quotients, table look-ups, softmax and normalization in integers: the definitions, slow and obvious.

These are what the model-local functions of domain `qgraph` compute. All arithmetic is in int64, and every docstring
gives the bounds under which nothing in it exceeds that.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = [
    "INTERPOLATION_STEPS",
    "integer_sqrt",
    "layer_normalize",
    "rms_normalize",
    "rounded_divide",
    "softmax",
    "table_interpolate",
]

INTERPOLATION_STEPS = 512
"""A table for `table_interpolate` holds the function at both ends of this many equal steps of the int16 range."""
_STEP_BITS = 7
_TABLE_FRACTION_BITS = 7


def integer_sqrt(x: np.ndarray) -> np.ndarray:
    """Return floor(sqrt(x)).

    Args:
        x: int64 in [0, 2^62].

    Returns:
        int64, the shape of `x`.

    Raises:
        ValueError: a number is negative.
    """
    numbers = np.asarray(x)
    roots = [math.isqrt(number) for number in numbers.reshape(-1).tolist()]
    return np.array(roots, dtype=np.int64).reshape(numbers.shape)


def rounded_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b rounded to nearest, ties away from zero; a divisor of 0 counts as 1.

    Args:
        a: int64 with |a| <= 2^61.
        b: int64 with |b| <= 2^61, of a shape that broadcasts with that of `a`.

    Returns:
        int64, of the common shape.
    """
    dividend, divisor = (np.asarray(array).astype(np.int64) for array in (a, b))
    size = np.maximum(np.abs(divisor), 1)
    quotient = (np.abs(dividend) + size // 2) // size
    return np.asarray(np.where((dividend < 0) != (divisor < 0), -quotient, quotient))


def table_interpolate(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return a function of a 16-bit number from 513 of its values, linear in between.

    With u = x + 32768, i = u >> 7 and f = u & 127 it is (table[i] * 128 + (table[i+1] - table[i]) * f + 2^13) >> 14.

    Args:
        x: int16, any shape.
        table: int32 [513], 128 times the results: at most 2^22 in size, so that int32 would do for all of it.

    Returns:
        int32, the shape of `x`.
    """
    position = np.asarray(x).astype(np.int64) + (1 << 15)
    index, fraction = position >> _STEP_BITS, position & ((1 << _STEP_BITS) - 1)
    values = np.asarray(table).astype(np.int64)
    start, end = values[index], values[index + 1]
    bits = _STEP_BITS + _TABLE_FRACTION_BITS
    y = ((start << _STEP_BITS) + (end - start) * fraction + (1 << (bits - 1))) >> bits
    return np.asarray(y.astype(np.int32))


def softmax(x: np.ndarray, table: np.ndarray, divisor: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis, its exponentials by linear interpolation in a table.

    With d = max(x) - x, i = d // divisor and f = d % divisor, the indices i and i + 1 held to the table's last, it is
    y = (e * one + s // 2) // s for s = sum(e) and

        e = (table[i] * (divisor - f) + table[i+1] * f + divisor // 2) // divisor.

    Args:
        x: int32 [..., n] with n < 2^15.
        table: int32 [K + 1], never negative: a decreasing exponential that starts at 2^15 and ends at or near 0.
        divisor: int32 scalar, positive: how far apart in units of `x` the table's entries are.
        one: int32 scalar, positive: what stands for a probability of 1.

    Returns:
        int32, the shape of `x`.
    """
    scores, values = np.asarray(x).astype(np.int64), np.asarray(table).astype(np.int64)
    step, unit = np.int64(divisor), np.int64(one)
    distance = scores.max(axis=-1, keepdims=True) - scores
    index, fraction = distance // step, distance % step
    last = len(values) - 1
    start, end = values[np.minimum(index, last)], values[np.minimum(index + 1, last)]
    exponentials = (start * (step - fraction) + end * fraction + step // 2) // step
    total = exponentials.sum(axis=-1, keepdims=True)
    return np.asarray(((exponentials * unit + total // 2) // total).astype(np.int32))


def layer_normalize(x: np.ndarray, fraction: np.ndarray, epsilon: np.ndarray, numerator: np.ndarray) -> np.ndarray:
    """Return the last axis less its mean, over its standard deviation.

    With n the length of the axis, m = rounded_divide(sum(x) * fraction, n) and c = x * fraction - m:
    v = sum(c * c) // n + epsilon and y = rounded_divide(c * numerator, max(integer_sqrt(v), 1)).

    Args:
        x: int32 [..., n]; sum(c * c) and |c * numerator| must stay below 2^62 and 2^61.
        fraction: int64 scalar: how many steps of the mean and the deviation one of `x` is.
        epsilon: int64 scalar, never negative: what is added to the variance, in those steps squared.
        numerator: int64 scalar: what stands for one standard deviation.

    Returns:
        int32, the shape of `x`.
    """
    scaled = np.asarray(x).astype(np.int64) * np.int64(fraction)
    mean = rounded_divide(scaled.sum(axis=-1, keepdims=True), np.array(scaled.shape[-1]))
    return _over_deviation(scaled - mean, epsilon, numerator)


def rms_normalize(x: np.ndarray, fraction: np.ndarray, epsilon: np.ndarray, numerator: np.ndarray) -> np.ndarray:
    """Return the last axis over its root mean square: `layer_normalize` with a mean of 0."""
    return _over_deviation(np.asarray(x).astype(np.int64) * np.int64(fraction), epsilon, numerator)


def _over_deviation(centred: np.ndarray, epsilon: np.ndarray, numerator: np.ndarray) -> np.ndarray:
    squares = (centred * centred).sum(axis=-1, keepdims=True)
    deviation = np.maximum(integer_sqrt(squares // centred.shape[-1] + np.int64(epsilon)), 1)
    return rounded_divide(centred * np.int64(numerator), deviation).astype(np.int32)
