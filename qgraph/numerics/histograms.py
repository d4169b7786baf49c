"""Histograms that grow with their data, and the ranges that are read off them.

    ... [-2w, -w) [-w, 0) | [0, w) [w, 2w) ...        bins of one width w, cut at zero

When an element lies beyond the last bin, w doubles and neighbours merge. No count is ever split, so that the result
does not depend on rounding. Exact zeros are counted apart: every scheme represents them without error.
"""

from __future__ import annotations

import numpy as np

from qgraph.numerics.quantize import scale_and_zero_point
from qgraph.numerics.schemes import Scheme

__all__ = ["Histogram", "entropy_threshold", "mse_range", "percentile_range"]

_LEAST_FACTOR = 0.1
_MARGIN = 1.0 + 2.0**-20
"""Keeps the peak off the upper edge of the last bin, which does not belong to it."""


class Histogram:
    """Counts of the elements of several channels, in constant memory.

    Args:
        channels: number of channels; each has bins of its own width.
        half: bins on either side of zero; even. Between `half` / 2 and `half` of the side that reaches farther are in
            use.

    Attributes:
        counts: int64, [channels, 2 * half]; bin k holds elements in [k - half, k - half + 1) * width.
        zeros: int64, [channels].
        width: float64, [channels]; 0 as long as a channel has seen nothing but zeros.
    """

    def __init__(self, channels: int, half: int) -> None:
        self.half = half
        self.counts = np.zeros((channels, 2 * half), np.int64)
        self.zeros = np.zeros(channels, np.int64)
        self.width = np.zeros(channels)

    def add(self, rows: np.ndarray, peak: np.ndarray) -> None:
        """Count finite elements.

        Args:
            rows: real numbers, [channels, n].
            peak: at least the largest magnitude of each row, [channels].
        """
        self._grow(peak)
        width = np.where(self.width == 0.0, 1.0, self.width)
        place = rows.astype(np.float64)
        place /= width[:, None]
        place += self.half
        np.floor(place, out=place)
        # Only what rounding has moved lies outside.
        np.clip(place, 0, 2 * self.half - 1, out=place)
        place += np.arange(len(rows))[:, None] * self.counts.shape[1]
        flat = place.reshape(-1).astype(np.int64)
        self.counts += np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)
        zeros = rows.shape[1] - np.count_nonzero(rows, axis=1)
        self.counts[:, self.half] -= zeros
        self.zeros += zeros

    def _grow(self, peak: np.ndarray) -> None:
        fresh = (self.width == 0.0) & (peak > 0.0)
        self.width[fresh] = peak[fresh] / self.half * _MARGIN
        while (short := (peak >= self.width * self.half) & (peak > 0.0)).any():
            pairs = self.counts[short].reshape(-1, self.half, 2).sum(axis=2)
            grown = np.zeros((len(pairs), 2 * self.half), np.int64)
            grown[:, self.half // 2 : self.half // 2 + self.half] = pairs
            self.counts[short] = grown
            self.width[short] *= 2.0

    def magnitudes(self, channel: int) -> np.ndarray:
        """Return the counts of |x| in bins [k, k + 1) * width, without the zeros."""
        row = self.counts[channel]
        return np.asarray(row[self.half :] + row[: self.half][::-1])

    def centres(self) -> np.ndarray:
        """Return the middle of each bin in units of its width."""
        return np.arange(-self.half, self.half) + 0.5


def entropy_threshold(counts: np.ndarray, levels: int) -> float:
    """Return where to clip magnitudes, in bins, so that `levels` integers lose the least information.

    For every i from `levels` to the number of bins, the reference P is the first i bins, with all that lies beyond
    added to the last of them; Q is the first i bins alone, merged into `levels` groups (bin k into group
    floor(k * levels / i)), each spread evenly over those of its bins where P is not empty. The least Kullback-Leibler
    divergence of P from Q wins, the smaller i of equal ones.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017; bins into groups as NVIDIA's pytorch-quantization.
    All candidates are computed at once from running sums, which is exact.

    Args:
        counts: of magnitudes, (n,).
        levels: integers on one side of zero.

    Returns:
        i + 0.5 for the best i; n when there is no candidate with less.
    """
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    if used <= levels:
        return float(used)
    part = counts[:used].astype(np.float64)
    kept = np.arange(levels, used + 1)
    edges = -(-np.arange(levels + 1) * kept[:, None] // levels)
    mass, filled, entropy = (
        np.concatenate([[0.0], np.cumsum(one)]) for one in (part, part > 0, part * np.log(np.maximum(part, 1.0)))
    )
    total = mass[-1]
    beyond = total - mass[kept]
    last = part[kept - 1]
    in_group = np.diff(mass[edges], axis=1)
    bins = np.diff(filled[edges], axis=1)
    bins[:, -1] += (last == 0) & (beyond > 0)
    reference = in_group.copy()
    reference[:, -1] += beyond
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(reference > 0, reference * np.log(in_group / bins), 0.0).sum(axis=1)
        divergence = (
            entropy[kept - 1]
            + (last + beyond) * np.log(np.maximum(last + beyond, 1.0))
            - spread
            + total * np.log(mass[kept] / total)
        )
    # An empty last group cannot stand for what lies beyond it: its divergence is infinite (or, with nothing, NaN).
    divergence[np.isnan(divergence)] = np.inf
    return float(kept[np.argmin(divergence)]) + 0.5


def percentile_range(histogram: Histogram, channel: int, percentile: float, *, symmetric: bool) -> tuple[float, float]:
    """Return the range that holds `percentile` per cent of the elements, zeros included, interpolated inside bins.

    Symmetric: of the magnitudes. Otherwise equal shares are cut off at both ends.
    """
    width, zeros = float(histogram.width[channel]), int(histogram.zeros[channel])
    share = percentile / 100.0
    if symmetric:
        counts = histogram.magnitudes(channel)
        high = _quantile(counts, zeros, share) * width
        return -high, high
    row, half = histogram.counts[channel], histogram.half
    above, below = row[half:], row[:half][::-1]
    tail = (1.0 - share) / 2.0
    high = _quantile(above, zeros + int(below.sum()), 1.0 - tail) * width
    low = _quantile(below, zeros + int(above.sum()), 1.0 - tail) * width
    return -low, high


def _quantile(counts: np.ndarray, before: int, share: float) -> float:
    """Return where `share` of all lies, in bins from zero outwards, when `before` elements lie on this side of it."""
    running = np.cumsum(counts) + before
    if running[-1] == 0 or share * running[-1] <= before:
        return 0.0
    wanted = share * running[-1]
    place = int(np.searchsorted(running, wanted))
    return place + float((wanted - (running[place] - counts[place])) / counts[place])


def mse_range(values: np.ndarray, counts: np.ndarray, low: float, high: float, scheme: Scheme) -> tuple[float, float]:
    """Return the range inside low..high whose quantization gives the least squared error.

    Symmetric schemes shrink both ends together, others each end in turn: from 1 down to 0.1 in steps of 0.05, then in
    steps of 0.01 around the best. The wider of equal ranges wins.

    Args:
        values: real numbers, (n,).
        counts: how often each occurs, (n,).
        low: not above zero.
        high: not below zero.
        scheme: the format.
    """
    coarse = np.linspace(1.0, _LEAST_FACTOR, 19)
    fine = np.linspace(0.04, -0.04, 9)
    factors = {"low": 1.0, "high": 1.0}
    ends = ["high" if high > 0.0 else "low"] if scheme.symmetric or low == 0.0 or high == 0.0 else ["high", "low"]
    for offsets in (None, fine, fine) if len(ends) > 1 else (None, fine):
        for end in ends:
            tried = coarse if offsets is None else np.clip(factors[end] + offsets, _LEAST_FACTOR, 1.0)
            both = {other: np.full(len(tried), factor) for other, factor in factors.items()} | {end: tried}
            if scheme.symmetric:
                both = {"low": tried, "high": tried}
            best = np.argmin(_squared_errors(values, counts, low * both["low"], high * both["high"], scheme))
            factors = {other: float(column[best]) for other, column in both.items()}
    return low * factors["low"], high * factors["high"]


def _squared_errors(
    values: np.ndarray, counts: np.ndarray, low: np.ndarray, high: np.ndarray, scheme: Scheme
) -> np.ndarray:
    """Return the squared error of `values` for each range (low, high), all float64."""
    scale, zero_point = (one.astype(np.float64)[:, None] for one in scale_and_zero_point(low, high, scheme))
    levels = np.clip(scheme.rounded(values / scale) + zero_point, scheme.qmin, scheme.qmax)
    return np.asarray(((levels - zero_point) * scale - values) ** 2 @ counts.astype(np.float64))
