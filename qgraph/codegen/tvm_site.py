"""One node on its way to TVM: its inputs, its attributes and how its result is computed.

A rule takes a `Site` and returns the node's outputs. What is known when the code is made stays a numpy array, and is
computed by numpy; the rest are variables of TVM's graph language, Relax. Rules describe elements in TVM's tensor
expressions, in integers only: nothing is left to TVM's own operators whose rounding or types might differ.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.errors import UserError

__all__ = [
    "RULES",
    "Operand",
    "Scalar",
    "Site",
    "Variable",
    "broadcast",
    "constant",
    "dims",
    "expression_of",
    "refusal",
    "rule",
]

Element: TypeAlias = Any
"""A `tvm.tirx` expression of one element."""
Tensor: TypeAlias = Any
"""A `tvm.te.Tensor`, or a `Scalar` in its place."""
Rule: TypeAlias = Callable[["Site"], "Operand | list[Operand]"]

RULES: dict[tuple[str, str], Rule] = {}
"""(domain, operator) -> its rule."""


def rule(*op_types: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register the decorated function for operators of a domain."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys([(domain, op_type) for op_type in op_types], function))
        return function

    return register


def refusal(node: ir.Node, why: str) -> UserError:
    """Return the error for a node that cannot be compiled."""
    return UserError(f"TVM cannot compile node '{qgraph.ir.node_label(node)}' ({node.op_type}): {why}")


def constant(value: Any, dtype: str) -> Element:
    """Return a constant of a type of TVM."""
    from tvm import tirx

    return tirx.const(value, dtype)


def dims(tensor: Tensor) -> tuple[int, ...]:
    """Return the static shape of a tensor, a variable or an array."""
    return tuple(int(size) for size in tensor.shape)


@dataclasses.dataclass(frozen=True)
class Variable:
    """A tensor that the compiled code computes.

    Attributes:
        expression: a `tvm.relax.Var`.
        shape: its sizes.
        dtype: numpy's name of its type, which is TVM's too.
    """

    expression: Any
    shape: tuple[int, ...]
    dtype: str


Operand: TypeAlias = Variable | np.ndarray
"""What a node reads or makes: an array where it is known when the code is made."""


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A known number in the place of a tensor: it is written into the code."""

    value: int | bool
    dtype: str
    shape: tuple[int, ...]

    def __call__(self, *index: Any) -> Element:
        """Return the number, whatever the index."""
        del index
        return constant(self.value, self.dtype)


def broadcast(function: Callable[..., Element], *tensors: Tensor, name: str = "elements") -> Tensor:
    """Compute elements from one element of each tensor, broadcast as numpy does."""
    from tvm import te

    shape = np.broadcast_shapes(*map(dims, tensors))

    def element(tensor: Tensor, index: tuple[Any, ...]) -> Element:
        sizes = dims(tensor)
        own = index[len(index) - len(sizes) :]
        return tensor(*(0 if size == 1 else i for i, size in zip(own, sizes, strict=True)))

    return te.compute(shape, lambda *index: function(*(element(one, index) for one in tensors)), name=name)


class Site:
    """A node, and what computes its outputs.

    Attributes:
        node: the node.
        inputs: its inputs; None for one that is left out.
        attributes: its attributes as plain values.
    """

    def __init__(
        self, builder: Any, node: ir.Node, inputs: Sequence[Operand | None], attributes: Mapping[str, Any]
    ) -> None:
        self.node, self.inputs, self.attributes = node, inputs, attributes
        self._builder = builder

    def __getitem__(self, index: int) -> Operand:
        """Return an input that must be there."""
        value = self.optional(index)
        if value is None:
            raise self.refuse(f"its input {index} is left out")
        return value

    @property
    def operands(self) -> list[Operand]:
        """All inputs, of which none may be left out."""
        return [self[index] for index in range(len(self.inputs))]

    def optional(self, index: int) -> Operand | None:
        """Return an input, or None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Return the shape of an input."""
        return dims(self[index])

    def dtype(self, index: int = 0) -> str:
        """Return the element type of an input: numpy's name, which is TVM's too."""
        return str(self[index].dtype)

    def array(self, index: int, default: Any = None) -> np.ndarray:
        """Return an input that must be known when the code is made.

        Raises:
            UserError: it depends on what the model is given.
        """
        value = self.optional(index)
        if value is None:
            return np.asarray(default)
        if not isinstance(value, np.ndarray):
            name = self.node.inputs[index].name if self.node.inputs[index] is not None else index  # type: ignore[union-attr]
            raise self.refuse(f"its input '{name}' depends on the model's inputs, but the code's sizes must be fixed")
        return value

    def integers(self, index: int, default: Sequence[int] = ()) -> tuple[int, ...]:
        """Return an input of rank 1 or 0 that must be known, such as axes or sizes."""
        return tuple(int(number) for number in self.array(index, default).reshape(-1))

    def axis(self, rank: int | None = None, default: int = 0) -> int:
        """Return the attribute `axis`, counted from the front."""
        rank = len(self.shape()) if rank is None else rank
        return int(self.attributes.get("axis", default)) % max(rank, 1)

    def refuse(self, why: str) -> UserError:
        """Return the error that this node cannot be compiled."""
        return refusal(self.node, why)

    def compute(self, function: Callable[..., Any], *operands: Operand, elementwise: bool = False) -> Variable:
        """Compute what `function` describes in tensor expressions of the operands.

        Args:
            function: takes a tensor for each operand; returns one tensor.
            operands: known ones of one element are written into the code, others into the library's constants.
            elementwise: TVM may fuse it with what comes before, although an element's address depends on data.
        """
        fixed = {at: _scalar(one) for at, one in enumerate(operands) if isinstance(one, np.ndarray) and one.size == 1}
        if len(fixed) == len(operands):
            fixed.pop(0)
        passed = [expression_of(one) for at, one in enumerate(operands) if at not in fixed]

        def described(*tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            return function(*(fixed[at] if at in fixed else next(rest) for at in range(len(operands))))

        result = self._builder.emit_te(
            described,
            *passed,
            primfunc_name_hint=re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.node.op_type).lower(),
            primfunc_attrs={"op_pattern": 0} if elementwise else None,
        )
        return _variable(result)

    def elementwise(self, function: Callable[..., Element], *operands: Operand) -> Variable:
        """Compute elements from one element of each operand, broadcast."""
        return self.compute(lambda *tensors: broadcast(function, *tensors), *operands)

    def reshaped(self, operand: Operand, shape: Sequence[int]) -> Operand:
        """Return an operand in another shape."""
        from tvm import relax

        if isinstance(operand, np.ndarray):
            return operand.reshape(shape)
        return _variable(self._builder.emit(relax.op.reshape(operand.expression, tuple(shape))))


def _scalar(array: np.ndarray) -> Scalar:
    return Scalar(array.item(), str(array.dtype), array.shape)


def expression_of(operand: Operand) -> Any:
    """Return an operand as an expression of Relax."""
    from tvm import relax

    # Without a type, TVM narrows 64-bit integers.
    return relax.const(operand, str(operand.dtype)) if isinstance(operand, np.ndarray) else operand.expression


def _variable(expression: Any) -> Variable:
    return Variable(expression, dims(expression.ty), str(expression.ty.dtype))
