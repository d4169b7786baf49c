"""Operators that gather many elements into one: reductions, poolings, and those that go along rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.codegen import c_text
from qgraph.codegen.c_fusion import input_of, producer_of
from qgraph.codegen.c_graph import IntegerGraph, refusal
from qgraph.codegen.c_kernel import Index, Kernel
from qgraph.codegen.c_rules import Access, Kind, Read, every, first, once, register
from qgraph.codegen.c_windows import window_of

__all__: list[str] = []


# --- over axes -------------------------------------------------------------------------------------------------------


def _axes(graph: IntegerGraph, node: ir.Node, rank: int) -> list[int]:
    given = list(node.attributes.get_ints("axes", ())) or graph.integers(node, 1, [])
    if not given and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
        return []
    return sorted(axis % rank for axis in given) or list(range(rank))


def _inner_index(axes: Sequence[int], index: Index, inner: Index, rank: int, *, keep: bool) -> Index:
    """Return an index of the input: `inner` along the reduced axes, `index` of the output along the others."""
    outer = iter([one for axis, one in enumerate(index) if axis not in axes] if keep else index)
    reduced = iter(inner)
    return tuple(next(reduced) if axis in axes else next(outer) for axis in range(rank))


@register(Kind.SCALAR, "ReduceMax", "ReduceMin", "ReduceSum", reads=once)
def _reduce(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node, shape = producer_of(value), kernel.graph.shape(input_of(value))
    axes, keep = _axes(kernel.graph, node, len(shape)), bool(node.attributes.get_int("keepdims", 1))
    dtype, result = kernel.graph.dtype(value), kernel.fresh("sum" if node.op_type == "ReduceSum" else "extreme")
    start = 0
    if node.op_type != "ReduceSum":
        if not math.prod(shape[axis] for axis in axes):
            raise refusal(node, "there is no extreme of nothing")
        limits = np.iinfo(dtype)
        start = int(limits.min if node.op_type == "ReduceMax" else limits.max)
    kernel.line(f"{c_text.temporary_type(dtype)} {result} = {c_text.literal(start, dtype)};")
    with kernel.loops([shape[axis] for axis in axes], kernel.fresh("r")) as inner:
        element = kernel.element(input_of(value), _inner_index(axes, index, inner, len(shape), keep=keep))
        if node.op_type == "ReduceSum":
            kernel.line(f"{result} += {element};")
        else:
            _keep_extreme(kernel, result, element, ">" if node.op_type == "ReduceMax" else "<")
    return result


def _keep_extreme(kernel: Kernel, result: str, element: str, sign: str) -> None:
    kernel.line(f"{result} = {element} {sign} {result} ? {element} : {result};")


@register(Kind.SCALAR, "ArgMax", "ArgMin", reads=once)
def _arg(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node, shape = producer_of(value), kernel.graph.shape(input_of(value))
    axis, keep = node.attributes.get_int("axis", 0) % len(shape), bool(node.attributes.get_int("keepdims", 1))
    last = "=" if node.attributes.get_int("select_last_index", 0) else ""
    sign = (">" if node.op_type == "ArgMax" else "<") + last
    place, best, at = kernel.fresh("place"), kernel.fresh("best"), kernel.fresh("r")
    dtype = kernel.graph.dtype(input_of(value))
    limits = np.iinfo(dtype)
    start = int(limits.min if node.op_type == "ArgMax" else limits.max)
    kernel.line(f"int64_t {place} = 0;")
    kernel.line(f"{c_text.temporary_type(dtype)} {best} = {c_text.literal(start, dtype)};")
    with kernel.block(f"for (int32_t {at} = 0; {at} < {shape[axis]}; ++{at})"):
        element = kernel.element(input_of(value), _inner_index([axis], index, (at,), len(shape), keep=keep))
        with kernel.block(f"if ({element} {sign} {best})"):
            kernel.line(f"{best} = {element};")
            kernel.line(f"{place} = {at};")
    return place


@register(Kind.SCALAR, "MaxPool", reads=first(Access.MANY))
def _max_pool(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node = producer_of(value)
    if len(node.outputs) > 1 and node.outputs[1].uses():
        raise refusal(node, "its second output, the indices, is read")
    window = window_of(kernel.graph, node, value, node.attributes.get_ints("kernel_shape", ()))
    dtype, result = kernel.graph.dtype(value), kernel.fresh("largest")
    kernel.line(f"{c_text.temporary_type(dtype)} {result} = {c_text.literal(int(np.iinfo(dtype).min), dtype)};")
    spatial = len(index) - 2
    places = []
    with kernel.loops(window.kernel, kernel.fresh("k")) as at:
        for axis in range(2 - spatial, 2):
            step = c_text.times(at[axis], window.dilations[axis])
            start = window.start(axis, index[axis + spatial])
            place = kernel.fresh("at")
            kernel.line(f"const int32_t {place} = {' + '.join(part for part in (start, step) if part)};")
            places.append(place)
        inside = [window.inside(axis, place) for axis, place in zip(range(2 - spatial, 2), places, strict=True)]
        condition = " && ".join(part for part in inside if part)
        with kernel.block(f"if ({condition or '1'})"):
            element = kernel.element(input_of(value), (*index[:2], *places))
            _keep_extreme(kernel, result, element, ">")
    return result


# --- along rows ------------------------------------------------------------------------------------------------------


@register(Kind.ROWS, "CumSum", reads=once)
def _running_sum(kernel: Kernel, value: ir.Value, index: Index) -> str:
    del index
    node, shape = producer_of(value), kernel.graph.shape(value)
    axis = kernel.graph.integers(node, 1)[0] % len(shape)
    dtype, size = kernel.graph.dtype(value), shape[axis]
    total = kernel.fresh("sum")
    with kernel.loops([1 if one == axis else size for one, size in enumerate(shape)]) as outer:
        kernel.line(f"{c_text.temporary_type(dtype)} {total} = 0;")
        with kernel.block(f"for (int32_t k = 0; k < {size}; ++k)"):
            place = f"{size - 1} - k" if node.attributes.get_int("reverse", 0) else "k"
            here = (*outer[:axis], place, *outer[axis + 1 :])
            element = kernel.element(input_of(value), here)
            if node.attributes.get_int("exclusive", 0):
                before = kernel.temporary(dtype, total)
                kernel.line(f"{total} += {element};")
                kernel.finish(here, before)
            else:
                kernel.line(f"{total} += {element};")
                kernel.finish(here, total)
    return ""


def _row_reads(graph: IntegerGraph, node: ir.Node) -> Sequence[Read]:
    del graph
    inputs = [value for value in node.inputs if value is not None]
    return [(inputs[0], Access.ONCE), *((value, Access.MEMORY) for value in inputs[1:])]


@register(Kind.ROWS, "LayerNormalize", "RMSNormalize", "Softmax", reads=_row_reads, domain="qgraph")
def _row(kernel: Kernel, value: ir.Value, index: Index) -> str:
    """Copy a row to memory of its own, work on it there, and hand it on element by element."""
    del index
    node, shape = producer_of(value), kernel.graph.shape(value)
    length = shape[-1]
    row = kernel.buffer("row", np.dtype(np.int32), length)
    with kernel.loops((*shape[:-1], 1)) as outer:
        with kernel.block(f"for (int32_t k = 0; k < {length}; ++k)"):
            kernel.line(f"row[k] = {kernel.element(input_of(value), (*outer[:-1], 'k'))};")
        kernel.line(f"{_row_call(kernel, node, row, length)};")
        with kernel.block(f"for (int32_t k = 0; k < {length}; ++k)"):
            kernel.finish((*outer[:-1], "k"), "row[k]")
    return ""


def _row_call(kernel: Kernel, node: ir.Node, row: str, length: int) -> str:
    values = [value for value in node.inputs[1:] if value is not None]
    if node.op_type == "Softmax":
        table, *values = values
        function = kernel.helper("softmax_row")
        arguments = [kernel.pointer(table), str(kernel.graph.size(table) - 1)]
    else:
        function = kernel.helper("layer_normalize_row" if node.op_type == "LayerNormalize" else "rms_normalize_row")
        arguments = []
    arguments += [kernel.element(value, ("0",) * len(kernel.graph.shape(value))) for value in values]
    return f"{function}({', '.join([row, str(length), *arguments])})"


@register(Kind.WHOLE, "Concat", reads=every(Access.ONCE))
def _concat(kernel: Kernel, value: ir.Value, index: Index) -> str:
    del index
    node, output = producer_of(value), kernel.graph.shape(value)
    axis = node.attributes.get_int("axis") % len(output)
    before = 0
    for part in node.inputs:
        assert part is not None
        shape = kernel.graph.shape(part)
        with kernel.loops(shape) as at:
            place = c_text.plus(at[axis], before)
            kernel.store((*at[:axis], place, *at[axis + 1 :]), kernel.element(part, at))
        before += shape[axis]
    return ""
