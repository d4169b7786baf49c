"""Linear layers and products of activations in integers.

    D(x) -> Conv(D(w), b) -> Relu -> Q    =>    ConvInteger(x, w) -> Add(b) -> Requantize
    D(a), D(b) -> MatMul -> Q             =>    MatMulInteger(a, b) -> Requantize

A 16-bit input is multiplied as two of 8 bits: x = 256 * high + low. A 16-bit weight is two of 8 bits as well, with an
accumulator each, of which that of the rests is brought to the step of the other:

    D(x) -> Conv(D(w16)) -> Q    =>    ConvInteger(x, w) -> Add(Requantize(ConvInteger(x, rest))) -> Requantize

No accumulator can leave int32 (`_requantize_bounds`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import output_axis
from qgraph.analysis.integer_units import Unit, layer_weight
from qgraph.passes._requantize_bounds import SPLIT, Rest, bounded, bounded_halves
from qgraph.passes._requantize_writer import LIMIT, Codes, Target, UnfitError, Writer, along

__all__ = ["Layer", "in_halves", "int8_weight", "layer", "matmul", "read_layer"]

_INT32, _INT8, _UINT8 = ir.DataType.INT32, ir.DataType.INT8, ir.DataType.UINT8
_MATRIX = 2
_INT8_LIMITS = np.iinfo(np.int8)
_STEPS = Target(1.0, 0, ir.DataType.INT32)
"""Units of an accumulator."""
_CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer in integers.

    Attributes:
        source: what it reads.
        weight: int64, as the node lays it out.
        index: which of the node's inputs the weight is.
        bias: int64, (outputs,).
        scale: what one unit of the accumulator is worth, (outputs,).
        rest: what a weight of 16 bits is more than `weight`; None for one of 8 bits.
    """

    source: Codes
    weight: np.ndarray
    index: int
    bias: np.ndarray
    scale: np.ndarray
    rest: Rest | None = None


def read_layer(writer: Writer, unit: Unit) -> Layer:
    """Return a layer's integers, at which no input leads beyond int32.

    Raises:
        UnfitError: its weight or bias cannot be followed.
    """
    node = unit.main
    found = layer_weight(node)
    assert found is not None
    index, stored = found
    source = writer.codes(unit.inputs[0])
    axis = output_axis(node) if node.op_type != "MatMul" else index - _MATRIX
    weight, weight_scale = _weight(stored, axis)
    if weight.size == 0:
        raise UnfitError("its weight is empty")
    factor, offset = _affine(writer, unit, weight.shape[axis])
    scale = np.abs(factor) * source.form.scale * weight_scale
    weight = weight * along(np.sign(factor), axis, weight.ndim).astype(np.int64)
    bias = np.asarray(offset / scale)
    part = f"'{unit.label}'"
    if _fits_int8(weight):
        weight, bias, scale = bounded(writer, part, weight, axis, bias, scale, source.form)
        return Layer(source, weight, index, bias, scale)
    weight, bias, scale, rest = bounded_halves(writer, part, weight, axis, bias, scale, source.form)
    return Layer(source, weight, index, bias, scale, rest)


