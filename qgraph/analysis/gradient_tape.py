"""Writing the nodes of a gradient behind those of a graph: what the rules of the operators share.

A cotangent of a value x is d(sum v*y)/dx: it has the shape and the element type of x. Shapes that are not known before
the model runs are computed by the graph itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes
from qgraph.analysis.symbols import Dim

__all__ = ["Attribute", "Call", "Rule", "Tape", "UncoveredError"]

Attribute: TypeAlias = int | float | str | Sequence[int] | ir.Attr


class UncoveredError(Exception):
    """The reason why there is no gradient of a node."""


class Tape:
    """Appends nodes to the main graph of a model.

    Args:
        model: is changed.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.opset = model.graph.opset_imports.get("", 0)
        self._shapes = Shapes(model).run()
        self._constants: dict[tuple[object, ...], ir.Value] = {}
        self._shape_of: dict[ir.Value, ir.Value] = {}

    # --- what is known of values --------------------------------------------------------------------------------------

    def dtype(self, value: ir.Value) -> ir.DataType:
        """Return the element type of a value; float32 where nothing is known."""
        return self._shapes.dtype(value) or value.dtype or ir.DataType.FLOAT

    def dims(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """Return the shape of a value of the model, or None if not even its rank is known."""
        return self._shapes.dims(value)

    def rank(self, value: ir.Value) -> int:
        """Return the rank of a value of the model.

        Raises:
            UncoveredError: it is not known.
        """
        dims = self.dims(value)
        if dims is None:
            raise UncoveredError(f"the rank of '{value.name}' is not known")
        return len(dims)

    def sizes(self, value: ir.Value) -> tuple[int, ...] | None:
        """Return the shape of a value of the model if all of it is known."""
        dims = self.dims(value)
        if dims is None:
            return None
        known = tuple(dim for dim in dims if isinstance(dim, int))
        return known if len(known) == len(dims) else None

    def known_integers(self, value: ir.Value | None) -> list[int] | None:
        """Return the elements of a vector of integers, such as axes, if all are known."""
        data = self._shapes.data(value)
        if data is None or not all(isinstance(element, int) for element in data.elements):
            return None
        return [int(element) for element in data.elements if isinstance(element, int)]

    # --- nodes --------------------------------------------------------------------------------------------------------

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        attributes: Mapping[str, Attribute] | None = None,
        **more: Attribute,
    ) -> ir.Value:
        """Append a node with one output, of the type of its first input unless said otherwise, and return that."""
        return self.ops(op_type, 1, *inputs, dtype=dtype, attributes=attributes, **more)[0]

    def ops(
        self,
        op_type: str,
        count: int,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        attributes: Mapping[str, Attribute] | None = None,
        **more: Attribute,
    ) -> Sequence[ir.Value]:
        """Append a node with `count` outputs and return them."""
        node = ir.node(op_type, inputs, {**(attributes or {}), **more}, num_outputs=count)
        node.name = qgraph.ir.fresh_name(self.graph, f"gradient_{op_type}")
        for index, output in enumerate(node.outputs):
            output.name = qgraph.ir.fresh_name(self.graph, f"{node.name}_{index}")
            if dtype is not None or (inputs and inputs[0] is not None):
                output.dtype = dtype if dtype is not None else self.dtype(inputs[0])  # type: ignore[arg-type]
        self.graph.append(node)
        return node.outputs

    def constant(self, array: np.ndarray) -> ir.Value:
        """Return an initializer, the same one for equal arrays."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = qgraph.ir.initializer(self.graph, "gradient_constant", array)
        return self._constants[key]

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """Return a vector of int64."""
        return self.constant(np.asarray(numbers, np.int64))

    def number(self, number: float, like: ir.Value) -> ir.Value:
        """Return a scalar of the type of `like`."""
        return self.constant(np.asarray(number, self.dtype(like).numpy()))

    def add(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Return one + other."""
        return self.op("Add", one, other)

    def sub(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Return one - other."""
        return self.op("Sub", one, other)

    def mul(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Return one * other."""
        return self.op("Mul", one, other)

    def div(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Return one / other."""
        return self.op("Div", one, other)

    def scale(self, value: ir.Value, factor: float) -> ir.Value:
        """Return factor * value."""
        return value if factor == 1.0 else self.mul(value, self.number(factor, value))

    def plus(self, value: ir.Value, term: float) -> ir.Value:
        """Return value + term."""
        return self.add(value, self.number(term, value))

    def mask(self, condition: ir.Value, like: ir.Value) -> ir.Value:
        """Return 1 where a condition holds and 0 elsewhere, in the type of `like`."""
        return self.op("Cast", condition, dtype=self.dtype(like), to=int(self.dtype(like)))

    def compare(self, op_type: str, value: ir.Value, number: float) -> ir.Value:
        """Return the mask of Greater, Less and so on between a value and a number, in the type of the value."""
        condition = self.op(op_type, value, self.number(number, value), dtype=ir.DataType.BOOL)
        return self.mask(condition, value)

    def sum(self, value: ir.Value, axes: Sequence[int] | ir.Value, *, keep: bool = True) -> ir.Value:
        """Return the sum over axes; over none where the list is empty."""
        chosen = axes if isinstance(axes, ir.Value) else self.ints(axes)
        return self.op("ReduceSum", value, chosen, keepdims=int(keep), noop_with_empty_axes=1)

    def mean(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Return the mean over axes, which stay with size 1."""
        if self.opset < 18:
            return self.op("ReduceMean", value, axes=list(axes), keepdims=1)
        return self.op("ReduceMean", value, self.ints(axes), keepdims=1)

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        """Return `value` with its axes in another order."""
        return self.op("Transpose", value, perm=list(perm))

    def reshape(self, value: ir.Value, shape: ir.Value | Sequence[int]) -> ir.Value:
        """Return `value` in another shape; 0 copies a size, -1 takes what is left."""
        return self.op("Reshape", value, shape if isinstance(shape, ir.Value) else self.ints(shape))

    # --- shapes at run time -------------------------------------------------------------------------------------------

    def shape(self, value: ir.Value) -> ir.Value:
        """Return the shape of a value, a constant where it is known."""
        if value not in self._shape_of:
            sizes = self.sizes(value)
            self._shape_of[value] = (
                self.ints(sizes) if sizes is not None else self.op("Shape", value, dtype=ir.DataType.INT64)
            )
        return self._shape_of[value]

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the size of one axis as a vector of one int64."""
        return self.op("Gather", self.shape(value), self.ints([axis]))

    def share(self, part: ir.Value, whole: ir.Value, like: ir.Value) -> ir.Value:
        """Return how many elements `part` has for each of `whole`, a scalar of the type of `like`."""
        sizes = self.sizes(part), self.sizes(whole)
        if sizes[0] is not None and sizes[1] is not None:
            return self.number(math.prod(sizes[0]) / max(1, math.prod(sizes[1])), like)
        counts = [self.op("Size", value, dtype=ir.DataType.INT64) for value in (part, whole)]
        single = ir.DataType.FLOAT
        reals = [self.op("Cast", count, dtype=single, to=int(single)) for count in counts]
        return self.op("Cast", self.div(*reals), dtype=self.dtype(like), to=int(self.dtype(like)))

    def joined(self, *parts: ir.Value) -> ir.Value:
        """Return vectors one after the other."""
        return self.op("Concat", *parts, axis=0)

    def expand(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Broadcast to the shape of `like`."""
        return self.op("Expand", value, self.shape(like))

    def expand_to(self, value: ir.Value, shape: ir.Value) -> ir.Value:
        """Broadcast to a shape."""
        return self.op("Expand", value, shape)

    def zeros(self, shape: ir.Value, like: ir.Value) -> ir.Value:
        """Return zeros of a shape in the type of `like`."""
        zero = ir.Attr("value", ir.AttributeType.TENSOR, ir.tensor(np.zeros(1, self.dtype(like).numpy())))
        return self.op("ConstantOfShape", shape, dtype=self.dtype(like), value=zero)

    def reduce_to(self, cotangent: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        """Sum a cotangent in the shape of `y` over the axes along which `x` was broadcast to it."""
        before, after = self.dims(x), self.dims(y)
        if before is not None and after is not None and len(before) <= len(after):
            axes = _broadcast_axes(before, after)
            if axes is not None:
                summed = self.sum(cotangent, axes) if axes else cotangent
                return summed if len(before) == len(after) else self.reshape(summed, self.shape(x))
        return self._reduce_at_run_time(cotangent, x)

    def _reduce_at_run_time(self, cotangent: ir.Value, x: ir.Value) -> ir.Value:
        small, large = self.shape(x), self.shape(cotangent)
        lacking = self.sub(self.op("Shape", large), self.op("Shape", small))
        ones = ir.Attr("value", ir.AttributeType.TENSOR, ir.tensor(np.ones(1, np.int64)))
        padded = self.joined(self.op("ConstantOfShape", lacking, dtype=ir.DataType.INT64, value=ones), small)
        same = self.op("Equal", padded, large, dtype=ir.DataType.BOOL)
        differ = self.op("Cast", self.op("Not", same), dtype=ir.DataType.INT64, to=int(ir.DataType.INT64))
        axes = self.reshape(self.op("NonZero", differ), [-1])
        return self.reshape(self.sum(cotangent, axes), small)

    def scattered(
        self, x: ir.Value, cotangent: ir.Value, move: Callable[[ir.Value], ir.Value], *, repeats: bool = True
    ) -> ir.Value:
        """Return the cotangent of x for an operator that only moves elements, by moving their numbers.

        Args:
            x: what is moved.
            cotangent: of what came out.
            move: applies the operator to the numbers (int64, counted from 0) of the elements of x.
            repeats: an element may come out more than once.
        """
        total = self.op("Size", x, dtype=ir.DataType.INT64)
        zero, one = (self.constant(np.asarray(number, np.int64)) for number in (0, 1))
        numbers = self.reshape(self.op("Range", zero, total, one), self.shape(x))
        moved = self.reshape(move(numbers), [-1])
        empty = self.zeros(self.reshape(total, [1]), cotangent)
        attributes: dict[str, Attribute] = {"reduction": "add"} if repeats else {}
        flat = self.op("ScatterElements", empty, moved, self.reshape(cotangent, [-1]), axis=0, attributes=attributes)
        return self.reshape(flat, self.shape(x))


def _broadcast_axes(before: Sequence[Dim], after: Sequence[Dim]) -> list[int] | None:
    """Return the axes along which a shape was broadcast to another, or None where that is not known."""
    lead = len(after) - len(before)
    axes = list(range(lead))
    for axis, (small, large) in enumerate(zip(before, after[lead:], strict=True), start=lead):
        if small == large or (isinstance(small, int) and small > 1):
            continue
        if small != 1:
            return None
        axes.append(axis)
    return axes


@dataclasses.dataclass(frozen=True)
class Call:
    """A node whose gradient is asked for.

    Attributes:
        tape: where the gradient is written.
        node: of the model.
        cotangents: of its outputs; None where nothing depends on one.
        wanted: the inputs whose cotangents are needed.
    """

    tape: Tape
    node: ir.Node
    cotangents: Sequence[ir.Value | None]
    wanted: frozenset[int]

    @property
    def g(self) -> ir.Value:
        """The cotangent of the first output.

        Raises:
            UncoveredError: only other outputs matter.
        """
        if self.cotangents[0] is None or any(one is not None for one in self.cotangents[1:]):
            raise UncoveredError(f"more than the first output of {self.node.op_type} matters")
        return self.cotangents[0]

    @property
    def y(self) -> ir.Value:
        """The first output."""
        return self.node.outputs[0]

    def x(self, index: int = 0) -> ir.Value:
        """Return an input that the operator always has."""
        value = self.node.inputs[index]
        assert value is not None
        return value

    def optional(self, index: int) -> ir.Value | None:
        """Return an input that may be left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def integer(self, name: str, default: int) -> int:
        """Return an attribute."""
        return int(self.node.attributes.get_int(name, default))

    def real(self, name: str, default: float) -> float:
        """Return an attribute."""
        return float(self.node.attributes.get_float(name, default))

    def text(self, name: str, default: str) -> str:
        """Return an attribute."""
        return str(self.node.attributes.get_string(name, default))

    def integers(self, name: str) -> list[int] | None:
        """Return an attribute, or None."""
        found = self.node.attributes.get_ints(name, None)
        return None if found is None else [int(one) for one in found]

    def again(self, *inputs: ir.Value | None) -> ir.Value:
        """Apply the same operator, with the same attributes, to other inputs."""
        return self.tape.op(self.node.op_type, *inputs, attributes=dict(self.node.attributes))


Rule: TypeAlias = Callable[[Call], Mapping[int, ir.Value]]
"""Returns the cotangents of inputs by index, of those that are wanted at least; may raise `UncoveredError`."""
