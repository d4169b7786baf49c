"""The residual stream of a decoder: everything that may be written in another basis together.

    x = Gather(E, ids)                 an embedding writes it
    x = x + MatMul(..., W)             linear layers write it (their columns turn)
    n = x / sqrt(mean(x^2) + e)        a norm turns with it
    MatMul(n * g, V)                   linear layers read it (their rows turn), once g is multiplied into V

Found by following values both ways from the embeddings, from operator to operator, whatever they are called. With an
orthogonal Q, every value v of the stream may become v Q, if E -> E Q, W -> W Q, V -> Q' diag(g) V.

Source: Ashkboos et al., "SliceGPT" (2024), section 3.1, and "QuaRot" (2024), section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.linear_layers import LinearLayer, linear_layers
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.pipeline import Context, Skipped

__all__ = ["Gain", "Stream", "residual_streams"]

_RELAYS = ("Identity", "Cast", "Dropout")
_ROOT_MEAN_SQUARE = {
    ("", "RMSNormalization"): 1,
    ("", "SimplifiedLayerNormalization"): 1,
    ("com.microsoft", "SimplifiedLayerNormalization"): 1,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): 2,
}
"""Norms without a mean, and where their weight stands among the inputs."""
_SKIP = ("com.microsoft", "SkipSimplifiedLayerNormalization")
_SQUARES = ("ReduceSumSquare", "ReduceL2")


class _UnfitError(Exception):
    """The reason why something cannot be turned, and the node that it is about."""

    def __init__(self, node: ir.Node | None, reason: str) -> None:
        super().__init__(reason)
        self.node = node


@dataclasses.dataclass(frozen=True, eq=False)
class Gain:
    """A vector that multiplies the stream, channel by channel, on the way to some linear layers.

    Attributes:
        node: a Mul, or a norm that has the weight itself.
        index: where the vector stands among its inputs.
        layers: those that read the product, and nobody else does.
    """

    node: ir.Node
    index: int
    layers: Sequence[LinearLayer]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """What turns together.

    Attributes:
        width: length of the last axis of every value.
        values: the values, in the order in which they were found.
        embeddings: layers whose rows are values.
        writers: linear layers whose output is a value.
        readers: linear layers whose input is a value, or a value times a gain.
        gains: vectors between values and readers; a reader has one at most.
        vectors: constants that are added to values, or are their source, with their last axis: node and input.
    """

    width: int
    values: Sequence[ir.Value]
    embeddings: Sequence[LinearLayer]
    writers: Sequence[LinearLayer]
    readers: Sequence[LinearLayer]
    gains: Sequence[Gain]
    vectors: Sequence[tuple[ir.Node, int]]


def residual_streams(model: ir.Model, context: Context) -> tuple[list[Stream], list[Skipped]]:
    """Return the streams that embeddings start, and those that cannot be turned, with the node and the reason."""
    shapes = context.analyse(shapes_of, model)
    layers = linear_layers(model).layers
    streams: list[Stream] = []
    skipped: list[Skipped] = []
    seen: set[ir.Value] = set()
    for layer in layers:
        start = layer.node.outputs[0]
        if layer.kind != "embedding" or start in seen:
            continue
        flood = _Flood(shapes, {one.node: one for one in layers})
        try:
            streams.append(flood.run(start, layer.inputs))
        except _UnfitError as reason:
            label = qgraph.ir.node_label(reason.node) if reason.node is not None else layer.name
            skipped.append(Skipped(label, f"the stream from '{layer.name}' cannot be turned: {reason}"))
        seen |= flood.values.keys()
    return streams, skipped


class _Flood:
    def __init__(self, shapes: Shapes, layers: dict[ir.Node, LinearLayer]) -> None:
        self.values: dict[ir.Value, None] = {}
        self._shapes = shapes
        self._layers = layers
        self._queue: list[ir.Value] = []
        self._embeddings: dict[LinearLayer, None] = {}
        self._writers: dict[LinearLayer, None] = {}
        self._readers: dict[LinearLayer, None] = {}
        self._gains: dict[ir.Node, Gain] = {}
        self._vectors: dict[tuple[ir.Node, int], None] = {}

    def run(self, start: ir.Value, width: int) -> Stream:
        self._width = width
        self._join(start, start.producer())
        while self._queue:
            value = self._queue.pop()
            if value.is_graph_output():
                raise _UnfitError(value.producer(), f"'{value.name}' is an output of the model")
            self._made(value)
            for use in value.uses():
                self._read(use.node, use.idx)
        return Stream(
            width,
            tuple(self.values),
            tuple(self._embeddings),
            tuple(self._writers),
            tuple(self._readers),
            tuple(self._gains.values()),
            tuple(self._vectors),
        )

    def _join(self, value: ir.Value | None, node: ir.Node | None) -> None:
        if value is None or value in self.values:
            return
        if self._last(value) != self._width:
            raise _UnfitError(node, f"'{value.name}' is not certain to have {self._width} channels")
        self.values[value] = None
        self._queue.append(value)

    def _last(self, value: ir.Value | None) -> object:
        """Return the length of the last axis; 1 for a single number."""
        dims = self._shapes.dims(value) if value is not None else None
        return None if dims is None else dims[-1] if dims else 1

    def _source(self, node: ir.Node, index: int) -> None:
        """An input that is a value of the stream, or a constant that is added to one."""
        value = node.inputs[index]
        if _is_constant(value):
            if self._last(value) != self._width:
                raise _UnfitError(node, "it adds the same number to every channel")
            self._vectors[node, index] = None
        else:
            self._join(value, node)

    # --- upwards -----------------------------------------------------------------------------------------------------

    def _made(self, value: ir.Value) -> None:
        node = value.producer()
        if node is None:
            raise _UnfitError(None, f"'{value.name}' is no result of a node")
        layer = self._layers.get(node)
        if layer is not None:
            self._written(layer)
        elif qgraph.ir.is_op(node, "Add", "Sub"):
            self._source(node, 0)
            self._source(node, 1)
        elif qgraph.ir.is_op(node, "Mul", "Div"):
            self._join(node.inputs[self._equivariant(node)], node)
        elif _key(node) in _ROOT_MEAN_SQUARE:
            self._normalized(node)
        elif self._keeps_channels(node):
            for index in range(len(node.inputs) if node.op_type == "Concat" else 1):
                self._source(node, index)
        else:
            raise _UnfitError(node, f"it is made by {_at(node)}")

    def _written(self, layer: LinearLayer) -> None:
        if layer.kind == "embedding":
            self._embeddings[layer] = None
            return
        self._writers[layer] = None
        if layer.node.op_type == "Gemm" and len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None:
            self._source(layer.node, 2)

    def _equivariant(self, node: ir.Node) -> int:
        """Return which factor is a value, if the other is one number for each row."""
        indices = (0,) if node.op_type == "Div" else (0, 1)
        for index in indices:
            if self._last(node.inputs[1 - index]) == 1 and self._last(node.inputs[index]) == self._width:
                return index
        raise _UnfitError(node, f"its channels are multiplied one by one in {_at(node)}")

    def _keeps_channels(self, node: ir.Node) -> bool:
        """Tell whether an operator only moves or repeats whole rows."""
        if qgraph.ir.is_op(node, *_RELAYS):
            return True
        before = self._shapes.dims(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
        after = self._shapes.dims(node.outputs[0])
        if not before or not after or before[-1] != after[-1]:
            return False
        last = len(before) - 1
        if qgraph.ir.is_op(node, "Transpose"):
            return list(node.attributes.get_ints("perm", ()))[-1:] == [last]
        if qgraph.ir.is_op(node, "Gather", "Concat"):
            return node.attributes.get_int("axis", 0) not in (-1, last)
        if qgraph.ir.is_op(node, "Slice"):
            axes = qgraph.ir.constant(node.inputs[3]) if len(node.inputs) > 3 else None
            return axes is not None and not np.isin(axes, (-1, last)).any()
        # Of equal length, the last axis of these is the same one: nothing else may move between the axes.
        return qgraph.ir.is_op(node, "Reshape", "Squeeze", "Unsqueeze", "Expand")

    # --- downwards ---------------------------------------------------------------------------------------------------

    def _read(self, node: ir.Node, index: int) -> None:
        layer = self._layers.get(node)
        if qgraph.ir.is_op(node, "Shape", "Size"):
            return
        if layer is not None and layer.kind == "linear" and index == 0:
            self._readers[layer] = None
        elif qgraph.ir.is_op(node, "Add", "Sub"):
            self._join(node.outputs[0], node)
        elif qgraph.ir.is_op(node, "Mul") and _is_constant(other := node.inputs[1 - index]) and self._is_vector(other):
            self._gained(node, 1 - index)
        elif _is_square(node):
            self._squared(node)
        elif qgraph.ir.is_op(node, "Mul", "Div"):
            if self._equivariant(node) != index:
                raise _UnfitError(node, f"its channels are multiplied one by one in {_at(node)}")
            self._join(node.outputs[0], node)
        elif qgraph.ir.is_op(node, *_SQUARES):
            self._reduced(node)
        elif _key(node) in _ROOT_MEAN_SQUARE:
            self._normalized(node)
        elif self._keeps_channels(node) and (index == 0 or node.op_type == "Concat"):
            self._join(node.outputs[0], node)
        elif qgraph.ir.is_op(node, "LayerNormalization", "ReduceMean"):
            raise _UnfitError(node, f"its mean over the channels is taken by {_at(node)}")
        else:
            raise _UnfitError(node, f"{_at(node)} reads it")

    def _is_vector(self, value: ir.Value | None) -> bool:
        dims = self._shapes.dims(value) if value is not None else None
        return dims is not None and len(dims) > 0 and dims[-1] == self._width and all(dim == 1 for dim in dims[:-1])

    def _gained(self, node: ir.Node, index: int) -> None:
        """A vector times a value: whoever reads the product takes the vector into its weight."""
        product = node.outputs[0]
        readers = [use.node for use in product.uses() if not qgraph.ir.is_op(use.node, "Shape", "Size")]
        layers = [self._layers.get(reader) for reader in readers]
        kept = [layer for layer in layers if layer is not None and layer.kind == "linear" and layer.x is product]
        if len(kept) < len(readers) or product.is_graph_output():
            other = next((reader for reader, layer in zip(readers, layers, strict=True) if layer not in kept), None)
            who = _at(other) if other is not None else "the caller"
            raise _UnfitError(node, f"{who} reads it times a weight for each channel")
        self._gains[node] = Gain(node, index, tuple(kept))
        self._readers |= dict.fromkeys(kept)

    def _normalized(self, node: ir.Node) -> None:
        weight = _ROOT_MEAN_SQUARE[_key(node)]
        if len(node.inputs) <= weight or node.inputs[weight] is None:
            self._join(node.outputs[0], node)
        elif node not in self._gains:
            if not _is_constant(node.inputs[weight]) or not self._is_vector(node.inputs[weight]):
                raise _UnfitError(node, f"{_at(node)} has no constant weight for each channel")
            self._gained(node, weight)
        if any(one.uses() or one.is_graph_output() for one in node.outputs[1:3]):
            raise _UnfitError(node, f"{_at(node)} hands out what it divides by")
        self._source(node, 0)
        if _key(node) == _SKIP:
            self._source(node, 1)
            if len(node.inputs) > 4 and node.inputs[4] is not None:
                self._source(node, 4)
            for total in node.outputs[3:]:
                self._join(total, node)

    def _squared(self, node: ir.Node) -> None:
        if node.outputs[0].is_graph_output():
            raise _UnfitError(node, f"'{node.outputs[0].name}' is an output of the model")
        for use in node.outputs[0].uses():
            if not qgraph.ir.is_op(use.node, "ReduceMean", "ReduceSum"):
                raise _UnfitError(use.node, f"{_at(use.node)} reads its squares")
            self._reduced(use.node)

    def _reduced(self, node: ir.Node) -> None:
        """A sum over all channels stays what it is; over other axes it does not."""
        axes: object = node.attributes.get_ints("axes", ())
        if len(node.inputs) > 1:
            axes = qgraph.ir.constant(node.inputs[1])
        dims = self._shapes.dims(node.inputs[0]) if node.inputs[0] is not None else None
        places = [] if axes is None else np.asarray(axes).reshape(-1).tolist()
        if dims is None or not any(place in (-1, len(dims) - 1) for place in places):
            raise _UnfitError(node, f"{_at(node)} adds up squares, but not of all channels")


def _is_constant(value: ir.Value | None) -> bool:
    if value is None or value.is_graph_input():
        return False
    return value.const_value is not None or qgraph.ir.is_op(value.producer(), "Constant")


def _is_square(node: ir.Node) -> bool:
    if qgraph.ir.is_op(node, "Mul"):
        return node.inputs[0] is node.inputs[1]
    if not qgraph.ir.is_op(node, "Pow") or not _is_constant(node.inputs[1]):
        return False
    exponent = qgraph.ir.constant(node.inputs[1])
    return exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0


def _key(node: ir.Node) -> tuple[str, str]:
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def _at(node: ir.Node) -> str:
    return f"'{qgraph.ir.node_label(node)}' ({node.op_type})"
