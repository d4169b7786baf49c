"""A proof that nothing overflows in an integer graph, by interval arithmetic on Python integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import onnx_ir as ir

import qgraph.ir

Interval = tuple[int, int]
MOVED = {
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Max",
    "MaxPool", "Min", "Pad", "ReduceMax", "ReduceMin", "Reshape", "ScatterElements", "ScatterND", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
}  # fmt: skip


def of_type(dtype: ir.DataType) -> Interval:
    limits = np.iinfo(dtype.numpy())
    return int(limits.min), int(limits.max)


def hull(intervals: Sequence[Interval]) -> Interval:
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def times(a: Interval, b: Interval) -> Interval:
    ends = [one * other for one in a for other in b]
    return min(ends), max(ends)


class Intervals:
    """The interval of every integer tensor of a graph, for whatever input; raises where one leaves its type."""

    def __init__(self, model: ir.Model) -> None:
        self.known: dict[ir.Value, Interval] = {}
        self.accumulators = 0
        for node in model.graph:
            if any(value.dtype is ir.DataType.FLOAT for value in node.outputs):
                continue
            for value in node.outputs:
                assert value.dtype is not None
                least, most = of_type(value.dtype) if value.dtype is not ir.DataType.BOOL else (0, 1)
                low, high = self.result(node, value.dtype)
                assert least <= low <= high <= most, f"{node.op_type} '{node.name}': {low} to {high} of {value.dtype}"
                self.known[value] = low, high
                self.accumulators += value.dtype is ir.DataType.INT32

    def of(self, value: ir.Value | None) -> Interval:
        assert value is not None
        array = qgraph.ir.constant(value)
        if array is not None:
            return (int(array.min()), int(array.max())) if array.size else (0, 0)
        assert value.dtype is not None
        return self.known.get(value, (0, 1) if value.dtype is ir.DataType.BOOL else of_type(value.dtype))

    def result(self, node: ir.Node, dtype: ir.DataType) -> Interval:
        rule = RULES.get(node.op_type)
        if rule is not None:
            return rule(self, node)
        if node.op_type in MOVED:
            data = node.inputs[1:] if node.op_type == "Where" else node.inputs
            return hull([self.of(value) for value in data if value is not None and value.dtype is dtype])
        assert dtype.bitwidth <= 16 or dtype in (ir.DataType.INT64, ir.DataType.BOOL), f"no rule for {node.op_type}"
        return (0, 1) if dtype is ir.DataType.BOOL else of_type(dtype)


def add(known: Intervals, node: ir.Node) -> Interval:
    whole = node.inputs[1].producer()
    part = None if whole is None or whole.op_type != "Mul" else whole.inputs[0].producer()
    if part is not None and part.op_type == "Div" and part.inputs[0] is node.inputs[0]:
        assert part.inputs[1] is whole.inputs[1]
        return 0, known.of(whole.inputs[1])[1] - 1  # x - x / c * c, a remainder
    (a, b), (c, d) = (known.of(value) for value in node.inputs)
    return (a + c, b + d) if node.op_type == "Add" else (a - d, b - c)


def multiply(known: Intervals, node: ir.Node) -> Interval:
    if node.inputs[0] is node.inputs[1]:
        return 0, max(end * end for end in known.of(node.inputs[0]))
    return times(known.of(node.inputs[0]), known.of(node.inputs[1]))


def divide(known: Intervals, node: ir.Node) -> Interval:
    (low, high), (least, most) = (known.of(value) for value in node.inputs)
    assert low >= 0
    assert least > 0
    return low // most, high // least


def negate(known: Intervals, node: ir.Node) -> Interval:
    low, high = known.of(node.inputs[0])
    return -high, -low


def clip(known: Intervals, node: ir.Node) -> Interval:
    (low, high), (least, _), (_, most) = (known.of(value) for value in node.inputs)
    return max(low, least), min(high, most)


def same(known: Intervals, node: ir.Node) -> Interval:
    return known.of(node.inputs[0])


def layer(known: Intervals, node: ir.Node) -> Interval:
    """Sums of products: with a constant weight by its signs, else by the length of the sum."""
    sides = []
    for index in (0, 1):
        low, high = known.of(node.inputs[index])
        zero = node.inputs[index + 2] if len(node.inputs) > index + 2 else None
        offset = 0 if zero is None else int(qgraph.ir.constant(zero).item())
        sides.append((low - offset, high - offset))
    arrays = [qgraph.ir.constant(value) for value in node.inputs[:2]]
    if arrays[0] is None and arrays[1] is None:
        assert node.inputs[0].shape is not None
        low, high = times(*sides)
        length = node.inputs[0].shape[-1]
        return low * length, high * length
    index = 1 if arrays[1] is not None else 0
    weight = arrays[index].astype(object)
    if node.op_type == "ConvInteger":
        rows = weight.reshape(weight.shape[0], -1)
    else:  # of several matrices, each for itself
        turned = np.swapaxes(weight, -1, -2) if index else weight
        rows = turned.reshape(-1, turned.shape[-1])
    # A padded place is a zero point, which is within the reach of the codes.
    low, high = sides[1 - index]
    most = [sum(w * (high if w > 0 else low) for w in row) for row in rows]
    least = [sum(w * (low if w > 0 else high) for w in row) for row in rows]
    return min(least), max(most)


def reduce_sum(known: Intervals, node: ir.Node) -> Interval:
    source = node.inputs[0]
    axes = qgraph.ir.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    sizes = list(source.shape) if axes is None else [source.shape[int(axis)] for axis in axes.reshape(-1)]
    count = math.prod(sizes)
    low, high = known.of(source)
    return low * count, high * count


def running_sum(known: Intervals, node: ir.Node) -> Interval:
    axis = qgraph.ir.constant(node.inputs[1])
    count = node.inputs[0].shape[int(axis.item())]
    return hull([(0, 0), times((1, count), known.of(node.inputs[0]))])


def softmax(known: Intervals, node: ir.Node) -> Interval:
    return 0, known.of(node.inputs[3])[1]


def normalize(known: Intervals, node: ir.Node) -> Interval:
    """|y| = |c| * numerator / sd, and |c| is at most sqrt(n) times the deviation; sd is rounded down."""
    most = math.ceil(known.of(node.inputs[-1])[1] * math.sqrt(node.inputs[0].shape[-1]) * 1.01) + 1
    return -most, most


def rounded_divide(known: Intervals, node: ir.Node) -> Interval:
    most = max(abs(end) for end in known.of(node.inputs[0]))
    return -most, most


def integer_sqrt(known: Intervals, node: ir.Node) -> Interval:
    low, high = known.of(node.inputs[0])
    assert low >= 0
    assert high <= 1 << 62
    return 0, math.isqrt(high)


def requantize(known: Intervals, node: ir.Node) -> Interval:
    """Of 32 bits with a half that goes up, by the largest multiplier; fewer bits have the bounds that are given."""
    least, most = known.of(node.inputs[4])[0], known.of(node.inputs[5])[1]
    if node.outputs[0].dtype is not ir.DataType.INT32:
        return least, most
    multipliers, shifts = (qgraph.ir.constant(value).astype(object) for value in node.inputs[1:3])
    largest = max(Fraction(m, 1 << s) for m, s in np.broadcast(multipliers, shifts))
    low, high = (math.floor(end * largest + Fraction(1, 2)) for end in known.of(node.inputs[0]))
    return max(low - 1, least), min(high + 1, most)


def interpolate(known: Intervals, node: ir.Node) -> Interval:
    low, high = known.of(node.inputs[1])
    return (low * 128 + (1 << 13)) >> 14, (high * 128 + (1 << 13)) >> 14


RULES: dict[str, Callable[[Intervals, ir.Node], Interval]] = {
    "Add": add, "Sub": add, "Mul": multiply, "Div": divide, "Neg": negate, "Clip": clip, "Cast": same,
    "ConvInteger": layer, "MatMulInteger": layer, "CumSum": running_sum, "ReduceSum": reduce_sum, "Softmax": softmax,
    "LayerNormalize": normalize, "RMSNormalize": normalize, "RoundedDivide": rounded_divide,
    "IntegerSqrt": integer_sqrt, "TableInterpolate": interpolate, "Requantize": requantize,
}  # fmt: skip
