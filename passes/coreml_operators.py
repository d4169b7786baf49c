"""Operators that ONNX Runtime's CoreML provider has, in the place of others.

    Neg(x)             =>    Mul(x, -1)
    Abs(x)             =>    Max(x, Mul(x, -1))
    Floor(x)           =>    Mul(Ceil(Mul(x, -1)), -1)
    Min(a, b)          =>    Mul(Max(Mul(a, -1), Mul(b, -1)), -1)
    Sum(a, b, c)       =>    Add(Add(a, b), c)
    HardSwish(x)       =>    Mul(x, HardSigmoid<alpha=1/6, beta=1/2>(x))
    Expand(x, sizes)   =>    Tile(Reshape(x), repeats)
    ReduceL2(x)        =>    Sqrt(ReduceSum(Mul(x, x)))                     ReduceSumSquare likewise, without Sqrt

The same numbers, to the bit but for the last two lines' order of sums. Each node that the provider does not have cuts
the graph in two, and what goes between the parts is copied. Floating-point tensors only: of others the provider takes
hardly any. An Expand whose sizes are not known stays, with the reason in the report.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.passes._plain_operators import Emitter, PlainAlready, Rewriting, UnfitError, rewrite, static_sizes
from qgraph.pipeline import Context, Pass, Report

__all__ = ["CoremlOperators"]


@dataclass(frozen=True)
class CoremlOperators(Pass):
    """Write what ONNX Runtime's CoreML provider does not have in operators that it has."""

    name: ClassVar[str] = "coreml-operators"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; `skipped` has the nodes of these operators that stay."""
        del context
        return rewrite(model, _REWRITINGS, "written in the provider's operators")


def _number(node: ir.Node, emit: Emitter, name: str, number: float) -> ir.Value:
    """Return a constant of the type of the first input, which must be a floating-point one."""
    value = node.inputs[0]
    if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise PlainAlready("the provider takes floating-point numbers only")
    return emit.constant(name, np.asarray(number, value.dtype.numpy()))


def _negative(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    return [emit("Mul", node.inputs[0], _number(node, emit, "minus_one", -1))]


def _absolute(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    minus = _number(node, emit, "minus_one", -1)
    return [emit("Max", node.inputs[0], emit("Mul", node.inputs[0], minus))]


def _floor(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    minus = _number(node, emit, "minus_one", -1)
    return [emit("Mul", emit("Ceil", emit("Mul", node.inputs[0], minus)), minus)]


def _least(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    minus = _number(node, emit, "minus_one", -1)
    turned = [emit("Mul", value, minus) for value in node.inputs]
    return [emit("Mul", functools.reduce(functools.partial(emit, "Max"), turned), minus)]


def _sum(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    if len(node.inputs) < 2:
        raise PlainAlready("there is nothing to add")
    values = [value for value in node.inputs if value is not None]
    return [functools.reduce(functools.partial(emit, "Add"), values)]


def _hard_swish(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    return [emit("Mul", node.inputs[0], emit("HardSigmoid", node.inputs[0], alpha=1 / 6, beta=0.5))]


def _expand(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    value = node.inputs[0]
    if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise PlainAlready("the provider takes floating-point numbers only")
    before = static_sizes(value, slice(None), "the sizes of its input are")
    after = static_sizes(node.outputs[0], slice(None), "the sizes of its output are")
    filled = [*[1] * (len(after) - len(before)), *before]
    if filled != before:
        value = emit("Reshape", value, emit.integers("filled", filled))
    repeats = [new if old == 1 else 1 for old, new in zip(filled, after, strict=True)]
    return [emit("Tile", value, emit.integers("repeats", repeats))]


def _squares(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    value, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise PlainAlready("the provider takes floating-point numbers only")
    if node.attributes.get_int("noop_with_empty_axes", 0):
        raise UnfitError("it may reduce nothing (noop_with_empty_axes)")
    keep = node.attributes.get_int("keepdims", 1)
    total = emit("ReduceSum", emit("Mul", value, value), axes, keepdims=keep)
    return [emit("Sqrt", total) if node.op_type == "ReduceL2" else total]


_REWRITINGS: dict[str, Rewriting] = {
    "Neg": _negative,
    "Abs": _absolute,
    "Floor": _floor,
    "Min": _least,
    "Sum": _sum,
    "HardSwish": _hard_swish,
    "Expand": _expand,
    "ReduceL2": _squares,
    "ReduceSumSquare": _squares,
}
