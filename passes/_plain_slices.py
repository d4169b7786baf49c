"""Slices of the axes that they cut.

    Slice(x, [0, 5], [2147483647, 9], axes 0, 1)    =>    Slice(x, [5], [9], axis 1)

tf2onnx names every axis. Where a size is open, TVM's importer makes of an end that lies far behind it the smaller of
both, a size unlike that of the tensors around, which the code then allocates wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.passes._plain_operators import Emitter, PlainAlready, Rewriting

__all__ = ["MICROSOFT", "STANDARD"]

_FAR = (1 << 31) - 1
"""From here on an end stands for that of the axis, whatever its size."""


def _slice(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Write a Slice without the axes that it leaves whole."""
    given = [*node.inputs[1:], None, None][:4]
    starts, ends, axes, steps = arrays = [qgraph.ir.constant(value) for value in given]
    computed = any(value is not None and array is None for value, array in zip(given, arrays, strict=True))
    if computed or starts is None or ends is None:
        raise PlainAlready
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones_like(starts) if steps is None else steps
    cut = (starts != 0) | (steps != 1) | (ends < _FAR)
    if cut.all() or not cut.any():
        raise PlainAlready
    names = ("starts", "ends", "axes", "steps")
    parts = zip(names, (starts, ends, axes, steps), strict=True)
    return [emit("Slice", node.inputs[0], *(emit.integers(name, array[cut].tolist()) for name, array in parts))]


STANDARD: Mapping[str, Rewriting] = {"Slice": _slice}
MICROSOFT: Mapping[str, Rewriting] = {}
