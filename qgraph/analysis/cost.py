"""What a model holds and what it takes to run: operators, weights by precision, multiply-adds, activations.

Weights are never read: their shapes and types are enough. Shapes follow from the inputs, whose dynamic axes are given
sizes; an initializer that a caller may override counts as constant. What cannot be known is not guessed: a node
without a figure has the reason instead. A loop's body and both branches of an If are counted once. Model-local
functions are inlined first, but for the integer functions of qgraph, which count as operators.

Multiply-adds are those of matrix products, convolutions, recurrent cells and attention; element-wise operators count
as none.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common

import qgraph.ir
from qgraph.analysis.integer_functions import DOMAIN
from qgraph.analysis.integer_rules import is_constant
from qgraph.analysis.multiply_adds import UnknownCostError, multiply_adds
from qgraph.analysis.shapes import Shapes
from qgraph.errors import UserError

__all__ = ["ModelCost", "NodeCost", "Port", "cost", "precision"]

FIRST_AXIS = 1
OTHER_AXES = 16

_SHORT = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}
_NUMPY_NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}
_PACKED = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
"""Operators whose weights of `bits` bits lie packed in uint8, and the input that holds them."""


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of the model; an axis is a number, the name of a dynamic one, or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """What one node takes.

    Attributes:
        name: of the node.
        op_type: with its domain in front unless it is ONNX's own.
        graph: the path of the subgraph that holds it, such as "If_3/then_branch"; '' for the main graph.
        multiply_adds: None where they are not known.
        weight_bytes: of the constants that it reads; one with several readers counts for each.
        activation_bytes: of its outputs; None where a shape is not known.
        reason: why a figure is None; '' otherwise.
    """

    name: str
    op_type: str
    graph: str
    multiply_adds: int | None
    weight_bytes: int
    activation_bytes: int | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """What a model holds and takes.

    Attributes:
        producer: who wrote the file.
        ir_version: of the file.
        domains: operator-set domain -> version; ONNX's own is ''.
        inputs: without overridable initializers.
        outputs: of the model.
        axes: size that each dynamic axis was given for the figures below.
        operators: operator -> number of nodes, most frequent first.
        functions: number of model-local functions.
        parameters: number of elements of all weights, packed ones unpacked.
        weights: precision -> bytes, largest first.
        multiply_adds: of the nodes where they are known.
        activation_bytes: of all intermediate tensors whose size is known.
        peak_activation_bytes: of those that live at the same time, in the order of the file; None where a size is
            not known.
        nodes: in the order of the file, a node before its subgraphs.
    """

    producer: str
    ir_version: int
    domains: Mapping[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: Mapping[str, int]
    operators: Mapping[str, int]
    functions: int
    parameters: int
    weights: Mapping[str, int]
    multiply_adds: int
    activation_bytes: int
    peak_activation_bytes: int | None
    nodes: tuple[NodeCost, ...]

    @property
    def opset(self) -> int | None:
        """The version of ONNX's own operators."""
        return self.domains.get("")

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    @property
    def unknown(self) -> list[NodeCost]:
        """The nodes whose multiply-adds are not known."""
        return [node for node in self.nodes if node.multiply_adds is None]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "opset": self.opset, "weight_bytes": self.weight_bytes}


