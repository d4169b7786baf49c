"""float64 to float32.

    y = MatMul(x, W)    =>    y = Cast<to = double>(MatMul(Cast<to = float>(x), W32))      x, y and W of float64

No runtime has more than plain kernels for float64, and nothing compresses it. Inputs and outputs of the model keep
their types. What stays in float64, each with its reason: arithmetic that reads neither a float64 input nor a float64
matrix, which exporters widen on purpose (positions, sizes, angles); nodes with subgraphs, and what subgraphs read;
what makes and reads sequences; operators that have no float32, or say float64 themselves; constants beyond 3.4e38, but
for bounds and masks, which are cut off. Casts stand where float64 and float32 meet. A model without float64 is left
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes
from qgraph.passes._annotate import annotate
from qgraph.passes._half_rewriter import rewrite
from qgraph.passes._half_safety import keep_constants
from qgraph.passes._half_types import FLOAT32, Kept, half_places, is_wide, without_tensors
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["ToFp32"]

_BOUNDED = ("Add", "Clip", "ConstantOfShape", "Max", "Min", "Where")
"""Operators to which a number beyond float32 is a bound, or a mask."""


@dataclass(frozen=True)
class ToFp32(Pass):
    """Compute and store in float32 what is float64."""

    name: ClassVar[str] = "to-fp32"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Convert; `skipped` has the nodes that stay in float64."""
        del context
        graph = model.graph
        if not _mentions_doubles(model):
            return Report()
        annotate(model, Shapes(model).run())
        touching = [node for node in graph if any(is_wide(one, FLOAT32) for one in (*node.inputs, *node.outputs))]
        grown, kept = _grown(graph), Kept()
        for node in touching:
            reason = _unfit(node, graph, kept) or _on_purpose(node, grown)
            if reason is not None:
                kept.add(node, reason)
        nodes = [node for node in touching if node not in kept.reasons]
        changed = rewrite(model, kept, nodes, FLOAT32, keep_io=True)
        skipped = [Skipped(qgraph.ir.node_label(node), kept.reasons[node]) for node in touching if node in kept.reasons]
        notes = [f"{changed} nodes of float64 in float32"] if changed else []
        return Report(changed=changed, skipped=skipped, notes=notes)


def _mentions_doubles(model: ir.Model) -> bool:
    """Tell whether float64 comes from anywhere: an input, a constant, or a node that makes it."""
    graph = model.graph
    if any(value.dtype == FLOAT32.wide for value in (*graph.inputs, *graph.initializers.values())):
        return True
    return any(
        node.attributes.get_int("to", 0) == FLOAT32.wide or any(value.dtype == FLOAT32.wide for value in node.outputs)
        for node in graph
    )


def _grown(graph: ir.Graph) -> set[ir.Value]:
    """Return the float64 values that come of float64 inputs and matrices."""
    grown = {value for value in graph.inputs if is_wide(value, FLOAT32)}
    for value in graph.initializers.values():
        if is_wide(value, FLOAT32) and value.shape is not None and len(value.shape) > 1:
            grown.add(value)
    for node in graph:
        if any(value in grown for value in node.inputs):
            grown.update(value for value in node.outputs if is_wide(value, FLOAT32))
    return grown


def _on_purpose(node: ir.Node, grown: set[ir.Value]) -> str | None:
    if any(value in grown for value in (*node.inputs, *node.outputs)):
        return None
    return "neither a float64 input nor a float64 matrix leads to it: it is widened on purpose"


def _unfit(node: ir.Node, graph: ir.Graph, kept: Kept) -> str | None:
    if qgraph.ir.inner_graphs(node):
        return "it has subgraphs, which stay as they are"
    reason = without_tensors(node)
    if reason is not None:
        return reason
    if "dtype" in node.attributes:
        return f"{node.op_type} gives numbers of a type of its own"
    if not qgraph.ir.is_op(node, "Cast") and half_places(node, graph.opset_imports, FLOAT32) is None:
        return "it is not defined for float32"
    keep_constants(node, FLOAT32, kept)
    if node.op_type not in _BOUNDED and any(value in kept.masks for value in node.inputs):
        return "its constant is beyond float32, which ends at 3.4e38"
    return None
