"""What moves, selects or joins elements, on the integers themselves.

    D(x) -> Transpose -> Q                 =>    Transpose(x)
    Concat(D(a), D(b)) -> Q                =>    Concat(Requantize(a), b)        each at the scale of the result
    Where(c, D(a), -inf) -> Q              =>    Where(c, a, lowest)
    ScatterND(D(a), i, D(b)) -> Q          =>    ScatterND(a, i, Requantize(b))

ONNX Runtime has no 16-bit kernels for some of these; they are then done in int32 between two casts, or written as
others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import is_stored
from qgraph.analysis.integer_units import Unit, is_float
from qgraph.numerics.resize import nearest_indices
from qgraph.passes._requantize_writer import Codes, Target, UnfitError, Writer

__all__ = ["join", "move"]

_INT16, _INT32, _INT64 = ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64
_NO_16_BITS = frozenset({
    "ArgMax", "ArgMin", "GlobalMaxPool", "Max", "Min", "Pad", "ReduceMax", "ReduceMin", "Where",
})  # fmt: skip


def move(writer: Writer, unit: Unit) -> list[tuple[ir.Value, Target | None]]:
    """Move integers, and return them for each output with what they stand for, None for what never was real.

    Raises:
        UnfitError: the operator cannot work on these integers.
    """
    node = unit.main
    if node.op_type == "ConstantOfShape":
        return [_filled(writer, node)]
    source = writer.codes(unit.inputs[0])
    form = source.form
    if node.op_type == "MaxPool" and form.dtype is _INT16:
        raise UnfitError("MaxPool has no 16-bit form: quantize its input to 8 bits")
    if node.op_type == "Trilu":
        return [(_triangle(writer, node, source), form)]
    if node.op_type in ("DepthToSpace", "SpaceToDepth") and form.dtype is _INT16:
        return [(_blocks(writer, unit, source.value), form)]
    if node.op_type == "Resize":
        return [(_resize(writer, unit, source.value), form)]
    inputs: list[ir.Value | None] = [source.value, *node.inputs[1:]]
    wide = form.dtype is _INT16 and node.op_type in _NO_16_BITS
    kind = _INT32 if wide else form.dtype
    inputs[0] = writer.cast(source.value, kind)
    op_type, attributes = node.op_type, dict(node.attributes)
    if op_type == "TopK":
        attributes["sorted"] = ir.AttrInt64("sorted", 1)  # else their order is the runtime's own
    if op_type == "Pad":
        inputs = _padding(writer, node, form, kind, inputs)
    elif op_type == "GlobalMaxPool":
        op_type, inputs, attributes = _over_space(writer, unit, inputs[0])
    new = writer.node(op_type, inputs, kind, attributes, outputs=len(node.outputs))
    results: list[tuple[ir.Value, Target | None]] = []
    for value, before in zip(new.outputs, node.outputs, strict=True):
        if not before.name:
            continue
        if not is_float(before):
            value.dtype = before.dtype or _INT64
            results.append((value, None))
        else:
            results.append((writer.cast(value, form.dtype), form))
    return results


def _filled(writer: Writer, node: ir.Node) -> tuple[ir.Value, Target | None]:
    """Write a ConstantOfShape: one number is all that it stands for, so its integers are free."""
    attribute = node.attributes.get("value")
    number = 0.0 if attribute is None else float(np.asarray(attribute.as_tensor().numpy()).item())
    form = _form_read(writer, node.outputs[0])
    code = ir.tensor(form.quantize(np.asarray([number])), dtype=form.dtype)
    return writer.op("ConstantOfShape", node.inputs, form.dtype, {"value": ir.AttrTensor("value", code)}), form


def _form_read(writer: Writer, value: ir.Value) -> Target:
    for use in value.uses():
        if qgraph.ir.is_op(use.node, "QuantizeLinear"):
            return writer.form(use.node, value)
    raise UnfitError("its result is not quantized")


def _triangle(writer: Writer, node: ir.Node, source: Codes) -> ir.Value:
    """Write a Trilu, which fills in zeros: those are zero points. ONNX Runtime has it for no fewer bits than 32."""
    kept = writer.op("Trilu", [writer.centred(source), *node.inputs[1:]], _INT32, dict(node.attributes))
    if source.form.zero_point:
        kept = writer.op("Add", [kept, writer.constant(source.form.zero_point, _INT32)], _INT32)
    return writer.cast(kept, source.form.dtype)


def _blocks(writer: Writer, unit: Unit, value: ir.Value) -> ir.Value:
    """Write a DepthToSpace or SpaceToDepth of 16 bits, for which ONNX Runtime has no kernel, as a Transpose."""
    node, shape = unit.main, unit.inputs[0].shape
    sizes = [] if shape is None else [size if isinstance(size, int) else -1 for size in shape]
    if len(sizes) != 4 or sizes[1] < 0 or sizes.count(-1) > 1:
        raise UnfitError("its shape is not known, which 16 bits need: fix the shape of the input (--shape)")
    batch, channels, height, width = sizes
    block = node.attributes.get_int("blocksize", 1)
    if node.op_type == "SpaceToDepth":
        rows, columns = (max(size // block, -1) for size in (height, width))
        split, order = [batch, channels, rows, block, columns, block], [0, 3, 5, 1, 2, 4]
        joined = [batch, channels * block * block, rows, columns]
    else:
        depth = channels // (block * block)
        first = node.attributes.get_string("mode", "DCR") == "CRD"
        split = [batch, depth, block, block, height, width] if first else [batch, block, block, depth, height, width]
        order = [0, 1, 4, 2, 5, 3] if first else [0, 3, 4, 1, 5, 2]
        joined = [batch, depth, *(max(size * block, -1) for size in (height, width))]
    apart = writer.op("Reshape", [value, writer.constant(np.asarray(split), _INT64)], _INT16)
    moved = writer.op("Transpose", [apart], _INT16, {"perm": order})
    return writer.op("Reshape", [moved, writer.constant(np.asarray(joined), _INT64)], _INT16)


def _padding(
    writer: Writer, node: ir.Node, form: Target, kind: ir.DataType, inputs: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """Return the inputs of a Pad whose number is a code."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return list(inputs)
    given = node.inputs[2] if len(node.inputs) > 2 else None
    number = np.zeros(()) if given is None else writer.real(given).reshape(())
    fill = writer.constant(form.quantize(number), kind)
    return [*inputs[:2], fill, *inputs[3:]]


