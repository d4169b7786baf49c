"""Types, shapes and small values of everything in a graph, with sizes that may be symbolic.

The graph is gone through once, in order. What an operator's rule (`shape_movement`, `shape_compute`) does not tell,
onnx's own inference for one node may. Nothing here runs the model or reads its weights, and nothing raises: a value
that stays without a shape has its reason in `Shapes.reasons`.

Only the shapes of the graph's inputs and of its weights are taken as true. What a file says of the shapes in between
is used for their rank at most: exporters write sizes there that hold for their example only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.shape_inference
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis import integer_functions, shape_compute, shape_movement, symbols
from qgraph.analysis.shape_facts import RULES, Data, Dims, Fact, UnknownShapeError
from qgraph.numerics import operators
from qgraph.pipeline import Context

__all__ = ["SMALL", "Shapes", "attribute_values", "shapes_of"]

SMALL = 1024
"""Tensors of at most this many elements are computed when all inputs are known."""
_MOST_DATA = 64
"""Elements are followed symbolically up to this many: shapes are no longer."""
_NESTED_TRIALS = 3
_LARGEST_SIZE = (1 << 63) - 1

_RULE_MODULES = (integer_functions, shape_compute, shape_movement)
"""Imported for the rules that they register."""

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
"""Types of which the rules follow elements."""

_FAULTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What reading a malformed node raises."""


def shapes_of(model: ir.Model, context: Context) -> Shapes:
    """Return what is known of the values of `model`; for `Context.analyse`."""
    del context
    return Shapes(model).run()


