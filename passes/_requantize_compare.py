"""Comparisons of tensors in integers.

D(a) < D(b)    =>    a < b                 at one scale, which `full-qdq` gives to both
               =>    a * k < b * l         k, l: how many steps of a common scale one step of each is
D(a) < c       =>    a < limits            exactly where what the integers stand for is below c
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.analysis.integer_rules import is_stored
from qgraph.analysis.integer_units import Unit
from qgraph.passes._requantize_elementwise import accumulator_step
from qgraph.passes._requantize_writer import Codes, UnfitError, Writer

__all__ = ["compare"]

_INT32, _BOOL = ir.DataType.INT32, ir.DataType.BOOL
_MIRRORED = {"Greater": "Less", "GreaterOrEqual": "LessOrEqual", "Less": "Greater", "LessOrEqual": "GreaterOrEqual"}


def compare(writer: Writer, unit: Unit) -> ir.Value:
    """Write a comparison of two tensors, or of one with a constant for each of its elements."""
    op_type, (left, right) = unit.main.op_type, unit.terms
    if is_stored(right):
        return _with_limits(writer, op_type, writer.codes(left), writer.real(right))
    if is_stored(left):
        return _with_limits(writer, _MIRRORED.get(op_type, op_type), writer.codes(right), writer.real(left))
    sides = [writer.codes(value) for value in unit.terms]
    forms = [side.form for side in sides]
    if forms[0] == forms[1]:
        return writer.op(op_type, [side.value for side in sides], _BOOL)
    reaches = [form.reach for form in forms]
    _, factors = accumulator_step(forms, reaches, 0.0, min(form.scale for form in forms))
    factored = [writer.times(writer.centred(side), factor) for side, factor in zip(sides, factors, strict=True)]
    return writer.op(op_type, factored, _BOOL)


def _with_limits(writer: Writer, op_type: str, source: Codes, reals: np.ndarray) -> ir.Value:
    """Compare integers with the first that stands for a number (or for more than a number)."""
    if np.isnan(reals).any():
        raise UnfitError("its constant holds NaN")
    points, (low, _) = source.form.points(), source.form.bounds
    first, behind = (np.searchsorted(points, reals.astype(np.float32), side) for side in ("left", "right"))
    if op_type == "Equal":
        limits = np.where(first < behind, first, -1)
    else:
        # x > c is x >= the first above c, and x <= c is x < that.
        limits = behind if op_type in ("Greater", "LessOrEqual") else first
        op_type = "GreaterOrEqual" if op_type.startswith("Greater") else "Less"
    return writer.op(op_type, [writer.cast(source.value, _INT32), writer.constant(limits + low, _INT32)], _BOOL)
