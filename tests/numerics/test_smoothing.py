"""Channel scales against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.numerics.smoothing import (
    ALPHAS,
    Sample,
    alpha_scales,
    channel_scales,
    product_noise,
    search_scales,
)


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
    assert product_noise([sample_of(rows)], [weight], scales) == pytest.approx(total / 6, rel=1e-3)


def test_rows_whose_product_is_zero_do_not_count():
    rows = np.vstack([normal(4, 5), np.zeros((3, 5), np.float32)])
    with_zeros = product_noise([sample_of(rows)], [normal(5, 3)], np.ones(5, np.float32))
    assert with_zeros == product_noise([sample_of(rows[:4])], [normal(5, 3)], np.ones(5, np.float32))
    zeros = sample_of(np.zeros((2, 5), np.float32))
    assert product_noise([zeros], [normal(5, 3)], np.ones(5, np.float32)) == 0.0


def test_every_product_counts_alike_and_runs_may_share_a_scale():
    rows, other = normal(6, 5), 3 * normal(4, 5, seed=2)
    samples, weights, ones = [sample_of(rows), sample_of(other)], [normal(5, 3), 100 * normal(5, 9, seed=1)], np.ones(5)
    each = [product_noise(samples, [one], ones) for one in weights]
    assert product_noise(samples, weights, ones) == pytest.approx(np.mean(each), rel=1e-6)
    together = sample_of(np.vstack([rows, other]))
    shared = product_noise(samples, weights, ones, per_run=False)
    assert shared == pytest.approx(product_noise([together], weights, ones), rel=1e-6)
    assert shared > product_noise(samples, weights, ones)


def test_alpha_scales_are_those_of_the_paper():
    largest, weights = np.array([1.0, 8.0, 64.0, 2.0]), np.array([2.0, 0.5, 0.25, 4.0])
    for alpha in (0.0, 0.3, 1.0):
        expected = [x**alpha / w ** (1 - alpha) for x, w in zip(largest, weights, strict=True)]
        expected /= np.prod(expected) ** 0.25
        np.testing.assert_allclose(alpha_scales(largest, weights, alpha), expected, rtol=1e-6)
        again = alpha_scales(largest / expected, weights * expected, alpha)
        np.testing.assert_allclose(again, np.ones(4), rtol=1e-6)


def test_silent_channels_keep_their_scale_and_no_scale_is_extreme():
    scales = alpha_scales(np.array([0.0, 1.0, 1e-9, 1e9]), np.array([1.0, 1.0, 1.0, 1.0]), 1.0)
    np.testing.assert_array_equal(scales, np.float32([1, 1, 1 / 256, 256]))
    np.testing.assert_array_equal(alpha_scales(np.zeros(3), np.ones(3), 0.5), np.ones(3, np.float32))


def test_the_least_noise_of_all_that_is_tried_wins():
    rows, weight = normal(64, 32) * np.exp(normal(32, seed=3)), normal(32, 16, seed=1)
    samples = [sample_of(rows[:32]), sample_of(rows[32:])]
    found = search_scales(samples, [weight], thresholds=False)
    largest, heaviest = np.abs(rows).max(axis=0), np.abs(weight).max(axis=1)
    noises = {alpha: product_noise(samples, [weight], alpha_scales(largest, heaviest, alpha)) for alpha in ALPHAS}
    assert found.alpha == min(noises, key=lambda alpha: noises[alpha])
    assert found.after == pytest.approx(min(noises.values()), rel=1e-6)
    assert found.before == product_noise(samples, [weight], np.ones(32, np.float32))
    fixed = search_scales(samples, [weight], alphas=(0.0,), thresholds=False)
    assert (fixed.alpha, fixed.after) == (0.0, pytest.approx(noises[0.0], rel=1e-6))


def test_tied_channels_take_the_same_scale():
    rows = normal(64, 8) * np.float32([1, 1, 1, 1, 1, 1, 30, 1])
    tied = np.array([0, 0, 2, 2, 4, 4, 6, 6])
    found = search_scales([sample_of(rows)], [normal(8, 16, seed=1)], tied=tied)
    assert found.after < found.before
    np.testing.assert_array_equal(found.scales, found.scales[tied])
    assert found.scales[6] > found.scales[0]


def test_wide_weights_are_judged_by_some_of_their_columns():
    rows = normal(16, 8) * np.float32([1, 1, 1, 1, 1, 1, 30, 1])
    weight = np.repeat(normal(8, 50, seed=1), 60, axis=1)  # 3000 columns; every second of them is as good
    whole, few = (product_noise([sample_of(rows)], [one], np.ones(8)) for one in (weight, weight[:, ::2]))
    assert whole == few


def test_an_outlier_channel_is_found_and_what_has_none_is_left():
    rows = normal(64, 32)
    found = search_scales([sample_of(rows)], [normal(32, 16, seed=1)])
    assert found.after >= 0.5 * found.before
    rows[:, 7] *= 50
    weight = normal(32, 16, seed=1) * np.where(np.arange(32) == 7, 0.02, 1)[:, None]
    found = search_scales([sample_of(rows)], [weight])
    assert int(found.scales.argmax()) == 7
    assert found.after < 0.05 * found.before
    thresholds = search_scales([sample_of(rows)], [weight], alphas=())
    assert thresholds.alpha is None
    assert (thresholds.scales >= 1).all()
    assert thresholds.after >= found.after


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="nan"):
        product_noise([sample_of(normal(4, 5))], [np.full((5, 3), np.nan, np.float32)], np.ones(5, np.float32))