class Shapes:
    """What is known of the values of a model.

    Args:
        model: is read, not changed.
        visited: called after each node, once everything about its outputs is known; may replace or remove the node.

    Attributes:
        reasons: values without a shape, or computed by a node that does not fit its inputs -> why.
    """

    def __init__(self, model: ir.Model, visited: Callable[[ir.Node], None] | None = None) -> None:
        self.reasons: dict[ir.Value, str] = {}
        self._model = model
        self._visited = visited
        self._facts: dict[ir.Value, Fact] = {}
        self._arrays: dict[ir.Value, np.ndarray | None] = {}
        self._trials = 0

    def run(self) -> Shapes:
        """Go through the main graph and its subgraphs."""
        for value in self._model.graph.inputs:
            self._facts[value] = Fact(value.dtype, self._named(value, _declared(value)))
        self._graph(self._model.graph)
        return self

    def dims(self, value: ir.Value) -> Dims | None:
        """Return the shape of a value, or None if not even its rank is known."""
        fact = self._fact(value)
        return fact.dims if fact is not None else None  # type: ignore[return-value]

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type of a value."""
        fact = self._fact(value) if value is not None else None
        return fact.dtype if fact is not None and fact.dtype != ir.DataType.UNDEFINED else None

    def data(self, value: ir.Value | None) -> Data | None:
        """Return the elements of a small integer or boolean tensor of rank 0 or 1, symbolic ones included."""
        if value is None:
            return None
        array = self.array(value)
        if array is None:
            fact = self._fact(value)
            return fact.data if fact is not None else None
        if array.dtype.kind not in "biu" or array.ndim > 1 or array.size > _MOST_DATA:
            return None
        return Data(tuple(int(element) for element in array.reshape(-1)), array.ndim == 0)

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """Return a small tensor if all its elements are known."""
        if value is None:
            return None
        if value not in self._arrays:
            self._arrays[value] = self._constant(value)
        return self._arrays[value]

    def _constant(self, value: ir.Value) -> np.ndarray | None:
        tensor = value.const_value
        if qgraph.ir.is_op(value.producer(), "Constant"):
            tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or value.is_graph_input() or tensor.size > SMALL or tensor.dtype == ir.DataType.STRING:
            return None
        return np.asarray(tensor.numpy())

    def _fact(self, value: ir.Value) -> Fact | None:
        fact = self._facts.get(value)
        if fact is None and value.const_value is not None:
            tensor = value.const_value
            fact = self._facts[value] = Fact(tensor.dtype, tuple(int(dim) for dim in tensor.shape.numpy()))
        return fact

    # --- going through the graph -------------------------------------------------------------------------------------

    def _graph(self, graph: ir.Graph) -> None:
        for node in graph:
            self._node(node)
            if self._visited is not None and not self._trials:
                self._visited(node)

    def _node(self, node: ir.Node) -> None:
        facts, reason = self._infer(node)
        for output, fact in itertools.zip_longest(node.outputs, facts[: len(node.outputs)]):
            dims = self._named(output, fact.dims if fact is not None else None)
            if dims is None:
                dims = self._named(output, _rank_only(output))
                self.reasons[output] = reason or "its operator tells no shape for this output"
            data = fact.data if fact is not None and fact.data is not None else None
            if data is not None and len(data.elements) > _MOST_DATA:
                data = None
            dtype = fact.dtype if fact is not None and fact.dtype is not None else output.dtype
            self._facts[output] = Fact(dtype, dims, data)
            self._arrays[output] = _as_array(data, dtype) if data is not None else self._constant(output)
        self._compute(node)

    def _infer(self, node: ir.Node) -> tuple[Sequence[Fact | None], str]:
        """Return what is known of the outputs, and the reason why nothing is."""
        rule = RULES.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
        special = _SPECIAL.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        try:
            if special is not None:
                return special(self, node), ""
            if rule is not None:
                return rule(node, self), ""
            return self._by_onnx(node), ""
        except UnknownShapeError as error:
            return [], str(error)
        except _FAULTS as error:
            return [], f"it does not fit its inputs ({error})"

    def _named(self, value: ir.Value, dims: Sequence[Any] | None) -> Dims | None:
        """Give every unknown size a name of its own: two values may share it later."""
        if dims is None:
            return None
        if any(isinstance(dim, int) and not 0 <= dim <= _LARGEST_SIZE for dim in dims):
            self.reasons[value] = "it would have an impossible size"
            return None
        name = value.name or "value"
        return tuple(symbols.symbol(f"{name}.{axis}") if dim is None else dim for axis, dim in enumerate(dims))

    def _compute(self, node: ir.Node) -> None:
        """Compute the outputs of a node whose inputs are small and known."""
        if node.domain not in ("", "ai.onnx") or not node.inputs or not operators.is_known(node.op_type):
            return
        inputs: list[np.ndarray | None] = []
        for value in node.inputs:
            array = self.array(value)
            if array is None and value is not None:
                return
            inputs.append(array)
        if not all(self._is_small(output) for output in node.outputs):
            return
        try:
            arrays = operators.evaluate(node.op_type, attribute_values(node), inputs)
        except (operators.NotFoldedError, UnknownShapeError):
            return
        for output, array in zip(node.outputs, arrays, strict=False):
            if array.size <= SMALL:
                dtype = ir.DataType.from_numpy(array.dtype)
                self._arrays[output] = array
                self._facts[output] = Fact(dtype, array.shape)

    def _is_small(self, value: ir.Value) -> bool:
        dims = self.dims(value)
        if dims is None:
            return False
        sizes = [dim for dim in dims if isinstance(dim, int)]
        return len(sizes) == len(dims) and math.prod(sizes) <= SMALL

    # --- constants, control flow -------------------------------------------------------------------------------------

    def _constant_node(self, node: ir.Node) -> Sequence[Fact | None]:
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        if tensor is None:
            raise UnknownShapeError("its value cannot be read")
        return [Fact(tensor.dtype, tuple(int(dim) for dim in tensor.shape.numpy()))]

    def _if(self, node: ir.Node) -> Sequence[Fact | None]:
        branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        for branch in branches:
            self._graph(branch)
        one, other = ([self._fact(value) for value in branch.outputs] for branch in branches)
        condition = self.array(node.inputs[0])
        if condition is not None and condition.size == 1:
            return one if condition.item() else other
        return [_either(a, b) for a, b in zip(one, other, strict=True)]

    def _loop(self, node: ir.Node) -> Sequence[Fact | None]:
        body = node.attributes["body"].as_graph()
        iteration, condition, *carried = body.inputs
        self._facts[iteration] = Fact(ir.DataType.INT64, ())
        self._facts[condition] = Fact(ir.DataType.BOOL, ())
        states = self._iterate(body, carried, node.inputs[2:], body.outputs[1:])
        stacked = [self._fact(value) for value in body.outputs[1 + len(carried) :]]
        return [*states, *(_stacked(fact, None) for fact in stacked)]

    def _scan(self, node: ir.Node) -> Sequence[Fact | None]:
        body = node.attributes["body"].as_graph()
        scanned = node.attributes.get_int("num_scan_inputs", 0)
        count = len(node.inputs) - scanned
        axes = node.attributes.get_ints("scan_input_axes", [0] * scanned)
        length = None
        for value, inner, axis in zip(node.inputs[count:], body.inputs[count:], axes, strict=True):
            dims = self.dims(value) if value is not None else None
            rest = None
            if dims is not None:
                at = axis + len(dims) if axis < 0 else axis
                length, rest = dims[at], dims[:at] + dims[at + 1 :]
            self._facts[inner] = Fact(self.dtype(value), rest)
        states = self._iterate(body, body.inputs[:count], node.inputs[:count], body.outputs)
        at_front = not any(node.attributes.get_ints("scan_output_axes", []))
        stacked = [self._fact(value) for value in body.outputs[count:]]
        return [*states, *(_stacked(fact, length) if at_front else _typed(fact) for fact in stacked)]

    def _iterate(
        self,
        body: ir.Graph,
        inner: Sequence[ir.Value],
        initial: Sequence[ir.Value | None],
        results: Sequence[ir.Value],
    ) -> list[Fact | None]:
        """Go through a loop's body, with shapes of the carried values that every iteration keeps; return these."""
        carried = [Fact(self.dtype(value), self.dims(value) if value is not None else None) for value in initial]
        for attempt in range(2):
            if self._trials >= _NESTED_TRIALS or attempt:
                carried = [Fact(fact.dtype, None) for fact in carried]
            self._facts.update(zip(inner, carried, strict=True))
            self._trials += 1
            self._graph(body)
            self._trials -= 1
            after = [self._fact(value) for value in results[: len(carried)]]
            if all(a is not None and (b.dims is None or a.dims == b.dims) for a, b in zip(after, carried, strict=True)):
                break
        if self._visited is not None and not self._trials:
            self._graph(body)
        return list(carried)

    def _with_unknown_bodies(self, node: ir.Node) -> None:
        for graph in qgraph.ir.inner_graphs(node):
            for value in graph.inputs:
                self._facts[value] = Fact(value.dtype, self._named(value, _rank_only(value)))
            self._graph(graph)

    # --- onnx --------------------------------------------------------------------------------------------------------

    def _by_onnx(self, node: ir.Node) -> Sequence[Fact | None]:
        """Ask onnx about one node."""
        if qgraph.ir.inner_graphs(node):
            self._with_unknown_bodies(node)
            raise UnknownShapeError("its subgraphs are not followed")
        version = self._model.graph.opset_imports.get(node.domain)
        if version is None or not onnx.defs.has(node.op_type, node.domain):
            raise UnknownShapeError(f"{node.domain or 'onnx'}.{node.op_type} is not a standard operator")
        if _might_crash(node):
            raise UnknownShapeError("its attributes are out of range")
        names: dict[str, symbols.Dim] = {}
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for value in node.inputs:
            if value is None or value.name is None:
                continue
            types[value.name] = self._type_proto(value, names)
            array = self.array(value)
            if array is not None:
                data[value.name] = ir.to_proto(ir.tensor(array, name=value.name))
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
            opsets = [onnx.helper.make_opsetid(domain, number) for domain, number in self._opsets().items()]
            found = onnx.shape_inference.infer_node_outputs(
                schema, ir.to_proto(node), types, data, opset_imports=opsets, ir_version=self._model.ir_version
            )
        except Exception as error:
            raise UnknownShapeError(f"onnx cannot tell ({str(error).splitlines()[0][:120]})") from error
        return [_from_type(found.get(output.name or ""), names) for output in node.outputs]

    def _opsets(self) -> Mapping[str, int]:
        return self._model.graph.opset_imports

    def _type_proto(self, value: ir.Value, names: dict[str, symbols.Dim]) -> onnx.TypeProto:
        dtype, dims = self.dtype(value), self.dims(value)
        proto = onnx.TypeProto()
        if dtype is None:
            if value.type is None:
                raise UnknownShapeError(f"the type of its input '{value.name}' is not known")
            ir.serde.serialize_type_into(proto, value.type)
            return proto
        proto.tensor_type.elem_type = int(dtype)
        for dim in dims or ():
            if isinstance(dim, int):
                proto.tensor_type.shape.dim.add(dim_value=dim)
            else:
                proto.tensor_type.shape.dim.add(dim_param=str(dim))
                names[str(dim)] = dim
        if dims is not None:
            proto.tensor_type.shape.SetInParent()
        return proto


