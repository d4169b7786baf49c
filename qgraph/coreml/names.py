"""Names that MIL takes: letters, digits and underscores, each once."""

from __future__ import annotations

import re

__all__ = ["Names"]

_FOREIGN = re.compile(r"[^A-Za-z0-9_]+")


class Names:
    """Gives out names, each once."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def fresh(self, wished: str) -> str:
        """Return `wished` as an identifier, with a number behind it if that was given out before."""
        base = _FOREIGN.sub("_", wished).strip("_") or "value"
        base = f"_{base}" if base[0].isdigit() else base
        name, number = base, self._next.get(base, 1)
        while name in self._taken:
            name, number = f"{base}_{number}", number + 1
        self._next[base] = number
        self._taken.add(name)
        return name
