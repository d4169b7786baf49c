"""Sums, products, quotients, reductions and casts in integers.

    D(a) + D(b) -> Q           =>    a * k1 + b * k2 -> Requantize          k: how many steps of the sum one step is
    D(a) * D(b) -> Q           =>    a * b -> Requantize
    D(a) / D(b) -> Q           =>    RoundedDivide(a * 2^k, b) -> Requantize
    ReduceMean(D(x)) -> Q      =>    ReduceSum(x) -> Requantize, by the count of elements
    CumSum(D(x)) -> Q          =>    CumSum(x) -> Requantize
    Sqrt(D(a)^2 + D(b)^2)      =>    IntegerSqrt(a * a + b * b) -> Requantize
    Sqrt(Sqrt(sum of squares)) =>    IntegerSqrt(IntegerSqrt(...) * 2^31) -> Requantize

Integers stand here less their zero points, in int32. The factors of a sum are as large as its accumulator has room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_patterns import gain_of
from qgraph.analysis.integer_rules import is_stored
from qgraph.analysis.integer_units import Unit
from qgraph.passes._requantize_writer import LIMIT, Codes, Target, UnfitError, Writer

__all__ = ["accumulator_step", "add", "divide", "hypot", "multiply", "numbers", "reduce"]

_INT32, _INT64 = ir.DataType.INT32, ir.DataType.INT64
_FINEST, _COARSEST = 22, -30
_HALF = LIMIT // 2
_ROOT_BITS = 14
_SECOND_ROOT_BITS = 31
"""A root is below 2^31, so that this many more bits stay below 2^62, and the root of that within int32."""
_LARGEST_SQUARES = 1 << 60
_LARGEST_REDUCED = 1 << 53
"""ONNX Runtime 1.31 reduces int64 in double precision, which is exact as far as this."""
_SHOWN = 2.0**-10
"""The share of the result's range that the factors of a sum may be off by."""


