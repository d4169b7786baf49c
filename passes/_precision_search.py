"""Which nodes to keep at a higher precision, for the least cost, until the outputs are exact enough.

    move       a layer to float (what can no longer run in integers without it follows, as `integer_plan` says), all
               readers of a tensor to float, or a layer's weight from 4 to 8 bits
    gain       noise power at the outputs that a move takes away, from the errors of all tensors together
    cost       multiply-adds that leave the integers, and elements quantized and dequantized in addition

The move of most gain for its cost is made, again and again; in the end moves that are not needed any more are undone.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_plan import IntegerPlan, integer_candidates, integer_plan
from qgraph.analysis.integer_rules import Kind
from qgraph.analysis.multiply_adds import UnknownCostError, multiply_adds
from qgraph.analysis.perturbation_effects import Effects
from qgraph.analysis.quantized_tensors import QuantizedTensor
from qgraph.analysis.shapes import Shapes

__all__ = ["Choice", "PrecisionSearch"]

_FLOAT_FACTOR = 2.0
"""What a multiply-add costs in float beyond what it costs in integers, which is 1."""
_BOUNDARY = 8.0
"""What quantizing or dequantizing an element costs, in integer multiply-adds."""
_WIDENED = 1.0
"""What a weight of 8 bits instead of 4 costs, by element: bytes rather than time."""
_LAYERS = (Kind.CONVOLUTION, Kind.PRODUCT)
_MOVERS = (Kind.MOVER, Kind.CLAMP)
_WIDE = 8

Reason = Callable[[ir.Node], str | None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is kept at a higher precision.

    Attributes:
        floats: nodes in float.
        wide: nodes with weights of 8 bits instead of 4.
    """

    floats: frozenset[ir.Node] = frozenset()
    wide: frozenset[ir.Node] = frozenset()

    def with_(self, other: Choice) -> Choice:
        """Return both together."""
        return Choice(self.floats | other.floats, self.wide | other.wide)

    def without(self, other: Choice) -> Choice:
        """Return what is not in `other`."""
        return Choice(self.floats - other.floats, self.wide - other.wide)

    def __bool__(self) -> bool:
        return bool(self.floats or self.wide)


