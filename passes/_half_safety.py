"""Which nodes compute in 16 bits without losing what matters, and why the others stay in float32.

float16 ends at 65504; bfloat16 hardly ever overflows, but has 8 bits of precision instead of 11. Both keep whole
numbers only up to a point (2048 and 256), and both lose sums and what is computed of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.lazy_tensors import JointTensor
from qgraph.passes._half_types import BFLOAT16, FLOAT16, Half, Kept, Ranges, is_float, is_wide, rounded, undefined

__all__ = ["arithmetic_on_integers", "keep", "keep_constants", "keep_measured"]

_MARGIN = 2.0
"""How far below the largest number the magnitudes that were measured must stay: other inputs have other ones."""
_SMALLEST = float(np.finfo(np.float16).tiny)
_MOST_LOST = 2.0**-8
"""The largest relative error, root mean square, that rounding a constant may cause."""
_SMALL = 2.0**-8
"""Only of constants without larger numbers may rounding to float16 lose that much."""
_REDUCTIONS = ("CumSum", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum",
               "ReduceSumSquare")  # fmt: skip
_SUMS = ("AveragePool", "BatchNormalization", "GlobalAveragePool", "InstanceNormalization", "LRN", "LogSoftmax",
         "LpNormalization", "MeanVarianceNormalization", "ReduceLogSum", "Softmax")  # fmt: skip
"""Operators that sum in the type of their input as ONNX defines them; others normalize in float32 by definition."""
_FOLLOWING = ("Abs", "Add", "Clip", "Div", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub")
_NORMALIZING = ("Div", "Mul", "Sub")
_WITH_MASKS = ("Add", "ConstantOfShape", "Expand", "Max", "Mul", "Sub", "Where")
_MOVING = ("Cast", "Concat", "Identity", "Reshape", "ScatterND", "Slice", "Squeeze", "Transpose", "Trilu", "Unsqueeze")
_ADDENDS = {"Add": -1, "Conv": 2, "ConvTranspose": 2, "Gemm": 2, "LayerNormalization": 2, "MatMulNBits": 5, "Sub": -1}
"""Which inputs are only added to something; -1 stands for all."""
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_LONGEST_ARITHMETIC = 64
_LARGE = 1 << 24
_BEYOND = "its constant reaches"
_EXACT = (ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.UINT8)


def keep(
    graph: ir.Graph, opsets: Mapping[str, int], ranges: Ranges, half: Half, kept: Kept, *, quantizers: bool = False
) -> None:
    """Decide for every node of a graph that has to do with float32.

    Args:
        graph: the main graph; types of its values are known.
        opsets: that the model imports.
        ranges: what was measured.
        half: the type.
        kept: gets the nodes that stay; those that are in it count already.
        quantizers: whether what quantizes and dequantizes activations may be of 16 bits.
    """
    for node in graph:
        reason = (
            undefined(node, opsets, half, quantizers=quantizers)
            or keep_constants(node, half, kept)
            or _growing(node, half)
        )
        if reason is not None:
            kept.add(node, reason)
    _keep_made_large(graph, kept, half)
    keep_measured(graph, ranges, kept, half.largest / _MARGIN, f"{half.name} ends at {half.largest:.6g}")
    _keep_statistics(graph, kept)
    _keep_angles(graph, kept, half)
    if half is BFLOAT16:
        _keep_integers(graph, ranges, kept, half)
    if quantizers:
        _keep_quantized_layers_whole(graph, kept)


def keep_constants(node: ir.Node, half: Half, kept: Kept) -> str | None:
    """Say what of a node's constants the type cannot hold; masks are noted, not refused."""
    for index, value in enumerate(node.inputs):
        if value is None or not is_wide(value, half) or value.const_value is None or value.is_graph_input():
            continue
        if isinstance(value.const_value, JointTensor):
            continue  # scales of compressed weights are looked at when they are computed
        array = np.asarray(value.const_value.numpy())
        reason = _float16_reason(node, index, array) if half is FLOAT16 else None
        if reason is not None:
            return reason
        if _beyond(array, half).size:
            kept.masks.add(value)
    return None


def _float16_reason(node: ir.Node, index: int, array: np.ndarray) -> str | None:
    if array.size == 1 and 0 < abs(float(array.reshape(-1)[0])) < _SMALLEST:
        return f"its constant {float(array.reshape(-1)[0]):.2g} is smaller than what float16 holds exactly"
    beyond = _beyond(array, FLOAT16)
    if beyond.size and (node.op_type not in _WITH_MASKS or (beyond > 0).any()):
        largest = float(beyond[np.abs(beyond).argmax()])
        return f"{_BEYOND} {largest:.3g}, and float16 ends at {FLOAT16.largest:.0f}"
    if array.size == 1 or _ADDENDS.get(node.op_type, 0) in (-1, index):
        return None  # what is small and added may well be lost
    size = float(np.abs(array).max(initial=0.0))
    if 0.0 < size < _SMALL and _lost(array) > _MOST_LOST:
        return f"its constant reaches only {size:.2g}, where float16 has few bits left"
    return None


def _lost(array: np.ndarray) -> float:
    """Return the relative error that rounding to float16 causes."""
    exact = array.astype(np.float64)
    return float(np.linalg.norm(rounded(array, FLOAT16) - exact) / np.linalg.norm(exact))


def _beyond(array: np.ndarray, half: Half) -> np.ndarray:
    """Return the finite elements that the type cannot hold; what was read of a large weight is let go."""
    held = array.size == 0 or (float(array.min()) >= -half.largest and float(array.max()) <= half.largest)
    found = np.empty(0, np.float32) if held else array[np.isfinite(array) & (np.abs(array) > half.largest)]
    if array.nbytes > _LARGE:
        qgraph.ir.forget_pages()
    return found


