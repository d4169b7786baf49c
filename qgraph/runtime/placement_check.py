"""The placement that was expected, held against what a run's profile tells."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import qgraph.ir
from qgraph import capabilities
from qgraph.analysis.expected_placement import Expected, combined, expected_placement
from qgraph.analysis.kernel_arithmetic import COMPUTE, arithmetic, family
from qgraph.analysis.shapes import shapes_of
from qgraph.pipeline import Context, Feeds
from qgraph.runtime.placement import PlacedNode, Placement
from qgraph.runtime.placement_reading import CPU_TABLE, Executed, executed_nodes, named, read_placement
from qgraph.runtime.session import CPU_PROVIDER

__all__ = ["PlacementCheck", "check_placement"]


@dataclasses.dataclass(frozen=True)
class PlacementCheck:
    """What came of it.

    Attributes:
        executed: number of nodes of which the profile told.
        told: of them, those that stand for nodes of the model, for each of which provider and arithmetic were
            expected.
        kernels: of those, layers and integer kernels, of which the kernel too was expected.
        inserted: kernel -> number of nodes that the runtime put in, or of which no name tells what they stand for;
            of these the provider alone was expected.
        not_run: nodes of the placement to which the run did not come: branches that were not taken.
        differences: one line for each node that was otherwise than expected.
    """

    executed: int
    told: int
    kernels: int
    inserted: Mapping[str, int]
    not_run: int
    differences: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)


def check_placement(model: Path, feeds: Feeds) -> PlacementCheck:
    """Say before the run what each node of a model will do in ONNX Runtime on the CPU, run it, and compare.

    What is expected comes from the model and the table alone; the profile gives for each node that ran its operator,
    its provider and the types of its tensors. Which nodes of the model a node stands for is told from names in the
    graph that the runtime has optimised.

    Raises:
        UserError: ONNX Runtime is not installed, or refuses model or feeds.
    """
    table = capabilities.table(CPU_TABLE)
    with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
        model = named(model, Path(scratch))
        source = qgraph.ir.load(model)
        expected = expected_placement(source, table, shapes_of(source, Context()))
        labels = {qgraph.ir.node_label(node): one for node, one in expected.items()}
        placement = read_placement(model)
        events = executed_nodes(model, feeds)
    return _compared(placement, _matched(placement, events), labels)


def _matched(placement: Placement, events: Iterable[Executed]) -> list[tuple[PlacedNode | None, Executed]]:
    """Find for each node that ran its place: by name, those without one by their operator, in order."""
    named_nodes = {(node.name, _operator(node)): node for node in placement.nodes if node.name}
    unnamed: dict[str, list[PlacedNode]] = defaultdict(list)
    for one in placement.nodes:
        if not one.name:
            unnamed[_operator(one)].append(one)
    found: list[tuple[PlacedNode | None, Executed]] = []
    for event in events:
        node: PlacedNode | None = named_nodes.get((event.name, event.op_type))
        if node is None and unnamed[event.op_type]:
            node = unnamed[event.op_type].pop(0)
        found.append((node, event))
    return found


def _operator(node: PlacedNode) -> str:
    return node.kernel.rpartition(".")[2]


def _compared(
    placement: Placement,
    matched: Sequence[tuple[PlacedNode | None, Executed]],
    labels: Mapping[str, Expected],
) -> PlacementCheck:
    told = kernels = 0
    inserted: dict[str, int] = defaultdict(int)
    differences = []
    for node, event in matched:
        label = event.name or event.op_type
        if event.provider != CPU_PROVIDER:
            differences.append(f"{label} ({event.op_type}): {event.provider} ran it, {CPU_PROVIDER} was expected")
        if node is None:
            differences.append(f"{label} ({event.op_type}): ran, but is not in the placement")
        elif not node.sources:
            inserted[node.kernel] += 1
        else:
            told += 1
            want = combined(labels[one] for one in node.sources)
            ran = _ran(node, event)
            claimed = want.kernel if node.kernel in COMPUTE or want.arithmetic in ("integer", "low-bit") else ""
            kernels += bool(claimed)
            if ran != want.arithmetic:
                differences.append(f"{label} ({node.kernel}): computed {_in(ran)}, {_in(want.arithmetic)} was expected")
            elif claimed and family(node.kernel) != claimed:
                differences.append(f"{label}: {node.kernel} ran, {claimed} was expected")
    ran_nodes = {id(node) for node, _ in matched}
    not_run = sum(id(node) not in ran_nodes for node in placement.nodes)
    return PlacementCheck(len(matched), told, kernels, dict(sorted(inserted.items())), not_run, tuple(differences))


def _ran(node: PlacedNode, event: Executed) -> str:
    """Return what a node computed in, by its operator and the types in the profile; a profile does not tell how a
    product of few bits multiplies, which the table's probes have measured."""
    few = node.arithmetic == "integer" if node.kernel.endswith("NBits") else None
    return arithmetic(node.kernel, event.types, few)


def _in(kind: str) -> str:
    told = {"integer": "in integers", "low-bit": "in float with weights of few bits", "float": "in float"}
    return told.get(kind, "nothing")
