"""Targets as text: `name{option=value}`, as a pass is written, and back for the manifest.

A target is a frozen dataclass whose fields are its options, so that one artifact of a family is told from another by
them: the processor that it is for, the code that it writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from qgraph import registry, spec
from qgraph.errors import UserError
from qgraph.targets.base import Target

__all__ = ["options_of", "read_target", "refuse_untunable", "target_of", "with_option"]


def read_target(text: str) -> Target:
    """Make the target that `name` or `name{option=value,...}` says.

    Raises:
        UserError: there is no such target or option, or the text names several.
    """
    specs = spec.parse_specs(text)
    if len(specs) != 1:
        raise UserError(f"one target is wanted, and '{text}' names {len(specs)}")
    target: Target = spec.build(registry.find("target", specs[0].name), specs[0])
    return target.emitting(target.emits)


def with_option(target: Target, option: str, value: spec.Value, flag: str) -> Target:
    """Return the target with one option set, as the command line's own `flag` for it does.

    Raises:
        UserError: it has no such option, not of such a value, or another one already.
    """
    if option not in spec.defaults(type(target)):
        raise UserError(f"{flag} is for the targets {_those(lambda one: _has(one, option))}, not for {target.name}")
    given = spec.to_spec(target).options
    options = {**given, option: value}
    changed: Target = spec.build(type(target), spec.Spec(target.name, options))
    if option in given and changed != target:
        raise UserError(f"{flag} says {option}={value}, and the target {option}={given[option]}: leave one of them out")
    return changed


def refuse_untunable(target: Target) -> None:
    """Raise a UserError for a target that times nothing, naming those that do."""
    if not _tunes(type(target)):
        raise UserError(f"--tune is for the targets {_those(_tunes)}, not for {target.name}")


def _tunes(cls: type[Target]) -> bool:
    return cls.tune is not Target.tune or _has(cls, "trials")


def _has(cls: type[Target], option: str) -> bool:
    return option in spec.defaults(cls)


def _those(fits: Callable[[type[Target]], bool]) -> str:
    """Return the names of the targets that can be loaded here and of which `fits` says so."""
    found = []
    for name in registry.names("target"):
        with contextlib.suppress(UserError):
            if fits(registry.find("target", name)):
                found.append(name)
    return ", ".join(found)


def options_of(target: Target) -> dict[str, Any]:
    """Return the options that differ from their defaults, as JSON values; what code it emits is told elsewhere."""
    found = {name: value for name, value in spec.to_spec(target).options.items() if name != "emit"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def target_of(manifest: Mapping[str, Any]) -> Target:
    """Make the target that an artifact was compiled for.

    Raises:
        UserError: there is no such target here, or it lacks an option of the manifest.
    """
    name = str(manifest["target"])
    options = manifest.get("target_options", {})
    if not isinstance(options, dict):
        raise UserError("the artifact's manifest.json is damaged: 'target_options' is no object")
    target: Target = spec.build(registry.find("target", name), spec.Spec(name, options))
    return target
