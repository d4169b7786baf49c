"""Factors for channels with which quantization to one scale for a tensor costs least.

Dividing channel c of an activation by s_c, and multiplying what reads it, moves error between weights and activations
and among channels. To first order, with u = log s:

    a weight W between channels i (read) and o (made), range R = max |W_oi| s_i / s_o, steps Δ = R / levels:
        Δ² / 12 * sum over o, i of E[x_i²] / s_i² * g_o s_o²
    an activation x of range A = max a_i / s_i, steps Δ = A / levels:
        Δ² / 12 * sum over i of g_i s_i²

where g_c is what an error of channel c in the float network's own units costs: the share that it has in the outputs of
the layers that read it. All these terms are convex in u; a maximum is taken as a p-norm, and u descends along the
gradient. Channels that do nothing (constant ones, or such that a Relu never lets through) have no g and get what
makes room for the others.

This is the aim of Nagel et al. (2019), section 4.1, ranges used well, weighed by what they are for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["ActivationNoise", "WeightNoise", "noise_of", "quietest"]

_NORM = 12.0
"""p of the p-norms that stand for maxima."""
_FIRST_RATE = 0.1
_LAST_RATE = 0.002
_MOMENTUM = 0.9
_SECOND_MOMENTUM = 0.99


class WeightNoise:
    """The error that a weight's rounding makes.

    Args:
        values: float, (...), of two axes or more: |weight|, the largest of each kernel.
        made: int, of as many axes, broadcastable: class of the channel that an element makes, -1 for a fixed one.
        read: int, likewise: class of the channel that it reads.
        cost: float, shaped as `made`: what an error of that channel costs.
        energy: float, shaped as `read`: mean square of the channel that is read, times the size of a kernel.
        levels: of the quantizer, on one side of zero.
        per_channel: each output channel has a scale of its own.
    """

    def __init__(
        self,
        values: np.ndarray,
        made: np.ndarray,
        read: np.ndarray,
        cost: np.ndarray,
        energy: np.ndarray,
        *,
        levels: int,
        per_channel: bool = False,
    ) -> None:
        largest = float(values.max(initial=0.0))
        powers = (values / largest) ** _NORM if largest > 0.0 else np.zeros(values.shape)
        self._made, self._read, self._cost, self._energy = made, read, cost, energy
        self._unit = largest**2 / (12.0 * levels**2)
        self._per_channel = per_channel
        self._powers = powers
        self._is_dense = not any(one > 1 and other > 1 for one, other in zip(made.shape, read.shape, strict=True))
        if self._is_dense:  # every channel that is made reads all
            matrix = powers.reshape(made.size, read.size) if _leads(made, read) else powers.reshape(read.size, -1).T
            self._powers = matrix.astype(np.float32)
            self._made, self._cost = made.reshape(-1), np.broadcast_to(cost, made.shape).reshape(-1)
            self._read, self._energy = read.reshape(-1), np.broadcast_to(energy, read.shape).reshape(-1)

    def add(self, scales: np.ndarray, gradient: np.ndarray) -> float:
        """Return the error, and add its derivative along the logarithms of the scales to `gradient`.

        Args:
            scales: float64, (count + 1,): the last one, for fixed channels, is 1.
            gradient: float64, (count + 1,): is changed.
        """
        made, read = scales[self._made], scales[self._read]
        return (self._add_dense if self._is_dense else self._add_grouped)(made, read, gradient)

    def _add_dense(self, made: np.ndarray, read: np.ndarray, gradient: np.ndarray) -> float:
        """Without an array of the weight's size: made is (o,), read (i,)."""
        narrowed, widened = made**-_NORM, read**_NORM
        reach = narrowed * np.einsum("oi,i->o", self._powers, widened)
        total = reach if self._per_channel else np.full_like(reach, reach.sum())
        squares, inner = self._cost * made**2, float((self._energy / read**2).sum())
        rows = squares * inner
        steps = np.where(total > 0.0, total ** (2.0 / _NORM), 0.0) * self._unit
        error = float((steps * rows).sum())
        # What moves with the range of a row, or of all rows.
        moved = steps * rows if self._per_channel else np.full_like(rows, error)
        share = np.divide(moved, total, out=np.zeros_like(moved), where=total > 0.0)
        ranged = widened * np.einsum("oi,o->i", self._powers, share * narrowed)
        np.add.at(gradient, self._read, 2.0 * (ranged - self._energy / read**2 * (steps * squares).sum()))
        np.add.at(gradient, self._made, 2.0 * (steps * rows - share * reach))
        return error

    def _add_grouped(self, made: np.ndarray, read: np.ndarray, gradient: np.ndarray) -> float:
        """Of depthwise and grouped layers, whose weights are small."""
        powers = self._powers * (read**_NORM * made**-_NORM)
        within = tuple(axis for axis in range(powers.ndim) if not self._per_channel or made.shape[axis] == 1)
        total = powers.sum(axis=within, keepdims=True)
        noise = np.broadcast_to((self._cost * made**2) * (self._energy / read**2), powers.shape)
        rows = noise.sum(axis=within, keepdims=True)
        steps = np.where(total > 0.0, total ** (2.0 / _NORM), 0.0) * self._unit
        share = np.divide(powers, total, out=np.zeros_like(powers), where=total > 0.0)
        slope = 2.0 * steps * (rows * share - noise)  # along log(read / made)
        for ids, sign in ((self._read, 1.0), (self._made, -1.0)):
            flat = tuple(axis for axis in range(slope.ndim) if ids.shape[axis] == 1)
            np.add.at(gradient, ids.reshape(-1), sign * slope.sum(axis=flat).reshape(-1))
        return float((steps * rows).sum())


