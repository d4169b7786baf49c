"""Taming the outlier channels of an activation before it is quantized with one scale for the whole tensor.

    x W = (x / s) (diag(s) W)        s[channel] large where x is large, and where W leaves room for it

A few channels that are ten times as large as the rest take all the levels of an integer. Dividing them, and
multiplying the weight's rows, moves the difficulty into the weight, which has a scale for each output column.

Sources: Xiao et al., "SmoothQuant" (2022), section 4: s = max|x|^alpha / max|w|^(1 - alpha), where alpha says how much
of the difficulty moves; Wei et al., "Outlier Suppression+" (2023), section 4.2: s = max(1, largest / t), which leaves
all channels below a threshold t as they are. Alpha and t are searched for the least change of the product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qgraph.numerics.products import product, steady
from qgraph.numerics.quantize import scale_and_zero_point
from qgraph.numerics.schemes import INT8_WEIGHT, UINT8

__all__ = ["ALPHAS", "Sample", "Smoothing", "alpha_scales", "channel_scales", "product_noise", "search_scales"]

ALPHAS = tuple(step / 20 for step in range(21))
"""What is tried for alpha."""
_QUANTILES = (0.75, 0.9, 0.95, 0.98)
"""Thresholds that are tried: the size that this share of the channels stays below."""
_FURTHEST = 8.0
"""Binary logarithm of the largest scale that comes from an alpha."""
_MOST_COLUMNS = 2048
"""Columns of the weights that judge scales; more of them would tell the same."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was seen of an activation in one run: its channels' bounds, (channels,), and some rows, (rows, channels)."""

    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """Scales for the channels of an activation, and what they are good for.

    Attributes:
        scales: what the channels are divided by, float32, (channels,).
        alpha: that they come from; None if they come from a threshold, or are all 1.
        before: noise of the quantized products without the scales, as `product_noise` tells it.
        after: noise with them.
    """

    scales: np.ndarray
    alpha: float | None
    before: float
    after: float


def channel_scales(largest: np.ndarray, quantile: float) -> np.ndarray:
    """Return max(1, largest / t) for each channel, t the `quantile` of `largest`; float32, (channels,).

    Args:
        largest: greatest magnitude of each channel, finite and not negative.
        quantile: from 0 to 1. Where it falls on zero, nothing is scaled.
    """
    threshold = float(np.quantile(largest.astype(np.float64), quantile))
    if threshold <= 0.0:
        return np.ones(largest.shape, np.float32)
    return np.asarray(np.maximum(1.0, largest / threshold), np.float32)


