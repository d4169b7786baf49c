"""Lowering rules: branches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from qgraph.coreml.data_types import MilType
from qgraph.coreml.site import Rule, Site

__all__ = ["RULES"]


def _if(site: Site) -> Any:
    """Both branches become blocks; a condition that is known has been taken out by `fold-constants`."""
    graphs = [site.node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    condition = site[0]
    if site.type() is not MilType.BOOL:
        condition = site.emit("not_equal", x=condition, y=site.number(0))
    if site.shape(0):
        condition = site.reshape(condition, ())
    taken, other = (_branch(site, graph) for graph in graphs)
    return site.emit("cond", pred=condition, _true_fn=taken, _false_fn=other)


def _branch(site: Site, graph: ir.Graph) -> Any:
    def build() -> Any:
        found = site.graph.branch(graph)
        return found[0] if len(found) == 1 else tuple(found)

    return build


RULES: Mapping[str, Rule] = {"If": _if}
