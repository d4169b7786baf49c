"""Which nodes ONNX Runtime's CoreML provider takes, by its table, and into how many parts that cuts a graph."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_support import refusal
from qgraph.analysis.partitions import Partitions, partitions
from qgraph.analysis.shapes import shapes_of
from qgraph.capabilities import table
from qgraph.coreml.plain import without_compression
from qgraph.pipeline import Context

__all__ = ["ProviderSplit", "provider_split"]

_NAMED = 3
_LONGEST_NAME = 60


@dataclasses.dataclass(frozen=True)
class ProviderSplit:
    """What the provider makes of a model.

    Attributes:
        found: the parts.
        reasons: node that it leaves to the CPU -> why.
        nodes: number of nodes of the graph.
    """

    found: Partitions
    reasons: Mapping[ir.Node, str]
    nodes: int

    @property
    def taken(self) -> int:
        """Number of nodes that the provider runs."""
        return sum(len(part) for part in self.found.parts)

    def told(self) -> str:
        """Return one line: how many parts there are, and what cuts them."""
        count = len(self.found.parts)
        note = f"CoreML provider: {count} partition{'s' * (count != 1)}, {self.taken} of {self.nodes} nodes"
        cuts = self.found.cuts
        if not cuts:
            return note
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(one.op_type for one in cuts).items())
        names = ", ".join(f"'{qgraph.ir.node_label(one)[:_LONGEST_NAME]}'" for one in cuts[:_NAMED])
        return f"{note}, cut by {kinds} ({names}{' and others' if len(cuts) > _NAMED else ''})"


def provider_split(model: ir.Model) -> ProviderSplit:
    """Return what the provider takes of a model, weights counting as constants, compressed or not.

    Args:
        model: is not changed; what is predicted is true of the graph as it stands.
    """
    plain = without_compression(model)
    capabilities, shapes = table("coreml-mlprogram"), shapes_of(plain, Context())
    reasons = {
        node: reason
        for node in plain.graph
        if (reason := refusal(node, capabilities, opsets=plain.opset_imports, shapes=shapes)) is not None
    }
    return ProviderSplit(partitions(plain.graph, reasons), reasons, len(plain.graph))
