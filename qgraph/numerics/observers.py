"""Streaming observers: the range of a tensor from any number of feeds, in constant memory.

An observer sees each feed once and keeps bounds, or a histogram, never elements. The least and largest element are
always exact; histograms count a sample of each feed (`draw`), so that their cost does not grow with the tensor.

An observer made with an `axis` keeps one range for each index along it. Ranges are float64, () or (channels,).
"""

from __future__ import annotations

import abc
import functools

import numpy as np

from qgraph.numerics.histograms import Histogram, entropy_threshold, mse_range, percentile_range
from qgraph.numerics.schemes import UINT8, Scheme

__all__ = [
    "Entropy",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "draw",
    "places",
]

_SAMPLE = 4096
_CHANNEL_SAMPLE = 256
_HALF = 2048
_CHANNEL_HALF = 512
_PENDING = 1 << 14


@functools.lru_cache(maxsize=8)
def places(count: int) -> np.ndarray:
    """Return `count` increasing numbers in [0, 1), one in each of as many equal stretches, float64.

    Where in its stretch each lies follows the golden ratio's multiples, so that no period of the data (rows, channels)
    meets the samples at the same phase, as it would with a fixed step.
    """
    numbers = np.arange(count, dtype=np.float64)
    result = (numbers + np.modf(numbers * 0.6180339887498949)[0] * 0.999) / count
    result.flags.writeable = False
    return result


def draw(rows: np.ndarray, count: int) -> np.ndarray:
    """Return `count` elements of each row of [channels, n], spread evenly over it; all of them when there are fewer."""
    if rows.shape[1] <= count:
        return rows
    return np.asarray(rows[:, (places(count) * rows.shape[1]).astype(np.int64)])


class Observer(abc.ABC):
    """Follows one tensor.

    Args:
        axis: keep a range for each index along it; one range in all when None.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis

    @property
    def sample(self) -> int:
        """Elements that `add` wants from each feed, of each index along the axis; 0 when bounds suffice."""
        return 0

    def update(self, array: np.ndarray) -> None:
        """Take in one feed's tensor: finite real numbers. An empty tensor changes nothing.

        Raises:
            ValueError: it has no such axis, or another number of channels than before.
        """
        if self.axis is not None and not -array.ndim <= self.axis < array.ndim:
            raise ValueError(f"an array of {array.ndim} dimensions has no axis {self.axis}")
        rows = array.reshape(1, -1) if self.axis is None else _channels_first(array, self.axis)
        if rows.size == 0:
            return
        shape = () if self.axis is None else (len(rows),)
        low, high = (bound.astype(np.float64).reshape(shape) for bound in (rows.min(axis=1), rows.max(axis=1)))
        self.add(low, high, draw(rows, self.sample).reshape(*shape, self.sample and -1))

    @abc.abstractmethod
    def add(self, low: np.ndarray, high: np.ndarray, sample: np.ndarray) -> None:
        """Take in one feed as its exact bounds, () or (channels,), and a sample, (n,) or (channels, n)."""

    @abc.abstractmethod
    def range(self, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
        """Return low and high, float64, () or (channels,), of the range to quantize with `scheme`.

        Raises:
            ValueError: nothing was observed.
        """


def _channels_first(array: np.ndarray, axis: int) -> np.ndarray:
    moved = np.moveaxis(array, axis, 0)
    return moved.reshape(moved.shape[0], -1)


class MinMax(Observer):
    """From the least to the largest element of all feeds."""

    def __init__(self, axis: int | None = None) -> None:
        super().__init__(axis)
        self.low: np.ndarray | None = None
        self.high: np.ndarray | None = None

    def add(self, low: np.ndarray, high: np.ndarray, sample: np.ndarray) -> None:
        """See `Observer.add`."""
        del sample
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)

    def range(self, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer.range`."""
        del scheme
        if self.low is None or self.high is None:
            raise ValueError("nothing was observed")
        return self.low, self.high


