"""Functions that exporters write as several nodes and that integers compute as one.

x / Sqrt(ReduceMean(x * x) + eps)      normalization by the root mean square, over the last axis
Sqrt(a * a + b * b)                    the magnitude of a complex number; also Sqrt(ReduceSum(x * x)), of which x may be
                                       c * u with a constant c; also the root of such a magnitude
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir

__all__ = ["PATTERNS", "Found", "gain_of", "is_magnitude", "norm_epsilon"]


@dataclasses.dataclass(frozen=True)
class Found:
    """A function that was recognised.

    Attributes:
        form: the value of its `Form`.
        nodes: its nodes, in topological order.
        sources: the tensors that it is of.
        result: what it makes.
    """

    form: str
    nodes: tuple[ir.Node, ...]
    sources: tuple[ir.Value, ...]
    result: ir.Value


def _square_of(value: ir.Value | None) -> ir.Value | None:
    """Return x if `value` is x * x or Pow(x, 2)."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if qgraph.ir.is_op(node, "Mul") and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    if qgraph.ir.is_op(node, "Pow"):
        exponent = qgraph.ir.constant(node.inputs[1])
        return node.inputs[0] if exponent is not None and exponent.size == 1 and exponent.item() == 2 else None
    return None


def _scalar(value: ir.Value | None) -> float | None:
    array = qgraph.ir.constant(value)
    return float(array.item()) if array is not None and array.size == 1 else None


def _chain(first: ir.Node, *op_types: str) -> list[ir.Node] | None:
    """Return `first` and the nodes behind it, each the only reader of the one before, if they are such operators."""
    nodes = [first]
    for op_type in op_types:
        after = qgraph.ir.only_consumer(nodes[-1].outputs[0])
        if after is None or not qgraph.ir.is_op(after, op_type) or after.graph is not first.graph:
            return None
        nodes.append(after)
    return nodes


def _last_axis(node: ir.Node, source: ir.Value) -> bool:
    axes = qgraph.ir.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    given = [int(axis) for axis in axes.reshape(-1)] if axes is not None else node.attributes.get_ints("axes", [])
    rank = None if source.shape is None else len(source.shape)
    return len(given) == 1 and (given[0] == -1 or (rank is not None and given[0] == rank - 1))


def _rms_norm(node: ir.Node) -> Found | None:
    """Match from the square on: Pow or Mul, ReduceMean, Add, Sqrt, Div."""
    source = _square_of(node.outputs[0]) if node.outputs else None
    nodes = None if source is None else _chain(node, "ReduceMean", "Add", "Sqrt", "Div")
    if nodes is None or source is None:
        return None
    _, mean, plus, root, quotient = nodes
    if not _last_axis(mean, source) or not mean.attributes.get_int("keepdims", 1):
        return None
    if all(_scalar(value) is None for value in plus.inputs):
        return None
    if quotient.inputs[0] is not source or quotient.inputs[1] is not root.outputs[0]:
        return None
    return Found("normalization", tuple(nodes), (source,), quotient.outputs[0])


def norm_epsilon(nodes: Sequence[ir.Node]) -> float:
    """Return what a normalization that `PATTERNS` found adds under the root."""
    return next(number for number in map(_scalar, nodes[2].inputs) if number is not None)


def _hypot(node: ir.Node) -> Found | None:
    """Match Pow and Pow, Add, Sqrt of two slices of one tensor, or Mul, ReduceSum, Sqrt, from the (first) square on."""
    source = _square_of(node.outputs[0]) if node.outputs else None
    if source is None:
        return None
    nodes = _chain(node, "ReduceSum", "Sqrt")
    if nodes is not None:
        nodes = _and_root(nodes)
        return Found("root of a sum of squares", tuple(nodes), (source,), nodes[-1].outputs[0])
    nodes = _chain(node, "Add", "Sqrt")
    if nodes is None:
        return None
    others = [value for value in nodes[1].inputs if value is not node.outputs[0]]
    other = _square_of(others[0]) if len(others) == 1 else None
    second = others[0].producer() if others and others[0] is not None else None
    if other is None or second is None or qgraph.ir.only_consumer(second.outputs[0]) is not nodes[1]:
        return None
    nodes = _and_root([node, second, *nodes[1:]])
    return Found("root of a sum of squares", tuple(nodes), (source, other), nodes[-1].outputs[0])


def _and_root(nodes: list[ir.Node]) -> list[ir.Node]:
    """Return the nodes of a magnitude, and the root that alone reads it."""
    rooted = _chain(nodes[-1], "Sqrt")
    return nodes if rooted is None else [*nodes, rooted[-1]]


def _scaled_hypot(node: ir.Node) -> Found | None:
    """Match a product with a constant before Mul, ReduceSum, Sqrt, from that product on.

    The constant is the same along the axes of the sum, so that it is a factor of the root.
    """
    gain, value = gain_of(node), node.outputs[0] if node.outputs else None
    if gain is None or value is None or value.is_graph_output():
        return None
    readers = list({use.node for use in value.uses()})
    found = _hypot(readers[0]) if len(readers) == 1 and readers[0].graph is node.graph else None
    if found is None or found.sources != (value,):
        return None
    (source,) = (one for one in node.inputs if one is not None and qgraph.ir.constant(one) is None)
    if source.shape is None or source.shape != value.shape:
        return None
    sizes = (1,) * (len(source.shape) - gain.ndim) + gain.shape
    given = found.nodes[1].inputs[1] if len(found.nodes[1].inputs) > 1 else None
    axes = range(len(sizes)) if given is None else qgraph.ir.constant(given)
    if axes is None or any(sizes[int(axis)] != 1 for axis in axes):
        return None
    return Found(found.form, (node, *found.nodes), (source,), found.result)


def gain_of(node: ir.Node) -> np.ndarray | None:
    """Return the constant that the first node of a magnitude multiplies by, if it does."""
    if not qgraph.ir.is_op(node, "Mul"):
        return None
    constants = [array for value in node.inputs if (array := qgraph.ir.constant(value)) is not None]
    return constants[0] if len(constants) == 1 and np.isfinite(constants[0]).all() else None


def is_magnitude(node: ir.Node) -> bool:
    """Tell whether a node is the (first) root of a magnitude."""
    if not qgraph.ir.is_op(node, "Sqrt"):
        return False
    total = node.inputs[0].producer() if node.inputs[0] is not None else None
    squares = [] if total is None else [value.producer() for value in total.inputs if value is not None]
    found = [one for square in squares if square is not None and (one := _hypot(square)) is not None]
    return any(node in one.nodes for one in found)


PATTERNS: tuple[Callable[[ir.Node], Found | None], ...] = (_rms_norm, _scaled_hypot, _hypot)
"""Each returns what it has found with a node as its first, or None."""
