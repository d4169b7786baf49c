"""Going up from a value, channel by channel, to the constants that take a positive factor for each channel.

How it goes on is told operator by operator: see `channel_rules`, `channel_products` and `spatial_rules`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.shapes import Shapes
from qgraph.analysis.symbols import Dim

__all__ = [
    "NONE",
    "Dims",
    "Found",
    "Key",
    "NoSourceError",
    "Rule",
    "Source",
    "Tracer",
    "at",
    "classes",
    "constant_tensor",
    "key",
    "tie",
    "vector",
]

Dims: TypeAlias = tuple[Dim, ...]
Key: TypeAlias = tuple[str, str]
"""Domain ("" for the default) and operator."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
NONE = -1
"""An element that no factor goes to."""


class NoSourceError(Exception):
    """The reason why no constants take factors for the channels of a value."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A constant whose elements are linear in channels of the activation.

    Attributes:
        node: reads the constant.
        index: as which input.
        channels: which channel's factor each element takes, -1 for none; broadcasts against the constant.
        matrix: the layer whose weight or bias it is, None for others.
    """

    node: ir.Node
    index: int
    channels: np.ndarray
    matrix: LinearLayer | None = None

    @property
    def value(self) -> ir.Value:
        """The constant as it stands."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What lies at the end of the ways up: constants, and pairs of channels that have to take the same factor."""

    sources: tuple[Source, ...] = ()
    ties: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    heads: tuple[np.ndarray, ...] = ()
    linear: bool = True

    def __add__(self, other: Found) -> Found:
        return Found(
            self.sources + other.sources,
            self.ties + other.ties,
            self.heads + other.heads,
            self.linear and other.linear,
        )


class Tracer:
    """Goes up. `ids` has the channel of each element, -1 for none; its axes count from the last, and may be 1.

    Attributes:
        layers: node -> linear layer.
    """

    def __init__(self, shapes: Shapes, layers: Mapping[ir.Node, LinearLayer], rules: Mapping[Key, Rule]) -> None:
        self._shapes = shapes
        self.layers = layers
        self._rules = rules

    def up(self, value: ir.Value | None, ids: np.ndarray, readers: Sequence[ir.Node]) -> Found:
        """Go on with the node that makes `value`, which nobody but `readers` may read."""
        if value is None:
            raise NoSourceError("an input is missing on the way up")
        if value.is_graph_output():
            raise NoSourceError(f"'{value.name}' is an output of the model")
        using = [use.node for use in value.uses() if not qgraph.ir.is_op(use.node, "Shape", "Size")]
        other = next((one for one in using if one not in readers or using.count(one) > 1), None)
        if other is not None:
            raise NoSourceError(f"'{value.name}' is read by '{qgraph.ir.node_label(other)}' too")
        node = value.producer()
        if node is None:
            raise NoSourceError(f"'{value.name}' is no result of a node")
        rule = self._rules.get(key(node))
        if rule is None:
            raise NoSourceError(f"it comes through {at(node)}")
        return rule(self, node, value, ids)

    # --- where it goes on --------------------------------------------------------------------------------------------

    def passed(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """On with the first input."""
        if value is not node.outputs[0]:
            raise NoSourceError(f"it is a side output of '{qgraph.ir.node_label(node)}'")
        return self.up(node.inputs[0], ids, [node])

    def bent(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """Positively homogeneous, not linear."""
        return dataclasses.replace(self.passed(node, value, ids), linear=False)

    def added(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """Both sides take it."""
        del value
        found = Found()
        for index in range(2):
            found += self.operand(node, index, ids)
        return found

    def operand(self, node: ir.Node, index: int, ids: np.ndarray) -> Found:
        """Follow one input of an operator that broadcasts."""
        value = node.inputs[index]
        constant = constant_tensor(value)
        if constant is not None:
            return Found((vector(node, index, ids),))
        narrow, ties = self.narrowed(value, ids)
        return Found(ties=ties) + self.up(value, narrow, [node])

    def narrowed(
        self, value: ir.Value | None, ids: np.ndarray
    ) -> tuple[np.ndarray, tuple[tuple[np.ndarray, np.ndarray], ...]]:
        """Fit ids to an input that is broadcast to them; what is spread over several channels ties them."""
        dims = self.dims(value)
        ties = []
        for axis in range(ids.ndim):
            size = ids.shape[axis]
            place = axis - ids.ndim
            dim = dims[place] if -place <= len(dims) else 1
            if size == 1 or dim == size:
                continue
            if dim != 1:
                raise NoSourceError(f"the size of '{value.name if value else ''}' is not certain")
            first, rest = np.take(ids, [0], axis), np.take(ids, range(1, size), axis)
            ties.append(tie(np.broadcast_to(first, rest.shape), rest))
            ids = first
        return ids.reshape(ids.shape[max(0, ids.ndim - len(dims)) :]), tuple(ties)

    def dims(self, value: ir.Value | None) -> Dims:
        """Return the shape of a value, of which the rank at least has to be known."""
        dims = self._shapes.dims(value) if value is not None else None
        if dims is None:
            raise NoSourceError(f"the shape of '{value.name if value else ''}' is not known")
        return tuple(dims)


Rule: TypeAlias = Callable[[Tracer, ir.Node, ir.Value, np.ndarray], Found]
"""Takes the tracer, a node, its output, and the channel of each element of that output."""


def at(node: ir.Node) -> str:
    """Return label and operator of a node, for a reason."""
    return f"'{qgraph.ir.node_label(node)}' ({node.op_type})"


def key(node: ir.Node) -> tuple[str, str]:
    """Return what rules are found by."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of a floating-point constant, unread."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None and qgraph.ir.is_op(value.producer(), "Constant"):
        tensor = ir.convenience.get_const_tensor(value)
    return tensor if tensor is not None and tensor.dtype in _FLOATS else None


def vector(node: ir.Node, index: int, ids: np.ndarray) -> Source:
    """Return the source that an input of a node is, whose axes stand at the end of those of `ids`."""
    return Source(node, index, ids.reshape([size for place, size in enumerate(ids.shape) if size > 1 or place]))


def classes(channels: int, ties: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the least channel of each one's class."""
    tied = np.arange(channels)
    while True:
        before = tied.copy()
        for one, other in ties:
            least = np.minimum(tied[one], tied[other])
            np.minimum.at(tied, one, least)
            np.minimum.at(tied, other, least)
        tied = tied[tied]
        if (tied == before).all():
            return tied


def tie(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of channels that have to take the same factor, without those that take none."""
    if ((one == NONE) != (other == NONE)).any():
        raise NoSourceError("some of what is shared with other channels must stay as it is")
    used = one != NONE
    return one[used], other[used]
