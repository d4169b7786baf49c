"""What rules of shape inference are made of: facts, the table of rules, and ways to read nodes.

A rule takes the node and what is known so far, and returns one `Fact` for each output; sizes may be symbolic. It
raises `UnknownShapeError` with a reason when it cannot tell. Rules read attributes and inputs of every version of an
operator from opset 7 on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

from qgraph.analysis import symbols
from qgraph.analysis.symbols import Dim

__all__ = [
    "RULES",
    "Data",
    "Dims",
    "Fact",
    "Facts",
    "PartialDims",
    "UnknownShapeError",
    "agreed",
    "axis_in",
    "broadcast",
    "dims_of",
    "input_of",
    "int_of",
    "ints_of",
    "is_never_negative",
    "positive_ints",
    "rule",
]

Dims: TypeAlias = tuple[Dim, ...]
PartialDims: TypeAlias = tuple[Dim | None, ...]
"""None is a size of which nothing is known."""


class UnknownShapeError(ValueError):
    """The shape cannot be told; says why."""


class Data(NamedTuple):
    """The elements of an integer or boolean tensor of rank 0 (`scalar`) or 1; None where one is not known."""

    elements: tuple[Dim | None, ...]
    scalar: bool = False


class Fact(NamedTuple):
    """What is known of a value: its element type, its shape (None: not even the rank) and its elements."""

    dtype: ir.DataType | None
    dims: PartialDims | None
    data: Data | None = None


class Facts(Protocol):
    """What rules may ask for."""

    def dims(self, value: ir.Value) -> Dims | None:
        """Return the shape of a value."""

    def data(self, value: ir.Value | None) -> Data | None:
        """Return the elements of a small integer or boolean tensor, of rank 0 or 1."""

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """Return a small tensor whose elements are all known."""

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type of a value."""


Rule: TypeAlias = Callable[[ir.Node, Facts], Sequence[Fact]]
RULES: dict[tuple[str, str], Rule] = {}
"""(domain, operator) -> rule."""


def rule(*op_types: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register a rule for operators of a domain."""

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            RULES[domain, op_type] = function
        return function

    return register


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, None if it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def dims_of(node: ir.Node, facts: Facts, index: int = 0) -> Dims:
    """Return the shape of an input; raises if it is not known."""
    value = input_of(node, index)
    if value is None:
        raise UnknownShapeError(f"its input {index} is missing")
    dims = facts.dims(value)
    if dims is None:
        raise UnknownShapeError(f"the shape of its input '{value.name}' is not known")
    return dims


def ints_of(node: ir.Node, facts: Facts, name: str, index: int) -> tuple[int, ...] | None:
    """Return integers given as attribute `name`, or as constant input `index`; None if neither is there."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return (attribute.as_int(),) if attribute.type == ir.AttributeType.INT else tuple(attribute.as_ints())
    value = input_of(node, index)
    if value is None:
        return None
    array = facts.array(value)
    if array is None:
        raise UnknownShapeError(f"its input '{value.name}' is not constant")
    return tuple(int(number) for number in array.reshape(-1))


def axis_in(axis: int, rank: int) -> int:
    """Return an axis counted from the front; raises if there is no such axis."""
    if not -rank <= axis < rank:
        raise UnknownShapeError(f"axis {axis} does not exist in {rank} dimensions")
    return axis + rank if axis < 0 else axis


def int_of(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute."""
    return node.attributes.get_int(name, default)


def positive_ints(node: ir.Node, name: str, count: int) -> tuple[int, ...]:
    """Return an attribute of `count` integers from 1, 1 by default; raises if it holds something else."""
    numbers = tuple(node.attributes.get_ints(name, [1] * count))
    if len(numbers) != count or min(numbers, default=1) < 1:
        raise UnknownShapeError(f"{name}={list(numbers)} is not possible")
    return numbers


def broadcast(*shapes: PartialDims) -> PartialDims:
    """Return the shape of an elementwise operation."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Dim | None] = [1] * rank
    for shape in shapes:
        for axis, dim in enumerate(shape, start=rank - len(shape)):
            result[axis] = _broadcast_pair(result[axis], dim)
    return tuple(result)


def _broadcast_pair(one: Dim | None, other: Dim | None) -> Dim | None:
    if one is not None and other is not None:
        return symbols.broadcast(one, other)
    known = other if one is None else one
    return known if isinstance(known, int) and known > 1 else None


def is_never_negative(dim: Dim) -> bool:
    """Tell whether an expression of sizes cannot be negative: no minus sign, except below a maximum with 0."""
    if isinstance(dim, int):
        return dim >= 0
    names = {name for monomial in dim.terms for name in monomial}
    return min(dim.terms.values()) > 0 and all("-" not in name or name.startswith("max(0,") for name in names)


def agreed(dims: Sequence[Dim]) -> Dim:
    """Return one of several sizes that must be equal, a number if there is one."""
    return next((dim for dim in dims if isinstance(dim, int)), dims[0])
