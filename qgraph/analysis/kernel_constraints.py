"""Whether one node meets a constraint of a kernel, and what is known of its inputs, outputs and attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import onnx.defs
import onnx.helper
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shape_facts import Dims, input_of
from qgraph.capabilities import DEFAULT_DOMAINS, Constraint
from qgraph.capabilities.constraints import ABSENT

__all__ = ["KnownShapes", "NodeFacts", "type_name", "unmet"]

_RENAMED = {"float": "float32", "double": "float64"}


class KnownShapes(Protocol):
    """What `refusal` asks of an analysis of shapes."""

    def dims(self, value: ir.Value) -> Dims | None:
        """Return the shape of a value."""

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type of a value."""


def type_name(kind: ir.TypeProtocol | None) -> str | None:
    """Return a type as tables call it, or None where it is not known."""
    if isinstance(kind, ir.TensorType | ir.SparseTensorType):
        name = None if kind.dtype == ir.DataType.UNDEFINED else _dtype_name(kind.dtype)
        return name if name is None or isinstance(kind, ir.TensorType) else f"sparse({name})"
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        inner = type_name(kind.elem_type)
        word = "seq" if isinstance(kind, ir.SequenceType) else "optional"
        return None if inner is None else f"{word}({inner})"
    return None


def _dtype_name(dtype: ir.DataType) -> str:
    name = dtype.name.lower()
    return _RENAMED.get(name, name)


def _attribute_text(facts: NodeFacts, name: str) -> str:
    """Return the value of an attribute as constraints write it: its own, its default's, or 'none'."""
    attribute = facts.node.attributes.get(name)
    if attribute is None:
        default = _defaults(facts).get(name)
        return ABSENT if default is None else _value_text(default)
    return ABSENT if attribute.is_ref() else _value_text(attribute.value)


def _defaults(facts: NodeFacts) -> Mapping[str, object]:
    if facts.node.domain not in DEFAULT_DOMAINS:
        return {}
    version = facts.version or onnx.defs.onnx_opset_version()
    try:
        schema = onnx.defs.get_schema(facts.node.op_type, version, "")
    except onnx.defs.SchemaError:
        return {}
    return {
        name: onnx.helper.get_attribute_value(one.default_value)
        for name, one in schema.attributes.items()
        if one.default_value.name
    }


def _value_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, list | tuple):
        return " ".join(_value_text(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


class NodeFacts:
    """What is known of one node.

    Args:
        node: that is asked about.
        version: of its domain that the model imports; None where that is not known.
        shapes: of the model's values; without, only what the values themselves say is known.
    """

    def __init__(self, node: ir.Node, version: int | None, shapes: KnownShapes | None) -> None:
        self.node = node
        self.version = version
        self._shapes = shapes

    def dtype(self, value: ir.Value) -> str | None:
        """Return the type of a value as tables call it."""
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            return type_name(value.type)
        known = self._shapes.dtype(value) if self._shapes is not None else None
        return type_name(value.type) if known is None else _dtype_name(known)

    def dims(self, value: ir.Value) -> Dims | tuple[int | ir.SymbolicDim, ...] | None:
        """Return the shape of a value; None where not even its rank is known."""
        known = self._shapes.dims(value) if self._shapes is not None else None
        return tuple(value.shape) if known is None and value.shape is not None else known


def unmet(one: Constraint, facts: NodeFacts) -> str | None:
    """Return what of a node does not meet a constraint, such as "input 0 has 4 dimensions", or None."""
    return _CHECKS[one.word](one, facts)


def _constant(one: Constraint, facts: NodeFacts) -> str | None:
    value = _input(one, facts)
    fits = value is None or (value.const_value is not None and not value.is_graph_input())
    if fits or qgraph.ir.is_op(value.producer() if value is not None else None, "Constant"):
        return None
    return f"input {one.input} must be constant"


def _absent(one: Constraint, facts: NodeFacts) -> str | None:
    return None if _input(one, facts) is None else f"input {one.input} must be left out"


def _present(one: Constraint, facts: NodeFacts) -> str | None:
    return f"input {one.input} must be there" if _input(one, facts) is None else None


def _rank(one: Constraint, facts: NodeFacts) -> str | None:
    dims = _dims(one, facts)
    return None if dims is None or one.allows(str(len(dims))) else f"input {one.input} has {len(dims)} dimensions"


def _scalar(one: Constraint, facts: NodeFacts) -> str | None:
    dims = _dims(one, facts)
    one_element = dims is None or all(dim == 1 or not isinstance(dim, int) for dim in dims)
    return None if one_element else f"input {one.input} must have one element"


def _outputs(one: Constraint, facts: NodeFacts) -> str | None:
    behind = [value for value in facts.node.outputs[one.factor :] if value.name]
    return f"output {one.factor} must be left out" if behind else None


def _static(one: Constraint, facts: NodeFacts) -> str | None:
    values = (*facts.node.inputs, *facts.node.outputs) if one.input is None else (_input(one, facts),)
    for value in values:
        if value is None:
            continue
        dims = facts.dims(value)
        if dims is None or not all(isinstance(dim, int) for dim in dims):
            return f"the shape of '{value.name}' must be known"
    return None


def _attribute(one: Constraint, facts: NodeFacts) -> str | None:
    text = _attribute_text(facts, one.attribute)
    if one.allows(text):
        return None
    return f"attribute {one.attribute} is {'not set' if text == ABSENT else text}"


def _multiple(one: Constraint, facts: NodeFacts) -> str | None:
    dims = _dims(one, facts)
    if dims is None or not -len(dims) <= one.axis < len(dims):
        return None
    size = dims[one.axis]
    if not isinstance(size, int) or size % one.factor == 0:
        return None
    return f"axis {one.axis} of input {one.input} is {size}, no multiple of {one.factor}"


_CHECKS: Mapping[str, Callable[[Constraint, NodeFacts], str | None]] = {
    "constant": _constant,
    "absent": _absent,
    "present": _present,
    "rank": _rank,
    "scalar": _scalar,
    "outputs": _outputs,
    "static": _static,
    "attribute": _attribute,
    "multiple": _multiple,
}


def _input(one: Constraint, facts: NodeFacts) -> ir.Value | None:
    assert one.input is not None
    return input_of(facts.node, one.input)


def _dims(one: Constraint, facts: NodeFacts) -> Dims | tuple[int | ir.SymbolicDim, ...] | None:
    value = _input(one, facts)
    return None if value is None else facts.dims(value)
