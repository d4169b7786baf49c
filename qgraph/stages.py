"""The stages of a compilation, and what they find out for the manifest and the report.

load -> prepare -> (compress, lower: qgraph.building) -> verify -> bench -> publish
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph
import qgraph.ir
from qgraph.analysis.index_limits import index_limits
from qgraph.analysis.sliced_session import SlicedSession
from qgraph.artifact import write_manifest
from qgraph.building import Built
from qgraph.manifest import sha256
from qgraph.pipeline import Context, Feeds, Pipeline, Report, Samples, Skipped
from qgraph.plan import Plan, recipe_text
from qgraph.report.data import ReportData
from qgraph.report.html import render
from qgraph.report.ladder import Rung
from qgraph.report.layers import KEPT_SOURCE, LayerFacts, few, look_inside
from qgraph.report.units import bytes_text, count_text
from qgraph.runtime.benchmark import Benchmark, compare
from qgraph.runtime.placement import Placement
from qgraph.runtime.recorded import Recorded
from qgraph.runtime.serving import session_facts
from qgraph.runtime.session import input_signature, open_session, random_feeds
from qgraph.runtime.user_metric import UserMetric
from qgraph.runtime.verification import Verification, refuse_unmeasurable
from qgraph.runtime.verification import verify as verify_sessions
from qgraph.runtime.watched_source import WatchedSource
from qgraph.samples import open_samples, signature, split
from qgraph.sharing import Line, Sharing
from qgraph.target_options import options_of
from qgraph.targets.base import Kernels, Session, Target

__all__ = ["RANDOM_SAMPLES", "Bounds", "Data", "Event", "Run", "bytes_of", "source_facts", "told"]

HELD_BACK = 0.2
RANDOM_SAMPLES = 4
BENCH_SECONDS = 0.4
BENCH_FEEDS = 4
_WHOLE = 2
"""A model with weights of more than this part of the memory for calibration is compared in slices..."""
_SLICE = 16
"""... of this part of it."""
_RECORDED = 4
"""The source's outputs are kept up to this part of that memory."""
_WATCHED = 8
"""The source's inner tensors are kept for the report up to this part of that memory."""
_NOISE = 1.05
"""How many times longer than its budget a result may take: timings repeat within a few per cent."""

_MOST_NODES = 5000
"""Layers of larger graphs are not compared for the report: a node costs about a millisecond."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A stage of the compilation has ended: its name, what it did in one line, and how long it took."""

    stage: str
    text: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Data:
    """Where samples come from, and how to read them.

    Attributes:
        source: a .npz file, a folder of .npz files or of images, a text file, `module:callable`, or feeds.
        rename: array name -> input name.
        preprocess: name of an image preset.
        tokenizer: a tokenizer.json or `bytes`, for text.
        window: tokens to a sample of text; without it, a line is a sample unless the model keeps a cache.
        labels: name of the array that holds class labels.
    """

    source: str | Path | Iterable[Feeds]
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    preprocess: str | None = None
    tokenizer: str | Path | None = None
    labels: str | None = None
    window: int | None = None

    @classmethod
    def of(cls, data: Data | str | Path | Iterable[Feeds]) -> Data:
        """Wrap a bare source."""
        return data if isinstance(data, Data) else cls(data)

    def open(self, inputs: Any) -> Any:
        """Open the samples for a model whose inputs are `inputs`, and check that they fit.

        Raises:
            UserError: the source cannot be read, is empty, or does not fit the inputs.
        """
        return open_samples(
            self.source,
            inputs,
            preprocess=self.preprocess,
            tokenizer=Path(self.tokenizer) if self.tokenizer is not None else None,
            rename=self.rename,
            window=self.window,
        )


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the user wants.

    Attributes:
        tolerance: metric -> bound, as in `qgraph.runtime.tolerances.METRICS`.
        budget: `size` -> bytes, `latency` -> share of the source's.
    """

    tolerance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tolerance or self.budget)

    def over_budget(self, size: int, speedup: float | None, *, noise: float = 1.0) -> list[str]:
        """Return which budgets a result breaks, one line each.

        Args:
            size: bytes of its files.
            speedup: of the source's latency over its own; None where it cannot be timed.
            noise: how many times longer than the budget says it may take, since timings do not repeat.
        """
        failures = []
        if "size" in self.budget and size > self.budget["size"]:
            failures.append(f"{bytes_text(size)} are more than the budget of {bytes_text(int(self.budget['size']))}")
        if "latency" in self.budget and speedup is None:
            failures.append("latency cannot be measured here, so its budget proves nothing")
        elif "latency" in self.budget and speedup is not None and 1 / speedup > noise * self.budget["latency"]:
            failures.append(f"it takes {1 / speedup:.2f} of the source's time, more than {self.budget['latency']:g}x")
        return failures


def bytes_of(folder: Path) -> int:
    """Return the bytes of the deployable files in a folder that holds nothing else."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A source and its data, as every compilation of it begins with.

    Attributes:
        model: with fixed shapes; is not to be changed.
        calibration: samples for the passes, or None.
        given: see `Run`.
        held_back: see `Run`.
        data_kind: what the verification samples are, in words.
        labels: of the verification samples, or None.
        facts: see `source_facts`.
        limits: see `index_limits`.
        weight_bytes: of all weights.
    """

    model: ir.Model
    calibration: Samples | None
    given: Samples | None
    held_back: Samples | None
    data_kind: str
    labels: np.ndarray | None
    facts: Mapping[str, Any]
    limits: dict[str, int]
    weight_bytes: int


@dataclasses.dataclass(frozen=True)
class _Runs:
    """What is known of how a result runs; each as the target's method of that name gives it."""

    kernels: Kernels | None
    placement: Placement | None
    footprint: Mapping[str, Any] | None
    runtime: Mapping[str, Any] | None


