"""Keep ONNX Runtime from quantizing the convolutions and products that were left in float.

    DequantizeLinear -> Conv(W, b) -> [Relu] -> QuantizeLinear
    =>
    DequantizeLinear -> Conv(W, DequantizeLinear(b32)) -> [Relu] -> QuantizeLinear

Between a DequantizeLinear and a QuantizeLinear, ONNX Runtime takes a float weight of Conv, ConvTranspose and Gemm to
have been forgotten and rounds it to 8 bits with one scale for the whole tensor (its WeightBiasQuantization), which
destroys depthwise convolutions and gains nothing where there is no integer kernel. It leaves alone a node whose bias
is computed, so the bias is stored as int32 with a scale that keeps all the bits that float has; a node without a
bias gets one of zeros. One tiny DequantizeLinear a node is the price.

A node whose weight is not a float constant, or whose bias is computed already, is left as it is.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pass, Report

__all__ = ["GuardFloat"]

_LARGEST = 1 << 30


@dataclasses.dataclass(frozen=True)
class GuardFloat(Pass):
    """Keep the runtime from quantizing layers that were left in float on purpose."""

    name: ClassVar[str] = "guard-float"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Give every float layer between a DequantizeLinear and a QuantizeLinear a computed bias."""
        del context
        guarded = [node for node in qgraph.ir.walk(model) if _in_danger(node)]
        for node in guarded:
            _compute_bias(model.graph, node)
        return Report(changed=len(guarded))


def _in_danger(node: ir.Node) -> bool:
    if not qgraph.ir.is_op(node, "Conv", "ConvTranspose", "Gemm"):
        return False
    data = node.inputs[0]
    if data is None or not qgraph.ir.is_op(data.producer(), "DequantizeLinear"):
        return False
    if qgraph.ir.constant(node.inputs[1]) is None or _channels(node) is None or not _ends_quantized(node):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is None or (bias.shape is not None and len(bias.shape) == 1 and qgraph.ir.constant(bias) is not None)


def _ends_quantized(node: ir.Node) -> bool:
    reader = qgraph.ir.only_consumer(node.outputs[0])
    while reader is not None and qgraph.ir.is_op(reader, "Relu", "Clip"):
        reader = qgraph.ir.only_consumer(reader.outputs[0])
    return qgraph.ir.is_op(reader, "QuantizeLinear")


def _channels(node: ir.Node) -> int | None:
    """Return the number of output channels, or None where the weight's shape does not tell."""
    weight = node.inputs[1]
    shape = None if weight is None or weight.shape is None else weight.shape
    if shape is None or not shape.is_static() or len(shape) < 2:
        return None
    if node.op_type == "Conv":
        return shape.numpy()[0]
    if node.op_type == "ConvTranspose":
        return shape.numpy()[1] * node.attributes.get_int("group", 1)
    return shape.numpy()[0 if node.attributes.get_int("transB", 0) else 1]


def _compute_bias(graph: ir.Graph, node: ir.Node) -> None:
    channels = _channels(node)
    assert channels is not None
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = qgraph.ir.constant(given)
    bias = np.zeros(channels, np.float32) if bias is None else bias.astype(np.float32)
    # A power of two keeps the low bits: an integer below 2^30 times it is a float again.
    largest = float(np.abs(bias).max(initial=0.0))
    scale = np.float32(2.0 ** np.ceil(np.log2(largest / _LARGEST)) if largest > 0 else 1.0)
    base = given.name if given is not None else f"{node.outputs[0].name}_bias"
    stored = qgraph.ir.initializer(graph, f"{base}_int32", np.rint(bias / scale).astype(np.int32))
    factor = qgraph.ir.initializer(graph, f"{base}_int32_scale", np.asarray(scale))
    computed = ir.node("DequantizeLinear", [stored, factor], name=qgraph.ir.fresh_name(graph, f"{base}_computed"))
    computed.outputs[0].name = computed.name
    computed.outputs[0].dtype = ir.DataType.FLOAT
    computed.outputs[0].shape = ir.Shape([channels])
    qgraph.ir.insert_before(node, computed)
    node.resize_inputs(3)
    node.replace_input_with(2, computed.outputs[0])
    if given is not None and given.name in graph.initializers and not given.uses() and not given.is_graph_output():
        graph.initializers.pop(given.name or "")
