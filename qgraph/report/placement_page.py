"""The part of an artifact's page that says what runs where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qgraph.report.markup import Markup, clip, element
from qgraph.report.parts import name_cell, number, row, section, table

__all__ = ["PLACED", "placement_section"]

PLACED = {
    "integer": "in integers",
    "low-bit": "in float, with weights of few bits",
    "float": "in float",
    "none": "nothing: moves or converts",
}
"""Arithmetic -> what a reader is told of it."""
_KERNELS = 20


def placement_section(placement: Mapping[str, Any] | None) -> Markup | None:
    """Return providers, copies, and kernels by what they compute in; nothing where there is no placement.

    Args:
        placement: as `Placement.summary` gives it.
    """
    if not placement:
        return None
    count = placement["nodes"]
    providers = ", ".join(f"{nodes:,} of {count:,} nodes on {name}" for name, nodes in placement["providers"].items())
    facts = [
        element("dt", "Runtime"),
        element("dd", placement["runtime"]),
        element("dt", "Providers"),
        element("dd", providers),
        element("dt", "Copies between providers"),
        element("dd", f"{placement['copies']:,}"),
    ]
    undone = list(placement.get("undone", ()))
    if undone:
        facts += [element("dt", "Stored in integers, run in float"), element("dd", ", ".join(map(clip, undone)))]
    counted = [
        (nodes, PLACED[kind], kernel)
        for kind in PLACED
        for kernel, nodes in sorted(placement["kernels"].get(kind, {}).items(), key=lambda item: (-item[1], item[0]))
    ]
    rows = [
        row(name_cell(clip(kernel)), element("td", told), number(f"{nodes:,}", "nodes"))
        for nodes, told, kernel in counted
    ]
    rest = len(rows) - _KERNELS
    note = (
        f"And {rest} kernels more; qgraph inspect --placement lists every node."
        if rest > 0
        else ("qgraph inspect --placement lists every node.")
    )
    return section(
        "What runs where",
        element("dl", *facts, class_="facts"),
        table(("kernel", "computes", ">nodes"), rows[:_KERNELS]),
        element("p", note, class_="note"),
    )
