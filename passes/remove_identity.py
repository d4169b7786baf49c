"""Operators that return what they are given go.

    y = Identity(x)                                          =>    y is x
    y = Dropout(x)                                           =>    y is x
    y = Cast<to = T>(x)                  x is of type T      =>    y is x
    y = Transpose(Transpose(x))          orders cancel       =>    y is x, else one Transpose
    y = Reshape(Reshape(x, a), b)                            =>    y = Reshape(x, b), if b copies no sizes
    y = Cast(Cast(x))                    the first loses nothing    =>    y = Cast(x), or x
    y = Reshape(Transpose(Reshape(x)))   over merged leading axes   =>    y = Transpose(x)
    Reshape, Expand, Flatten, Squeeze, Unsqueeze, Tile, Pad, Slice that keep the shape; Concat, Sum, Max, Min, Mean of
    one; x + 0, x - 0, x * 1, x / 1, x ** 1 with constants that do not enlarge x

Shapes may be symbolic: [batch, seq] reshaped to [batch, seq] is recognized. A Dropout goes even if its training mode
is on: exporters leave it on by mistake, and runtimes drop it too when they optimize. It stays if `training_dropout` is
set, or if its mask is read. Nothing is removed between a graph input or initializer and a graph output, which must be
two values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["RemoveIdentity"]

_SINGLE = {"Concat", "Max", "Mean", "Min", "Sum"}
_NEUTRAL: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "Add": (0, (0, 1)),
    "Sub": (0, (1,)),
    "Mul": (1, (0, 1)),
    "Div": (1, (1,)),
    "Pow": (1, (1,)),
}
"""Operator -> its neutral element, and which inputs may be it."""
_KEEP_ELEMENTS = {"Reshape", "Expand", "Flatten", "Squeeze", "Unsqueeze", "Tile"}
"""Operators that return their input unchanged when the shape does not change."""

_LOSSLESS: Mapping[str, tuple[str, ...]] = {
    "BOOL": ("INT8", "UINT8", "INT16", "INT32", "INT64", "FLOAT16", "FLOAT", "DOUBLE"),
    "INT8": ("INT16", "INT32", "INT64", "FLOAT16", "FLOAT", "DOUBLE"),
    "UINT8": ("INT16", "UINT16", "INT32", "INT64", "FLOAT16", "FLOAT", "DOUBLE"),
    "INT16": ("INT32", "INT64", "FLOAT", "DOUBLE"),
    "UINT16": ("INT32", "UINT32", "INT64", "FLOAT", "DOUBLE"),
    "INT32": ("INT64", "DOUBLE"),
    "UINT32": ("INT64", "UINT64", "DOUBLE"),
    "FLOAT16": ("FLOAT", "DOUBLE"),
    "BFLOAT16": ("FLOAT", "DOUBLE"),
    "FLOAT": ("DOUBLE",),
    "INT64": (),
    "DOUBLE": (),
}
"""Type -> types that hold all of its values exactly."""


@dataclass(frozen=True)
class RemoveIdentity(Pass):
    """Remove operators that change nothing, and pairs that undo one another."""

    name: ClassVar[str] = "remove-identity"
    training_dropout: bool = field(default=False, metadata={"help": "keep a Dropout whose training mode is on"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Remove and merge; `skipped` has the nodes that connect an input directly to an output."""
        shapes = context.analyse(shapes_of, model)
        counts: dict[str, int] = {}
        skipped: list[Skipped] = []
        for node in qgraph.ir.walk(model):
            if node.domain not in ("", "ai.onnx") or not node.outputs:
                continue
            changed = _swap_last(node, shapes)
            changed |= _merge(node, shapes)
            kept = None if self._is_kept(node, shapes) else _unchanged(node, shapes)
            if kept is not None and qgraph.ir.bypass(node, kept):
                changed = True
            elif kept is not None:
                skipped.append(Skipped(qgraph.ir.node_label(node), "it makes a graph output of an input or of another"))
            if changed:
                counts[node.op_type] = counts.get(node.op_type, 0) + 1
        notes = [f"{count} {op_type} removed" for op_type, count in sorted(counts.items())]
        return Report(changed=sum(counts.values()), notes=notes, skipped=skipped)

    def _is_kept(self, node: ir.Node, shapes: Shapes) -> bool:
        return node.op_type == "Dropout" and self.training_dropout and not _is_inference(node, shapes)


