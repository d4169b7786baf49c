"""Gradients of operators that work element by element.

With y = f(x) and g the cotangent of y, that of x is g f'(x); where inputs were broadcast, it is summed over those axes.
At kinks (Relu at 0) the derivative is that of the flat side, or of the side that the operator takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from qgraph.analysis.gradient_tape import Call, Rule, Tape, UncoveredError

__all__ = ["ELEMENTWISE", "FLAT"]

Derivative = Callable[[Call], ir.Value]
"""Returns f'(x)."""

FLAT = frozenset(
    {
        "And",
        "ArgMax",
        "ArgMin",
        "BitShift",
        "Ceil",
        "ConstantOfShape",
        "Equal",
        "EyeLike",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "IsInf",
        "IsNaN",
        "Less",
        "LessOrEqual",
        "Mod",
        "NonMaxSuppression",
        "NonZero",
        "Not",
        "OneHot",
        "Or",
        "RandomNormalLike",
        "RandomUniformLike",
        "Range",
        "Round",
        "Shape",
        "Sign",
        "Size",
        "Xor",
    }
)
"""Operators whose outputs do not change when their inputs change a little."""


# --- one input --------------------------------------------------------------------------------------------------------


def _unary(derivative: Derivative) -> Rule:
    def rule(of: Call) -> dict[int, ir.Value]:
        return {0: of.tape.mul(of.g, derivative(of))}

    return rule


def _passed_on(of: Call) -> dict[int, ir.Value]:
    return {0: of.g}


def _neg(of: Call) -> dict[int, ir.Value]:
    return {0: of.tape.op("Neg", of.g)}


def _sloped(below: Callable[[Call], ir.Value]) -> Derivative:
    """1 above zero, something else below."""

    def derivative(of: Call) -> ir.Value:
        tape, x = of.tape, of.x()
        above = tape.op("Greater", x, tape.number(0.0, x), dtype=ir.DataType.BOOL)
        return tape.op("Where", above, tape.number(1.0, x), below(of), dtype=tape.dtype(x))

    return derivative


def _sigmoid_slope(tape: Tape, y: ir.Value) -> ir.Value:
    return tape.sub(y, tape.mul(y, y))


def _tanh_slope(tape: Tape, y: ir.Value) -> ir.Value:
    return tape.sub(tape.number(1.0, y), tape.mul(y, y))


def _hard_sigmoid(of: Call) -> ir.Value:
    tape, y = of.tape, of.y
    inside = tape.mul(tape.compare("Greater", y, 0.0), tape.compare("Less", y, 1.0))
    return tape.scale(inside, of.real("alpha", 0.2))


def _hard_swish(of: Call) -> ir.Value:
    """(2 x + 3) / 6 between -3 and 3, and 0 and 1 outside."""
    tape, x = of.tape, of.x()
    slope = tape.plus(tape.scale(x, 1 / 3), 0.5)
    inside = tape.compare("Less", tape.op("Abs", x), 3.0)
    return tape.add(tape.mul(inside, slope), tape.compare("GreaterOrEqual", x, 3.0))


def _swish(of: Call) -> ir.Value:
    """With s = sigmoid(alpha x): s + alpha y (1 - s)."""
    tape, x, y = of.tape, of.x(), of.y
    alpha = of.real("alpha", 1.0)
    gate = tape.op("Sigmoid", tape.scale(x, alpha))
    return tape.add(gate, tape.scale(tape.sub(y, tape.mul(y, gate)), alpha))


def _erf_slope(tape: Tape, x: ir.Value) -> ir.Value:
    bell = tape.op("Exp", tape.op("Neg", tape.mul(x, x)))
    return tape.scale(bell, 2 / math.sqrt(math.pi))


def _gelu(of: Call) -> ir.Value:
    tape, x = of.tape, of.x()
    if of.text("approximate", "none") == "tanh":
        return _gelu_tanh(tape, x)
    scaled = tape.scale(x, 1 / math.sqrt(2))
    share = tape.plus(tape.scale(tape.op("Erf", scaled), 0.5), 0.5)
    return tape.add(share, tape.scale(tape.mul(x, _erf_slope(tape, scaled)), 0.5 / math.sqrt(2)))


