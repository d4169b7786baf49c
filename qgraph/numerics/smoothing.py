"""Taming the outlier channels of an activation before it is quantized with one scale for the whole tensor.

    x W = (x / s) (diag(s) W)        s[channel] >= 1 where the channel outgrows the others, 1 elsewhere

A few channels that are ten times as large as the rest take all the levels of an integer. Dividing just them, and
multiplying the weight's rows, moves the difficulty into the weight, which has a scale for each output column.

Source: Wei et al., "Outlier Suppression+" (2023), section 4.2: s = max(1, largest / t), with t searched for the least
change of the product; in the setting of Xiao et al., "SmoothQuant" (2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qgraph.numerics.quantize import dequantize, minmax_parameters, quantize, scale_and_zero_point
from qgraph.numerics.schemes import INT8_WEIGHT, UINT8

__all__ = ["Sample", "channel_scales", "exact_product", "product_noise", "search_scales"]

_QUANTILES = (0.75, 0.9, 0.95, 0.98)
"""Thresholds that are tried: the size that this share of the channels stays below."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was seen of an activation in one run: its channels' bounds, (channels,), and some rows, (rows, channels)."""

    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray


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


def product_noise(
    samples: Sequence[Sample], weight: np.ndarray, scales: np.ndarray, exact: np.ndarray | None = None
) -> float:
    """Return the noise of the product with an 8-bit activation and weight: the mean over rows of |error|^2 / |exact|^2.

    The activation is uint8 with one scale for each run, the weight int8 with one for each column.

    Args:
        samples: of the activation, at least one with a row.
        weight: (channels, columns).
        scales: what channels are divided by, (channels,).
        exact: the product of all rows with the weight, (rows, columns), where it is known already.

    Raises:
        ValueError: something is not finite, or shapes do not fit.
    """
    if exact is None:
        exact = exact_product(samples, weight)
    scaled = weight * scales[:, None]
    scheme = INT8_WEIGHT.per_channel(2, 1)
    rounded = dequantize(quantize(scaled, scheme, minmax_parameters(scaled, scheme)))
    # One product of all rows: many small ones spend their time waking threads.
    error = np.concatenate([_rounded_rows(sample, scales) for sample in samples]) @ rounded - exact
    power = np.square(exact, dtype=np.float64).sum(axis=1)
    noise = np.square(error, dtype=np.float64).sum(axis=1)
    heard = power > 0.0
    return float(np.mean(noise[heard] / power[heard])) if heard.any() else 0.0


def exact_product(samples: Sequence[Sample], weight: np.ndarray) -> np.ndarray:
    """Return the product of all rows of the samples with `weight`, (rows, columns)."""
    return np.asarray(np.concatenate([sample.rows for sample in samples]) @ weight)


def _rounded_rows(sample: Sample, scales: np.ndarray) -> np.ndarray:
    parameters = scale_and_zero_point((sample.low / scales).min(), (sample.high / scales).max(), UINT8)
    return dequantize(quantize(sample.rows / scales, UINT8, parameters))


def search_scales(samples: Sequence[Sample], weight: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return the channel scales of least noise, the noise without them, and the noise with them.

    Args:
        samples: of the activation, at least one with a row.
        weight: (channels, columns); several products of the same activation side by side.

    Raises:
        ValueError: as `product_noise`.
    """
    largest = np.max([np.maximum(np.abs(sample.low), np.abs(sample.high)) for sample in samples], axis=0)
    best = np.ones(largest.shape, np.float32)
    exact = exact_product(samples, weight)
    before = noise = product_noise(samples, weight, best, exact)
    for quantile in _QUANTILES:
        scales = channel_scales(largest, quantile)
        found = product_noise(samples, weight, scales, exact)
        if found < noise:
            best, noise = scales, found
    return best, before, noise
