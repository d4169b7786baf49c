"""What runs where of an integer graph: in emitted C function by function, elsewhere node by node.

    Conv -> Add -> Requantize    =>    one function of model.c, with --emit c

ONNX Runtime runs the functions of domain "qgraph" by their bodies; a library of TVM has its own cut, which is not told.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_units import computes_floats
from qgraph.analysis.kernel_arithmetic import Arithmetic
from qgraph.analysis.kernel_constraints import type_name
from qgraph.capabilities import operator_name
from qgraph.codegen.c_source import c_functions
from qgraph.passes.integer_requantize import BOUNDARY_KEY
from qgraph.runtime.placement import PlacedNode, Placement
from qgraph.runtime.session import CPU_PROVIDER

__all__ = ["functions_in_c", "nodes_in_onnx"]

_MOVES = frozenset({
    "Cast", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "DequantizeLinear", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "If", "Pad", "QuantizeLinear", "Reshape", "Resize", "ScatterElements",
    "ScatterND", "Shape", "Size", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Trilu",
    "Unsqueeze", "Where",
})  # fmt: skip
_ONNX = "ONNX Runtime, which runs the functions of domain qgraph by their bodies"
_TVM = "the library that TVM compiled, node by node as it was given the graph"
_C = "C99 without floating point, function by function"


def nodes_in_onnx(model: ir.Model, *, library: bool) -> Placement:
    """Return every node of the graph, functions as one node each.

    Args:
        model: the artifact's; not changed.
        library: whether TVM's library runs it.
    """
    provider = "TVM" if library else CPU_PROVIDER
    return Placement(tuple(_node(node, provider) for node in qgraph.ir.walk(model)), _TVM if library else _ONNX)


def functions_in_c(static: ir.Model) -> Placement:
    """Return every function of the emitted C.

    Args:
        static: the graph as code needs it (`qgraph.targets.integer.code_form`).
    """
    placed = []
    for name, nodes in c_functions(static):
        values = {value: None for node in nodes for value in node.outputs}
        taken = (value for node in nodes for value in node.inputs if value is not None and value not in values)
        kinds = [_arithmetic(node) for node in nodes]
        kind: Arithmetic = "integer" if "integer" in kinds else "none"
        given = [value for value in values if any(use.node not in nodes for use in value.uses()) or not value.uses()]
        labels = tuple(qgraph.ir.node_label(node) for node in nodes)
        kernel = operator_name(nodes[-1].domain, nodes[-1].op_type)
        placed.append(PlacedNode(name, kernel, "C", kind, _types(taken), _types(given), labels))
    return Placement(tuple(placed), _C)


def _node(node: ir.Node, provider: str) -> PlacedNode:
    label = qgraph.ir.node_label(node)
    remark = node.metadata_props.get(BOUNDARY_KEY, "")
    taken = _types(value for value in node.inputs if value is not None)
    kernel = operator_name(node.domain, node.op_type)
    return PlacedNode(label, kernel, provider, _arithmetic(node), taken, _types(node.outputs), (label,), remark)


def _arithmetic(node: ir.Node) -> Arithmetic:
    if BOUNDARY_KEY in node.metadata_props:
        return "float"
    if node.op_type in _MOVES:
        return "none"
    # What is of no known type was not written by this target.
    unknown = any(value.dtype is None for value in node.outputs if value.name)
    return "float" if unknown or computes_floats(node) else "integer"


def _types(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(type_name(value.type) or "" for value in values)
