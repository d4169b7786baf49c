"""An integer graph as a module of TVM's graph language Relax: one function `main` on the integer tensors at its edges.

    x -> Q -> ConvInteger -> Add -> qgraph.Requantize -> D -> y    =>    main(xq: uint8[...]) -> yq: uint8[...]

Not by TVM's own importer, which knows neither ConvInteger nor model-local functions: the calls of the functions of
domain `qgraph` are compiled from their definitions, and their bodies are not looked at. Weights are constants of the
module. Shapes are static; what only depends on them is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shape_facts import UnknownShapeError
from qgraph.analysis.shapes import attribute_values
from qgraph.codegen import tvm_elementwise, tvm_functions, tvm_layers, tvm_movement, tvm_reductions, tvm_scatter
from qgraph.codegen.tvm_edges import Edge, Signature
from qgraph.codegen.tvm_site import RULES, Operand, Site, Tensor, Variable, broadcast, dims, expression_of, refusal
from qgraph.errors import UserError
from qgraph.numerics import operators

__all__ = ["build_module", "require_tvm"]

_RULE_MODULES = (tvm_elementwise, tvm_functions, tvm_layers, tvm_movement, tvm_reductions, tvm_scatter)
"""Imported for the rules that they register."""
_TYPES = ("bool", "uint8", "int8", "int16", "int32", "int64")
_FOR_FLOAT = "only integer arithmetic can be compiled: see what the model's boundaries are, or run it as an ONNX model"


def require_tvm() -> Any:
    """Return the module `tvm`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import tvm
    except ImportError:
        raise UserError("compiling with TVM needs Apache TVM: pip install 'qgraph-compiler[tvm]'") from None
    return tvm


def build_module(model: ir.Model) -> tuple[Any, Signature]:
    """Lower an integer graph to a `tvm.IRModule`, exactly to the bit.

    Args:
        model: standard integer operators and functions of domain `qgraph`; floats only at its inputs, each read by
            QuantizeLinear with one scale, and at its outputs, each made by DequantizeLinear. It is not changed.

    Returns:
        The module, whose function `main` takes and returns the tensors of the signature.

    Raises:
        UserError: TVM is not installed, a shape is dynamic, or a node is in float or otherwise has no integer code.
    """
    require_tvm()
    return _Lowering(model).run()


