"""What nobody reads goes.

    y = Add(a, b)                  =>    nothing, if nobody reads y
    y, mask = Dropout(x)           =>    y = Dropout(x), if nobody reads mask
    initializer w                  =>    nothing, if nobody reads w
    a function, an opset import    =>    nothing, if no node is of it

Inputs and outputs of the graph stay as they are. Every operator counts as free of side effects; ONNX knows no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pass, Report

__all__ = ["RemoveUnused"]

_NEEDED_OUTPUTS: Mapping[str, int] = {
    "BatchNormalization": 1,
    "Dropout": 1,
    "GRU": 1,
    "LSTM": 1,
    "LayerNormalization": 1,
    "MaxPool": 1,
    "RNN": 1,
}
"""How many outputs an operator has at least; those after may be left out."""


@dataclass(frozen=True)
class RemoveUnused(Pass):
    """Remove nodes, optional outputs, initializers, functions and opset imports that nothing uses."""

    name: ClassVar[str] = "remove-unused"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Remove; `changed` counts nodes, outputs, initializers, functions and imports."""
        del context
        nodes = _sweep(model.graph)
        functions = _remove_functions(model)
        nodes += sum([_sweep(function.graph) for function in model.functions.values()])
        initializers = sum([_remove_initializers(graph) for graph in qgraph.ir.all_graphs(model)])
        imports = _remove_imports(model)
        counts = {"nodes": nodes, "initializers": initializers, "functions": functions}
        notes = [f"{count} unused {what} removed" for what, count in counts.items() if count]
        return Report(changed=sum(counts.values()) + imports, notes=notes)


def _sweep(graph: ir.Graph) -> int:
    """Remove unused nodes and outputs, the last node first, so that what only they read goes too."""
    count = 0
    for node in reversed(graph):
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            count += _trim(node) + sum([_sweep(inner) for inner in qgraph.ir.inner_graphs(node)])
        else:
            qgraph.ir.discard(node)
            count += 1
    return count


def _trim(node: ir.Node) -> int:
    """Remove optional outputs at the end that nobody reads."""
    needed = _NEEDED_OUTPUTS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if needed is None or node.attributes.get_int("training_mode", 0) != 0:
        return 0
    count = len(node.outputs)
    while count > needed and not node.outputs[count - 1].uses() and not node.outputs[count - 1].is_graph_output():
        count -= 1
    removed = len(node.outputs) - count
    if removed:
        node.resize_outputs(count)
    return removed


def _remove_initializers(graph: ir.Graph) -> int:
    unused = [
        name
        for name, value in graph.initializers.items()
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input()
    ]
    for name in unused:
        graph.initializers.pop(name)
    return len(unused)


def _remove_functions(model: ir.Model) -> int:
    used: set[ir.OperatorIdentifier] = set()
    waiting: list[Iterable[ir.Node]] = [qgraph.ir.walk(model)]
    while waiting:
        for node in waiting.pop():
            identifier = node.op_identifier()
            if identifier in model.functions and identifier not in used:
                used.add(identifier)
                waiting.append(model.functions[identifier].all_nodes())
    unused = [identifier for identifier in model.functions if identifier not in used]
    for identifier in unused:
        del model.functions[identifier]
    return len(unused)


def _remove_imports(model: ir.Model) -> int:
    used = {"", "ai.onnx", *(node.domain for node in qgraph.ir.walk(model))}
    for function in model.functions.values():
        used |= {function.domain, *(node.domain for node in function.all_nodes())}
    unused = [domain for domain in model.graph.opset_imports if domain not in used]
    for domain in unused:
        del model.graph.opset_imports[domain]
    return len(unused)
