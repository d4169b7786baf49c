"""Writes one kernel: a C function whose loops compute one tensor in memory from others.

Values are written by pulling: `Kernel.element` asks the operator of a value for its text, which asks for the elements
of its inputs, down to tensors in memory and constants.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.codegen import c_text
from qgraph.codegen.c_constants import Constants
from qgraph.codegen.c_fusion import Fused, producer_of, view_source
from qgraph.codegen.c_graph import IntegerGraph
from qgraph.codegen.c_rules import Access, Kind, rule_of

__all__ = ["Index", "Kernel", "Parameter", "broadcast_index"]

Index = tuple[str, ...]
_INDENT = "    "
_INDEX = np.dtype(np.int32)


@dataclass
class Parameter:
    """A tensor in memory that a kernel reads.

    Attributes:
        value: the tensor.
        name: in the C function.
        in_step: an element is read just before the kernel writes that at the same place, and not later.
    """

    value: ir.Value
    name: str
    in_step: bool = True


class Kernel:
    """The text of one kernel while it is written.

    Attributes:
        graph: what the kernel is of.
        fused: which nodes it computes.
        name: of the C function.
        reads: the tensors in memory that it reads.
        scratch: name -> (type, elements) of memory that it needs while it runs.
        helpers: names of the runtime's functions that it calls.
        lines: of its body.
    """

    def __init__(self, graph: IntegerGraph, fused: Fused, name: str, constants: Constants) -> None:
        self.graph = graph
        self.fused = fused
        self.name = name
        self.constants = constants
        self.reads: dict[ir.Value, Parameter] = {}
        self.scratch: dict[str, tuple[np.dtype, int]] = {}
        self.helpers: set[str] = set()
        self.lines: list[str] = []
        self.in_step = False
        self._depth = 1
        self._scopes: list[dict[tuple[ir.Value, Index], str]] = [{}]
        self._count = 0
        self._groups: list[list[int]] | None = None
        self._shapes: dict[ir.Value, tuple[int, ...]] = {}

    # --- text --------------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """Write a line."""
        self.lines.append(f"{_INDENT * self._depth}{text}")

    @contextlib.contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Write a block; what is computed in it is forgotten behind it. "else" follows on the block before."""
        if header == "else":
            self.lines[-1] += " else {"
        else:
            self.line(f"{header} {{")
        self._depth += 1
        self._scopes.append({})
        yield
        self._scopes.pop()
        self._depth -= 1
        self.line("}")

    @contextlib.contextmanager
    def loops(self, shape: Sequence[int], prefix: str = "i") -> Iterator[Index]:
        """Write a loop for each size that is not 1, and yield the index in them."""
        with contextlib.ExitStack() as stack:
            index = []
            for axis, size in enumerate(shape):
                name = f"{prefix}{axis}" if len(shape) > 1 else prefix
                if size != 1:
                    stack.enter_context(self.block(f"for (int32_t {name} = 0; {name} < {size}; ++{name})"))
                index.append("0" if size == 1 else name)
            yield tuple(index)

    def fresh(self, prefix: str = "v") -> str:
        """Return a new local name."""
        self._count += 1
        return f"{prefix}{self._count - 1}"

    def temporary(self, dtype: np.dtype, expression: str) -> str:
        """Write a constant local that holds an expression of a type, and return its name."""
        name = self.fresh()
        self.line(f"const {c_text.temporary_type(dtype)} {name} = {expression};")
        return name

    def local(self, name: str, expression: str, dtype: np.dtype = _INDEX) -> str:
        """Write a constant local under a name of its own in this block, and return the name."""
        self.line(f"const {c_text.temporary_type(dtype)} {name} = {expression};")
        return name

    @contextlib.contextmanager
    def steps(self, name: str, size: int, count: int) -> Iterator[tuple[str, str]]:
        """Write a loop over `size` in steps of `count`; yield where a step starts and how many it has."""
        if size <= count:
            yield "0", str(size)
            return
        with self.block(f"for (int32_t {name} = 0; {name} < {size}; {name} += {count})"):
            if size % count:
                rest = f"{size} - {name}"
                yield name, self.local("count", f"{rest} < {count} ? {rest} : {count}")
            else:
                yield name, str(count)

    def helper(self, name: str) -> str:
        """Return the name of a function of the runtime, which is thereby needed."""
        self.helpers.add(name)
        return name

    def buffer(self, name: str, dtype: np.dtype, size: int) -> str:
        """Return the name of memory for `size` elements that the kernel needs while it runs."""
        self.scratch[name] = (dtype, size)
        return name

    # --- values ------------------------------------------------------------------------------------------------------

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """Return the shape under which the kernel indexes a value: neighbouring axes may be one."""
        if self._groups is None:
            return self.graph.shape(value)
        if value not in self._shapes:
            rank = sum(len(group) for group in self._groups)
            full = self.graph.shape(value)
            padded = (1,) * (rank - len(full)) + full
            self._shapes[value] = tuple(math.prod(padded[axis] for axis in group) for group in self._groups)
        return self._shapes[value]

    def element(self, value: ir.Value, index: Index) -> str:
        """Return an atom for the element of a value at an index of its shape; writes what computes it."""
        key = (value, index)
        for scope in reversed(self._scopes):
            if key in scope:
                return scope[key]
        atom = self._element(value, index)
        self._scopes[-1][key] = atom
        return atom

    def _element(self, value: ir.Value, index: Index) -> str:
        array = self.graph.constant(value)
        if array is not None:
            return self._constant(value, array, index)
        if self._is_computed(value):
            return rule_of(self.graph, producer_of(value)).emit(self, value, index)
        shape = self.shape(value)
        here = self.in_step and shape == self.shape(self.fused.output)
        parameter = self.pointer(value, in_step=here)
        return f"{parameter}[{c_text.offset(index, shape)}]"

    def _constant(self, value: ir.Value, array: np.ndarray, index: Index) -> str:
        if array.size == 1:
            return c_text.literal(array.item(), array.dtype)
        name = self.constants.name(value.name or "constant", array)
        element = f"{name}[{c_text.offset(index, self.shape(value))}]"
        return f"(int64_t){element}" if array.dtype == np.int64 else element

    def pointer(self, value: ir.Value, *, in_step: bool = False) -> str:
        """Return the name of a pointer to a value in memory."""
        array = self.graph.constant(value)
        if array is not None:
            return self.constants.name(value.name or "constant", array, array.dtype)
        source = view_source(self.graph, value)
        parameter = self.reads.setdefault(source, Parameter(source, f"x{len(self.reads)}"))
        parameter.in_step &= in_step
        return parameter.name

    # --- the body ----------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write the body."""
        fused = self.fused
        if fused.driver is not None:
            rule_of(self.graph, producer_of(fused.driver)).emit(self, fused.driver, ())
            return
        if all(map(self._is_elementwise, self._computed())):
            self.merge(self.groups())
            self.in_step = True
        with self.loops(self.shape(fused.output)) as index:
            self.store(index, self.element(fused.output, index))

    def finish(self, index: Index, atom: str) -> None:
        """Store the output's element at `index`, where the driver's is `atom`."""
        driver, output = self.fused.driver, self.fused.output
        assert driver is not None
        shape = self.shape(driver)
        index = ("0",) * (len(shape) - len(index)) + index
        index = tuple("0" if size == 1 else one for size, one in zip(shape, index, strict=True))
        self._scopes[-1][driver, index] = atom
        outer = ("0",) * (len(self.shape(output)) - len(index))
        self.store((*outer, *index), self.element(output, (*outer, *index)))

    def store(self, index: Index, atom: str) -> None:
        """Write an element of the output."""
        output = self.fused.output
        kind = c_text.C_TYPES[self.graph.dtype(output)]
        self.line(f"y[{c_text.offset(index, self.shape(output))}] = ({kind}){atom};")

    def _is_elementwise(self, value: ir.Value) -> bool:
        return rule_of(self.graph, producer_of(value)).kind is Kind.ELEMENT

    def _computed(self) -> list[ir.Value]:
        return [self.fused.output, *self.fused.inlined]

    def groups(self) -> list[list[int]]:
        """Return the axes of the output, those together that may be one."""
        groups: list[list[int]] = []
        for axis in range(len(self.graph.shape(self.fused.output))):
            if groups and self.alike([*groups[-1], axis]):
                groups[-1].append(axis)
            else:
                groups.append([axis])
        return groups

    def alike(self, axes: Sequence[int]) -> bool:
        """Tell whether all that elementwise operators of the kernel read has the whole of these axes, or none of them.

        What the driver reads does not count.
        """
        shape = self.graph.shape(self.fused.output)
        wanted = [shape[axis] for axis in axes]
        for value in self._after_driver():
            if self._is_computed(value) and value is not self.fused.driver and not self._is_elementwise(value):
                return False
            full = self.graph.shape(value)
            padded = (1,) * (len(shape) - len(full)) + full
            sizes = [padded[axis] for axis in axes]
            if sizes != wanted and any(size != 1 for size in sizes):
                return False
        return True

    def _after_driver(self) -> set[ir.Value]:
        """Return the output, and all that leads to it up to the driver."""
        found: set[ir.Value] = set()
        pending = [self.fused.output]
        while pending:
            value = pending.pop()
            found.add(value)
            if self._is_computed(value) and value is not self.fused.driver:
                pending += self._elementwise_inputs(value)
        return found

    def _is_computed(self, value: ir.Value) -> bool:
        return value in self.fused.inlined or value is self.fused.output

    def _elementwise_inputs(self, value: ir.Value) -> list[ir.Value]:
        reads = rule_of(self.graph, producer_of(value)).reads(self.graph, producer_of(value))
        return [read for read, access in reads if access is Access.BROADCAST]

    def merge(self, groups: list[list[int]]) -> None:
        """Index all values by groups of axes from now on."""
        self._groups = groups

    @property
    def title(self) -> str:
        """Return the nodes of the kernel in their order, and the tensor that it writes."""
        order = {node: position for position, node in enumerate(self.graph.model.graph)}
        nodes = sorted({producer_of(value) for value in self._computed()}, key=order.__getitem__)
        names = ", ".join(f"{qgraph.ir.node_label(node)} ({node.op_type})" for node in nodes)
        output = self.fused.output
        return f"{names} -> {output.name}: {self.graph.dtype(output)}{list(self.graph.shape(output))}"


def broadcast_index(kernel: Kernel, value: ir.Value, index: Index) -> Index:
    """Return the index of an input that is broadcast to an output at `index`."""
    shape = kernel.shape(value)
    return tuple("0" if size == 1 else one for size, one in zip(shape, index[len(index) - len(shape) :], strict=True))
