"""Operators on quantized tensors in plain ones: dequantized, computed in float, quantized again."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.passes._plain_operators import Emitter, PlainAlready, Rewriting, UnfitError, static_sizes

__all__ = ["MICROSOFT", "STANDARD", "integer_product"]

_EXACT = 1 << 24
"""Sums of integers below are exact in float32."""
_MOST, _HALF = 255, 16
"""The largest difference of two 8-bit integers, and what one is divided by into halves."""
_FLOAT, _INT32 = ir.DataType.FLOAT, ir.DataType.INT32


def _real(emit: Emitter, inputs: Sequence[ir.Value | None], axis: int = 1) -> ir.Value:
    """Emit a quantized tensor, its scale and its zero point as floats."""
    return emit("DequantizeLinear", *inputs, axis=axis)


def _codes(emit: Emitter, value: ir.Value, scale: ir.Value | None, zero: ir.Value | None) -> list[ir.Value]:
    return [emit("QuantizeLinear", value, scale, zero)]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _attributes(node: ir.Node, *names: str) -> dict[str, Any]:
    return {name: node.attributes[name].value for name in names if name in node.attributes}


_WINDOW = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _conv(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    inputs = list(node.inputs)
    scales = [qgraph.ir.constant(inputs[index]) for index in (1, 4)]
    if scales[0] is None or scales[1] is None:
        raise UnfitError("a scale is computed")
    bias = _input(node, 8)
    arguments = [_real(emit, inputs[:3]), _real(emit, inputs[3:6], axis=0)]
    if bias is not None:
        scale = (scales[0].astype(np.float32) * scales[1].astype(np.float32)).astype(np.float32)
        wide = emit("Cast", bias, to=int(_FLOAT))
        arguments.append(emit("Mul", wide, emit.constant("bias_scale", scale.reshape(-1))))
    return _codes(emit, emit("Conv", *arguments, **_attributes(node, *_WINDOW)), inputs[6], inputs[7])


def _matmul(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    inputs = list(node.inputs)
    left, right = _real(emit, inputs[:3], axis=0), _real(emit, inputs[3:6], axis=1)
    return _codes(emit, emit("MatMul", left, right), inputs[6], inputs[7])


def _gemm(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    inputs = [_input(node, index) for index in range(9)]
    scales = [qgraph.ir.constant(inputs[index]) for index in (1, 4)]
    if scales[0] is None or scales[1] is None:
        raise UnfitError("a scale is computed")
    kept = _attributes(node, "alpha", "transA", "transB")
    axis = 0 if kept.get("transB") else 1
    product = emit("Gemm", _real(emit, inputs[:3]), _real(emit, inputs[3:6], axis=axis), **kept)
    if inputs[6] is not None:
        scale = np.asarray(kept.get("alpha", 1.0) * scales[0] * scales[1], np.float32).reshape(-1)
        real = emit("Mul", emit("Cast", inputs[6], to=int(_FLOAT)), emit.constant("bias_scale", scale))
        product = emit("Add", product, real)
    return [product] if inputs[7] is None else _codes(emit, product, inputs[7], inputs[8])


def _pair(node: ir.Node, emit: Emitter, *, op_type: str) -> Sequence[ir.Value]:
    inputs = list(node.inputs)
    result = emit(op_type, _real(emit, inputs[:3]), _real(emit, inputs[3:6]))
    return _codes(emit, result, inputs[6], _input(node, 7))


def _where(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    condition, *inputs = node.inputs
    chosen = emit("Where", condition, _real(emit, inputs[:3]), _real(emit, inputs[3:6]))
    return _codes(emit, chosen, inputs[6], inputs[7])


def _single(node: ir.Node, emit: Emitter, *, op_type: str, kept: tuple[str, ...] = ()) -> Sequence[ir.Value]:
    inputs = list(node.inputs)
    if node.attributes.get_int("channels_last", 0):
        raise UnfitError("its channels are last")
    result = emit(op_type, _real(emit, inputs[:3]), **_attributes(node, *kept))
    return _codes(emit, result, inputs[3], _input(node, 4))


def _concat(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    inputs = list(node.inputs)
    parts = [_real(emit, inputs[place : place + 3]) for place in range(2, len(inputs), 3)]
    return _codes(emit, emit("Concat", *parts, **_attributes(node, "axis")), inputs[0], inputs[1])


def _conv_integer(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Write sums of integers as sums of floats that are exact: in two halves of each number where they are long."""
    sizes = static_sizes(node.inputs[1], slice(None), "a size of its weight is")
    longest = math.prod(sizes[1:])
    if longest * _HALF * _MOST >= _EXACT:
        raise UnfitError(f"sums of {longest} products of integers are not exact in float32")
    real = [emit("Cast", value, to=int(_FLOAT)) for value in node.inputs[:2]]
    for place, zero in enumerate((_input(node, 2), _input(node, 3))):
        if zero is None:
            continue
        wide = emit("Cast", zero, to=int(_FLOAT))
        if place and zero.shape is not None and len(zero.shape):
            wide = emit("Reshape", wide, emit.integers("channels", [-1, *[1] * (len(sizes) - 1)]))
        real[place] = emit("Sub", real[place], wide)
    kept = _attributes(node, *_WINDOW)

    def sums(data: ir.Value) -> ir.Value:
        return emit("Cast", emit("Conv", data, real[1], **kept), to=int(_INT32))

    if longest * _MOST * _MOST < _EXACT:
        return [sums(real[0])]
    half = emit.constant("half", np.asarray(_HALF, np.float32))
    high = emit("Floor", emit("Div", real[0], half))
    low = emit("Sub", real[0], emit("Mul", high, half))
    return [emit("Add", emit("Mul", sums(high), emit.constant("weight", np.asarray(_HALF, np.int32))), sums(low))]


