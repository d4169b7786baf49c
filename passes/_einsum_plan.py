"""What an Einsum does, letter by letter, before anything is written: two factors at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from qgraph.passes._plain_operators import UnfitError

__all__ = ["Letters", "Pair", "letters_of", "pair", "shape_of"]

Letters = tuple[str, ...]
"""One for each axis; the axes of an ellipsis are '.0', '.1' ... from the last on."""


def letters_of(equation: str, ranks: Sequence[int]) -> tuple[list[Letters], Letters]:
    """Return the letters of each factor and of the result.

    Raises:
        UnfitError: the equation does not fit the ranks, or takes a diagonal.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    texts = left.split(",")
    if len(texts) != len(ranks):
        raise UnfitError(f"'{equation}' has {len(texts)} factors, and the node {len(ranks)}")
    factors = [_expanded(text, rank) for text, rank in zip(texts, ranks, strict=True)]
    for text, letters in zip(texts, factors, strict=True):
        if len(set(letters)) < len(letters):
            raise UnfitError(f"'{text}' takes a diagonal")
    counts = Counter(letter for letters in factors for letter in letters)
    dots = max((sum(letter[0] == "." for letter in letters) for letters in factors), default=0)
    if arrow:
        result = _expanded(right, len(right.replace("...", "")) + (dots if "..." in right else 0))
    else:
        once = sorted(letter for letter, count in counts.items() if count == 1 and letter[0] != ".")
        result = (*_dots(dots), *once)
    if not set(result) <= counts.keys() or len(set(result)) < len(result):
        raise UnfitError(f"'{equation}' is not an equation of Einsum")
    return factors, result


def _dots(count: int) -> Letters:
    return tuple(f".{place}" for place in reversed(range(count)))


def _expanded(text: str, rank: int) -> Letters:
    before, dots, after = text.partition("...")
    count = rank - len(before) - len(after)
    if count < 0 or (count and not dots):
        raise UnfitError(f"'{text}' does not fit {rank} axes")
    return (*before, *_dots(count), *after)


@dataclass(frozen=True)
class Pair:
    """A product of two factors.

    Attributes:
        swapped: the second factor stands on the left.
        alone: for the left and the right factor, the letters that nobody else has or wants: summed before.
        batch: kept and in both.
        rows: kept and in the left alone.
        columns: kept and in the right alone.
        summed: in both, and wanted no more.
    """

    swapped: bool
    alone: tuple[Letters, Letters]
    batch: Letters
    rows: Letters
    columns: Letters
    summed: Letters

    @property
    def orders(self) -> tuple[Letters, Letters]:
        """The letters of each factor in the order that the product needs."""
        return (*self.batch, *self.rows, *self.summed), (*self.batch, *self.summed, *self.columns)

    @property
    def loose(self) -> Letters:
        """Rows that MatMul takes as a batch of the left factor, which the right one need not have."""
        return () if self.batch else self.rows[:-1]

    @property
    def joined(self) -> Letters:
        """The other rows, which become one axis."""
        return self.rows[len(self.loose) :]

    @property
    def groups(self) -> tuple[tuple[Letters, Letters], tuple[Letters, Letters]]:
        """What becomes one axis each, behind the batch: of the left factor, and of the right."""
        return (self.joined, self.summed), (self.summed, self.columns)

    @property
    def result(self) -> Letters:
        """The letters of the product."""
        return (*self.batch, *self.rows, *self.columns)


def pair(first: Letters, second: Letters, wanted: Collection[str], order: Letters) -> Pair:
    """Plan the product of two factors: the one with more axes of its own stands on the left, unless there is a batch.

    Args:
        first: the letters of one.
        second: and of the other.
        wanted: letters that the result or a later factor has.
        order: those of the result, in which the letters of one kind are put.
    """

    def ordered(letters: Sequence[str]) -> Letters:
        return tuple(sorted(letters, key=lambda one: (one not in order, order.index(one) if one in order else 0)))

    both = [one for one in first if one in second]
    batch = ordered([one for one in both if one in wanted])
    own = [[one for one in letters if one not in both and one in wanted] for letters in (first, second)]
    alone = [tuple(one for one in letters if one not in both and one not in wanted) for letters in (first, second)]
    swapped = not batch and len(own[0]) < len(own[1])
    if swapped:
        own, alone = own[::-1], alone[::-1]
    summed = tuple(one for one in both if one not in wanted)
    return Pair(swapped, (alone[0], alone[1]), batch, ordered(own[0]), ordered(own[1]), summed)


def shape_of(copied: Letters, groups: Sequence[Letters], sizes: Mapping[str, int | None]) -> list[int]:
    """Return the target of a Reshape that copies the first axes and makes one axis of each group.

    Raises:
        UnfitError: more than one of its sizes is not known.
    """
    shape = [0] * len(copied)
    for group in groups:
        known = [size for letter in group if (size := sizes[letter]) is not None]
        shape.append(math.prod(known) if len(known) == len(group) else -1)
    if shape.count(-1) > 1:
        raise UnfitError("several sizes are not known: fix the shape of the input (--shape)")
    return shape
