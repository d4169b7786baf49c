"""What a user wishes of the three parts of a pipeline (prepare, compress, lower), and recipes, which hold that."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qgraph import registry, spec
from qgraph.errors import UserError
from qgraph.pipeline import Pipeline, specs_from_tables
from qgraph.targets.base import Target

__all__ = ["PARTS", "Override", "Plan", "override", "parse_settings", "recipe_text", "refuse_unused"]

Override = tuple[str, str, spec.Value]
"""Pass, option, value."""
PARTS = ("prepare", "pass", "lower")
"""What a recipe calls the parts; `pass` is the compress part."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the user wishes of the three parts of a pipeline; None leaves a part to the target."""

    prepare: Pipeline | None = None
    compress: Pipeline | None = None
    lower: Pipeline | None = None

    @classmethod
    def of(cls, passes: str | Pipeline | None, recipe: str | Path | Plan | None) -> Plan:
        """Read what `compile` is given.

        Raises:
            UserError: both are given, or one of them is at fault.
        """
        if passes is not None and recipe is not None:
            raise UserError("pass either passes or a recipe, not both: a recipe holds the passes")
        if isinstance(recipe, Plan):
            return recipe
        if recipe is not None:
            try:
                return cls.from_recipe(Path(recipe).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                told = getattr(error, "strerror", None) or error
                raise UserError(f"the recipe {recipe} cannot be read: {told}") from None
        if passes is None:
            return cls()
        return cls(compress=Pipeline.parse(passes) if isinstance(passes, str) else passes)

    @classmethod
    def from_recipe(cls, text: str) -> Plan:
        """Read a recipe: [[prepare]], [[pass]] and [[lower]] tables, each optional; [[pass]] is the compress part.

        Raises:
            UserError: it is not TOML, or has other content.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"the recipe is not valid TOML: {error}") from None
        unknown = sorted(set(document) - {*PARTS, "target"})
        if unknown:
            hint = " (a recipe of several targets is for `qgraph build`)" if "targets" in document else ""
            raise UserError(
                f"the recipe has an unknown key '{unknown[0]}'; it may have prepare, pass, lower and target{hint}"
            )
        return cls.from_tables(document)

    @classmethod
    def from_tables(cls, document: Mapping[str, Any]) -> Plan:
        """Read the parts among what a recipe holds.

        Raises:
            UserError: one is no array of tables, or names a pass or an option that there is not.
        """
        parts = {
            name: Pipeline.from_specs(specs_from_tables(document[name], name)) if name in document else None
            for name in PARTS
        }
        return cls(parts["prepare"], parts["pass"], parts["lower"])


def recipe_text(target: Target, plan: Plan) -> str:
    """Write the plan as a recipe, or say in a comment why it cannot be repeated from text."""
    text = spec.format_specs([spec.to_spec(target)])
    lines = [f"target = {json.dumps(text)}\n"]
    for table, pipeline in (("prepare", plan.prepare), ("pass", plan.compress), ("lower", plan.lower)):
        if pipeline is None:
            continue
        try:
            lines.append(pipeline.to_toml(table) if len(pipeline) else f"{table} = []\n")
        except UserError as error:
            lines.append(f"# [[{table}]] is incomplete: {error}\n")
    lines.sort(key=lambda block: "[[" in block)
    return "\n".join(lines)


def parse_settings(settings: Sequence[str]) -> list[Override]:
    """Parse "pass.option=value" texts, and refuse unknown passes and options before any work is done."""
    parsed = [spec.parse_setting(text) for text in settings]
    for name, option, _ in parsed:
        spec.require_option(registry.find("pass", name), name, option)
    return parsed


def override(pipeline: Pipeline, overrides: Sequence[Override]) -> Pipeline:
    """Return the pipeline with the options that `overrides` set."""
    return Pipeline(_overridden(one, overrides) for one in pipeline)


def _overridden(one: Any, overrides: Sequence[Override]) -> Any:
    changes = {option: value for name, option, value in overrides if name == one.name}
    if not changes:
        return one
    return spec.build(type(one), spec.Spec(one.name, {**spec.to_spec(one).options, **changes}))


def refuse_unused(overrides: Sequence[Override], parts: Sequence[Pipeline]) -> None:
    """Raise a UserError for an override of a pass that is in none of `parts`."""
    present = sorted({one.name for part in parts for one in part})
    for name, option, _ in overrides:
        if name not in present:
            raise UserError(f"--set {name}.{option}: the pipeline has no pass '{name}'. It has: {', '.join(present)}.")
