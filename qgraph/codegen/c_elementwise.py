"""Operators that compute an element from one element of each input."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qgraph.codegen import c_text
from qgraph.codegen.c_fusion import input_of, producer_of
from qgraph.codegen.c_graph import IntegerGraph, refusal
from qgraph.codegen.c_kernel import Index, Kernel, broadcast_index
from qgraph.codegen.c_rules import Access, Kind, Read, register

__all__ = ["operands"]

_INFIX = {
    "Add": "+",
    "And": "&",
    "Div": "/",
    "Mul": "*",
    "Or": "|",
    "Sub": "-",
    "Xor": "^",
}
_COMPARISONS = {"Equal": "==", "Greater": ">", "GreaterOrEqual": ">=", "Less": "<", "LessOrEqual": "<="}


def operands(kernel: Kernel, value: ir.Value, index: Index) -> list[str]:
    """Return atoms for the elements of all inputs of a value's node, broadcast to an index of the value."""
    inputs = [one for one in producer_of(value).inputs if one is not None]
    return [kernel.element(one, broadcast_index(kernel, one, index)) for one in inputs]


def _local(kernel: Kernel, source: ir.Value, index: Index) -> str:
    """Return an element of an input as a local or a literal, which may be compared with what its type cannot hold."""
    atom = kernel.element(source, broadcast_index(kernel, source, index))
    return kernel.temporary(kernel.graph.dtype(source), atom) if "[" in atom else atom


@register(Kind.ELEMENT, *_INFIX)
def _infix(kernel: Kernel, value: ir.Value, index: Index) -> str:
    a, b = operands(kernel, value, index)
    return kernel.temporary(kernel.graph.dtype(value), f"{a} {_INFIX[producer_of(value).op_type]} {b}")


@register(Kind.ELEMENT, *_COMPARISONS)
def _compared(kernel: Kernel, value: ir.Value, index: Index) -> str:
    a, b = (_local(kernel, one, index) for one in producer_of(value).inputs if one is not None)
    return kernel.temporary(kernel.graph.dtype(value), f"{a} {_COMPARISONS[producer_of(value).op_type]} {b}")


@register(Kind.ELEMENT, "Max", "Min")
def _extreme(kernel: Kernel, value: ir.Value, index: Index) -> str:
    sign = ">" if producer_of(value).op_type == "Max" else "<"
    result, *rest = (_local(kernel, one, index) for one in producer_of(value).inputs if one is not None)
    for other in rest:
        result = kernel.temporary(kernel.graph.dtype(value), f"{result} {sign} {other} ? {result} : {other}")
    return result


@register(Kind.ELEMENT, "Clip")
def _clip(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node, dtype = producer_of(value), kernel.graph.dtype(value)
    bounds = [*node.inputs[1:], None, None]
    result = _local(kernel, input_of(value), index)
    # The upper bound comes last, so that it wins where the bounds cross.
    for bound, sign in zip(bounds[:2], "<>", strict=True):
        if bound is not None:
            limit = _local(kernel, bound, index)
            result = kernel.temporary(dtype, f"{result} {sign} {limit} ? {limit} : {result}")
    return result


@register(Kind.ELEMENT, "Abs", "Neg", "Not", "Sign")
def _unary(kernel: Kernel, value: ir.Value, index: Index) -> str:
    (x,) = operands(kernel, value, index)
    text = {"Abs": f"{x} < 0 ? -{x} : {x}", "Neg": f"-{x}", "Not": f"!{x}", "Sign": f"({x} > 0) - ({x} < 0)"}
    return kernel.temporary(kernel.graph.dtype(value), text[producer_of(value).op_type])


@register(Kind.ELEMENT, "Cast")
def _cast(kernel: Kernel, value: ir.Value, index: Index) -> str:
    (x,) = operands(kernel, value, index)
    before, after = kernel.graph.dtype(input_of(value)), kernel.graph.dtype(value)
    if after.kind == "b" and before.kind != "b":
        return kernel.temporary(after, f"{x} != 0")
    if c_text.temporary_type(before) == c_text.temporary_type(after):
        return x  # the value fits, and C computes both in the same type
    return kernel.temporary(after, f"({c_text.temporary_type(after)}){x}")


@register(Kind.ELEMENT, "Where")
def _where(kernel: Kernel, value: ir.Value, index: Index) -> str:
    condition, a, b = operands(kernel, value, index)
    return kernel.temporary(kernel.graph.dtype(value), f"{condition} ? {a} : {b}")


@register(Kind.ELEMENT, "BitShift")
def _shift(kernel: Kernel, value: ir.Value, index: Index) -> str:
    a, b = operands(kernel, value, index)
    sign = "<<" if producer_of(value).attributes.get_string("direction", "LEFT") == "LEFT" else ">>"
    return kernel.temporary(kernel.graph.dtype(value), f"{a} {sign} {b}")


# --- functions of domain "qgraph" ------------------------------------------------------------------------------------


@register(Kind.ELEMENT, "Requantize", domain="qgraph")
def _requantize(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node = producer_of(value)
    rounding = node.attributes.get_string("rounding", "")
    if rounding not in ("half-up", "gemmlowp", "half-even"):
        raise refusal(node, f"its rounding is '{rounding}', which is none of half-up, gemmlowp, half-even")
    function = kernel.helper(f"requantize_{rounding.replace('-', '_')}")
    arguments = ", ".join(operands(kernel, value, index))
    return kernel.temporary(kernel.graph.dtype(value), f"{function}({arguments})")


@register(Kind.ELEMENT, "IntegerSqrt", "RoundedDivide", domain="qgraph")
def _function(kernel: Kernel, value: ir.Value, index: Index) -> str:
    function = {"IntegerSqrt": "integer_sqrt", "RoundedDivide": "rounded_divide"}[producer_of(value).op_type]
    arguments = ", ".join(operands(kernel, value, index))
    return kernel.temporary(kernel.graph.dtype(value), f"{kernel.helper(function)}({arguments})")


def _table_reads(graph: IntegerGraph, node: ir.Node) -> Sequence[Read]:
    del graph
    x, table = node.inputs[:2]
    assert x is not None
    assert table is not None
    return [(x, Access.BROADCAST), (table, Access.MEMORY)]


@register(Kind.ELEMENT, "TableInterpolate", reads=_table_reads, domain="qgraph")
def _table(kernel: Kernel, value: ir.Value, index: Index) -> str:
    x, table = input_of(value), input_of(value, 1)
    element = kernel.element(x, broadcast_index(kernel, x, index))
    call = f"{kernel.helper('table_interpolate')}({element}, {kernel.pointer(table)})"
    return kernel.temporary(kernel.graph.dtype(value), call)
