"""ONNX operators on arrays, for folding constants: those whose result numpy defines as ONNX does.

Source: the operator reference of ONNX, https://onnx.ai/onnx/operators/. What depends on the version is told apart by
what is given: `axes` as an attribute or as an input, for instance. Random, quantizing and stateful operators are
left out on purpose, and so is whatever the reference leaves to the implementation (casts out of range, integer
division by zero): `evaluate` raises for these, and the node stays in the graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

__all__ = ["NotFoldedError", "evaluate", "is_known"]

Array: TypeAlias = np.ndarray
Attributes: TypeAlias = Mapping[str, Any]
Inputs: TypeAlias = Sequence[Any]
"""Arrays; None for an optional input that is left out."""
Operator: TypeAlias = Callable[[Attributes, Inputs], Any]
Function: TypeAlias = Callable[..., Any]
"""An operator without attributes: takes its inputs one by one."""

_PLAIN_KINDS = "biuf"


class NotFoldedError(ValueError):
    """The result is not defined by the reference, or not computed here."""


def is_known(op_type: str) -> bool:
    """Tell whether `evaluate` computes the operator `op_type` of the default domain."""
    return op_type in _FUNCTIONS or op_type in _OPERATORS


def evaluate(op_type: str, attributes: Attributes, inputs: Inputs) -> tuple[Array, ...]:
    """Compute an operator of the default domain.

    Args:
        op_type: the operator.
        attributes: numbers, texts, sequences of these, or arrays for tensors.
        inputs: arrays; None for an input that is left out.

    Raises:
        NotFoldedError: the operator or this use of it is not computed here.
    """
    if not is_known(op_type):
        raise NotFoldedError(f"{op_type} is not computed here")
    try:
        with np.errstate(all="ignore"):
            plain = _FUNCTIONS.get(op_type)
            result = plain(*inputs) if plain is not None else _OPERATORS[op_type](attributes, inputs)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise NotFoldedError(f"{op_type}: {error}") from error
    return tuple(np.asarray(one) for one in (result if isinstance(result, tuple) else (result,)))


def _unary(function: Function) -> Function:
    return lambda array: function(array).astype(array.dtype)


def _variadic(function: Function) -> Function:
    return lambda first, *others: functools.reduce(function, others, first).astype(first.dtype)


def _divide(one: Array, other: Array) -> Array:
    if one.dtype.kind not in "iu":
        return np.asarray(one / other).astype(one.dtype)
    if not np.all(other):
        raise NotFoldedError("integer division by zero")
    quotient = np.floor_divide(one, other)
    inexact = (np.mod(one, other) != 0) & ((one < 0) != (other < 0))
    return np.asarray(quotient + inexact).astype(one.dtype)


def _modulo(attributes: Attributes, inputs: Inputs) -> Array:
    one, other = inputs
    if one.dtype.kind in "iu" and not np.all(other):
        raise NotFoldedError("integer division by zero")
    function = np.fmod if attributes.get("fmod", 0) else np.mod
    return np.asarray(function(one, other)).astype(one.dtype)


def _power(base: Array, exponent: Array) -> Array:
    if base.dtype.kind not in "iu":
        return np.asarray(np.power(base, exponent.astype(base.dtype))).astype(base.dtype)
    return _cast(np.power(base.astype(np.float64), exponent.astype(np.float64)), base.dtype)


def _cast(array: Array, dtype: np.dtype) -> Array:
    """Convert as Cast does, where numpy and the reference agree: among booleans, integers and floats, in range."""
    plain = all(kind.kind in _PLAIN_KINDS or kind == ml_dtypes.bfloat16 for kind in (array.dtype, dtype))
    if not plain:
        raise NotFoldedError(f"cast of {array.dtype} to {dtype}")
    if dtype.kind in "iu" and array.dtype.kind not in "biu":
        limits = np.iinfo(dtype)
        wide = array.astype(np.float64)
        if not np.all(np.isfinite(wide)) or np.any(wide <= limits.min - 1.0) or np.any(wide >= limits.max + 1.0):
            raise NotFoldedError("a cast out of range")
    return array.astype(dtype)


_TYPES: Mapping[int, np.dtype] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    12: np.dtype(np.uint32),
    13: np.dtype(np.uint64),
    16: np.dtype(ml_dtypes.bfloat16),
}
"""TensorProto.DataType -> numpy."""


def _clip(attributes: Attributes, inputs: Inputs) -> Array:
    low, high = (_optional(inputs, index, attributes.get(name)) for index, name in ((1, "min"), (2, "max")))
    result = inputs[0]
    result = result if low is None else np.maximum(result, low)
    return np.asarray(result if high is None else np.minimum(result, high)).astype(inputs[0].dtype)


def _optional(inputs: Inputs, index: int, default: Any = None) -> Any:
    return inputs[index] if len(inputs) > index and inputs[index] is not None else default


def _axes(attributes: Attributes, inputs: Inputs, index: int = 1) -> tuple[int, ...] | None:
    """Return the axes that an attribute or the input `index` names; None when there are none."""
    given = _optional(inputs, index, attributes.get("axes"))
    return None if given is None else tuple(int(axis) for axis in np.asarray(given).reshape(-1))


def _reduce(function: Callable[..., Any]) -> Operator:
    def compute(attributes: Attributes, inputs: Inputs) -> Array:
        if function is np.mean and inputs[0].dtype.kind in "iu":
            raise NotFoldedError("the mean of integers")
        axes = _axes(attributes, inputs)
        if not axes and attributes.get("noop_with_empty_axes", 0):
            raise NotFoldedError("no axes")
        reduced = function(inputs[0], axis=axes or None, keepdims=bool(attributes.get("keepdims", 1)))
        return np.asarray(reduced).astype(inputs[0].dtype)

    return compute


def _arg(function: Callable[..., Any]) -> Operator:
    def compute(attributes: Attributes, inputs: Inputs) -> Array:
        if attributes.get("select_last_index", 0):
            raise NotFoldedError("select_last_index")
        axis, keep = int(attributes.get("axis", 0)), bool(attributes.get("keepdims", 1))
        return np.asarray(function(inputs[0], axis=axis, keepdims=keep)).astype(np.int64)

    return compute


def _gather(attributes: Attributes, inputs: Inputs) -> Array:
    return np.asarray(np.take(inputs[0], inputs[1], axis=int(attributes.get("axis", 0)), mode="raise"))


def _gather_elements(attributes: Attributes, inputs: Inputs) -> Array:
    return np.take_along_axis(inputs[0], inputs[1], axis=int(attributes.get("axis", 0)))


def _gather_nd(attributes: Attributes, inputs: Inputs) -> Array:
    if attributes.get("batch_dims", 0):
        raise NotFoldedError("batch_dims")
    return np.asarray(inputs[0][tuple(np.moveaxis(inputs[1], -1, 0))])


def _scatter_nd(attributes: Attributes, inputs: Inputs) -> Array:
    if attributes.get("reduction", "none") != "none":
        raise NotFoldedError("reduction")
    result = np.array(inputs[0])
    result[tuple(np.moveaxis(inputs[1], -1, 0))] = inputs[2]
    return result


def _slice(attributes: Attributes, inputs: Inputs) -> Array:
    data = inputs[0]
    starts, ends = (_optional(inputs, i, attributes.get(name)) for i, name in ((1, "starts"), (2, "ends")))
    axes = _axes(attributes, inputs, 3) or tuple(range(len(starts)))
    steps = _optional(inputs, 4, [1] * len(axes))
    index: list[slice] = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = _slice_of(int(start), int(end), int(step), data.shape[axis])
    return np.asarray(data[tuple(index)])


def _slice_of(start: int, end: int, step: int, size: int) -> slice:
    start, end = (limit + size if limit < 0 else limit for limit in (start, end))
    if step > 0:
        return slice(min(max(start, 0), size), min(max(end, 0), size), step)
    end = min(max(end, -1), size - 1)
    return slice(min(max(start, 0), size - 1), None if end < 0 else end, step)


def _squeeze(attributes: Attributes, inputs: Inputs) -> Array:
    return np.asarray(np.squeeze(inputs[0], axis=_axes(attributes, inputs)))


def _unsqueeze(attributes: Attributes, inputs: Inputs) -> Array:
    axes = _axes(attributes, inputs)
    if axes is None:
        raise NotFoldedError("no axes")
    return np.expand_dims(inputs[0], axis=axes)


def _reshape(attributes: Attributes, inputs: Inputs) -> Array:
    data, shape = inputs
    copied = not attributes.get("allowzero", 0)
    dims = [data.shape[axis] if size == 0 and copied else int(size) for axis, size in enumerate(shape)]
    return np.asarray(np.reshape(data, dims))


def _flatten(attributes: Attributes, inputs: Inputs) -> Array:
    axis = int(attributes.get("axis", 1))
    axis = axis + inputs[0].ndim if axis < 0 else axis
    rows = math.prod(inputs[0].shape[:axis])
    return np.reshape(inputs[0], (rows, math.prod(inputs[0].shape[axis:])))


def _expand(data: Array, shape: Array) -> Array:
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(int(size) for size in shape))).copy()


def _range(start: Array, limit: Array, delta: Array) -> Array:
    count = max(math.ceil((limit.item() - start.item()) / delta.item()), 0)
    return np.asarray(start.item() + np.arange(count) * delta.item()).astype(start.dtype)


def _shape(attributes: Attributes, inputs: Inputs) -> Array:
    return np.array(inputs[0].shape[attributes.get("start", 0) : attributes.get("end")], dtype=np.int64)


def _constant_of_shape(attributes: Attributes, inputs: Inputs) -> Array:
    value = attributes.get("value", np.zeros(1, np.float32))
    return np.full(tuple(int(size) for size in inputs[0]), value.reshape(()), dtype=value.dtype)


def _trilu(attributes: Attributes, inputs: Inputs) -> Array:
    k = _optional(inputs, 1, np.int64(0))
    diagonal = int(np.asarray(k).item())
    return np.asarray(np.triu(inputs[0], diagonal) if attributes.get("upper", 1) else np.tril(inputs[0], diagonal))


def _cumsum(attributes: Attributes, inputs: Inputs) -> Array:
    if attributes.get("exclusive", 0) or attributes.get("reverse", 0):
        raise NotFoldedError("exclusive or reverse")
    return np.asarray(np.cumsum(inputs[0], axis=int(inputs[1].item()), dtype=inputs[0].dtype))


def _split(attributes: Attributes, inputs: Inputs) -> tuple[Array, ...]:
    sizes = _optional(inputs, 1, attributes.get("split"))
    if sizes is None:
        raise NotFoldedError("no sizes")
    return tuple(np.split(inputs[0], np.cumsum(sizes)[:-1], axis=int(attributes.get("axis", 0))))


def _pad(attributes: Attributes, inputs: Inputs) -> Array:
    if attributes.get("mode", "constant") != "constant" or _optional(inputs, 3) is not None:
        raise NotFoldedError("mode or axes")
    pads = np.asarray(_optional(inputs, 1, attributes.get("pads"))).reshape(2, -1).T
    if np.any(pads < 0):
        raise NotFoldedError("negative pads")
    value = _optional(inputs, 2, attributes.get("value", 0))
    return np.pad(inputs[0], pads, constant_values=np.asarray(value, dtype=inputs[0].dtype).reshape(()))


_FUNCTIONS: Mapping[str, Function] = {
    "Abs": _unary(np.abs),
    "Add": _variadic(np.add),
    "And": np.logical_and,
    "CastLike": lambda data, like: _cast(data, like.dtype),
    "Ceil": _unary(np.ceil),
    "Cos": _unary(np.cos),
    "Div": _divide,
    "Equal": np.equal,
    "Exp": _unary(np.exp),
    "Expand": _expand,
    "Floor": _unary(np.floor),
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Identity": lambda data: data,
    "IsNaN": np.isnan,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Log": _unary(np.log),
    "MatMul": lambda one, other: np.matmul(one, other).astype(one.dtype),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Mul": _variadic(np.multiply),
    "Neg": _unary(np.negative),
    "NonZero": lambda data: np.array(np.nonzero(data), dtype=np.int64),
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Pow": _power,
    "Range": _range,
    "Reciprocal": _unary(np.reciprocal),
    "Relu": _unary(lambda data: np.maximum(data, 0)),
    "Round": _unary(np.rint),
    "Sign": _unary(np.sign),
    "Sin": _unary(np.sin),
    "Size": lambda data: np.array(data.size, dtype=np.int64),
    "Sqrt": _unary(np.sqrt),
    "Sub": _variadic(np.subtract),
    "Sum": _variadic(np.add),
    "Tanh": _unary(np.tanh),
    "Tile": lambda data, repeats: np.tile(data, tuple(int(count) for count in repeats)),
    "Where": np.where,
    "Xor": np.logical_xor,
}

_OPERATORS: Mapping[str, Operator] = {
    "ArgMax": _arg(np.argmax),
    "ArgMin": _arg(np.argmin),
    "Cast": lambda attributes, inputs: _cast(inputs[0], _TYPES[attributes["to"]]),
    "Clip": _clip,
    "Concat": lambda attributes, inputs: np.concatenate(list(inputs), axis=int(attributes["axis"])),
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumsum,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Mod": _modulo,
    "Pad": _pad,
    "ReduceMax": _reduce(np.max),
    "ReduceMean": _reduce(np.mean),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": lambda attributes, inputs: np.transpose(inputs[0], attributes.get("perm")),
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
