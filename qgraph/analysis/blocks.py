"""A graph cut into a chain of segments: its repeated blocks, found from the graph alone, or slices of bounded size.

    ids -> [embedding, mask, rotary tables] -> [block] -> [block] -> ... -> [norm, output layer] -> logits
                                            x          x          x

The nodes, in their order, are a word over the alphabet of operators (with attributes and shapes of constants). The
shortest period that covers most of that word is the block; the phase is the one where the fewest values cross the cuts.
What crosses (the residual stream, and what is computed once and read in every block, such as masks and rotary tables)
is all that has to be kept to run the next segment. Without a repetition, the order is cut where few values cross, so
that the weights between two cuts stay within a bound.

What is computed from constants alone crosses no cut: it is computed again wherever it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context

__all__ = ["Segment", "Segments", "segments"]

_LEAST_COVERAGE = 0.5
"""A repetition counts if it covers this share of the nodes that read large constants."""
_LARGE = 256
"""Elements of a constant from which it is a weight."""
_INTEGER_COST = 0.05
"""What an integer that crosses a cut counts, against a float: shapes and positions are small."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive nodes of the main graph.

    Attributes:
        nodes: in topological order.
        reads: values from before, or inputs of the graph, that they read.
        gives: values that they make and later segments read.
        repeat: the number of this block, from 0; None for what lies around the blocks.
        weight_bytes: of all constants that they read.
    """

    nodes: Sequence[ir.Node]
    reads: Sequence[ir.Value]
    gives: Sequence[ir.Value]
    repeat: int | None
    weight_bytes: int


@dataclass(frozen=True, eq=False)
class Segments:
    """A graph as a chain.

    Attributes:
        chain: every node that depends on an input of the graph, in order.
        repeats: how many of them are repetitions of one block; 0 if the graph repeats nothing.
    """

    chain: Sequence[Segment]
    repeats: int


def segments(model: ir.Model, context: Context | None = None) -> Segments:
    """Cut the main graph.

    Args:
        model: is not changed.
        context: `calibration_memory` bounds the weights of a segment that is no block; a block, and a node with a
            larger weight, is never divided.
    """
    bound = (context or Context()).calibration_memory
    word = _Word(model)
    starts, repeats = _repetition(word)
    edges = [0, *starts, len(word.nodes)]
    chain: list[Segment] = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        repeat = number - 1 if 0 < number <= repeats else None
        if start == end:
            continue
        pieces = [(start, end)] if repeat is not None else word.slices(start, end, bound)
        chain += [word.segment(one, other, repeat) for one, other in pieces]
    return Segments(chain, repeats)


class _Word:
    """The nodes that depend on inputs, what each is, and which values cross between them.

    Attributes:
        nodes: in topological order.
        letters: a number for each node; equal nodes have equal ones.
        crossing: for each node, the cost of a cut behind it.
        weights: for each node, the bytes of the constants that it reads.
        large: for each node, whether it reads a weight.
    """

    def __init__(self, model: ir.Model) -> None:
        self.nodes: list[ir.Node] = []
        self._reads: list[list[ir.Value]] = []
        constant = set(model.graph.initializers.values())  # those that are inputs too keep their values here
        letters: dict[tuple[object, ...], int] = {}
        self.letters: list[int] = []
        self.weights: list[int] = []
        self.large: list[bool] = []
        for node in model.graph:
            reads = list(dict.fromkeys(_reads(node, model.graph)))
            moving = [value for value in reads if value not in constant]
            if not moving and not _is_random(node):
                constant.update(node.outputs)
                continue
            fixed = [value for value in reads if value in constant]
            sizes = [_constant_bytes(value) for value in fixed]
            self.nodes.append(node)
            self._reads.append(moving)
            self.letters.append(letters.setdefault(_letter(node, constant), len(letters)))
            self.weights.append(sum(sizes))
            self.large.append(any(size >= _LARGE for size in sizes))
        self._last = self._last_reads()
        self.crossing = self._crossing(model.graph.inputs)

    def _last_reads(self) -> Mapping[ir.Value, int]:
        return {value: index for index, reads in enumerate(self._reads) for value in reads}

    def _crossing(self, inputs: Sequence[ir.Value]) -> np.ndarray:
        steps = np.zeros(len(self.nodes) + 1)
        made = [(-1, value) for value in inputs]
        made += [(index, value) for index, node in enumerate(self.nodes) for value in node.outputs]
        for index, value in made:
            last = self._last.get(value, -1)
            if last > index:
                cost = _INTEGER_COST if value.dtype is not None and not value.dtype.is_floating_point() else 1.0
                steps[max(index, 0)] += cost
                steps[last] -= cost
        return np.cumsum(steps)[:-1]

    def segment(self, start: int, end: int, repeat: int | None) -> Segment:
        """Return the nodes from `start` to before `end`, with what they read and give."""
        nodes = self.nodes[start:end]
        made = {value for node in nodes for value in node.outputs}
        reads = dict.fromkeys(value for one in self._reads[start:end] for value in one if value not in made)
        gives = [value for node in nodes for value in node.outputs if self._last.get(value, -1) >= end]
        return Segment(nodes, list(reads), gives, repeat, sum(self.weights[start:end]))

    def slices(self, start: int, end: int, bound: int) -> Iterator[tuple[int, int]]:
        """Yield pieces of a stretch whose weights keep to `bound`, cut where the fewest values cross."""
        while start < end:
            total, stop = 0, start
            while stop < end and (stop == start or total + self.weights[stop] <= bound):
                total += self.weights[stop]
                stop += 1
            if stop < end:
                # In the later half of what fits, so that the pieces do not become many; as late as possible.
                least = start + max(1, (stop - start) // 2)
                stop = min(range(stop, least - 1, -1), key=lambda cut: self.crossing[cut - 1])
            yield start, stop
            start = stop


def _reads(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the values of the main graph that a node or its subgraphs read."""
    yield from (value for value in node.inputs if value is not None)
    for inner in qgraph.ir.inner_graphs(node):
        for one in ir.traversal.RecursiveGraphIterator(inner):
            yield from (value for value in one.inputs if value is not None and value.graph is graph)
        yield from (value for value in inner.outputs if value.graph is graph)


