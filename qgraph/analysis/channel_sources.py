"""Which constants make the channels of an activation, and which channels have to change alike.

Followed upwards from a value, channel by channel, through everything that passes a positive factor on:

    Identity, Cast, Dropout, Neg, Relu, LeakyRelu, Reshape, Transpose, Squeeze, Unsqueeze, Expand, Split, Concat
    Add, Sub            both sides; a constant side is a source
    Mul, Div            one side: a constant vector, else the side that leads to sources (up in act(gate) * up)
    Where               the side that is not zero
    MatMul(p, v)        v: probabilities times values; Attention, MultiHeadAttention, GroupQueryAttention likewise
    MatMul(z, W), Gemm  ends: the columns of W (and the bias) are sources
    the norms           end: weight and bias are sources
    what images go through: see `qgraph.analysis.spatial_rules`

Nothing else may read what lies on the way: it would see the factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.analysis.channel_rules import RULES
from qgraph.analysis.channel_tracer import NoSourceError, Source, Tracer, classes
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.shapes import Shapes
from qgraph.analysis.spatial_rules import SPATIAL_RULES

__all__ = ["NoSourceError", "Origin", "Source", "find_origin"]


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where the channels of an activation come from.

    Attributes:
        sources: the constants that take the factors, all of them.
        tied: int, (channels,): the first channel of those that have to take the same factor.
        heads: int, (heads, size): channels that are mixed over rows with the same weights, in an order that all heads
            share; None if the way up is not linear, or passes no attention or more than one.
    """

    sources: Sequence[Source]
    tied: np.ndarray
    heads: np.ndarray | None


def find_origin(
    x: ir.Value, readers: Sequence[ir.Node], channels: int, shapes: Shapes, layers: Sequence[LinearLayer]
) -> Origin:
    """Return the constants that make x.

    Args:
        x: an activation [..., channels].
        readers: those who get the inverse factors.
        channels: length of the last axis of x.
        shapes: of the model.
        layers: its linear layers.

    Raises:
        NoSourceError: there are none, or somebody else reads x or what lies between.
    """
    tracer = Tracer(shapes, {layer.node: layer for layer in layers}, {**RULES, **SPATIAL_RULES})
    found = tracer.up(x, np.arange(channels), readers)
    tied = classes(channels, found.ties)
    if channels > 1 and (tied == 0).all():
        raise NoSourceError("all its channels would have to take the same factor")
    heads = _all_heads(found.heads[0], tied) if len(found.heads) == 1 and found.linear else None
    return Origin(found.sources, tied, heads)


def _all_heads(heads: np.ndarray, tied: np.ndarray) -> np.ndarray | None:
    """Return the channels of every head from those of one in each group of heads that share their values."""
    if heads.size == tied.size:
        return heads
    members = np.argsort(tied, kind="stable")
    counts = np.bincount(tied, minlength=tied.size)
    starts = np.cumsum(counts) - counts
    count = counts[tied[heads[0, 0]]]
    if count * heads.size != tied.size or (counts[tied[heads]] != count).any():
        return None
    # In each class, the channels come in the order of the heads.
    each = members[starts[tied[heads]][..., None] + np.arange(count)]
    return np.ascontiguousarray(each.transpose(0, 2, 1).reshape(-1, heads.shape[1]))
