"""The same computation is done once.

    a = Shape(x);  b = Shape(x)    =>    a = Shape(x), read where b was

Two nodes are the same if operator, inputs and attributes are. A node in a subgraph may be merged into one outside it.
Left alone are nodes that hold subgraphs, random operators, operators of domains that are not known here, nodes with
large tensors as attributes, and a node one of whose outputs is an output of the graph.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pass, Report

__all__ = ["MergeDuplicates"]

_RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
_LARGE = 1024
"""Tensors in attributes with more elements than this are not compared."""


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Compute common subexpressions once."""

    name: ClassVar[str] = "merge-duplicates"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Merge; `changed` counts the nodes that are gone."""
        del context
        merged = _merge(model.graph, ChainMap())
        notes = [f"{merged} duplicate nodes merged"] if merged else []
        return Report(changed=merged, notes=notes)


def _merge(graph: ir.Graph, seen: ChainMap[Hashable, ir.Node]) -> int:
    count = 0
    for node in graph:
        inner_graphs = qgraph.ir.inner_graphs(node)
        if inner_graphs:
            count += sum([_merge(inner, seen.new_child()) for inner in inner_graphs])
            continue
        identity = _identity(node)
        if identity is None:
            continue
        first = seen.setdefault(identity, node)
        if first is node or any(value.is_graph_output() for value in node.outputs):
            continue
        for value, other in zip(node.outputs, first.outputs, strict=True):
            value.replace_all_uses_with(other)
        qgraph.ir.discard(node)
        count += 1
    return count


def _identity(node: ir.Node) -> Hashable | None:
    """Return what is equal for nodes that compute the same, or None for a node that must not be merged."""
    if node.domain not in _DOMAINS or node.op_type in _RANDOM:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        value = _attribute(attribute)
        if value is None:
            return None
        attributes.append((name, value))
    outputs = tuple(bool(value.name) for value in node.outputs)
    inputs = tuple(id(value) if value is not None else None for value in node.inputs)
    return (node.domain, node.op_type, node.overload, inputs, outputs, tuple(attributes))


def _attribute(attribute: ir.Attr) -> Hashable | None:
    if attribute.is_ref():
        return None
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.size > _LARGE:
            return None
        return (int(tensor.dtype), tuple(tensor.shape.numpy()), tensor.numpy().tobytes())
    if isinstance(attribute.value, str | bytes | int | float):
        return (int(attribute.type), attribute.value)
    if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return (int(attribute.type), tuple(attribute.value))
    return None