def cost(model: ir.Model, axes: Mapping[str, int] | None = None) -> ModelCost:
    """Count what `model` holds and takes; it is not changed.

    Args:
        model: any model; weights are not read.
        axes: sizes of dynamic axes by name; others get 1 where they come first and 16 elsewhere.

    Raises:
        UserError: the model's functions call one another in a circle.
    """
    copy = model.clone()
    if copy.functions:
        try:
            onnx_ir.passes.common.InlinePass(lambda function: function.domain != DOMAIN)(copy)
        except (ir.passes.PassError, ir.passes.InvariantError, ValueError) as error:
            raise UserError(f"the model's functions cannot be inlined: {error}. Export without functions.") from error
    copy.graph.inputs[:] = [value for value in copy.graph.inputs if value.name not in copy.graph.initializers]
    sizes = _fix_axes(copy, axes or {})
    sizer = _Sizer(copy)
    nodes = tuple(_node_cost(node, path, sizer) for node, path in _walk(copy.graph, ""))
    weights, parameters = _weights(copy)
    return ModelCost(
        producer=f"{model.producer_name or ''} {model.producer_version or ''}".strip(),
        ir_version=model.ir_version,
        domains={
            "" if domain == "ai.onnx" else domain: version for domain, version in sorted(model.opset_imports.items())
        },
        inputs=tuple(_port(value) for value in model.graph.inputs if value.name not in model.graph.initializers),
        outputs=tuple(_port(value) for value in model.graph.outputs),
        axes=dict(sorted(sizes.items())),
        operators=dict(_most_frequent(Counter(node.op_type for node in nodes))),
        functions=len(model.functions),
        parameters=parameters,
        weights=dict(_most_frequent(weights)),
        multiply_adds=sum(node.multiply_adds or 0 for node in nodes),
        activation_bytes=sum(node.activation_bytes or 0 for node in nodes),
        peak_activation_bytes=_peak(copy.graph, sizer),
        nodes=nodes,
    )