def _resize(writer: Writer, unit: Unit, value: ir.Value) -> ir.Value:
    """Write a nearest Resize as a Gather along every axis that changes: which element is copied is then certain."""
    node = unit.main
    before, after = unit.inputs[0].shape, unit.outputs[0].shape
    if before is None or after is None:
        raise UnfitError("the shapes around it are not known: fix the shape of the input (--shape)")
    scales = _scales(node, len(before))
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        if old == new:
            continue
        if not (isinstance(old, int) and isinstance(new, int)):
            raise UnfitError("the sizes that it changes are not known: fix the shape of the input (--shape)")
        coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
        nearest = node.attributes.get_string("nearest_mode", "round_prefer_floor")
        indices = nearest_indices(old, new, scales.get(axis, new / old), coordinates, nearest)
        value = writer.op("Gather", [value, writer.constant(indices, _INT64)], value.dtype or _INT32, {"axis": axis})
    return value


def _scales(node: ir.Node, rank: int) -> dict[int, float]:
    """Return the scales of a Resize by axis, where it names any."""
    given = qgraph.ir.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if given is None or given.size == 0:
        return {}
    axes = node.attributes.get_ints("axes", range(rank))
    return {int(axis) % rank: float(scale) for axis, scale in zip(axes, given.reshape(-1), strict=True)}


def _over_space(
    writer: Writer, unit: Unit, value: ir.Value | None
) -> tuple[str, list[ir.Value | None], dict[str, ir.Attr]]:
    """Return a ReduceMax that does what a GlobalMaxPool does."""
    shape = unit.inputs[0].shape
    if shape is None:
        raise UnfitError("its rank is not known")
    axes = writer.constant(np.arange(2, len(shape)), _INT64)
    return "ReduceMax", [value, axes], {"keepdims": ir.AttrInt64("keepdims", 1)}


def join(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Bring several tensors to one scale and join them."""
    node = unit.main
    dtype = _INT32 if target.dtype is _INT16 and node.op_type in _NO_16_BITS else target.dtype
    terms = [writer.cast(_at(writer, value, target), dtype) for value in unit.terms]
    if node.op_type in ("Max", "Min"):
        result = functools.reduce(lambda one, other: writer.op(node.op_type, [one, other], dtype), terms)
    elif node.op_type == "Where":
        result = writer.op("Where", [node.inputs[0], *terms], dtype)
    elif node.op_type in ("ScatterElements", "ScatterND"):
        data, updates = terms
        result = writer.op(node.op_type, [data, node.inputs[1], updates], dtype, dict(node.attributes))
    else:
        result = writer.op("Concat", terms, dtype, dict(node.attributes))
    return writer.cast(result, target.dtype)


def _at(writer: Writer, value: ir.Value, target: Target) -> ir.Value:
    """Return a tensor or a constant at a scale."""
    if is_stored(value) and not qgraph.ir.is_op(value.producer(), "DequantizeLinear"):
        array = qgraph.ir.constant(value)
        assert array is not None
        return writer.constant(target.quantize(array), target.dtype)
    return writer.rescale(writer.codes(value), target)
