"""All channels of a graph that may be scaled, each with everything that its factor has to go into.

    y = Conv(x, W, b)    =>    y / t = Conv(x / s, W s / t, b / t)        s for each channel of x, t for each of y

Read backwards once, every value is told by its readers which of its channels are which: a layer begins new ones, an
operator that passes positive factors on hands them up (`qgraph.analysis.channel_rules`, `spatial_rules`), an Add makes
those of both sides one, and so do several readers of one value. What else reads a value, or makes it, holds its
channels at 1, with the reason: an operator that bends otherwise, an output of the model, a node inside a subgraph, a
weight that others read too.

A channel of this analysis is a class: channels of several values that have to take the same factor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_rules import RULES
from qgraph.analysis.channel_tracer import (
    NONE,
    Found,
    NoSourceError,
    Source,
    Tracer,
    at,
    classes,
    constant_tensor,
    key,
)
from qgraph.analysis.linear_layers import LinearLayer, linear_layers
from qgraph.analysis.scale_folding import input_source
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.analysis.spatial_rules import SPATIAL_RULES, weight_inputs, weight_outputs
from qgraph.pipeline import Context

__all__ = ["ChannelGroups", "Layer", "channel_groups"]

_HOLDING = (
    "Attention", "GroupQueryAttention", "LayerNormalization", "MatMul", "MultiHeadAttention", "RMSNormalization",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
)  # fmt: skip
"""Factors could go on there, but no weight would be the better for it: smoothing is for those."""
_OF_EQUALS = ("Add", "Concat", "Sub")
"""They take several inputs alike."""
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_GATES = ("Clip", "HardSigmoid", "Sigmoid", "Softmax", "Tanh")
_BLIND = ("Shape", "Size")
"""They read a value and see nothing of its elements."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A node with a weight between channels that may be scaled.

    Attributes:
        node: Conv, ConvTranspose, MatMul or Gemm.
        weight: its weight, as what reads channels: multiplied with their factors.
        made: the class of the output channel of each element of the weight, -1 where it stays; divided by its factor.
        inputs: the input channel of each element: int, broadcastable, as `weight.channels` and `made` are.
        outputs: the output channel of each element.
        held: why output channels stay as they are, or None if they all may be scaled.
    """

    node: ir.Node
    weight: Source
    made: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    held: str | None

    @property
    def axis(self) -> int:
        """Of the channels, in what the node reads and makes."""
        return 1 if self.node.op_type in _CONVOLUTIONS else -1


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroups:
    """What `channel_groups` found.

    Attributes:
        count: number of classes.
        layers: in topological order.
        vectors: biases and the like, which are divided by the factors.
        unfit: nodes with weights that cannot take factors, each with the reason.
        values: the class of each channel of values that layers make or read, broadcastable to the value; -1: stays.
    """

    count: int
    layers: Sequence[Layer]
    vectors: Sequence[Source]
    unfit: Mapping[ir.Node, str]
    values: Mapping[ir.Value, np.ndarray]


def channel_groups(model: ir.Model, context: Context, through: frozenset[ir.Node] = frozenset()) -> ChannelGroups:
    """Find the channels of the main graph that may be scaled; for `Context.analyse`.

    Args:
        model: is not changed.
        context: for what is known of shapes.
        through: Clip nodes of bounds 0 and some number that factors go through: the caller sees to it that no channel
            comes to be clipped otherwise than before.
    """
    return _Collector(model, context.analyse(shapes_of, model), through).run()


class _Collector(Tracer):
    """Tells values their channels, from the end of the graph to its beginning."""

    def __init__(self, model: ir.Model, shapes: Shapes, through: frozenset[ir.Node]) -> None:
        layers = {layer.node: layer for layer in linear_layers(model).layers if layer.kind == "linear"}
        super().__init__(shapes, layers, {**RULES, **SPATIAL_RULES})
        self._graph = model.graph
        self._through = through
        self._count = 0
        self._ids: dict[ir.Value, np.ndarray] = {}
        self._ties: list[tuple[np.ndarray, np.ndarray]] = []
        self._reasons: dict[int, str] = {}
        self._followed: set[ir.Value] = set()
        self._read: dict[ir.Node, Source] = {}
        self._made: dict[ir.Node, np.ndarray] = {}
        self._places: dict[ir.Node, tuple[np.ndarray, np.ndarray]] = {}
        self._vectors: list[Source] = []
        self._unfit: dict[ir.Node, str] = {}

    def run(self) -> ChannelGroups:
        for node in reversed(self._graph):
            for value in node.outputs:
                self._settle(value)
            self._visit(node)
        for value in list(self._ids):
            if value.producer() is None:
                self._hold(value, f"'{value.name}' is no result of a node")
        return self._result()

    def up(self, value: ir.Value | None, ids: np.ndarray, readers: Sequence[ir.Node]) -> Found:
        """Tell `value` its channels; those that other readers tell are the same ones."""
        del readers
        if value is None:
            raise NoSourceError("an input is missing on the way up")
        self._followed.add(value)
        before = self._ids.get(value)
        if before is None:
            self._ids[value] = ids
            return Found()
        one, other = np.broadcast_arrays(before, ids)
        both = (one != NONE) & (other != NONE)
        self._ties.append((one[both], other[both]))
        self._ids[value] = np.where(one == NONE, other, one)
        return Found()

    def _hold(self, value: ir.Value, reason: str) -> None:
        """Keep all channels of a value as they are."""
        self._reasons[self._count] = reason
        self.up(value, np.array([self._count]), [])
        self._count += 1

    def _settle(self, value: ir.Value) -> None:
        """Hold what is seen outside the main graph."""
        if value.is_graph_output():
            self._hold(value, f"'{value.name}' is an output of the model")
        inner = next((use.node for use in value.uses() if use.node.graph is not self._graph), None)
        if inner is not None:
            self._hold(value, f"'{value.name}' is read by '{qgraph.ir.node_label(inner)}' inside a subgraph")

    def _visit(self, node: ir.Node) -> None:
        told = [value for value in node.outputs if value in self._ids]
        if not told:
            return  # nobody sees what it makes
        self._followed = set()
        try:
            self._follow(node, told)
        except (NoSourceError, ValueError, IndexError) as reason:
            self._read.pop(node, None)
            self._followed = set()
            why = str(reason) if isinstance(reason, NoSourceError) else f"the shapes at {at(node)} are not certain"
            if node in self.layers or qgraph.ir.is_op(node, *_CONVOLUTIONS):
                self._unfit[node] = why
            for value in told:
                self._hold(value, why)
        if qgraph.ir.is_op(node, *_BLIND):
            return
        for value in [one for one in node.inputs if one is not None and one not in self._followed]:
            if value.producer() is not None:
                self._hold(value, f"'{value.name}' is read by {at(node)}")

    def _follow(self, node: ir.Node, told: Sequence[ir.Value]) -> None:
        layer = self.layers.get(node)
        if layer is not None or qgraph.ir.is_op(node, *_CONVOLUTIONS):
            found = self._rules[key(node)](self, node, told[0], self._ids[told[0]])
            self._ties += found.ties
            self._made[node] = found.sources[0].channels
            self._vectors += found.sources[1:]
            self._begin(node, layer)
            return
        rule = self._rule(node)
        computed = [value for value in node.inputs if value is not None and constant_tensor(value) is None]
        if len(set(computed)) < len(computed) and node.op_type not in _OF_EQUALS:
            raise NoSourceError(f"{at(node)} reads one value twice")
        for value in told:
            found = rule(node, value, self._ids[value])
            self._ties += found.ties
            self._vectors += found.sources

    def _rule(self, node: ir.Node) -> Callable[[ir.Node, ir.Value, np.ndarray], Found]:
        own = {"Add": self._shifted, "Sub": self._shifted, "Mul": self._factored, "Div": self._factored}
        if node in self._through:
            return self.bent
        rule = self._rules.get(key(node))
        if rule is None or node.op_type in _HOLDING:
            raise NoSourceError(f"it comes through {at(node)}")
        if node.op_type == "Cast":
            return self._converted
        return own.get(node.op_type) or functools.partial(rule, self)

    def _begin(self, node: ir.Node, layer: LinearLayer | None) -> None:
        """Give the input of a layer channels of its own."""
        if layer is not None:
            source = input_source(layer)
            channels = self._fresh(layer.inputs)
            self._read[node] = dataclasses.replace(source, channels=channels[source.channels])
            columns = np.arange(layer.outputs)
            rows = source.channels.reshape(1, -1) if layer.transposed else source.channels
            self._places[node] = (rows, columns[:, None] if layer.transposed else columns[None])
            self.up(node.inputs[0], channels, [node])
            return
        tensor = constant_tensor(node.inputs[1])
        assert tensor is not None
        shape = tuple(tensor.shape.numpy())
        groups = node.attributes.get_int("group", 1)
        read, made = (shape[1] * groups, shape[0]) if node.op_type == "Conv" else (shape[0], shape[1] * groups)
        channels = self._fresh(read)
        self._read[node] = Source(node, 1, weight_inputs(node, channels, shape))
        self._places[node] = (weight_inputs(node, np.arange(read), shape), weight_outputs(node, np.arange(made), shape))
        self.up(node.inputs[0], channels.reshape(-1, *[1] * (len(shape) - 2)), [node])

    def _fresh(self, count: int) -> np.ndarray:
        self._count += count
        return np.arange(self._count - count, self._count)

    # --- rules that differ from those for one way up -----------------------------------------------------------------

    def _shifted(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        if any(tensor is not None and tensor.size == 1 for tensor in map(constant_tensor, node.inputs)):
            raise NoSourceError(f"{at(node)} adds one number to all channels")
        return self.added(node, value, ids)

    def _factored(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """One factor is scaled: the computed one, or the one that is no gate. The other stays as it is."""
        del value
        if node.op_type == "Div" or constant_tensor(node.inputs[1]) is not None:
            index = 0
        elif constant_tensor(node.inputs[0]) is not None:
            index = 1
        else:
            index = min((0, 1), key=lambda one: (_is_gate(node.inputs[one]), self._is_single_place(node.inputs[one])))
        if constant_tensor(node.inputs[index]) is not None:
            raise NoSourceError(f"{at(node)} divides a constant")
        return self.operand(node, index, ids)

    def _is_single_place(self, value: ir.Value | None) -> bool:
        dims = self.dims(value)
        return len(dims) > 2 and all(dim == 1 for dim in dims[2:])

    def _converted(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """A Cast between kinds of real numbers."""
        kinds = [self._shapes.dtype(node.inputs[0]), self._shapes.dtype(value)]
        if any(kind is None or not kind.is_floating_point() for kind in kinds):
            raise NoSourceError(f"{at(node)} rounds to integers")
        return self.passed(node, value, ids)

    # --- what was found ----------------------------------------------------------------------------------------------

    def _result(self) -> ChannelGroups:
        tied = classes(self._count, self._ties)
        held: dict[int, str] = {}
        for one, reason in self._reasons.items():
            held.setdefault(int(tied[one]), reason)
        roots = np.flatnonzero(tied == np.arange(self._count))
        free = roots[~np.isin(roots, list(held))]
        numbers = np.full(self._count + 1, NONE)
        numbers[free] = np.arange(free.size)
        numbers[:-1] = numbers[tied]

        def final(source: Source) -> Source:
            return dataclasses.replace(source, channels=numbers[source.channels])

        layers = []
        for node in self._graph:
            if node in self._read and node in self._made:
                made = self._made[node]
                why = next((held[root] for root in tied[made[made != NONE]].tolist() if root in held), None)
                layers.append(Layer(node, final(self._read[node]), numbers[made], *self._places[node], why))
        values = {value: numbers[ids] for value, ids in self._ids.items()}
        vectors = [final(source) for source in reversed(self._vectors)]
        return ChannelGroups(free.size, layers, vectors, dict(reversed(self._unfit.items())), values)


def _is_gate(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type in _GATES
