"""Channels of convolutions cut.

    Conv(Relu(Conv(x, W1, b1)), W2)    =>    the same with fewer outputs of W1 and b1, and fewer inputs of W2

Whatever is coupled goes with them: depthwise kernels, both sides of residual sums, parts of concatenations, norms,
gates. The least important channels go (`qgraph.analysis.importance`), and the convolutions behind are fitted by least
squares to give, from the channels that stay, what they gave from all: no training.

It does not fire on channels that are inputs or outputs of the model, that a reshape mixes with others, or behind a node
without a known rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qgraph.analysis.prunable import Kind
from qgraph.passes._pruning import StructuredPruning

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class PruneChannels(StructuredPruning):
    """Cut the least important channels of convolutions."""

    name: ClassVar[str] = "prune-channels"
    kind: ClassVar[Kind] = "channel"
    units_are: ClassVar[str] = "channels"
