"""Batch normalization at inference is a scale and a shift per channel, which the layer before can do.

    y = BatchNormalization(Conv(x, W, b), s, t, mean, var)
        =>    y = Conv(x, W * f, (b - mean) * f + t)        f = s / sqrt(var + epsilon), along output channels

The same for ConvTranspose, Gemm (second factor constant) and MatMul (of matrices, second factor constant; it becomes a
Gemm, for the shift). Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018), section 3.2. Weights are computed when the file is written.

Does not fire, with the reason in the report, when the layer's result has another reader or is an output of the graph,
when weights or statistics are not constant, when the weights have other readers, or in training mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["FoldBatchNorm"]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the convolution or matrix product before it."""

    name: ClassVar[str] = "fold-batch-norm"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Fold; `skipped` has every BatchNormalization that stays."""
        skipped: list[Skipped] = []
        count = 0
        for node in qgraph.ir.walk(model):
            if not qgraph.ir.is_op(node, "BatchNormalization"):
                continue
            reason = _obstacle(node, context, model)
            if reason is None:
                _fold(node, model.graph)
                count += 1
            else:
                skipped.append(Skipped(qgraph.ir.node_label(node), f"BatchNormalization stays: {reason}"))
        notes = [f"{count} BatchNormalization folded"] if count else []
        return Report(changed=count, notes=notes, skipped=skipped)


def _obstacle(node: ir.Node, context: Context, model: ir.Model) -> str | None:
    """Return why a BatchNormalization cannot be folded into what comes before it, or None."""
    if node.attributes.get_int("training_mode", 0) or node.attributes.get_int("spatial", 1) == 0:
        return "it normalizes with statistics of the batch, or of every element"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its statistics are read"
    if len(node.inputs) != 5 or any(_channel_data(value) is None for value in node.inputs[1:]):
        return "its statistics are not constant"
    layer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if layer is None or not qgraph.ir.is_op(layer, *_LAYERS) or layer.graph is not node.graph:
        return "no convolution or matrix product comes before it"
    if qgraph.ir.only_consumer(layer.outputs[0]) is not node:
        return f"the result of '{qgraph.ir.node_label(layer)}' is read elsewhere too"
    return _layer_obstacle(layer, node, lambda: context.analyse(shapes_of, model))


def _layer_obstacle(layer: ir.Node, node: ir.Node, shapes: Callable[[], Shapes]) -> str | None:
    weight = layer.inputs[1]
    tensor = _constant(weight)
    if weight is None or tensor is None:
        return f"the weights of '{qgraph.ir.node_label(layer)}' are not constant"
    if not tensor.dtype.is_floating_point() or len(weight.uses()) > 1 or weight.is_graph_output():
        return f"the weights of '{qgraph.ir.node_label(layer)}' are read elsewhere too, or are no floats"
    channels = tensor.shape.numpy()[_channel_axis(layer)] * _groups(layer)
    if any(value is None or _channel_data(value) != channels for value in node.inputs[1:]):
        return "its statistics do not fit the channels"
    if layer.op_type == "MatMul":
        dims = shapes().dims(layer.inputs[0]) if layer.inputs[0] is not None else None
        return (
            None if len(tensor.shape) == 2 and dims is not None and len(dims) == 2 else "its factors are not matrices"
        )
    if len(layer.inputs) > 2 and layer.inputs[2] is not None:
        bias = _constant(layer.inputs[2])
        if bias is None or (bias.size not in (1, channels)):
            return f"the bias of '{qgraph.ir.node_label(layer)}' is not one constant per channel"
    return None


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer that no caller can override."""
    return value.const_value if value is not None and value.is_initializer() and not value.is_graph_input() else None


def _channel_data(value: ir.Value | None) -> int | None:
    """Return the length of a constant vector."""
    tensor = _constant(value)
    return tensor.size if tensor is not None and len(tensor.shape) == 1 else None


def _channel_axis(layer: ir.Node) -> int:
    """Return the axis of the weight that counts output channels (of one group, for ConvTranspose)."""
    if layer.op_type == "Conv":
        return 0
    return 0 if layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) != 0 else 1


def _groups(layer: ir.Node) -> int:
    return layer.attributes.get_int("group", 1) if layer.op_type == "ConvTranspose" else 1


def _fold(node: ir.Node, main: ir.Graph) -> None:
    layer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if layer is None or layer.inputs[1] is None:
        raise ValueError(f"{qgraph.ir.node_label(node)} reads no layer")
    factor, shift = _scale_and_shift(node)
    weight, bias = layer.inputs[1], layer.inputs[2] if len(layer.inputs) > 2 else None
    tensor = _constant(weight)
    if tensor is None:
        raise ValueError(f"{qgraph.ir.node_label(layer)} has no constant weight")
    scaled = qgraph.ir.lazy(
        _scaled(tensor, factor, _channel_axis(layer), _groups(layer)), tensor.dtype, tensor.shape.numpy()
    )
    name, bias_name = weight.name or "weight", (bias.name if bias is not None else None) or f"{weight.name}_bias"
    old_bias = np.float64(0) if bias is None else np.asarray(qgraph.ir.constant(bias), dtype=np.float64).reshape(-1)
    if layer.op_type == "Gemm":
        old_bias = old_bias * layer.attributes.get_float("beta", 1.0)
        layer.attributes.pop("beta", None)
    if layer.op_type == "MatMul":
        layer.op_type = "Gemm"
    new_bias = (old_bias * factor + shift).astype(tensor.dtype.numpy())
    layer.resize_inputs(3)
    layer.replace_input_with(1, qgraph.ir.initializer(main, f"{name}_folded", scaled))
    layer.replace_input_with(2, qgraph.ir.initializer(main, f"{bias_name}_folded", new_bias))
    statistics = [value for value in node.inputs[1:] if value is not None]
    result, normalized = layer.outputs[0], node.outputs[0].name
    qgraph.ir.bypass(node, result)
    result.name = normalized  # what the layer gives now is another tensor: comparisons go by names
    for value in dict.fromkeys([weight, *([bias] if bias is not None else []), *statistics]):
        if not value.uses() and not value.is_graph_output() and value.graph is not None:
            value.graph.initializers.pop(value.name or "")


def _scale_and_shift(node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Return f and t - mean * f of a BatchNormalization, float64 [channels]."""
    arrays = [qgraph.ir.constant(value) for value in node.inputs[1:]]
    scale, bias, mean, variance = (np.asarray(array, dtype=np.float64) for array in arrays)
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return factor, bias - mean * factor


def _scaled(tensor: ir.TensorProtocol, factor: np.ndarray, axis: int, groups: int) -> Callable[[], np.ndarray]:
    """Return a function that scales the output channels of a weight, with one rounding."""

    def compute() -> np.ndarray:
        weight = np.asarray(tensor.numpy())
        grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        along = [groups if place == 0 else 1 for place in range(grouped.ndim)]
        along[axis + 1] = weight.shape[axis]
        scaled = grouped * factor.reshape(along)
        return np.asarray(scaled.reshape(weight.shape)).astype(weight.dtype)

    return compute