class PrecisionSearch:
    """Searches for the nodes of a float model.

    Args:
        model: that would be quantized; the nodes of the choices are its own.
        tensors: what would be rounded, by the names that `found` has; of a weight, 8 bits beside 4 where both are
            possible.
        found: the effects of their errors.
        barred: why a node stays in float whatever is chosen.
    """

    def __init__(self, model: ir.Model, tensors: Mapping[str, QuantizedTensor], found: Effects, barred: Reason) -> None:
        self._graph = model.graph
        self._barred = barred
        self._candidates = integer_candidates(model.graph)
        self._sizes = _Sizes(model)
        self._nodes = {qgraph.ir.node_label(node): node for node in model.graph}
        self._tensors = tensors
        self._found = found
        self._powers = {name: found.power([name]) for name in tensors}
        self._weights = [name for name, one in tensors.items() if one.kind == "weight"]
        self._by_name: dict[str, str] = {one.tensor: name for name, one in tensors.items() if one.kind == "activation"}
        narrow = {one.tensor for one in tensors.values() if one.bits < _WIDE}
        self._choosable = {tensors[name].tensor for name in self._weights if tensors[name].bits == _WIDE} & narrow
        self._plans: dict[frozenset[ir.Node], IntegerPlan] = {}

    # --- what a choice means ------------------------------------------------------------------------------------------

    def plan(self, choice: Choice) -> IntegerPlan:
        """Return what runs in integers."""
        if choice.floats not in self._plans:

            def allowed(node: ir.Node) -> str | None:
                return "it was chosen" if node in choice.floats else self._barred(node)

            self._plans[choice.floats] = integer_plan(self._graph, allowed, self._candidates)
        return self._plans[choice.floats]

    def power(self, choice: Choice) -> float:
        """Return the noise power at the outputs, relative to theirs."""
        return self._found.power(self._rounded(choice))

    def _score(self, choice: Choice) -> float:
        """Return what moves shall make less: noise, as errors add up and as if they did not know of one another.

        Errors of the weights point the same way on many samples, and add up. But where some happen to cancel, there
        would be no way on from the first alone.
        """
        rounded = list(self._rounded(choice))
        return self._found.power(rounded) + sum(self._powers[name] for name in rounded)

    def cost(self, choice: Choice) -> float:
        """Return what a choice costs, in multiply-adds of integers, against a constant."""
        plan = self.plan(choice)
        left = sum(
            self._sizes.multiply_adds(node)
            for node, candidate in self._candidates.items()
            if candidate.kind in _LAYERS and node not in plan.nodes
        )
        boundaries = sum(self._sizes.elements(value) for value in _boundaries(plan))
        widened = sum(self._sizes.weight(node) for node in choice.wide)
        return _FLOAT_FACTOR * left + _BOUNDARY * boundaries + _WIDENED * widened

    def layers(self, choice: Choice) -> int:
        """Return how many layers run in integers."""
        return sum(kind in _LAYERS for kind in self.plan(choice).nodes.values())

    def covers(self, choice: Choice) -> bool:
        """Tell whether the effects of all that is rounded under a choice are known."""
        before, after = (set(_rounded_values(self.plan(one))) for one in (Choice(), choice))
        return all(value in before or value.name in self._by_name for value in after)

    def _rounded(self, choice: Choice) -> Iterator[str]:
        """Yield the tensors that are rounded, by the names of the effects."""
        plan = self.plan(choice)
        for value in _rounded_values(plan):
            name = self._by_name.get(value.name or "")
            if name is not None:
                yield name
        for name in self._weights:
            one = self._tensors[name]
            readers = [node for label in one.readers if (node := self._nodes.get(label)) is not None]
            wide = any(node in choice.wide for node in readers)
            if one.tensor in self._choosable and wide != (one.bits == _WIDE):
                continue
            if any(node in plan.nodes for node in readers) or not readers:
                yield name

    # --- searching ----------------------------------------------------------------------------------------------------

    def until(self, power: float) -> Choice:
        """Return a choice whose noise power is at most `power`, or the least that could be reached."""
        return self._trimmed(self._greedy(power, most=None), power)

    def best(self, count: int) -> Choice:
        """Return the `count` moves, or fewer, that take most noise away."""
        return self._greedy(0.0, most=count)

    def _moves(self) -> list[Choice]:
        plan = self.plan(Choice())
        moves = {Choice(frozenset({node})): None for node, kind in plan.nodes.items() if kind not in _MOVERS}
        for one in self._tensors.values():
            nodes = (self._nodes.get(label) for label in one.readers)
            readers = frozenset(node for node in nodes if node is not None and node in plan.nodes)
            if one.kind == "activation" and len(readers) > 1:
                moves[Choice(readers)] = None
            if one.tensor in self._choosable and readers:
                moves[Choice(wide=readers)] = None
        return list(moves)

    def _greedy(self, power: float, most: int | None) -> Choice:
        """Make moves by falling gain for their cost; gains shrink, so that old ones are bounds on new ones."""
        moves = [move for move in self._moves() if most is None or len(move.floats) == 1]
        chosen, score, cost = Choice(), self._score(Choice()), self.cost(Choice())
        queue = [(-math.inf, order, 0) for order in range(len(moves))]
        made = looked_through = 0
        while queue and self.power(chosen) > power and (most is None or made < most):
            worth, order, seen = heapq.heappop(queue)
            after = chosen.with_(moves[order])
            if after == chosen:
                continue
            if seen != made or worth == -math.inf:
                gain = score - self._score(after)
                price = 1.0 if most is not None else max(self.cost(after) - cost, 1.0)
                heapq.heappush(queue, (-gain / price if gain > 0 else 0.0, order, made))
            elif worth < 0:
                chosen, score, cost, made = after, self._score(after), self.cost(after), made + 1
            elif looked_through < made:
                # A tensor with several readers gains only with the last of them: look at all of them again.
                looked_through = made
                queue = [(-math.inf, again, 0) for again in range(len(moves))]
            else:
                break
        return chosen

    def _trimmed(self, choice: Choice, power: float) -> Choice:
        """Give back, the dearest first, what is not needed for `power`."""
        parts = [Choice(frozenset({node})) for node in self._in_order(choice.floats)]
        parts += [Choice(wide=frozenset({node})) for node in self._in_order(choice.wide)]
        full = self.cost(choice)
        for part in sorted(parts, key=lambda part: self.cost(choice.without(part)) - full):
            less = choice.without(part)
            if self.power(less) <= power:
                choice = less
        return choice

    def _in_order(self, nodes: Iterable[ir.Node]) -> list[ir.Node]:
        chosen = set(nodes)
        return [node for node in self._graph if node in chosen]


def _rounded_values(plan: IntegerPlan) -> Iterator[ir.Value]:
    """Yield what quantizers round; copies of it are exact."""
    for value in plan.quantized:
        producer = value.producer()
        if producer is None or plan.nodes.get(producer) not in _MOVERS:
            yield _clamped(plan, value)


def _clamped(plan: IntegerPlan, value: ir.Value) -> ir.Value:
    """Return the result of the clamps that alone read `value`: the quantizer rounds that."""
    reader = qgraph.ir.only_consumer(value)
    while reader is not None and plan.nodes.get(reader) is Kind.CLAMP:
        value = reader.outputs[0]
        reader = qgraph.ir.only_consumer(value)
    return value


def _boundaries(plan: IntegerPlan) -> Iterator[ir.Value]:
    """Yield the values that are quantized before integer nodes, and those that are dequantized after them."""
    for value in plan.quantized:
        read_in_float = value.is_graph_output() or any(use.node not in plan.nodes for use in value.uses())
        if read_in_float or not plan.comes_in_integers(value):
            yield value


class _Sizes:
    """Elements and multiply-adds; a size that is not known counts as 1."""

    def __init__(self, model: ir.Model) -> None:
        self._shapes = Shapes(model).run()
        self._known: dict[ir.Node, int] = {}

    def _dims(self, value: ir.Value) -> Sequence[int]:
        dims = self._shapes.dims(value)
        if dims is None:
            raise UnknownCostError("its shape is not known")
        return [dim if isinstance(dim, int) else 1 for dim in dims]

    def elements(self, value: ir.Value) -> int:
        try:
            return math.prod(self._dims(value))
        except UnknownCostError:
            return 1

    def weight(self, node: ir.Node) -> int:
        weights = [value for value in node.inputs if value is not None and value.const_value is not None]
        return max((int(np.prod(value.const_value.shape.numpy())) for value in weights if value.const_value), default=0)

    def multiply_adds(self, node: ir.Node) -> int:
        if node not in self._known:
            try:
                self._known[node] = multiply_adds(node, self._dims)
            except UnknownCostError:
                self._known[node] = 0
        return self._known[node]
