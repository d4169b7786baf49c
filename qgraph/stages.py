"""The stages of a compilation.

load -> prepare -> (compress, lower: qgraph.building) -> verify -> bench -> publish
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qgraph.analysis.sliced_session import SlicedSession
from qgraph.artifact import write_manifest
from qgraph.bounds import Bounds, bytes_of
from qgraph.building import Built
from qgraph.loading import Data, Loaded, load
from qgraph.manifest_facts import Outcome
from qgraph.pipeline import Context, Feeds, Pipeline, Report
from qgraph.plan import Plan, recipe_text
from qgraph.proof import Proof
from qgraph.report.data import ReportData
from qgraph.report.html import render
from qgraph.report.ladder import Rung
from qgraph.report.layers import KEPT_SOURCE, LayerFacts, few, look_inside
from qgraph.runtime.benchmark import Benchmark
from qgraph.runtime.figures import Verification
from qgraph.runtime.session import input_signature
from qgraph.runtime.user_metric import UserMetric
from qgraph.runtime.watched_source import WatchedSource
from qgraph.sharing import Line, Sharing
from qgraph.targets.base import Session, Target

__all__ = ["Event", "Run", "ignore", "told"]

_NOISE = 1.05
"""How many times longer than its budget a result may take: timings repeat within a few per cent."""
_WATCHED = 8
"""The source's inner tensors are kept for the report up to this part of the memory for calibration."""
_MOST_NODES = 5000
"""Layers of larger graphs are not compared for the report: a node costs about a millisecond."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A stage of the compilation has ended: its name, what it did in one line, and how long it took."""

    stage: str
    text: str
    seconds: float


def ignore(event: object) -> None:
    """Observe nothing."""
    del event


