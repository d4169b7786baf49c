"""Where TensorRT wants its quantizers: in front of what multiplies, and of what it adds to a convolution's sum.

    x -> Conv -> Relu -> MaxPool -> Conv -> Add(skip) -> Relu -> GlobalAveragePool -> Gemm -> y

is quantized at

    Q x          Q MaxPool         Q skip     Q Relu                  Q GlobalAveragePool

Source: NVIDIA TensorRT, "Working with Quantized Types", explicit quantization, Q/DQ layer-placement recommendations:
quantize all inputs of weighted operations; do not quantize their outputs; quantize after what is fused behind a layer
(batch normalization, ReLU, the Add of a residual), not in between; quantize the residual input of a skip connection,
which is then added in the convolution's epilogue; a pooling between layers runs in 8 bits if its input is quantized.

TensorRT itself moves a quantizer forward and backward over what commutes with it (MaxPool, Reshape, Transpose, Slice,
Concat); so one stands at each reader. Copies of one tensor that are quantized in two places share the scale: it is
computed once then. What follows the last layer, and attention, stay in float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_plan import Allowed, Candidate, IntegerPlan, integer_candidates
from qgraph.analysis.integer_rules import QUANTIZED_ALREADY, Kind

__all__ = ["tensorrt_plan"]

_POOLS = ("AveragePool", "GlobalAveragePool")
_OF_ACTIVATIONS = "it multiplies activations with activations, which TensorRT fuses into an attention in 16 bits"
_FLOAT8_CHANNELS = 16


def tensorrt_plan(graph: ir.Graph, allowed: Allowed, *, float8: bool = False) -> IntegerPlan:
    """Plan what is quantized for TensorRT.

    Args:
        graph: the main graph.
        allowed: names the nodes that must stay in float.
        float8: whether to 8-bit floats, whose convolutions have fewer kernels.

    Returns:
        a plan of which `nodes` are layers and what reads quantized values beside them; `quantized` has what they read.
    """
    candidates = integer_candidates(graph)
    reasons: dict[ir.Node, str] = {}
    layers: dict[ir.Node, Kind] = {}
    for node, candidate in candidates.items():
        if candidate.kind not in (Kind.CONVOLUTION, Kind.PRODUCT):
            continue
        reason = candidate.obstacle or allowed(node) or _unfit(node, candidate, float8=float8)
        if reason is None:
            layers[node] = candidate.kind
        else:
            reasons[node] = reason
    wanted = {node: candidates[node].operands for node in layers}
    for node, value in (*_residuals(candidates, layers, allowed), *_pools(candidates, layers, allowed)):
        layers[node] = Kind.ARITHMETIC
        wanted[node] = (value,)
    nodes = {node: layers[node] for node in candidates if node in layers}
    quantized = list(dict.fromkeys(value for node in nodes for value in wanted[node]))
    group = _groups(quantized, candidates)
    observed: dict[ir.Value, list[ir.Value]] = {}
    for value in quantized:
        if group[value] is value:
            observed[value] = [value]
    return IntegerPlan(nodes, quantized, group, observed, reasons)


def _unfit(node: ir.Node, candidate: Candidate, *, float8: bool) -> str | None:
    if len(candidate.operands) > 1:
        return _OF_ACTIVATIONS
    return _no_float8(node) if float8 and candidate.kind is Kind.CONVOLUTION else None


def _no_float8(node: ir.Node) -> str | None:
    """Say why a convolution has no kernel in 8-bit floats: they are dense, on channels in multiples of 16."""
    weight = node.inputs[1]
    producer = None if weight is None else weight.producer()
    stored = producer.inputs[0] if producer is not None and producer.inputs else weight
    if stored is None or stored.shape is None or not stored.shape.is_static():
        return "the shape of its weight is not known"
    outputs, inputs = (int(size) for size in stored.shape.numpy()[:2])
    if node.attributes.get_int("group", 1) != 1:
        return "TensorRT has no grouped convolution in 8-bit floats"
    if outputs % _FLOAT8_CHANNELS or inputs % _FLOAT8_CHANNELS:
        return f"its {inputs} to {outputs} channels are no multiples of {_FLOAT8_CHANNELS}, which 8-bit floats want"
    return None


def _residuals(
    candidates: Mapping[ir.Node, Candidate], layers: Mapping[ir.Node, Kind], allowed: Allowed
) -> Iterable[tuple[ir.Node, ir.Value]]:
    """Yield each Add that a convolution can take into its epilogue, with the operand to quantize: the other one.

    Where both come straight from convolutions (a projected shortcut), the later one takes the Add.
    """
    order = {node: place for place, node in enumerate(candidates)}
    for node, candidate in candidates.items():
        if not qgraph.ir.is_op(node, "Add") or candidate.obstacle or len(candidate.operands) != 2 or allowed(node):
            continue
        left, right = candidate.operands
        if left is right or not _same_shape(left, right):
            continue
        sums = [value for value in (left, right) if _is_sum(value, node, layers)]
        if sums:
            taken = max(sums, key=lambda value: order[value.producer()])  # type: ignore[index]
            yield node, right if taken is left else left


def _is_sum(value: ir.Value, reader: ir.Node, layers: Mapping[ir.Node, Kind]) -> bool:
    producer = value.producer()
    is_convolution = producer is not None and layers.get(producer) is Kind.CONVOLUTION
    return is_convolution and qgraph.ir.only_consumer(value) is reader and not value.is_graph_output()


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    """Tell whether two tensors are of one shape as far as it is known; a broadcast Add is fused by nobody."""
    return one.shape is None or other.shape is None or list(one.shape) == list(other.shape)


def _pools(
    candidates: Mapping[ir.Node, Candidate], layers: Mapping[ir.Node, Kind], allowed: Allowed
) -> Iterable[tuple[ir.Node, ir.Value]]:
    """Yield the average poolings between two quantized layers, with their inputs."""
    for node, candidate in candidates.items():
        if qgraph.ir.is_op(node, *_POOLS) and not candidate.obstacle and not allowed(node):
            (value,) = candidate.operands
            if _comes_from(value, candidates, layers) and _goes_to(node.outputs[0], candidates, layers):
                yield node, value


def _comes_from(value: ir.Value, candidates: Mapping[ir.Node, Candidate], layers: Mapping[ir.Node, Kind]) -> bool:
    node = value.producer()
    while node is not None and node in candidates:
        if candidates[node].kind not in (Kind.MOVER, Kind.CLAMP) and node.op_type != "Concat":
            break
        node = candidates[node].operands[0].producer()
    if node is not None and qgraph.ir.is_op(node, "Add"):
        return any(one is not None and one.producer() in layers for one in node.inputs)
    return node in layers


def _goes_to(value: ir.Value, candidates: Mapping[ir.Node, Candidate], layers: Mapping[ir.Node, Kind]) -> bool:
    for use in value.uses():
        if use.node in layers:
            return True
        one = candidates.get(use.node)
        passes_on = one is not None and one.kind in (Kind.MOVER, Kind.CLAMP) and one.obstacle is None
        if passes_on and any(_goes_to(output, candidates, layers) for output in use.node.outputs):
            return True
    return False


def _groups(quantized: Iterable[ir.Value], candidates: Mapping[ir.Node, Candidate]) -> dict[ir.Value, ir.Value]:
    """Let a quantized copy of a quantized tensor share its scale."""
    values = dict.fromkeys(quantized)
    group: dict[ir.Value, ir.Value] = {}
    for value in values:
        leader, node = value, value.producer()
        while node is not None and node in candidates and _only_copies(node, candidates[node]):
            source = candidates[node].operands[0]
            leader = source if source in values else leader
            node = source.producer()
        group[value] = leader
    return group


def _only_copies(node: ir.Node, candidate: Candidate) -> bool:
    return candidate.kind is Kind.MOVER and candidate.obstacle in (None, QUANTIZED_ALREADY) and node.op_type != "Pad"
