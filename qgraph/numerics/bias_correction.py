"""What a bias can mend of the error that quantization leaves in a layer's output: its mean, channel by channel.

    error[n, c]    mean over the positions of sample n of  exact output - quantized output,  in channel c
    shift[c]       mean over the samples of error[n, c]: added to the bias, it makes the mean error zero

Where an activation f follows, what the next layer reads counts: the shift s solves

    mean of f(exact output) = mean of f(quantized output + s)

by Newton's method. Low-bit weights let outputs shrink towards their mean. Matching the means before a Relu then cuts
off more and more of the tail that passes it, layer by layer; matching them behind it keeps what passes in size.

A mean over few samples is partly chance, by its standard error s. Such means are shrunk towards zero,

    shift[c] * max(0, 1 - (s[c] / shift[c])^2)

and a layer is left alone where this, without the sample that it is tried on, makes the mean errors larger.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2 and
appendix D, for the shift before the activation; James and Stein, "Estimation with Quadratic Loss" (1961), for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Activation", "Errors", "bias_shift", "matching_shifts"]

_MOST_PASSES = 6
_CLOSE = 1e-3
"""Of the output's deviation: means that differ by less are equal."""
_LEAST_SLOPE = 0.01
"""Where the activation passes on less of a shift, its output says nothing of it."""


@dataclass(frozen=True)
class Activation:
    """A function of each element.

    Attributes:
        kind: "clamp" (to low..high), "hard-sigmoid" (alpha x + beta, to 0..1) or "hard-swish".
        low: of a clamp; alpha of a hard sigmoid.
        high: of a clamp; beta of a hard sigmoid.
    """

    kind: Literal["clamp", "hard-sigmoid", "hard-swish"]
    low: float = 0.0
    high: float = math.inf

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the function of `x`, in its type."""
        if self.kind == "clamp":
            return np.asarray(np.clip(x, self.low, self.high))
        if self.kind == "hard-sigmoid":
            return np.asarray(np.clip(x * x.dtype.type(self.low) + x.dtype.type(self.high), 0.0, 1.0))
        return np.asarray(x * _gate(x))

    def slope(self, x: np.ndarray) -> np.ndarray:
        """Return the derivative at `x`, in its type."""
        if self.kind == "clamp":
            return np.asarray((x > self.low) & (x < self.high), x.dtype)
        if self.kind == "hard-sigmoid":
            line = x * x.dtype.type(self.low) + x.dtype.type(self.high)
            inside = (line > 0.0) & (line < 1.0)
            return np.asarray(np.where(inside, x.dtype.type(self.low), x.dtype.type(0.0)))
        return np.asarray(_gate(x) + np.where(np.abs(x) < 3.0, x / x.dtype.type(6.0), x.dtype.type(0.0)))


def _gate(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(x / x.dtype.type(6.0) + x.dtype.type(0.5), 0.0, 1.0))


class Errors:
    """The shifts that a layer's output channels need, sample by sample."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    def add(self, rows: np.ndarray, positions: np.ndarray) -> None:
        """Add samples.

        Args:
            rows: (samples, channels), the mean error of each, or the shift that mends it.
            positions: (samples,), over how many positions each mean goes; samples without any are left out.
        """
        self._rows.append(rows[positions > 0].astype(np.float64))
        self._weights.append(positions[positions > 0].astype(np.float64))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return shifts (samples, channels) and weights (samples,), float64."""
        if not self._rows:
            return np.zeros((0, 0)), np.zeros(0)
        return np.concatenate(self._rows), np.concatenate(self._weights)


def bias_shift(errors: np.ndarray, weights: np.ndarray, significance: float = 1.0) -> np.ndarray | None:
    """Return what to add to each channel's bias, or None where that does not help samples that are left out.

    Args:
        errors: float64 (samples, channels): mean of exact minus quantized output.
        weights: float64 (samples,): positions that each sample's mean goes over.
        significance: how many standard errors of a mean count as chance. With 0, or one sample, none do.

    Returns:
        float64 (channels,); 0 where the mean lies within `significance` standard errors.

    Raises:
        ValueError: there are no samples, or an error is not finite.
    """
    if not len(errors):
        raise ValueError("there are no errors to take the mean of")
    if not np.isfinite(errors).all():
        raise ValueError("an error is NaN or infinite")
    shares = (weights / weights.sum())[:, None]
    mean = np.array([math.fsum(column) for column in (errors * shares).T])
    count = len(errors)
    if significance <= 0.0 or count < 2:
        return mean
    variance = np.square((errors - mean) * shares).sum(axis=0) * (count / (count - 1))
    certain = np.where(mean == 0.0, 1.0, np.square(mean))
    factor = np.clip(1.0 - significance**2 * variance / certain, 0.0, 1.0)
    others = factor * (mean - shares * errors) / (1.0 - shares)
    # By how much the others' shift lowers the squared mean error of the sample that is left out.
    gain = float((shares * others * (2.0 * errors - others)).sum())
    return factor * mean if gain > 0.0 else None


def matching_shifts(
    measure: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    weights: np.ndarray,
    before: np.ndarray,
    deviation: np.ndarray,
) -> np.ndarray:
    """Return the shift that each sample wants, (samples, channels), so that the means behind an activation match.

    Args:
        measure: takes shifts (channels,) and returns, with these added to the quantized output, the mean of exact minus
            quantized output behind the activation, (samples, channels), and the mean slope of the activation there,
            (channels,).
        weights: (samples,): positions that each sample's mean goes over.
        before: (samples, channels): the mean errors before the activation; they count for channels that it lets
            nothing of pass.
        deviation: (channels,): standard deviation of the quantized output, the largest step that is taken.
    """
    shares = weights / weights.sum()
    shift = np.zeros(deviation.shape)
    rows, slope = measure(shift)
    for passes in range(1, _MOST_PASSES):
        error = shares @ rows
        if (np.abs(error) <= _CLOSE * deviation / (1 if passes == 1 else 4)).all():
            break
        step = np.clip(error / np.maximum(slope, _LEAST_SLOPE), -deviation, deviation)
        blind = shares @ before if passes == 1 else shift
        shift = np.where(slope >= _LEAST_SLOPE, shift + step, blind)
        rows, slope = measure(shift)
    return np.where(slope >= _LEAST_SLOPE, shift + rows / np.maximum(slope, _LEAST_SLOPE), before)
