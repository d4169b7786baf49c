"""Windows that slide over images: sizes, steps and margins of convolutions and poolings of one or two dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qgraph.codegen.c_graph import IntegerGraph, refusal
from qgraph.codegen.c_text import plus, times

__all__ = ["Window", "window_of"]


@dataclass(frozen=True)
class Window:
    """A sliding window, always with two axes: one-dimensional signals are images of height 1.

    Attributes:
        size: rows and columns of the input.
        output: rows and columns of the output.
        kernel, strides, dilations: of the window.
        before: rows above and columns left of the input.
    """

    size: tuple[int, int]
    output: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    before: tuple[int, int]

    @property
    def pointwise(self) -> bool:
        """Tell whether each element of the output sees the one element of the input at the same place."""
        return self.kernel == (1, 1) and self.size == self.output and self.strides == (1, 1) and self.before == (0, 0)

    def start(self, axis: int, index: str) -> str:
        """Return where in the input the window for an index of the output starts; may be outside."""
        return plus(times(index, self.strides[axis]) or "0", -self.before[axis])

    def may_leave(self, axis: int) -> tuple[bool, bool]:
        """Tell whether a window reaches below the first, and beyond the last element of an axis."""
        last = (self.output[axis] - 1) * self.strides[axis] - self.before[axis]
        return self.before[axis] > 0, last + (self.kernel[axis] - 1) * self.dilations[axis] >= self.size[axis]

    def wholly_inside(self, starts: tuple[str, str]) -> str:
        """Return the condition under which all of a window that starts at a row and column is in the input."""
        parts = []
        for axis, start in enumerate(starts):
            below, beyond = self.may_leave(axis)
            room = self.size[axis] - (self.kernel[axis] - 1) * self.dilations[axis]
            parts += [f"{start} >= 0"] * below + [f"{start} < {room}"] * beyond
        return " && ".join(parts)

    def inside(self, axis: int, place: str) -> str:
        """Return the condition under which a place is in the input, "" if it always is."""
        below, beyond = self.may_leave(axis)
        parts = [f"{place} >= 0"] * below + [f"{place} < {self.size[axis]}"] * beyond
        return " && ".join(parts)


def window_of(graph: IntegerGraph, node: ir.Node, value: ir.Value, kernel: Sequence[int]) -> Window:
    """Return the window of a convolution or pooling that makes `value` of the node's first input.

    Raises:
        UserError: it has three dimensions or more.
    """
    source = node.inputs[0]
    assert source is not None
    size, output = graph.shape(source)[2:], graph.shape(value)[2:]
    rank = len(size)
    if rank not in (1, 2):
        raise refusal(node, f"it has {rank} spatial dimensions; there is code for 1 and 2")
    strides = list(node.attributes.get_ints("strides", [1] * rank))
    dilations = list(node.attributes.get_ints("dilations", [1] * rank))
    before = _before(node, size, output, kernel, strides, dilations)

    def both(numbers: Sequence[int], neutral: int) -> tuple[int, int]:
        one, two = [*[neutral] * (2 - rank), *numbers]
        return int(one), int(two)

    return Window(
        both(size, 1), both(output, 1), both(kernel, 1), both(strides, 1), both(dilations, 1), both(before, 0)
    )


def _before(
    node: ir.Node,
    size: Sequence[int],
    output: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    mode, rank = node.attributes.get_string("auto_pad", "NOTSET"), len(size)
    if mode == "NOTSET":
        return list(node.attributes.get_ints("pads", [0] * (2 * rank)))[:rank]
    if mode == "VALID":
        return [0] * rank
    before = []
    for axis in range(rank):
        reach = (output[axis] - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1
        total = max(reach - size[axis], 0)
        before.append(total // 2 if mode == "SAME_UPPER" else math.ceil(total / 2))
    return before
