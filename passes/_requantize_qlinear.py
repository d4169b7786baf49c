"""The operators of ONNX Runtime that take quantized tensors and float scales: fast kernels, but not exact to the bit.

    D(x) -> Conv(D(w), b) -> Q     =>    QLinearConv(x, w, b)
    D(a) -> MatMul(D(w)) -> Q      =>    QLinearMatMul(a, w), or QGemm with a bias
    D(a) + D(b) -> Q               =>    QLinearAdd;  QLinearMul, QLinearConcat, QLinearGlobalAveragePool alike

They multiply the accumulator with a float and round half to even, so that results can differ from the exact form by one
step, where a product lies at the middle between two integers or the accumulator has more than 24 bits. With scales that
are powers of two and rounding=half-even nothing differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qgraph.analysis.integer_rules import is_stored
from qgraph.analysis.integer_units import Form, Unit
from qgraph.passes import _requantize_layers as layers
from qgraph.passes._requantize_writer import Codes, Target, Writer

__all__ = ["write"]

_FLOAT, _INT32, _INT8, _UINT8 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT8, ir.DataType.UINT8
_MICROSOFT = "com.microsoft"
_MATRIX = 2
_CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def write(writer: Writer, unit: Unit, target: Target) -> ir.Value | None:
    """Return what a unit makes by one of these operators, or None where there is none for it."""
    function = _FORMS.get(unit.form)
    if function is None or target.dtype not in (_INT8, _UINT8):
        return None
    if any(writer.codes(value).form.dtype is not target.dtype for value in unit.inputs):
        return None
    result = function(writer, unit, target)
    return None if result is None else _clamped(writer, unit, result, target)


def _clamped(writer: Writer, unit: Unit, value: ir.Value, target: Target) -> ir.Value:
    """Clamp the integers where the type does not do it."""
    ends = [
        bound if math.isinf(real) else int(target.quantize(np.asarray(real)).item())
        for real, bound in zip((unit.tail.low, unit.tail.high), target.bounds, strict=True)
    ]
    if tuple(ends) == target.bounds:
        return value
    return writer.op("Clip", [value, *(writer.constant(end, target.dtype) for end in ends)], target.dtype)


def _scale(writer: Writer, scale: np.ndarray | float) -> ir.Value:
    return writer.constant(np.asarray(scale, np.float32), _FLOAT)


def _operand(writer: Writer, codes: Codes) -> list[ir.Value]:
    return [codes.value, _scale(writer, codes.form.scale), writer.constant(codes.form.zero_point, codes.form.dtype)]


def _result(writer: Writer, target: Target) -> list[ir.Value]:
    return [_scale(writer, target.scale), writer.constant(target.zero_point, target.dtype)]


def _layer(writer: Writer, unit: Unit, target: Target) -> ir.Value | None:
    node = unit.main
    read = layers.read_layer(writer, unit)
    if read.rest is not None:
        return None
    weight_scale = read.scale / read.source.form.scale
    if np.ptp(weight_scale) == 0:
        weight_scale = weight_scale[0]
    operands = _operand(writer, read.source)
    if node.op_type == "Conv":
        weight = [
            layers.int8_weight(writer, node, read.weight),
            _scale(writer, weight_scale),
            writer.constant(0, _INT8),
        ]
        bias = [writer.constant(read.bias, _INT32)] if np.any(read.bias) else []
        kept = {name: node.attributes[name] for name in _CONV_ATTRIBUTES if name in node.attributes}
        return writer.op("QLinearConv", [*operands, *weight, *_result(writer, target), *bias], target.dtype, kept)
    if read.index == 0 or read.weight.ndim != _MATRIX:
        return None
    weight = [layers.int8_weight(writer, node, read.weight), _scale(writer, weight_scale), writer.constant(0, _INT8)]
    if not np.any(read.bias):
        return writer.op("QLinearMatMul", [*operands, *weight, *_result(writer, target)], target.dtype)
    shape = unit.inputs[0].shape
    if shape is None or len(shape) != _MATRIX:
        return None
    inputs = [*operands, *weight, writer.constant(read.bias, _INT32), *_result(writer, target)]
    return writer.op("QGemm", inputs, target.dtype, domain=_MICROSOFT)


def _matmul(writer: Writer, unit: Unit, target: Target) -> ir.Value | None:
    left, right = (writer.codes(value) for value in unit.inputs)
    factor = float(unit.tail.factor)
    if factor <= 0 or float(unit.tail.offset):
        return None
    scaled = Codes(left.value, left.form._replace(scale=left.form.scale * factor))
    inputs = [*_operand(writer, scaled), *_operand(writer, right), *_result(writer, target)]
    return writer.op("QLinearMatMul", inputs, target.dtype)


def _pair(op_type: str) -> Callable[[Writer, Unit, Target], ir.Value | None]:
    def pair(writer: Writer, unit: Unit, target: Target) -> ir.Value | None:
        if len(unit.terms) != 2 or any(is_stored(value) for value in unit.terms) or -1 in unit.signs:
            return None
        operands = [one for value in unit.terms for one in _operand(writer, writer.codes(value))]
        return writer.op(op_type, [*operands, *_result(writer, target)], target.dtype, domain=_MICROSOFT)

    return pair


def _global_average(writer: Writer, unit: Unit, target: Target) -> ir.Value | None:
    if unit.main.op_type != "GlobalAveragePool":
        return None
    inputs = [*_operand(writer, writer.codes(unit.inputs[0])), *_result(writer, target)]
    return writer.op("QLinearGlobalAveragePool", inputs, target.dtype, {"channels_last": 0}, domain=_MICROSOFT)


def _concat(writer: Writer, unit: Unit, target: Target) -> ir.Value | None:
    if unit.main.op_type != "Concat" or any(is_stored(value) for value in unit.terms):
        return None
    sources = [writer.codes(value) for value in unit.terms]
    if all(codes.form == target for codes in sources):
        return None
    operands = [one for codes in sources for one in _operand(writer, codes)]
    inputs = [*_result(writer, target), *operands]
    return writer.op("QLinearConcat", inputs, target.dtype, dict(unit.main.attributes), domain=_MICROSOFT)


_FORMS: Mapping[Form, Callable[[Writer, Unit, Target], ir.Value | None]] = {
    Form.LAYER: _layer,
    Form.MATMUL: _matmul,
    Form.SUM: _pair("QLinearAdd"),
    Form.PRODUCT: _pair("QLinearMul"),
    Form.REDUCE: _global_average,
    Form.JOIN: _concat,
}
