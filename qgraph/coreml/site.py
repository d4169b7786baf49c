"""Where one ONNX node becomes operations of MIL: what a lowering rule sees, and what it may do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.coreml.data_types import FROM_ONNX, MilType

__all__ = ["Graph", "Rule", "Site", "UnfitError"]


class UnfitError(Exception):
    """A node has no form in MIL; the message says why."""


class Graph(Protocol):
    """What holds the program that is being written."""

    def var(self, value: ir.Value, layout: Sequence[int] = ()) -> Any:
        """Return the variable of a value; of a constant, with its axes in the order of `layout`."""

    def constant(self, array: np.ndarray, name: str) -> Any:
        """Add a constant."""

    def small(self, array: np.ndarray, kind: MilType, name: str) -> Any:
        """Add a constant of numbers of less than 8 bits, a byte each in `array`."""

    def emit(self, kind: str, name: str, **parameters: Any) -> Any:
        """Add an operation."""

    def branch(self, graph: ir.Graph) -> list[Any]:
        """Add the operations of a subgraph, and return the variables of its outputs."""


class Site:
    """One node: its inputs as variables of the program, its constants and attributes, and a builder."""

    def __init__(self, node: ir.Node, graph: Graph) -> None:
        self.node = node
        self.graph = graph

    def __getitem__(self, index: int) -> Any:
        """Return the variable of an input."""
        return self.graph.var(self.value(index))

    def value(self, index: int) -> ir.Value:
        """Return an input; an UnfitError if there is none."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise UnfitError(f"it has no input {index}")
        return value

    def has(self, index: int) -> bool:
        """Tell whether an input is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def array(self, index: int) -> np.ndarray:
        """Return a constant input; an UnfitError if it is computed at run time."""
        found = qgraph.ir.constant(self.value(index))
        if found is None:
            raise UnfitError(f"its input '{self.value(index).name}' must be constant, and is computed at run time")
        return found

    def is_constant(self, index: int) -> bool:
        """Tell whether an input is constant, a dequantized weight included."""
        value = self.value(index)
        producer = value.producer()
        if producer is not None and qgraph.ir.is_op(producer, "DequantizeLinear"):
            return all(qgraph.ir.constant(one) is not None for one in producer.inputs if one is not None)
        return qgraph.ir.constant(value) is not None

    def weight(self, index: int, layout: Sequence[int]) -> Any:
        """Return the variable of a constant input with its axes in another order."""
        return self.graph.var(self.value(index), layout)

    def shape(self, index: int) -> tuple[int, ...]:
        """Return the sizes of an input."""
        return sizes(self.value(index))

    def result(self, index: int = 0) -> tuple[int, ...]:
        """Return the sizes of an output."""
        return sizes(self.node.outputs[index])

    def type(self, index: int = 0) -> MilType:
        """Return the type of an input."""
        return mil_type(self.value(index))

    def number(self, number: float, index: int = 0) -> Any:
        """Return a number of the type of an input."""
        return self.type(index).numpy.type(number)

    def constant(self, array: np.ndarray) -> Any:
        """Return a constant of the program."""
        return self.graph.constant(array, f"{self.label}_constant")

    def emit(self, kind: str, **parameters: Any) -> Any:
        """Add an operation, and return its output or outputs."""
        return self.graph.emit(kind, f"{self.label}_{kind}", **parameters)

    def reshape(self, value: Any, shape: Sequence[int]) -> Any:
        """Return a value in other sizes; one without axes by way of an axis of one, which MIL takes away."""
        if shape:
            return self.emit("reshape", x=value, shape=np.array(shape, np.int32))
        line = value if tuple(value.shape) == (1,) else self.emit("reshape", x=value, shape=np.array([1], np.int32))
        return self.emit("squeeze", x=line, axes=[0])

    @property
    def label(self) -> str:
        """What the operations are named after."""
        return self.node.outputs[0].name or self.node.op_type

    def integer(self, name: str, default: int) -> int:
        """Return an attribute."""
        return int(self.node.attributes.get_int(name, default))

    def floating(self, name: str, default: float) -> float:
        """Return an attribute."""
        return float(self.node.attributes.get_float(name, default))

    def text(self, name: str, default: str) -> str:
        """Return an attribute."""
        return str(self.node.attributes.get_string(name, default))

    def integers(self, name: str, default: Sequence[int]) -> list[int]:
        """Return an attribute."""
        return [int(number) for number in self.node.attributes.get_ints(name, default)]

    def axis(self, default: int, *, rank: int | None = None) -> int:
        """Return the attribute `axis`, from 0 on."""
        axes = len(self.shape(0)) if rank is None else rank
        return self.integer("axis", default) % max(axes, 1)


Rule: TypeAlias = Callable[[Site], Any]
"""Writes a node; returns the variable of its output, or the variables of its outputs in order."""


def sizes(value: ir.Value) -> tuple[int, ...]:
    """Return the sizes of a value; an UnfitError if one is not known."""
    shape = value.shape
    if shape is None or not shape.is_static():
        raise UnfitError(f"the sizes of '{value.name}' are not known")
    return tuple(int(size) for size in shape.numpy())


def mil_type(value: ir.Value) -> MilType:
    """Return the type of a value in MIL; an UnfitError if there is none."""
    kind = None if value.dtype is None else FROM_ONNX.get(value.dtype)
    if kind is None:
        raise UnfitError(f"'{value.name}' is {value.dtype}, which ML Programs do not have")
    return kind
