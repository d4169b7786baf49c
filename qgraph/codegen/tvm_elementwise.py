"""Operators whose elements depend on one element of each input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qgraph.codegen.tvm_site import Element, Operand, Site, constant, rule

__all__: list[str] = []


def _operations(dtype: str) -> Mapping[str, Callable[..., Element]]:
    from tvm import tirx

    return {
        "Add": lambda a, b: a + b,
        "Sub": lambda a, b: a - b,
        "Mul": lambda a, b: a * b,
        # Never zero in the branch of an If that is taken, but both branches are computed.
        "Div": lambda a, b: tirx.truncdiv(a, tirx.max(b, constant(1, dtype))),
        "Neg": lambda a: -a,
        "Abs": lambda a: tirx.Select(a < 0, -a, a),
        "Sign": lambda a: (a > 0).astype(dtype) - (a < 0).astype(dtype),
        # TVM generates no code for comparing truths.
        "Equal": (lambda a, b: a.astype("int8") == b.astype("int8")) if dtype == "bool" else lambda a, b: a == b,
        "Greater": lambda a, b: a > b,
        "Less": lambda a, b: a < b,
        "GreaterOrEqual": lambda a, b: a >= b,
        "LessOrEqual": lambda a, b: a <= b,
        "And": tirx.And,
        "Or": tirx.Or,
        "Xor": lambda a, b: tirx.And(tirx.Or(a, b), tirx.Not(tirx.And(a, b))),
        "Not": tirx.Not,
        "Where": tirx.Select,
        "Max": lambda *elements: functools.reduce(tirx.max, elements),
        "Min": lambda *elements: functools.reduce(tirx.min, elements),
    }


@rule("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sign", "Max", "Min", "Where", "And", "Or", "Xor", "Not")
@rule("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")
def _plain(site: Site) -> Operand:
    return site.elementwise(_operations(site.dtype())[site.node.op_type], *site.operands)


@rule("Clip")
def _clip(site: Site) -> Operand:
    from tvm import tirx

    # The upper bound comes last, so that it wins where the bounds cross.
    steps = [(tirx.max, site.optional(1)), (tirx.min, site.optional(2))]
    present = [(step, bound) for step, bound in steps if bound is not None]

    def element(x: Element, *bounds: Element) -> Element:
        for (step, _), bound in zip(present, bounds, strict=True):
            x = step(x, bound)
        return x

    return site.elementwise(element, site[0], *(bound for _, bound in present))


@rule("Cast")
def _cast(site: Site) -> Operand:
    dtype = str(ir.DataType(site.attributes["to"]).numpy())
    if np.dtype(dtype).kind not in "biu":
        raise site.refuse(f"it casts to {dtype}, which is no integer")
    if dtype == "bool" and site.dtype() != "bool":
        return site.elementwise(lambda x: x != 0, site[0])
    return site.elementwise(lambda x: x.astype(dtype), site[0])


@rule("Identity")
def _identity(site: Site) -> Operand:
    return site[0]
