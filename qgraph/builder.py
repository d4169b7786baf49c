"""build(): one model compiled for many targets, what they have in common once.

    DIR/index.json      the targets in the order of the recipe: status, reason, figures and hashes
    DIR/index.html      the same for people, with links to the reports
    DIR/NAME/           an artifact, the same to the byte as `qgraph compile` makes it

A target that refuses the model, or breaks, does not stop the others. The folder appears whole, when all have ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import qgraph
import qgraph.ir
from qgraph.artifact import INDEX, INDEX_PAGE, Artifact, refuse_existing, staging
from qgraph.build_recipe import BuildRecipe, TargetRecipe, read_recipe
from qgraph.build_workers import run_ahead
from qgraph.cache import Cache
from qgraph.comparison import contender
from qgraph.compiler import compile as compile_model
from qgraph.errors import ToleranceError, UserError, is_disk_full
from qgraph.loading import Data
from qgraph.manifest import MANIFEST, sha256
from qgraph.pipeline import Context
from qgraph.report.build_page import Row, render
from qgraph.report.data import deployable_bytes
from qgraph.report.side_by_side import SideBySide
from qgraph.sharing import Sharing
from qgraph.stages import Event
from qgraph.work_folder import work_folder

__all__ = ["Build", "Entry", "build", "default_output"]

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of a target.

    Attributes:
        name: of its folder.
        target: with its options.
        status: "built"; "outside" its tolerance or budget, or with nothing that could be compared; "refused", where the
            model, the data or an option does not suit it; "failed", by a fault of qgraph's.
        reason: one line; '' where it is built.
        artifact: None where it was refused or failed.
    """

    name: str
    target: str
    status: str
    reason: str = ""
    artifact: Artifact | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what the index holds of it."""
        facts: dict[str, Any] = {"name": self.name, "target": self.target, "status": self.status, "reason": self.reason}
        if self.artifact is None:
            return {**facts, "folder": None}
        manifest = self.artifact.manifest
        return {
            **facts,
            "folder": self.name,
            "manifest": sha256(self.artifact.path / MANIFEST),
            "verified": self.artifact.verified,
            "bytes": deployable_bytes(manifest),
            "stand_in": manifest["stand_in"],
            "verification": manifest["verification"],
            "files": manifest["files"],
        }


@dataclasses.dataclass(frozen=True)
class Build:
    """One model compiled for several targets.

    Attributes:
        path: the folder.
        source: name, bytes and hash of the model, and how one gets to it from the folder.
        entries: in the order of the recipe.
    """

    path: Path
    source: Mapping[str, Any]
    entries: tuple[Entry, ...]

    def __getitem__(self, name: str) -> Artifact:
        """Return the artifact of a target by name.

        Raises:
            UserError: the build has no such target, or it was not built; the message says why.
        """
        entry = next((one for one in self.entries if one.name == name), None)
        if entry is None:
            raise UserError(f"{self.path} has no target '{name}': it has {', '.join(one.name for one in self.entries)}")
        if entry.artifact is None:
            raise UserError(f"{self.path} has no artifact for {name}, which was {entry.status}: {entry.reason}")
        return entry.artifact

    def count(self, status: str) -> int:
        """Return the number of targets of a status."""
        return sum(one.status == status for one in self.entries)

    def to_json(self) -> dict[str, Any]:
        """Return what the index holds."""
        targets = [one.to_json() for one in self.entries]
        return {"format": FORMAT, "qgraph": qgraph.__version__, "source": dict(self.source), "targets": targets}

    def rows(self) -> tuple[list[Row], SideBySide]:
        """Return what the table and the page show."""
        made = [one.artifact for one in self.entries if one.artifact is not None]
        contenders = tuple(contender(one, one.path.name, None) for one in made)
        source = self.source
        found = SideBySide(str(source["name"]), int(source["bytes"]), str(source["sha256"]), contenders)
        return [self._row(one, made) for one in self.entries], found

    @staticmethod
    def _row(entry: Entry, made: Sequence[Artifact]) -> Row:
        place = None if entry.artifact is None else made.index(entry.artifact)
        stand_in = "" if entry.artifact is None else str(entry.artifact.manifest["stand_in"])
        return Row(entry.name, entry.target, entry.status, entry.reason, place, stand_in)


def default_output(recipe: str | Path) -> Path:
    """Return RECIPE.build beside the recipe."""
    path = Path(recipe)
    return path.with_name(f"{path.name.removesuffix('.toml')}.build")


def build(
    recipe: str | Path | Mapping[str, Any] | BuildRecipe,
    *,
    output: str | Path | None = None,
    model: str | Path | None = None,
    calibration: Any = None,
    verify_data: Any = None,
    cache: str | Path | Cache | None = None,
    workers: int = 1,
    context: Context | None = None,
    force: bool = False,
    observer: Callable[[Event], None] | None = None,
    on_target: Callable[[TargetRecipe, int, int], None] | None = None,
) -> Build:
    """Compile a model for many targets and write their artifacts, with an index, into one folder.

    Args:
        recipe: a file, what one holds, or what `qgraph.build_recipe.read_recipe` gives.
        output: the folder; that of the recipe, else RECIPE.build beside it.
        model: an ONNX file, instead of the recipe's.
        calibration: samples in any form that `compile` takes, instead of the recipe's.
        verify_data: like it.
        cache: a folder where models behind long passes are kept, for other builds and compilations.
        workers: processes that run passes of several targets at once; what is verified and timed is so afterwards, one
            after the other. Each needs as much memory as a compilation, and the room on disk is that of a few models.
        context: seed, threads, memory bound and progress; the recipe's seed counts where it gives one.
        force: replace a build that stands at `output`.
        observer: called when a stage of a target ends.
        on_target: called before each target with its number and how many there are.

    Raises:
        UserError: the recipe, the model or the data is at fault, or no target could be built; nothing is left behind.
    """
    wanted = recipe if isinstance(recipe, BuildRecipe) else read_recipe(recipe)
    source = Path(model) if model is not None else wanted.model
    if source is None:
        raise UserError('the recipe names no model: write model = "FILE.onnx", or give it with --model')
    folder = _output(recipe, output, wanted)
    refuse_existing(folder, force=force, source=source)
    qgraph.ir.load(source)  # what is wrong with it is no target's refusal
    context = context or Context()
    if wanted.seed is not None:
        context = dataclasses.replace(context, seed=wanted.seed, _analyses={})
    opened = Cache(cache) if isinstance(cache, str | Path) else cache
    asked = dataclasses.replace(
        wanted,
        calibration=wanted.calibration if calibration is None else Data.of(calibration),
        verify_data=wanted.verify_data if verify_data is None else Data.of(verify_data),
    )
    with (
        contextlib.ExitStack() as scratch,
        staging(folder, force=force) as stage,
        work_folder(folder, resume=False, resumable=False) as work,
    ):
        context = dataclasses.replace(context, work_folder=context.work_folder or work, _analyses={})
        if workers > 1 and len(asked.targets) > 1:
            opened = opened or Cache(scratch.enter_context(tempfile.TemporaryDirectory(prefix="qgraph-")))
            run_ahead(source, asked, context, opened, workers=workers, observer=observer)
        shop = _Shop(source, asked, context, Sharing(opened), observer)
        entries = []
        for number, target in enumerate(wanted.targets, start=1):
            if on_target is not None:
                on_target(target, number, len(wanted.targets))
            entries.append(shop.make(target, stage / target.name))
        made = _finished(stage, entries, _way(source, folder))
    return dataclasses.replace(made, path=folder, entries=tuple(_moved(one, folder) for one in made.entries))


def _output(recipe: object, output: str | Path | None, wanted: BuildRecipe) -> Path:
    if output is not None:
        return Path(output)
    if wanted.output is not None:
        return wanted.output
    if not isinstance(recipe, str | Path):
        raise UserError("a recipe that is no file has no name: pass output=FOLDER")
    return default_output(recipe)


@dataclasses.dataclass(frozen=True)
class _Shop:
    """Makes the artifacts, one after the other."""

    source: Path
    recipe: BuildRecipe
    context: Context
    sharing: Sharing
    observer: Callable[[Event], None] | None

    def make(self, one: TargetRecipe, folder: Path) -> Entry:
        """Compile for one target; what goes wrong is its entry's reason."""
        try:
            artifact = compile_model(
                self.source,
                one.target,
                output=folder,
                calibration=self.recipe.calibration,
                verify_data=self.recipe.verify_data,
                passes=one.passes,
                recipe=one.plan,
                settings=one.settings,
                tolerance=one.tolerance,
                budget=one.budget,
                evaluation=self.recipe.evaluation if _is_measured(one) else None,
                shapes=self.recipe.shapes,
                context=self.context,
                sharing=self.sharing,
                observer=self.observer,
            )
        except ToleranceError as error:
            return Entry(one.name, one.text, "outside", "; ".join(error.result.manifest["failures"]), error.result)
        except MemoryError:
            raise
        except Exception as error:
            if is_disk_full(error):  # which is no target's fault, and the others would fare no better
                raise UserError(
                    f"the disk is full: there was no room left while {one.name} was made "
                    f"({_line(error, folder)}). Free some room and run again, or build elsewhere with -o."
                ) from error
            if isinstance(error, UserError):
                return Entry(one.name, one.text, "refused", _line(error, folder))
            return Entry(one.name, one.text, "failed", f"{type(error).__name__}: {_line(error, folder)}")
        return Entry(one.name, one.text, "built", artifact=artifact)


