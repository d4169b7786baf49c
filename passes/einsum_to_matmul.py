"""Einsum as products of matrices.

    Einsum<"bik,bjk->bij">(A, B)        =>    MatMul(A, Transpose(B))
    Einsum<"bqhd,bkhd->bhqk">(Q, K)     =>    MatMul(Transpose(Q), Transpose(K))
    Einsum<"i,j->ij">(a, b)             =>    Mul(Unsqueeze(a), b)
    Einsum<"...ij->...j">(A)            =>    ReduceSum(A)

A letter is of one of four kinds for two factors: kept and in both (a batch of MatMul), kept and in one (rows, columns),
summed and in both (what a product sums); what is summed and in one factor is summed before. Several letters of one kind
become one axis by Reshape. More factors are taken two by two, from the left.

Does not fire, with the reason in the report, for a letter twice in one factor (a diagonal), and where ranks, or more
than one of the sizes that a Reshape needs, are not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qgraph.passes._einsum_plan import Letters, Pair, letters_of, pair, shape_of
from qgraph.passes._plain_operators import Emitter, UnfitError, rewrite
from qgraph.pipeline import Context, Pass, Report

__all__ = ["EinsumToMatmul"]

_Sizes = Mapping[str, int | None]


@dataclass(frozen=True)
class EinsumToMatmul(Pass):
    """Write Einsum as MatMul, with Transpose and Reshape around it."""

    name: ClassVar[str] = "einsum-to-matmul"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; `skipped` has every Einsum that stays."""
        del context
        return rewrite(model, {"Einsum": _multiplied}, "as MatMul")


def _multiplied(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    values = [value for value in node.inputs if value is not None]
    shapes = [value.shape for value in values if value.shape is not None]
    if len(shapes) < len(values):
        raise UnfitError("the rank of a factor is not known")
    factors, result = letters_of(node.attributes.get_string("equation"), [len(shape) for shape in shapes])
    sizes = _sizes(factors, shapes)
    pairs = _plan(factors, result, sizes)
    letters, value = factors[0], values[0]
    for planned, other, own in zip(pairs, values[1:], factors[1:], strict=True):
        value = _product(emit, planned, (value, other), (letters, own), sizes)
        letters = planned.result
    gone = tuple(one for one in letters if one not in result)
    value = _summed(emit, value, letters, gone)
    value = _ordered(emit, value, [one for one in letters if one not in gone], result)
    return [value if emit.nodes else emit("Identity", value)]


def _sizes(factors: Sequence[Letters], shapes: Sequence[ir.Shape]) -> _Sizes:
    found: dict[str, set[int | None]] = {}
    for letters, shape in zip(factors, shapes, strict=True):
        for letter, size in zip(letters, shape, strict=True):
            found.setdefault(letter, set()).add(size if isinstance(size, int) else None)
    for letter, known in found.items():
        if len(known - {None}) > 1 and letter[0] != ".":
            raise UnfitError(f"'{letter}' has several sizes")
    # An axis of one in an ellipsis is broadcast.
    return {letter: max((size for size in known if size is not None), default=None) for letter, known in found.items()}


def _plan(factors: Sequence[Letters], result: Letters, sizes: _Sizes) -> list[Pair]:
    """Plan all products before the first is written: none may fail for a size that is not known."""
    pairs, letters = [], factors[0]
    for place, other in enumerate(factors[1:], start=1):
        wanted = {*result, *(one for later in factors[place + 1 :] for one in later)}
        planned = pair(letters, other, wanted, result)
        for copied, groups in _reshaped(planned):
            shape_of(copied, groups, sizes)
        pairs.append(planned)
        letters = planned.result
    return pairs


def _reshaped(planned: Pair) -> list[tuple[Letters, Sequence[Letters]]]:
    """Return the letters that every Reshape around a product copies, and the groups of which it makes axes."""
    if not planned.summed:
        return []
    left, right = planned.groups
    found: list[tuple[Letters, Sequence[Letters]]] = []
    if _joins(left):
        found.append(((*planned.batch, *planned.loose), left))
    if _joins(right):
        found.append((planned.batch, right))
    if _is_apart(planned):
        found.append(_apart(planned))
    return found


def _joins(groups: Sequence[Letters]) -> bool:
    return any(len(group) != 1 for group in groups)


def _is_apart(planned: Pair) -> bool:
    """Tell whether a product has axes to be split or to go, other than two of one element."""
    outer = (planned.joined, planned.columns)
    return _joins(outer) and bool(planned.joined or planned.columns)


def _apart(planned: Pair) -> tuple[Letters, Sequence[Letters]]:
    return (*planned.batch, *planned.loose), [(one,) for one in (*planned.joined, *planned.columns)]


def _product(
    emit: Emitter, planned: Pair, values: Sequence[ir.Value], letters: Sequence[Letters], sizes: _Sizes
) -> ir.Value:
    if planned.swapped:
        values, letters = values[::-1], letters[::-1]
    factors = []
    for value, own, alone, order in zip(values, letters, planned.alone, planned.orders, strict=True):
        left = [one for one in own if one not in alone]
        factors.append(_ordered(emit, _summed(emit, value, own, alone), left, order))
    if not planned.summed:
        return _outer(emit, planned, *factors)
    copied = ((*planned.batch, *planned.loose), planned.batch)
    for place, (kept, groups) in enumerate(zip(copied, planned.groups, strict=True)):
        if _joins(groups):
            factors[place] = emit("Reshape", factors[place], emit.integers("matrix", shape_of(kept, groups, sizes)))
    product = emit("MatMul", *factors)
    if _is_apart(planned):
        return emit("Reshape", product, emit.integers("apart", shape_of(*_apart(planned), sizes)))
    if not planned.rows and not planned.columns:
        batch = len(planned.batch)
        return emit("Squeeze", product, emit.integers("one", [batch, batch + 1]))
    return product


def _outer(emit: Emitter, planned: Pair, first: ir.Value, second: ir.Value) -> ir.Value:
    """Multiply where nothing is summed, rows and columns against each other."""
    batch, rows, columns = len(planned.batch), len(planned.rows), len(planned.columns)
    if columns and (batch or rows):
        first = emit("Unsqueeze", first, emit.integers("behind", range(batch + rows, batch + rows + columns)))
    if rows and batch:
        second = emit("Unsqueeze", second, emit.integers("before", range(batch, batch + rows)))
    return emit("Mul", first, second)


def _summed(emit: Emitter, value: ir.Value, letters: Letters, gone: Letters) -> ir.Value:
    axes = [letters.index(one) for one in gone]
    return emit("ReduceSum", value, emit.integers("summed", axes), keepdims=0) if axes else value


def _ordered(emit: Emitter, value: ir.Value, letters: Sequence[str], order: Sequence[str]) -> ir.Value:
    perm = [letters.index(one) for one in order]
    return value if perm == list(range(len(perm))) else emit("Transpose", value, perm=perm)
