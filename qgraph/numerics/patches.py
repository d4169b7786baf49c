"""Convolutions as products of matrices: the patches of the input that each output position is made from (im2col).

    Conv           y[n, o, i] = sum over c, k of W[o, c, k] x[n, c, stride * i + dilation * k - pad]
                              = W [N, K] times row i of the patches [n, K],     K = channels of a group * elements of k

A ConvTranspose of stride s is the Conv of stride 1 over an input with s - 1 zeros between its elements, whose kernel is
turned around; here the patch is turned around instead, so that the weight keeps its order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Positions", "Window"]

Positions = tuple[np.ndarray, ...]
"""Which outputs: for each the sample, then the place along every spatial axis. Integers [n] each."""


@dataclass(frozen=True)
class Window:
    """How a kernel moves over its input; one entry for each spatial axis.

    Attributes:
        kernel: elements.
        strides: steps between outputs (between inputs, if transposed).
        dilations: steps between elements of the kernel.
        pads: zeros before the first element along each axis, then behind the last; less zeros for a transposed one.
        groups: parts of the channels that do not see one another.
        same: "upper" or "lower" pads so that there are ceil(size / stride) outputs, with the odd zero at that end;
            `pads` is not looked at then.
        transposed: see the module.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int = 1
    same: str = ""
    transposed: bool = False

    def positions(self, shape: tuple[int, ...], most: int, seed: int) -> Positions:
        """Choose outputs for an input of `shape` [n, C, ...]: all of them, or `most` drawn without repetition."""
        sizes = (shape[0], *self.outputs(shape[2:]))
        count = math.prod(sizes)
        chosen = np.arange(count)
        if count > most:
            chosen = np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
        return tuple(np.unravel_index(chosen, sizes))

    def rows(self, x: np.ndarray, positions: Positions) -> np.ndarray:
        """Return the patches that make the outputs at `positions`: float32 [groups, n, K].

        Args:
            x: float [n, C, ...].
            positions: as from `positions`, of the same shape.
        """
        padded = self._padded(x)
        channels, sizes = padded.shape[1], padded.shape[2:]
        # With the channels last, an element of the kernel takes whole rows of them.
        rows = np.ascontiguousarray(np.moveaxis(padded, 1, -1), np.float32).reshape(-1, channels)
        strides = (1,) * len(self.kernel) if self.transposed else self.strides
        steps = [int(np.prod(sizes[axis + 1 :])) for axis in range(len(sizes))]
        start = positions[0] * int(np.prod(sizes))
        for place, stride, step in zip(positions[1:], strides, steps, strict=True):
            start = start + place * (stride * step)
        elements = math.prod(self.kernel)
        patches = np.empty((self.groups, len(start), channels // self.groups, elements), np.float32)
        for number, element in enumerate(np.ndindex(self.kernel)):
            offset = sum(
                one * dilation * step for one, dilation, step in zip(element, self.dilations, steps, strict=True)
            )
            taken = rows[start + offset].reshape(len(start), self.groups, channels // self.groups)
            # The kernel of a transposed one is turned around.
            patches[..., elements - 1 - number if self.transposed else number] = taken.transpose(1, 0, 2)
        return patches.reshape(self.groups, len(start), channels // self.groups * elements)

    def outputs(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of the output along each axis."""
        pads = self._pads(sizes)
        found = []
        for axis, size in enumerate(sizes):
            extent = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            if self.transposed:
                found.append((size - 1) * self.strides[axis] + extent - sum(pads[axis]))
            else:
                found.append((size + sum(pads[axis]) - extent) // self.strides[axis] + 1)
        return tuple(found)

    def _pads(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        if not self.same:
            half = len(self.kernel)
            return list(zip(self.pads[:half], self.pads[half:], strict=True))
        pads = []
        for axis, size in enumerate(sizes):
            extent = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            step = self.strides[axis]
            total = max((-(-size // step) - 1) * step + extent - size, 0)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if self.same == "upper" else (large, small))
        return pads

    def _padded(self, x: np.ndarray) -> np.ndarray:
        pads = self._pads(x.shape[2:])
        if self.transposed:
            wide = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.strides, strict=True)]
            spread = np.zeros((*x.shape[:2], *wide), x.dtype)
            spread[_every(self.strides)] = x
            extents = [(size - 1) * step for size, step in zip(self.kernel, self.dilations, strict=True)]
            pads = [(extent - begin, extent - end) for extent, (begin, end) in zip(extents, pads, strict=True)]
            cut = [slice(max(-begin, 0), size - max(-end, 0)) for (begin, end), size in zip(pads, wide, strict=True)]
            x = np.asarray(spread[tuple([slice(None)] * 2 + cut)])
            pads = [(max(begin, 0), max(end, 0)) for begin, end in pads]
        return np.pad(x, [(0, 0), (0, 0), *pads]) if any(map(any, pads)) else x


def _every(steps: tuple[int, ...]) -> Any:
    """Return an index that takes every `steps`-th element along the last axes."""
    return (..., *(slice(None, None, step) for step in steps))
