"""Segments of a chain divided further, so that going over many layers does not run the same nodes again and again.

    [conv conv conv conv conv conv conv conv]    =>    [conv conv conv] [conv conv conv] [conv conv]

Taking the inputs of n layers of one segment, each after the layers before it were changed, runs n / 2 times the
segment; with cuts behind every few layers it runs a few times. What crosses a cut is kept, so cuts are where little
crosses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.blocks import Segment

__all__ = ["divided"]

_MOST_LAYERS = 4
"""Of a piece, unless no cut is to be had."""
_UNKNOWN = 1 << 20
"""Elements that a value of unknown shape counts."""


def divided(segment: Segment, layers: Collection[ir.Node]) -> Sequence[Segment]:
    """Divide a segment so that each piece has a few of the nodes in `layers`.

    A repeated block, and one whose nodes have subgraphs, stays whole.
    """
    if segment.repeat is not None or any(list(qgraph.ir.inner_graphs(node)) for node in segment.nodes):
        return [segment]
    cuts = _cuts(segment, layers)
    if not cuts:
        return [segment]
    outside = set(segment.reads)
    edges = [0, *cuts, len(segment.nodes)]
    made: dict[ir.Value, int] = {}
    for piece, (start, end) in enumerate(itertools.pairwise(edges)):
        made |= {value: piece for node in segment.nodes[start:end] for value in node.outputs}
    reads: list[dict[ir.Value, None]] = [{} for _ in edges[1:]]
    gives: list[dict[ir.Value, None]] = [{} for _ in edges[1:]]
    for piece, (start, end) in enumerate(itertools.pairwise(edges)):
        for value in (one for node in segment.nodes[start:end] for one in node.inputs if one is not None):
            if value in outside or made.get(value, piece) != piece:
                reads[piece][value] = None
                if value in made:
                    gives[made[value]][value] = None
    for value in segment.gives:
        gives[made[value]][value] = None
    return [
        Segment(segment.nodes[start:end], list(reads[piece]), list(gives[piece]), None, 0)
        for piece, (start, end) in enumerate(itertools.pairwise(edges))
    ]


def _cuts(segment: Segment, layers: Collection[ir.Node]) -> list[int]:
    """Return the places to cut at: between every few layers the one where the fewest numbers cross."""
    crossing = _crossing(segment)
    places = [index for index, node in enumerate(segment.nodes) if node in layers]
    cuts: list[int] = []
    first = 0
    while len(places) - first > _MOST_LAYERS:
        window = places[first + 1 : first + _MOST_LAYERS + 1]
        # As late as possible among equals.
        cut = min(reversed(range(window[0], window[-1] + 1)), key=lambda place: crossing[place - 1])
        cuts.append(cut)
        first = next(number for number, place in enumerate(places) if place >= cut)
    return cuts


def _crossing(segment: Segment) -> list[int]:
    """Return for each node how many numbers cross a cut behind it."""
    last: dict[ir.Value, int] = {}
    for index, node in enumerate(segment.nodes):
        last |= {value: index for value in node.inputs if value is not None}
    given = set(segment.gives)
    steps = [0] * (len(segment.nodes) + 1)
    for index, node in enumerate(segment.nodes):
        for value in node.outputs:
            end = len(segment.nodes) if value in given else last.get(value, index)
            steps[index] += _size(value)
            steps[end] -= _size(value)
    total, found = 0, []
    for step in steps[:-1]:
        total += step
        found.append(total)
    return found


def _size(value: ir.Value) -> int:
    if value.shape is None:
        return _UNKNOWN
    return math.prod(one if isinstance(one, int) else 1 for one in value.shape)
