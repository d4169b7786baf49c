"""Pieces of C text: types, literals, identifiers, offsets and constant arrays.

An *atom* is an expression that needs no parentheses wherever it is put: a name, a literal, an element of an array.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

__all__ = [
    "C_TYPES",
    "Names",
    "array_text",
    "comment",
    "grouped",
    "identifier",
    "literal",
    "narrowest",
    "offset",
    "plus",
    "strides_of",
    "temporary_type",
    "times",
]

C_TYPES = {
    **{np.dtype(f"{sign}int{bits}"): f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    np.dtype(bool): "uint8_t",
}
_NARROW = [np.dtype(name) for name in ("int8", "uint8", "int16", "uint16", "int32", "int64")]
_WIDE = {np.dtype(name) for name in ("int64", "uint32", "uint64")}
_KEYWORDS = {
    *("auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum", "extern"),
    *("float", "for", "goto", "if", "inline", "int", "long", "main", "register", "restrict", "return", "short"),
    *("signed", "sizeof", "static", "struct", "switch", "typedef", "union", "unsigned", "void", "volatile", "while"),
}
_PER_LINE = 20


def temporary_type(dtype: np.dtype) -> str:
    """Return the type in which values of `dtype` are computed: what C promotes to."""
    return C_TYPES[dtype] if dtype in _WIDE else "int32_t"


def literal(number: int, dtype: np.dtype) -> str:
    """Return an atom for an integer of a type."""
    number = int(number)
    if dtype == np.int64:
        text = "INT64_MIN" if number == np.iinfo(np.int64).min else f"INT64_C({number})"
    elif dtype.kind == "u" and dtype in _WIDE:
        text = f"UINT{8 * dtype.itemsize}_C({number})"
    elif number == np.iinfo(np.int32).min:
        text = "INT32_MIN"
    else:
        text = f"({number})" if number < 0 else str(number)
    return text


def identifier(text: str) -> str:
    """Return `text` as a C identifier in lower case; not unique."""
    cleaned = re.sub(r"[^0-9A-Za-z]+", "_", text).strip("_").lower() or "value"
    return f"_{cleaned}"[0 if cleaned[0].isdigit() or cleaned in _KEYWORDS else 1 :]


def comment(text: str) -> str:
    """Return text that can stand in a comment."""
    ascii_only = text.encode("ascii", "backslashreplace").decode("ascii")
    return ascii_only.replace("*/", "* /").replace("/*", "/ *").replace("\n", " ")


class Names:
    """Identifiers that are all different."""

    def __init__(self, taken: Sequence[str] = ()) -> None:
        self._taken = set(taken)

    def unique(self, base: str) -> str:
        """Return `base`, or `base` with the first number that makes it new."""
        name, number = base, 1
        while name in self._taken:
            name, number = f"{base}_{number}", number + 1
        self._taken.add(name)
        return name


def grouped(expression: str) -> str:
    """Return an expression in parentheses, unless it is a name or a number."""
    return expression if re.fullmatch(r"[0-9A-Za-z_]+", expression) else f"({expression})"


def times(expression: str, factor: int) -> str:
    """Return a product, "" for zero."""
    if factor == 0 or expression == "0":
        return ""
    if expression.isdigit():
        return str(int(expression) * factor)
    if factor == 1:
        return expression
    return f"{grouped(expression)} * {factor}"


def plus(expression: str, number: int) -> str:
    """Return a sum with a constant."""
    if expression.isdigit() and int(expression) + number >= 0:
        return str(int(expression) + number)
    if number == 0:
        return expression
    return f"{expression} {'+' if number > 0 else '-'} {abs(number)}"


def strides_of(shape: Sequence[int]) -> list[int]:
    """Return the row-major strides of a shape, in elements."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def offset(index: Sequence[str], shape: Sequence[int]) -> str:
    """Return the row-major offset of an element."""
    terms = [times(one, stride) for one, stride in zip(index, strides_of(shape), strict=True)]
    return " + ".join(term for term in terms if term) or "0"


def narrowest(array: np.ndarray) -> np.dtype:
    """Return the smallest integer type that holds all elements."""
    if array.size == 0 or array.dtype == bool:
        return np.dtype(np.uint8)
    low, high = int(array.min()), int(array.max())
    fits = (dtype for dtype in _NARROW if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max)
    return next(fits, np.dtype(np.uint64))


def array_text(name: str, array: np.ndarray) -> str:
    """Return the definition of a constant array; its type is that of `array`."""
    dtype = array.dtype
    numbers = array.reshape(-1).tolist()
    texts = [literal(number, dtype) for number in numbers] if dtype.itemsize > 2 else [str(n) for n in numbers]
    per_line = _PER_LINE * 2 // dtype.itemsize if dtype.itemsize > 2 else _PER_LINE
    lines = [", ".join(texts[at : at + per_line]) for at in range(0, len(texts), per_line)]
    body = ",\n    ".join(lines)
    return f"static const {C_TYPES[dtype]} {name}[{max(array.size, 1)}] = {{\n    {body or '0'}\n}};\n"
