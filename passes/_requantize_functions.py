"""Functions of one tensor, softmax and normalization in integers.

    f(D(x)) -> Q                  =>    Gather(table[256], x)              8 bits: the table holds every result
                                  =>    TableInterpolate(x, table[513])    16 bits, where that is as good
    Softmax(D(x)) -> Q            =>    Softmax(x, table of exponentials) -> Cast
    LayerNormalization(D(x)) -> Q =>    LayerNormalize(x) -> Mul(scale) -> Add(bias) -> Requantize

Tables are what ONNX Runtime computes in float for each integer; nothing is left of the float function at run time.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qgraph.analysis.elementwise import evaluate
from qgraph.analysis.integer_patterns import norm_epsilon
from qgraph.analysis.integer_units import Unit
from qgraph.numerics.integer_math import table_interpolate
from qgraph.passes._requantize_writer import Codes, Target, UnfitError, Writer

__all__ = ["choices", "normalize", "softmax", "table"]

_INT32, _INT64, _INT16 = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.INT16
_EXP_BITS, _EXP_ENTRIES = 15, 1024
_EXP_REACH = 11.1
"""2^15 exp(-11.1) rounds to zero."""
_COARSE_OFF, _FINE_OFF = 1, 32
"""By how many steps interpolation may be off, for results of 8 and of 16 bits (a 2048th); else the table is whole."""
_STRAIGHT = 2e-6
_NORM_BITS = 15
_MOST_SQUARES = 1 << 62


def table(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write a function of one tensor."""
    source = writer.codes(unit.inputs[0])
    real = _values(writer, unit, source.form)
    if source.form.dtype is not _INT16:
        return _look_up(writer, source, target.quantize(real), target.dtype)
    line = _line(real, source.form)
    if line is not None:
        return _straight(writer, source, target, *line)
    exact = target.quantize(real)
    coarse = _breakpoints(writer, unit, source.form, target)
    codes = np.arange(-(1 << 15), 1 << 15, dtype=np.int16)
    off = np.abs(table_interpolate(codes, coarse).astype(np.int64) - exact.astype(np.int64)).max()
    if off > (_FINE_OFF if target.dtype is _INT16 else _COARSE_OFF):
        writer.whole_table(exact.nbytes)
        return _look_up(writer, source, exact, target.dtype)
    result = writer.function("TableInterpolate", [source.value, writer.constant(coarse, _INT32)], _INT32)
    return writer.cast(result, target.dtype)


def choices(writer: Writer, unit: Unit) -> ir.Value:
    """Write a function of one tensor whose results are truth values or whole numbers."""
    source = writer.codes(unit.inputs[0])
    dtype = unit.outputs[0].dtype
    assert dtype is not None
    return _look_up(writer, source, _values(writer, unit, source.form), dtype)


def _values(writer: Writer, unit: Unit, form: Target) -> np.ndarray:
    opset = writer.graph.opset_imports.get("", 0)
    return evaluate(unit.nodes, unit.inputs[0], unit.outputs[0], form.points(), opset)


def _look_up(writer: Writer, source: Codes, entries: np.ndarray, dtype: ir.DataType) -> ir.Value:
    low, _ = source.form.bounds
    index = writer.cast(source.value, _INT32)
    if low:
        index = writer.op("Sub", [index, writer.constant(low, _INT32)], _INT32)
    return writer.op("Gather", [writer.constant(entries, dtype), index], dtype, {"axis": 0})


def _breakpoints(writer: Writer, unit: Unit, form: Target, target: Target) -> np.ndarray:
    """Return 128 times the (unrounded) integers at every 128th input, int32, (513,)."""
    places = np.arange(-(1 << 15), (1 << 15) + 1, 128, dtype=np.float64)
    points = (places * form.scale).astype(np.float32)
    opset = writer.graph.opset_imports.get("", 0)
    real = evaluate(unit.nodes, unit.inputs[0], unit.outputs[0], points, opset).astype(np.float64)
    low, high = target.bounds
    with np.errstate(all="ignore"):
        codes = np.clip(np.nan_to_num(real / target.scale + target.zero_point, nan=target.zero_point), low, high)
    return np.asarray(np.rint(codes * 128), np.int32)


def _line(real: np.ndarray, form: Target) -> tuple[float, float] | None:
    """Return slope and offset of a function that is a straight line, or None."""
    points = form.points().astype(np.float64)
    if not np.isfinite(real).all():
        return None
    slope = float((real[-1].astype(np.float64) - real[0]) / (points[-1] - points[0]))
    offset = float(real[-form.bounds[0] + form.zero_point])
    off = np.abs(points * slope + offset - real).max()
    return (slope, offset) if slope and off <= _STRAIGHT * max(abs(slope) * np.abs(points).max(), abs(offset)) else None


def _straight(writer: Writer, source: Codes, target: Target, slope: float, offset: float) -> ir.Value:
    scale = abs(slope) * source.form.scale
    same = math.isclose(scale, target.scale, rel_tol=1e-6) and target._replace(scale=1.0) == source.form._replace(
        scale=1.0
    )
    if slope > 0 and offset == 0 and same:
        return source.value
    places = 10
    number = round(offset / math.ldexp(scale, -places))
    if not offset or abs(number) > 1 << 29:
        places, number = 0, round(offset / scale)
    total = writer.times(writer.centred(source), (1 if slope > 0 else -1) << places)
    if number:
        if abs(number) > 1 << 30:
            raise UnfitError("what it adds could lead beyond int32")
        total = writer.op("Add", [total, writer.constant(number, _INT32)], _INT32)
    return writer.requantize(total, math.ldexp(scale, -places), target)


