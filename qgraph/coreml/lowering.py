"""An ONNX model as a program of MIL: one function, `main`, of opset iOS 18.

Every operator has one rule, in one of the tables of its family; a rule writes a node with coremltools' builder, which
checks operands and infers types on its own. Types are those of the model, so that what `to-fp16` has left in float32
stays there; whole numbers have 32 bits. Inputs and outputs of the model are arrays of float32, float16 or int32 of at
least one axis, which is all that Core ML has: others are converted inside. An input that nobody reads is left out.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.coreml import control, elementwise, indexing, layers, movement, recurrent, reductions, weights
from qgraph.coreml.data_types import FROM_ONNX, MilType
from qgraph.coreml.names import Names
from qgraph.coreml.site import Rule, Site, UnfitError, mil_type, sizes
from qgraph.coreml.toolkit import Toolkit, toolkit
from qgraph.errors import UserError
from qgraph.pipeline import Skipped

__all__ = ["RULES", "Lowered", "Port", "lower", "unlowered"]

RULES: Mapping[str, Rule] = {
    name: rule
    for family in (elementwise, layers, reductions, movement, indexing, recurrent, control, weights)
    for name, rule in family.RULES.items()
}
"""Operator of ONNX's own domain -> how it is written in MIL."""

_MOST_AXES = 5
_NUMBER = re.compile(r"_\d+$")
_ARRAYS = (MilType.FLOAT16, MilType.FLOAT32, MilType.INT32)


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or an output: its name in the model and in the package, and its type and sizes in the model."""

    name: str
    feature: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program, and what its inputs and outputs are called."""

    program: Any
    inputs: Sequence[Port]
    outputs: Sequence[Port]

    def signature(self) -> str:
        """Return inputs and outputs as text, for the package's metadata."""
        ports = {"inputs": self.inputs, "outputs": self.outputs}
        return json.dumps({key: [dataclasses.asdict(one) for one in value] for key, value in ports.items()})


def unlowered(model: ir.Model) -> list[Skipped]:
    """Return the nodes that have no form in MIL for what is known without writing them, each with its reason."""
    return [
        Skipped(qgraph.ir.node_label(node), reason)
        for node in qgraph.ir.walk(model)
        if (reason := _unfit(node)) is not None
    ]


def _unfit(node: ir.Node) -> str | None:
    if node.domain not in ("", "ai.onnx") or node.op_type not in RULES:
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        hint = _HINTS.get(node.op_type, "write it in other operators, or compile for another target")
        return f"{operator} has no form in ML Programs: {hint}"
    try:
        if qgraph.ir.is_op(node, "DequantizeLinear") and weights.constant_weight(node) is not None:
            return None
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.name:
                mil_type(value)
                if len(sizes(value)) > _MOST_AXES:
                    return f"'{value.name}' has {len(sizes(value))} axes, and Core ML has at most {_MOST_AXES}"
    except UnfitError as error:
        return str(error)
    return None


_HINTS = {
    "Loop": "loops of a known length can be unrolled when the model is exported",
    "Scan": "loops of a known length can be unrolled when the model is exported",
    "MatMulNBits": "give the model with its weights behind DequantizeLinear",
    "NonZero": "the size of its result depends on the numbers",
    "NonMaxSuppression": "the size of its result depends on the numbers: cut the model before it",
}


def lower(model: ir.Model) -> Lowered:
    """Write a model as a program.

    Args:
        model: of static shapes, with types known; is not changed.

    Raises:
        UserError: coremltools is not installed, or a node has no form in MIL; the message names it.
    """
    return _Writer(toolkit(), model).write()


