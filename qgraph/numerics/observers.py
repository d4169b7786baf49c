"""Streaming observers: the range of a tensor from any number of feeds, in constant memory.

An observer sees each feed once and keeps bounds, or a histogram, never elements. The least and largest element are
always exact; histograms count a sample of each feed (`draw`), so that their cost does not grow with the tensor.

An observer made with an `axis` keeps one range for each index along it. Ranges are float64, () or (channels,).
"""

from __future__ import annotations

import abc
import functools
from typing import ClassVar

import numpy as np

from qgraph.numerics.schemes import Scheme

__all__ = ["MinMax", "MovingAverage", "Observer", "draw", "places"]


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

    sample: ClassVar[int] = 0
    """Elements that `add` wants from each feed (of each index along the axis): 0 when bounds suffice."""

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis

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
        self.add(low, high, draw(rows, self.sample).reshape(*shape, -1))

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
