"""Dimensions of tensors as sums and products of atoms: what has to shrink together when a part of one is cut.

An atom is a set of indices 0..size-1 of which any can be cut. The axis of a tensor is written in atoms:

    [768]                                (a)              one atom of 768
    reshaped to [12, 64]                 (h d), (h), (d)  a becomes the product of h (12) and d (64)
    [32] and [64] concatenated           (b) + (c)        a sum: the first 32 indices are those of b
    a channel shuffle of 2 x 16          (h d) -> (d h)   the same atoms in another order

`unify` says that two axes are the same indices in the same order; atoms are split into products or sums as that needs.
What cannot be written so is frozen, with the reason. Cutting index i of an atom then cuts every index, of every axis
that the atom is in, of which it is a digit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["Atom", "Axis", "Dimensions"]


@dataclasses.dataclass(eq=False)
class Atom:
    """A set of indices that are cut one by one.

    Attributes:
        number: in the order in which atoms are made.
        size: how many indices.
        frozen: why none can be cut; '' where that is not known.
    """

    number: int
    size: int
    frozen: str = ""
    _same: Atom | None = None
    _parts: Axis | None = None

    def __repr__(self) -> str:
        return f"Atom({self.number}: {self.size}{', frozen' if self.frozen else ''})"


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a tensor: the terms of a sum, one behind the other, each a product of atoms, the slowest first."""

    terms: tuple[tuple[Atom, ...], ...]

    @property
    def size(self) -> int:
        """The number of indices."""
        return sum(_size(term) for term in self.terms)


def _size(term: Sequence[Atom]) -> int:
    return math.prod(atom.size for atom in term)