class _Writer:
    """Holds the function that is being written."""

    def __init__(self, tools: Toolkit, model: ir.Model) -> None:
        self._tools = tools
        self._model = model
        self._names = Names()
        self._vars: dict[ir.Value, Any] = {}
        self._constants: dict[tuple[ir.Value, tuple[int, ...]], Any] = {}
        self._scopes: list[set[tuple[ir.Value, tuple[int, ...]]]] = []
        self._own: set[Any] = set()

    def write(self) -> Lowered:
        """Write the main graph."""
        graph = self._model.graph
        read = [value for value in graph.inputs if value.const_value is None and _is_read(value)]
        if not read:
            raise UserError("no input of the model is read, so there is nothing that Core ML could compute")
        inputs = [self._port(value) for value in read]
        outputs = [self._port(value) for value in graph.outputs]
        types = self._tools.types
        given = {}
        for value, port in zip(read, inputs, strict=True):
            kind = _array_type(mil_type(value))
            given[port.feature] = self._tools.builder.placeholder(
                shape=port.shape or (1,), dtype=types.string_to_builtin(kind.value)
            )
        program = self._tools.program()
        with self._tools.function(given, opset_version=self._tools.opset) as function:
            for value, port in zip(read, inputs, strict=True):
                self._vars[value] = self._received(value, function.inputs[port.feature])
            self._write_nodes(graph)
            function.set_outputs(
                [self._sent(value, port.feature) for value, port in zip(graph.outputs, outputs, strict=True)]
            )
        self._name_defaults(function.operations)
        program.add_function("main", function)
        return Lowered(program, inputs, outputs)

    def _name_defaults(self, operations: Iterable[Any]) -> None:
        """Name the constants that the builder added for parameters: it counts through all programs of a process."""
        for operation in operations:
            for block in operation.blocks:
                self._name_defaults(block.operations)
            if operation.op_type == "const" and operation not in self._own:
                operation.name = self._names.fresh(_NUMBER.sub("", operation.name))
                operation.outputs[0].name = operation.name

    def _port(self, value: ir.Value) -> Port:
        name = value.name or ""
        try:
            mil_type(value)
            return Port(name, self._names.fresh(name), _numpy_name(value), sizes(value))
        except UnfitError as error:
            raise UserError(f"'{name}' cannot be an input or output in Core ML: {error}") from None

    def _received(self, value: ir.Value, var: Any) -> Any:
        """Return an input as the model has it: of its own type, and perhaps without axes."""
        if not sizes(value):
            var = self.emit("squeeze", f"{value.name}_scalar", x=var, axes=[0])
        kind = mil_type(value)
        if kind is MilType.BOOL:
            return self.emit("not_equal", f"{value.name}_bool", x=var, y=np.int32(0))
        return var if kind in _ARRAYS else self.emit("cast", f"{value.name}_cast", x=var, dtype=kind.value)

    def _sent(self, value: ir.Value, feature: str) -> Any:
        """Return an output as Core ML takes it, under its own name."""
        var, kind = self.var(value), mil_type(value)
        array = _array_type(kind)
        if array is not kind:
            var = self.emit("cast", f"{value.name}_array", x=var, dtype=array.value)
        if not sizes(value):
            var = self.emit("expand_dims", f"{value.name}_array", x=var, axes=[0])
        return self._tools.builder.identity(x=var, name=feature)

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _write_nodes(self, nodes: Iterable[ir.Node]) -> None:
        for node in nodes:
            if self._is_lazy(node):
                continue
            try:
                results = self._rule(node)(Site(node, self))
            except UnfitError as error:
                raise UserError(f"'{qgraph.ir.node_label(node)}' ({node.op_type}): {error}") from None
            except UserError:
                raise
            except Exception as error:
                # The builder's own checks, in whatever type of error: what they say is about this node.
                told = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"'{qgraph.ir.node_label(node)}' ({node.op_type}) is refused by Core ML's rules: {told}"
                ) from error
            if not isinstance(results, list | tuple):
                results = [results]
            self._vars.update(zip(node.outputs, results, strict=False))

    def _rule(self, node: ir.Node) -> Rule:
        reason = _unfit(node)
        if reason is not None:
            raise UnfitError(reason)
        return RULES[node.op_type]

    def _is_lazy(self, node: ir.Node) -> bool:
        """Tell whether a node only says how a weight is stored: it is written where it is read."""
        return qgraph.ir.is_op(node, "Constant") or (
            qgraph.ir.is_op(node, "DequantizeLinear") and qgraph.ir.constant(node.inputs[0]) is not None
        )

    # --- what rules see ----------------------------------------------------------------------------------------------

    def var(self, value: ir.Value, layout: Sequence[int] = ()) -> Any:
        """Return the variable of a value; of a constant, with its axes in the order of `layout`."""
        if value in self._vars:
            return self._vars[value]
        key = (value, tuple(layout))
        if key not in self._constants:
            self._constants[key] = self._constant_var(value, layout)
            for scope in self._scopes[-1:]:
                scope.add(key)
        return self._constants[key]

    def _constant_var(self, value: ir.Value, layout: Sequence[int]) -> Any:
        name = value.name or "constant"
        producer = value.producer()
        if producer is not None and qgraph.ir.is_op(producer, "DequantizeLinear"):
            weight = weights.constant_weight(producer)
            if weight is None:
                raise UnfitError(f"the scale of '{name}' is computed at run time")
            return weights.emit_weight(self, weight.laid_out(layout), name)
        array = qgraph.ir.constant(value)
        if array is None:
            raise UnfitError(f"'{name}' is computed by nothing")
        mil_type(value)
        return weights.emit_array(self, array.transpose(layout) if layout else array, name)

    def constant(self, array: np.ndarray, name: str) -> Any:
        """Add a constant."""
        return self._const(array if array.ndim else array[()], name)

    def small(self, array: np.ndarray, kind: MilType, name: str) -> Any:
        """Add a constant of numbers of less than 8 bits, which numpy has no types for."""
        dtype = self._tools.types.nptype_from_builtin(self._tools.types.string_to_builtin(kind.value))
        return self._const(array.astype(dtype), name)

    def _const(self, value: Any, name: str) -> Any:
        var = self._tools.builder.const(val=value, name=self._names.fresh(name))
        self._own.add(var.op)
        return var

    def emit(self, kind: str, name: str, **parameters: Any) -> Any:
        """Add an operation; several outputs get names of their own, since the builder's may be taken."""
        results = getattr(self._tools.builder, kind)(**parameters, name=self._names.fresh(name))
        if isinstance(results, list | tuple):
            for index, result in enumerate(results):
                result.name = self._names.fresh(f"{name}_{index}")
        return results

    def branch(self, graph: ir.Graph) -> list[Any]:
        """Add the operations of a subgraph; constants that are first read there are seen nowhere else."""
        self._scopes.append(set())
        self._write_nodes(graph)
        found = [self.emit("identity", f"{value.name}_branch", x=self.var(value)) for value in graph.outputs]
        for key in self._scopes.pop():
            del self._constants[key]
        return found


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _array_type(kind: MilType) -> MilType:
    return kind if kind in _ARRAYS else MilType.INT32


def _numpy_name(value: ir.Value) -> str:
    assert value.dtype is not None
    assert value.dtype in FROM_ONNX
    return str(value.dtype.numpy())
