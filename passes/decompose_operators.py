"""Operators that are short for several plainer ones.

    Sum(a, b, c)                          =>    Add(Add(a, b), c)
    Mean(a, b)                            =>    Mul(Add(a, b), 1/2)
    Dropout(x)                            =>    Identity(x)                         at inference
    ReduceProd(x), of 5 elements          =>    products of halves, and of their halves
    Hardmax(x)                            =>    Cast(Equal(ArgMax(x), [0, 1, ...]))
    MatMul(x[n,k], v[k])                  =>    Squeeze(MatMul(x, Unsqueeze(v)))
    Gemm<transA=1, alpha>(A, B, C)        =>    Add(Mul(MatMul(Transpose(A), B), alpha), C)

A Gemm goes only where it is more than a linear layer: with two computed factors, a transposed first one, or an addend
that is computed or is not one number for each column. Does not fire, with the reason in the report, where a rank or a
size that this needs is not known, where Dropout's mask is read, and for a reduction that may reduce nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import is_stored
from qgraph.passes._plain_operators import Emitter, PlainAlready, Rewriting, UnfitError, rewrite, static_sizes
from qgraph.passes._plain_windows import number
from qgraph.pipeline import Context, Pass, Report

__all__ = ["DecomposeOperators"]


@dataclass(frozen=True)
class DecomposeOperators(Pass):
    """Write operators that are short for several as these: Sum, Mean, Hardmax, ReduceProd, products of vectors."""

    name: ClassVar[str] = "decompose-operators"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; `skipped` has every such node that stays."""
        del context
        return rewrite(model, _REWRITINGS, "decomposed")


# --- of each element -------------------------------------------------------------------------------------------------


def _sum(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    first, *others = node.inputs
    if first is None or not others:
        return [emit("Identity", first)]
    return [functools.reduce(lambda total, value: emit("Add", total, value), others, first)]


def _mean(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    (total,) = _sum(node, emit)
    count = len(node.inputs)
    return [total if count == 1 else emit("Mul", total, number(emit, "share", node.inputs[0], 1 / count))]


def _dropout(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise UnfitError("its mask is read")
    training = node.inputs[2] if len(node.inputs) > 2 else None
    mode = qgraph.ir.constant(training)
    if training is not None and (mode is None or mode.any()):
        raise UnfitError("its training mode is on, or computed")
    return (emit("Identity", node.inputs[0]), *(None for _ in node.outputs[1:]))


# --- along axes ------------------------------------------------------------------------------------------------------


def _product(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Multiply the first half of an axis with the second until one element is left, for each axis in turn."""
    value, axes = node.inputs[0], _reduced_axes(node)
    sizes = static_sizes(value, axes, "a size that it multiplies along is")
    if value is None or 0 in sizes:
        raise UnfitError("it multiplies nothing")
    if node.attributes.get_int("keepdims", 1) == 0 and not axes:
        raise UnfitError("it may reduce nothing")
    for axis, size in zip(axes, sizes, strict=True):
        while size > 1:
            half, odd = divmod(size, 2)
            first, second, *rest = emit.split(value, [half, half, *[1] * odd], axis)
            value = emit.join([emit("Mul", first, second), *rest], axis)
            size = half + odd
    if node.attributes.get_int("keepdims", 1) == 0:
        value = emit("Squeeze", value, emit.integers("axes", axes))
    return [value if emit.nodes else emit("Identity", value)]


def _reduced_axes(node: ir.Node) -> list[int]:
    value, given = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or value.shape is None:
        raise UnfitError("the shape of its input is not known")
    array = qgraph.ir.constant(given)
    if given is not None and array is None:
        raise UnfitError("its axes are computed")
    if array is None or not array.size:
        if node.attributes.get_int("noop_with_empty_axes", 0):
            raise UnfitError("it may reduce nothing (noop_with_empty_axes)")
        return list(range(len(value.shape)))
    return sorted(int(axis) % len(value.shape) for axis in array.reshape(-1))


def _hardmax(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    value, axis = node.inputs[0], node.attributes.get_int("axis", -1)
    (size,) = static_sizes(value, [axis], "the size that it runs over is")
    if value is None or value.shape is None or value.dtype is None:
        raise UnfitError("the type of its input is not known")
    rank = len(value.shape)
    places = np.arange(size).reshape([-1 if one == axis % rank else 1 for one in range(rank)])
    largest = emit("ArgMax", value, axis=axis, keepdims=1)
    return [emit("Cast", emit("Equal", largest, emit.constant("places", places)), to=int(value.dtype))]


# --- products --------------------------------------------------------------------------------------------------------


def _vectors(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Give a vector an axis of one, in front where it is the left factor and behind where it is the right one."""
    ranks = [None if value is None or value.shape is None else len(value.shape) for value in node.inputs]
    if None in ranks:
        raise UnfitError("the rank of a factor is not known")
    axes = [-2, -1]
    flat = [place for place in (0, 1) if ranks[place] == 1]
    if not flat:
        raise PlainAlready
    factors = [_raised(emit, value, place) if place in flat else value for place, value in enumerate(node.inputs)]
    return [emit("Squeeze", emit("MatMul", *factors), emit.integers("axes", [axes[place] for place in flat]))]


def _raised(emit: Emitter, value: ir.Value | None, axis: int) -> ir.Value:
    array = qgraph.ir.constant(value)
    if array is not None:
        return emit.constant(f"factor{axis}", np.expand_dims(array, axis))
    return emit("Unsqueeze", value, emit.integers(f"axis{axis}", [axis]))


def _gemm(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    left, right, *rest = node.inputs
    addend = rest[0] if rest else None
    flipped = [node.attributes.get_int(name, 0) != 0 for name in ("transA", "transB")]
    if is_stored(right) and not flipped[0] and (addend is None or _is_row(addend)):
        raise PlainAlready
    alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    product = emit("MatMul", *(_flipped(emit, *one) for one in zip("AB", (left, right), flipped, strict=True)))
    product = _scaled(emit, "alpha", product, alpha, right)
    return [product if addend is None else emit("Add", product, _scaled(emit, "beta", addend, beta, right))]


def _is_row(addend: ir.Value) -> bool:
    """Tell whether what a Gemm adds is constant, and the same in every row."""
    array = qgraph.ir.constant(addend)
    if array is None:
        return is_stored(addend)
    return array.ndim < 2 or array.shape[0] == 1


def _flipped(emit: Emitter, name: str, value: ir.Value | None, flip: bool) -> ir.Value | None:
    array = qgraph.ir.constant(value)
    if not flip:
        return value
    return emit("Transpose", value, perm=[1, 0]) if array is None else emit.constant(name, array.T)


def _scaled(emit: Emitter, name: str, value: ir.Value, factor: float, like: ir.Value | None) -> ir.Value:
    return value if factor == 1 else emit("Mul", value, number(emit, name, like, factor))


_REWRITINGS: Mapping[str, Rewriting] = {
    "Dropout": _dropout,
    "Gemm": _gemm,
    "Hardmax": _hardmax,
    "MatMul": _vectors,
    "Mean": _mean,
    "ReduceProd": _product,
    "Sum": _sum,
}
