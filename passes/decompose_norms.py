"""Normalizations and norms in terms of LayerNormalization, sums and elementwise operators.

    InstanceNormalization(x[n,c,h,w], s, b)    =>    Reshape(LayerNormalization(Reshape(x, [n,c,h*w]), 1)) * s + b
    GroupNormalization(x[n,c,h,w], s, b)       =>    the same over [n,groups,c/groups*h*w]
    LayerNormalization<axis=1>(x[n,h,w], s)    =>    Reshape(LayerNormalization(Reshape(x, [n,h*w]), s))
    BatchNormalization(x, s, b, mean, var)     =>    x * (s / sqrt(var + epsilon)) + (b - mean * ...)
    ReduceL1(x)                                =>    ReduceSum(Abs(x))
    ReduceL2(x)                                =>    Sqrt(ReduceSum(x * x))
    ReduceSumSquare(x)                         =>    ReduceSum(x * x)
    LpNormalization(x)                         =>    x / Clip(norm, min=least)      norm as ReduceL1 or ReduceL2
    LogSoftmax(x)                              =>    d - Log(ReduceSum(Exp(d)))     d = x - ReduceMax(x)
    ReduceLogSumExp(x)                         =>    m + Log(ReduceSum(Exp(x - m))) m = ReduceMax(x)
    ReduceLogSum(x)                            =>    Log(ReduceSum(x))
    LRN(x)                                     =>    x * Pow(bias + alpha * AveragePool over channels (x * x), -beta)
    LpPool<p=2>(x)                             =>    Sqrt(count * AveragePool(x * x))
    PRelu(x, slopes of channels)               =>    Max(x, slopes * x)             where no slope exceeds 1

LogSoftmax is not written as Log(Softmax(x)): what is improbable would be the logarithm of a probability that has
underflowed. `least` is the smallest normal number: a vector of zeros stays zeros, as the reference has it. The scale of
GroupNormalization is one number for each group before opset 21, and one for each channel since.

Does not fire, with the reason in the report, for a computed scale, for sizes that are not known, for a reduction that
may reduce nothing, and for an LpPool that may reach beyond the border (ceil_mode).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.passes._plain_operators import Emitter, PlainAlready, Rewriting, UnfitError, rewrite, static_sizes
from qgraph.passes._plain_windows import local_response, pooled_norm
from qgraph.pipeline import Context, Pass, Report

__all__ = ["DecomposeNorms"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class DecomposeNorms(Pass):
    """Write normalizations and norms in terms of LayerNormalization, sums and elementwise operators."""

    name: ClassVar[str] = "decompose-norms"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; `skipped` has every such node that stays."""
        del context
        return rewrite(model, _REWRITINGS, "decomposed")


# --- of images -------------------------------------------------------------------------------------------------------