def _gelu_tanh(tape: Tape, x: ir.Value) -> ir.Value:
    factor, cubic = math.sqrt(2 / math.pi), 0.044715
    square = tape.mul(x, x)
    inner = tape.scale(tape.mul(x, tape.plus(tape.scale(square, cubic), 1.0)), factor)
    bent = tape.op("Tanh", inner)
    slope = tape.scale(tape.plus(tape.scale(square, 3 * cubic), 1.0), factor)
    rise = tape.mul(tape.mul(x, _tanh_slope(tape, bent)), slope)
    return tape.scale(tape.add(tape.plus(bent, 1.0), rise), 0.5)


def _mish(of: Call) -> ir.Value:
    """With t = tanh(softplus(x)): t + x sigmoid(x) (1 - t^2)."""
    tape, x = of.tape, of.x()
    bent = tape.op("Tanh", tape.op("Softplus", x))
    return tape.add(bent, tape.mul(tape.mul(x, tape.op("Sigmoid", x)), _tanh_slope(tape, bent)))


def _softsign(of: Call) -> ir.Value:
    tape, x = of.tape, of.x()
    slope = tape.op("Reciprocal", tape.plus(tape.op("Abs", x), 1.0))
    return tape.mul(slope, slope)


def _unchanged(of: Call) -> ir.Value:
    tape, x, y = of.tape, of.x(), of.y
    return tape.mask(tape.op("Equal", x, y, dtype=ir.DataType.BOOL), x)


