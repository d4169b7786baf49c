import tracemalloc

import numpy as np
import pytest

from qgraph.numerics.observers import (
    Entropy,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    draw,
    places,
)
from qgraph.numerics.schemes import INT8, INT8_ACTIVATION, UINT8, Scheme

HISTOGRAMS = (Percentile, Entropy, MeanSquaredError)
ALL = (MinMax, MovingAverage, *HISTOGRAMS)


def feeds(count=12, shape=(3, 4, 50), seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32) * (1 + number % 5) for number in range(count)]


def observe(observer, arrays, scheme=INT8_ACTIVATION):
    for array in arrays:
        observer.update(array)
    return observer.range(scheme)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_minmax_is_exact(axis):
    arrays = feeds()
    low, high = observe(MinMax(axis), arrays)
    together = np.stack(arrays)
    axes = None if axis is None else tuple(a for a in range(4) if a != 1 + axis % 3)
    np.testing.assert_array_equal(low, together.min(axis=axes))
    np.testing.assert_array_equal(high, together.max(axis=axes))
    assert low.dtype == high.dtype == np.float64
    assert low.shape == () if axis is None else low.shape == (arrays[0].shape[axis],)


@pytest.mark.parametrize("axis", [None, 1])
def test_moving_average_weighs_feeds_by_age(axis):
    arrays = feeds()
    low, high = observe(MovingAverage(axis, weight=0.25), arrays)
    axes = None if axis is None else (0, 2)
    expected_low, expected_high = arrays[0].min(axis=axes), arrays[0].max(axis=axes)
    for array in arrays[1:]:
        expected_low = 0.75 * expected_low + 0.25 * array.min(axis=axes)
        expected_high = 0.75 * expected_high + 0.25 * array.max(axis=axes)
    np.testing.assert_allclose(low, expected_low, rtol=1e-6)
    np.testing.assert_allclose(high, expected_high, rtol=1e-6)


@pytest.mark.parametrize("scheme", [UINT8, INT8, Scheme(bits=4)])
@pytest.mark.parametrize("cls", HISTOGRAMS)
def test_ranges_stay_inside_what_was_seen_and_hold_zero(cls, scheme):
    for arrays in (feeds(), [np.abs(a) + 1 for a in feeds()], [-np.abs(a) for a in feeds()], [np.zeros((2, 3))]):
        low, high = observe(cls(), arrays, scheme)
        assert min(0.0, min(a.min() for a in arrays)) <= low <= 0.0
        assert 0.0 <= high <= max(0.0, max(a.max() for a in arrays))


@pytest.mark.parametrize("cls", ALL)
def test_each_channel_is_observed_as_if_it_were_alone(cls):
    arrays = feeds(shape=(4, 3, 80))
    low, high = observe(cls(axis=1), arrays)
    for channel in range(3):
        alone = observe(cls(axis=0), [array[:, channel].reshape(1, -1) for array in arrays])
        assert (low[channel], high[channel]) == (alone[0][0], alone[1][0])


@pytest.mark.parametrize("cls", ALL)
def test_memory_does_not_grow_with_feeds_or_tensors(cls):
    big = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)

    def peak(count):
        observer = cls()
        observer.update(big)
        tracemalloc.start()
        for number in range(count):
            observer.update(big * (1 + number / 10))
        kept, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return kept, highest

    peak(2)
    assert peak(200)[0] < peak(20)[0] + 100_000
    assert peak(20)[0] < 300_000


@pytest.mark.parametrize("cls", ALL)
def test_the_same_feeds_give_the_same_range(cls):
    assert observe(cls(), feeds()) == observe(cls(), feeds())


@pytest.mark.parametrize("cls", ALL)
def test_empty_tensors_change_nothing_and_nothing_has_no_range(cls):
    observer = cls()
    with pytest.raises(ValueError, match="nothing"):
        observer.range(UINT8)
    observer.update(np.empty((0, 3), np.float32))
    with pytest.raises(ValueError, match="nothing"):
        observer.range(UINT8)
    observer.update(np.ones((1, 3), np.float32))
    before = observer.range(UINT8)
    observer.update(np.empty((0, 3), np.float32))
    assert observer.range(UINT8) == before
    with pytest.raises(ValueError, match="no axis 2"):
        cls(axis=2).update(np.ones((2, 2), np.float32))


def test_a_sample_is_spread_evenly_and_in_no_phase_with_rows():
    for count in (1, 7, 256, 4096):
        spots = places(count)
        assert ((spots * count).astype(int) == np.arange(count)).all()
    # In an image whose columns differ, every column is met about equally often.
    image = np.tile(np.arange(112.0), 96 * 112)[None]
    met = np.bincount(draw(image, 4096)[0].astype(int), minlength=112)
    assert met.min() > 0.5 * met.mean()
    assert met.max() < 1.5 * met.mean()
    small = np.arange(10.0)[None]
    assert draw(small, 10) is small


@pytest.mark.parametrize("cls", HISTOGRAMS)
def test_a_sample_gives_about_the_range_of_all_elements(cls):
    random = np.random.default_rng(0)
    arrays = [random.laplace(size=200_000).astype(np.float32) for _ in range(30)]
    sampled = observe(cls(), arrays)
    # Fed in pieces no larger than a sample, everything counts.
    everything = observe(cls(), [piece for array in arrays for piece in np.array_split(array, 49)])
    np.testing.assert_allclose(sampled, everything, rtol=0.2)


def test_each_method_clips_what_it_is_meant_to_clip():
    random = np.random.default_rng(0)
    arrays = [np.append(random.standard_normal(4000), 60.0).astype(np.float32) for _ in range(20)]
    assert observe(MinMax(), arrays)[1] == 60.0
    assert observe(MovingAverage(), arrays)[1] == pytest.approx(60.0)
    assert observe(Percentile(percentile=99.9), arrays)[1] < 5.0
    assert observe(Entropy(), arrays, INT8)[1] < 15.0
    assert observe(MeanSquaredError(), arrays, Scheme(bits=4))[1] < 15.0
