"""Lowering rules: element by element."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from qgraph.coreml.data_types import MilType
from qgraph.coreml.site import Rule, Site, UnfitError, mil_type

__all__ = ["RULES", "clamp"]

_UNARY = {
    "Abs": "abs", "Acos": "acos", "Asin": "asin", "Atan": "atan", "Atanh": "atanh", "Ceil": "ceil", "Cos": "cos",
    "Cosh": "cosh", "Erf": "erf", "Exp": "exp", "Floor": "floor", "Not": "logical_not", "Relu": "relu",
    "Round": "round", "Sigmoid": "sigmoid", "Sign": "sign", "Sin": "sin", "Sinh": "sinh", "Softplus": "softplus",
    "Softsign": "softsign", "Sqrt": "sqrt", "Tan": "tan", "Tanh": "tanh",
}  # fmt: skip
_BINARY = {
    "Add": "add", "Mul": "mul", "Pow": "pow", "Sub": "sub", "And": "logical_and", "Or": "logical_or",
    "Xor": "logical_xor",
}  # fmt: skip
_COMPARISONS = {
    "Equal": "equal", "Greater": "greater", "GreaterOrEqual": "greater_equal", "Less": "less",
    "LessOrEqual": "less_equal",
}  # fmt: skip
_FLOAT_ONLY = frozenset(_UNARY) - {"Abs", "Sign", "Not"}
_CASTS = frozenset({MilType.BOOL, MilType.FLOAT16, MilType.FLOAT32, MilType.INT8, MilType.INT32, MilType.UINT8})


def _unary(site: Site, kind: str) -> Any:
    if site.node.op_type in _FLOAT_ONLY and not site.type().is_float:
        raise UnfitError(f"ML Programs compute {site.node.op_type} of floating-point numbers only")
    return site.emit(kind, x=site[0])


def _binary(site: Site, kind: str) -> Any:
    if site.node.op_type == "Pow" and site.type(1) is not site.type(0):
        return site.emit(kind, x=site[0], y=site.emit("cast", x=site[1], dtype=site.type(0).value))
    return site.emit(kind, x=site[0], y=site[1])


def _comparison(site: Site, kind: str) -> Any:
    if site.type() is MilType.BOOL:
        numbers = [site.emit("cast", x=site[index], dtype="int32") for index in (0, 1)]
        return site.emit(kind, x=numbers[0], y=numbers[1])
    return site.emit(kind, x=site[0], y=site[1])


def _several(site: Site, kind: str) -> Any:
    total = site[0]
    for index in range(1, len(site.node.inputs)):
        total = site.emit(kind, x=total, y=site[index])
    return site.emit("identity", x=total) if len(site.node.inputs) == 1 else total


def _mean(site: Site) -> Any:
    return site.emit("real_div", x=_several(site, "add"), y=site.number(len(site.node.inputs)))


def _divide(site: Site) -> Any:
    """Whole numbers are divided towards zero in ONNX, and downwards in MIL."""
    if site.type().is_float:
        return site.emit("real_div", x=site[0], y=site[1])
    down = site.emit("floor_div", x=site[0], y=site[1])
    left = site.emit("sub", x=site[0], y=site.emit("mul", x=down, y=site[1]))
    inexact = site.emit("not_equal", x=left, y=np.int32(0))
    negative = site.emit("less", x=down, y=np.int32(0))
    up = site.emit("cast", x=site.emit("logical_and", x=inexact, y=negative), dtype="int32")
    return site.emit("add", x=down, y=up)


def _modulo(site: Site) -> Any:
    if site.integer("fmod", 0):
        raise UnfitError("a remainder with the sign of the dividend (fmod=1) has no form in MIL")
    return site.emit("mod", x=site[0], y=site[1])


def _negative(site: Site) -> Any:
    return site.emit("mul", x=site[0], y=site.number(-1))


def _reciprocal(site: Site) -> Any:
    return site.emit("real_div", x=site.number(1), y=site[0])


def _log(site: Site) -> Any:
    return site.emit("log", x=site[0], epsilon=site.number(0))


def _sloped(site: Site, kind: str, default: float) -> Any:
    return site.emit(kind, x=site[0], alpha=site.number(site.floating("alpha", default)))


def _hard_sigmoid(site: Site) -> Any:
    alpha, beta = site.floating("alpha", 0.2), site.floating("beta", 0.5)
    return site.emit("sigmoid_hard", x=site[0], alpha=site.number(alpha), beta=site.number(beta))


def _hard_swish(site: Site) -> Any:
    gate = site.emit("sigmoid_hard", x=site[0], alpha=site.number(1 / 6), beta=site.number(0.5))
    return site.emit("mul", x=site[0], y=gate)


def _thresholded(site: Site) -> Any:
    above = site.emit("greater", x=site[0], y=site.number(site.floating("alpha", 1.0)))
    return site.emit("mul", x=site[0], y=site.emit("cast", x=above, dtype=site.type().value))


def _selu(site: Site) -> Any:
    gamma = site.floating("gamma", 1.0507009873554805)
    curve = site.emit("elu", x=site[0], alpha=site.number(site.floating("alpha", 1.6732632423543772)))
    return site.emit("mul", x=curve, y=site.number(gamma))


def _gelu(site: Site) -> Any:
    mode = "TANH_APPROXIMATION" if site.text("approximate", "none") == "tanh" else "EXACT"
    return site.emit("gelu", x=site[0], mode=mode)


def _mish(site: Site) -> Any:
    return site.emit("mul", x=site[0], y=site.emit("tanh", x=site.emit("softplus", x=site[0])))


def _swish(site: Site) -> Any:
    alpha = site.floating("alpha", 1.0)
    inner = site[0] if alpha == 1.0 else site.emit("mul", x=site[0], y=site.number(alpha))
    return site.emit("mul", x=site[0], y=site.emit("sigmoid", x=inner))


def _slopes(site: Site) -> Any:
    """PRelu: slopes may be broadcast in any way in ONNX, and stand one to a channel in MIL."""
    below = site.emit("minimum", x=site[0], y=site.number(0))
    return site.emit("add", x=site.emit("relu", x=site[0]), y=site.emit("mul", x=below, y=site[1]))


def _clip(site: Site) -> Any:
    low, high = (site.array(index).item() if site.has(index) else None for index in (1, 2))
    return clamp(site, site[0], low, high)


def clamp(site: Site, value: Any, low: float | None, high: float | None) -> Any:
    """Return `value`, of the type of the first input, cut off at one end or both."""
    if low is not None and high is not None and low <= high and site.type().is_float:
        return site.emit("clip", x=value, alpha=site.number(low), beta=site.number(high))
    if low is not None:
        value = site.emit("maximum", x=value, y=site.number(low))
    if high is not None:
        value = site.emit("minimum", x=value, y=site.number(high))
    return value


def _cast(site: Site) -> Any:
    before, after = site.type(), mil_type(site.node.outputs[0])
    if before not in _CASTS or after not in _CASTS:
        raise UnfitError(f"there is no cast from {before.value} to {after.value} in MIL")
    if before is after:
        return site.emit("identity", x=site[0])
    if after is MilType.BOOL:
        return site.emit("not_equal", x=site[0], y=site.number(0))
    return site.emit("cast", x=site[0], dtype=after.value)


def _is_nan(site: Site) -> Any:
    return site.emit("not_equal", x=site[0], y=site[0])


def _is_infinite(site: Site) -> Any:
    if not (site.integer("detect_positive", 1) and site.integer("detect_negative", 1)):
        raise UnfitError("infinities are looked for on both sides")
    return site.emit("equal", x=site.emit("abs", x=site[0]), y=site.number(np.inf))


def _where(site: Site) -> Any:
    """The builder takes the sizes of a and b for those of the result, whatever the condition has."""
    first, second, target = site[1], site[2], site.result()
    if np.broadcast_shapes(site.shape(1), site.shape(2)) != target:
        whole = site.emit("fill", shape=np.array(target, np.int32), value=site.number(0, 2))
        second = site.emit("add", x=second, y=whole)
    return site.emit("select", cond=site[0], a=first, b=second)


def _identity(site: Site) -> Any:
    return site.emit("identity", x=site[0])


RULES: Mapping[str, Rule] = {
    **{name: functools.partial(_unary, kind=kind) for name, kind in _UNARY.items()},
    **{name: functools.partial(_binary, kind=kind) for name, kind in _BINARY.items()},
    **{name: functools.partial(_comparison, kind=kind) for name, kind in _COMPARISONS.items()},
    "Max": functools.partial(_several, kind="maximum"),
    "Min": functools.partial(_several, kind="minimum"),
    "Sum": functools.partial(_several, kind="add"),
    "Mean": _mean,
    "Div": _divide,
    "Mod": _modulo,
    "Neg": _negative,
    "Reciprocal": _reciprocal,
    "Log": _log,
    "Elu": functools.partial(_sloped, kind="elu", default=1.0),
    "LeakyRelu": functools.partial(_sloped, kind="leaky_relu", default=0.01),
    "ThresholdedRelu": _thresholded,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Selu": _selu,
    "Gelu": _gelu,
    "Mish": _mish,
    "Swish": _swish,
    "PRelu": _slopes,
    "Clip": _clip,
    "Cast": _cast,
    "Where": _where,
    "IsInf": _is_infinite,
    "IsNaN": _is_nan,
    "Identity": _identity,
    "Dropout": _identity,
}
