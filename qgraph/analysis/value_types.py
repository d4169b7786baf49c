"""Data types of all values of a model, those included whose shapes no rule tells."""

from __future__ import annotations

from collections.abc import Mapping

import onnx.defs
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_constraints import KnownShapes, type_name
from qgraph.capabilities import DEFAULT_DOMAINS

__all__ = ["value_types"]


def value_types(model: ir.Model, shapes: KnownShapes) -> dict[ir.Value, str]:
    """Return the type of each value as tables call it, '' where it is not known.

    What neither `shapes` nor the model says is told by the schema of the operator that makes the value: an output has
    the one type that it may have, or that of the inputs of the same type parameter.
    """
    types: dict[ir.Value, str] = {}
    version = model.graph.opset_imports.get("", 0)
    for graph in qgraph.ir.all_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            types[value] = _known(value, shapes)
    for node in qgraph.ir.walk(model):
        for index, value in enumerate(node.outputs):
            types[value] = _known(value, shapes) or _by_schema(node, index, version, types)
    return types


def _known(value: ir.Value, shapes: KnownShapes) -> str:
    dtype = shapes.dtype(value)
    return (type_name(value.type) if dtype is None else type_name(ir.TensorType(dtype))) or ""


def _by_schema(node: ir.Node, index: int, version: int, types: Mapping[ir.Value, str]) -> str:
    if node.domain not in DEFAULT_DOMAINS:
        return ""
    if node.op_type == "Cast":
        return type_name(ir.TensorType(ir.DataType(node.attributes.get_int("to", 0)))) or ""
    try:
        schema = onnx.defs.get_schema(node.op_type, version or onnx.defs.onnx_opset_version(), "")
    except onnx.defs.SchemaError:
        return ""
    if not schema.outputs:
        return ""
    parameter = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    allowed = {one.type_param_str: list(one.allowed_type_strs) for one in schema.type_constraints}
    words = allowed.get(parameter, [parameter])
    if len(words) == 1:
        return _NAMES.get(words[0], "")
    for formal, value in zip(schema.inputs, node.inputs, strict=False):
        if formal.type_str == parameter and value is not None and types.get(value):
            return types[value]
    return ""


_NAMES = {f"tensor({name})": name for name in ("bool", "int32", "int64")} | {"tensor(float)": "float32"}
"""Types that an operator may be alone to give."""
