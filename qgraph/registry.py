"""Finding passes and targets by name, through the entry points of the installed distributions.

qgraph's own passes and targets are registered the same way as anybody else's: a distribution declares

    [project.entry-points."qgraph.passes"]
    my-pass = "my_package.my_module:MyPass"

and the name works on the command line and in recipes. The groups are `qgraph.passes` and `qgraph.targets`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from typing import Any, Literal

from qgraph.errors import UserError, nearest

__all__ = ["find", "names"]

Kind = Literal["pass", "target"]
_PLURALS: dict[Kind, str] = {"pass": "passes", "target": "targets"}


@functools.cache
def _entries(kind: Kind) -> dict[str, importlib.metadata.EntryPoint]:
    entries: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group=f"qgraph.{_PLURALS[kind]}"):
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


@functools.cache
def find(kind: Kind, name: str) -> Any:
    """Return the class registered under `name`.

    Raises:
        UserError: there is none (the nearest name is suggested), or what is registered cannot be loaded or is no
            dataclass of that name.
    """
    entries = _entries(kind)
    if name not in entries:
        raise UserError(f"there is no {kind} '{name}'.{nearest(name, entries)} `qgraph {_PLURALS[kind]}` lists them.")
    where = f"the {kind} '{name}' of the installed package '{_distribution(entries[name])}' ({entries[name].value})"
    try:
        cls = entries[name].load()
    except Exception as error:
        raise UserError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and getattr(cls, "name", None) == name):
        raise UserError(f"{where} is not a dataclass with name = '{name}'")
    return cls


def _distribution(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "?"