def _unchanged(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Return the input that the output equals, or None."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return None
    if not node.inputs or node.inputs[0] is None:
        return None
    first = node.inputs[0]
    test = _TESTS.get(node.op_type)
    if test is not None:
        return first if test(node, shapes) else None
    if node.op_type in _SINGLE:
        return first if len(node.inputs) == 1 else None
    if node.op_type in _KEEP_ELEMENTS:
        return first if _same_shape(node, first, shapes) else None
    if node.op_type in _NEUTRAL:
        return _operand(node, shapes)
    return None


def _same_shape(node: ir.Node, value: ir.Value, shapes: Shapes) -> bool:
    dims = shapes.dims(value)
    return dims is not None and dims == shapes.dims(node.outputs[0])


def _is_inference(node: ir.Node, shapes: Shapes) -> bool:
    """Tell whether a Dropout passes its input on: its training mode is absent or constantly false."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    mode = shapes.array(node.inputs[2])
    return mode is not None and not mode.any()


def _is_same_type(node: ir.Node, shapes: Shapes) -> bool:
    dtype = shapes.dtype(node.inputs[0])
    return dtype is not None and dtype == shapes.dtype(node.outputs[0])


def _is_in_order(node: ir.Node, shapes: Shapes) -> bool:
    order = _order(node, shapes)
    return order is not None and order == list(range(len(order)))


def _is_whole(node: ir.Node, shapes: Shapes) -> bool:
    """Tell whether a Slice takes everything, forwards."""
    first = node.inputs[0]
    if first is None or not _same_shape(node, first, shapes):
        return False
    if len(node.inputs) < 5 or node.inputs[4] is None:
        return True
    steps = shapes.array(node.inputs[4])
    return steps is not None and bool(np.all(steps == 1))


def _pads_nothing(node: ir.Node, shapes: Shapes) -> bool:
    if "pads" in node.attributes:
        return not any(node.attributes["pads"].as_ints())
    pads = shapes.array(node.inputs[1]) if len(node.inputs) > 1 else None
    return pads is not None and not pads.any()


_TESTS: Mapping[str, Callable[[ir.Node, Shapes], bool]] = {
    "Identity": lambda node, shapes: True,  # noqa: ARG005 - one signature for all
    "Dropout": lambda node, shapes: True,  # noqa: ARG005
    "Pad": _pads_nothing,
    "Cast": _is_same_type,
    "CastLike": _is_same_type,
    "Transpose": _is_in_order,
    "Slice": _is_whole,
}


def _operand(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Return the other operand of x + 0, x * 1 and the like."""
    neutral, places = _NEUTRAL[node.op_type]
    for place in places:
        constant, other = node.inputs[place], node.inputs[1 - place]
        array = shapes.array(constant)
        if array is None or other is None or array.dtype.kind not in "iuf" or not np.all(array == neutral):
            continue
        if _same_shape(node, other, shapes) and _is_same(other, node.outputs[0], shapes):
            return other
    return None


def _is_same(one: ir.Value, other: ir.Value, shapes: Shapes) -> bool:
    return shapes.dtype(one) is not None and shapes.dtype(one) == shapes.dtype(other)


def _merge(node: ir.Node, shapes: Shapes) -> bool:
    """Let a Transpose, Reshape or Cast read what its predecessor of the same kind reads."""
    value = node.inputs[0] if node.inputs else None
    before = value.producer() if value is not None else None
    if before is None or not qgraph.ir.is_op(before, node.op_type) or before.inputs[0] is None:
        return False
    merge = _MERGES.get(node.op_type)
    if merge is None or not merge(before, node, shapes):
        return False
    _reconnect(node, before.inputs[0])
    return True


def _reconnect(node: ir.Node, value: ir.Value | None) -> None:
    """Let `node` read `value` first, and remove what it read before as far as nobody else does."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    node.replace_input_with(0, value)
    while before is not None and not any(output.uses() or output.is_graph_output() for output in before.outputs):
        further = before.inputs[0].producer() if before.inputs and before.inputs[0] is not None else None
        qgraph.ir.discard(before)
        before = further


def _order(node: ir.Node, shapes: Shapes) -> list[int] | None:
    if "perm" in node.attributes:
        order = list(node.attributes["perm"].as_ints())
        return order if sorted(order) == list(range(len(order))) else None
    dims = shapes.dims(node.outputs[0])
    return list(range(len(dims)))[::-1] if dims is not None else None


def _merge_transposes(before: ir.Node, node: ir.Node, shapes: Shapes) -> bool:
    first, second = _order(before, shapes), _order(node, shapes)
    if first is None or second is None or len(first) != len(second):
        return False
    node.attributes["perm"] = ir.AttrInt64s("perm", [first[axis] for axis in second])
    return True


def _merge_reshapes(before: ir.Node, node: ir.Node, shapes: Shapes) -> bool:
    """Tell whether the second target says all: it copies no sizes of the first result."""
    del before
    target = shapes.data(node.inputs[1]) if len(node.inputs) > 1 else None
    return target is not None and all(isinstance(size, int) and size != 0 for size in target.elements)


def _swap_last(node: ir.Node, shapes: Shapes) -> bool:
    """Replace Reshape(Transpose(Reshape(x))) that only swaps the last two axes of x by a Transpose."""
    if not qgraph.ir.is_op(node, "Reshape") or node.inputs[0] is None:
        return False
    transpose = node.inputs[0].producer()
    merge = transpose.inputs[0].producer() if transpose is not None and transpose.inputs[0] is not None else None
    if transpose is None or merge is None or not qgraph.ir.is_op(merge, "Reshape") or node.graph is None:
        return False
    source, merged, result = merge.inputs[0], shapes.dims(merge.outputs[0]), shapes.dims(node.outputs[0])
    dims = shapes.dims(source) if source is not None else None
    if not qgraph.ir.is_op(transpose, "Transpose") or _order(transpose, shapes) != [0, 2, 1]:
        return False
    if dims is None or merged is None or len(dims) < 3 or dims[-2:] != merged[-2:]:
        return False
    if result != (*dims[:-2], dims[-1], dims[-2]):
        return False
    _reconnect(node, source)
    node.op_type = "Transpose"
    node.resize_inputs(1)
    node.attributes.clear()
    order = [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]
    node.attributes["perm"] = ir.AttrInt64s("perm", order)
    return True


def _merge_casts(before: ir.Node, node: ir.Node, shapes: Shapes) -> bool:
    source, middle, last = (shapes.dtype(v) for v in (before.inputs[0], before.outputs[0], node.outputs[0]))
    if source is None or middle is None or last is None or last.name not in _LOSSLESS:
        return False
    return middle.name in _LOSSLESS.get(source.name, ()) or middle == source


_MERGES: Mapping[str, Callable[[ir.Node, ir.Node, Shapes], bool]] = {
    "Transpose": _merge_transposes,
    "Reshape": _merge_reshapes,
    "Cast": _merge_casts,
}
