"""Which nodes of a graph run in integers, which values are quantized for them, and which of those share a scale.

    x -> Conv -> Relu -> MaxPool -> Conv -> Softmax -> y

runs as

    x -> Quantize -> [Conv, Relu, MaxPool] -> [Conv] -> Dequantize -> Softmax -> y

Convolutions and products with constant weights run in integers wherever they are. The other operators follow them:
arithmetic only where all that it reads comes out of integer nodes and something after it wants integers again; a
mover where it has less to move that way. So nothing is quantized for the sake of a lone cheap operator, and what
follows the last layer (a detector's boxes and scores, a softmax) keeps the precision of float.

Values that only move share scale and zero point with what they are copies of, and so do a Concat's result and what is
computed for nobody but that Concat: it would be rounded to the result's scale anyway.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import Kind, data_inputs, kind_of, obstacle

__all__ = ["Allowed", "Candidate", "IntegerPlan", "integer_candidates", "integer_plan"]

_LOGARITHM = "a logarithm follows, for which 8 bits are too coarse"

Allowed = Callable[[ir.Node], str | None]
"""Returns why a node must stay in float although it could run in integers, or None."""


@dataclasses.dataclass(frozen=True)
class IntegerPlan:
    """What runs in integers.

    Attributes:
        nodes: the nodes that do, in topological order, with what they do to scales.
        quantized: the values that need a quantized form, in the order in which they are met.
        group: the group of each quantized value, named by one of its values; a group shares scale and zero point.
        observed: for every group, the values whose joint range is that of the group.
        reasons: the nodes that stay in float although their operator can run in integers, each with the reason.
    """

    nodes: Mapping[ir.Node, Kind]
    quantized: Sequence[ir.Value]
    group: Mapping[ir.Value, ir.Value]
    observed: Mapping[ir.Value, Sequence[ir.Value]]
    reasons: Mapping[ir.Node, str]

    def comes_in_integers(self, value: ir.Value) -> bool:
        """Tell whether an integer node makes `value` in its quantized form."""
        return value in self.group and value.producer() in self.nodes


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A node whose operator can run in integers.

    Attributes:
        kind: what the operator does to scales.
        operands: the inputs that are data.
        obstacle: why this node cannot run in integers, or None.
    """

    kind: Kind
    operands: tuple[ir.Value, ...]
    obstacle: str | None


def integer_plan(
    graph: ir.Graph, allowed: Allowed, candidates: Mapping[ir.Node, Candidate] | None = None
) -> IntegerPlan:
    """Plan what runs in integers.

    Args:
        graph: the main graph; subgraphs are not planned, since nothing inside them can be calibrated.
        allowed: names the nodes that must stay in float.
        candidates: what `integer_candidates` found, for those who plan the same graph several times.
    """
    return _Planner(integer_candidates(graph) if candidates is None else candidates, allowed).plan()


def integer_candidates(graph: ir.Graph) -> dict[ir.Node, Candidate]:
    """Return the nodes whose operator can run in integers, in topological order."""
    delicate = _before_logarithms(graph)
    found = {}
    for node in graph:
        kind = kind_of(node)
        if kind is not None:
            reason = obstacle(node) or (_LOGARITHM if node in delicate else None)
            found[node] = Candidate(kind, tuple(value for _, value in data_inputs(node)), reason)
    return found


