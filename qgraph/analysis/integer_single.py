"""Units of one operator each: what moves or joins elements, compares them, or makes numbers of integers."""

from __future__ import annotations

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_forms import Form, Unit, is_float, real_outputs
from qgraph.analysis.integer_rules import is_stored

__all__ = ["COMPARISONS", "JOINERS", "MOVERS", "cast", "comparison", "joiner", "mover"]

MOVERS = frozenset({
    "ArgMax", "ArgMin", "ConstantOfShape", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "GlobalMaxPool", "Identity", "MaxPool", "Pad", "ReduceMax", "ReduceMin", "Reshape", "Resize", "Shape", "Size",
    "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze",
})  # fmt: skip
"""Operators whose results are some of the elements of their first input, or know nothing of their values."""
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
JOINERS = {
    "Concat": slice(None), "Where": slice(1, None), "Max": slice(None), "Min": slice(None),
    "ScatterElements": slice(0, None, 2), "ScatterND": slice(0, None, 2),
}  # fmt: skip
"""Operators of several tensors that end up at one scale, and which of their inputs these are."""


def cast(node: ir.Node) -> Unit | str:
    """Return the unit of a Cast from integers, or why there is none."""
    source = node.inputs[0]
    if source is None or is_float(source) or node.outputs[0].dtype is not ir.DataType.FLOAT:
        return "numbers of another type than float32 have no integer form"
    return Unit(Form.CAST, node, (node,), (source,), real_outputs(node))


def mover(node: ir.Node) -> Unit | str:
    """Return the unit of an operator of `MOVERS`, or why there is none."""
    if node.op_type == "ConstantOfShape":
        return Unit(Form.MOVE, node, (node,), (), real_outputs(node))
    reason = _unmovable(node)
    if reason is not None:
        return reason
    source = node.inputs[0]
    assert source is not None
    return Unit(Form.MOVE, node, (node,), (source,), real_outputs(node))


def _unmovable(node: ir.Node) -> str | None:
    if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest":
        return "it interpolates, which has an integer form only where the shapes are known"
    if (
        node.op_type == "Resize"
        and node.attributes.get_string("coordinate_transformation_mode") == "tf_crop_and_resize"
    ):
        return "it may fill in a number from outside"
    if node.op_type == "Pad" and len(node.inputs) > 2 and node.inputs[2] is not None:
        return None if qgraph.ir.constant(node.inputs[2]) is not None else "the number that it pads with is computed"
    if node.op_type == "MaxPool" and any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its second output is used"
    return None


def joiner(node: ir.Node) -> Unit | str:
    """Return the unit of an operator of `JOINERS`, or why there is none."""
    if node.attributes.get_string("reduction", "none") != "none":
        return "what it scatters is combined with what is there (reduction)"
    values = [value for value in node.inputs[JOINERS[node.op_type]] if value is not None]
    dynamic = tuple(dict.fromkeys(value for value in values if not is_stored(value)))
    if not dynamic and node.op_type not in ("Where", "ScatterElements", "ScatterND"):
        return "it reads only constants"
    return Unit(Form.JOIN, node, (node,), dynamic, real_outputs(node), terms=tuple(values))


def comparison(node: ir.Node) -> Unit | str:
    """Return the unit of an operator of `COMPARISONS` on tensors of floats, or why there is none."""
    left, right = node.inputs
    assert left is not None
    assert right is not None
    dynamic = tuple(dict.fromkeys(value for value in (left, right) if not is_stored(value)))
    if not dynamic:
        return "it reads only constants"
    return Unit(Form.COMPARE, node, (node,), dynamic, real_outputs(node), terms=(left, right))
