import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from qgraph.numerics.histograms import Histogram, entropy_threshold, mse_range, percentile_range
from qgraph.numerics.quantize import Parameters, dequantize, quantize, scale_and_zero_point
from qgraph.numerics.schemes import INT8, INT8_ACTIVATION, UINT8, Scheme


def filled(feeds, half=8):
    histogram = Histogram(1, half)
    for feed in feeds:
        row = np.asarray(feed, np.float32).reshape(1, -1)
        histogram.add(row, np.abs(row).max(axis=1))
    return histogram


def test_elements_are_counted_in_bins_cut_at_zero():
    histogram = filled([[0.0, 0.0, 0.5, 1.1, 7.9, 8.0, -0.5, -1.1, -1.5]])
    assert histogram.width.tolist() == pytest.approx([1.0], rel=1e-5)
    assert histogram.zeros.tolist() == [2]
    #                                              [-2,-1) [-1,0)  [0,1) [1,2)
    assert histogram.counts[0].tolist() == [0] * 6 + [2, 1] + [1, 1, 0, 0, 0, 0, 0, 2]
    assert histogram.magnitudes(0).tolist() == [2, 3, 0, 0, 0, 0, 0, 2]


def test_growing_merges_neighbours_and_loses_nothing():
    histogram = filled([[0.5, 1.5, 2.5, 8.0, -2.5], [33.0]])
    assert histogram.width.tolist() == pytest.approx([8.0], rel=1e-5)
    assert histogram.counts[0].tolist() == [0] * 7 + [1] + [4, 0, 0, 0, 1, 0, 0, 0]


@given(st.lists(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=20), min_size=1, max_size=6))
def test_counts_are_those_of_a_histogram_made_at_the_end(feeds):
    histogram = filled([np.array(feed) / 1000 for feed in feeds], half=16)
    everything = np.concatenate([np.asarray(np.array(feed) / 1000, np.float32) for feed in feeds]).astype(np.float64)
    assert histogram.zeros[0] == (everything == 0).sum()
    expected = np.zeros(32, np.int64)
    for element in everything[everything != 0]:
        expected[math.floor(element / histogram.width[0]) + 16] += 1
    assert histogram.counts[0].tolist() == expected.tolist()
    peak = np.abs(everything).max()
    assert peak == 0 or histogram.width[0] * 8 * 0.99 <= peak < histogram.width[0] * 16


def test_channels_are_apart():
    rows = np.array([[1.0, 2.0, 0.0], [-100.0, 0.0, 50.0], [0.0, 0.0, 0.0]], np.float32)
    histogram = Histogram(3, 8)
    for _ in range(2):
        histogram.add(rows, np.abs(rows).max(axis=1))
    for channel, row in enumerate(rows):
        alone = filled([row, row])
        assert histogram.width[channel] == alone.width[0]
        np.testing.assert_array_equal(histogram.counts[channel], alone.counts[0])
        assert histogram.zeros[channel] == alone.zeros[0]


def slow_entropy_threshold(counts, levels):
    """The procedure of Migacz 2017, slide by slide, with bins put into groups as pytorch-quantization does."""
    counts = [float(count) for count in counts]
    while counts and counts[-1] == 0:
        counts.pop()
    if len(counts) <= levels:
        return float(len(counts))
    best, best_divergence = None, math.inf
    for kept in range(levels, len(counts) + 1):
        reference = counts[:kept]
        reference[-1] += sum(counts[kept:])
        group_of = [bin_ * levels // kept for bin_ in range(kept)]
        candidate = [0.0] * kept
        for group in range(levels):
            members = [bin_ for bin_ in range(kept) if group_of[bin_] == group]
            nonempty = [bin_ for bin_ in members if reference[bin_] > 0]
            for bin_ in nonempty:
                candidate[bin_] = sum(counts[member] for member in members) / len(nonempty)
        p_sum, q_sum = sum(reference), sum(candidate)
        divergence = 0.0
        for p, q in zip(reference, candidate, strict=True):
            if p > 0:
                divergence += math.inf if q == 0 or q_sum == 0 else p / p_sum * math.log((p / p_sum) / (q / q_sum))
        if divergence < best_divergence - 1e-12:
            best, best_divergence = kept, divergence
    return best + 0.5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [4, 8, 128])
