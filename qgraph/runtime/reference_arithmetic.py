"""Integer arithmetic of ONNX in numpy, as it is defined: nothing wraps, and what would is an error.

Types of up to 32 bits are computed in int64; the results of 64-bit types are held against the same in float64. Only
uint64 is left to wrap: functions shift numbers into that type and back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.numerics import integer_math
from qgraph.numerics.operators import Attributes, Inputs, NotFoldedError, Operator
from qgraph.numerics.requantize import requantize

__all__ = ["ARITHMETIC", "FUNCTIONS", "exact", "fitting"]

_WIDE = 8
_INT64_END = 2.0**63


def fitting(result: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert integers to a type that holds them all.

    Raises:
        OverflowError: it does not.
    """
    limits = np.iinfo(dtype)
    if result.size and (result.min() < limits.min or result.max() > limits.max):
        raise OverflowError(f"{result.min()} to {result.max()} leaves {dtype}")
    return result.astype(dtype)


def exact(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Apply a function to integers of one type.

    Raises:
        OverflowError: the type does not hold the result.
    """
    dtype = arrays[0].dtype
    if dtype.itemsize < _WIDE:
        return fitting(np.asarray(function(*(array.astype(np.int64) for array in arrays))), dtype)
    if dtype == np.int64:
        estimate = np.asarray(function(*(array.astype(np.float64) for array in arrays)))
        if estimate.size and np.abs(estimate).max() >= _INT64_END:
            raise OverflowError(f"{estimate.min():g} to {estimate.max():g} leaves int64")
    return np.asarray(function(*arrays)).astype(dtype)


def _plainly(function: Callable[..., Any]) -> Operator:
    """Return an operator without attributes."""

    def compute(attributes: Attributes, inputs: Inputs) -> np.ndarray:
        del attributes
        return np.asarray(function(*inputs))

    return compute


def _exactly(function: Callable[..., Any]) -> Operator:
    return _plainly(functools.partial(exact, function))


def _bit_shift(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    x, places = inputs
    left = attributes["direction"] == "LEFT"
    return np.asarray(np.left_shift(x, places) if left else np.right_shift(x, places)).astype(x.dtype)


def _cast(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    return _converted(inputs[0], ir.DataType(attributes["to"]).numpy())


def _converted(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        raise NotFoldedError(f"it converts to {dtype}, and the reference runs integers")
    if dtype.kind not in "iu" or x.dtype.kind == "b" or np.uint64 in (x.dtype, dtype):
        return x.astype(dtype)
    return fitting(x.astype(np.int64), dtype)


def _reduce_sum(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    axes = tuple(inputs[1].tolist()) if len(inputs) > 1 and inputs[1] is not None else ()
    if not axes and attributes.get("noop_with_empty_axes", 0):
        return np.asarray(inputs[0])
    keep = bool(attributes.get("keepdims", 1))
    return exact(lambda x: x.sum(axis=axes or None, keepdims=keep), inputs[0])


def _cumsum(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    axis = int(inputs[1].item())
    flip = slice(None, None, -1 if attributes.get("reverse", 0) else 1)

    def compute(x: np.ndarray) -> np.ndarray:
        along = np.moveaxis(x, axis, 0)[flip]
        sums = np.cumsum(along, axis=0)
        if attributes.get("exclusive", 0):
            sums = sums - along
        return np.moveaxis(sums[flip], 0, axis)

    return exact(compute, inputs[0])


ARITHMETIC: Mapping[str, Operator] = {
    "Abs": _exactly(np.abs),
    "Add": _exactly(np.add),
    "BitShift": _bit_shift,
    "BitwiseAnd": _plainly(np.bitwise_and),
    "BitwiseNot": _plainly(np.bitwise_not),
    "BitwiseOr": _plainly(np.bitwise_or),
    "BitwiseXor": _plainly(np.bitwise_xor),
    "Cast": _cast,
    "CastLike": _plainly(lambda x, like: _converted(x, like.dtype)),
    "CumSum": _cumsum,
    "MatMul": _exactly(np.matmul),
    "Mul": _exactly(np.multiply),
    "Neg": _exactly(np.negative),
    "ReduceSum": _reduce_sum,
    "Sub": _exactly(np.subtract),
    "Sum": _exactly(lambda *terms: functools.reduce(np.add, terms)),
}
"""Operators whose results may leave their type."""


def _requantize(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    x, multiplier, shift, zero_point, low, high = inputs
    return requantize(x, multiplier, shift, zero_point, low, high, attributes["rounding"])


FUNCTIONS: Mapping[str, Operator] = {
    "IntegerSqrt": _plainly(integer_math.integer_sqrt),
    "LayerNormalize": _plainly(integer_math.layer_normalize),
    "RMSNormalize": _plainly(integer_math.rms_normalize),
    "Requantize": _requantize,
    "RoundedDivide": _plainly(integer_math.rounded_divide),
    "Softmax": _plainly(integer_math.softmax),
    "TableInterpolate": _plainly(integer_math.table_interpolate),
}
"""The integer functions by their definitions."""
