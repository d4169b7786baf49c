"""The model of vpmaddubsw against a slow loop, and where it differs from an exact product."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.numerics.dot_products import LARGEST_PAIR, largest_pair, saturating_product
from qgraph.numerics.quantize import minmax_parameters, quantize
from qgraph.numerics.schemes import INT8_WEIGHT, Scheme


def slow(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    rows, width = left.shape
    result = np.zeros((rows, right.shape[1]), np.int64)
    for row in range(rows):
        for column in range(right.shape[1]):
            for start in range(0, width, 2):
                pair = sum(int(left[row, k]) * int(right[k, column]) for k in range(start, min(start + 2, width)))
                result[row, column] += max(-32768, min(32767, pair))
    return result


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_it_is_what_the_manual_says(width: int):
    random = np.random.default_rng(width)
    left = random.integers(0, 256, (3, width)).astype(np.uint8)
    right = random.integers(-128, 128, (width, 4)).astype(np.int8)
    np.testing.assert_array_equal(saturating_product(left, right), slow(left, right))


def test_weights_of_8_bits_saturate_and_of_7_do_not():
    random = np.random.default_rng(0)
    left = np.full((2, 64), 255, np.uint8)
    floats = np.abs(random.normal(size=(64, 5))).astype(np.float32)
    for scheme, right_away in ((INT8_WEIGHT, False), (Scheme(bits=7, narrow=True), True), (Scheme(bits=7), True)):
        one = scheme.per_channel(2, 1)
        weights = quantize(floats, one, minmax_parameters(floats, one)).values
        exact = left.astype(np.int32) @ weights.astype(np.int32)
        assert (largest_pair(weights) <= LARGEST_PAIR) == right_away
        assert bool(np.array_equal(saturating_product(left, weights), exact)) == right_away


@pytest.mark.parametrize("least", [-64, 64, 0])
def test_the_bound_is_tight(least: int):
    weights = np.full((2, 1), least, np.int8)
    left = np.full((1, 2), 255, np.uint8)
    assert largest_pair(weights) <= LARGEST_PAIR
    assert saturating_product(left, weights)[0, 0] == 510 * least
    beyond = np.full((2, 1), 65, np.int8)
    assert largest_pair(beyond) > LARGEST_PAIR
    assert saturating_product(left, beyond)[0, 0] == LARGEST_PAIR < 510 * 65


def test_types_are_told_apart():
    with pytest.raises(ValueError, match="uint8 and int8 are multiplied, not int8"):
        saturating_product(np.zeros((1, 2), np.int8), np.zeros((2, 1), np.int8))
