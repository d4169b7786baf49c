"""What `qgraph build` reads: one model, its data, and the targets that it is compiled for.

    model = "minilm.onnx"                           # paths are relative to this file
    calibration = "sentences.txt"                   # or a table, as below
    tolerance = { sqnr = 20 }                       # holds for every target that names none of its own

    [calibration]
    data = "sentences.txt"
    tokenizer = "tokenizer.json"                    # preprocess, window, labels and map likewise, as for --calib

    [[targets]]
    target = "cpu-int8{cpu=avx2}"
    set = ["smooth-quant.alpha=0.6"]

    [targets.small]                                 # or by name: its folder; `target` is the name where it is left out
    target = "cpu-int4"
    passes = "gptq{bits=2,group=32}"

    targets = ["cpu-fp32", "cpu-int8"]              # or just this

A recipe of one target, such as every artifact holds, is one too: `target` with [[prepare]], [[pass]] and [[lower]].
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qgraph import spec
from qgraph.errors import UserError, nearest
from qgraph.loading import Data
from qgraph.pipeline import Pipeline
from qgraph.plan import PARTS, Plan, parse_settings
from qgraph.runtime.tolerances import parse_budget, parse_tolerance
from qgraph.target_options import read_target
from qgraph.targets.base import Target

__all__ = ["BuildRecipe", "TargetRecipe", "read_recipe"]

_TARGET_KEYS = ("name", "target", "passes", "recipe", "prepare", "pass", "lower", "set", "tolerance", "budget", "emit")
_KEYS = (
    "model", "output", "calibration", "calib", "verify_data", "shapes", "seed", "eval", "targets", "target", "passes",
    "prepare", "pass", "lower", "set", "tolerance", "budget", "emit",
)  # fmt: skip
_INHERITED = ("passes", "prepare", "pass", "lower", "set", "tolerance", "budget", "emit")
_DATA_KEYS = ("data", "map", "preprocess", "tokenizer", "window", "labels")
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_FOLDER = re.compile(r"\w[\w.+-]*")
_TAKEN = ("index.json", "index.html")


@dataclasses.dataclass(frozen=True)
class TargetRecipe:
    """One of the targets.

    Attributes:
        name: of its folder.
        target: with its options.
        passes: what replaces the compress part, or None.
        plan: parts of the pipeline that are taken as they are, or None.
        settings: "pass.option=value" texts.
        tolerance: metric -> bound.
        budget: see `qgraph.compile`.
    """

    name: str
    target: Target
    passes: Pipeline | None = None
    plan: Plan | None = None
    settings: tuple[str, ...] = ()
    tolerance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """The target with its options, as the command line takes it."""
        return spec.format_specs([spec.to_spec(self.target)])


@dataclasses.dataclass(frozen=True)
class BuildRecipe:
    """A model, its data and its targets.

    Attributes:
        targets: at least one, of different names.
        model: None leaves it to the caller.
        output: the folder of the build; None leaves it to the caller.
        calibration: see `qgraph.compile`.
        verify_data: see `qgraph.compile`.
        shapes: input -> dimensions.
        seed: None leaves it to the caller.
        evaluation: module:function, or None.
    """

    targets: tuple[TargetRecipe, ...]
    model: Path | None = None
    output: Path | None = None
    calibration: Data | None = None
    verify_data: Data | None = None
    shapes: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    evaluation: str | None = None


def read_recipe(recipe: str | Path | Mapping[str, Any]) -> BuildRecipe:
    """Read a recipe.

    Args:
        recipe: a TOML file, or what one holds, with paths relative to the working folder.

    Raises:
        UserError: it cannot be read, or a key or value is none that there is; the nearest is named.
    """
    if isinstance(recipe, Mapping):
        return _read(recipe, Path())
    if not isinstance(recipe, str | os.PathLike):
        raise UserError(f"a recipe is a TOML file, or a table of what one holds, not {_shown(recipe)}")
    path = Path(recipe)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"the recipe {path} is not valid TOML: {error}") from None
    return _read(document, path.parent)


def _read(document: Mapping[str, Any], folder: Path) -> BuildRecipe:
    found = _known(document, _KEYS, "the recipe")
    if "calib" in found and "calibration" in found:
        raise UserError("the recipe gives both calib and calibration: they mean the same")
    model, output = _text(found, "model", "the recipe"), _text(found, "output", "the recipe")
    seed = found.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise UserError(f"the recipe's seed is {seed!r}, but must be a whole number from 0")
    return BuildRecipe(
        targets=_targets(found, folder),
        model=None if model is None else folder / model,
        output=None if output is None else folder / output,
        calibration=_data(found.get("calibration", found.get("calib")), folder, "calibration"),
        verify_data=_data(found.get("verify_data"), folder, "verify_data"),
        shapes=_shapes(found.get("shapes", {})),
        seed=seed,
        evaluation=_text(found, "eval", "the recipe"),
    )


def _known(table: object, keys: Sequence[str], where: str) -> dict[str, Any]:
    """Return the table with its keys written as here.

    Raises:
        UserError: it is no table, or has a key that there is not.
    """
    if not isinstance(table, Mapping):
        raise UserError(f"{where} must be a table, not {_shown(table)}")
    found = {str(key).replace("-", "_"): value for key, value in table.items()}
    for key in found:
        if key not in keys:
            raise UserError(f"{where} has an unknown key '{key}'.{nearest(key, keys)} There are: {', '.join(keys)}.")
    return found


def _shown(value: object) -> str:
    return f"'{value}'" if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _text(table: Mapping[str, Any], key: str, where: str) -> str | None:
    value = table.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise UserError(f"{where}: '{key}' must be text, not {_shown(value)}")
    return value


def _texts(table: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = table.get(key, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(one, str) for one in values):
        raise UserError(f"{where}: '{key}' must be a list of texts, not {_shown(value)}")
    return tuple(values)


def _data(value: object, folder: Path, key: str) -> Data | None:
    if value is None:
        return None
    where = f"the recipe's {key}"
    table = _known({"data": value} if isinstance(value, str) else value, _DATA_KEYS, where)
    source, tokenizer = _text(table, "data", where), _text(table, "tokenizer", where)
    window, rename = table.get("window"), table.get("map", {})
    if source is None:
        raise UserError(f'{where} names no data: write data = "FILE"')
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise UserError(f"{where}: window is {_shown(window)}, but must be a whole number from 1")
    if not isinstance(rename, Mapping) or not all(isinstance(one, str) for one in rename.values()):
        raise UserError(f'{where}: map must be a table such as {{ array = "input" }}')
    return Data(
        source if _CALLABLE.fullmatch(source) and not (folder / source).exists() else str(folder / source),
        dict(rename),
        _text(table, "preprocess", where),
        tokenizer if tokenizer in (None, "bytes") else folder / tokenizer,
        _text(table, "labels", where),
        window,
    )


def _shapes(value: object) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, Mapping):
        raise UserError("the recipe's shapes must be a table such as { image = [1, 3, 224, 224] }")
    for name, sizes in value.items():
        whole = isinstance(sizes, list) and all(isinstance(one, int) and one > 0 for one in sizes)
        if not whole or any(isinstance(one, bool) for one in sizes):
            raise UserError(f"the recipe's shape of '{name}' must be a list of sizes such as [1, 3, 224, 224]")
    return {str(name): tuple(sizes) for name, sizes in value.items()}


def _targets(found: Mapping[str, Any], folder: Path) -> tuple[TargetRecipe, ...]:
    if "target" in found and "targets" in found:
        raise UserError("the recipe gives both target and targets: a single one is a target too, put it into the list")
    given = found.get("targets", [{"target": found["target"]}] if "target" in found else None)
    if given is None:
        raise UserError('the recipe names no targets: write targets = ["cpu-int8", ...] or [[targets]] tables')
    if isinstance(given, Mapping):
        tables = [({"name": name, **_known(one, _TARGET_KEYS, f"[targets.{name}]")}) for name, one in given.items()]
    elif isinstance(given, list):
        tables = [
            {"target": one} if isinstance(one, str) else _known(one, _TARGET_KEYS, f"[[targets]] number {number}")
            for number, one in enumerate(given, start=1)
        ]
    else:
        raise UserError(f"the recipe's targets must be a list or tables, not {_shown(given)}")
    defaults = {key: found[key] for key in _INHERITED if key in found}
    targets = tuple(_target(_inheriting(defaults, one), folder) for one in tables)
    if not targets:
        raise UserError("the recipe names no targets: the list is empty")
    for number, one in enumerate(targets):
        if one.name.lower() in {other.name.lower() for other in targets[:number]}:  # some disks tell no case
            raise UserError(f"two targets of the recipe are called '{one.name}': give one of them another name")
    return targets


def _inheriting(defaults: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a target's table with what the recipe says for all; passes of its own take the place of all of those."""
    pipeline = ("passes", "recipe", "prepare", "pass", "lower")
    own = any(key in table for key in pipeline)
    return {**{key: value for key, value in defaults.items() if not (own and key in pipeline)}, **table}


