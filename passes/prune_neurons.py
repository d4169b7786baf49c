"""Neurons of feed-forward layers cut.

    MatMul(act(MatMul(x, W1) + b1), W2)    =>    the same with fewer columns of W1 and b1, and fewer rows of W2

Gated layers lose a column of both factors. The least important neurons go (`qgraph.analysis.importance`), and W2 is
fitted by least squares to give, from the neurons that stay, what it gave from all: no training.

It does not fire where the width is fixed: by a norm, by an input or output of the model, or by a node without a known
rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qgraph.analysis.prunable import Kind
from qgraph.passes._pruning import StructuredPruning

__all__ = ["PruneNeurons"]


@dataclass(frozen=True)
class PruneNeurons(StructuredPruning):
    """Cut the least important neurons between two linear layers."""

    name: ClassVar[str] = "prune-neurons"
    kind: ClassVar[Kind] = "neuron"
    units_are: ClassVar[str] = "neurons"
