"""What ONNX Runtime's CoreML provider will make of a graph: nothing is changed.

    a [Conv] -> b [Erf] -> c [Expand] -> d [Add]    =>    2 partitions, 3 of 4 nodes; cut by 'c'

Weights count as constants, compressed or not. The report's notes say into how many parts the provider cuts the graph,
and `skipped` names the nodes that it leaves to the CPU, each with its reason. Which nodes it takes, written as an ML
Program, is data: `qgraph/capabilities/coreml-mlprogram.toml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.coreml.provider import provider_split
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["CoremlPartitions"]


@dataclass(frozen=True)
class CoremlPartitions(Pass):
    """Tell into how many parts ONNX Runtime's CoreML provider cuts the graph, and at which nodes."""

    name: ClassVar[str] = "coreml-partitions"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Change nothing; `skipped` has the nodes that run on the CPU."""
        del context
        split = provider_split(model)
        return Report(
            notes=[split.told()],
            skipped=[Skipped(qgraph.ir.node_label(node), split.reasons[node]) for node in split.found.left],
            figures={"partitions": len(split.found.parts), "taken": split.taken, "nodes": split.nodes},
        )