def _cast(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    dtype = tape.dtype(of.x())
    return {0: tape.op("Cast", of.g, dtype=dtype, to=int(dtype))}


_DERIVATIVES: Mapping[str, Derivative] = {
    "Abs": lambda of: of.tape.op("Sign", of.x()),
    "Cos": lambda of: of.tape.op("Neg", of.tape.op("Sin", of.x())),
    "Elu": _sloped(lambda of: of.tape.plus(of.y, of.real("alpha", 1.0))),
    "Erf": lambda of: _erf_slope(of.tape, of.x()),
    "Exp": lambda of: of.y,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "LeakyRelu": _sloped(lambda of: of.tape.number(of.real("alpha", 0.01), of.x())),
    "Log": lambda of: of.tape.op("Reciprocal", of.x()),
    "Mish": _mish,
    "Reciprocal": lambda of: of.tape.op("Neg", of.tape.mul(of.y, of.y)),
    "Relu": lambda of: of.tape.compare("Greater", of.y, 0.0),
    "Sigmoid": lambda of: _sigmoid_slope(of.tape, of.y),
    "Sin": lambda of: of.tape.op("Cos", of.x()),
    "Softplus": lambda of: of.tape.op("Sigmoid", of.x()),
    "Softsign": _softsign,
    "Sqrt": lambda of: of.tape.scale(of.tape.op("Reciprocal", of.y), 0.5),
    "Swish": _swish,
    "Tanh": lambda of: _tanh_slope(of.tape, of.y),
    "ThresholdedRelu": _unchanged,
}


# --- several inputs ---------------------------------------------------------------------------------------------------


def _broadcast(*partial: Callable[[Call], ir.Value]) -> Rule:
    """Each of `partial` gives the cotangent of an input as if nothing had been broadcast."""

    def rule(of: Call) -> dict[int, ir.Value]:
        wanted = [index for index in sorted(of.wanted) if index < len(partial)]
        if len(wanted) < len(of.wanted):
            raise UncoveredError(f"an input of {of.node.op_type} that has no derivative matters")
        return {index: of.tape.reduce_to(partial[index](of), of.x(index), of.y) for index in wanted}

    return rule


def _divisor(of: Call) -> ir.Value:
    tape = of.tape
    return tape.op("Neg", tape.mul(of.g, tape.div(of.y, of.x(1))))


def _base(of: Call) -> ir.Value:
    tape = of.tape
    base, exponent = of.x(0), of.x(1)
    kind = int(tape.dtype(base))
    power = tape.op("Cast", exponent, dtype=tape.dtype(base), to=kind)
    below = tape.op("Pow", base, tape.plus(power, -1.0))
    return tape.mul(of.g, tape.mul(power, below))


def _exponent(of: Call) -> ir.Value:
    tape = of.tape
    return tape.mul(of.g, tape.mul(of.y, tape.op("Log", of.x(0))))


def _where(chosen: bool) -> Callable[[Call], ir.Value]:
    def partial(of: Call) -> ir.Value:
        tape = of.tape
        zero = tape.number(0.0, of.g)
        branches = (of.g, zero) if chosen else (zero, of.g)
        return tape.op("Where", of.x(0), *branches, dtype=tape.dtype(of.g))

    return partial


def _no_derivative(of: Call) -> ir.Value:
    raise UncoveredError(f"the first input of {of.node.op_type} has no derivative")


def _prelu_x(of: Call) -> ir.Value:
    tape = of.tape
    below = tape.op("Less", of.x(0), tape.number(0.0, of.g), dtype=ir.DataType.BOOL)
    return tape.op("Where", below, tape.mul(of.g, of.x(1)), of.g, dtype=tape.dtype(of.g))


def _prelu_slope(of: Call) -> ir.Value:
    tape = of.tape
    return tape.mul(tape.mul(of.g, of.x(0)), tape.compare("Less", of.x(0), 0.0))


def _each(partial: Callable[[Call, int], ir.Value]) -> Rule:
    """Any number of inputs, all alike."""

    def rule(of: Call) -> dict[int, ir.Value]:
        return {index: of.tape.reduce_to(partial(of, index), of.x(index), of.y) for index in of.wanted}

    return rule


def _extreme(of: Call, index: int) -> ir.Value:
    tape = of.tape
    same = tape.op("Equal", of.x(index), of.y, dtype=ir.DataType.BOOL)
    return tape.mul(of.g, tape.mask(same, of.g))


def _beyond(op_type: str, index: int) -> Callable[[Call], ir.Value]:
    """A bound takes the cotangents of what lies beyond it."""

    def partial(of: Call) -> ir.Value:
        tape = of.tape
        beyond = tape.op(op_type, of.x(), of.x(index), dtype=ir.DataType.BOOL)
        return tape.mul(of.g, tape.mask(beyond, of.g))

    return partial


ELEMENTWISE: Mapping[str, Rule] = {
    **{op_type: _unary(derivative) for op_type, derivative in _DERIVATIVES.items()},
    "Cast": _cast,
    "Dropout": _passed_on,
    "Identity": _passed_on,
    "Neg": _neg,
    # Rounding there and back: the identity, as straight-through estimators have it.
    "DequantizeLinear": _passed_on,
    "QuantizeLinear": _passed_on,
    "Add": _broadcast(lambda of: of.g, lambda of: of.g),
    "Sub": _broadcast(lambda of: of.g, lambda of: of.tape.op("Neg", of.g)),
    "Mul": _broadcast(lambda of: of.tape.mul(of.g, of.x(1)), lambda of: of.tape.mul(of.g, of.x(0))),
    "Div": _broadcast(lambda of: of.tape.div(of.g, of.x(1)), _divisor),
    "Pow": _broadcast(_base, _exponent),
    "Clip": _broadcast(lambda of: of.tape.mul(of.g, _unchanged(of)), _beyond("Less", 1), _beyond("Greater", 2)),
    "Where": _broadcast(_no_derivative, _where(chosen=True), _where(chosen=False)),
    "PRelu": _broadcast(_prelu_x, _prelu_slope),
    "Min": _each(_extreme),
    "Max": _each(_extreme),
    "Sum": _each(lambda of, _: of.g),
    "Mean": _each(lambda of, _: of.tape.scale(of.g, 1 / len(of.node.inputs))),
}
