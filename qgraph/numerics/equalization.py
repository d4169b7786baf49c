"""Factors that make the channels of layers alike in range, for quantizers with one scale for a whole tensor.

Between two layers, channel i of what the first makes is divided by s_i, and the second multiplies it again:

    s_i = sqrt(r1_i / r2_i)        r1_i, r2_i: the largest |weight| that makes channel i, and that reads it

so that both become sqrt(r1_i r2_i). Here r is taken relative to the largest of its whole tensor, as what counts is how
much of the tensor's range a channel uses; where several layers make or read a channel, the one that uses most counts.
Every layer but the ends of a network is both, so the steps are repeated, from group of channels to group, until they
change nothing.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["Magnitudes", "channel_range", "channel_sum", "equalize"]

_DEAD = 1e-12
"""What uses less than this share of its tensor's range does nothing, and stays as it is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Magnitudes:
    """A weight between channels.

    Attributes:
        values: float64, (...): |weight|, the largest of each kernel; finite.
        made: int, broadcastable to `values`: the class of the channel that each element makes, -1 for a fixed one.
        read: int, likewise: the class of the channel that it reads.
    """

    values: np.ndarray
    made: np.ndarray
    read: np.ndarray


def equalize(
    weights: Sequence[Magnitudes],
    lower: np.ndarray,
    upper: np.ndarray,
    *,
    sweeps: int = 400,
    tolerance: float = 1e-5,
) -> np.ndarray:
    """Return the factor of each class, float64 (count,): what is made is divided by it.

    The factors of each group of channels (those that some layer makes or reads together) have a geometric mean of 1,
    unless some of its channels are fixed or at their bounds. Channels that are never made, or never read, keep 1.

    Args:
        weights: all layers, in topological order.
        lower: float64, (count,), positive: the least factor of each class.
        upper: float64, (count,): the largest; equal to `lower` where it is fixed.
        sweeps: over all groups, at most.
        tolerance: largest change of a factor's logarithm with which they end.
    """
    low, high = np.log(lower), np.log(upper)
    logs = np.clip(np.zeros(len(lower)), low, high)
    groups = list(_groups(weights, len(lower)))
    for _ in range(sweeps):
        before = logs.copy()
        for group in groups:
            members = group.members
            logs[members] = np.clip(logs[members] + group.step(weights, logs), low[members], high[members])
        if float(np.abs(logs - before).max(initial=0.0)) < tolerance:
            break
    return np.exp(logs)


def channel_range(values: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """Return the largest of `values` for each class: float64, (count,), 0 where it has none.

    Args:
        values: float64, not negative.
        ids: int, of as many dimensions, broadcastable to `values`; -1 for none.
        count: number of classes.
    """
    flat = tuple(axis for axis in range(values.ndim) if ids.shape[axis] == 1)
    largest = values.max(axis=flat, keepdims=True, initial=0.0)
    result = np.zeros(count + 1)  # the last one is for -1
    np.maximum.at(result, np.broadcast_to(ids, largest.shape).reshape(-1), largest.reshape(-1))
    return result[:-1]


def channel_sum(values: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """Return the sum of `values` for each class: float64, (count,); see `channel_range`."""
    flat = tuple(axis for axis in range(values.ndim) if ids.shape[axis] == 1)
    total = values.sum(axis=flat, keepdims=True)
    result = np.zeros(count + 1)
    np.add.at(result, np.broadcast_to(ids, total.shape).reshape(-1), total.reshape(-1))
    return result[:-1]


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Channels that some layer makes or reads together.

    Attributes:
        members: their classes.
        made: the weights that make some.
        read: the weights that read some.
        whole: no channel beside them is fixed.
    """

    members: np.ndarray
    made: Sequence[int]
    read: Sequence[int]
    whole: bool

    def step(self, weights: Sequence[Magnitudes], logs: np.ndarray) -> np.ndarray:
        """Return the change of the members' logarithms that makes what they make and what they read alike."""
        made = self._use(weights, logs, self.made, "made")
        read = self._use(weights, logs, self.read, "read")
        alive = (made > _DEAD) & (read > _DEAD)
        change = np.zeros(len(self.members))
        change[alive] = 0.5 * np.log(made[alive] / read[alive])
        if self.whole and alive.any():
            change[alive] -= (change[alive] + logs[self.members[alive]]).mean()
        return change

    def _use(self, weights: Sequence[Magnitudes], logs: np.ndarray, numbers: Sequence[int], side: str) -> np.ndarray:
        """Return which share of a tensor's range each member uses, in the layer where it uses most."""
        use = np.zeros(len(logs))
        for number in numbers:
            weight = weights[number]
            factors = np.append(np.exp(logs), 1.0)
            values = weight.values * (factors[weight.read] / factors[weight.made])
            largest = values.max(initial=0.0)
            if largest > 0.0:
                use = np.maximum(use, channel_range(values, getattr(weight, side), len(logs)) / largest)
        return np.asarray(use[self.members])


def _groups(weights: Sequence[Magnitudes], count: int) -> Iterator[_Group]:
    """Yield the groups, in the order in which weights make them."""
    group = np.arange(count)
    sides = [np.unique(ids) for weight in weights for ids in (weight.made, weight.read)]
    classes = [side[side >= 0] for side in sides]
    while True:
        before = group.copy()
        for side in classes:
            if side.size:
                np.minimum.at(group, side, group[side].min())
        group = group[group]
        if (group == before).all():
            break
    fixed = {
        int(group[used[0]]) for side, used in zip(sides, classes, strict=True) if used.size and used.size < side.size
    }
    order = dict.fromkeys(int(group[side[0]]) for side in classes if side.size)
    for one in order:
        members = np.flatnonzero(group == one)
        touching = [bool(side.size) and int(group[side[0]]) == one for side in classes]
        made, read = np.flatnonzero(touching[0::2]).tolist(), np.flatnonzero(touching[1::2]).tolist()
        yield _Group(members, made, read, one not in fixed)
