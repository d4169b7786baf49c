"""The model-local functions of domain `qgraph`, from their definitions: 64-bit integer arithmetic.

TVM's own fixed-point multiply (`q_multiply_shift`) is not used: it wraps where Requantize saturates, has one way of
rounding, takes no shift of 0, and processors have instructions for it that round twice.

TVM's simplifier reckons with integers that never overflow, and multiplies sums out: 2 * (a - b) becomes 2 * a - 2 * b,
which may overflow where the former does not. Sums that are multiplied are therefore kept small, or stored in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qgraph.analysis.integer_functions import DOMAIN
from qgraph.codegen.tvm_site import Element, Operand, Site, Tensor, broadcast, constant, dims, rule

__all__: list[str] = []

_ROOT_BITS = 31
_INT32 = (-(1 << 31), (1 << 31) - 1)


def _wide(value: Any) -> Element:
    """Return an element, or a number, as int64."""
    return constant(value, "int64") if isinstance(value, int) else value.astype("int64")


def _clamp(x: Element, low: Element, high: Element) -> Element:
    from tvm import tirx

    return tirx.min(tirx.max(x, low), high)


def _select(condition: Element, one: Element, other: Element) -> Element:
    from tvm import tirx

    return tirx.Select(condition, one, other)


# --- Requantize -----------------------------------------------------------------------------------------------------


@rule("Requantize", domain=DOMAIN)
def _requantize(site: Site) -> Operand:
    rounding = site.attributes.get("rounding")
    if rounding not in _ROUNDINGS:
        raise site.refuse(f"there is no rounding '{rounding}' (there are: {', '.join(_ROUNDINGS)})")
    rounded = _ROUNDINGS[rounding]
    dtype = site.dtype(3)

    def element(*inputs: Element) -> Element:
        x, multiplier, shift, zero_point, low, high = map(_wide, inputs)
        y = _clamp(rounded(x, multiplier, shift), *map(_wide, _INT32)) + zero_point
        return _clamp(y, low, high).astype(dtype)

    return site.elementwise(element, *site.operands)


def _half_up(x: Element, multiplier: Element, shift: Element) -> Element:
    return (x * multiplier + ((_wide(1) << shift) >> 1)) >> shift


def _half_even(x: Element, multiplier: Element, shift: Element) -> Element:
    product = x * multiplier
    quotient = product >> shift
    remainder = product & ((_wide(1) << shift) - 1)
    # The last bit of an odd quotient tips a tie. A shift of 0 leaves no remainder, and 1 does not exceed 1.
    return quotient + _wide(remainder * 2 + (quotient & _wide(1)) > (_wide(1) << shift))


def _gemmlowp(x: Element, multiplier: Element, shift: Element) -> Element:
    from tvm import tirx

    left, right = tirx.max(31 - shift, _wide(0)), tirx.max(shift - 31, _wide(0))
    product = _clamp(x << left, *map(_wide, _INT32)) * multiplier
    nudge = _select(product >= 0, _wide(1 << 30), _wide(1 - (1 << 30)))
    high = tirx.truncdiv(product + nudge, _wide(1 << 31))
    mask = (_wide(1) << right) - 1
    return (high >> right) + _wide((high & mask) > (mask >> 1) + _wide(high < 0))


_ROUNDINGS: dict[str, Callable[[Element, Element, Element], Element]] = {
    "half-up": _half_up,
    "gemmlowp": _gemmlowp,
    "half-even": _half_even,
}


# --- roots and quotients ----------------------------------------------------------------------------------------------


@rule("IntegerSqrt", domain=DOMAIN)
def _integer_sqrt(site: Site) -> Operand:
    return site.compute(_root, site[0])


def _root(x: Tensor) -> Tensor:
    """Return floor(sqrt(x)) bit by bit, the highest first: a bit stays if the square does not exceed x.

    The bits are the steps of a reduction, which TVM goes through in order. The root of 2^62, the largest x, has one bit
    more than the others; it is added at the end, so that no square exceeds int64.
    """
    from tvm import te

    def keep(found: Sequence[Element], step: Sequence[Element]) -> Sequence[Element]:
        larger = found[0] + step[0]
        return _select(larger * larger <= step[1], larger, found[0]), step[1]

    bits = te.comm_reducer(keep, lambda *dtypes: tuple(constant(0, dtype) for dtype in dtypes), name="bits")
    bit = te.reduce_axis((0, _ROOT_BITS), name="bit")
    shape = dims(x)

    def step(*index: Element) -> Element:
        return bits((_wide(1) << (_ROOT_BITS - 1 - _wide(bit.var)), _wide(x(*index))), axis=bit)

    root = te.compute(shape, step, name="square_root")[0]
    return te.compute(
        shape, lambda *i: root(*i) + _wide((root(*i) + 1) * (root(*i) + 1) <= _wide(x(*i))), name="exact_root"
    )


@rule("RoundedDivide", domain=DOMAIN)
def _rounded_divide(site: Site) -> Operand:
    return site.elementwise(_quotient, *site.operands)


def _quotient(a: Element, b: Element) -> Element:
    """Return a / b rounded half away from zero; b = 0 counts as 1."""
    from tvm import tirx

    size = tirx.max(_select(b < 0, -b, b), _wide(1))
    half = tirx.truncdiv(size, _wide(2))
    quotient = tirx.truncdiv(_select(a < 0, -a, a) + half, size)
    # TVM generates no code for comparing truths.
    return _select(tirx.any(tirx.all(a < 0, b >= 0), tirx.all(a >= 0, b < 0)), -quotient, quotient)


# --- tables -----------------------------------------------------------------------------------------------------------


@rule("TableInterpolate", domain=DOMAIN)
def _table_interpolate(site: Site) -> Operand:
    def interpolated(x: Tensor, table: Tensor) -> Tensor:
        def element(number: Element) -> Element:
            position = number.astype("int32") + 32768
            index, fraction = position >> 7, position & 127
            start, end = table(index), table(index + 1)
            return (start * 128 + (end - start) * fraction + (1 << 13)) >> 14

        return broadcast(element, x)

    return site.compute(interpolated, *site.operands, elementwise=True)


@rule("Softmax", domain=DOMAIN)
def _softmax(site: Site) -> Operand:
    from tvm import te, tirx

    *rows, length = site.shape()
    last = site.shape(1)[0] - 1

    def described(x: Tensor, table: Tensor, divisor: Tensor, one: Tensor) -> Tensor:
        k, j = te.reduce_axis((0, length), name="k"), te.reduce_axis((0, length), name="j")
        largest = te.compute(rows, lambda *i: te.max(x(*i, k), axis=k), name="largest")

        def exponential(*i: Element) -> Element:
            step = _scalar_of(divisor)
            distance = _wide(largest(*i[:-1])) - _wide(x(*i))
            index, fraction = tirx.truncdiv(distance, step), tirx.truncmod(distance, step)
            start = _wide(table(tirx.min(index, _wide(last))))
            end = _wide(table(tirx.min(index + 1, _wide(last))))
            half = tirx.truncdiv(step, _wide(2))
            return tirx.truncdiv(start * (step - fraction) + end * fraction + half, step).astype("int32")

        exponentials = te.compute((*rows, length), exponential, name="exponentials")
        total = te.compute(rows, lambda *i: te.sum(_wide(exponentials(*i, j)), axis=j), name="total")

        def probability(*i: Element) -> Element:
            whole = total(*i[:-1])
            shares = _wide(exponentials(*i)) * _scalar_of(one) + tirx.truncdiv(whole, _wide(2))
            return tirx.truncdiv(shares, whole).astype("int32")

        return te.compute((*rows, length), probability, name="probabilities")

    return site.compute(described, *site.operands)


def _scalar_of(tensor: Tensor) -> Element:
    return _wide(tensor(*(0 for _ in dims(tensor))))


# --- normalization ----------------------------------------------------------------------------------------------------


@rule("LayerNormalize", "RMSNormalize", domain=DOMAIN)
def _normalize(site: Site) -> Operand:
    from tvm import te, tirx

    *rows, length = site.shape()
    centring = site.node.op_type == "LayerNormalize"

    def described(x: Tensor, fraction: Tensor, epsilon: Tensor, numerator: Tensor) -> Tensor:
        k, j = te.reduce_axis((0, length), name="k"), te.reduce_axis((0, length), name="j")

        def scaled(*i: Element) -> Element:
            return _wide(x(*i)) * _scalar_of(fraction)

        centred = scaled
        if centring:
            total = te.compute(rows, lambda *i: te.sum(scaled(*i, k), axis=k), name="total")
            mean = te.compute(rows, lambda *i: _quotient(total(*i), _wide(length)), name="mean")
            centred = te.compute((*rows, length), lambda *i: scaled(*i) - mean(*i[:-1]), name="centred")
        squares = te.compute(rows, lambda *i: te.sum(centred(*i, j) * centred(*i, j), axis=j), name="squares")
        variance = te.compute(
            rows, lambda *i: tirx.truncdiv(squares(*i), _wide(length)) + _scalar_of(epsilon), name="variance"
        )
        deviation = _root(variance)

        def element(*i: Element) -> Element:
            return _quotient(centred(*i) * _scalar_of(numerator), tirx.max(deviation(*i[:-1]), _wide(1))).astype(
                "int32"
            )

        return te.compute((*rows, length), element, name="normalized")

    return site.compute(described, *site.operands)
