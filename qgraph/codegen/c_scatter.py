"""Operators that put elements at computed places, and the one that puts them in order."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qgraph.codegen.c_fusion import input_of, producer_of
from qgraph.codegen.c_gather import index_of
from qgraph.codegen.c_graph import IntegerGraph, refusal
from qgraph.codegen.c_kernel import Index, Kernel
from qgraph.codegen.c_rules import Access, Kind, Read, once, register

__all__: list[str] = []


def _scattered(graph: IntegerGraph, node: ir.Node) -> Sequence[Read]:
    del graph
    if node.attributes.get_string("reduction", "none") != "none":
        raise refusal(node, "it combines what it puts with what is there (reduction)")
    data, indices, updates = (value for value in node.inputs if value is not None)
    return [(data, Access.ONCE), (indices, Access.MANY), (updates, Access.ONCE)]


@register(Kind.WHOLE, "ScatterElements", reads=_scattered)
def _scatter_elements(kernel: Kernel, value: ir.Value, index: Index) -> str:
    del index
    indices, updates = input_of(value, 1), input_of(value, 2)
    shape = kernel.graph.shape(value)
    axis = producer_of(value).attributes.get_int("axis", 0) % len(shape)
    _copy(kernel, value)
    with kernel.loops(kernel.graph.shape(indices)) as at:
        place = index_of(kernel, indices, at, shape[axis])
        kernel.store((*at[:axis], place, *at[axis + 1 :]), kernel.element(updates, at))
    return ""


@register(Kind.WHOLE, "ScatterND", reads=_scattered)
def _scatter_nd(kernel: Kernel, value: ir.Value, index: Index) -> str:
    del index
    indices, updates = input_of(value, 1), input_of(value, 2)
    shape = kernel.graph.shape(value)
    *tuples, depth = kernel.graph.shape(indices)
    _copy(kernel, value)
    with kernel.loops(kernel.graph.shape(updates)) as at:
        outer, inner = at[: len(tuples)], at[len(tuples) :]
        places = [index_of(kernel, indices, (*outer, str(axis)), shape[axis]) for axis in range(depth)]
        kernel.store((*places, *inner), kernel.element(updates, at))
    return ""


def _copy(kernel: Kernel, value: ir.Value) -> None:
    with kernel.loops(kernel.graph.shape(value)) as at:
        kernel.store(at, kernel.element(input_of(value), at))


@register(Kind.ROWS, "TopK", reads=once)
def _top_k(kernel: Kernel, value: ir.Value, index: Index) -> str:
    """Copy a row, and look for the next in order as often as is asked; of equal elements the first comes first."""
    del index
    node, data = producer_of(value), input_of(value)
    shape, count = kernel.graph.shape(data), kernel.graph.shape(value)
    axis = node.attributes.get_int("axis", -1) % len(shape)
    sign = ">" if node.attributes.get_int("largest", 1) else "<"
    row = kernel.buffer("row", kernel.graph.dtype(data), shape[axis])
    with kernel.loops([1 if one == axis else size for one, size in enumerate(shape)]) as outer:
        with kernel.block(f"for (int32_t k = 0; k < {shape[axis]}; ++k)"):
            kernel.line(f"{row}[k] = {kernel.element(data, (*outer[:axis], 'k', *outer[axis + 1 :]))};")
        kernel.line("int32_t last = -1;")
        with kernel.block(f"for (int32_t place = 0; place < {count[axis]}; ++place)"):
            kernel.line("int32_t best = -1;")
            with kernel.block(f"for (int32_t k = 0; k < {shape[axis]}; ++k)"):
                behind = f"last < 0 || {row}[last] {sign} {row}[k] || ({row}[k] == {row}[last] && k > last)"
                with kernel.block(f"if (({behind}) && (best < 0 || {row}[k] {sign} {row}[best]))"):
                    kernel.line("best = k;")
            kernel.line("last = best;")
            found = f"{row}[last]" if value is node.outputs[0] else "last"
            kernel.finish((*outer[:axis], "place", *outer[axis + 1 :]), found)
    return ""
