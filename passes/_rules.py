"""Rewriting by patterns in onnxscript's language, with this project's care for names.

A rule's `pattern` reads like the graph. What onnxscript's own rule sets do besides matching is left out: they give new
names to values and nodes, mark nodes with the rule, and clean up elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

import qgraph.ir

if TYPE_CHECKING:
    from onnxscript.rewriter import pattern

__all__ = ["Rule", "discard_unread", "fires", "number", "rewrite"]


@dataclass(frozen=True)
class Rule:
    """One form of a computation, and what is written for it.

    Attributes:
        pattern: takes onnxscript's `op` and the values that vary, and returns the last value; factors and summands may
            come in either order.
        write: takes what the pattern's parameters stand for, by name, and returns the node that computes the same, or
            None where constants, types or shapes do not fit.
    """

    pattern: Callable[..., Any]
    write: Callable[..., ir.Node | None]


def rewrite(model: ir.Model, rules: Sequence[Rule], *, forwards: bool = False) -> int:
    """Put what the rules write in the place of what their patterns match, everywhere; return how often.

    Nothing is matched whose intermediate results somebody else reads.

    Args:
        model: is changed.
        rules: the first that fits a node wins.
        forwards: in the order of the graph. From its end on, what `write` gets are values of the model as it was, of
            which analyses know.
    """
    compiled = [(one, rule.write) for rule in rules for one in _orders(rule.pattern)]
    nodes = list(qgraph.ir.walk(model))
    return sum([_replaced(model, node, compiled) for node in (nodes if forwards else reversed(nodes))])


def fires(model: ir.Model, rules: Sequence[Rule]) -> bool:
    """Tell whether a rule would fire anywhere; what the rules write must be a node alone. The model stays as it is."""
    compiled = [(one, rule.write) for rule in rules for one in _orders(rule.pattern)]
    for node in qgraph.ir.walk(model):
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        for rule, write in compiled:
            match = rule.match(model, graph, node)
            new = write(**match.bindings) if match else None
            if new is not None:
                for index in range(len(new.inputs)):
                    new.replace_input_with(index, None)  # a node that is dropped must not count as a reader
                return True
    return False


def _orders(form: Callable[..., Any]) -> Sequence[pattern.RewriteRule]:
    from onnxscript.rewriter import pattern

    return pattern.RewriteRule(form, lambda op: None).commute()  # noqa: ARG005 - its signature; it is never called


def _replaced(
    model: ir.Model, node: ir.Node, rules: Sequence[tuple[pattern.RewriteRule, Callable[..., ir.Node | None]]]
) -> bool:
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        return False  # it went with a match
    for rule, write in rules:
        match = rule.match(model, graph, node)
        new = write(**match.bindings) if match else None
        if new is not None:
            above = list(node.inputs)
            new.name = node.name
            qgraph.ir.replace_node(node, new)
            for value in above:
                discard_unread(value)
            return True
    return False


def number(value: ir.Value | None) -> float | None:
    """Return the one element of a constant of floats, or None."""
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.size != 1:
        return None
    array = qgraph.ir.constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.dtype.kind == "f" else None


def matrix_dims(value: ir.Value | None) -> tuple[int, int] | None:
    """Return rows and columns of a stored matrix that no caller may replace, without reading it, or None."""
    stored = value.const_value if value is not None and not value.is_graph_input() else None
    if stored is None or len(stored.shape) != 2:
        return None
    rows, columns = stored.shape.numpy()
    return rows, columns


def discard_unread(value: ir.Value | None) -> None:
    """Remove the node that makes a value nobody reads, and so on upwards."""
    pending = [value]
    while pending:
        one = pending.pop()
        node = one.producer() if one is not None else None
        if (
            node is None
            or node.graph is None
            or any(output.uses() or output.is_graph_output() for output in node.outputs)
        ):
            continue
        above = list(node.inputs)
        qgraph.ir.discard(node)
        pending += above
