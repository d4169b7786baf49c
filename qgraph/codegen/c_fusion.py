"""Which nodes share a loop nest.

    conv -> Add -> Requantize -> Cast -> Add -> Requantize    =>    one kernel that writes the last tensor only

Only what several nodes read, what is read through a pointer and what the graph gives out lies in memory. Casts and
sums with constants are computed again by each reader, since the tensors that they would write are four times larger
than what they read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

import qgraph.ir
from qgraph.codegen.c_graph import IntegerGraph
from qgraph.codegen.c_rules import Access, Kind, Read, rule_of

__all__ = ["Fused", "fuse", "input_of", "producer_of", "view_source"]

_CHEAP = ("Add", "Cast", "Sub")


@dataclass
class Fused:
    """Nodes that are written as one kernel.

    Attributes:
        output: the tensor in memory that it writes.
        inlined: the tensors in between that never lie in memory.
        driver: the one of them (or `output`) whose operator writes the loops; None for loops over the output.
    """

    output: ir.Value
    inlined: dict[ir.Value, None] = field(default_factory=dict)
    driver: ir.Value | None = None


def producer_of(value: ir.Value) -> ir.Node:
    """Return the node that computes a value."""
    node = value.producer()
    assert node is not None, value.name
    return node


def input_of(value: ir.Value, position: int = 0) -> ir.Value:
    """Return an input, which must be there, of the node that computes a value."""
    found = producer_of(value).inputs[position]
    assert found is not None, value.name
    return found


def view_source(graph: IntegerGraph, value: ir.Value) -> ir.Value:
    """Return the tensor in whose memory a value lies: itself, or what it is a view of."""
    ports = {port.value for port in graph.inputs}
    while value not in ports and graph.constant(value) is None and rule_of(graph, producer_of(value)).kind is Kind.VIEW:
        value = input_of(value)
    return value


def fuse(graph: IntegerGraph) -> list[Fused]:
    """Return the kernels of a graph, in the order in which they run.

    Raises:
        UserError: an operator cannot be written as code.
    """
    return _Fuser(graph).run()


@dataclass(frozen=True)
class _At:
    """Where in a kernel a value is computed: at the index of the output (`home`), and how often."""

    home: bool = True
    again: bool = False


class _Fuser:
    def __init__(self, graph: IntegerGraph) -> None:
        self._graph = graph
        self._ports = {port.value for port in graph.inputs}
        self._results = {port.value for port in graph.outputs}
        self._position = {node: position for position, node in enumerate(graph.model.graph)}
        self._readers = self._count_readers()
        self._stored: set[ir.Value] = set()

    def run(self) -> list[Fused]:
        kernels = []
        for port in self._graph.outputs:
            self._store(port.value)
        for node in reversed(self._graph.model.graph):
            for value in reversed(node.outputs):
                if value in self._stored:
                    kernel = Fused(value)
                    self._begin(kernel)
                    kernels.append(kernel)
        return kernels[::-1]

    def _count_readers(self) -> dict[ir.Value, int]:
        """Return how many nodes read each value that is needed; a value that is given out has one reader more."""
        readers: dict[ir.Value, int] = {}
        pending = list(self._results)
        while pending:
            value = pending.pop()
            readers[value] = readers.get(value, 0) + 1
            if readers[value] == 1 and not self._given(value):
                pending += {read for read, _ in self._reads(value)}
        return readers

    def _given(self, value: ir.Value) -> bool:
        return value in self._ports or self._graph.constant(value) is not None

    def _reads(self, value: ir.Value) -> Sequence[Read]:
        node = producer_of(value)
        rule = rule_of(self._graph, node)
        self._graph.dtype(value)
        return rule.reads(self._graph, node)

    def _store(self, value: ir.Value) -> None:
        """Have a value in memory."""
        source = view_source(self._graph, value)
        if not self._given(source):
            self._stored.add(source)

    def _begin(self, kernel: Fused) -> None:
        if rule_of(self._graph, producer_of(kernel.output)).kind in (Kind.ROWS, Kind.WHOLE):
            kernel.driver = kernel.output
        self._expand(kernel, kernel.output, _At())

    def _expand(self, kernel: Fused, value: ir.Value, at: _At) -> None:
        """Decide of each input of a value that the kernel computes whether it is computed there too."""
        elementwise = rule_of(self._graph, producer_of(value)).kind is Kind.ELEMENT
        reads = [read for read in self._reads(value) if self._graph.constant(read[0]) is None]
        # The producer that runs last comes first: what it makes need not wait in memory for the others.
        for read, access in sorted(reads, key=lambda read: -self._rank(read[0])):
            spread = access is Access.BROADCAST and not self._same(value, read)
            several = self._readers[value] > 1 and value is not kernel.output
            again = at.again or access is Access.MANY or spread or several
            there = _At(at.home and elementwise, again)
            if read in kernel.inlined:
                continue
            if self._joins(kernel, value, read, access, there):
                kernel.inlined[read] = None
                self._expand(kernel, read, there)
            else:
                self._store(read)

    def _rank(self, value: ir.Value) -> int:
        node = value.producer()
        return -1 if node is None or value in self._ports else self._position[node]

    def _joins(self, kernel: Fused, value: ir.Value, read: ir.Value, access: Access, at: _At) -> bool:
        if read in self._ports or access is Access.MEMORY:
            return False
        if self._is_cheap(read):
            return True
        if at.again or self._readers[read] > 1 or (access is Access.BROADCAST and not self._same(value, read)):
            return False
        kind = rule_of(self._graph, producer_of(read)).kind
        if kind is Kind.SCALAR:
            return access is Access.BROADCAST
        if kind is Kind.ROWS and kernel.driver is None and at.home:
            kernel.driver = read
            return True
        if kind not in (Kind.ELEMENT, Kind.MOVE):
            return False
        return (at.home and kernel.driver is None) or self._should_join(read)

    def _should_join(self, value: ir.Value) -> bool:
        """Tell whether to compute a value in a kernel that the loops of a driver behind it cannot join.

        What lies in memory then is the narrowest tensor on the way: the result of Requantize rather than a sum.
        """
        below = self._narrowest_on_the_way(value)
        return below is None or below < self._graph.dtype(value).itemsize

    def _narrowest_on_the_way(self, value: ir.Value) -> int | None:
        """Return the least bytes of an element between a value and a driver behind it; None if there is no driver."""
        found: list[int] = []
        for read, access in self._reads(value):
            if self._given(read) or access is Access.MEMORY or self._readers[read] > 1:
                continue
            kind = rule_of(self._graph, producer_of(read)).kind
            own = self._graph.dtype(read).itemsize
            if kind is Kind.ROWS:
                found.append(own)
            elif kind in (Kind.ELEMENT, Kind.MOVE):
                below = self._narrowest_on_the_way(read)
                found += [] if below is None else [min(own, below)]
        return min(found, default=None)

    def _same(self, value: ir.Value, read: ir.Value) -> bool:
        """Tell whether each element of `read` is used for one element of `value`."""
        return self._graph.size(value) == self._graph.size(read)

    def _is_cheap(self, value: ir.Value) -> bool:
        node = producer_of(value)
        if not qgraph.ir.is_op(node, *_CHEAP) or value in self._results:
            return False
        computed = [one for one in node.inputs if one is not None and self._graph.constant(one) is None]
        constants = [self._graph.constant(one) for one in node.inputs if one is not None]
        return len(computed) == 1 and all(one is None or one.size == 1 for one in constants)
