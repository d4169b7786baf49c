"""Which nodes a runtime has a kernel for, by a table of its capabilities.

A node is supported where one of its operator's entries fits. What is not known of a node (a type, a rank) is taken to
fit, so that only what certainly has no kernel is refused; `static` alone asks that shapes are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_constraints import KnownShapes, NodeFacts, unmet
from qgraph.analysis.shapes import shapes_of
from qgraph.capabilities import DEFAULT_DOMAINS, Entry, Table, operator_name
from qgraph.pipeline import Context, Skipped

__all__ = ["refusal", "refusal_of", "unsupported"]

_DATA_ONLY = frozenset({"Constant"})
"""Operators that no runtime executes: their outputs are weights."""


def unsupported(model: ir.Model, table: Table, *, shapes: KnownShapes | None = None) -> list[Skipped]:
    """Return the nodes that have no kernel, each with a one-line reason that names operator, type or constraint.

    Args:
        model: is not changed; nodes of subgraphs and of model-local functions count, calls of such functions do not.
        table: of a runtime.
        shapes: of the values of `model`; analysed here if not given.
    """
    shapes = shapes_of(model, Context()) if shapes is None else shapes
    functions = {(domain, name) for domain, name, _ in model.functions}
    parts = [(qgraph.ir.walk(model), model.graph.opset_imports)]
    parts += [(function.graph.all_nodes(), function.opset_imports) for function in model.functions.values()]
    found = []
    for nodes, opsets in parts:
        for node in nodes:
            if (node.domain, node.op_type) in functions:
                continue
            reason = refusal(node, table, opsets=opsets, shapes=shapes)
            if reason is not None:
                found.append(Skipped(qgraph.ir.node_label(node), reason))
    return found


def refusal(
    node: ir.Node,
    table: Table,
    *,
    opsets: Mapping[str, int] | None = None,
    shapes: KnownShapes | None = None,
) -> str | None:
    """Return why a node has no kernel, in one line, or None where it has one.

    Args:
        node: in a graph, or not yet.
        table: of a runtime.
        opsets: domain -> version that the model imports; by default those of the graph that the node is in, which
            subgraphs have none of. A version that is not known fits.
        shapes: of the model's values; without, only what the values themselves say is known.
    """
    name = operator_name(node.domain, node.op_type)
    if name in _DATA_ONLY:
        return None
    entries = table.operators.get(name)
    if entries is None:
        return f"{table.title} has no {name}"
    version = _version(node, opsets)
    if node.domain in DEFAULT_DOMAINS and table.opset is not None and version is not None and version > table.opset:
        return f"{table.title} of {table.version} knows opsets up to {table.opset}, not {version}"
    facts = NodeFacts(node, version, shapes)
    faults = [_fault(entry, facts, table) for entry in entries]
    if None in faults:
        return None
    return f"{name}: {_told([fault for fault in faults if fault is not None], table)}"


def refusal_of(
    name: str,
    types: Sequence[ir.DataType | None],
    table: Table,
    attributes: Mapping[str, int | float | str] | None = None,
    version: int | None = None,
) -> str | None:
    """Return why an operator that is yet to be written has no kernel, in one line, or None where it has one.

    Args:
        name: of the operator, as tables call it.
        types: of its inputs; None for one that is left out, or of which nothing is known.
        table: of a runtime.
        attributes: of the node.
        version: of the operator's domain that the model imports; any, if not given.
    """
    domain, _, op_type = name.rpartition(".")
    inputs = [None if one is None else ir.Value(type=ir.TensorType(one)) for one in types]
    opsets = {} if version is None else {domain: version}
    return refusal(ir.node(op_type, inputs, attributes or {}, domain=domain), table, opsets=opsets)


def _version(node: ir.Node, opsets: Mapping[str, int] | None) -> int | None:
    if opsets is None:
        opsets = {} if node.graph is None else node.graph.opset_imports
    domains = DEFAULT_DOMAINS if node.domain in DEFAULT_DOMAINS else (node.domain,)
    return next((opsets[domain] for domain in domains if domain in opsets), node.version)


@dataclasses.dataclass(frozen=True)
class _Fault:
    """Why an entry does not fit.

    Attributes:
        rank: how far it got: version, types, constraints.
        where: what is wrong, such as "input 0 is int8".
        takes: what the entry would take there, or ''.
        note: of the entry.
    """

    rank: int
    where: str
    takes: str
    note: str


def _fault(entry: Entry, facts: NodeFacts, table: Table) -> _Fault | None:
    version = facts.version
    if version is not None and not entry.since <= version <= (version if entry.until is None else entry.until):
        span = f"from {entry.since}" if entry.until is None else f"{entry.since} to {entry.until}"
        return _Fault(0, f"opset {version}", span, entry.note)
    fault = _wrong_type("input", entry, facts, table) or _wrong_type("output", entry, facts, table)
    if fault is not None:
        return fault
    for one in entry.constraints:
        told = unmet(one, facts)
        if told is not None:
            return _Fault(2, told, one.choices(), entry.note)
    return None


def _wrong_type(word: str, entry: Entry, facts: NodeFacts, table: Table) -> _Fault | None:
    values: Sequence[ir.Value | None] = facts.node.inputs if word == "input" else facts.node.outputs
    types = entry.inputs if word == "input" else entry.outputs
    for index, value in enumerate(values):
        allowed = types.of(index)
        dtype = None if value is None or allowed is None else facts.dtype(value)
        if allowed is None or dtype is None or dtype in allowed or table.conversions.get(dtype) in allowed:
            continue
        return _Fault(1, f"{word} {index} is {dtype}", ", ".join(allowed), entry.note)
    return None


def _told(faults: list[_Fault], table: Table) -> str:
    """Tell the fault of the entries that came nearest; what others of the same fault would take is joined."""
    rank = max(fault.rank for fault in faults)
    where = next(fault.where for fault in faults if fault.rank == rank)
    near = [fault for fault in faults if fault.rank == rank and fault.where == where]
    takes = list(dict.fromkeys(word for fault in near for word in fault.takes.split(", ") if word))
    notes = list(dict.fromkeys(fault.note for fault in near if fault.note))
    told = f"{where}, and {table.title} takes {', '.join(takes)}" if takes else f"{where} for {table.title}"
    return told + (f" ({'; '.join(notes)})" if notes else "")