def _target(table: Mapping[str, Any], folder: Path) -> TargetRecipe:
    text = _text(table, "target", "a target of the recipe") or _text(table, "name", "a target of the recipe")
    if text is None:
        raise UserError('a target of the recipe has no target = "NAME"')
    where = f"the target '{table.get('name', text)}'"
    target, emit = read_target(text), _texts(table, "emit", where)
    name = _text(table, "name", where) or re.sub(r"[^\w.+-]+", "-", text).strip("-")
    if not _FOLDER.fullmatch(name) or name.lower() in _TAKEN:
        raise UserError(f"{where} cannot be the name of a folder: use letters, digits and . + - _ in its name")
    passes, plan = _pipeline(table, folder, where)
    settings = _texts(table, "set", where)
    parse_settings(settings)
    return TargetRecipe(
        name=name,
        target=target.emitting(emit) if emit else target,
        passes=passes,
        plan=plan,
        settings=settings,
        tolerance=dict(map(parse_tolerance, _bounds(table, "tolerance", where))),
        budget=dict(map(parse_budget, _bounds(table, "budget", where))),
    )


def _pipeline(table: Mapping[str, Any], folder: Path, where: str) -> tuple[Pipeline | None, Plan | None]:
    passes, recipe = _text(table, "passes", where), _text(table, "recipe", where)
    parts = {key: table[key] for key in PARTS if key in table}
    if sum((passes is not None, recipe is not None, bool(parts))) > 1:
        raise UserError(f"{where}: give one of passes, recipe, and the tables prepare, pass and lower")
    if recipe is not None:
        return None, Plan.of(None, folder / recipe)
    if parts:
        return None, Plan.from_tables(parts)
    return None if passes is None else Pipeline.parse(passes), None


def _bounds(table: Mapping[str, Any], key: str, where: str) -> list[str]:
    """Return bounds as the command line takes them, from a table or from such texts."""
    value = table.get(key, {})
    if not isinstance(value, Mapping | str | list):
        raise UserError(f"{where}: '{key}' must be a table or a list of texts, not {_shown(value)}")
    if not isinstance(value, Mapping):
        return list(_texts(table, key, where))
    return [f"{metric}={bound}" for metric, bound in value.items()]
