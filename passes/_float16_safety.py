"""Which nodes compute in float16 without losing what matters, and why the others stay in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.defs
import onnx_ir as ir

import qgraph.ir
from qgraph.lazy_tensors import JointTensor

__all__ = ["LARGEST", "MASK", "Kept", "half_places", "is_float", "keep"]

LARGEST = 65504.0
"""The largest finite float16."""
MASK = -16384.0
"""What stands for a mask's -3.4e38 in float16: after a Softmax it is as much zero, and three of them can be added."""
_MARGIN = 2.0
"""How far below the largest float16 the magnitudes that were measured must stay: other inputs have other ones."""
_SMALLEST = float(np.finfo(np.float16).tiny)
_REDUCTIONS = ("CumSum", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum",
               "ReduceSumSquare")  # fmt: skip
_GROWING = (*_REDUCTIONS, "Exp", "Pow")
_FOLLOWING = ("Abs", "Add", "Clip", "Div", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub")
_NORMALIZING = ("Div", "Mul", "Sub")
_WITH_MASKS = ("Add", "ConstantOfShape", "Expand", "Max", "Mul", "Sub", "Where")
_MOVING = ("Cast", "Concat", "Identity", "Reshape", "ScatterND", "Slice", "Squeeze", "Transpose", "Trilu", "Unsqueeze")
_LONGEST_ARITHMETIC = 64
_LARGE = 1 << 24
_BEYOND = "its constant reaches"
_MICROSOFT = frozenset({
    "Attention", "BiasGelu", "FastGelu", "FusedMatMul", "GatherBlockQuantized", "Gelu", "GroupQueryAttention",
    "MatMulBnb4", "MatMulNBits", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
})  # fmt: skip
"""Operators of ONNX Runtime whose float inputs and outputs may all be float16."""
_SIMPLIFIED = "SimplifiedLayerNormalization"


@dataclass
class Kept:
    """The nodes that stay in float32, each with its reason, and the constants whose masks are to be cut off."""

    reasons: dict[ir.Node, str] = field(default_factory=dict)
    masks: set[ir.Value] = field(default_factory=set)

    def add(self, node: ir.Node, reason: str) -> None:
        """Keep a node; the first reason counts."""
        self.reasons.setdefault(node, reason)


def is_float(value: ir.Value | None) -> bool:
    """Tell whether a value is a tensor of float32."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def keep(graph: ir.Graph, opsets: Mapping[str, int], ranges: Mapping[str, tuple[float, float]]) -> Kept:
    """Decide for every node of a graph that has to do with float32.

    Args:
        graph: the main graph; types of its values are known.
        opsets: that the model imports.
        ranges: value name -> the least and the largest number that were measured; may be empty.
    """
    kept = Kept()
    for node in graph:
        reason = _undefined(node, opsets) or _constant_reason(node, kept) or _growing(node)
        if reason is not None:
            kept.add(node, reason)
    _keep_made_large(graph, kept)
    _keep_measured(graph, ranges, kept)
    _keep_statistics(graph, kept)
    _keep_angles(graph, kept)
    return kept


def half_places(node: ir.Node, opsets: Mapping[str, int]) -> tuple[list[bool], list[bool]] | None:
    """Return for every input and every output whether it may be float16 where it was float32; None if nothing may be.

    Some inputs (the scales of a Resize) are float32 by definition, whatever the others are.
    """
    if node.domain == "com.microsoft" and node.op_type in _MICROSOFT:
        return [True] * len(node.inputs), [True] * len(node.outputs)
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == _SIMPLIFIED:
        return [True] * len(node.inputs), [True] * len(node.outputs)
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get("", 1), "")
    except onnx.defs.SchemaError:
        return None
    allowed = {one.type_param_str: set(one.allowed_type_strs) for one in schema.type_constraints}
    places = []
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        row = []
        for index, value in enumerate(values):
            text = formals[min(index, len(formals) - 1)].type_str
            if not is_float(value) or text == "tensor(float)":
                row.append(False)
            elif "tensor(float16)" in allowed.get(text, ()):
                row.append(True)
            else:
                return None
        places.append(row)
    return places[0], places[1]


def _undefined(node: ir.Node, opsets: Mapping[str, int]) -> str | None:
    if qgraph.ir.inner_graphs(node):
        return "it has subgraphs, which stay in float32"
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.name and value.const_value is None and not isinstance(value.type, ir.TensorType):
            return f"the type of '{value.name}' is not known" if value.type is None else "it handles sequences"
    if qgraph.ir.is_op(node, "Cast"):
        before = node.inputs[0]
        if before is not None and before.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return "it widens to float32 on purpose"
        return None
    if qgraph.ir.is_op(node, "QuantizeLinear", "DynamicQuantizeLinear") or "dtype" in node.attributes:
        return f"{node.op_type} gives numbers of a type of its own"
    if qgraph.ir.is_op(node, "DequantizeLinear") and (node.inputs[0] is None or node.inputs[0].const_value is None):
        return "it dequantizes activations"
    if qgraph.ir.is_op(node, "Constant"):
        return "it is a Constant node: 'lift-constants' makes it an initializer"
    if half_places(node, opsets) is None:
        return "it is not defined for float16"
    return None


def _constant_reason(node: ir.Node, kept: Kept) -> str | None:
    """Say what of a node's constants float16 cannot hold; masks are noted, not refused."""
    for value in node.inputs:
        if value is None or not is_float(value) or value.const_value is None:
            continue
        if isinstance(value.const_value, JointTensor):
            continue  # scales of compressed weights: small, as weights are, and costly to know
        array = np.asarray(value.const_value.numpy())
        if array.size == 1 and 0 < abs(float(array.reshape(-1)[0])) < _SMALLEST:
            return f"its constant {float(array.reshape(-1)[0]):.2g} is smaller than what float16 holds exactly"
        beyond = _beyond(array)
        if beyond.size == 0:
            continue
        if node.op_type not in _WITH_MASKS or (beyond > 0).any():
            largest = float(beyond[np.abs(beyond).argmax()])
            return f"{_BEYOND} {largest:.3g}, and float16 ends at {LARGEST:.0f}"
        kept.masks.add(value)
    return None


def _beyond(array: np.ndarray) -> np.ndarray:
    """Return the finite elements that float16 cannot hold; what was read of a large weight is let go."""
    held = array.size == 0 or (float(array.min()) >= -LARGEST and float(array.max()) <= LARGEST)
    found = np.empty(0, np.float32) if held else array[np.isfinite(array) & (np.abs(array) > LARGEST)]
    if array.nbytes > _LARGE:
        qgraph.ir.forget_pages()
    return found


def _growing(node: ir.Node) -> str | None:
    if qgraph.ir.is_op(node, *_REDUCTIONS):
        return "it sums: float16 overflows, or loses what is small"
    if qgraph.ir.is_op(node, "Exp", "Pow") or (qgraph.ir.is_op(node, "Mul") and node.inputs[0] is node.inputs[1]):
        return "it raises numbers to a power, which overflows float16"
    return None


def _keep_made_large(graph: ir.Graph, kept: Kept) -> None:
    """Keep what reads the output of a node with a constant beyond float16: it may be as large."""
    for node in [one for one in graph if kept.reasons.get(one, "").startswith(_BEYOND)]:
        for value in node.outputs:
            for use in value.uses():
                kept.add(use.node, f"it reads '{value.name}', which a constant may make too large for float16")


def _keep_measured(graph: ir.Graph, ranges: Mapping[str, tuple[float, float]], kept: Kept) -> None:
    """Keep what makes, and what reads, values that came near the end of float16.

    What a mask makes small is small in float16 too: of values with a mask only the largest number counts.
    """
    masked = _masked(graph, kept)
    for node in graph:
        for value in node.outputs:
            low, high = ranges.get(value.name or "", (0.0, 0.0))
            largest = abs(high) if value in masked else max(abs(low), abs(high))
            if largest * _MARGIN <= LARGEST:
                continue
            reason = f"'{value.name}' reaches {largest:.3g} on the samples, and float16 ends at {LARGEST:.0f}"
            kept.add(node, reason)
            for use in value.uses():
                kept.add(use.node, reason)


def _masked(graph: ir.Graph, kept: Kept) -> set[ir.Value]:
    """Return the values that hold a mask's numbers, or sums with them."""
    masked = set(kept.masks)
    for node in graph:
        given = node.attributes.get("value") if qgraph.ir.is_op(node, "ConstantOfShape") else None
        starts = given is not None and float(np.asarray(given.as_tensor().numpy()).min()) < -LARGEST
        if starts or (qgraph.ir.is_op(node, *_WITH_MASKS, *_MOVING) and any(one in masked for one in node.inputs)):
            masked.update(node.outputs)
    return masked


def _keep_statistics(graph: ir.Graph, kept: Kept) -> None:
    """Keep what is computed of sums and powers, up to where they scale or shift what they were computed from.

    x / Sqrt(ReduceMean(Pow(x, 2)) + epsilon)    all of it, so that x is widened once and the quotient narrowed once
    """
    statistics: set[ir.Value] = set()
    sources: set[ir.Value] = set()
    for node in graph:
        floats = [value for value in node.inputs if is_float(value) and value is not None and value.const_value is None]
        if node in kept.reasons and _growing(node) is not None:
            statistics.update(node.outputs)
            sources.update(floats)
        elif qgraph.ir.is_op(node, *_FOLLOWING) and floats and any(value in statistics for value in floats):
            if all(value in statistics for value in floats):
                kept.add(node, "it works on sums or powers that stay in float32")
                statistics.update(node.outputs)
            elif node.op_type in _NORMALIZING and all(value in statistics or value in sources for value in floats):
                kept.add(node, "it normalizes with sums that stay in float32")


def _keep_angles(graph: ir.Graph, kept: Kept) -> None:
    """Keep the arithmetic from positions to angles: float16 holds whole numbers exactly up to 2048 only."""
    for node in graph:
        if not qgraph.ir.is_op(node, "Sin", "Cos"):
            continue
        arithmetic = _arithmetic_on_integers(node)
        for one in arithmetic:
            kept.add(one, "it computes angles from positions, which float16 holds exactly up to 2048 only")


def _arithmetic_on_integers(node: ir.Node) -> Iterable[ir.Node]:
    """Return the float nodes before `node`, and itself, if they compute from nothing but integers and constants."""
    found, queue = {node: None}, [node]
    while queue and len(found) <= _LONGEST_ARITHMETIC:
        for value in queue.pop().inputs:
            if value is None or not is_float(value) or value.const_value is not None:
                continue
            producer = value.producer()
            if producer is None or producer.graph is not node.graph:
                return ()
            if producer not in found:
                found[producer] = None
                queue.append(producer)
    return found if len(found) <= _LONGEST_ARITHMETIC else ()
