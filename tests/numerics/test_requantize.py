"""Requantization against Python's own integers and fractions, and against a second formulation on random triples."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from qgraph.numerics.requantize import ROUNDINGS, fixed_point, requantize

INT32 = np.iinfo(np.int32)
LIMITS = (np.int32(INT32.min), np.int32(INT32.max))


def saturated(number: int) -> int:
    return min(max(number, INT32.min), INT32.max)


def away_from_zero(value: Fraction) -> int:
    return math.floor(abs(value) + Fraction(1, 2)) * (1 if value >= 0 else -1)


def half_up(x: int, multiplier: int, shift: int) -> int:
    return math.floor(Fraction(x * multiplier, 1 << shift) + Fraction(1, 2))


def half_even(x: int, multiplier: int, shift: int) -> int:
    return round(Fraction(x * multiplier, 1 << shift))


def gemmlowp(x: int, multiplier: int, shift: int) -> int:
    shifted = saturated(x * 2 ** max(31 - shift, 0))
    high = math.floor(Fraction(shifted * multiplier, 1 << 31) + Fraction(1, 2))
    return away_from_zero(Fraction(high, 2 ** max(shift - 31, 0)))


SLOW: dict[str, Callable[[int, int, int], int]] = {"half-up": half_up, "half-even": half_even, "gemmlowp": gemmlowp}


def plain(x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray, rounding: str) -> np.ndarray:
    return requantize(x, multiplier, shift, np.int32(0), *LIMITS, rounding)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shift", [30, 31, 32, 35, 40, 43])
def test_every_12_bit_number(rounding: str, shift: int):
    numbers = range(-2048, 2048)
    for multiplier in (1 << 30, 3 << 29, (1 << 30) + 1, 1518500250, (1 << 31) - (1 << 20), (1 << 31) - 1):
        expected = [saturated(SLOW[rounding](x, multiplier, shift)) for x in numbers]
        found = plain(np.array(numbers, np.int32), np.int32(multiplier), np.int32(shift), rounding)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_shift_at_the_edges(rounding: str):
    edges = [sign * (1 << bit) + off for bit in range(0, 32, 5) for sign in (1, -1) for off in (-1, 0, 1)]
    numbers = sorted({saturated(x) for x in (*edges, INT32.min, INT32.max, 0)})
    for shift in range(63):
        for multiplier in (0, 1 << 30, 3 << 29, 1234567891, (1 << 31) - 1):
            expected = [saturated(SLOW[rounding](x, multiplier, shift)) for x in numbers]
            found = plain(np.array(numbers, np.int32), np.int32(multiplier), np.int32(shift), rounding)
            np.testing.assert_array_equal(found, expected, err_msg=f"{multiplier} {shift}")


def by_division(x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray, rounding: str) -> np.ndarray:
    """Round by quotient and remainder, or by sign and size: nothing in common with shifts of the sum."""
    if rounding == "gemmlowp":
        shifted = np.clip(x * 2 ** np.maximum(31 - shift, 0), INT32.min, INT32.max)
        size = np.abs(shifted) * multiplier
        high = np.where(shifted < 0, -((size + (1 << 30) - 1) // (1 << 31)), (size + (1 << 30)) // (1 << 31))
        divisor = 2 ** np.maximum(shift - 31, 0)
        return np.sign(high) * ((2 * np.abs(high) + divisor) // (2 * divisor))
    divisor = np.left_shift(1, shift)
    quotient, remainder = np.divmod(x * multiplier, divisor)
    tie = 2 * remainder == divisor
    return quotient + (2 * remainder > divisor) + (tie & ((quotient % 2 == 1) | (rounding == "half-up")))


@pytest.mark.parametrize("chunk", range(10))
def test_ten_million_random_triples(chunk: int):
    random = np.random.default_rng(chunk)
    count = 1_000_000
    # Numbers of every size, with many trailing zeros in a third of the multipliers, so that ties occur.
    x = random.integers(INT32.min, INT32.max, count, endpoint=True) >> random.integers(0, 31, count)
    zeros = np.where(random.integers(0, 3, count) == 0, random.integers(15, 31, count), 0)
    multiplier = random.integers(1 << 30, 1 << 31, count) >> zeros << zeros
    shift = random.integers(0, 63, count)
    assert np.count_nonzero((x * multiplier << 1) & ((2 << shift) - 1) == 1 << shift) > count // 100  # ties
    for rounding in ROUNDINGS:
        expected = np.clip(by_division(x, multiplier, shift, rounding), INT32.min, INT32.max)
        found = plain(x.astype(np.int32), multiplier.astype(np.int32), shift.astype(np.int32), rounding)
        np.testing.assert_array_equal(found, expected)


def test_channels_zero_points_and_limits():
    x = np.arange(-6, 6, dtype=np.int32).reshape(1, 3, 4)
    multiplier = np.array([1 << 30, 3 << 29, 0], np.int32).reshape(3, 1)
    shift = np.array([31, 30, 31], np.int32).reshape(3, 1)
    found = requantize(x, multiplier, shift, np.uint8(4), np.uint8(2), np.uint8(6), "half-up")
    assert found.dtype == np.uint8
    assert found.tolist() == [[[2, 2, 2, 3], [2, 3, 4, 6], [4, 4, 4, 4]]]
    wide = requantize(np.int32(INT32.max), np.int32(1 << 30), np.int32(0), np.int32(-5), *LIMITS, "half-even")
    assert wide == INT32.max - 5


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32])
def test_the_result_has_the_zero_points_type(dtype: type[np.integer]):
    limits = np.iinfo(dtype)
    x = np.array([INT32.min, 0, INT32.max], np.int32)
    found = requantize(x, np.int32(1 << 30), np.int32(30), dtype(1), dtype(limits.min), dtype(limits.max), "half-up")
    assert found.dtype == dtype
    assert found.tolist() == [max(limits.min, INT32.min + 1), 1, limits.max]


@pytest.mark.parametrize(
    ("multiplier", "shift", "rounding", "message"),
    [
        (1 << 29, 31, "half-up", "multiplier"),
        (-(1 << 30), 31, "half-up", "multiplier"),
        (1 << 30, 63, "half-up", "shift"),
        (1 << 30, -1, "half-up", "shift"),
        (1 << 30, 31, "half-odd", "there is no rounding 'half-odd' (there are: half-up, gemmlowp, half-even)"),
    ],
)
def test_what_is_no_parameter(multiplier: int, shift: int, rounding: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        plain(np.zeros(1, np.int32), np.int32(multiplier), np.int32(shift), rounding)


def test_scales_as_fixed_point():
    scales = np.array([1.0, 0.75, 2.0**-32, 2.0**31 - 1, 1 - 2.0**-40, 0.3, 2.0**-5 / 3])
    multiplier, shift = fixed_point(scales)
    assert (multiplier.dtype, shift.dtype) == (np.int32, np.int32)
    assert multiplier.tolist()[:5] == [1 << 30, 3 << 29, 1 << 30, (1 << 31) - 1, 1 << 30]
    assert shift.tolist()[:5] == [30, 31, 62, 0, 30]
    np.testing.assert_array_less(np.abs(multiplier * 2.0**-shift / scales - 1), 2.0**-31 * (1 + 1e-9))


def test_scales_are_rounded_to_nearest_ties_upwards():
    exact = (1 << 30) + 1
    scales = np.array([Fraction(4 * exact + quarter, 1 << 33) for quarter in (0, 1, 2, 3)], dtype=np.float64)
    multiplier, shift = fixed_point(scales)
    assert multiplier.tolist() == [exact, exact, exact + 1, exact + 1]
    assert set(shift.tolist()) == {31}
    assert [part.shape for part in fixed_point(0.5)] == [(), ()]


@pytest.mark.parametrize("scale", [0.0, -0.5, math.nan, math.inf, 2.0**-33, 2.0**31, 2.0**31 - 2.0**-30, 5e-324])
def test_scales_that_no_multiplier_represents(scale: float):
    with pytest.raises(ValueError, match="of channel 1, 0 is "):
        fixed_point(np.array([[1.0], [scale]]))
    with pytest.raises(ValueError, match=r"^the scale \S+ is "):
        fixed_point(scale)