class Run:
    """One compilation.

    Attributes:
        context: what the passes share; has the calibration samples once `load` is done.
        line: takes the model through the passes.
        before: the source's session, once it was opened.
        sliced: whether it runs in slices, for its size.
        given: samples to verify on, or None for random ones.
        held_back: samples of the calibration data that the passes do not see, or None.
    """

    def __init__(
        self,
        target: Target,
        context: Context,
        observer: Callable[[Event], None],
        source: Path | None,
        sharing: Sharing | None = None,
    ) -> None:
        self.target = target
        self.sharing = sharing
        self.context = context
        self.observer = observer
        self.source_name = source.name if source is not None else "model.onnx"
        self.given: Samples | None = None
        self.held_back: Samples | None = None
        self.labels: np.ndarray | None = None
        self.data_kind = "random inputs"
        self.source_facts: dict[str, Any] = {}
        self.started = self.mark = time.perf_counter()
        self.bench: Benchmark | None = None
        self.prepared: Report = Report()
        self.limits: dict[str, int] = {}
        self.source_weight_bytes = 0
        self.shapes: Mapping[str, Sequence[int]] = {}
        self.before: Any = None
        self.source: Path | None = None
        self.sliced = False
        self.samples: Samples = ()
        self.metric: UserMetric | None = None
        self.line = Line(ir.Model(ir.Graph((), (), nodes=()), ir_version=10), context)
        self._root = ""

    def event(self, stage: str, text: str) -> None:
        """Tell the observer that a stage has ended."""
        now = time.perf_counter()
        self.observer(Event(stage, text, now - self.mark))
        self.mark = now

    def load(
        self,
        source: Path,
        shapes: Mapping[str, Sequence[int]],
        calibration: Data | str | Path | Iterable[Feeds] | None,
        verify_data: Data | str | Path | Iterable[Feeds] | None,
    ) -> None:
        """Load the model and open the data; of a source that was loaded before, nothing is read again."""
        read = functools.partial(self._read, source, shapes, calibration, verify_data)
        if self.sharing is None:
            loaded: _Loaded = read()
        else:
            data = (self.sharing.token(calibration), self.sharing.token(verify_data))
            loaded = self.sharing.once(("load", source, _fixed(shapes), data, self.context.seed), read)
        self.shapes, self.limits, self.source_facts = shapes, loaded.limits, dict(loaded.facts)
        self.given, self.held_back = loaded.given, loaded.held_back
        self.data_kind, self.labels = loaded.data_kind, loaded.labels
        self.source_weight_bytes = loaded.weight_bytes
        self.context = dataclasses.replace(self.context, calibration=loaded.calibration, _analyses={})
        if self.sharing is None:
            self.line = Line(loaded.model, self.context)
        else:
            self._root = self.sharing.root(loaded.facts, shapes, self.context)
            self.line = Line(loaded.model.clone(), self.context, self.sharing, self._root)
            self.context = self.line.context
        self.event("load", _loaded(self.source_facts, self.line.model))

    def _read(
        self,
        source: Path,
        shapes: Mapping[str, Sequence[int]],
        calibration: Data | str | Path | Iterable[Feeds] | None,
        verify_data: Data | str | Path | Iterable[Feeds] | None,
    ) -> _Loaded:
        model = qgraph.ir.load(source)
        for name, dims in shapes.items():
            qgraph.ir.set_input_shape(model, name, dims)
        inputs = signature(model)
        calibrating, given, held_back, labels = self.context.calibration, None, None, None
        kind = self.data_kind
        if calibration is not None:
            data = Data.of(calibration)
            opened = data.open(inputs)
            calibrating, given = split(opened, HELD_BACK, self.context.seed)
            held_back = given if len(opened) > 1 else None
            kind = "held-back samples" if len(opened) > 1 else "calibration sample, none held back"
            labels = given.labels(data.labels)
        if verify_data is not None:
            data = Data.of(verify_data)
            given, kind = data.open(inputs), "samples of the verification data"
            labels = given.labels(data.labels)
        facts = source_facts(self.source_name, source, model)
        limits, weights = index_limits(model), qgraph.ir.weight_bytes(model)
        return _Loaded(model, calibrating, given, held_back, kind, labels, facts, limits, weights)

    def prepare(self, pipeline: Pipeline) -> None:
        """Clean up what exporters write."""
        self.prepared = self.line.run(pipeline)
        self.event("prepare", told(self.prepared))

    def open_source(self, source: Path) -> None:
        """Open the source, whole or, where it has too many weights for that, in slices."""
        self.source = source
        room = self.context.calibration_memory
        if self.source_weight_bytes <= room // _WHOLE:
            self.before, self.samples = self._opened(source)
            return
        model = qgraph.ir.load(source)
        self.samples = self._verification_samples(SlicedSession(model, (), self.context, room=room // _SLICE))
        self.before = SlicedSession(model, self.samples, self.context, room=room // _SLICE)
        self.sliced = True

    def _opened(self, source: Path) -> tuple[Any, Samples]:
        """Return the source's session and the samples; where compilations share them, its outputs are recorded."""

        def open_it() -> tuple[Any, Samples]:
            session = open_session(source, threads=self.context.threads)
            samples = self._verification_samples(session)
            if self.sharing is None:
                return session, samples
            recorded = Recorded(session, len(samples), self.context.calibration_memory // _RECORDED)
            return self.sharing.recorded(self._root, samples, recorded), samples

        if self.sharing is None:
            return open_it()
        key = ("source", source, self.sharing.token(self.given), self._root)
        found: tuple[Any, Samples] = self.sharing.once(key, open_it)
        return found

    def record_source(self) -> None:
        """Keep the source's outputs from its next run on, so that it runs once however many results are compared."""
        if not isinstance(self.before, Recorded):
            self.before = Recorded(self.before, len(self.samples), self.context.calibration_memory // _RECORDED)

    def refuse_unmeasurable(self, tolerance: Mapping[str, float]) -> None:
        """Raise a UserError for a bound on a metric that the source's outputs do not have."""
        bounds = {metric: bound for metric, bound in tolerance.items() if not metric.startswith("eval")}
        if bounds and not self.sliced:
            feeds = next(iter(self.samples))
            refuse_unmeasurable(bounds, self.before, feeds, labelled=self.labels is not None)

    def open_result(self, folder: Path) -> Session:
        """Open a result's files, in slices where both it and the source have too many weights."""
        room = self.context.calibration_memory
        result = folder / "model.onnx"
        if self.sliced and result.is_file():
            model = qgraph.ir.load(result)
            if qgraph.ir.weight_bytes(model) > room // _WHOLE:
                return SlicedSession(model, self.samples, self.context, room=room // _SLICE)
        return self.target.session(folder, threads=self.context.threads)

    def _verification_samples(self, session: Any) -> Samples:
        if self.given is not None:
            return self.given
        inputs = input_signature(session)
        return random_feeds(inputs, self.context.seed, self.shapes, count=RANDOM_SAMPLES, limits=self.limits)

    def verify(self, folder: Path, *, quiet: bool = False) -> tuple[Session, Verification]:
        """Run source and result on the verification samples."""
        after = self.open_result(folder)
        verification = verify_sessions(
            self.before, after, self.samples, labels=self.labels, progress=None if quiet else self.context.progress
        )
        if self.sharing is not None and isinstance(self.before, Recorded):
            self.sharing.keep_outputs(self._root, self.samples, self.before)
        if self.metric is not None:
            figures = self.metric.source(self.before), self.metric(after)
            verification = dataclasses.replace(verification, eval_before=figures[0], eval_after=figures[1])
        return after, verification

    def time(self, sessions: Mapping[str, Session], *, seconds: float = BENCH_SECONDS) -> Benchmark | None:
        """Time sessions beside the source; None where that says nothing of the target."""
        if self.sliced or self.target.stand_in():
            return None
        feeds = [feeds for _, feeds in zip(range(BENCH_FEEDS), self.samples, strict=False)]
        source = self.before.session if isinstance(self.before, Recorded) else self.before
        return compare({"before": source, **sessions}, feeds, seconds=seconds, threads=self.context.threads)

    def finish(
        self, folder: Path, plan: Plan, built: Built, bounds: Bounds, tested: tuple[Session, Verification] | None = None
    ) -> dict[str, Any]:
        """Verify the result, time it beside the source, write recipe and manifest, and return the manifest.

        Args:
            folder: holds the deployable files, and nothing else.
            plan: all three parts.
            built: what was done.
            bounds: what the user wants.
            tested: what `verify` gave, where that was done.
        """
        after, verification = tested if tested is not None else self.verify(folder)
        stand_in = self.target.stand_in()
        where = f"   on {stand_in}" if stand_in else ""
        where += "   in slices, for its size; not timed" if self.sliced else ""
        agreement = verification.agreement_told() if "top1" in bounds.tolerance else ""
        self.event("verify", f"{verification.samples} {self.data_kind}   {verification.summary()}{agreement}{where}")
        whole = not isinstance(after, SlicedSession)
        kernels = self.target.kernels(folder) if whole else None
        placement = self.target.placement(folder) if whole else None
        self.bench = self.time({"after": after})
        speedup = None if self.bench is None else self.bench.ratio("before", "after")
        failures = verification.meets(bounds.tolerance)
        failures += bounds.over_budget(bytes_of(folder), speedup, noise=_NOISE)
        (folder / "recipe.toml").write_text(recipe_text(self.target, plan), encoding="utf-8")
        footprint = self.target.footprint(folder)
        if footprint is not None and "library" in footprint:
            self.event("library", str(footprint["library"]))
        runtime = self.target.runtime(folder)
        if runtime is not None and runtime.get("told"):
            self.event("placement", str(runtime["told"]))
        runs = _Runs(kernels, placement, footprint, runtime)
        manifest = write_manifest(folder, self._facts(plan, built, runs, verification, bounds, failures))
        if speedup is not None:
            self.event("bench", f"{speedup:.2f}x the speed of the source")
        return manifest

    def _facts(
        self,
        plan: Plan,
        built: Built,
        runs: _Runs,
        verification: Verification,
        bounds: Bounds,
        failures: Sequence[str],
    ) -> dict[str, Any]:
        reports = {"prepare": self.prepared, "compress": built.compress, "lower": built.lower}
        left = [*built.compress.skipped, *built.lower.skipped]
        options = options_of(self.target)
        return {
            "qgraph": qgraph.__version__,
            "source": self.source_facts,
            "target": self.target.name,
            **({"target_options": options} if options else {}),
            "pipeline": {
                "prepare": _text(plan.prepare),
                "compress": _text(plan.compress),
                "lower": _text(plan.lower),
            },
            "seed": self.context.seed,
            "versions": _versions(),
            "inputs": [
                dataclasses.asdict(dataclasses.replace(one, shape=list(self.shapes.get(one.name, one.shape))))
                for one in input_signature(self.before)
            ],
            "outputs": [output.to_json()["name"] for output in verification.outputs],
            "passes": [
                {"part": part, "name": one.name, "changed": one.changed, "notes": list(one.notes)}
                for part, report in reports.items()
                for one in report.parts
            ],
            "skipped": [{"node": node, "reason": reason} for node, reason in _unique(left)],
            "weights": built.weights,
            "kernels": None if runs.kernels is None else _kernels_json(runs.kernels),
            **({} if runs.placement is None else {"placement": runs.placement.summary()}),
            **({} if runs.footprint is None else {"footprint": runs.footprint}),
            **({} if runs.runtime is None else {"runtime": runs.runtime}),
            **({"shapes": {name: list(sizes) for name, sizes in self.shapes.items()}} if self.shapes else {}),
            **({"emit": list(self.target.emits)} if self.target.emits else {}),
            **session_facts(self.target.providers(), self.target.disabled),
            "stand_in": self.target.stand_in(),
            "verification": {"data": self.data_kind, **verification.to_json()},
            "tolerance": dict(bounds.tolerance),
            **({"budget": dict(bounds.budget)} if bounds.budget else {}),
            "failures": list(failures),
            "verified": not failures,
        }

    def publish(self, stage: Path, manifest: Mapping[str, Any], built: Built, rungs: Sequence[Rung] = ()) -> None:
        """Write the files that hold timings."""
        bench = None if self.bench is None else self.bench.to_json()
        if bench is not None:
            bench = {**bench, "search": [rung.to_json() for rung in rungs]} if rungs else bench
            _write_json(stage / "bench.json", bench)
        reports = {"prepare": self.prepared, "compress": built.compress, "lower": built.lower}
        layers = self._look_inside(stage, built.nodes)
        seconds = time.perf_counter() - self.started
        recipe = stage / "recipe.toml"
        data = ReportData.build(manifest, bench, reports, seconds=seconds, recipe=recipe, layers=layers, search=rungs)
        (stage / "report.html").write_text(render(data), encoding="utf-8")

    def _look_inside(self, stage: Path, nodes: int) -> LayerFacts:
        """Compare the tensors inside on a few samples, for the report."""
        source = self.context.reference or self.source
        if source is None or not (stage / "model.onnx").is_file():
            return LayerFacts(remark="Not taken: the target deploys no ONNX model.")
        if self.sliced or nodes > _MOST_NODES:
            why = "the model is compared in slices, for its size" if self.sliced else f"{nodes:,} nodes take long"
            return LayerFacts(remark=f"Not taken: {why}. `qgraph diff MODEL ARTIFACT --calib DATA` takes it.")
        seconds = self.bench["before"].seconds if self.bench is not None else None
        watched = self._watched(source, few(self.samples, seconds))
        facts = look_inside(
            watched, stage, watched.samples, threads=self.context.threads, progress=self.context.progress
        )
        if facts.tensors:
            self.event("layers", facts.told())
        return facts

    def _watched(self, source: Path | ir.Model, samples: Sequence[Feeds]) -> WatchedSource:
        """Return the source's side of comparing tensors; it serves for all targets that have the same source."""
        keep = min(KEPT_SOURCE, self.context.calibration_memory // _WATCHED)
        watched = WatchedSource(source, samples, threads=self.context.threads, keep=keep)
        return watched if self.sharing is None else self.sharing.watched(watched)


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


def source_facts(name: str, source: Path, model: ir.Model) -> dict[str, Any]:
    """Return name, bytes and hash of a model as loaded from `source`.

    With external data, the bytes are those of all files, and the hash is that of the files' hashes.
    """
    files = [source, *qgraph.ir.data_files(model)]
    hashes = [sha256(path) for path in files]
    digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return {"name": name, "bytes": sum(path.stat().st_size for path in files), "sha256": digest}


def _fixed(shapes: Mapping[str, Sequence[int]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((name, tuple(sizes)) for name, sizes in shapes.items()))


def _text(pipeline: Pipeline | None) -> str:
    return "" if pipeline is None else pipeline.describe()


def _loaded(facts: Mapping[str, Any], model: ir.Model) -> str:
    parameters = sum(
        value.const_value.size
        for graph in qgraph.ir.all_graphs(model)
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    opset = model.graph.opset_imports.get("", "?")
    return (
        f"{facts['name']}   {count_text(parameters)} parameters, {qgraph.ir.count_nodes(model)} nodes, opset {opset}, "
        f"{bytes_text(facts['bytes'])}"
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (
        "numpy",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "onnxruntime",
        "onnxruntime-gpu",
        "apache-tvm",
        "coremltools",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _unique(skipped: Iterable[Skipped]) -> list[Skipped]:
    return list(dict.fromkeys(skipped))


def _kernels_json(kernels: Kernels) -> dict[str, Any]:
    return {
        "integer": dict(sorted(kernels.integer.items())),
        "float": dict(sorted(kernels.floating.items())),
        "low_bit": dict(sorted(kernels.low_bit.items())),
        "other": dict(sorted(kernels.other.items())),
        "left_in_float": [{"node": node, "reason": reason} for node, reason in kernels.left_in_float],
    }


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