class MovingAverage(MinMax):
    """Exponential moving average of each feed's least and largest element, starting from the first feed's.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.1.

    Args:
        axis: see `Observer`.
        weight: of a new feed.
    """

    def __init__(self, axis: int | None = None, weight: float = 0.05) -> None:
        super().__init__(axis)
        self.weight = weight

    def add(self, low: np.ndarray, high: np.ndarray, sample: np.ndarray) -> None:
        """See `Observer.add`."""
        del sample
        self.low = low if self.low is None else self.low + self.weight * (low - self.low)
        self.high = high if self.high is None else self.high + self.weight * (high - self.high)


class _HistogramObserver(MinMax):
    """Counts a sample of every feed: 4096 elements, or 256 of each channel. A subclass says how to read the range."""

    def __init__(self, axis: int | None = None) -> None:
        super().__init__(axis)
        self._histogram: Histogram | None = None
        self._pending: list[np.ndarray] = []

    @property
    def sample(self) -> int:
        """See `Observer.sample`."""
        return _SAMPLE if self.axis is None else _CHANNEL_SAMPLE

    def add(self, low: np.ndarray, high: np.ndarray, sample: np.ndarray) -> None:
        """See `Observer.add`."""
        super().add(low, high, sample)
        self._pending.append(sample.reshape(low.size, -1))
        if sum(rows.size for rows in self._pending) >= _PENDING:
            self._count()

    def _count(self) -> Histogram:
        """Bring the histogram up to date: one large batch costs far less than several small ones."""
        low, high = super().range(UINT8)
        if self._histogram is None:
            self._histogram = Histogram(low.size, _HALF if self.axis is None else _CHANNEL_HALF)
        if self._pending:
            self._histogram.add(np.concatenate(self._pending, axis=1), np.maximum(-low, high).reshape(-1))
            self._pending.clear()
        return self._histogram

    def range(self, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer.range`. It never exceeds what was observed, and always holds zero."""
        low, high = super().range(scheme)
        histogram = self._count()
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        bounds = zip(low.reshape(-1).tolist(), high.reshape(-1).tolist(), strict=True)
        ranges = np.array([self._read(histogram, channel, *pair, scheme) for channel, pair in enumerate(bounds)])
        return np.maximum(low, ranges[:, 0].reshape(low.shape)), np.minimum(high, ranges[:, 1].reshape(high.shape))

    @abc.abstractmethod
    def _read(
        self, histogram: Histogram, channel: int, low: float, high: float, scheme: Scheme
    ) -> tuple[float, float]: ...


class Percentile(_HistogramObserver):
    """The range that holds all but a small share of the elements.

    Args:
        axis: see `Observer`.
        percentile: share to hold, in per cent.
    """

    def __init__(self, axis: int | None = None, percentile: float = 99.99) -> None:
        super().__init__(axis)
        self.percentile = percentile

    def _read(self, histogram: Histogram, channel: int, low: float, high: float, scheme: Scheme) -> tuple[float, float]:
        del low, high
        return percentile_range(histogram, channel, self.percentile, symmetric=scheme.symmetric)


class Entropy(_HistogramObserver):
    """The clipped range that loses the least information; see `entropy_threshold`.

    One threshold holds for both ends. A tensor without negative elements has all of an asymmetric scheme's integers
    for its positive side, any other half of them.
    """

    def _read(self, histogram: Histogram, channel: int, low: float, high: float, scheme: Scheme) -> tuple[float, float]:
        one_sided = not scheme.symmetric and (low == 0.0 or high == 0.0)
        levels = 1 << (scheme.bits if one_sided else scheme.bits - 1)
        threshold = entropy_threshold(histogram.magnitudes(channel), levels) * float(histogram.width[channel])
        return -threshold, threshold


class MeanSquaredError(_HistogramObserver):
    """The clipped range that gives the least squared error of quantization; see `mse_range`."""

    def _read(self, histogram: Histogram, channel: int, low: float, high: float, scheme: Scheme) -> tuple[float, float]:
        counts = histogram.counts[channel]
        used = counts > 0
        values = np.clip(histogram.centres()[used] * histogram.width[channel], low, high)
        return mse_range(values, counts[used], low, high, scheme)
