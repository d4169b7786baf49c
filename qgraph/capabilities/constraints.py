"""What a kernel asks of a node beyond data types, in words.

constant I                  input I is an initializer or the output of a Constant
absent I, present I         input I is left out, is there
rank I in 4                 the number of dimensions of input I; also `3..5`, or `2, 4`
scalar I                    input I has one element
static                      every input and output has a shape of known numbers
static I                    input I has
attribute NAME in V, V      an attribute, or its default; `none` where it has neither. Integers may be `1..4`,
                            the elements of a list are joined by spaces: `attribute axes in 0 1`
outputs N                   no output behind the first N is there
multiple I AXIS N           the size of input I along AXIS (negative: from the end) is a multiple of N
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

__all__ = ["ABSENT", "Constraint", "parse_constraint"]

ABSENT = "none"
"""The value of an attribute that is not set and has no default."""

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


@dataclasses.dataclass(frozen=True)
class Constraint:
    """One constraint.

    Attributes:
        word: its first word.
        text: as it was written.
        input: index of the input that it is about, or None.
        attribute: name of the attribute that it is about, or ''.
        values: what is allowed, as text; a range of integers is two of them.
        axis: of `multiple`.
        factor: of `multiple`; of `outputs`, how many there may be.
    """

    word: str
    text: str
    input: int | None = None
    attribute: str = ""
    values: tuple[str | tuple[int, int], ...] = ()
    axis: int = 0
    factor: int = 1

    def allows(self, value: str) -> bool:
        """Tell whether a value, as text, is among those allowed."""
        for allowed in self.values:
            if allowed == value:
                return True
            if isinstance(allowed, tuple) and re.fullmatch(r"-?\d+", value):
                low, high = allowed
                if low <= int(value) <= high:
                    return True
        return False

    def choices(self) -> str:
        """Return what is allowed, for a reader."""
        return ", ".join(one if isinstance(one, str) else f"{one[0]} to {one[1]}" for one in self.values)


def parse_constraint(text: str) -> Constraint:
    """Read a constraint.

    Raises:
        ValueError: it is none; says what is wrong with it.
    """
    word, _, rest = text.strip().partition(" ")
    if word not in _WORDS:
        raise ValueError(f"'{text}' is no constraint: it begins with none of {', '.join(_WORDS)}")
    try:
        return _WORDS[word](word, text, rest.strip())
    except ValueError:
        raise ValueError(f"'{text}' should read '{_FORMS[word]}'") from None


def _about_input(word: str, text: str, rest: str) -> Constraint:
    return Constraint(word, text, input=_index(rest))


def _static(word: str, text: str, rest: str) -> Constraint:
    return Constraint(word, text, input=_index(rest) if rest else None)


def _rank(word: str, text: str, rest: str) -> Constraint:
    index, values = _halves(rest)
    allowed = _values(values)
    if not all(isinstance(one, tuple) or one.isdigit() for one in allowed):
        raise ValueError(rest)
    return Constraint(word, text, input=_index(index), values=allowed)


def _attribute(word: str, text: str, rest: str) -> Constraint:
    name, values = _halves(rest)
    if not name.isidentifier():
        raise ValueError(rest)
    return Constraint(word, text, attribute=name, values=_values(values))


def _outputs(word: str, text: str, rest: str) -> Constraint:
    return Constraint(word, text, factor=_index(rest))


def _multiple(word: str, text: str, rest: str) -> Constraint:
    index, axis, factor = rest.split()
    if int(factor) < 1:
        raise ValueError(rest)
    return Constraint(word, text, input=_index(index), axis=int(axis), factor=int(factor))


def _index(text: str) -> int:
    if not text.isdigit():
        raise ValueError(text)
    return int(text)


def _halves(text: str) -> Sequence[str]:
    halves = text.split(" in ")
    if len(halves) != 2:
        raise ValueError(text)
    return [half.strip() for half in halves]


def _values(text: str) -> tuple[str | tuple[int, int], ...]:
    values: list[str | tuple[int, int]] = []
    for part in text.split(","):
        one = part.strip()
        if not one:
            raise ValueError(text)
        match = _RANGE.fullmatch(one)
        values.append((int(match[1]), int(match[2])) if match else one)
    return tuple(values)


_WORDS: dict[str, Callable[[str, str, str], Constraint]] = {
    "constant": _about_input,
    "absent": _about_input,
    "present": _about_input,
    "scalar": _about_input,
    "outputs": _outputs,
    "static": _static,
    "rank": _rank,
    "attribute": _attribute,
    "multiple": _multiple,
}
_FORMS = {
    "constant": "constant I",
    "absent": "absent I",
    "present": "present I",
    "scalar": "scalar I",
    "outputs": "outputs N",
    "static": "static' or 'static I",
    "rank": "rank I in A..B",
    "attribute": "attribute NAME in V, V",
    "multiple": "multiple I AXIS N",
}