class Run:
    """One compilation.

    Attributes:
        loaded: the source and its data.
        context: what the passes share, with the calibration samples.
        line: takes the model through the passes.
        proof: of the results; the source is opened when it is first asked for.

    Args:
        target: for which the model is compiled.
        context: seed, threads, memory bound, progress, and samples where `calibration` is None.
        source: an ONNX file.
        shapes: input -> dimensions, to fix dynamic axes.
        calibration: samples for the passes, of which a share is held back for verification.
        verify_data: samples to verify on instead of those.
        metric: the user's own, or None.
        sharing: what compilations of the same model share, of which nothing is read again; None shares nothing.
        observer: called when a stage ends.

    Raises:
        UserError: the model, a shape or the data is at fault.
    """

    def __init__(
        self,
        target: Target,
        context: Context,
        source: Path,
        *,
        shapes: Mapping[str, Sequence[int]],
        calibration: Data | str | Path | Iterable[Feeds] | None,
        verify_data: Data | str | Path | Iterable[Feeds] | None,
        metric: UserMetric | None = None,
        sharing: Sharing | None = None,
        observer: Callable[[Event], None] = ignore,
    ) -> None:
        self.target = target
        self._observer = observer
        self._started = self._mark = time.perf_counter()
        self._metric = metric
        self._sharing = sharing
        self._root = ""
        self._bench: Benchmark | None = None
        self._prepared = Report()
        read = functools.partial(
            load, source, shapes, calibration, verify_data, otherwise=context.calibration, seed=context.seed
        )
        if sharing is None:
            self.loaded: Loaded = read()
        else:
            data = (sharing.token(calibration), sharing.token(verify_data))
            self.loaded = sharing.once(("load", source, _fixed(shapes), data, context.seed), read)
        self.context = dataclasses.replace(context, calibration=self.loaded.calibration, _analyses={})
        if sharing is None:
            self.line = Line(self.loaded.model, self.context)
        else:
            self._root = sharing.root(self.loaded.facts, shapes, self.context)
            self.line = Line(self.loaded.model.clone(), self.context, sharing, self._root)
            self.context = self.line.context
        self.event("load", self.loaded.told())

    @functools.cached_property
    def proof(self) -> Proof:
        """The source, opened, and what its results are compared with it on."""
        return Proof(self.loaded, self.target, self.context, self._metric, self._sharing, self._root)

    def event(self, stage: str, text: str) -> None:
        """Tell the observer that a stage has ended."""
        now = time.perf_counter()
        self._observer(Event(stage, text, now - self._mark))
        self._mark = now

    def prepare(self, pipeline: Pipeline) -> None:
        """Clean up what exporters write."""
        self._prepared = self.line.run(pipeline)
        self.event("prepare", told(self._prepared))

    def finish(
        self, folder: Path, plan: Plan, built: Built, bounds: Bounds, tested: tuple[Session, Verification] | None = None
    ) -> dict[str, Any]:
        """Verify the result, time it beside the source, write recipe and manifest, and return the manifest.

        Args:
            folder: holds the deployable files, and nothing else.
            plan: all three parts.
            built: what was done.
            bounds: what the user wants.
            tested: what `Proof.verify` gave, where that was done.
        """
        after, verification = tested if tested is not None else self.proof.verify(folder)
        self.event("verify", self._verified(verification, bounds))
        self._bench = self.proof.time({"after": after})
        speedup = None if self._bench is None else self._bench.ratio("before", "after")
        failures = verification.meets(bounds.tolerance)
        failures += bounds.over_budget(bytes_of(folder), speedup, noise=_NOISE)
        (folder / "recipe.toml").write_text(recipe_text(self.target, plan), encoding="utf-8")
        runs = self.target.runs(folder, whole=not isinstance(after, SlicedSession))
        if runs.footprint is not None and "library" in runs.footprint:
            self.event("library", str(runs.footprint["library"]))
        if runs.told:
            self.event("placement", runs.told)
        outcome = Outcome(
            loaded=self.loaded,
            target=self.target,
            seed=self.context.seed,
            inputs=input_signature(self.proof.before),
            plan=plan,
            prepared=self._prepared,
            built=built,
            runs=runs,
            verification=verification,
            bounds=bounds,
            failures=failures,
        )
        manifest = write_manifest(folder, outcome.to_json())
        if speedup is not None:
            self.event("bench", f"{speedup:.2f}x the speed of the source")
        return manifest

    def _verified(self, verification: Verification, bounds: Bounds) -> str:
        """Return one line: on what was verified, how near the result is, and where it ran."""
        stand_in = self.target.stand_in()
        where = f"   on {stand_in}" if stand_in else ""
        where += "   in slices, for its size; not timed" if self.proof.sliced else ""
        agreement = verification.agreement_told() if "top1" in bounds.tolerance else ""
        return f"{verification.samples} {self.loaded.data_kind}   {verification.summary()}{agreement}{where}"

    def publish(self, stage: Path, manifest: Mapping[str, Any], built: Built, rungs: Sequence[Rung] = ()) -> None:
        """Write the files that hold timings."""
        bench = None if self._bench is None else self._bench.to_json()
        if bench is not None:
            bench = {**bench, "search": [rung.to_json() for rung in rungs]} if rungs else bench
            _write_json(stage / "bench.json", bench)
        reports = built.reports(self._prepared)
        self.proof.release()
        layers = self._look_inside(stage, built.nodes)
        seconds = time.perf_counter() - self._started
        recipe = stage / "recipe.toml"
        data = ReportData.build(manifest, bench, reports, seconds=seconds, recipe=recipe, layers=layers, search=rungs)
        (stage / "report.html").write_text(render(data), encoding="utf-8")

    def _look_inside(self, stage: Path, nodes: int) -> LayerFacts:
        """Compare the tensors inside on a few samples, for the report."""
        if not (stage / "model.onnx").is_file():
            return LayerFacts(remark="Not taken: the target deploys no ONNX model.")
        sliced = self.proof.sliced
        if sliced or nodes > _MOST_NODES:
            why = "the model is compared in slices, for its size" if sliced else f"{nodes:,} nodes take long"
            return LayerFacts(remark=f"Not taken: {why}. `qgraph diff MODEL ARTIFACT --calib DATA` takes it.")
        seconds = self._bench["before"].seconds if self._bench is not None else None
        source = self._watched(few(self.proof.samples, seconds))
        threads, progress = self.context.threads, self.context.progress
        facts = look_inside(source, stage, source.samples, threads=threads, progress=progress)
        if facts.tensors:
            self.event("layers", facts.told())
        return facts

    def _watched(self, samples: Sequence[Feeds]) -> WatchedSource:
        """Return the source's side of comparing tensors; it serves for all targets that have the same source."""
        source = self.context.reference or self.loaded.path
        if self._sharing is None:
            return WatchedSource(source, samples, threads=self.context.threads)
        keep = min(KEPT_SOURCE, self.context.calibration_memory // _WATCHED)
        return self._sharing.watched(WatchedSource(source, samples, threads=self.context.threads, keep=keep))


def told(report: Report) -> str:
    """Return what a pass or a part did, in one line."""
    notes = list(dict.fromkeys(report.notes))
    if not report.changed and report.skipped:
        (reason, count), *_ = Counter(one.reason for one in report.skipped).most_common(1)
        example = next(one.node for one in report.skipped if one.reason == reason)
        notes.append(f"nothing changed; '{example}'{f' and {count - 1} more' if count > 1 else ''}: {reason}")
        return ", ".join(notes)
    nodes = f"{report.nodes_before} -> {report.nodes_after} nodes"
    return "   ".join([nodes, ", ".join(notes)]) if notes else nodes


def _fixed(shapes: Mapping[str, Sequence[int]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((name, tuple(sizes)) for name, sizes in shapes.items()))


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
