"""What a code generator knows of each operator: how it reads its inputs, and the function that writes it.

ELEMENT     an element of the output is computed from one element of each input, broadcast
MOVE        an element of the output is one element of an input, elsewhere
SCALAR      an element of the output is computed by loops of its own, wherever in the output it lies
ROWS        the operator writes the loops over its output itself, since neighbours share work
WHOLE       as ROWS, but nothing can follow in the same loops
VIEW        the same bytes under another shape
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from qgraph.codegen.c_graph import IntegerGraph, refusal

if TYPE_CHECKING:
    from qgraph.codegen.c_kernel import Kernel

__all__ = ["Access", "Emit", "Kind", "Read", "Reads", "Rule", "every", "first", "once", "register", "rule_of"]


class Kind(enum.Enum):
    """How an operator's output comes about; see the module."""

    ELEMENT = enum.auto()
    MOVE = enum.auto()
    SCALAR = enum.auto()
    ROWS = enum.auto()
    WHOLE = enum.auto()
    VIEW = enum.auto()


class Access(enum.Enum):
    """How often an operator reads an element of an input.

    BROADCAST   once for each element of the output, at the same place
    ONCE        at most once
    MANY        several times
    MEMORY      through a pointer
    """

    BROADCAST = enum.auto()
    ONCE = enum.auto()
    MANY = enum.auto()
    MEMORY = enum.auto()


Read = tuple[ir.Value, Access]
Emit = Callable[["Kernel", ir.Value, tuple[str, ...]], str]
"""Write what computes a value at an index, and return an atom for it. ROWS and WHOLE get an empty index."""
Reads = Callable[[IntegerGraph, ir.Node], Sequence[Read]]


@dataclass(frozen=True)
class Rule:
    """How an operator is written."""

    kind: Kind
    reads: Reads
    emit: Emit


When = Callable[[IntegerGraph, ir.Node], bool]
_RULES: dict[tuple[str, str], list[tuple[When | None, Rule]]] = {}


def every(access: Access) -> Reads:
    """Return the way of operators that read all their inputs alike."""

    def reads(graph: IntegerGraph, node: ir.Node) -> Sequence[Read]:
        del graph
        return [(value, access) for value in node.inputs if value is not None]

    return reads


_BROADCAST = every(Access.BROADCAST)


def first(access: Access) -> Reads:
    """Return the way of operators that read their first input only; what else they have is constant."""

    def reads(graph: IntegerGraph, node: ir.Node) -> Sequence[Read]:
        del graph
        value = node.inputs[0]
        return [] if value is None else [(value, access)]

    return reads


once = first(Access.ONCE)


def register(
    kind: Kind, *op_types: str, reads: Reads = _BROADCAST, domain: str = "", when: When | None = None
) -> Callable[[Emit], Emit]:
    """Register the function that writes operators of a domain, where `when` holds."""

    def store(emit: Emit) -> Emit:
        for op_type in op_types:
            _RULES.setdefault((domain, op_type), []).append((when, Rule(kind, reads, emit)))
        return emit

    return store


def rule_of(graph: IntegerGraph, node: ir.Node) -> Rule:
    """Return how a node is written.

    Raises:
        UserError: there is no way.
    """
    rules = _RULES.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type), [])
    for when, rule in rules:
        if when is None or when(graph, node):
            return rule
    reason = node.metadata_props.get("qgraph.boundary")
    raise refusal(node, f"it is a boundary in float ({reason})" if reason else "there is no integer code for it")