def _leads(made: np.ndarray, read: np.ndarray) -> bool:
    """Tell whether the axis of what is made stands before that of what is read."""
    axes = [next((axis for axis, size in enumerate(ids.shape) if size > 1), None) for ids in (made, read)]
    return axes[0] is None or axes[1] is None or axes[0] < axes[1]


class ActivationNoise:
    """The error that an activation's rounding makes.

    Args:
        spans: float, (channels,): from the least number to the largest, zero included.
        ids: int, (channels,): the classes, -1 for fixed ones.
        cost: float, (channels,): what an error of each costs.
        levels: of the quantizer.
    """

    def __init__(self, spans: np.ndarray, ids: np.ndarray, cost: np.ndarray, *, levels: int) -> None:
        largest = float(spans.max(initial=0.0))
        self._powers = (spans / largest) ** _NORM if largest > 0.0 else np.zeros(spans.shape)
        self._ids, self._cost = ids, cost
        self._unit = largest**2 / (12.0 * levels**2)

    def add(self, scales: np.ndarray, gradient: np.ndarray) -> float:
        """See `WeightNoise.add`."""
        own = scales[self._ids]
        powers = self._powers * own**-_NORM
        total = float(powers.sum())
        if total <= 0.0:
            return 0.0
        noise = self._cost * own**2
        rows = float(noise.sum())
        steps = total ** (2.0 / _NORM) * self._unit
        np.add.at(gradient, self._ids, 2.0 * steps * (noise - rows * (powers / total)))
        return float(steps * rows)


def noise_of(terms: Sequence[WeightNoise | ActivationNoise], scales: np.ndarray) -> float:
    """Return the error of all terms with factors `scales`, float64 (count,)."""
    padded = np.append(scales, 1.0)
    return sum(term.add(padded, np.zeros_like(padded)) for term in terms)


def quietest(
    terms: Sequence[WeightNoise | ActivationNoise], lower: np.ndarray, upper: np.ndarray, *, steps: int = 100
) -> np.ndarray:
    """Return the factors with the least sum of errors that gradient descent finds, starting from 1.

    Args:
        terms: what is added up.
        lower: float64, (count,), positive: the least factor of each class.
        upper: float64, (count,): the largest; equal to `lower` where it is fixed.
        steps: of the descent, by the rule of Kingma and Ba, "Adam" (2015), with a rate that falls linearly.
    """
    low, high = np.log(lower), np.log(upper)
    logs = np.clip(np.zeros(len(lower)), low, high)
    first, second = np.zeros_like(logs), np.zeros_like(logs)
    for step in range(steps):
        gradient = np.zeros(len(logs) + 1)
        padded = np.append(np.exp(logs), 1.0)
        error = sum(term.add(padded, gradient) for term in terms)
        if error <= 0.0:
            break
        slope = gradient[:-1] / error
        first = _MOMENTUM * first + (1.0 - _MOMENTUM) * slope
        second = _SECOND_MOMENTUM * second + (1.0 - _SECOND_MOMENTUM) * slope**2
        rate = _LAST_RATE + (_FIRST_RATE - _LAST_RATE) * (1.0 - step / steps)
        ahead = first / (1.0 - _MOMENTUM ** (step + 1))
        spread = np.sqrt(second / (1.0 - _SECOND_MOMENTUM ** (step + 1)))
        logs = np.clip(logs - rate * ahead / (spread + 1e-7), low, high)
    return np.exp(logs)
