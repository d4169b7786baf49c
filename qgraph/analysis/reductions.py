"""What is taken of a watched tensor, inside the graph or, where that fails, from the tensor itself.

x -> ReduceMin -> low      x -> ReduceSum -> total, which shows NaN: ReduceMin and ReduceMax pass over it
x -> ReduceMax -> high     x -> Reshape -> Gather(places) -> sample
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.probes import AddOutputs, Kind
from qgraph.numerics.observers import draw, places

__all__ = ["Observation", "Request", "read", "reduce", "reduced_outputs"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A tensor to watch.

    Attributes:
        tensor: name of a value of the main graph that holds real numbers.
        axis: take each index along it on its own (negative: from the end); None for the tensor as a whole.
        sample: elements to draw from each feed, spread evenly over the tensor (from each index along an axis); 0 for
            none. Of a tensor of dynamic size that has fewer elements, some come more than once.
    """

    tensor: str
    axis: int | None = None
    sample: int = 0


class Observation(NamedTuple):
    """One feed's tensor: float64 bounds, () or (channels,), the sample, (n,) or (channels, n), and a suspicion.

    `low` may be 0 for a tensor whose elements all lie above.
    """

    low: np.ndarray
    high: np.ndarray
    sample: np.ndarray
    suspect: bool
    """It may hold NaN or infinity; certain only when the tensor itself was read."""


def reduce(array: np.ndarray, request: Request) -> Observation:
    """Observe a tensor that was fetched; not empty."""
    rows = array.astype(np.float32, copy=False)
    rows = rows.reshape(1, -1) if request.axis is None else np.moveaxis(rows, request.axis, 0)
    rows = rows.reshape(len(rows), -1)
    sample = draw(rows, request.sample) if request.sample else rows[:, :0]
    suspect = not np.isfinite(rows).all()
    return _observation(request, rows.min(axis=1), rows.max(axis=1), sample, suspect=suspect)


def reduced_outputs(requests: Sequence[Request], kinds: Mapping[str, Kind]) -> AddOutputs:
    """Put out what `read` reads."""

    def add(model: ir.Model, values: Mapping[str, ir.Value]) -> list[ir.Value]:
        writer = _Writer(model)
        outputs: list[ir.Value] = []
        for request in requests:
            outputs += _reductions(writer, values[request.tensor], request, kinds[request.tensor])
        return outputs

    return add


def read(requests: Sequence[Request], outputs: Sequence[np.ndarray]) -> Iterator[tuple[Request, Observation]]:
    """Read what the graph of `reduced_outputs` gave for one feed. Empty tensors are left out."""
    remaining = iter(outputs)
    for request in requests:
        low, high, total = next(remaining), next(remaining), next(remaining)
        sample = next(remaining) if request.sample else np.empty((low.size, 0), np.float32)
        if low.size == 0 or (low.min() > high.max() and total.item() == 0.0):
            continue  # the least of nothing is infinity, the largest minus infinity
        # A total may overflow although every element is finite, but it cannot hide NaN.
        finite = math.isfinite(low.min()) and math.isfinite(high.max())
        suspect = math.isnan(total.item()) or not finite
        yield request, _observation(request, low, high, sample, suspect=suspect)


def _observation(
    request: Request, low: np.ndarray, high: np.ndarray, sample: np.ndarray, *, suspect: bool
) -> Observation:
    shape = () if request.axis is None else (low.size,)
    return Observation(
        low.astype(np.float64).reshape(shape),
        high.astype(np.float64).reshape(shape),
        sample.reshape(*shape, -1),
        suspect,
    )


class _Writer:
    """Appends nodes and small constants to a graph under names of its own."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.opset = model.graph.opset_imports.get("", 1)
        self._count = 0
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    def node(self, op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)
        node.outputs[0].name = f"qgraph.watch.{self._count}"
        self._count += 1
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"qgraph.watch.constant.{len(self._constants)}"
            value = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                const_value=ir.tensor(array, name=name),
            )
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def reduce(self, op_type: str, value: ir.Value, axes: list[int] | None) -> ir.Value:
        if axes is None:
            return self.node(op_type, value, keepdims=0)
        if self.opset < 18:
            return self.node(op_type, value, axes=axes, keepdims=0)
        return self.node(op_type, value, self.constant(np.array(axes, np.int64)), keepdims=0)


def _reductions(writer: _Writer, value: ir.Value, request: Request, kind: Kind) -> list[ir.Value]:
    if request == Request(request.tensor) and _is_image_not_below_zero(value, kind):
        highs, means = writer.node("GlobalMaxPool", value), writer.node("GlobalAveragePool", value)
        low = writer.node("Identity", writer.constant(np.zeros((), np.float32)))
        return [low, writer.reduce("ReduceMax", highs, None), writer.reduce("ReduceSum", means, None)]
    if kind.dtype != ir.DataType.FLOAT:
        value = writer.node("Cast", value, to=int(ir.DataType.FLOAT))
    axes = None
    if request.axis is not None and kind.shape is not None:
        channel = request.axis % len(kind.shape)
        axes = [axis for axis in range(len(kind.shape)) if axis != channel]
    reducible = axes is None or bool(axes)
    outputs = [writer.reduce(op, value, axes) if reducible else value for op in ("ReduceMin", "ReduceMax")]
    outputs.append(writer.reduce("ReduceSum", value, None))
    if request.sample:
        outputs.append(_sample(writer, value, axes, request.sample))
    return outputs


def _is_image_not_below_zero(value: ir.Value, kind: Kind) -> bool:
    node = value.producer()
    if node is None or kind.dtype != ir.DataType.FLOAT or kind.shape is None or len(kind.shape) != 4:
        return False
    if qgraph.ir.is_op(node, "Relu", "Sigmoid"):
        return True
    if not qgraph.ir.is_op(node, "Clip"):
        return False
    if "min" in node.attributes:
        return node.attributes["min"].as_float() >= 0.0
    least = qgraph.ir.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return least is not None and bool(least.item() >= 0.0)


def _sample(writer: _Writer, value: ir.Value, axes: list[int] | None, count: int) -> ir.Value:
    shape = [1, -1]
    if axes is not None:
        channel = next(axis for axis in range(len(axes) + 1) if axis not in axes)
        shape = [0, -1]
        if channel:
            value = writer.node("Transpose", value, perm=[channel, *axes])
    rows = writer.node("Reshape", value, writer.constant(np.array(shape, np.int64)))
    length = writer.node("Gather", writer.node("Shape", rows), writer.constant(np.array([1], np.int64)), axis=0)
    scaled = writer.node("Mul", writer.node("Cast", length, to=int(ir.DataType.DOUBLE)), writer.constant(places(count)))
    return writer.node("Gather", rows, writer.node("Cast", scaled, to=int(ir.DataType.INT64)), axis=1)