def integer_product(
    emit: Emitter, data: ir.Value | None, weight: ir.Value | None, zeros: Sequence[ir.Value | None],
    scales: Sequence[ir.Value | None], bias: ir.Value | None,
) -> ir.Value:  # fmt: skip
    """Emit a product of integers, its scales and a bias."""
    whole = emit("Cast", emit("MatMulInteger", data, weight, *zeros), to=int(_FLOAT))
    real = emit("Mul", whole, emit("Mul", *scales))
    return real if bias is None else emit("Add", real, bias)


def _dynamic(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    codes, scale, zero = emit.several("DynamicQuantizeLinear", [node.inputs[0]], 3)
    zeros = [zero, _input(node, 3)]
    return [integer_product(emit, codes, node.inputs[1], zeros, [scale, node.inputs[2]], _input(node, 4))]


def _to_float(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    inputs = [_input(node, index) for index in range(7)]
    return [integer_product(emit, inputs[0], inputs[1], inputs[4:6], inputs[2:4], inputs[6])]


def _quantize(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Write blocked quantization of activations by elementwise operators."""
    if not node.attributes.get_int("block_size", 0):
        raise PlainAlready
    del emit
    raise UnfitError("it quantizes activations in blocks")


STANDARD: Mapping[str, Rewriting] = {
    "ConvInteger": _conv_integer,
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "QuantizeLinear": _quantize,
}
_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
MICROSOFT: Mapping[str, Rewriting] = {
    "DynamicQuantizeMatMul": _dynamic,
    "MatMulIntegerToFloat": _to_float,
    "QGemm": _gemm,
    "QLinearAdd": functools.partial(_pair, op_type="Add"),
    "QLinearAveragePool": functools.partial(_single, op_type="AveragePool", kept=_POOL),
    "QLinearConcat": _concat,
    "QLinearGlobalAveragePool": functools.partial(_single, op_type="GlobalAveragePool"),
    "QLinearLeakyRelu": functools.partial(_single, op_type="LeakyRelu", kept=("alpha",)),
    "QLinearMul": functools.partial(_pair, op_type="Mul"),
    "QLinearSigmoid": functools.partial(_single, op_type="Sigmoid"),
    "QLinearSoftmax": functools.partial(_single, op_type="Softmax", kept=("axis",)),
    "QLinearWhere": _where,
}
