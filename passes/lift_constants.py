"""Constants in one place and out of the caller's reach.

    c = Constant<value = ...>()                        =>    initializer c
    If <then_branch = {initializer w, ...}>            =>    initializer w of the main graph
    graph (x, w) with initializer w                    =>    graph (x) with initializer w

An initializer that is also a graph input is a default that a caller may override; files of IR version 3 had to list
all of them, and nobody does override a weight. Taking them out of the inputs is what lets every other pass see them
as constants. Constants of model-local functions stay (functions have no initializers), as do those that are outputs
of a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pass, Report

__all__ = ["LiftConstants"]

_FIRST_WITHOUT_INPUTS = 4
"""The IR version from which an initializer need not be a graph input."""


@dataclass(frozen=True)
class LiftConstants(Pass):
    """Turn Constant nodes and the constants of subgraphs into initializers, and take initializers out of the inputs."""

    name: ClassVar[str] = "lift-constants"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Lift; `changed` counts nodes and initializers."""
        del context
        inputs = _hide_initializers(model)
        moved = sum([_move_initializers(graph, model.graph) for graph in list(model.graph.subgraphs())])
        lifted = sum([_lift(node, model.graph) for node in qgraph.ir.walk(model)])
        notes = [f"{lifted} Constant nodes became initializers"] if lifted else []
        notes += [f"{inputs} initializers are no longer inputs"] if inputs else []
        return Report(changed=inputs + moved + lifted, notes=notes)


def _hide_initializers(model: ir.Model) -> int:
    graph = model.graph
    visible = [value for value in graph.inputs if value.name not in graph.initializers]
    hidden = len(graph.inputs) - len(visible)
    if hidden:
        graph.inputs.clear()
        graph.inputs.extend(visible)
        model.ir_version = max(model.ir_version, _FIRST_WITHOUT_INPUTS)
    return hidden


def _move_initializers(graph: ir.Graph, main: ir.Graph) -> int:
    movable = [v for v in graph.initializers.values() if not v.is_graph_input() and not v.is_graph_output()]
    for value in movable:
        name = value.name or ""
        graph.initializers.pop(name)
        value.name = qgraph.ir.fresh_name(main, f"{name}_lifted")
        main.register_initializer(value)
    return len(movable)


def _lift(node: ir.Node, main: ir.Graph) -> bool:
    if not qgraph.ir.is_op(node, "Constant") or node.outputs[0].is_graph_output():
        return False
    output = node.outputs[0]
    tensor = ir.convenience.get_const_tensor(output)
    if tensor is None:
        return False
    name = output.name or "constant"
    if node.graph is main:
        output.name = None
        lifted = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        main.register_initializer(lifted)
    else:
        lifted = qgraph.ir.initializer(main, name, tensor)
    output.replace_all_uses_with(lifted)
    qgraph.ir.discard(node)
    return True
