"""The parts of a graph that a provider of ONNX Runtime takes, and what cuts it.

A provider says of each node whether it takes it; ONNX Runtime joins those into as few parts as it can. It goes over the
nodes in the order of what they depend on, and puts off a node that the provider does not take and that reads from the
part at hand; when only such nodes are left, the part ends and the next one begins with them. So nodes in a part need
not touch one another, and a node on the CPU cuts the graph only where something of the provider's lies before and
behind it. (onnxruntime/core/providers/partitioning_utils.cc, CreateSupportedPartitionNodeGroups.)

ONNX Runtime optimises the graph before; what is predicted here is true of the graph as it stands.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Collection, Sequence

import onnx_ir as ir

import qgraph.ir

__all__ = ["Partitions", "partitions"]


@dataclasses.dataclass(frozen=True)
class Partitions:
    """How a graph is cut.

    Attributes:
        parts: nodes that the provider runs together, part by part.
        left: nodes that run on the CPU, in the graph's order.
        cuts: those of `left` that end a part, in the order in which they do.
    """

    parts: Sequence[Sequence[ir.Node]]
    left: Sequence[ir.Node]
    cuts: Sequence[ir.Node]


def partitions(graph: ir.Graph, refused: Collection[ir.Node]) -> Partitions:
    """Cut the main graph of a model.

    Args:
        graph: nodes of subgraphs run where the node that holds them does.
        refused: the nodes that the provider does not take.
    """
    parts: list[list[ir.Node]] = []
    cuts: list[ir.Node] = []
    readers = _readers(graph)
    waiting = Counter(reader for read in readers.values() for reader in read)
    ready = deque(node for node in graph if not waiting[node])
    later: deque[ir.Node] = deque()
    part: list[ir.Node] = []
    border: set[ir.Node] = set()
    while ready or later:
        if not ready:
            if part:
                parts.append(part)
                cuts += later
            part, border = [], set()
            ready, later = later, ready
            continue
        node = ready.popleft()
        taken = node not in refused
        if not taken and node in border:
            later.append(node)
            continue
        if taken:
            part.append(node)
            border.update(readers[node])
        for reader in readers[node]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    if part:
        parts.append(part)
    return Partitions(parts, [node for node in graph if node in refused], cuts)


def _readers(graph: ir.Graph) -> dict[ir.Node, list[ir.Node]]:
    """Return for every node those that read from it, themselves or in a subgraph; once each."""
    found: dict[ir.Node, list[ir.Node]] = {node: [] for node in graph}
    for node in graph:
        parts = [node, *(inner for held in qgraph.ir.inner_graphs(node) for inner in held.all_nodes())]
        values = [value for part in parts for value in part.inputs if value is not None]
        for producer in dict.fromkeys(value.producer() for value in values):
            if producer is not None and producer.graph is graph:
                found[producer].append(node)
    return found
