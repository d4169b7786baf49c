"""What ONNX Runtime's CoreML provider will make of a graph: nothing is changed.

    a [Conv] -> b [Erf] -> c [Expand] -> d [Add]    =>    2 partitions, 3 of 4 nodes; cut by 'c'

Weights count as constants, compressed or not. The report's notes say into how many parts the provider cuts the graph,
and `skipped` names the nodes that it leaves to the CPU, each with its reason. Which nodes it takes, written as an ML
Program, is data: `qgraph/capabilities/coreml-mlprogram.toml`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_support import refusal
from qgraph.analysis.partitions import partitions
from qgraph.analysis.shapes import shapes_of
from qgraph.capabilities import table
from qgraph.coreml.plain import without_compression
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["CoremlPartitions"]

_NAMED = 3
_LONGEST_NAME = 60


@dataclass(frozen=True)
class CoremlPartitions(Pass):
    """Tell into how many parts ONNX Runtime's CoreML provider cuts the graph, and at which nodes."""

    name: ClassVar[str] = "coreml-partitions"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Change nothing; `skipped` has the nodes that run on the CPU."""
        del context
        plain = without_compression(model)
        capabilities, shapes = table("coreml-mlprogram"), shapes_of(plain, Context())
        reasons = {
            node: reason
            for node in plain.graph
            if (reason := refusal(node, capabilities, opsets=plain.opset_imports, shapes=shapes)) is not None
        }
        found = partitions(plain.graph, reasons)
        nodes = sum(len(part) for part in found.parts)
        note = f"CoreML provider: {_counted(len(found.parts), 'partition')}, {nodes} of {len(plain.graph)} nodes"
        if found.cuts:
            kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(one.op_type for one in found.cuts).items())
            names = ", ".join(f"'{qgraph.ir.node_label(one)[:_LONGEST_NAME]}'" for one in found.cuts[:_NAMED])
            more = " and others" if len(found.cuts) > _NAMED else ""
            note += f", cut by {kinds} ({names}{more})"
        return Report(
            notes=[note],
            skipped=[Skipped(qgraph.ir.node_label(node), reasons[node]) for node in found.left],
            figures={"partitions": len(found.parts), "taken": nodes, "nodes": len(plain.graph)},
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
