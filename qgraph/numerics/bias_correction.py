"""What a bias can mend of the error that quantization leaves in a layer's output: its mean, channel by channel.

    error[n, c]    mean over the positions of sample n of  exact output - quantized output,  in channel c
    shift[c]       mean over the samples of error[n, c]: added to the bias, it makes the mean error zero

A mean over few samples is partly chance. A channel whose mean lies within its own standard error is left alone, and so
is the whole layer where the shift of one half of the samples would not have made the mean error of the other smaller.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2 and
appendix D; the half that is held out is ours.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["Errors", "bias_shift"]


class Errors:
    """Mean errors of a layer's output channels, sample by sample."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    def add(self, rows: np.ndarray, positions: int) -> None:
        """Add samples.

        Args:
            rows: (samples, channels), the mean error of each.
            positions: over how many positions each mean goes.
        """
        self._rows.append(rows.astype(np.float64))
        self._weights.append(np.full(len(rows), float(positions)))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return errors (samples, channels) and weights (samples,), float64."""
        if not self._rows:
            return np.zeros((0, 0)), np.zeros(0)
        return np.concatenate(self._rows), np.concatenate(self._weights)


def bias_shift(errors: np.ndarray, weights: np.ndarray, significance: float = 1.0) -> np.ndarray | None:
    """Return what to add to each channel's bias, or None where that would not have helped samples that are held out.

    Args:
        errors: float64 (samples, channels): mean of exact minus quantized output.
        weights: float64 (samples,): positions that each sample's mean goes over.
        significance: channels whose mean error is below so many of its standard errors get 0. With 0, all are shifted
            and nothing is held out.

    Returns:
        float64 (channels,).

    Raises:
        ValueError: there are no samples, or an error is not finite.
    """
    if not len(errors):
        raise ValueError("there are no errors to take the mean of")
    if not np.isfinite(errors).all():
        raise ValueError("an error is NaN or infinite")
    mean, deviation = _mean(errors, weights)
    if significance <= 0.0 or len(errors) < 2:
        return mean
    if not _helps_others(errors, weights):
        return None
    return np.where(np.abs(mean) >= significance * deviation, mean, 0.0)


def _mean(errors: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean of each channel and its standard error; infinite for one sample."""
    shares = weights / weights.sum()
    mean = np.array([math.fsum(column) for column in (errors * shares[:, None]).T])
    count = len(errors)
    if count < 2:
        return mean, np.full(mean.shape, np.inf)
    square = np.square((errors - mean) * shares[:, None]).sum(axis=0) * (count / (count - 1))
    return mean, np.sqrt(square)


def _helps_others(errors: np.ndarray, weights: np.ndarray) -> bool:
    """Tell whether the mean of one half of the samples lies nearer to that of the other half than zero does."""
    halves = [_mean(errors[start::2], weights[start::2])[0] for start in (0, 1)]
    apart = float(np.square(halves[0] - halves[1]).sum())
    return 2.0 * apart < float(np.square(halves).sum())