def alpha_scales(largest: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """Return largest^alpha / weights^(1 - alpha) for each channel, with a geometric mean of 1; float32, (channels,).

    What the mean is does not matter to the integers. Channels that are nothing but zeros, in the activation or in the
    weights, get 1, and no scale is more than 256 times from 1: samples do not tell what channels that were small on
    them may do elsewhere.

    Args:
        largest: greatest magnitude of each channel of the activation, finite and not negative.
        weights: greatest magnitude of each row of the weights, finite and not negative.
        alpha: from 0 (all rows of the weights become equally large) to 1 (all channels of the activation do).
    """
    heard = (largest > 0.0) & (weights > 0.0)
    logarithms = np.zeros(largest.shape)
    if heard.any():
        found = alpha * np.log2(largest[heard], dtype=np.float64)
        found -= (1.0 - alpha) * np.log2(weights[heard], dtype=np.float64)
        logarithms[heard] = np.clip(found - found.mean(), -_FURTHEST, _FURTHEST)
    return np.asarray(np.exp2(logarithms), np.float32)


def product_noise(
    samples: Sequence[Sample], weights: Sequence[np.ndarray], scales: np.ndarray, *, per_run: bool = True
) -> float:
    """Return the noise of products with 8-bit activation and weights: the mean over rows of |error|^2 / |exact|^2.

    The activation is uint8 with a zero point, the weights int8 with one scale for each column.

    Args:
        samples: of the activation, at least one with a row.
        weights: of the products that read it, each (channels, columns); every product counts alike.
        scales: what channels are divided by, (channels,).
        per_run: the activation has one scale for each run; otherwise one for all samples.

    Raises:
        ValueError: something is not finite, or shapes do not fit.
    """
    with steady():
        return _Judge(samples, weights, per_run=per_run).noise(scales)


def search_scales(
    samples: Sequence[Sample],
    weights: Sequence[np.ndarray],
    *,
    per_run: bool = True,
    alphas: Sequence[float] = ALPHAS,
    thresholds: bool = True,
    tied: np.ndarray | None = None,
) -> Smoothing:
    """Return the channel scales of least noise; of equal ones, those of the first alpha, and rather none than some.

    Args:
        samples: of the activation, at least one with a row.
        weights: of the products that read it, each (channels, columns).
        per_run: as for `product_noise`.
        alphas: that are tried; a single one without `thresholds` is taken whatever it does.
        thresholds: whether scales from thresholds are tried too.
        tied: int, (channels,): the first channel of those that have to take the same scale; all are free by default.

    Raises:
        ValueError: as `product_noise`.
    """
    channels = len(weights[0])
    groups = np.arange(channels) if tied is None else tied
    seen = _of_groups(np.max([np.maximum(np.abs(one.low), np.abs(one.high)) for one in samples], axis=0), groups)
    rows = _of_groups(np.max([np.abs(one).max(axis=1, initial=0.0) for one in weights], axis=0), groups)
    none = np.ones(channels, np.float32)
    with steady():
        judge = _Judge(samples, weights, per_run=per_run)
        best = Smoothing(none, None, before := judge.noise(none), before)
        tried: list[tuple[float | None, np.ndarray]] = [(alpha, alpha_scales(seen, rows, alpha)) for alpha in alphas]
        if thresholds:
            tried += [(None, channel_scales(seen, quantile)) for quantile in _QUANTILES]
        for alpha, scales in tried:
            noise = judge.noise(scales)
            if noise < best.after or len(tried) == 1:
                best = Smoothing(scales, alpha, before, noise)
    return best


def _of_groups(magnitudes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return for each channel the greatest of its group."""
    largest = np.zeros(magnitudes.shape, np.float64)
    np.maximum.at(largest, groups, magnitudes)
    return np.asarray(largest[groups])


class _Judge:
    """Tells the noise of given scales; call it inside `steady`."""

    def __init__(self, samples: Sequence[Sample], weights: Sequence[np.ndarray], *, per_run: bool) -> None:
        for one in weights:
            if not np.isfinite(one).all():
                raise ValueError(f"a weight holds {one[~np.isfinite(one)][0]}")
        total = sum(one.shape[1] for one in weights)
        step = -(-total // _MOST_COLUMNS)
        parts = [one[:, ::step] for one in weights]
        self._weight = np.ascontiguousarray(np.hstack(parts), np.float32)
        self._starts = np.cumsum([0, *(one.shape[1] for one in parts[:-1])])
        self._rows = np.concatenate([one.rows for one in samples])
        self._low, self._high = (
            np.stack(bounds) for bounds in zip(*((one.low, one.high) for one in samples), strict=True)
        )
        self._run = np.repeat(np.arange(len(samples)), [len(one.rows) for one in samples])
        if not per_run:
            self._low, self._high = self._low.min(axis=0, keepdims=True), self._high.max(axis=0, keepdims=True)
            self._run[:] = 0
        self._exact = product(self._rows, self._weight)
        self._power = self._by_product(self._exact)

    def noise(self, scales: np.ndarray) -> float:
        # One product of all rows: many small ones spend their time waking threads.
        error = product(self._rounded_rows(scales), self._rounded_weight(scales)) - self._exact
        heard = self._power > 0.0
        if not heard.any():
            return 0.0
        ratios = np.divide(self._by_product(error), self._power, where=heard, out=np.zeros_like(self._power))
        counts = heard.sum(axis=0)
        return float(np.mean(ratios.sum(axis=0)[counts > 0] / counts[counts > 0]))

    def _by_product(self, results: np.ndarray) -> np.ndarray:
        """Return |row|^2 of every product, (rows, products)."""
        return np.asarray(np.add.reduceat(np.square(results, dtype=np.float64), self._starts, axis=1))

    def _rounded_rows(self, scales: np.ndarray) -> np.ndarray:
        low, high = (self._low / scales).min(axis=1), (self._high / scales).max(axis=1)
        step, zero_point = (one[self._run, None] for one in scale_and_zero_point(low, high, UINT8))
        zero = zero_point.astype(np.float32)
        integers = np.rint(self._rows / scales / step) + zero
        return np.asarray((np.clip(integers, UINT8.qmin, UINT8.qmax) - zero) * step)

    def _rounded_weight(self, scales: np.ndarray) -> np.ndarray:
        scaled = self._weight * np.asarray(scales, np.float32)[:, None]
        step = np.abs(scaled).max(axis=0) / np.float32(INT8_WEIGHT.qmax)
        step[step == 0.0] = 1.0
        scaled /= step
        np.rint(scaled, out=scaled)
        scaled *= step
        return scaled
