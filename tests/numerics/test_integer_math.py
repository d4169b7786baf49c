"""Integer functions against Python's integers and fractions, one number at a time, and against floats within a step."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from qgraph.numerics import integer_math


def nearest(value: Fraction) -> int:
    """Return the nearest integer, ties away from zero."""
    return int(abs(value) + Fraction(1, 2)) * (1 if value >= 0 else -1)


def test_square_roots():
    roots = [*range(70), *(2**bit + off for bit in range(8, 31) for off in (-1, 0, 1)), 2**31 - 1]
    numbers = sorted({max(root * root + off, 0) for root in roots for off in (-1, 0, 1)} | {2**62})
    found = integer_math.integer_sqrt(np.array([numbers], np.int64))
    assert found.shape == (1, len(numbers))
    for number, root in zip(numbers, found[0].tolist(), strict=True):
        assert root**2 <= number < (root + 1) ** 2
    with pytest.raises(ValueError, match="nonneg"):
        integer_math.integer_sqrt(np.array(-1))


def test_quotients():
    limit = 2**61
    numbers = [*range(-9, 10), limit, -limit, limit - 1, 1 - limit, 3 * 2**40 + 1]
    found = integer_math.rounded_divide(np.array(numbers).reshape(-1, 1), np.array(numbers))
    expected = [[nearest(Fraction(a, b or 1)) for b in numbers] for a in numbers]
    assert found.tolist() == expected


def test_interpolation_hits_every_number():
    random = np.random.default_rng(0)
    table = random.integers(-(2**22), 2**22, 513, endpoint=True).astype(np.int32)
    x = np.arange(-(2**15), 2**15).astype(np.int16)
    found = integer_math.table_interpolate(x, table)
    ends = [int(entry) for entry in table]
    for number, y in zip(x.tolist(), found.tolist(), strict=True):
        index, rest = divmod(number + 2**15, 128)
        exact = Fraction(ends[index] * (128 - rest) + ends[index + 1] * rest, 128 * 128)
        assert y == math.floor(exact + Fraction(1, 2))


def slow_softmax(row: list[int], table: list[int], divisor: int, one: int) -> list[int]:
    exponentials = []
    for score in row:
        index, rest = divmod(max(row) - score, divisor)
        start, end = (table[min(index + step, len(table) - 1)] for step in (0, 1))
        exponentials.append((start * (divisor - rest) + end * rest + divisor // 2) // divisor)
    total = sum(exponentials)
    return [(exponential * one + total // 2) // total for exponential in exponentials]


@pytest.mark.parametrize("divisor", [1, 7, 4096])
@pytest.mark.parametrize("spread", [10, 40_000, 2**31])
def test_softmax(divisor: int, spread: int):
    random = np.random.default_rng(divisor)
    table = np.rint(2**15 * np.exp(-np.arange(65) / 6)).astype(np.int32)
    x = random.integers(-spread, spread, (4, 2, 9)).astype(np.int32)
    x[0, 0] = 5
    found = integer_math.softmax(x, table, np.int32(divisor), np.int32(32767))
    assert found.dtype == np.int32
    for row, y in zip(x.reshape(-1, 9).tolist(), found.reshape(-1, 9).tolist(), strict=True):
        assert y == slow_softmax(row, table.tolist(), divisor, 32767)


def slow_normalize(row: list[int], fraction: int, epsilon: int, numerator: int, mean: int) -> list[int]:
    centred = [x * fraction - mean for x in row]
    variance = sum(c * c for c in centred) // len(row) + epsilon
    deviation = max(math.isqrt(variance), 1)
    return [nearest(Fraction(c * numerator, deviation)) for c in centred]


@pytest.mark.parametrize("fraction", [1, 16, 1024])
@pytest.mark.parametrize("epsilon", [0, 12345])
def test_normalization(fraction: int, epsilon: int):
    random = np.random.default_rng(fraction)
    x = random.integers(-(2**15), 2**15, (5, 2, 13)).astype(np.int32)
    x[0, 0], x[0, 1] = 7, 0
    arguments = (np.int64(fraction), np.int64(epsilon), np.int64(4096))
    layer, rms = integer_math.layer_normalize(x, *arguments), integer_math.rms_normalize(x, *arguments)
    assert (layer.dtype, rms.dtype) == (np.int32, np.int32)
    rows = zip(x.reshape(-1, 13).tolist(), layer.reshape(-1, 13).tolist(), rms.reshape(-1, 13).tolist(), strict=True)
    for row, found_layer, found_rms in rows:
        mean = nearest(Fraction(sum(row) * fraction, len(row)))
        assert found_layer == slow_normalize(row, fraction, epsilon, 4096, mean)
        assert found_rms == slow_normalize(row, fraction, epsilon, 4096, 0)


def test_normalization_is_one():
    x = np.random.default_rng(3).integers(-(2**15), 2**15, (6, 64)).astype(np.int32)
    found = integer_math.layer_normalize(x, np.int64(256), np.int64(0), np.int64(4096)) / 4096
    exact = (x - x.mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, exact, atol=1 / 4096)
