"""Sizes that are not known before a model runs, as polynomials over symbols.

    batch * seq * 384 // 384  ->  batch*seq        exact divisions are carried out
    (seq + 1) // 2            ->  floor((seq+1)/2)  what does not divide becomes a symbol of its own

Two sizes that are written the same are the same number in every run; nothing follows from two being written
differently. A size is an `int` or an `Expr`; an `Expr` is never a constant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

__all__ = [
    "Dim",
    "Expr",
    "add",
    "broadcast",
    "declared",
    "floordiv",
    "maximum",
    "minimum",
    "mul",
    "product",
    "quotient",
    "sub",
    "symbol",
]

_MOST_TERMS = 32
_MOST_FACTORS = 8
_LONGEST = 160
_LARGEST = (1 << 63) - 1
"""Polynomials, names and numbers beyond these become symbols: graphs can be made that blow them up."""


class Expr:
    """A polynomial with integer coefficients over symbols. Immutable; equal if written the same."""

    __slots__ = ("_hash", "_text", "terms")

    def __init__(self, terms: Mapping[tuple[str, ...], int]) -> None:
        self.terms = dict(sorted(terms.items(), key=lambda term: (-len(term[0]), term[0])))
        self._text = _text(self.terms)
        self._hash = hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self._text == other._text

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Expr({self._text})"


Dim: TypeAlias = int | Expr


def symbol(name: str) -> Expr:
    """Return the size called `name`; a very long name is shortened to a digest of it."""
    if len(name) > _LONGEST:
        name = f"size_{hashlib.blake2b(name.encode('utf-8', 'replace'), digest_size=8).hexdigest()}"
    return Expr({(name,): 1})


def declared(name: str) -> Dim:
    """Return the size that a model calls `name`: exporters write "past + new" for the sum of two others."""
    parts = [part.strip() for part in name.split("+")]
    if len(parts) < 2 or not all(part.isidentifier() or part.isdecimal() for part in parts):
        return symbol(name)
    total: Dim = 0
    for part in parts:
        total = add(total, int(part) if part.isdecimal() else symbol(part))
    return total


def add(one: Dim, other: Dim) -> Dim:
    """Return one + other."""
    if isinstance(one, int) and isinstance(other, int) and abs(one + other) <= _LARGEST:
        return one + other
    terms = dict(_terms(one))
    for monomial, factor in _terms(other).items():
        terms[monomial] = terms.get(monomial, 0) + factor
    return _simplify(terms, lambda: f"({one})+({other})")


def sub(one: Dim, other: Dim) -> Dim:
    """Return one - other."""
    return add(one, mul(other, -1))


def mul(one: Dim, other: Dim) -> Dim:
    """Return one * other."""
    if isinstance(one, int) and isinstance(other, int) and abs(one * other) <= _LARGEST:
        return one * other
    terms: dict[tuple[str, ...], int] = {}
    for left, left_factor in _terms(one).items():
        for right, right_factor in _terms(other).items():
            monomial = tuple(sorted(left + right))
            terms[monomial] = terms.get(monomial, 0) + left_factor * right_factor
    return _simplify(terms, lambda: f"({one})*({other})")


def product(dims: Iterable[Dim]) -> Dim:
    """Return the product, 1 for none."""
    result: Dim = 1
    for dim in dims:
        result = mul(result, dim)
    return result


def floordiv(one: Dim, other: Dim) -> Dim | None:
    """Return one // other rounded down, or None when dividing by zero."""
    if other == 0:
        return None
    if isinstance(one, int) and isinstance(other, int):
        return one // other
    exact = divide(one, other)
    return exact if exact is not None else symbol(f"floor(({one})/({other}))")


def divide(one: Dim, other: Dim) -> Dim | None:
    """Return one / other if `other` is a single term that divides every term of `one`, else None."""
    divisor = _terms(other)
    if len(divisor) != 1:
        return 1 if one == other else None
    ((names, factor),) = divisor.items()
    terms: dict[tuple[str, ...], int] = {}
    for monomial, coefficient in _terms(one).items():
        rest = list(monomial)
        for name in names:
            if name not in rest:
                return None
            rest.remove(name)
        if coefficient % factor:
            return None
        terms[tuple(rest)] = coefficient // factor
    return _simplify(terms, lambda: f"({one})/({other})")


def quotient(dims: Iterable[Dim], others: Iterable[Dim]) -> Dim | None:
    """Return the product of `dims` over that of `others`, or None where it is not exact; equal sizes cancel."""
    left, below = list(dims), []
    for one in others:
        if one in left:
            left.remove(one)
        else:
            below.append(one)
    divisor = product(below)
    return divide(product(left), divisor) if divisor != 0 else None


def minimum(one: Dim, other: Dim) -> Dim:
    """Return the smaller of the two."""
    if isinstance(one, int) and isinstance(other, int):
        return min(one, other)
    return one if one == other else _call("min", one, other)


def maximum(one: Dim, other: Dim) -> Dim:
    """Return the larger of the two."""
    if isinstance(one, int) and isinstance(other, int):
        return max(one, other)
    return one if one == other else _call("max", one, other)


def broadcast(one: Dim, other: Dim) -> Dim:
    """Return the size of two axes of one elementwise operation, which are equal unless one of them is 1."""
    if one == other or other == 1:
        return one
    if one == 1:
        return other
    if isinstance(one, int) and isinstance(other, int):
        return max(one, other)
    if isinstance(one, int):
        return one
    if isinstance(other, int):
        return other
    for whole, part in ((one, other), (other, one)):
        if _is_clipped(part, whole):
            return whole
    return _call("broadcast", one, other)


def _is_clipped(part: Expr, whole: Expr) -> bool:
    """Tell whether `part` is min(whole, n) with n > 1: then they are equal, or the operation would fail."""
    text = str(part)
    if not text.startswith("min(") or "," not in text:
        return False
    return any(
        text == str(_call("min", whole, int(number))) and int(number) > 1
        for number in text[4:-1].split(",")
        if number.isdigit()
    )


def _call(name: str, one: Dim, other: Dim) -> Expr:
    return symbol(f"{name}({','.join(sorted((str(one), str(other))))})")


def _terms(dim: Dim) -> Mapping[tuple[str, ...], int]:
    if isinstance(dim, Expr):
        return dim.terms
    return {(): dim} if dim else {}


def _simplify(terms: Mapping[tuple[str, ...], int], otherwise: Callable[[], str]) -> Dim:
    kept = {monomial: factor for monomial, factor in terms.items() if factor}
    if len(kept) > _MOST_TERMS or any(len(names) > _MOST_FACTORS or abs(n) > _LARGEST for names, n in kept.items()):
        return symbol(otherwise())
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    return Expr(kept)


def _text(terms: Mapping[tuple[str, ...], int]) -> str:
    parts: list[str] = []
    for monomial, factor in terms.items():
        sign = "-" if factor < 0 else "+" if parts else ""
        names = "*".join(monomial)
        size = str(abs(factor)) if not names else names if abs(factor) == 1 else f"{abs(factor)}*{names}"
        parts.append(sign + size)
    return "".join(parts)
