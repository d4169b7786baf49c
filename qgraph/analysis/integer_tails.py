"""What may be done to an accumulator before it is rounded: factors, offsets and a clamp behind a layer."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import output_axis

__all__ = ["Tail", "clamp_behind", "follow_factors", "follow_layer"]

_MATRIX = 2


@dataclasses.dataclass
class Tail:
    """What is done to an accumulator before it is rounded: y = clamp(x * factor + offset, low, high).

    Attributes:
        factor: float64, () or broadcasting over the last axis of a product, or over the channels of a convolution.
        offset: the same.
        low: the least result.
        high: the largest.
    """

    factor: np.ndarray = dataclasses.field(default_factory=lambda: np.array(1.0))
    offset: np.ndarray = dataclasses.field(default_factory=lambda: np.array(0.0))
    low: float = -math.inf
    high: float = math.inf


def follow_layer(node: ir.Node, *, per_channel: bool) -> tuple[Tail, tuple[ir.Node, ...]]:
    """Follow a layer through what can be done to its accumulator.

    Args:
        node: a Conv, Gemm or MatMul.
        per_channel: whether factors and offsets may differ between its outputs.

    Returns:
        what is done, and `node` with the nodes that do it, in their order.
    """
    tail, nodes = Tail(), [node]
    while True:
        after = qgraph.ir.only_consumer(nodes[-1].outputs[0])
        if after is None or after.graph is not node.graph or len(after.outputs) != 1:
            break
        if not _follow(tail, after, nodes[-1].outputs[0], node, per_channel=per_channel):
            break
        nodes.append(after)
    clamp, rest = clamp_behind(nodes[-1])
    tail.low, tail.high = clamp.low, clamp.high
    return tail, (*nodes, *rest)


def follow_factors(node: ir.Node) -> tuple[Tail, list[ir.Node]]:
    """Follow a sum through positive numbers that multiply or divide it, as in a mean, and a clamp.

    Returns:
        what is done, and the nodes that do it.
    """
    tail, nodes = Tail(), [node]
    while True:
        after = qgraph.ir.only_consumer(nodes[-1].outputs[0])
        if after is None or after.graph is not node.graph or not qgraph.ir.is_op(after, "Mul", "Div"):
            break
        position = 0 if after.inputs[0] is nodes[-1].outputs[0] else 1
        array = qgraph.ir.constant(after.inputs[1 - position])
        if array is None or array.size != 1 or array.ndim > 1 or (after.op_type == "Div" and position == 1):
            break
        number = float(array.item())
        if not 0 < number < math.inf:
            break
        tail.factor = tail.factor * (number if after.op_type == "Mul" else 1.0 / number)
        nodes.append(after)
    clamp, rest = clamp_behind(nodes[-1])
    tail.low, tail.high = clamp.low, clamp.high
    return tail, [*nodes[1:], *rest]


def _follow(tail: Tail, after: ir.Node, value: ir.Value, layer: ir.Node, *, per_channel: bool) -> bool:
    if not qgraph.ir.is_op(after, "Add", "Sub", "Mul", "Div"):
        return False
    position = 0 if after.inputs[0] is value else 1
    array = qgraph.ir.constant(after.inputs[1 - position])
    if array is None or array.dtype != np.float32 or not np.isfinite(array).all():
        return False
    operand = _over_channels(np.asarray(array, np.float64), layer, per_channel=per_channel)
    if operand is None or (after.op_type == "Div" and (position == 1 or not np.all(operand))):
        return False
    if after.op_type in ("Mul", "Div"):
        factor = operand if after.op_type == "Mul" else 1.0 / operand
        if not np.all(factor):
            return False
        tail.factor, tail.offset = tail.factor * factor, tail.offset * factor
    elif after.op_type == "Add" or position == 0:
        tail.offset = tail.offset + (operand if after.op_type == "Add" else -operand)
    else:
        tail.factor, tail.offset = -tail.factor, operand - tail.offset
    return True


def clamp_behind(node: ir.Node) -> tuple[Tail, list[ir.Node]]:
    """Return the bounds of the Relu or Clip that alone reads the result of `node`, and that node."""
    after = qgraph.ir.only_consumer(node.outputs[0])
    if after is None or after.graph is not node.graph or not qgraph.ir.is_op(after, "Relu", "Clip"):
        return Tail(), []
    if after.op_type == "Relu":
        return Tail(low=0.0), [after]
    bounds = [qgraph.ir.constant(after.inputs[i]) if i < len(after.inputs) else None for i in (1, 2)]
    given = [value for value in after.inputs[1:] if value is not None]
    if len(given) != sum(bound is not None for bound in bounds):
        return Tail(), []
    low, high = (None if bound is None else float(bound.item()) for bound in bounds)
    if any(bound is not None and math.isnan(bound) for bound in (low, high)):
        return Tail(), []
    return Tail(low=-math.inf if low is None else low, high=math.inf if high is None else high), [after]


def _over_channels(array: np.ndarray, layer: ir.Node, *, per_channel: bool) -> np.ndarray | None:
    """Return a constant as () or (channels,) if it is the same everywhere else, else None."""
    if array.size == 1:
        return array.reshape(())
    if not per_channel:
        return None
    weight = layer.inputs[1]
    if weight is None or weight.shape is None or len(weight.shape) < _MATRIX:
        return None
    if layer.op_type == "Conv":
        rank, channels = len(weight.shape), weight.shape[0]
        fits = array.size == channels and array.ndim >= rank - 1 and array.shape[-(rank - 1)] == channels
    else:
        channels = weight.shape[output_axis(layer) - 2 if len(weight.shape) > 2 else output_axis(layer)]
        channels = weight.shape[-1] if layer.op_type == "MatMul" else channels
        fits = array.size == channels and array.ndim >= 1 and array.shape[-1] == channels
    return array.reshape(-1) if fits else None
