"""Operators that are several in one, as these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.passes._plain_operators import Emitter, Rewriting, UnfitError

__all__ = ["MICROSOFT", "STANDARD"]

_WINDOW = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_PLAIN_ACTIVATIONS = ("Relu", "Sigmoid", "Tanh")


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _attributes(node: ir.Node, *names: str) -> dict[str, Any]:
    return {name: node.attributes[name].value for name in names if name in node.attributes}


def _number(emit: Emitter, name: str, value: float, like: ir.Value | None) -> ir.Value:
    dtype = ir.DataType.FLOAT if like is None or like.dtype is None else like.dtype
    return emit.constant(name, np.asarray(value, dtype.numpy()))


def _activated(node: ir.Node, emit: Emitter, value: ir.Value) -> ir.Value:
    name = node.attributes.get_string("activation", "")
    parameters = list(node.attributes.get_floats("activation_params", ()))
    if not name:
        return value
    if name == "Clip":
        low, high = parameters
        return emit("Clip", value, _number(emit, "low", low, value), _number(emit, "high", high, value))
    if name == "LeakyRelu":
        alpha = parameters[0] if parameters else node.attributes.get_float("activation_alpha", 0.01)
        return emit(name, value, alpha=alpha)
    return emit(name, value)


def _require_activation(node: ir.Node) -> None:
    name = node.attributes.get_string("activation", "")
    if name and name not in (*_PLAIN_ACTIVATIONS, "Clip", "LeakyRelu"):
        raise UnfitError(f"its activation {name} is not known")


def _conv(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    _require_activation(node)
    value = emit("Conv", *node.inputs[:3], **_attributes(node, *_WINDOW))
    added = _input(node, 3)
    return [_activated(node, emit, value if added is None else emit("Add", value, added))]


def _gemm(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    _require_activation(node)
    value = emit("Gemm", *node.inputs, **_attributes(node, "alpha", "beta", "transA", "transB"))
    return [_activated(node, emit, value)]


def _matmul(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    if node.attributes.get_int("transBatchA", 0) or node.attributes.get_int("transBatchB", 0):
        raise UnfitError("it transposes batches")
    factors = []
    for value, name in zip(node.inputs[:2], ("transA", "transB"), strict=True):
        if value is None or value.shape is None:
            raise UnfitError("the rank of a factor is not known")
        rank = len(value.shape)
        if node.attributes.get_int(name, 0) and rank > 1:
            value = emit("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
        factors.append(value)
    product = emit("MatMul", *factors)
    alpha = node.attributes.get_float("alpha", 1.0)
    return [product if alpha == 1.0 else emit("Mul", product, _number(emit, "alpha", alpha, node.inputs[0]))]


def _gelu(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    return [emit("Gelu", _biased(node, emit))]


def _fast_gelu(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    return [emit("Gelu", _biased(node, emit), approximate="tanh")]


def _biased(node: ir.Node, emit: Emitter) -> ir.Value | None:
    bias = _input(node, 1)
    return node.inputs[0] if bias is None else emit("Add", node.inputs[0], bias)


def _quick_gelu(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    value = node.inputs[0]
    scaled = emit("Mul", value, _number(emit, "alpha", node.attributes.get_float("alpha", 1.702), value))
    return [emit("Mul", value, emit("Sigmoid", scaled))]


def _unread(node: ir.Node, *places: int) -> None:
    read = [place for place in places if place < len(node.outputs) and _is_read(node.outputs[place])]
    if read:
        raise UnfitError(f"its output {read[0]} is read")


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _skip_norm(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    """Write SkipLayerNormalization and SkipSimplifiedLayerNormalization: a sum, and its norm."""
    _unread(node, 1, 2)
    simplified = "Simplified" in node.op_type
    bias = _input(node, 3 if simplified else 4)
    total = emit("Add", node.inputs[0], node.inputs[1])
    if bias is not None:
        total = emit("Add", total, bias)
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    if simplified:
        normal = _root_mean_square(emit, total, node.inputs[2], epsilon, node.inputs[0])
    else:
        normal = emit("LayerNormalization", total, node.inputs[2], _input(node, 3), axis=-1, epsilon=epsilon)
    return [normal, None, None, total][: len(node.outputs)]


def _simplified_norm(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    _unread(node, 1)
    if node.attributes.get_int("axis", -1) != -1:
        raise UnfitError("it runs over several axes")
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return [_root_mean_square(emit, node.inputs[0], node.inputs[1], epsilon, node.inputs[0]), None][: len(node.outputs)]


def _root_mean_square(
    emit: Emitter, value: ir.Value | None, scale: ir.Value | None, epsilon: float, like: ir.Value | None
) -> ir.Value:
    mean = emit("ReduceMean", emit("Mul", value, value), emit.integers("last", [-1]), keepdims=1)
    root = emit("Sqrt", emit("Add", mean, _number(emit, "epsilon", epsilon, like)))
    return emit("Mul", emit("Div", value, root), scale)


STANDARD: Mapping[str, Rewriting] = {
    "RMSNormalization": _simplified_norm,
    "SimplifiedLayerNormalization": _simplified_norm,
}
MICROSOFT: Mapping[str, Rewriting] = {
    "BiasGelu": _gelu,
    "FastGelu": _fast_gelu,
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "Gelu": _gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
}
