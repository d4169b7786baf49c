"""Operators that pick elements by indices: look-ups in tables, and slices of data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.codegen import c_text
from qgraph.codegen.c_fusion import producer_of
from qgraph.codegen.c_graph import IntegerGraph
from qgraph.codegen.c_kernel import Index, Kernel
from qgraph.codegen.c_movement import axis_map
from qgraph.codegen.c_rules import Access, Kind, Read, Reads, register

__all__ = ["index_of"]


def _pair(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    data, indices = node.inputs[:2]
    assert data is not None
    assert indices is not None
    return data, indices


def _is_table(graph: IntegerGraph, node: ir.Node) -> bool:
    return len(graph.shape(_pair(node)[0])) == 1


def _indices_read(access: Access) -> Reads:
    """Return the way of operators that read data at any place, and indices."""

    def reads(graph: IntegerGraph, node: ir.Node) -> Sequence[Read]:
        del graph
        data, indices = _pair(node)
        return [(data, Access.MEMORY), (indices, access)]

    return reads


@register(Kind.ELEMENT, "Gather", reads=_indices_read(Access.BROADCAST), when=_is_table)
def _look_up(kernel: Kernel, value: ir.Value, index: Index) -> str:
    table, indices = _pair(producer_of(value))
    return _picked(kernel, table, (index_of(kernel, indices, index, kernel.graph.size(table)),))


@register(Kind.MOVE, "Gather", reads=_indices_read(Access.MANY))
def _gather(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node = producer_of(value)
    data, indices = _pair(node)
    shape, rank = kernel.graph.shape(data), len(kernel.graph.shape(indices))
    axis = node.attributes.get_int("axis", 0) % len(shape)
    inner = index[axis : axis + rank]
    array = kernel.graph.constant(indices)
    if array is not None and array.ndim <= 1:
        sources = array.reshape(-1).astype(np.int64) % shape[axis]
        picked = axis_map(kernel, sources, inner[0] if inner else "0", f"{value.name}_indices")
    else:
        picked = index_of(kernel, indices, inner, shape[axis])
    return _picked(kernel, data, (*index[:axis], picked, *index[axis + rank :]))


@register(Kind.MOVE, "GatherElements", reads=_indices_read(Access.ONCE))
def _gather_at(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node = producer_of(value)
    data, indices = _pair(node)
    shape = kernel.graph.shape(data)
    axis = node.attributes.get_int("axis", 0) % len(shape)
    picked = index_of(kernel, indices, index, shape[axis])
    return _picked(kernel, data, (*index[:axis], picked, *index[axis + 1 :]))


def _picked(kernel: Kernel, data: ir.Value, index: Index) -> str:
    """Return an element of data in memory, of whatever place."""
    shape = kernel.graph.shape(data)
    array = kernel.graph.constant(data)
    if array is None:
        return f"{kernel.pointer(data)}[{c_text.offset(index, shape)}]"
    element = f"{kernel.constants.name(data.name or 'table', array)}[{c_text.offset(index, shape)}]"
    return f"(int64_t){element}" if array.dtype == np.int64 else element


def index_of(kernel: Kernel, indices: ir.Value, index: Index, size: int) -> str:
    """Return an element of `indices`, counted from the front."""
    atom = kernel.element(indices, index)
    if not _may_be_negative(kernel.graph, indices):
        return atom
    return kernel.temporary(kernel.graph.dtype(indices), f"{atom} < 0 ? {atom} + {size} : {atom}")


def _may_be_negative(graph: IntegerGraph, value: ir.Value) -> bool:
    """Tell whether indices can be below zero, as far as casts and constants added to them show."""
    return _least(graph, value) < 0


def _least(graph: IntegerGraph, value: ir.Value) -> float:
    array = graph.constant(value)
    if array is not None:
        return float(array.min(initial=0))
    dtype, node = graph.dtype(value), value.producer()
    lowest = 0.0 if dtype.kind == "b" else float(np.iinfo(dtype).min)
    inputs = [] if node is None or value in {port.value for port in graph.inputs} else list(node.inputs)
    if node is not None and inputs and inputs[0] is not None:
        if node.op_type in ("Cast", "Reshape", "Transpose", "Identity"):
            return max(lowest, _least(graph, inputs[0]))
        if node.op_type == "Add" and inputs[1] is not None:
            return max(lowest, _least(graph, inputs[0]) + _least(graph, inputs[1]))
        if node.op_type == "ArgMax":
            return 0.0
    return lowest
