"""HTML elements from Python, safe by construction: every text that is not `Markup` is escaped.

Names in models are not to be trusted: they may hold tags, quotation marks, control characters, halves of surrogate
pairs, or marks that turn the direction of writing, and may be of any length.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

__all__ = ["Child", "Markup", "clip", "element", "join", "printable"]

_LONGEST = 240
_KEPT = "\n\t\u00a0"


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | float | None
"""What an element may hold; None is nothing."""

_VOID = frozenset({"br", "meta"})
_CHILDLESS = frozenset({"circle", "line", "path", "polyline", "polygon", "rect"})


def printable(text: str) -> str:
    """Replace what is not printable, line breaks, tabs and no-break spaces apart, by its escape."""
    return "".join(
        char if char.isprintable() or char in _KEPT else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )


def clip(text: str, longest: int = _LONGEST) -> str:
    """Make `text` printable and shorten it in its middle to `longest` characters."""
    text = printable(text)
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _escape(child: Child) -> str:
    if child is None:
        return ""
    return child if isinstance(child, Markup) else html.escape(printable(str(child)), quote=True)


def element(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Return `<name attributes>children</name>`.

    Args:
        name: of the element; a literal, never data.
        children: Markup as it is, anything else escaped.
        attributes: `class_` stands for class, `_` for `-` otherwise; True writes the bare name, None and False nothing.
    """
    written = "".join(
        f" {_attribute_name(key)}" if value is True else f' {_attribute_name(key)}="{_escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    if name in _CHILDLESS and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{''.join(_escape(child) for child in children)}</{name}>")


def _attribute_name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def join(children: Iterable[Child]) -> Markup:
    """Return the children one after another, escaped where needed."""
    return Markup("".join(_escape(child) for child in children))
