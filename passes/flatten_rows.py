"""Activations as matrices of rows, so that a product and what is added to it can be one Gemm.

    z = Add(MatMul(x, W), c)     x [..., rows, k], W [k, n]; c [n], or as large as the product
    =>
    z = Reshape(Add(MatMul(Reshape(x, [-1, k]), W), c or Reshape(c, [-1, n])), [..., rows, n])

What reads only z and works row by row (a normalization over the last axis, an elementwise function, another product or
sum) is written for the rows too, so that activations are reshaped where a region of such nodes starts, and again only
for those who read them otherwise: attention, the outputs of the graph. A Reshape moves no element. `matmul-add-to-gemm`
then joins products and sums: ONNX Runtime's Gemm starts from what is to be added instead of going over the product
once more. The same values to the last bit, but for the order in which Gemm adds.

It does not fire in subgraphs, for other types than float32, where shapes are not known, where W is computed, for
products to which nothing is added, and for what may be empty before opset 14, whose Reshape makes no axis of size 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.analysis.symbols import Dim
from qgraph.passes._rules import discard_unread, matrix_dims
from qgraph.pipeline import Context, Pass, Report

__all__ = ["FlattenRows"]

_ELEMENTWISE = ("Erf", "Gelu", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh")
_BROADCASTING = ("Add", "Mul", "Sub", "Sum")
_NORMS = ("LayerNormalization", "RMSNormalization")
_SIZES_OF_ZERO_SINCE = 14
"""The first opset whose Reshape can be told that a size of 0 is one, and not that of another axis."""
_INT64 = ir.TensorType(ir.DataType.INT64)

Dims: TypeAlias = tuple[Dim, ...]


@dataclass(frozen=True)
class FlattenRows(Pass):
    """Write products with constant matrices, and what stands around them, for matrices of rows."""

    name: ClassVar[str] = "flatten-rows"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Write for rows every region that has a product to which something is added."""
        rows = _Rows(model.graph, context.analyse(shapes_of, model))
        written = sum([rows.write(node) for node in list(model.graph)])
        return Report(written, notes=[f"{written} nodes work on matrices of rows"] if written else [])