def _instance(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    sizes = _image(node)
    return _normalized(node, emit, sizes, sizes[0], *_scale_and_bias(node, sizes[0]))


def _group(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    sizes, groups = _image(node), node.attributes.get_int("num_groups")
    if sizes[0] % groups:
        raise UnfitError(f"{sizes[0]} channels are not {groups} groups")
    return _normalized(node, emit, sizes, groups, *_scale_and_bias(node, sizes[0], groups))


def _image(node: ir.Node) -> list[int]:
    """Return the sizes of channels and image."""
    return static_sizes(node.inputs[0], slice(1, None), "a size of its input is")


def _scale_and_bias(node: ir.Node, channels: int, groups: int | None = None) -> list[np.ndarray]:
    """Return scale and bias, each [channels], or one for each group spread to its channels."""
    arrays = [qgraph.ir.constant(value) for value in node.inputs[1:3]]
    known = [array for array in arrays if array is not None]
    if len(known) < len(arrays):
        raise UnfitError("its scale or bias is computed")
    if any(array.shape != (channels,) for array in known):
        if groups is None or any(array.shape != (groups,) for array in known):
            raise UnfitError("its scale or bias does not fit the channels")
        return [np.repeat(array, channels // groups) for array in known]
    return known


def _normalized(
    node: ir.Node, emit: Emitter, sizes: Sequence[int], rows: int, scale: np.ndarray, bias: np.ndarray
) -> Sequence[ir.Value]:
    """Emit the normalization of each row, and the scale and bias of each channel."""
    row = math.prod(sizes) // rows
    value = node.inputs[0]
    if [rows, row] != list(sizes):
        value = emit("Reshape", value, emit.integers("rows", [0, rows, row]))
    ones = emit.constant("ones", np.ones(row, scale.dtype))
    value = emit("LayerNormalization", value, ones, axis=-1, epsilon=node.attributes.get_float("epsilon", 1e-5))
    if [rows, row] != list(sizes):
        value = emit("Reshape", value, emit.integers("image", [0, *sizes]))
    by_channel = (-1, *[1] * (len(sizes) - 1))
    value = emit("Mul", value, emit.constant("scale", scale.reshape(by_channel)))
    return [emit("Add", value, emit.constant("bias", bias.reshape(by_channel)))]


def _layer(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    """Join the axes that a LayerNormalization runs over to one, if they are several."""
    value = node.inputs[0]
    rank = None if value is None or value.shape is None else len(value.shape)
    axis = node.attributes.get_int("axis", -1)
    if rank is None:
        raise UnfitError("the rank of its input is not known")
    if axis % rank == rank - 1:
        raise PlainAlready
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise UnfitError("its mean or deviation is read")
    sizes = static_sizes(value, slice(axis % rank, None), "a size that it runs over is")
    arrays = [None if one is None else qgraph.ir.constant(one) for one in node.inputs[1:3]]
    if any(one is not None and array is None for one, array in zip(node.inputs[1:3], arrays, strict=True)):
        raise UnfitError("its scale or bias is computed")
    row = math.prod(sizes)
    flat = [
        None if array is None else emit.constant(name, np.broadcast_to(array, sizes).reshape(row))
        for name, array in zip(("scale", "bias"), arrays, strict=False)
    ]
    kept = [0] * (axis % rank)
    rows = emit("Reshape", value, emit.integers("rows", [*kept, row]))
    done = emit("LayerNormalization", rows, *flat, axis=-1, epsilon=node.attributes.get_float("epsilon", 1e-5))
    back = emit("Reshape", done, emit.integers("back", [*kept, *sizes]))
    return (back, *(None for _ in node.outputs[1:]))


def _batch(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    """Write what is left of BatchNormalization where no layer before it could take it up."""
    value = node.inputs[0]
    arrays = [qgraph.ir.constant(one) for one in node.inputs[1:5]]
    known = [np.asarray(array, np.float64) for array in arrays if array is not None]
    if value is None or value.shape is None or len(known) < len(arrays) or len(node.outputs) > 1:
        raise UnfitError("its statistics are computed, or the rank of its input is not known")
    scale, bias, mean, variance = known
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    along = (-1, *[1] * (len(value.shape) - 2))
    dtype = np.float32 if value.dtype is None else value.dtype.numpy()
    product = emit("Mul", value, emit.constant("factor", factor.astype(dtype).reshape(along)))
    offset = emit.constant("offset", (bias - mean * factor).astype(dtype).reshape(along))
    return (emit("Add", product, offset), *(None for _ in node.outputs[1:]))


def _channel_slopes(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    slopes = qgraph.ir.constant(node.inputs[1])
    if slopes is not None and slopes.size == 1:
        raise PlainAlready
    if slopes is None or np.any(slopes > 1):
        raise UnfitError("its slopes are computed, or one is above 1")
    return [emit("Max", node.inputs[0], emit("Mul", node.inputs[0], node.inputs[1]))]


# --- norms -----------------------------------------------------------------------------------------------------------


def _reduced(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    known = qgraph.ir.constant(axes)
    if node.attributes.get_int("noop_with_empty_axes", 0) and (known is None or not known.size):
        raise UnfitError("it may reduce nothing (noop_with_empty_axes)")
    if node.inputs[0] is None or node.inputs[0].dtype not in _FLOATS:
        raise UnfitError("it is not known to be of floats")
    return [_norm(emit, node.op_type, node.inputs[0], axes, node.attributes.get_int("keepdims", 1))]


def _norm(emit: Emitter, op_type: str, value: ir.Value | None, axes: ir.Value | None, keepdims: int) -> ir.Value:
    if op_type != "ReduceLogSum":
        value = emit("Abs", value) if op_type == "ReduceL1" else emit("Mul", value, value)
    total = emit("ReduceSum", *([value] if axes is None else [value, axes]), keepdims=keepdims)
    behind = {"ReduceL2": "Sqrt", "ReduceLogSum": "Log"}.get(op_type)
    return total if behind is None else emit(behind, total)


def _lp(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    op_type = {1: "ReduceL1", 2: "ReduceL2"}.get(node.attributes.get_int("p", 2))
    value = node.inputs[0]
    if op_type is None:
        raise UnfitError("its norm is of another order than 1 and 2")
    if value is None or value.dtype not in _FLOATS:
        raise UnfitError("it is not known to be of floats")
    least = np.asarray(np.finfo(value.dtype.numpy()).tiny, value.dtype.numpy())
    axes = emit.integers("axes", [node.attributes.get_int("axis", -1)])
    norm = emit("Clip", _norm(emit, op_type, value, axes, 1), emit.constant("least", least))
    return [emit("Div", value, norm)]


def _log_softmax(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    axes = emit.integers("axes", [node.attributes.get_int("axis", -1)])
    below = emit("Sub", node.inputs[0], emit("ReduceMax", node.inputs[0], axes))
    return [emit("Sub", below, emit("Log", emit("ReduceSum", emit("Exp", below), axes)))]


def _log_sum_exp(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None or not node.attributes.get_int("keepdims", 1):
        raise UnfitError("it runs over all axes, or drops those that it runs over")
    largest = emit("ReduceMax", node.inputs[0], axes)
    below = emit("Sub", node.inputs[0], largest)
    return [emit("Add", largest, emit("Log", emit("ReduceSum", emit("Exp", below), axes)))]


_REWRITINGS: Mapping[str, Rewriting] = {
    "InstanceNormalization": _instance,
    "GroupNormalization": _group,
    "ReduceL1": _reduced,
    "ReduceL2": _reduced,
    "ReduceLogSum": _reduced,
    "ReduceSumSquare": _reduced,
    "LpNormalization": _lp,
    "LayerNormalization": _layer,
    "BatchNormalization": _batch,
    "PRelu": _channel_slopes,
    "LogSoftmax": _log_softmax,
    "ReduceLogSumExp": _log_sum_exp,
    "LRN": local_response,
    "LpPool": pooled_norm,
}