def _growing(node: ir.Node, half: Half) -> str | None:
    if qgraph.ir.is_op(node, *_REDUCTIONS) or (half is BFLOAT16 and qgraph.ir.is_op(node, *_SUMS)):
        how = "float16 overflows, or loses what is small" if half is FLOAT16 else f"{half.name} loses what is small"
        return f"it sums: {how}"
    if _raises(node):
        how = "which overflows float16" if half is FLOAT16 else f"and so the errors of {half.name}"
        return f"it raises numbers to a power, {how}"
    return None


def _raises(node: ir.Node) -> bool:
    return qgraph.ir.is_op(node, "Exp", "Pow") or (qgraph.ir.is_op(node, "Mul") and node.inputs[0] is node.inputs[1])


def _keep_made_large(graph: ir.Graph, kept: Kept, half: Half) -> None:
    """Keep what reads the output of a node with a constant out of the type's range: it may be as large, or as small."""
    for node in [one for one in graph if kept.reasons.get(one, "").startswith(_BEYOND)]:
        for value in node.outputs:
            for use in value.uses():
                kept.add(use.node, f"it reads '{value.name}', which a constant may take out of what {half.name} holds")


def keep_measured(graph: ir.Graph, ranges: Ranges, kept: Kept, limit: float, why: str) -> None:
    """Keep what makes, and what reads, values that were larger than `limit`; `why` ends the reason.

    What a mask makes small is small in 16 bits too: of values with a mask only the largest number counts.
    """
    masked = _masked(graph, kept)
    for node in graph:
        for value in node.outputs:
            low, high = ranges.get(value.name or "", (0.0, 0.0))
            largest = abs(high) if value in masked else max(abs(low), abs(high))
            if largest <= limit:
                continue
            reason = f"'{value.name}' reaches {largest:.3g} on the samples, and {why}"
            kept.add(node, reason)
            for use in value.uses():
                kept.add(use.node, reason)


def _masked(graph: ir.Graph, kept: Kept) -> set[ir.Value]:
    """Return the values that hold a mask's numbers, or sums with them."""
    masked = set(kept.masks)
    for node in graph:
        given = node.attributes.get("value") if qgraph.ir.is_op(node, "ConstantOfShape") else None
        starts = given is not None and float(np.asarray(given.as_tensor().numpy()).min()) < -FLOAT16.largest
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
        if node in kept.reasons and (qgraph.ir.is_op(node, *_REDUCTIONS) or _raises(node)):
            statistics.update(node.outputs)
            sources.update(floats)
        elif qgraph.ir.is_op(node, *_FOLLOWING) and floats and any(value in statistics for value in floats):
            if all(value in statistics for value in floats):
                kept.add(node, "it works on sums or powers that stay in float32")
                statistics.update(node.outputs)
            elif node.op_type in _NORMALIZING and all(value in statistics or value in sources for value in floats):
                kept.add(node, "it normalizes with sums that stay in float32")


def _keep_integers(graph: ir.Graph, ranges: Ranges, kept: Kept, half: Half) -> None:
    """Keep numbers made of integers, and the arithmetic on nothing else, unless they are known to be small."""
    integers: set[ir.Value] = set()
    for node in graph:
        if qgraph.ir.is_op(node, "Cast") and is_float(node.outputs[0]):
            before = node.inputs[0]
            if before is None or is_float(before) or before.dtype in _EXACT or before.dtype is None:
                continue
            low, high = ranges.get(node.outputs[0].name or "", (-np.inf, np.inf))
            if before.dtype.is_integer() and max(-low, high) > half.whole:
                kept.add(node, f"it makes numbers of integers, which {half.name} holds exactly up to {half.whole} only")
                integers.add(node.outputs[0])
        elif qgraph.ir.is_op(node, *_FOLLOWING, *_MOVING):
            floats = [value for value in node.inputs if value is not None and is_float(value)]
            if any(one in integers for one in floats) and all(one in integers or one.const_value for one in floats):
                kept.add(node, f"it computes with integers, which {half.name} holds exactly up to {half.whole} only")
                integers.update(node.outputs)


def _keep_angles(graph: ir.Graph, kept: Kept, half: Half) -> None:
    """Keep the arithmetic from positions to angles, which are whole numbers."""
    for node in graph:
        if not qgraph.ir.is_op(node, "Sin", "Cos"):
            continue
        for one in arithmetic_on_integers(node):
            reason = f"it computes angles from positions, which {half.name} holds exactly up to {half.whole} only"
            kept.add(one, reason)


def _keep_quantized_layers_whole(graph: ir.Graph, kept: Kept) -> None:
    """Keep a quantized layer with every DequantizeLinear that it reads: a Cast between them would make it a float one.

    A DequantizeLinear with several readers keeps all of them.
    """
    readers = [node for node in graph if not qgraph.ir.is_op(node, *_QUANTIZERS)]
    read = {node: [one for one in map(_dequantizer, node.inputs) if one is not None] for node in readers}
    together: dict[ir.Node, list[ir.Node]] = {}
    for node, dequantizers in read.items():
        for one in dequantizers:
            together.setdefault(node, []).append(one)
            together.setdefault(one, []).append(node)
    queue = [node for node in together if node in kept.reasons]
    while queue:
        node = queue.pop()
        for one in together[node]:
            if one not in kept.reasons:
                kept.add(one, f"a quantized layer is of one type, and its '{qgraph.ir.node_label(node)}' is float32")
                queue.append(one)


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    producer = None if value is None else value.producer()
    return producer if qgraph.ir.is_op(producer, "DequantizeLinear") else None


def arithmetic_on_integers(node: ir.Node) -> Iterable[ir.Node]:
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
