"""Widen convolutions to the numbers of channels that integer kernels handle fast.

    c = Conv(x, W, b)                           W [24, 48, 1, 1]
    d = Conv<group = 24>(Relu(c), D)            D [24, 1, 3, 3]
    y = Conv(d, V)                              V [48, 24, 1, 1]
    =>
    the same with W [32, 48, 1, 1], D [32, 1, 3, 3], V [48, 32, 1, 1]; what is new in b, W, D and V is zero

ONNX Runtime's convolution of each channel (depthwise) takes a third of the time, and other integer convolutions half,
where the channels are a multiple of 16, respectively 4; then it reads the image in place instead of copying windows.
Values are kept exactly: whatever the new channels hold meets zero weights.

    x [n, 3, h, w] -> Conv(W)    =>    x -> Pad -> [n, 4, h, w] -> Conv(W)    with `inputs`

Channels are widened together with everything that they pass through: activations, pools, sums and products of equal
channels. Does not fire where they reach anything else (Concat, Reshape, a graph output ...), where weights have other
readers, or where the multiple would add more than half as many channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pass, Report

__all__ = ["AlignChannels"]

_QUAD = 4
_MOST_ADDED = 0.5
_LAZY_ABOVE = 1 << 20
_UNARY = (
    "AveragePool",
    "Clip",
    "GlobalAveragePool",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "MaxPool",
    "Relu",
    "Sigmoid",
)
_BINARY = ("Add", "Mul")


@dataclass(frozen=True)
class AlignChannels(Pass):
    """Widen convolutions to multiples of channels that integer kernels handle fast."""

    name: ClassVar[str] = "align-channels"
    depthwise: int = field(default=16, metadata={"help": "multiple for convolutions of each channel"})
    inputs: bool = field(default=False, metadata={"help": "pad images of 1 to 3 channels to 4 as well"})

    def __post_init__(self) -> None:
        if self.depthwise < _QUAD or self.depthwise % _QUAD:
            raise ValueError(f"depthwise is {self.depthwise}, but must be a positive multiple of {_QUAD}")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Widen whatever can be."""
        del context
        spaces = _spaces(model.graph)
        changed = 0
        for space in spaces:
            channels = space.channels
            wanted = None if channels is None else self._wanted(space, channels)
            if channels is not None and wanted is not None:
                _widen(model.graph, space, wanted)
                changed += len(space.writers) + len(space.through)
        images = [node for node in model.graph if self.inputs and _reads_image(node)]
        for node in images:
            _pad_image(model.graph, node)
        return Report(changed=changed + len(images), notes=[f"{changed} convolutions widened"] if changed else [])

    def _wanted(self, space: _Space, channels: int) -> int | None:
        multiple = self.depthwise if space.through else _QUAD
        wanted = -(-channels // multiple) * multiple
        return wanted if 0 < wanted - channels <= _MOST_ADDED * channels else None


@dataclass(eq=False)
class _Space:
    """Channels that are numbered alike in several values.

    Attributes:
        values: that have them on axis 1.
        writers: convolutions that make them.
        readers: convolutions that add them up.
        through: convolutions of each channel.
        closed: nothing else knows how many there are.
    """

    values: list[ir.Value]
    writers: list[ir.Node]
    readers: list[ir.Node]
    through: list[ir.Node]
    closed: bool

    @property
    def channels(self) -> int | None:
        """Their number, or None if it must not change."""
        counts = {_channel_count(value) for value in self.values}
        return counts.pop() if self.closed and len(counts) == 1 else None


def _channel_count(value: ir.Value) -> int | None:
    if value.shape is None or len(value.shape) < 3:
        return None
    channels = value.shape[1]
    return channels if isinstance(channels, int) else None


def _spaces(graph: ir.Graph) -> list[_Space]:
    leader: dict[ir.Value, ir.Value] = {}

    def find(value: ir.Value) -> ir.Value:
        leader.setdefault(value, value)
        while leader[value] is not value:
            leader[value] = leader[leader[value]]
            value = leader[value]
        return value

    for node in graph:
        for value in _tied(node):
            leader[find(value)] = find(node.outputs[0])
        if _is_dense(node):
            find(node.outputs[0])
    members: dict[ir.Value, list[ir.Value]] = {}
    for value in leader:
        members.setdefault(find(value), []).append(value)
    return [_space(values) for values in members.values()]


def _space(values: list[ir.Value]) -> _Space:
    space = _Space(values, [], [], [], closed=True)
    inside = set(values)
    for value in values:
        node = value.producer()
        if node is not None and _is_dense(node):
            space.writers.append(node)
        elif node is not None and value in inside and _tied(node):
            space.through += [node] if node.op_type == "Conv" else []
        else:
            space.closed = False
        for reader, index in value.uses():
            if _is_dense(reader) and index == 0:
                space.readers.append(reader)
            elif reader.outputs[0] not in inside or index >= max(1, len(_tied(reader))):
                space.closed = False
        space.closed = space.closed and not value.is_graph_output()
    return space


def _tied(node: ir.Node) -> list[ir.Value]:
    """Return the inputs whose channels are those of the output."""
    first = node.inputs[0] if node.inputs else None
    if first is None:
        return []
    if qgraph.ir.is_op(node, *_UNARY) or _is_depthwise(node):
        used = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
        return [] if used else [first]
    if qgraph.ir.is_op(node, *_BINARY):
        values = [value for value in node.inputs if value is not None]
        alike = len({_channel_count(value) for value in (*values, node.outputs[0])}) == 1
        return values if alike and not any(qgraph.ir.constant(value) is not None for value in values) else []
    return []


def _is_dense(node: ir.Node) -> bool:
    return _has_own_weights(node) and node.attributes.get_int("group", 1) == 1


def _is_depthwise(node: ir.Node) -> bool:
    if not _has_own_weights(node):
        return False
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    group = node.attributes.get_int("group", 1)
    return group > 1 and tuple(weight.shape.numpy()[:2]) == (group, 1)


def _has_own_weights(node: ir.Node) -> bool:
    if not qgraph.ir.is_op(node, "Conv"):
        return False
    return all(
        value is None or (value.is_initializer() and not value.is_graph_input() and len(value.uses()) == 1)
        for value in node.inputs[1:]
    )


def _widen(graph: ir.Graph, space: _Space, wanted: int) -> None:
    for node in dict.fromkeys((*space.writers, *space.through)):
        for index in range(1, len(node.inputs)):
            _extend(graph, node, index, 0, wanted)
    for node in space.through:
        node.attributes["group"] = ir.AttrInt64("group", wanted)
    for node in dict.fromkeys(space.readers):
        _extend(graph, node, 1, 1, wanted)
    for value in space.values:
        assert value.shape is not None
        value.shape = ir.Shape([wanted if axis == 1 else dim for axis, dim in enumerate(value.shape)])


def _extend(graph: ir.Graph, node: ir.Node, index: int, axis: int, size: int) -> None:
    """Put zeros behind a constant input of a node along an axis."""
    value = node.inputs[index]
    if value is None or value.const_value is None:
        return
    tensor = value.const_value
    shape = list(tensor.shape.numpy())
    added = [(0, size - length if place == axis else 0) for place, length in enumerate(shape)]
    shape[axis] = size

    def compute() -> np.ndarray:
        return np.pad(np.asarray(tensor.numpy()), added)

    stored = compute() if tensor.size <= _LAZY_ABOVE else qgraph.ir.lazy(compute, tensor.dtype, shape)
    node.replace_input_with(index, qgraph.ir.initializer(graph, f"{value.name}_wide", stored))
    graph.initializers.pop(value.name or "", None)


def _reads_image(node: ir.Node) -> bool:
    """Tell whether a convolution reads 1 to 3 channels that come from no convolution."""
    value = node.inputs[0] if node.inputs else None
    if value is None or not _is_dense(node) or value.shape is None or len(value.shape) != _QUAD:
        return False
    channels = value.shape[1]
    return isinstance(channels, int) and channels < _QUAD and value.dtype == ir.DataType.FLOAT


def _pad_image(graph: ir.Graph, node: ir.Node) -> None:
    value = node.inputs[0]
    assert value is not None
    assert value.shape is not None
    channels = value.shape[1]
    assert isinstance(channels, int)
    pads = qgraph.ir.initializer(graph, f"{value.name}_pads", np.array([0, 0, 0, 0, 0, _QUAD - channels, 0, 0]))
    pad = ir.node("Pad", [value, pads], name=qgraph.ir.fresh_name(graph, f"{value.name}_padded"))
    pad.outputs[0].name, pad.outputs[0].dtype = pad.name, ir.DataType.FLOAT
    pad.outputs[0].shape = ir.Shape([_QUAD if axis == 1 else dim for axis, dim in enumerate(value.shape)])
    qgraph.ir.insert_before(node, pad)
    node.replace_input_with(0, pad.outputs[0])
    _extend(graph, node, 1, 1, _QUAD)
