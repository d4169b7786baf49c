"""Coupled dimensions of products, convolutions, norms, reductions and pools."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qgraph.analysis.coupling import Coupling, at
from qgraph.analysis.coupling_moves import follow_target
from qgraph.analysis.coupling_tools import Rule, axis_of, edit_attribute, first, freeze_all, input_of
from qgraph.analysis.dimensions import Axis

__all__ = ["LAYERS"]

_MOST_NODES = 6
"""Between a stored weight and a product: dequantized, cast, turned, reshaped. A longer search would be quadratic."""


def _softmax(node: ir.Node, found: Coupling) -> None:
    first(node, found)
    axes = found.of(node.outputs[0]) or ()
    old = (node.version or 13) < 13
    start = axis_of(node, 1 if old else -1, len(axes))
    for axis in axes[start:] if old else axes[start : start + 1]:
        found.freeze(axis, f"{at(node)} sums over it")


def _along(default: int) -> Rule:
    """The axis that the operator works along is not cut."""

    def rule(node: ir.Node, found: Coupling) -> None:
        first(node, found)
        axes = found.of(node.outputs[0]) or ()
        if axes:
            found.freeze(axes[axis_of(node, default, len(axes))], f"{at(node)} works along it")

    return rule


def _layer_norm(node: ir.Node, found: Coupling) -> None:
    first(node, found)
    axes = found.of(node.outputs[0]) or ()
    for axis in axes[axis_of(node, -1, len(axes)) :]:
        found.freeze(axis, f"{at(node)} normalizes over it")
    for value in node.inputs[1:]:
        if value is not None:
            found.same(value, node.outputs[0], node)


def _skip_norm(node: ir.Node, found: Coupling) -> None:
    for value in (*node.inputs, *node.outputs):
        found.freeze_value(value, f"{at(node)} normalizes over it")


def _batch_norm(node: ir.Node, found: Coupling) -> None:
    first(node, found)
    axes = found.of(node.outputs[0]) or ()
    for value in node.inputs[1:]:
        vector = found.of(value)
        if vector and len(axes) > 1:
            found.join(vector[0], axes[1], node)
    if node.op_type == "InstanceNormalization":
        for axis in axes[2:]:
            found.freeze(axis, f"{at(node)} normalizes over it")


def _linear_dequantize(node: ir.Node, found: Coupling) -> None:
    first(node, found)
    axes = found.of(node.outputs[0]) or ()
    blocked = node.attributes.get_int("block_size", 0) != 0
    for value in node.inputs[1:]:
        parameters = found.of(value)
        if blocked:
            found.freeze_value(node.outputs[0], f"{at(node)} has a scale for every block of it")
        elif parameters is not None and len(parameters) == 1 and axes:
            found.join(parameters[0], axes[axis_of(node, 1, len(axes))], node)


def _matmul(node: ir.Node, found: Coupling) -> None:
    left, right, result = found.of(node.inputs[0]), found.of(node.inputs[1]), found.of(node.outputs[0])
    if left is None or right is None or result is None or len(left) < 2 or len(right) < 2:
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    found.join(left[-1], right[-2], node)
    found.join(left[-2], result[-2], node)
    found.join(right[-1], result[-1], node)
    for axes in (left[:-2], right[:-2]):
        for one, other in zip(reversed(axes), reversed(result[:-2]), strict=False):
            if one is None or one.size > 1:
                found.join(one, other, node)
    if len(result) > 2 and not any(_is_stored(value) for value in node.inputs):
        found.note_heads(result[:-2], (left[-1], right[-1]))


def _is_stored(value: ir.Value | None, nodes: int = _MOST_NODES) -> bool:
    """Tell whether a value is a constant, or made of constants alone by so many nodes in a row at most."""
    if value is None or value.const_value is not None:
        return True
    node = value.producer()
    if node is None or not node.inputs or nodes == 0:
        return False
    return all(_is_stored(one, nodes - 1) for one in node.inputs)


def _gemm(node: ir.Node, found: Coupling) -> None:
    left, right, result = found.of(node.inputs[0]), found.of(node.inputs[1]), found.of(node.outputs[0])
    if left is None or right is None or result is None:
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    rows, inner = left[::-1] if node.attributes.get_int("transA", 0) else left
    from_inner, columns = right[::-1] if node.attributes.get_int("transB", 0) else right
    found.join(inner, from_inner, node)
    found.join(columns, result[1], node)
    found.join(rows, result[0], node)
    addend = input_of(node, 2)
    if addend is not None:
        found.same(addend, node.outputs[0], node)


def _conv(node: ir.Node, found: Coupling) -> None:
    """Weight [out, in / groups, ...], or [in, out / groups, ...] transposed; each group is an index of an atom."""
    data, weight, result = found.of(node.inputs[0]), found.of(node.inputs[1]), found.of(node.outputs[0])
    if data is None or weight is None or result is None or len(weight) < 3:
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    transposed = node.op_type == "ConvTranspose"
    groups = node.attributes.get_int("group", 1)
    whole, part = weight[0], weight[1]
    outer, inner = (data[1], result[1]) if transposed else (result[1], data[1])
    found.join(whole, outer, node)
    if groups == 1:
        found.join(part, inner, node)
    else:
        _join_groups(node, found, groups, whole, part, inner)
    found.join(data[0], result[0], node)
    for axis in (*weight[2:], *data[2:], *result[2:]):
        found.freeze(axis, f"{at(node)} works along it")
    bias = found.of(input_of(node, 2))
    if bias is not None:
        found.join(bias[0], result[1], node)


def _join_groups(
    node: ir.Node, found: Coupling, groups: int, whole: Axis | None, part: Axis | None, inner: Axis | None
) -> None:
    if whole is None or part is None or inner is None or whole.size % groups or inner.size != groups * part.size:
        freeze_all(node, found, f"the groups of {at(node)} are not certain")
        return
    factors = found.dimensions.split(whole, [groups, whole.size // groups], at(node))
    if factors is None:
        freeze_all(node, found, f"the groups of {at(node)} cannot be followed")
        return
    both = found.dimensions.product([factors[0], part])
    if both is None:
        freeze_all(node, found, f"the groups of {at(node)} cannot be followed")
        return
    found.join(both, inner, node)
    edit_attribute(node, found, "group", factors[0])


def _reduce(node: ir.Node, found: Coupling) -> None:
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    given = node.attributes.get_ints("axes", ()) or found.static(input_of(node, 1))
    if before is None or after is None or (given is None and input_of(node, 1) is not None):
        freeze_all(node, found, f"the axes of {at(node)} are not known")
        return
    reduced = {axis % len(before) for axis in given} if given else set(range(len(before)))
    if not given and node.attributes.get_int("noop_with_empty_axes", 0) != 0:
        reduced = set()
    sums = node.op_type in ("ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare")
    place = 0
    for index, axis in enumerate(before):
        if index in reduced:
            if not sums:
                found.freeze(axis, f"{at(node)} reduces it")
            place += node.attributes.get_int("keepdims", 1)
            continue
        found.join(axis, after[place], node)
        place += 1


def _pool(node: ir.Node, found: Coupling) -> None:
    """Batch and channels go on, what lies behind is worked along."""
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    if before is None or after is None:
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    for index, (axis, pooled) in enumerate(zip(before, after, strict=True)):
        if index > 1:
            found.freeze(axis, f"{at(node)} works along it")
            found.freeze(pooled, f"{at(node)} works along it")
        else:
            found.join(axis, pooled, node)
    for value in node.outputs[1:]:
        found.freeze_value(value, f"it is a side output of {at(node)}")


def _resize(node: ir.Node, found: Coupling) -> None:
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    if before is None or after is None or "axes" in node.attributes:
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    for axis, resized in zip(before, after, strict=True):
        if axis is not None and resized is not None and axis.size == resized.size:
            found.join(axis, resized, node)
        else:
            found.freeze(axis, f"{at(node)} changes its size")
            found.freeze(resized, f"{at(node)} changes its size")
    for value in node.inputs[1:3]:
        found.freeze_value(value, f"it is a parameter of {at(node)}")
    if input_of(node, 3) is not None:
        follow_target(node, found, 3, after)


_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")

LAYERS: Mapping[tuple[str, str], Rule] = {
    **{("", op): _pool for op in _POOLS},
    **{("", op): _reduce for op in _REDUCTIONS},
    **{("", op): _softmax for op in ("Hardmax", "LogSoftmax", "Softmax")},
    **{("", op): _along(-1) for op in ("CumSum", "LpNormalization")},
    **{("", op): _layer_norm for op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")},
    **{("", op): _batch_norm for op in ("BatchNormalization", "InstanceNormalization")},
    **{("", op): _conv for op in ("Conv", "ConvTranspose")},
    **{("", op): _resize for op in ("Resize", "Upsample")},
    **{("", op): _linear_dequantize for op in ("DequantizeLinear", "QuantizeLinear")},
    ("", "Gemm"): _gemm,
    ("", "MatMul"): _matmul,
    ("com.microsoft", "SkipLayerNormalization"): _skip_norm,
}
"""Domain and operator -> rule."""