@dataclass
class _Rows:
    graph: ir.Graph
    shapes: Shapes
    _matrices: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """Values, and the matrices of their rows."""
    _whole: dict[ir.Value, Dims] = field(default_factory=dict)
    """What is made of matrices again, which analyses do not know."""
    _sizes: dict[Dims, ir.Value] = field(default_factory=dict)
    """Shapes, and the values that hold them."""

    def write(self, node: ir.Node) -> bool:
        """Write a node for matrices of rows, if it is one of a region; tell whether it was."""
        dims = self._dims(node.outputs[0]) if node.outputs else None
        if dims is None or not self._goes_by_rows(node, dims):
            return False
        may_be_empty = not all(isinstance(dim, int) and dim > 0 for dim in dims)
        if may_be_empty and self.graph.opset_imports.get("", 0) < _SIZES_OF_ZERO_SINCE:
            return False
        size = self._size(dims, node)
        inputs = [self._matrix(value, node) if self._is_whole(value) else value for value in node.inputs]
        axis = {"axis": -1} if qgraph.ir.is_op(node, *_NORMS) else {}
        attributes = {**node.attributes, **{name: ir.AttrInt64(name, number) for name, number in axis.items()}}
        matrix = ir.Node("", node.op_type, inputs, attributes.values(), name=node.name)
        matrix.metadata_props.update(node.metadata_props)
        output, above = node.outputs[0], list(node.inputs)
        matrix.outputs[0].name = qgraph.ir.fresh_name(self.graph, f"{output.name}_rows")
        matrix.outputs[0].type = output.type
        back = ir.node("Reshape", [matrix.outputs[0], size], {"allowzero": 1} if may_be_empty else {})
        back.name = qgraph.ir.fresh_name(self.graph, f"{output.name}_whole")
        qgraph.ir.replace_node(node, [matrix, back])
        self._whole[back.outputs[0]], self._matrices[back.outputs[0]] = dims, matrix.outputs[0]
        for value in above:
            discard_unread(value)
        return True

    def _dims(self, value: ir.Value) -> Dims | None:
        """Return the shape of a float32 value of three axes or more whose last one has a known size, or None."""
        if value in self._whole:
            return self._whole[value]
        dims = self.shapes.dims(value)
        if dims is None or len(dims) < 3 or not isinstance(dims[-1], int) or dims[-1] < 1:
            return None
        return tuple(dims) if self.shapes.dtype(value) == ir.DataType.FLOAT else None

    def _is_whole(self, value: ir.Value | None) -> bool:
        return value is not None and value.const_value is None and self._dims(value) is not None

    def _goes_by_rows(self, node: ir.Node, dims: Dims) -> bool:
        """Tell whether a node starts a region, or reads rows of one and treats each alike."""
        used = [value for value in node.inputs if value is not None]
        if any(output.is_graph_output() or (place and output.uses()) for place, output in enumerate(node.outputs)):
            return False
        if _is_product(node):
            return used[0] in self._matrices or (self._is_whole(used[0]) and self._is_added_to(node, dims))
        if not any(value in self._matrices for value in used):
            return False
        if not all(self._dims(value) == dims if self._is_whole(value) else _fits(value, dims) for value in used):
            return False
        if qgraph.ir.is_op(node, *_NORMS):
            return used[0] in self._matrices and node.attributes.get_int("axis", -1) in (-1, len(dims) - 1)
        return qgraph.ir.is_op(node, *_ELEMENTWISE, *_BROADCASTING)

    def _is_added_to(self, product: ir.Node, dims: Dims) -> bool:
        """Tell whether the only reader of a product adds a bias to it, or another value as large."""
        add = qgraph.ir.only_consumer(product.outputs[0])
        if not qgraph.ir.is_op(add, "Add") or add is None or add.graph is not self.graph:
            return False
        if add.inputs[0] is add.inputs[1] or add.outputs[0].is_graph_output():
            return False
        other = add.inputs[1] if add.inputs[0] is product.outputs[0] else add.inputs[0]
        return other is not None and (_fits(other, dims) or (self._is_whole(other) and self._dims(other) == dims))

    def _matrix(self, value: ir.Value | None, before: ir.Node) -> ir.Value:
        """Return the rows of a value, which a Reshape makes where no node of the region did."""
        assert value is not None
        dims = self._dims(value)
        assert dims is not None
        if value not in self._matrices:
            shape = self._constant(f"rows_of_{dims[-1]}", [-1, dims[-1]])
            self._matrices[value] = self._insert(before, "Reshape", [value, shape], f"{value.name}_rows", value.type)
        return self._matrices[value]

    def _size(self, dims: Dims, node: ir.Node) -> ir.Value:
        """Return the shape of a node's output, whose axes but the last are those of its inputs."""
        if dims not in self._sizes:
            if all(isinstance(dim, int) for dim in dims):
                self._sizes[dims] = self._constant(f"{node.outputs[0].name}_size", list(dims))
            else:
                self._sizes[dims] = self._computed_size(dims, node)
        return self._sizes[dims]

    def _computed_size(self, dims: Dims, node: ir.Node) -> ir.Value:
        whole = next(value for value in node.inputs if self._is_whole(value))
        assert whole is not None
        name = f"{node.outputs[0].name}_size"
        sizes = self._insert(node, "Shape", [whole], f"{name}_given", _INT64)
        zero, end = self._constant("first_axis", [0]), self._constant("last_axis", [-1])
        leading = self._insert(node, "Slice", [sizes, zero, end], f"{name}_leading", _INT64)
        last = self._constant(f"rows_of_{dims[-1]}_width", [dims[-1]])
        return self._insert(node, "Concat", [leading, last], name, _INT64, axis=0)

    def _constant(self, name: str, numbers: Sequence[Dim]) -> ir.Value:
        existing = self.graph.initializers.get(name)
        array = np.array(numbers, np.int64)
        stored = qgraph.ir.constant(existing)
        if existing is not None and stored is not None and np.array_equal(stored, array):
            return existing
        return qgraph.ir.initializer(self.graph, name, array)

    def _insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        dtype: ir.TypeProtocol | None,
        **attributes: int,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.name = node.outputs[0].name = qgraph.ir.fresh_name(self.graph, name)
        node.outputs[0].type = dtype
        qgraph.ir.insert_before(before, node)
        return node.outputs[0]


def _is_product(node: ir.Node) -> bool:
    """Tell whether a node multiplies by a constant matrix."""
    return qgraph.ir.is_op(node, "MatMul") and matrix_dims(node.inputs[1]) is not None


def _fits(value: ir.Value, dims: Dims) -> bool:
    """Tell whether a constant has one number for all, or one for each element of the last axis."""
    stored = value.const_value
    if stored is None or value.is_graph_input():
        return False
    shape = tuple(stored.shape.numpy())
    return shape in ((), (1,), (dims[-1],))
