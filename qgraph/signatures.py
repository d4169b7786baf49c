"""Whether nodes have the inputs, outputs and attributes that ONNX defines for their operators."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import onnx.defs
import onnx_ir as ir

__all__ = ["problems"]


class _Signature(NamedTuple):
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    needed: frozenset[int]
    required: frozenset[str]
    types: Mapping[str, int]


def _number(attribute_type: Any) -> int:
    """Return the number of an `onnx.defs.OpSchema.AttrType`, whose stub lacks it."""
    return int(attribute_type.value)


@functools.cache
def _signature(op_type: str, version: int) -> _Signature | None:
    """Return what a standard operator takes, or None if onnx does not know it."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    needed = [index for index, one in enumerate(schema.inputs) if one.option == single]
    if op_type == "Resize":
        needed = [0]  # exporters leave out roi and scales of opset 11, which only later ones allow
    return _Signature(
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
        frozenset(needed),
        frozenset(name for name, attribute in schema.attributes.items() if attribute.required),
        {name: _number(attribute.type) for name, attribute in schema.attributes.items()},
    )


def problems(model: ir.Model) -> Iterator[str]:
    """Yield what is wrong with nodes of standard operators, in the graph, its subgraphs and its functions."""
    graphs = [(model.graph, model.graph.opset_imports)]
    graphs += [(function.graph, function.opset_imports) for function in model.functions.values()]
    for graph, imports in graphs:
        version = imports.get("", imports.get("ai.onnx"))
        if version is None:
            continue
        for node in graph.all_nodes():
            signature = _signature(node.op_type, version) if node.domain in ("", "ai.onnx") else None
            problem = _problem(node, signature) if signature is not None else None
            if problem is not None:
                yield f"node '{node.name or node.op_type}' ({node.op_type}) {problem}"


def _problem(node: ir.Node, signature: _Signature) -> str | None:
    for count, (least, most), what in (
        (len(node.inputs), signature.inputs, "inputs"),
        (len(node.outputs), signature.outputs, "outputs"),
    ):
        if not least <= count <= most:
            return f"has {count} {what}, but must have {least if count < least else most}"
    if any(index in signature.needed and value is None for index, value in enumerate(node.inputs)):
        return "leaves out an input that it needs"
    for name in sorted(signature.required):
        if name not in node.attributes:
            return f"lacks the attribute '{name}'"
    for name, attribute in node.attributes.items():
        expected = signature.types.get(name)
        if expected is not None and int(attribute.type) != expected:
            return f"has an attribute '{name}' of another type than ONNX defines"
        if (
            attribute.type == ir.AttributeType.STRING
            and not attribute.is_ref()
            and not isinstance(attribute.value, str)
        ):
            return f"has an attribute '{name}' that is no text"
    if node.op_type == "Constant" and (len(node.attributes) != 1 or set(node.attributes) - set(signature.types)):
        return "must have one attribute, its value"
    return None