def add(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write a sum of tensors and constants, each with a sign, what scales it, and a clamp behind it."""
    factor = float(unit.tail.factor)
    wanted = target._replace(scale=target.scale / factor)
    dynamic: list[tuple[Codes, int]] = []
    constants: list[np.ndarray] = []
    for value, sign in zip(unit.terms, unit.signs, strict=True):
        if is_stored(value):
            constants.append(sign * writer.real(value))
        else:
            dynamic.append((writer.codes(value), sign))
    offset = constants[0] if constants else np.zeros(())
    for array in constants[1:]:
        offset = offset + array
    offset = _felt(offset, dynamic, wanted)
    step, factors, reaches = _common_step(dynamic, offset, wanted)
    total: ir.Value | None = None
    for (codes, sign), steps, reach in zip(dynamic, factors, reaches, strict=True):
        term = writer.centred(codes)
        if reach < codes.form.reach:
            term = writer.op("Clip", [term, *(writer.constant(one, _INT32) for one in (-reach, reach))], _INT32)
        term = writer.times(term, sign * steps)
        total = term if total is None else writer.op("Add", [total, term], _INT32)
    assert total is not None
    rounded = np.rint(offset / step)
    if np.any(rounded):
        total = writer.op("Add", [total, writer.constant(rounded, _INT32)], _INT32)
    return writer.requantize(total, step * factor, target, unit.tail.low, unit.tail.high)


def _felt(offset: np.ndarray, terms: list[tuple[Codes, int]], target: Target) -> np.ndarray:
    """Return what is added as far as it matters: beyond, as a mask is, the result is clipped whatever the terms are."""
    room = sum(codes.form.reach * codes.form.scale for codes, _ in terms)
    low, high = ((bound - target.zero_point) * target.scale for bound in target.bounds)
    return np.asarray(np.clip(offset, low - room - target.scale, high + room + target.scale))


def _common_step(
    terms: list[tuple[Codes, int]], offset: np.ndarray, target: Target
) -> tuple[float, list[int], list[int]]:
    """Return the step of an accumulator, how many of it one step of each term is, and how far each term may reach.

    The step is that of the first term, divided by a power of two as large as half of int32 has room for, so that
    scales which are powers of two stay exact. Where a term reaches so far that the others would be lost in that, it is
    cut off where the result is clipped anyway.
    """
    forms = [codes.form for codes, _ in terms]
    reaches = [form.reach for form in forms]
    largest = float(np.max(np.abs(offset), initial=0.0))
    step, factors = accumulator_step(forms, reaches, largest, forms[0].scale)
    if not _shows(forms, factors, step, target):
        return step, factors, reaches
    total = sum(form.reach * form.scale for form in forms) + largest + target.reach * target.scale
    reaches = [min(form.reach, math.ceil(total / form.scale - form.reach) + 1) for form in forms]
    step, factors = accumulator_step(forms, reaches, largest, min(form.scale for form in forms))
    if not all(factor or form.reach * form.scale < target.scale for form, factor in zip(forms, factors, strict=True)):
        raise UnfitError("its terms have such different scales that no accumulator holds them")
    return step, factors, reaches


def _shows(forms: list[Target], factors: list[int], step: float, target: Target) -> bool:
    """Tell whether a factor is so coarse that the result shows it."""
    allowed = target.scale * max(1.0, target.reach * _SHOWN)
    return any(
        abs(factor * step - form.scale) * form.reach > allowed for form, factor in zip(forms, factors, strict=True)
    )


def accumulator_step(
    forms: Sequence[Target], reaches: Sequence[int], offset: float, first: float
) -> tuple[float, list[int]]:
    """Return the finest step at which half of int32 holds the sum of several tensors, and how many one of each is.

    Args:
        forms: what the tensors' integers stand for.
        reaches: how far each may be from zero.
        offset: what is added besides.
        first: a power of two of this is the step.

    Raises:
        UnfitError: there is none.
    """
    for places in range(_FINEST, _COARSEST - 1, -1):
        step = math.ldexp(first, -places)
        factors = [round(form.scale / step) for form in forms]
        bound = sum(factor * reach for factor, reach in zip(factors, reaches, strict=True))
        if bound + offset / step <= _HALF:
            return step, factors
    raise UnfitError("its terms have such different scales that no accumulator holds them")


def multiply(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write a product of two tensors, or of one and a constant, or a quotient with a constant divisor."""
    left, right = unit.terms
    if is_stored(left) or is_stored(right):
        return _by_constant(writer, unit, target)
    one, other = writer.codes(left), writer.codes(right)
    if one.form.reach * other.form.reach > LIMIT:
        raise UnfitError("its products could leave int32: quantize one of its inputs to 8 bits")
    product = writer.op("Mul", [writer.centred(one), writer.centred(other)], _INT32)
    return writer.requantize(product, one.form.scale * other.form.scale, target, unit.tail.low, unit.tail.high)


def _by_constant(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    left, right = unit.terms
    source = writer.codes(right if is_stored(left) else left)
    array = writer.real(left if is_stored(left) else right)
    if unit.main.op_type == "Div":
        array = 1.0 / array
    largest = float(np.max(np.abs(array), initial=0.0))
    if not math.isfinite(largest):
        raise UnfitError("its constant holds NaN or infinity")
    if largest == 0.0:
        largest = 1.0
    # A power of two keeps factors that are powers of two exact.
    step = 2.0 ** math.ceil(math.log2(largest * source.form.reach / _HALF))
    factors = writer.constant(np.rint(array / step), _INT32)
    product = writer.op("Mul", [writer.centred(source), factors], _INT32)
    return writer.requantize(product, source.form.scale * step, target, unit.tail.low, unit.tail.high)


def divide(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write a quotient of two tensors, or of a constant and a tensor."""
    left, right = unit.terms
    below = writer.codes(right)
    if is_stored(left):
        array = writer.real(left)
        largest = float(np.max(np.abs(array), initial=0.0)) or 1.0
        step = 2.0 ** math.ceil(math.log2(largest / _HALF))
        numerator = writer.constant(np.rint(array / step), _INT64)
        scale, places = step / below.form.scale, 0
    else:
        above = writer.codes(left)
        places = (_HALF // above.form.reach).bit_length() - 1
        wide = writer.cast(writer.centred(above), _INT64)
        numerator = writer.op("Mul", [wide, writer.constant(1 << places, _INT64)], _INT64)
        scale = above.form.scale / below.form.scale
    divisor = writer.cast(writer.centred(below), _INT64)
    quotient = writer.cast(writer.function("RoundedDivide", [numerator, divisor], _INT64), _INT32)
    return writer.requantize(quotient, math.ldexp(scale, -places), target, unit.tail.low, unit.tail.high)


def reduce(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write a sum or mean over axes, or the running sums along one."""
    node = unit.main
    if node.op_type == "CumSum":
        return _running_sum(writer, unit, target)
    source = writer.codes(unit.inputs[0])
    axes, attributes = _axes(unit)
    count = _count(unit, axes)
    most = LIMIT // source.form.reach
    if count is not None and count > most:
        raise UnfitError(f"its sums of {count} elements could leave int32 (at most {most} cannot)")
    if count is None:
        writer.limit(most)
    inputs = [writer.centred(source)]
    if axes is not None:
        inputs.append(writer.constant(np.asarray(axes), _INT64))
    total = writer.op("ReduceSum", inputs, _INT32, attributes)
    if node.op_type == "ReduceSum":
        return writer.requantize(total, source.form.scale, target)
    if count is not None:
        return writer.requantize(total, source.form.scale / count, target)
    sizes = [writer.op("Size", [value], _INT64) for value in (source.value, total)]
    elements = writer.op("Div", sizes, _INT64)
    places = (_HALF // source.form.reach).bit_length() - 1
    wide = writer.op("Mul", [writer.cast(total, _INT64), writer.constant(1 << places, _INT64)], _INT64)
    mean = writer.cast(writer.function("RoundedDivide", [wide, elements], _INT64), _INT32)
    return writer.requantize(mean, math.ldexp(source.form.scale, -places), target)


def _running_sum(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    node, shape = unit.main, unit.inputs[0].shape
    source, axis = writer.codes(unit.inputs[0]), qgraph.ir.constant(node.inputs[1])
    if axis is None:
        raise UnfitError("its axis is computed at run time")
    size = None if shape is None else shape[int(axis.item())]
    most = LIMIT // source.form.reach
    if isinstance(size, int) and size > most:
        raise UnfitError(f"its sums of {size} elements could leave int32 (at most {most} cannot)")
    if not isinstance(size, int):
        writer.limit(most)
    sums = writer.op("CumSum", [writer.centred(source), node.inputs[1]], _INT32, dict(node.attributes))
    return writer.requantize(sums, source.form.scale, target)


def _axes(unit: Unit) -> tuple[list[int] | None, dict[str, int]]:
    """Return the axes of a reduction, None for all, and the attributes of a ReduceSum over them."""
    node = unit.main
    shape = unit.inputs[0].shape
    if node.op_type == "GlobalAveragePool":
        if shape is None:
            raise UnfitError("its rank is not known")
        return list(range(2, len(shape))), {"keepdims": 1}
    keep = {"keepdims": node.attributes.get_int("keepdims", 1)}
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is None:
        listed = node.attributes.get_ints("axes", [])
        if node.attributes.get_int("noop_with_empty_axes", 0) and not listed:
            raise UnfitError("it reduces nothing")
        return (list(listed) or None), keep
    array = qgraph.ir.constant(given)
    if array is None:
        raise UnfitError("its axes are computed at run time")
    return [int(axis) for axis in array.reshape(-1)], keep


def _count(unit: Unit, axes: list[int] | None) -> int | None:
    """Return how many elements each sum has, or None where that is not known."""
    shape = unit.inputs[0].shape
    if shape is None:
        return None
    sizes = [shape[axis] for axis in (range(len(shape)) if axes is None else axes)]
    return (
        math.prod(size for size in sizes if isinstance(size, int)) if all(isinstance(s, int) for s in sizes) else None
    )


def hypot(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write the root of a sum of squares, over an axis or of two tensors, or the root of that."""
    sources = [writer.codes(value) for value in unit.inputs]
    summed = next((node for node in unit.nodes if node.op_type == "ReduceSum"), None)
    axes, attributes = (None, {}) if summed is None else _axes_of(summed)
    count = 1 if summed is None else _count(unit, axes)
    if count is None:
        raise UnfitError("the number of its squares is not known: fix the shape of the input (--shape)")
    step, factors = _fine_step(sources, count, _LARGEST_SQUARES if summed is None else _LARGEST_REDUCED)
    squares = []
    for codes, factor in zip(sources, factors, strict=True):
        wide = writer.cast(writer.centred(codes), _INT64)
        fine = writer.op("Mul", [wide, writer.constant(factor, _INT64)], _INT64)
        squares.append(writer.op("Mul", [fine, fine], _INT64))
    if summed is None:
        total = writer.op("Add", squares, _INT64)
    else:
        inputs = [squares[0]] + ([] if axes is None else [writer.constant(np.asarray(axes), _INT64)])
        total = writer.op("ReduceSum", inputs, _INT64, attributes)
    root, scale = writer.function("IntegerSqrt", [total], _INT64), step * _gain(unit, axes, attributes)
    if [node.op_type for node in unit.nodes[-2:]] == ["Sqrt", "Sqrt"]:
        fine = writer.op("Mul", [root, writer.constant(1 << _SECOND_ROOT_BITS, _INT64)], _INT64)
        root, scale = writer.function("IntegerSqrt", [fine], _INT64), np.sqrt(np.ldexp(scale, -_SECOND_ROOT_BITS))
    return writer.requantize(writer.cast(root, _INT32), scale, target)


def _gain(unit: Unit, axes: list[int] | None, attributes: dict[str, int]) -> np.ndarray:
    """Return what the root is to be multiplied by since the squared numbers were, in a shape that broadcasts to it."""
    gain, shape = gain_of(unit.nodes[0]), unit.inputs[0].shape
    if gain is None or gain.size == 1:
        return np.abs(np.ones(()) if gain is None else gain.astype(np.float64).reshape(()))
    assert shape is not None
    sizes = np.abs(gain.astype(np.float64)).reshape((1,) * (len(shape) - gain.ndim) + gain.shape)
    return sizes if axes is None or attributes["keepdims"] else np.squeeze(sizes, axis=tuple(axes))


def _fine_step(sources: list[Codes], count: int, most: int) -> tuple[float, list[int]]:
    """Return the step at which squares are summed, and how many of it one step of each tensor is."""
    for places in range(_ROOT_BITS, -1, -1):
        step = math.ldexp(sources[0].form.scale, -places)
        factors = [round(codes.form.scale / step) for codes in sources]
        bound = count * sum((codes.form.reach * factor) ** 2 for codes, factor in zip(sources, factors, strict=True))
        if bound <= most and all(factors):
            return step, factors
    raise UnfitError(
        f"its squares could leave the integers that every runtime sums exactly (2^{most.bit_length() - 1})"
    )


def _axes_of(node: ir.Node) -> tuple[list[int] | None, dict[str, int]]:
    array = qgraph.ir.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if array is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        raise UnfitError("its axes are computed at run time")
    return (
        None if array is None else [int(axis) for axis in array.reshape(-1)],
        {"keepdims": node.attributes.get_int("keepdims", 1)},
    )


def numbers(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write integers (or truth values) that the graph treats as real numbers."""
    value = unit.main.inputs[0]
    assert value is not None
    if value.dtype in (_INT64, None):
        # Not by Clip: ONNX Runtime's takes int64 from 2^31 to 2^32 for negative.
        for compare, bound in (("Greater", _HALF), ("Less", -_HALF)):
            stored = writer.constant(bound, _INT64)
            beyond = writer.op(compare, [value, stored], ir.DataType.BOOL)
            value = writer.op("Where", [beyond, stored, value], _INT64)
    return writer.requantize(writer.cast(value, _INT32), 1.0, target)