def softmax(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write a softmax."""
    source = writer.codes(unit.inputs[0])
    shape = unit.inputs[0].shape
    axis = unit.main.attributes.get_int("axis", -1)
    rank = None if shape is None else len(shape)
    order = _to_last(axis, rank)
    value = writer.centred(source)
    if order is not None:
        value = writer.op("Transpose", [value], _INT32, {"perm": order})
    furthest = math.ceil(_EXP_REACH / source.form.scale)
    places = max(0, math.ceil(math.log2(max(furthest, 1) / _EXP_ENTRIES)))
    if places > _EXP_BITS:
        raise UnfitError("the scale of its input is so small that no table of exponentials covers it")
    entries = min(math.ceil(furthest / (1 << places)), _EXP_ENTRIES) + 1
    steps = np.arange(entries + 1) * math.ldexp(source.form.scale, places)
    exponentials = np.rint(np.ldexp(np.exp(-steps), _EXP_BITS))
    one = round(1.0 / target.scale)
    direct = one <= 1 << _EXP_BITS and math.isclose(one * target.scale, 1.0, rel_tol=1e-3)
    one = one if direct else 1 << _EXP_BITS
    inputs = [writer.constant(exponentials, _INT32), *(writer.constant(n, _INT32) for n in (1 << places, one))]
    result = writer.function("Softmax", [value, *inputs], _INT32)
    if order is not None:
        result = writer.op("Transpose", [result], _INT32, {"perm": order})
    if not direct:
        return writer.requantize(result, math.ldexp(1.0, -_EXP_BITS), target)
    if target.zero_point:
        result = writer.op("Add", [result, writer.constant(target.zero_point, _INT32)], _INT32)
    low, high = (writer.constant(bound, _INT32) for bound in target.bounds)
    if one + target.zero_point > target.bounds[1]:
        result = writer.op("Clip", [result, low, high], _INT32)
    return writer.cast(result, target.dtype)


def _to_last(axis: int, rank: int | None) -> list[int] | None:
    """Return the order of axes that swaps `axis` with the last, or None where it is the last."""
    if axis == -1 or (rank is not None and axis == rank - 1):
        return None
    if rank is None:
        raise UnfitError("its rank is not known, and it does not run over the last axis")
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    return order


def normalize(writer: Writer, unit: Unit, target: Target) -> ir.Value:
    """Write a normalization over the last axis, with or without a mean, scale and bias."""
    node = unit.main
    source = writer.codes(unit.inputs[0])
    shape = unit.inputs[0].shape
    size = shape[-1] if shape is not None and len(shape) else None
    axis = node.attributes.get_int("axis", -1)
    if not isinstance(size, int) or (axis != -1 and (shape is None or axis != len(shape) - 1)):
        raise UnfitError("it does not run over the last axis alone, or the size of that is not known")
    centre = node.op_type == "LayerNormalization"
    written_out = len(unit.nodes) > 1
    epsilon = norm_epsilon(unit.nodes) if written_out else node.attributes.get_float("epsilon", 1e-5)
    fraction = 7 if source.form.dtype is _INT16 else 15
    spread = source.form.bounds[1] - source.form.bounds[0]
    if size * (spread << fraction) ** 2 // 4 > _MOST_SQUARES:
        raise UnfitError(f"its sums of {size} squares could leave int64")
    added = round(epsilon * 4.0**fraction / source.form.scale**2)
    if added > _MOST_SQUARES // 2:
        raise UnfitError("the scale of its input is so small that its epsilon leaves int64")
    places = max(0, math.floor(_NORM_BITS - math.log2(size) / 2))
    inputs = [writer.constant(number, _INT64) for number in (1 << fraction, added, 1 << places)]
    name = "LayerNormalize" if centre else "RMSNormalize"
    result = writer.function(name, [writer.centred(source), *inputs], _INT32)
    scale = math.ldexp(1.0, -places)
    if not written_out:
        result, scale = _gain(writer, node, result, scale)
    return writer.requantize(result, scale, target)


def _gain(writer: Writer, node: ir.Node, value: ir.Value, unit: float) -> tuple[ir.Value, float]:
    """Multiply normalized numbers (at most 2^15) with scale and bias; return that and what its unit is worth."""
    gain = writer.real(node.inputs[1]) if node.inputs[1] is not None else np.ones(())
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = np.zeros(()) if given is None else writer.real(given)
    largest = max(float(np.max(np.abs(gain), initial=0.0)), float(np.max(np.abs(bias), initial=0.0)) / unit / (1 << 15))
    step = 2.0 ** math.ceil(math.log2((largest or 1.0) / (1 << 14)))
    accumulator = writer.op("Mul", [value, writer.constant(np.rint(gain / step), _INT32)], _INT32)
    offset = np.rint(bias / (step * unit))
    if np.any(offset):
        accumulator = writer.op("Add", [accumulator, writer.constant(offset, _INT32)], _INT32)
    return accumulator, step * unit
