"""What is installed: every pass and target with its options, as the listings show it."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

from qgraph import registry, spec
from qgraph.errors import UserError

__all__ = ["Entry", "Option", "catalog", "entry"]


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a pass or target: its name, its type in words, its default as text ('required' if none)."""

    name: str
    type: str
    default: str
    help: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A pass or target.

    Attributes:
        name: as the command line calls it.
        summary: one line.
        text: what it does, in full.
        options: with types and defaults.
        home: `module:Class` that implements it.
        facts: what else is known of a target: extra, opset, whether it needs calibration data, its fixed passes.
        fault: why it cannot be loaded, or ''; the rest is empty then.
    """

    name: str
    summary: str = ""
    text: str = ""
    options: tuple[Option, ...] = ()
    home: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    fault: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)


def catalog(kind: registry.Kind) -> list[Entry]:
    """Return every registered pass or target by name; one that cannot be loaded is listed with its fault."""
    return [_entry_or_fault(kind, name) for name in registry.names(kind)]


def _entry_or_fault(kind: registry.Kind, name: str) -> Entry:
    try:
        return entry(kind, name)
    except UserError as error:
        return Entry(name, fault=str(error))
    except Exception as error:  # noqa: BLE001 - a broken plug-in must not hide the others
        return Entry(name, fault=f"{type(error).__name__}: {error}")


def entry(kind: registry.Kind, name: str) -> Entry:
    """Return one pass or target.

    Raises:
        UserError: there is none of that name, or it cannot be loaded.
    """
    cls = registry.find(kind, name)
    text = inspect.getdoc(cls) or ""
    summary = getattr(cls, "summary", "") if kind == "target" else text.partition("\n")[0]
    return Entry(
        name=name,
        summary=summary,
        text="\n\n".join(part for part in (text, _module_text(cls)) if part),
        options=tuple(Option(option, *facts) for option, facts in spec.defaults(cls).items()),
        home=f"{cls.__module__}:{cls.__qualname__}",
        facts=_target_facts(cls) if kind == "target" else {},
    )


def _module_text(cls: type) -> str:
    """Return the module's docstring, which tells of the pass, unless the module holds several passes."""
    module = sys.modules[cls.__module__]
    homed = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == cls.__module__]
    named = [thing for thing in homed if isinstance(thing, type) and isinstance(getattr(thing, "name", None), str)]
    return inspect.getdoc(module) or "" if named == [cls] else ""


def _target_facts(cls: Any) -> dict[str, Any]:
    target = cls()
    return {
        "extra": target.extra,
        "opset": target.opset,
        "needs_calibration": target.needs_calibration,
        "prepare": target.prepare_passes().describe(),
        "lower": target.lower_passes().describe(),
    }