class _Planner:
    def __init__(self, candidates: Mapping[ir.Node, Candidate], allowed: Allowed) -> None:
        self.kinds: dict[ir.Node, Kind] = {}
        self.reasons: dict[ir.Node, str] = {}
        self._candidates = candidates
        for node, candidate in candidates.items():
            reason = candidate.obstacle or allowed(node)
            if reason is not None:
                self.reasons[node] = reason
            else:
                self.kinds[node] = candidate.kind
        self.wanted: set[ir.Value] = set()
        self.integer: set[ir.Value] = set()

    def plan(self) -> IntegerPlan:
        while self._prune():
            pass
        quantized = list(self._quantized())
        group = self._groups(quantized)
        return IntegerPlan(
            nodes=self.kinds,
            quantized=quantized,
            group=group,
            observed=self._observed(quantized, group),
            reasons=self.reasons,
        )

    # --- which nodes --------------------------------------------------------------------------------------------------

    def _prune(self) -> bool:
        """Take out the nodes that would gain nothing, and tell whether there were any."""
        self._follow_wishes()
        self._follow_integers()
        dropped = {node: reason for node in self.kinds if (reason := self._pointless(node))}
        for node in dropped:
            del self.kinds[node]
        self.reasons |= dropped
        return bool(dropped)

    def _follow_wishes(self) -> None:
        """Find the values that some integer node, maybe behind movers, wants as integers."""
        self.wanted = set()
        for node in reversed(self.kinds):
            if not self._passes_on(node) or any(value in self.wanted for value in node.outputs):
                self.wanted.update(self._operands(node))

    def _follow_integers(self) -> None:
        """Find the values that come as integers, or that a layer quantizes whatever the others do."""
        self.integer = set()
        for node, kind in self.kinds.items():
            operands = self._operands(node)
            if kind is Kind.CONVOLUTION or (kind is Kind.PRODUCT and len(operands) == 1):
                self.integer.add(operands[0])
        for node in self.kinds:
            if not self._passes_on(node) or self._operands(node)[0] in self.integer:
                self.integer.update(node.outputs)

    def _operands(self, node: ir.Node) -> tuple[ir.Value, ...]:
        return self._candidates[node].operands

    def _passes_on(self, node: ir.Node) -> bool:
        return self.kinds[node] in (Kind.MOVER, Kind.CLAMP)

    def _never_float(self, value: ir.Value) -> bool:
        """Tell whether `value`, or what it is a copy of, is made by an integer node that cannot make it in float."""
        node = value.producer()
        while node is not None and node in self.kinds and self._passes_on(node):
            node = self._operands(node)[0].producer()
        return node is not None and self.kinds.get(node, Kind.PRODUCT) is not Kind.PRODUCT

    def _pointless(self, node: ir.Node) -> str | None:
        """Return why an integer kernel would not pay here, or None."""
        kind = self.kinds[node]
        operands = self._operands(node)
        from_integers = all(value in self.integer for value in operands)
        wanted = any(value in self.wanted for value in node.outputs)
        if kind is Kind.PRODUCT:
            return None if len(operands) == 1 or from_integers else "what it multiplies stays in float"
        if kind is Kind.ARITHMETIC:
            if not from_integers:
                return "what it reads stays in float, and quantizing it would cost more than it saves"
            return None if wanted else "nothing after it runs in integers, so that float keeps more precision"
        if kind is Kind.CLAMP and not from_integers:
            return "what it reads stays in float"
        if self._passes_on(node):
            return self._pointless_move(node, operands[0], from_integers=from_integers, wanted=wanted)
        return None

    def _pointless_move(self, node: ir.Node, source: ir.Value, *, from_integers: bool, wanted: bool) -> str | None:
        if from_integers and wanted:
            return None
        alone = qgraph.ir.only_consumer(source) is node
        before, after = _elements([source]), _elements(node.outputs)
        unknown = before is None or after is None
        if from_integers and self._never_float(source):
            grows = not unknown and after > before  # type: ignore[operator]
            return None if alone and not grows else "it would not be cheaper in integers"
        shrinks = unknown or after < before  # type: ignore[operator]
        all_wanted = wanted and all(value in self.wanted for value in node.outputs)
        return None if all_wanted and alone and not shrinks else "what it moves stays in float"

    # --- which values, and which scales -------------------------------------------------------------------------------

    def _quantized(self) -> dict[ir.Value, None]:
        found: dict[ir.Value, None] = {}
        for node, kind in self.kinds.items():
            found.update((value, None) for value in self._operands(node))
            if kind is not Kind.PRODUCT:
                used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
                found.update((value, None) for value in used or node.outputs[:1])
        return found

    def _groups(self, quantized: Iterable[ir.Value]) -> dict[ir.Value, ir.Value]:
        leader = {value: value for value in quantized}

        def find(value: ir.Value) -> ir.Value:
            while leader[value] is not value:
                leader[value] = leader[leader[value]]
                value = leader[value]
            return value

        for node in self.kinds:
            if self._passes_on(node):
                for value in node.outputs:
                    if value in leader:
                        leader[find(value)] = find(self._operands(node)[0])
            elif node.op_type == "Concat":
                for value in self._operands(node):
                    if self._only_for(node, value):
                        leader[find(value)] = find(node.outputs[0])
        return {value: find(value) for value in leader}

    def _only_for(self, reader: ir.Node, value: ir.Value) -> bool:
        """Tell whether `value`, and all of which it is a copy, is computed for nobody but `reader`."""
        while qgraph.ir.only_consumer(value) is reader:
            node = value.producer()
            if node is None or node not in self.kinds:
                return False
            if not self._passes_on(node):
                return True
            if sum(1 for output in node.outputs if output.uses() or output.is_graph_output()) > 1:
                return False
            value, reader = self._operands(node)[0], node
        return False

    def _observed(
        self, quantized: Iterable[ir.Value], group: Mapping[ir.Value, ir.Value]
    ) -> dict[ir.Value, list[ir.Value]]:
        """Choose for each group what its range comes from: the values that are computed, after a clamp."""
        observed: dict[ir.Value, list[ir.Value]] = {}
        for value in quantized:
            if not self._is_copy(value) and not self._ends_in_concat(value):
                observed.setdefault(group[value], []).append(self._clamped(value))
        return observed

    def _is_copy(self, value: ir.Value) -> bool:
        node = value.producer()
        return node is not None and node in self.kinds and self._passes_on(node)

    def _ends_in_concat(self, value: ir.Value) -> bool:
        reader = qgraph.ir.only_consumer(value)
        while reader is not None and reader in self.kinds and self._passes_on(reader):
            value = reader.outputs[0]
            reader = qgraph.ir.only_consumer(value)
        joined = reader is not None and reader in self.kinds and reader.op_type == "Concat"
        return joined and reader is not None and self._only_for(reader, value)

    def _clamped(self, value: ir.Value) -> ir.Value:
        """Return the result of the clamp that alone reads `value`, or else `value`."""
        reader = qgraph.ir.only_consumer(value)
        while reader is not None and self.kinds.get(reader) is Kind.CLAMP:
            value = reader.outputs[0]
            reader = qgraph.ir.only_consumer(value)
        return value