def _most_frequent(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _port(value: ir.Value) -> Port:
    dtype = value.dtype.name if isinstance(value.type, ir.TensorType) and value.dtype is not None else str(value.type)
    shape = None if value.shape is None else tuple(_axis(axis) for axis in value.shape)
    return Port(value.name or "", _NUMPY_NAMES.get(dtype, dtype.lower()), shape)


def _axis(axis: int | ir.SymbolicDim) -> int | str | None:
    return axis if isinstance(axis, int) else axis.value


def _fix_axes(model: ir.Model, wished: Mapping[str, int]) -> dict[str, int]:
    """Give every dynamic axis of the inputs a size, in place, and return the sizes by name."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.shape is None:
            continue
        fixed = []
        for position, axis in enumerate(value.shape):
            if not isinstance(axis, int):
                name = axis.value or f"{value.name}[{position}]"
                axis = _size(name, OTHER_AXES if position else FIRST_AXIS, wished, sizes)
            fixed.append(axis)
        value.shape = ir.Shape(fixed)
    return sizes


def _size(name: str, default: int, wished: Mapping[str, int], sizes: dict[str, int]) -> int:
    """Settle an axis; one named "past + sequence", as decoders with a cache have it, is the sum of both."""
    terms = [name] if name in wished else name.split(" + ")
    return sum(sizes.setdefault(term, wished.get(term, default)) for term in terms)


class _Sizer:
    """Shapes and bytes of values, or why they are not known."""

    def __init__(self, model: ir.Model) -> None:
        self._shapes = Shapes(model).run()

    def shape(self, value: ir.Value) -> list[int]:
        dims = self._shapes.dims(value)
        if dims is not None and all(isinstance(axis, int) for axis in dims):
            return [axis for axis in dims if isinstance(axis, int)]
        reason = self._shapes.reasons.get(value, "it depends on values that are computed at run time")
        raise UnknownCostError(f"the shape of '{value.name}' is not known: {reason}")

    def bytes(self, value: ir.Value) -> int:
        elements = math.prod(self.shape(value))
        dtype = self._shapes.dtype(value)
        if dtype is None or dtype == ir.DataType.STRING:
            raise UnknownCostError(f"'{value.name}' holds no numbers of known size")
        return math.ceil(elements * dtype.itemsize)


def _walk(graph: ir.Graph, path: str) -> Iterator[tuple[ir.Node, str]]:
    for node in graph:
        yield node, path
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            inner = f"{path}/{qgraph.ir.node_label(node)}.{attribute.name}".lstrip("/")
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _walk(attribute.as_graph(), inner)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for number, one in enumerate(attribute.as_graphs()):
                    yield from _walk(one, f"{inner}[{number}]")


def _node_cost(node: ir.Node, path: str, sizer: _Sizer) -> NodeCost:
    reasons: list[str] = []
    macs: int | None = None
    activations: int | None = None
    try:
        macs = multiply_adds(node, sizer.shape)
    except UnknownCostError as error:
        reasons.append(str(error))
    try:
        outputs = [] if node.op_type == "Constant" else [value for value in node.outputs if value.name]
        activations = sum(sizer.bytes(value) for value in outputs)
    except UnknownCostError as error:
        reasons.append(str(error))
    domain = node.domain if node.domain not in ("", "ai.onnx") else ""
    return NodeCost(
        name=qgraph.ir.node_label(node),
        op_type=f"{domain}::{node.op_type}" if domain else node.op_type,
        graph=path,
        multiply_adds=macs,
        weight_bytes=sum(_constant_bytes(value) for value in node.inputs if value is not None),
        activation_bytes=activations,
        reason="; ".join(dict.fromkeys(reasons)),
    )


def _constant_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or not qgraph.ir.is_op(node, "Constant"):
        return None
    attribute = node.attributes.get("value")
    return attribute.as_tensor() if attribute is not None and attribute.type == ir.AttributeType.TENSOR else None


def _constant_bytes(value: ir.Value) -> int:
    tensor = _constant_tensor(value)
    return 0 if tensor is None else math.ceil(tensor.nbytes)


def precision(dtype: ir.DataType) -> str:
    """Return the short name of a type: fp32, fp16, int8, int4."""
    return _SHORT.get(dtype.name, dtype.name.lower())


def _weights(model: ir.Model) -> tuple[Counter[str], int]:
    """Return bytes by precision and the number of elements of all initializers and Constant tensors."""
    packed = _packed_bits(model)
    weights: Counter[str] = Counter()
    elements = 0
    values = [value for graph in qgraph.ir.all_graphs(model) for value in graph.initializers.values()]
    values += [node.outputs[0] for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "Constant")]
    for value in values:
        tensor = _constant_tensor(value)
        if tensor is None:
            continue
        bits = packed.get(value)
        weights[f"int{bits}" if bits else precision(tensor.dtype)] += math.ceil(tensor.nbytes)
        elements += tensor.nbytes * 8 // bits if bits else tensor.size
    return weights, elements


def _packed_bits(model: ir.Model) -> dict[ir.Value, int]:
    found = {}
    for node in qgraph.ir.walk(model):
        position = _PACKED.get(node.op_type)
        value = node.inputs[position] if position is not None and len(node.inputs) > position else None
        if value is not None and value.dtype == ir.DataType.UINT8:
            found[value] = int(node.attributes.get_int("bits", 4))
    return found


def _peak(graph: ir.Graph, sizer: _Sizer) -> int | None:
    """Return the most bytes of activations that live at once, each from its making to its last reading.

    What is computed from constants alone, such as a dequantized weight, is none: runtimes fuse or fold it.
    """
    last = _last_readers(graph)
    kept = set(graph.outputs)
    fixed: set[ir.Value] = set()
    try:
        live = {value: sizer.bytes(value) for value in graph.inputs}
        now = peak = sum(live.values())
        for position, node in enumerate(graph):
            if all(value is None or value in fixed or is_constant(value) for value in node.inputs):
                fixed.update(node.outputs)
            made = [value for value in node.outputs if value.name and value not in fixed]
            live |= {value: sizer.bytes(value) for value in made}
            now += sum(live[value] for value in made)
            peak = max(peak, now)
            for value in {*node.inputs, *made}:
                if value in live and value not in kept and last.get(value, position) <= position:
                    now -= live.pop(value)
    except UnknownCostError:
        return None
    return peak


def _last_readers(graph: ir.Graph) -> dict[ir.Value, int]:
    last: dict[ir.Value, int] = {}
    for position, node in enumerate(graph):
        for value in node.inputs:
            if value is not None:
                last[value] = position
        for inner, _ in _walk_inside(node):
            for value in inner.inputs:
                if value is not None:
                    last[value] = position
    return last


def _walk_inside(node: ir.Node) -> Iterator[tuple[ir.Node, str]]:
    for attribute in node.attributes.values():
        if not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH:
            yield from _walk(attribute.as_graph(), "")