def layer(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write a layer with a constant weight, and what is done to its accumulator."""
    read = read_layer(writer, unit)
    accumulator = _multiply(writer, unit.main, read.source, read.weight, read.index)
    if read.rest is not None:
        finer = _multiply(writer, unit.main, read.source, read.rest.weight, read.index, "rest")
        ratio = _over_outputs(read.rest.scale / read.scale, unit.main, read.index)
        accumulator = writer.op("Add", [accumulator, writer.requantize(finer, ratio, _STEPS)], _INT32)
    accumulator = _add_bias(writer, unit.main, accumulator, read)
    scale = _over_outputs(read.scale, unit.main, read.index)
    return writer.requantize(accumulator, scale, target, unit.tail.low, unit.tail.high)


def _weight(stored: ir.Value, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the integers of a weight (int64) and its scale, () or (outputs,) along `axis`."""
    rounded = stored.producer()
    if rounded is None or not qgraph.ir.is_op(rounded, "DequantizeLinear"):
        raise UnfitError("its weight is not quantized")
    integers, scale = qgraph.ir.constant(rounded.inputs[0]), qgraph.ir.constant(rounded.inputs[1])
    assert integers is not None
    assert scale is not None
    zero = rounded.inputs[2] if len(rounded.inputs) > 2 else None
    zero_point = 0 if zero is None else qgraph.ir.constant(zero)
    if rounded.attributes.get_int("block_size", 0):
        raise UnfitError("its weight has a scale for every group of inputs; quantize it with one for each output")
    codes = np.asarray(integers).astype(np.int64)
    if codes.ndim < _MATRIX:
        raise UnfitError("its weight is a vector: write it as a matrix")
    if scale.size == 1:
        return codes - np.asarray(zero_point).astype(np.int64), np.asarray(scale.reshape(()), np.float64)
    if rounded.attributes.get_int("axis", 1) % codes.ndim != axis % codes.ndim:
        raise UnfitError("its weight has its scales along the inputs; quantize it with one for each output")
    centred = codes - along(np.asarray(zero_point).astype(np.int64).reshape(-1), axis, codes.ndim)
    return centred, np.asarray(scale.reshape(-1), np.float64)


def _affine(writer: Writer, unit: Unit, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return factor and offset behind the product of input and weight, () or (outputs,) each, the bias included."""
    node = unit.main
    factor, offset = unit.tail.factor, unit.tail.offset
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        array = writer.real(bias).reshape(-1)
        if array.size not in (1, outputs):
            raise UnfitError("its bias is not one number for each output")
        offset = offset + factor * beta * (array if array.size > 1 else array.reshape(()))
    if not np.isfinite(offset).all():
        raise UnfitError("its bias holds NaN or infinity")
    alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
    if alpha == 0:
        raise UnfitError("its alpha is zero")
    return np.asarray(factor * alpha), np.asarray(offset)


def int8_weight(writer: Writer, node: ir.Node, weight: np.ndarray, label: str = "weight") -> ir.Value:
    """Store a weight as the integer operators read it: int8, a Gemm's as [inputs, outputs]."""
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0:
        weight = weight.T
    if not _fits_int8(weight):
        raise UnfitError("its weight less the zero point does not fit into int8")
    return writer.constant(weight, _INT8, f"{qgraph.ir.node_label(node)}/{label}")


def _fits_int8(weight: np.ndarray) -> bool:
    return bool(weight.min() >= _INT8_LIMITS.min and weight.max() <= _INT8_LIMITS.max)


def _multiply(
    writer: Writer, node: ir.Node, source: Codes, weight: np.ndarray, index: int, label: str = "weight"
) -> ir.Value:
    """Multiply integers and return the accumulator, int32."""
    stored = int8_weight(writer, node, weight, label)
    kept = {name: node.attributes[name] for name in _CONV_ATTRIBUTES if name in node.attributes}

    def product(codes: ir.Value, zero_point: int) -> ir.Value:
        zero = writer.constant(zero_point, codes.dtype or _UINT8)
        if node.op_type == "Conv":
            return writer.op("ConvInteger", [codes, stored, zero], _INT32, kept)
        if index == 1:
            return writer.op("MatMulInteger", [codes, stored, zero], _INT32)
        return writer.op("MatMulInteger", [stored, codes, None, zero], _INT32)

    return in_halves(writer, source, product)


def in_halves(writer: Writer, source: Codes, product: Callable[[ir.Value, int], ir.Value]) -> ir.Value:
    """Apply a linear function of 8-bit integers to these, or to the two halves of 16-bit ones."""
    if source.form.dtype is not ir.DataType.INT16:
        return product(source.value, source.form.zero_point)
    shifted = writer.op("Add", [writer.centred(source), writer.constant(1 << 15, _INT32)], _INT32)
    split = writer.constant(SPLIT, _INT32)
    high = writer.op("Div", [shifted, split], _INT32)
    low = writer.op("Sub", [shifted, writer.op("Mul", [high, split], _INT32)], _INT32)
    upper = product(writer.cast(high, _UINT8), SPLIT // 2)
    lower = product(writer.cast(low, _UINT8), 0)
    return writer.op("Add", [writer.op("Mul", [upper, split], _INT32), lower], _INT32)


def _add_bias(writer: Writer, node: ir.Node, accumulator: ir.Value, read: Layer) -> ir.Value:
    if not np.any(read.bias):
        return accumulator
    spread = _over_outputs(read.bias, node, read.index)
    spread = spread[None] if node.op_type == "Conv" and spread.ndim else spread
    return writer.op(
        "Add", [accumulator, writer.constant(spread, _INT32, f"{qgraph.ir.node_label(node)}/bias")], _INT32
    )


def _over_outputs(entries: np.ndarray, node: ir.Node, index: int) -> np.ndarray:
    """Return one entry for each output in the shape that broadcasts against the accumulator; one for all if equal."""
    if np.ptp(entries) == 0:
        return np.asarray(entries.reshape(-1)[0])
    if node.op_type != "Conv":
        return entries if index == 1 else entries[:, None]
    weight = node.inputs[1]
    rank = 4 if weight is None or weight.shape is None else len(weight.shape)
    return entries.reshape(-1, *[1] * (rank - 2))


def matmul(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write a product of two activations."""
    left, right = (writer.codes(value) for value in unit.inputs)
    if ir.DataType.INT16 in (left.form.dtype, right.form.dtype):
        raise UnfitError("it multiplies 16-bit activations with activations: quantize both to 8 bits")
    width = _last(unit.inputs[0])
    most = LIMIT // (left.form.reach * right.form.reach)
    if width is not None and width > most:
        raise UnfitError(f"its sums of {width} products could leave int32 (at most {most} cannot)")
    if width is None:
        writer.limit(most)
    factor = float(unit.tail.factor)
    zeros = [writer.constant(one.form.zero_point, one.form.dtype) for one in (left, right)]
    accumulator = writer.op("MatMulInteger", [left.value, right.value, *zeros], _INT32)
    if factor < 0:
        accumulator = writer.op("Neg", [accumulator], _INT32)
    scale = abs(factor) * left.form.scale * right.form.scale
    offset = round(float(unit.tail.offset) / scale)
    if offset:
        if width is None or width * left.form.reach * right.form.reach + abs(offset) > LIMIT:
            raise UnfitError("what is added to its sums could lead beyond int32")
        accumulator = writer.op("Add", [accumulator, writer.constant(offset, _INT32)], _INT32)
    return writer.requantize(accumulator, scale, target, unit.tail.low, unit.tail.high)


def _last(value: ir.Value) -> int | None:
    size = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else None