def _before_logarithms(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that a logarithm depends on which layers depend on in turn.

    Such a part of a graph computes a spectrum in decibels or the like. What matters there is the relation of numbers
    of very different size, and 8 bits round the small ones to zero.
    """
    logarithms = [node for node in graph if qgraph.ir.is_op(node, "Log")]
    layers = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
    found: set[ir.Node] = set()
    for node in logarithms:
        after = _reach([node], lambda one: [use.node for value in one.outputs for use in value.uses()])
        if any(qgraph.ir.is_op(one, *layers) for one in after):
            found |= _reach([node], lambda one: [node for value in one.inputs if value and (node := value.producer())])
    return found


def _reach(start: Iterable[ir.Node], neighbours: Callable[[ir.Node], Iterable[ir.Node]]) -> set[ir.Node]:
    """Return the nodes that can be reached, without those of `start` unless they are reached too."""
    found: set[ir.Node] = set()
    queue = list(start)
    while queue:
        fresh = [one for one in neighbours(queue.pop()) if one not in found]
        found.update(fresh)
        queue += fresh
    return found


def _elements(values: Iterable[ir.Value]) -> int | None:
    """Return the number of elements, a dynamic axis counting as one, or None where a shape is not known."""
    total = 0
    for value in values:
        if value.shape is None:
            return None
        total += math.prod(axis if isinstance(axis, int) else 1 for axis in value.shape)
    return total