_SPECIAL: Mapping[str, Callable[[Shapes, ir.Node], Sequence[Fact | None]]] = {
    "Constant": Shapes._constant_node,  # noqa: SLF001 - of this module
    "If": Shapes._if,  # noqa: SLF001
    "Loop": Shapes._loop,  # noqa: SLF001
    "Scan": Shapes._scan,  # noqa: SLF001
}

_NOT_ZERO = {"blocksize", "block_size", "dilations", "group", "kernel_shape", "num_groups", "num_heads", "strides"}


def _might_crash(node: ir.Node) -> bool:
    """Tell whether an attribute that onnx divides by is not positive."""
    for name in _NOT_ZERO & set(node.attributes):
        attribute = node.attributes[name]
        if attribute.is_ref():
            return True
        numbers = attribute.as_ints() if attribute.type == ir.AttributeType.INTS else [attribute.as_int()]
        if min(numbers, default=1) < 1:
            return True
    return False


def _from_type(proto: onnx.TypeProto | None, names: Mapping[str, symbols.Dim]) -> Fact | None:
    if proto is None or not proto.HasField("tensor_type"):
        return None
    dtype = ir.DataType(proto.tensor_type.elem_type) if proto.tensor_type.elem_type else None
    if not proto.tensor_type.HasField("shape"):
        return Fact(dtype, None)
    dims = proto.tensor_type.shape.dim
    return Fact(dtype, tuple(d.dim_value if d.HasField("dim_value") else names.get(d.dim_param) for d in dims))


