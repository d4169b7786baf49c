"""Average pooling in integers: sums over windows, divided by the counts of their elements.

AveragePool(D(x)) -> Q    =>    ConvInteger(x, ones) -> Requantize, by the count of elements of each window
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qgraph.analysis.integer_units import Unit
from qgraph.passes._requantize_layers import in_halves
from qgraph.passes._requantize_writer import LIMIT, Target, UnfitError, Writer

__all__ = ["pool"]

_INT8, _INT32 = ir.DataType.INT8, ir.DataType.INT32


def pool(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write an AveragePool."""
    node = unit.main
    source = writer.codes(unit.inputs[0])
    shape = unit.inputs[0].shape
    channels = None if shape is None or len(shape) < 3 else shape[1]
    if not isinstance(channels, int):
        raise UnfitError("the number of its channels is not known: fix the shape of the input (--shape)")
    kernel = list(node.attributes.get_ints("kernel_shape"))
    if math.prod(kernel) * source.form.reach > LIMIT // 2:
        raise UnfitError("its windows are so large that their sums could leave int32")
    ones = writer.constant(np.ones((channels, 1, *kernel)), _INT8)
    kept = {name: node.attributes[name] for name in ("auto_pad", "dilations", "kernel_shape", "pads", "strides")
            if name in node.attributes}  # fmt: skip
    kept["group"] = ir.AttrInt64("group", channels)
    counts: float | np.ndarray = float(math.prod(kernel))
    if not _is_even(node):
        axes = _axes(node, shape, kernel)
        counts = functools.reduce(np.multiply.outer, [axis.counts(_includes_pads(node)) for axis in axes])
        kept["pads"] = ir.AttrInt64s("pads", [*(axis.before for axis in axes), *(axis.reached for axis in axes)])

    def sums(codes: ir.Value, zero_point: int) -> ir.Value:
        zero = writer.constant(zero_point, codes.dtype or ir.DataType.UINT8)
        return writer.op("ConvInteger", [codes, ones, zero], _INT32, kept)

    total = in_halves(writer, source, sums)
    return writer.requantize(total, source.form.scale / counts, target)


def _includes_pads(node: ir.Node) -> bool:
    return node.attributes.get_int("count_include_pad", 0) != 0


def _is_even(node: ir.Node) -> bool:
    """Tell whether all windows count alike."""
    padded = any(node.attributes.get_ints("pads", [])) or _auto_pad(node)
    return not _rounds_up(node) and (_includes_pads(node) or not padded)


def _rounds_up(node: ir.Node) -> bool:
    """Tell whether the last window may reach beyond the border."""
    return node.attributes.get_int("ceil_mode", 0) != 0 and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"


def _auto_pad(node: ir.Node) -> bool:
    return node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")


class _Axis(NamedTuple):
    """An axis that windows run over.

    Attributes:
        size: its elements.
        before: elements put before.
        after: elements put after, as the node says.
        reached: elements after the last that windows reach, those of `ceil_mode` included.
        taps: int [windows, width], the place of each element of each window.
    """

    size: int
    before: int
    after: int
    reached: int
    taps: np.ndarray

    def counts(self, include_pads: bool) -> np.ndarray:
        """Return how many elements count in each window, one at least; what only `ceil_mode` reaches never does."""
        low, high = (-self.before, self.size + self.after) if include_pads else (0, self.size)
        return np.asarray(np.maximum(((self.taps >= low) & (self.taps < high)).sum(axis=1), 1))


def _axes(node: ir.Node, shape: ir.Shape | None, kernel: list[int]) -> list[_Axis]:
    """Return the axes that windows run over.

    Raises:
        UnfitError: their sizes are not known.
    """
    sizes = [] if shape is None else [size for size in list(shape)[2:] if isinstance(size, int)]
    if _auto_pad(node) or len(sizes) < len(kernel):
        raise UnfitError("its border counts less than the inside, and its size is not known: fix the shape (--shape)")
    rank = len(kernel)
    pads = list(node.attributes.get_ints("pads", [0] * 2 * rank))
    strides, dilations = (list(node.attributes.get_ints(name, [1] * rank)) for name in ("strides", "dilations"))
    ceil = _rounds_up(node)
    found = []
    for axis, (size, width, step, gap) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        before, after, reach = pads[axis], pads[axis + rank], (width - 1) * gap + 1
        room = size + before + after - reach
        count = (-(-room // step) if ceil else room // step) + 1
        count -= (count - 1) * step >= size + before  # a window that starts in the padding at the end is none
        starts = np.arange(count) * step - before
        reached = max(after, int(starts[-1]) + reach - size)
        found.append(_Axis(size, before, after, reached, starts[:, None] + np.arange(width) * gap))
    return found
