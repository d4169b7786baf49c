"""Finding passes and targets by name, through the entry points of the installed distributions.

qgraph's own passes and targets are registered the same way as anybody else's: a distribution declares

    [project.entry-points."qgraph.passes"]
    my-pass = "my_package.my_module:MyPass"

and the name works on the command line and in recipes. The groups are `qgraph.passes` and `qgraph.targets`.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any, Literal

from qgraph.errors import UserError, nearest

__all__ = ["find", "names"]

Kind = Literal["pass", "target"]
_GROUPS: dict[Kind, str] = {"pass": "qgraph.passes", "target": "qgraph.targets"}


@functools.cache
def _entries(kind: Kind) -> dict[str, importlib.metadata.EntryPoint]:
    entries: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group=_GROUPS[kind]):
        other = entries.get(entry.name)
        if other is not None and other.value != entry.value:
            raise UserError(
                f"two installed packages register the {kind} '{entry.name}': {other.value} and {entry.value}. "
                "Uninstall one of them."
            )
        entries[entry.name] = entry
    return entries


def names(kind: Kind) -> list[str]:
    """Return the names of every registered pass or target, sorted."""
    return sorted(_entries(kind))


def find(kind: Kind, name: str) -> Any:
    """Return the class registered under `name`.

    Raises:
        UserError: there is none (the nearest name is suggested), or the package that registers it fails to import.
    """
    entries = _entries(kind)
    if name not in entries:
        raise UserError(
            f"there is no {kind} '{name}'.{nearest(name, entries)} `qgraph {kind}es` lists them."
            if kind == "pass"
            else f"there is no target '{name}'.{nearest(name, entries)} `qgraph targets` lists them."
        )
    try:
        return entries[name].load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"{kind} '{name}' ({entries[name].value}) cannot be loaded: {error}") from error