def _is_measured(one: TargetRecipe) -> bool:
    return any(metric.startswith("eval") for metric in one.tolerance) or not one.tolerance


def _line(error: Exception, folder: Path) -> str:
    return " ".join(str(error).replace(str(folder), folder.name).split())


def _way(source: Path, folder: Path) -> str:
    """Return how one gets from the build to its model: relative, so that both can be moved together."""
    try:
        return Path(os.path.relpath(source.resolve(), folder.resolve())).as_posix()
    except ValueError:  # on another drive
        return source.resolve().as_posix()


def _finished(stage: Path, entries: Sequence[Entry], way: str) -> Build:
    """Write the index.

    Args:
        stage: the folder of the build.
        entries: in the order of the recipe.
        way: from the build to the model.

    Raises:
        UserError: no target has an artifact.
    """
    first = next((one.artifact for one in entries if one.artifact is not None), None)
    if first is None:
        reasons = list(dict.fromkeys(one.reason for one in entries))
        if len(reasons) == 1:
            raise UserError(reasons[0])
        told = "; ".join(f"{one.name}: {one.reason}" for one in entries)
        raise UserError(f"none of the {len(entries)} targets can be built. {told}")
    made = Build(stage, {**first.manifest["source"], "path": way}, tuple(entries))
    text = json.dumps(made.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (stage / INDEX).write_text(text + "\n", encoding="utf-8")
    (stage / INDEX_PAGE).write_text(render(*made.rows()), encoding="utf-8")
    return made


def _moved(entry: Entry, folder: Path) -> Entry:
    if entry.artifact is None:
        return entry
    return dataclasses.replace(entry, artifact=dataclasses.replace(entry.artifact, path=folder / entry.name))