def _as_array(data: Data, dtype: ir.DataType | None) -> np.ndarray | None:
    """Return elements as an array if all are known numbers of the type."""
    if dtype not in _INTEGERS or not all(isinstance(element, int) for element in data.elements):
        return None
    try:
        array = np.array(data.elements, dtype=dtype.numpy())
    except OverflowError:
        return None
    return array.reshape(()) if data.scalar else array


def _declared(value: ir.Value) -> list[symbols.Dim | None] | None:
    """Return the shape of a graph input as the file says it."""
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else symbols.declared(dim.value) if dim.value else None for dim in value.shape]


def _rank_only(value: ir.Value) -> list[None] | None:
    return None if value.shape is None else [None] * len(value.shape)


def _either(one: Fact | None, other: Fact | None) -> Fact | None:
    """Return what holds of both."""
    if one is None or other is None:
        return None
    dtype = one.dtype if one.dtype == other.dtype else None
    if one.dims is None or other.dims is None or len(one.dims) != len(other.dims):
        return Fact(dtype, None)
    dims = tuple(a if a == b else None for a, b in zip(one.dims, other.dims, strict=True))
    return Fact(dtype, dims, one.data if one.data == other.data else None)


def _stacked(fact: Fact | None, length: symbols.Dim | None) -> Fact | None:
    """Return what is known of one value of each iteration, put together along a new first axis."""
    if fact is None or fact.dims is None:
        return _typed(fact)
    return Fact(fact.dtype, (length, *fact.dims))


def _typed(fact: Fact | None) -> Fact | None:
    return None if fact is None else Fact(fact.dtype, None)


def attribute_values(node: ir.Node) -> dict[str, Any]:
    """Return the attributes of a node as plain values; tensors as arrays, graphs left out.

    Raises:
        UnknownShapeError: an attribute refers to one of the enclosing function.
    """
    values: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            raise UnknownShapeError(f"its attribute '{name}' is a parameter of the function")
        if attribute.type == ir.AttributeType.TENSOR:
            values[name] = attribute.as_tensor().numpy()
        elif attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            values[name] = attribute.value
    return values