class _Lowering:
    def __init__(self, model: ir.Model) -> None:
        from tvm import relax

        self._model = model
        self._builder = relax.BlockBuilder()
        self._known: dict[ir.Value, Operand] = {}
        self._inputs: dict[Edge, Variable] = {}

    def run(self) -> tuple[Any, Signature]:
        from tvm import relax

        graph = self._model.graph
        for value in graph.inputs:
            self._input(value)
        outputs: list[tuple[Edge, Operand]] = []
        error: UserError | None = None
        with self._builder.function("main", [one.expression for one in self._inputs.values()]):
            with self._builder.dataflow():
                try:
                    self._nodes(graph)
                    outputs = [self._output(value) for value in graph.outputs]
                except UserError as found:  # a builder that is left half-way complains on standard error
                    error = found
                result = self._builder.emit_output(relax.Tuple([expression_of(operand) for _, operand in outputs]))
            self._builder.emit_func_output(result)
        if error is not None:
            raise error
        return self._builder.finalize(), Signature(tuple(self._inputs), tuple(edge for edge, _ in outputs))

    # --- edges -------------------------------------------------------------------------------------------------------

    def _input(self, value: ir.Value) -> None:
        if value.const_value is not None:
            return
        shape = _static_shape(value)
        if value.dtype is not None and str(value.dtype.numpy()) in _TYPES:
            self._known[value] = self._parameter(Edge(_name(value), _name(value), shape, str(value.dtype.numpy())))
            return
        for use in value.uses():
            if qgraph.ir.is_op(use.node, "QuantizeLinear") and use.node.graph is self._model.graph:
                scale, zero_point = _step(use.node)
                edge = Edge(
                    _name(value), _name(use.node.outputs[0]), shape, str(zero_point.dtype), scale, int(zero_point)
                )
                self._known[use.node.outputs[0]] = self._parameter(edge)

    def _parameter(self, edge: Edge) -> Variable:
        from tvm import relax

        if 0 in edge.shape:
            raise UserError(f"input '{edge.name}' has shape {list(edge.shape)}: there is nothing to compute")
        name = f"input_{len(self._inputs)}"
        expression = relax.Var(name, relax.TensorType(edge.shape, edge.dtype))
        return self._inputs.setdefault(edge, Variable(expression, edge.shape, edge.dtype))

    def _output(self, value: ir.Value) -> tuple[Edge, Operand]:
        node = value.producer()
        if node is None or not qgraph.ir.is_op(node, "DequantizeLinear"):
            operand = self._operand(value)
            if operand is None:
                raise UserError(
                    f"the output '{value.name}' is in float, and no DequantizeLinear makes it: {_FOR_FLOAT}"
                )
            return Edge(_name(value), _name(value), dims(operand), str(operand.dtype)), operand
        source = node.inputs[0]
        operand = self._operand(source)
        if operand is None or source is None:
            raise refusal(node, f"it reads '{source.name if source else ''}', which is not in integers; {_FOR_FLOAT}")
        scale, zero_point = _step(node)
        return Edge(_name(value), _name(source), dims(operand), str(operand.dtype), scale, int(zero_point)), operand

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _operand(self, value: ir.Value | None) -> Operand | None:
        if value is None:
            return None
        if value not in self._known:
            array = qgraph.ir.constant(value)
            if array is None:
                return None
            self._known[value] = array
        return self._known[value]

    def _nodes(self, graph: ir.Graph) -> None:
        for node in graph:
            if all(output in self._known for output in node.outputs) or self._is_output_edge(node):
                continue
            for output, result in zip(node.outputs, self._results(node), strict=False):
                self._known[output] = result

    def _is_output_edge(self, node: ir.Node) -> bool:
        return qgraph.ir.is_op(node, "DequantizeLinear") and all(
            output.is_graph_output() and not output.uses() for output in node.outputs
        )

    def _results(self, node: ir.Node) -> Sequence[Operand]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if reason := node.metadata_props.get("qgraph.boundary"):
            raise refusal(node, f"it is a boundary, in float because {reason}; {_FOR_FLOAT}")
        if domain == "" and node.op_type == "If":
            return self._if(node)
        if domain == "" and node.op_type == "Constant":
            array = qgraph.ir.constant(node.outputs[0])
            if array is None:
                raise refusal(node, "it holds no tensor")
            return [array]
        inputs = [self._operand(value) for value in node.inputs]
        self._refuse_unknown(node, inputs)
        try:
            site = Site(self._builder, node, inputs, attribute_values(node))
        except UnknownShapeError as error:
            raise refusal(node, str(error)) from error
        folded = _folded(site, domain)
        if folded is not None:
            return folded
        if (domain, node.op_type) not in RULES:
            what = f"{node.op_type} of domain '{domain}'" if domain else node.op_type
            raise refusal(node, f"there is no integer code for {what}; {_FOR_FLOAT}")
        result = RULES[domain, node.op_type](site)
        return result if isinstance(result, list) else [result]

    def _refuse_unknown(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        for value, operand in zip(node.inputs, inputs, strict=True):
            if value is None:
                continue
            if operand is None:
                raise refusal(node, f"its input '{value.name}' is in float; {_FOR_FLOAT}")
            if not isinstance(operand, np.ndarray) and 0 in dims(operand):
                raise refusal(node, f"its input '{value.name}' has no elements; fold constants first")

    def _if(self, node: ir.Node) -> Sequence[Operand]:
        """Compute both branches and take the results of one: integer code has no effects but its results."""
        condition = self._operand(node.inputs[0])
        branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        if condition is None:
            raise refusal(node, "its condition is not known")
        if isinstance(condition, np.ndarray):
            return self._branch(branches[0 if condition.item() else 1])
        results = []
        for one, other in zip(*map(self._branch, branches), strict=True):
            if dims(one) != dims(other) or one.dtype != other.dtype:
                raise refusal(node, f"its branches give shapes {dims(one)} and {dims(other)}; one must be chosen first")
            site = Site(self._builder, node, (), {})
            results.append(site.compute(_choice, condition, one, other))
        return results

    def _branch(self, graph: ir.Graph) -> list[Operand]:
        self._nodes(graph)
        found = []
        for value in graph.outputs:
            operand = self._operand(value)
            if operand is None:
                raise UserError(f"the branch output '{value.name}' is in float: {_FOR_FLOAT}")
            found.append(operand)
        return found


def _choice(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    from tvm import tirx

    return broadcast(tirx.Select, condition, one, other)


def _folded(site: Site, domain: str) -> list[Operand] | None:
    """Return the outputs that numpy computes, where constants and shapes alone decide them."""
    node = site.node
    if domain or not node.inputs:
        return None
    if node.op_type in ("Shape", "Size"):
        stand_in = np.broadcast_to(np.zeros((), bool), site.shape())
        return list(operators.evaluate(node.op_type, site.attributes, [stand_in]))
    if not all(one is None or isinstance(one, np.ndarray) for one in site.inputs):
        return None
    try:
        return list(operators.evaluate(node.op_type, site.attributes, site.inputs))
    except operators.NotFoldedError:
        return None


def _name(value: ir.Value) -> str:
    return value.name or ""


def _static_shape(value: ir.Value) -> tuple[int, ...]:
    shape = value.shape
    if shape is None or not shape.is_static():
        known = "no shape" if shape is None else f"shape [{','.join(map(str, shape))}]"
        example = ",".join(str(dim) if isinstance(dim, int) else "1" for dim in shape or (1, 3, 224, 224))
        raise UserError(
            f"input '{value.name}' has {known}, but compiled code needs every size: fix it, for instance with "
            f"--shape {value.name}={example}"
        )
    return tuple(int(dim) for dim in shape.numpy())


def _step(node: ir.Node) -> tuple[float, np.ndarray]:
    """Return scale and zero point of QuantizeLinear or DequantizeLinear at an edge of the graph."""
    scale = qgraph.ir.constant(node.inputs[1])
    zero_point = qgraph.ir.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or scale.size != 1 or scale.dtype != np.float32:
        raise refusal(node, "its scale must be one float32 constant")
    if zero_point is None:
        asked = node.attributes.get_int("output_dtype", 0) if node.op_type == "QuantizeLinear" else 0
        zero_point = np.zeros((), ir.DataType(asked).numpy() if asked else np.uint8)
    if zero_point.size != 1 or str(zero_point.dtype) not in _TYPES:
        raise refusal(node, f"its zero point must be one constant of {', '.join(_TYPES[1:])}")
    return float(scale.item()), zero_point.reshape(())
