"""What MIL's operations compute, in numpy: element by element, and reductions.

Written from the definitions of the operations (apple.github.io/coremltools, MIL ops), not from the lowering.
Arrays of float16 come as float32; the interpreter rounds what is returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special

from qgraph.coreml.semantics import Semantics, axes_of

__all__ = ["SEMANTICS"]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(scipy.special.expit(x))


def _gelu(x: np.ndarray, mode: str = "EXACT") -> np.ndarray:
    if mode == "TANH_APPROXIMATION":
        return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
    return np.asarray(0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2))))


def _cast(x: np.ndarray, dtype: str) -> np.ndarray:
    names = {"fp16": "float16", "fp32": "float32"}
    return np.asarray(x != 0) if dtype == "bool" else x.astype(names.get(dtype, dtype))


def _elu(x: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)


def _real_div(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.trunc(x / y) if x.dtype.kind == "i" else x / y)


def _pow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.power(x, y))


def _reduce(function: Any) -> Semantics:
    def compute(x: np.ndarray, axes: np.ndarray | None = None, keep_dims: bool = False) -> np.ndarray:
        return np.asarray(function(x, axis=axes_of(axes, x.ndim), keepdims=bool(keep_dims)))

    return compute


def _l2(x: np.ndarray, axis: tuple[int, ...], *, keepdims: bool) -> np.ndarray:
    return np.asarray(np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims)))


def _arg(function: Any) -> Semantics:
    def compute(x: np.ndarray, axis: int = -1, keep_dims: bool = True, output_dtype: str = "int32") -> np.ndarray:
        return np.asarray(function(x, axis=int(axis), keepdims=bool(keep_dims))).astype(output_dtype)

    return compute


def _softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    powers = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return np.asarray(powers / powers.sum(axis=int(axis), keepdims=True))


def _layer_norm(
    x: np.ndarray, axes: np.ndarray, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5
) -> np.ndarray:
    axis = axes_of(axes, x.ndim)
    mean = x.mean(axis=axis, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=axis, keepdims=True)
    result = (x - mean) / np.sqrt(variance + epsilon)
    result = result if gamma is None else result * gamma
    return np.asarray(result if beta is None else result + beta)


def _local_response_norm(x: np.ndarray, size: int, alpha: Any = 1e-4, beta: Any = 0.75, k: Any = 1.0) -> np.ndarray:
    low, channels = (int(size) - 1) // 2, x.shape[1]
    squares = np.zeros_like(x)
    for channel in range(channels):
        start, stop = max(channel - low, 0), min(channel - low + int(size), channels)
        squares[:, channel] = (x[:, start:stop] ** 2).sum(axis=1)
    return np.asarray(x / (k + alpha / size * squares) ** beta)


def _cumsum(x: np.ndarray, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> np.ndarray:
    axis = int(axis)
    work = np.flip(x, axis) if reverse else x
    total = np.cumsum(work, axis=axis, dtype=x.dtype)
    total = total - work if exclusive else total
    return np.flip(total, axis) if reverse else total


def _topk(
    x: np.ndarray,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[np.ndarray, ...]:
    del sort, return_indices
    order = np.argsort(x if ascending else -x, axis=int(axis), kind="stable")
    indices = order.take(range(int(k)), axis=int(axis))
    return np.take_along_axis(x, indices, int(axis)), indices.astype(output_indices_dtype)


SEMANTICS: Mapping[str, Semantics] = {
    "abs": lambda x: np.abs(x),
    "acos": lambda x: np.arccos(x),
    "asin": lambda x: np.arcsin(x),
    "atan": lambda x: np.arctan(x),
    "atanh": lambda x: np.arctanh(x),
    "ceil": lambda x: np.ceil(x),
    "cos": lambda x: np.cos(x),
    "cosh": lambda x: np.cosh(x),
    "erf": lambda x: scipy.special.erf(x),
    "exp": lambda x: np.exp(x),
    "floor": lambda x: np.floor(x),
    "identity": lambda x: x,
    "log": lambda x, epsilon=1e-45: np.log(x + epsilon),
    "logical_not": lambda x: ~x,
    "relu": lambda x: np.maximum(x, 0),
    "round": lambda x: np.rint(x),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon),
    "sigmoid": _sigmoid,
    "sign": lambda x: np.sign(x),
    "sin": lambda x: np.sin(x),
    "sinh": lambda x: np.sinh(x),
    "softplus": lambda x: np.logaddexp(x, 0),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sqrt": lambda x: np.sqrt(x),
    "square": lambda x: x * x,
    "tan": lambda x: np.tan(x),
    "tanh": lambda x: np.tanh(x),
    "cast": _cast,
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "elu": _elu,
    "gelu": _gelu,
    "leaky_relu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
    "sigmoid_hard": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": _real_div,
    "floor_div": lambda x, y: np.floor_divide(x, y),
    "mod": lambda x, y: np.mod(x, y),
    "pow": _pow,
    "maximum": lambda x, y: np.maximum(x, y),
    "minimum": lambda x, y: np.minimum(x, y),
    "equal": lambda x, y: x == y,
    "not_equal": lambda x, y: x != y,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "logical_and": lambda x, y: x & y,
    "logical_or": lambda x, y: x | y,
    "logical_xor": lambda x, y: x ^ y,
    "select": lambda cond, a, b: np.where(cond, a, b),
    "reduce_l1_norm": _reduce(lambda x, axis, keepdims: np.sum(np.abs(x), axis=axis, keepdims=keepdims)),
    "reduce_l2_norm": _reduce(_l2),
    "reduce_log_sum": _reduce(lambda x, axis, keepdims: np.log(np.sum(x, axis=axis, keepdims=keepdims))),
    "reduce_log_sum_exp": _reduce(scipy.special.logsumexp),
    "reduce_max": _reduce(np.max),
    "reduce_mean": _reduce(np.mean),
    "reduce_min": _reduce(np.min),
    "reduce_prod": _reduce(np.prod),
    "reduce_sum": _reduce(np.sum),
    "reduce_sum_square": _reduce(lambda x, axis, keepdims: np.sum(x * x, axis=axis, keepdims=keepdims)),
    "reduce_argmax": _arg(np.argmax),
    "reduce_argmin": _arg(np.argmin),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "local_response_norm": _local_response_norm,
    "cumsum": _cumsum,
    "topk": _topk,
}
