"""Attention heads cut.

    O(concat of heads(Q(x), K(x), V(x)))    =>    the same with fewer heads: smaller Q, K, V and O

Heads are found from the graph, whether attention is one operator or written out: what products of two activations run
side by side over. Heads that share keys and values (grouped queries) are cut with their group. The least important ones
go (`qgraph.analysis.importance`), and O is fitted by least squares to give, from the heads that stay, what it gave from
all: no training. The result is an ordinary smaller model.

It does not fire where heads cannot be told apart: where their number does not follow from the graph, where they are
inputs or outputs of the model (caches), or where a node without a known rule lies between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qgraph.analysis.prunable import Kind
from qgraph.passes._pruning import StructuredPruning

__all__ = ["PruneHeads"]


@dataclass(frozen=True)
class PruneHeads(StructuredPruning):
    """Cut the least important attention heads."""

    name: ClassVar[str] = "prune-heads"
    kind: ClassVar[Kind] = "head"
    units_are: ClassVar[str] = "heads"