def test_entropy_is_the_published_procedure(seed, levels):
    random = np.random.default_rng(seed)
    data = np.abs(random.standard_t(2 + seed, 3000))
    counts = np.histogram(data, bins=160, range=(0, min(data.max(), 30.0)))[0]
    assert entropy_threshold(counts, levels) == slow_entropy_threshold(counts, levels)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_entropy_with_many_empty_bins(counts):
    fast, slow = entropy_threshold(np.array(counts), 4), slow_entropy_threshold(counts, 4)
    assert fast == slow


def test_entropy_clips_a_far_outlier_and_keeps_a_uniform_range():
    outlier = (10_000 * np.exp(-0.5 * (np.arange(2048) / 150) ** 2)).astype(np.int64)
    outlier[-1] = 1
    assert 400 < entropy_threshold(outlier, 128) < 900
    uniform = np.full(2048, 1000)
    assert entropy_threshold(uniform, 128) == 2048.5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
@pytest.mark.parametrize("kind", ["normal", "relu", "negative"])
def test_percentiles_are_those_of_the_data(kind, percentile, symmetric):
    data = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    data = {"normal": data, "relu": np.maximum(data, 0), "negative": -np.abs(data)}[kind]
    histogram = filled(np.split(data, 10), half=2048)
    low, high = percentile_range(histogram, 0, percentile, symmetric=symmetric)
    if symmetric:
        expected_high = np.percentile(np.abs(data), percentile)
        expected_low = -expected_high
    else:
        expected_low = min(0.0, np.percentile(data, (100 - percentile) / 2))
        expected_high = max(0.0, np.percentile(data, 100 - (100 - percentile) / 2))
    width = float(histogram.width[0])
    assert low == pytest.approx(expected_low, abs=2 * width)
    assert high == pytest.approx(expected_high, abs=2 * width)


def squared_error(data, low, high, scheme):
    scale, zero_point = scale_and_zero_point(low, high, scheme)
    back = dequantize(quantize(data, scheme, Parameters(scale, zero_point)))
    return ((back.astype(np.float64) - data) ** 2).sum()


@pytest.mark.parametrize("scheme", [UINT8, INT8, INT8_ACTIVATION, Scheme(bits=4, signed=False, symmetric=False)])
@pytest.mark.parametrize("kind", ["heavy", "lopsided", "relu"])
def test_the_range_of_least_squared_error_is_as_good_as_the_best_of_a_full_grid(kind, scheme):
    random = np.random.default_rng(1)
    data = {
        "heavy": random.standard_t(3, 4000),
        "lopsided": np.concatenate([random.standard_normal(3990), np.full(10, -40.0)]),
        "relu": np.maximum(random.standard_t(3, 4000), 0),
    }[kind].astype(np.float32)
    low, high = min(0.0, float(data.min())), max(0.0, float(data.max()))
    histogram = filled([data], half=2048)
    used = histogram.counts[0] > 0
    centres = np.clip((np.arange(-2048, 2048) + 0.5)[used] * histogram.width[0], low, high)
    found = squared_error(data, *mse_range(centres, histogram.counts[0][used], low, high, scheme), scheme)
    one_factor = scheme.symmetric or low == 0.0
    factors = np.arange(10, 101, 1 if one_factor else 5) / 100
    pairs = [(f, f) for f in factors] if one_factor else [(f, g) for f in factors for g in factors]
    best = min(squared_error(data, low * f, high * g, scheme) for f, g in pairs)
    assert found <= best * 1.01
    assert found <= squared_error(data, low, high, scheme) * 1.001