def _is_random(node: ir.Node) -> bool:
    return node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")


def _constant_bytes(value: ir.Value) -> int:
    """Return the bytes of an initializer, or of those that a constant is computed from."""
    if value.const_value is not None:
        return value.const_value.nbytes
    node = value.producer()
    return 0 if node is None else sum(_constant_bytes(one) for one in node.inputs if one is not None)


def _letter(node: ir.Node, constant: set[ir.Value]) -> tuple[object, ...]:
    """Return what makes nodes equal: operator, attributes, and shapes and types of constants."""
    attributes = sorted(
        (name, "" if one.is_ref() or one.type in _UNPRINTED else str(one.value))
        for name, one in node.attributes.items()
    )
    inputs = [
        None if value is None else _constant_form(value) if value in constant else "moving" for value in node.inputs
    ]
    return (node.domain, node.op_type, tuple(attributes), tuple(inputs), len(node.outputs))


_UNPRINTED = (
    ir.AttributeType.GRAPH,
    ir.AttributeType.GRAPHS,
    ir.AttributeType.TENSOR,
    ir.AttributeType.TENSORS,
)


def _constant_form(value: ir.Value) -> tuple[object, ...]:
    if value.const_value is not None:
        return (value.const_value.dtype, *value.const_value.shape.numpy())
    node = value.producer()
    return () if node is None else (node.op_type, *(_constant_form(one) for one in node.inputs if one is not None))


def _repetition(word: _Word) -> tuple[list[int], int]:
    """Return where the blocks begin and where the last one ends, and how many there are.

    Of all periods, the one whose run covers most of the nodes that read weights is taken, the shortest of equals.
    """
    letters, large = np.array(word.letters), np.array(word.large, dtype=bool)
    if large.sum() < 2:
        return [], 0
    best = (0, 0, 0, 0)  # nodes with weights covered, -period, start, end
    covered = np.concatenate([[0], np.cumsum(large)])
    for period in range(1, len(letters) // 2 + 1):
        for start, end in _runs(letters[:-period] == letters[period:], period):
            if covered[start + period] == covered[start]:
                continue  # a period without weights
            best = max(best, (int(covered[end] - covered[start]), -period, -start, end))
    reached, period, start, end = best[0], -best[1], -best[2], best[3]
    if reached < _LEAST_COVERAGE * large.sum():
        return [], 0
    return _phase(word, start, end, period)


def _runs(equal: np.ndarray, period: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches (first node, behind the last) that repeat with `period` at least twice."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], equal.view(np.int8), [0]])))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start >= period:
            yield int(start), int(end) + period


def _phase(word: _Word, start: int, end: int, period: int) -> tuple[list[int], int]:
    """Return the cuts of the phase where the fewest values cross, the one with more blocks of equals."""

    def cuts(offset: int) -> list[int]:
        return list(range(start + offset, end + 1, period))

    def cost(offset: int) -> tuple[float, int, int]:
        # Not the last cut: what the blocks share is not read behind it.
        behind = [word.crossing[cut - 1] for cut in cuts(offset)[:-1] if cut > 0]
        return (float(np.median(behind)) if behind else np.inf, -len(cuts(offset)), offset)

    offsets = [offset for offset in range(period) if len(cuts(offset)) > 2] or [0]
    chosen = cuts(min(offsets, key=cost))
    return chosen, len(chosen) - 1