class Dimensions:
    """Makes atoms and keeps track of which are the same, and of what they have been split into."""

    def __init__(self) -> None:
        self._count = 0

    def axis(self, size: int) -> Axis:
        """Return a new axis; one of size 1 has no atoms."""
        return Axis((() if size == 1 else (self._atom(size),),))

    def product(self, axes: Sequence[Axis]) -> Axis | None:
        """Return the axis that several merge into, the slowest first; None where it is no sum of products."""
        terms: list[tuple[Atom, ...]] = [()]
        for axis in map(self.resolved, axes):
            if len(axis.terms) > 1 and any(term != () for term in terms):
                return None
            terms = [left + right for left in terms for right in axis.terms]
        return Axis(tuple(terms))

    def resolved(self, axis: Axis) -> Axis:
        """Return an axis in the atoms that stand today."""
        terms: list[tuple[Atom, ...]] = []
        for term in axis.terms:
            terms += self._resolved_term(term)
        return Axis(tuple(terms))

    def atoms(self, axis: Axis) -> list[Atom]:
        """Return the atoms of an axis, each once."""
        return list(dict.fromkeys(atom for term in self.resolved(axis).terms for atom in term))

    def freeze(self, axis: Axis, reason: str) -> None:
        """Say that no index of an axis can be cut; the first reason stays."""
        for atom in self.atoms(axis):
            atom.frozen = atom.frozen or reason

    def unify(self, one: Axis, other: Axis, where: str) -> None:
        """Say that two axes of the same size are the same indices in the same order.

        Args:
            one: an axis.
            other: an axis of the same size.
            where: names the node that says so, for the reason of what has to be frozen.
        """
        if one.size != other.size:
            self._freeze_both(one, other, f"{where} joins axes of different sizes")
            return
        if not self._unify_sums(list(self.resolved(one).terms), list(self.resolved(other).terms)):
            self._freeze_both(one, other, f"{where} arranges it in a way that cannot be followed")

    def split(self, axis: Axis, sizes: Sequence[int], where: str) -> list[Axis] | None:
        """Return the factors of an axis, the slowest first, of which the product of the sizes is that of the axis.

        None, and the axis is frozen, where it cannot be split so.
        """
        factors = [self.axis(size) for size in sizes]
        product = self.product(factors)
        if product is None:
            return None
        self.unify(axis, product, where)
        return factors

    def cut(self, axis: Axis, keep: Mapping[Atom, np.ndarray]) -> np.ndarray | None:
        """Return the indices of an axis that stay, int64 in rising order; None where all do.

        Args:
            axis: of a tensor.
            keep: atom -> the indices of it that stay; others stay whole.
        """
        resolved = self.resolved(axis)
        if not any(atom in keep for term in resolved.terms for atom in term):
            return None
        start, found = 0, []
        for term in resolved.terms:
            indices = np.zeros(1, np.int64)
            for atom in term:
                kept = np.asarray(keep[atom] if atom in keep else np.arange(atom.size), np.int64)
                indices = (indices[:, None] * atom.size + kept).reshape(-1)
            found.append(start + indices)
            start += _size(term)
        return np.concatenate(found)

    # --- union and refinement -----------------------------------------------------------------------------------------

    def _atom(self, size: int, frozen: str = "") -> Atom:
        self._count += 1
        return Atom(self._count, size, frozen)

    def _part(self, size: int, of: Atom) -> tuple[Atom, ...]:
        """Return a new atom that is a part of another; a single index has none, and is never cut."""
        return () if size == 1 else (self._atom(size, of.frozen),)

    def _find(self, atom: Atom) -> Atom:
        leader = atom
        while leader._same is not None:  # noqa: SLF001 - of this module
            leader = leader._same  # noqa: SLF001
        while atom is not leader:
            atom._same, atom = leader, atom._same or leader  # noqa: SLF001
        return leader

    def _resolved_term(self, term: Sequence[Atom]) -> list[tuple[Atom, ...]]:
        found: list[tuple[Atom, ...]] = [()]
        for atom in term:
            leader = self._find(atom)
            if leader._parts is None:  # noqa: SLF001
                found = [(*before, leader) for before in found]
                continue
            parts = self.resolved(leader._parts).terms  # noqa: SLF001
            found = [before + part for before in found for part in parts]
        return found

    def _freeze_both(self, one: Axis, other: Axis, reason: str) -> None:
        self.freeze(one, reason)
        self.freeze(other, reason)

    def _unify_sums(self, ones: list[tuple[Atom, ...]], others: list[tuple[Atom, ...]]) -> bool:
        """Go along two sums; where a term ends before the other's, the longer one is split there."""
        while ones and others:
            one, other = ones.pop(0), others.pop(0)
            if _size(one) > _size(other):
                halves = self._halved(one, _size(other))
                if halves is None:
                    return False
                one, rest = halves
                ones.insert(0, rest)
            elif _size(other) > _size(one):
                halves = self._halved(other, _size(one))
                if halves is None:
                    return False
                other, rest = halves
                others.insert(0, rest)
            if not self._unify_products(list(one), list(other)):
                return False
            # What was split on the way may stand in what is still to come.
            ones, others = self._again(ones), self._again(others)
        return not ones and not others

    def _again(self, terms: Sequence[tuple[Atom, ...]]) -> list[tuple[Atom, ...]]:
        return [resolved for term in terms for resolved in self._resolved_term(term)]

    def _halved(self, term: tuple[Atom, ...], size: int) -> tuple[tuple[Atom, ...], tuple[Atom, ...]] | None:
        """Split the slowest atom of a product into a sum, so that the first part of the product has `size` indices."""
        first, inner = term[0], _size(term[1:])
        if size % inner or first in term[1:]:
            return None
        head, tail = self._part(size // inner, first), self._part(first.size - size // inner, first)
        first._parts = Axis((head, tail))  # noqa: SLF001
        return (*head, *term[1:]), (*tail, *term[1:])

    def _unify_products(self, ones: list[Atom], others: list[Atom]) -> bool:
        """Go along two products from their slowest factors; a factor that others make up becomes their product."""
        while ones and others:
            one, other = ones[0], others[0]
            if one.size == other.size:
                self._merge(one, other)
                ones.pop(0)
                others.pop(0)
            elif one.size % other.size == 0:
                self._factor(one, other.size)
            elif other.size % one.size == 0:
                self._factor(other, one.size)
            else:
                return False
            both = self._again([tuple(ones)]), self._again([tuple(others)])
            if any(len(terms) != 1 for terms in both):
                return False
            ones, others = list(both[0][0]), list(both[1][0])
        return not ones and not others

    def _factor(self, atom: Atom, outer: int) -> None:
        atom._parts = Axis(((*self._part(outer, atom), *self._part(atom.size // outer, atom)),))  # noqa: SLF001

    def _merge(self, one: Atom, other: Atom) -> None:
        if one is other:
            return
        kept, gone = (one, other) if one.number < other.number else (other, one)
        kept.frozen = kept.frozen or gone.frozen
        gone._same = kept  # noqa: SLF001
