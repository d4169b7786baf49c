"""Matrix products: of rows with packed weights, or of two tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.codegen import c_text
from qgraph.codegen.c_fusion import input_of, producer_of
from qgraph.codegen.c_graph import IntegerGraph, refusal
from qgraph.codegen.c_kernel import Index, Kernel, broadcast_index
from qgraph.codegen.c_products import ROW_TYPE, centred, minus, packed, rows_at_once, zero_point_of
from qgraph.codegen.c_rules import Access, Kind, Read, register

__all__: list[str] = []


def _matrix_reads(graph: IntegerGraph, node: ir.Node) -> Sequence[Read]:
    a, b = node.inputs[:2]
    assert a is not None
    assert b is not None
    if min(len(graph.shape(a)), len(graph.shape(b))) < 2:
        raise refusal(node, "one of its inputs is a vector; make it a matrix of one row or column")
    return [(a, Access.ONCE), (b, Access.MANY)]


@register(Kind.ROWS, "MatMul", "MatMulInteger", reads=_matrix_reads)
def _product(kernel: Kernel, value: ir.Value, index: Index) -> str:
    del index
    weight = kernel.graph.constant(input_of(value, 1))
    if weight is not None and weight.size == weight.shape[-1] * weight.shape[-2] and weight.dtype.itemsize == 1:
        _multiply_by_weights(kernel, value, weight.reshape(weight.shape[-2:]))
    else:
        _multiply(kernel, value)
    return ""


def _multiply_by_weights(kernel: Kernel, value: ir.Value, weight: np.ndarray) -> None:
    graph, node, source = kernel.graph, producer_of(value), input_of(value, 0)
    zero_point = zero_point_of(graph, node, 2)
    weights, dot = packed(kernel, input_of(value, 1), weight.astype(np.int32).T - zero_point_of(graph, node, 3))
    length, columns = weight.shape
    rank = len(graph.shape(kernel.fused.output))
    if rank > 2 and source not in kernel.fused.inlined and kernel.alike(range(rank - 1)):
        kernel.merge([list(range(rank - 1)), [rank - 1]])
    *batch, height, _ = kernel.shape(value)
    count = rows_at_once(height, length)
    rows = kernel.buffer("rows", ROW_TYPE, count * length)
    with kernel.loops(batch, "outer") as outer, kernel.steps("first", height, count) as (first, here):
        with (
            kernel.block(f"for (int32_t r = 0; r < {here}; ++r)"),
            kernel.block(f"for (int32_t k = 0; k < {length}; ++k)"),
        ):
            row = "0" if height == 1 else "r" if first == "0" else f"{first} + r"
            place = c_text.offset(("r", "k"), (count, length))
            element = kernel.element(source, broadcast_index(kernel, source, (*outer, row, "k")))
            kernel.line(f"{rows}[{place}] = (int16_t)({minus(element, zero_point)});")
        with (
            kernel.block(f"for (int32_t f = 0; f < {columns}; ++f)"),
            kernel.block(f"for (int32_t r = 0; r < {here}; ++r)"),
        ):
            total = kernel.local("total", f"{dot}({weights} + f * {length}, {rows} + r * {length}, {length})")
            row = "0" if height == 1 else "r" if first == "0" else kernel.local("row", f"{first} + r")
            kernel.finish((*outer, row, "0" if columns == 1 else "f"), total)


def _multiply(kernel: Kernel, value: ir.Value) -> None:
    """Add rows of the second matrix, times elements of the first, to a row of sums."""
    graph, node = kernel.graph, producer_of(value)
    a, b = input_of(value, 0), input_of(value, 1)
    integer = node.op_type == "MatMulInteger"
    zero_a, zero_b = (zero_point_of(graph, node, position) if integer else 0 for position in (2, 3))
    *batch, height, columns = graph.shape(value)
    length, dtype = graph.shape(a)[-1], graph.dtype(value)
    sums = kernel.buffer("sums", dtype, columns)
    with kernel.loops((*batch, height), "outer") as outer:
        with kernel.block(f"for (int32_t f = 0; f < {columns}; ++f)"):
            kernel.line(f"{sums}[f] = 0;")
        with kernel.loops((length,), "k") as (inner,):
            left = kernel.element(a, broadcast_index(kernel, a, (*outer, inner)))
            scale = kernel.local("factor", minus(left, zero_a) if zero_a else left, dtype)
            with kernel.block(f"for (int32_t f = 0; f < {columns}; ++f)"):
                right = kernel.element(b, broadcast_index(kernel, b, (*outer[:-1], inner, "f")))
                kernel.line(f"{sums}[f] += {scale} * {centred(right, zero_b)};")
        with kernel.block(f"for (int32_t f = 0; f < {columns}; ++f)"):
            kernel.finish((*outer, "f"), f"{sums}[f]")
