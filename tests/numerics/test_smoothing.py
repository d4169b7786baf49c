"""Channel scales against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.numerics.smoothing import Sample, channel_scales, product_noise, search_scales


def sample_of(rows: np.ndarray) -> Sample:
    return Sample(rows.min(axis=0).astype(np.float64), rows.max(axis=0).astype(np.float64), rows)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_only_channels_above_the_threshold_are_scaled():
    largest = np.array([1.0, 2.0, 3.0, 4.0, 40.0])
    np.testing.assert_array_equal(channel_scales(largest, 0.75), np.float32([1, 1, 1, 1, 10]))
    np.testing.assert_array_equal(channel_scales(largest, 1.0), np.ones(5, np.float32))
    np.testing.assert_array_equal(channel_scales(np.array([0.0, 0.0, 0.0, 5.0]), 0.5), np.ones(4, np.float32))


def test_noise_is_that_of_a_slow_loop():
    rows, weight = normal(6, 5), normal(5, 3, seed=1)
    scales = np.array([1, 2, 1, 0.5, 4], np.float32)
    x, w = rows / scales, weight * scales[:, None]
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    step = np.float32((high - low) / 255)
    zero = np.rint(-low / step)
    total = 0.0
    for row, exact in zip(x, rows @ weight, strict=True):
        quantized = [(np.clip(np.rint(value / step) + zero, 0, 255) - zero) * step for value in row]
        columns = [np.rint(column / (np.abs(column).max() / 127)) * (np.abs(column).max() / 127) for column in w.T]
        error = [np.dot(quantized, column) - value for column, value in zip(columns, exact, strict=True)]
        total += np.dot(error, error) / np.dot(exact, exact)
    assert product_noise([sample_of(rows)], weight, scales) == pytest.approx(total / 6, rel=1e-3)


def test_rows_whose_product_is_zero_do_not_count():
    rows = np.vstack([normal(4, 5), np.zeros((3, 5), np.float32)])
    with_zeros = product_noise([sample_of(rows)], normal(5, 3), np.ones(5, np.float32))
    assert with_zeros == product_noise([sample_of(rows[:4])], normal(5, 3), np.ones(5, np.float32))
    zeros = sample_of(np.zeros((2, 5), np.float32))
    assert product_noise([zeros], normal(5, 3), np.ones(5, np.float32)) == 0.0


def test_an_outlier_channel_is_found_and_what_has_none_is_left():
    rows = normal(64, 32)
    _, before, after = search_scales([sample_of(rows)], normal(32, 16, seed=1))
    assert after >= 0.5 * before
    rows[:, 7] *= 50
    scales, before, after = search_scales(
        [sample_of(rows)], normal(32, 16, seed=1) * np.where(np.arange(32) == 7, 0.02, 1)[:, None]
    )
    assert int(scales.argmax()) == 7
    assert (scales >= 1).all()
    assert after < 0.05 * before


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="nan"):
        product_noise([sample_of(normal(4, 5))], np.full((5, 3), np.nan, np.float32), np.ones(5, np.float32))
