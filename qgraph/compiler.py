"""compile(): a model and a target go in, a verified artifact comes out.

    load -> prepare -> calibrate, compress -> lower -> check -> write -> verify -> bench -> publish

Everything is written to a temporary folder beside the artifact and renamed at the end, so that a failure, a full disk
or Ctrl-C leaves nothing half-done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph
import qgraph.ir
from qgraph import registry, spec
from qgraph.analysis.compressed_weights import weight_facts
from qgraph.analysis.index_limits import index_limits
from qgraph.analysis.sliced_session import SlicedSession
from qgraph.artifact import Artifact, open_artifact, refuse_existing, sha256, staging, write_manifest
from qgraph.errors import ToleranceError, UserError
from qgraph.pipeline import Context, Feeds, Pipeline, Report, Samples, Skipped, specs_from_tables
from qgraph.report.data import ReportData
from qgraph.report.html import render
from qgraph.report.units import bytes_text, count_text
from qgraph.runtime.benchmark import Benchmark, compare
from qgraph.runtime.session import input_signature, open_session, random_feeds
from qgraph.runtime.verification import Verification
from qgraph.runtime.verification import verify as verify_sessions
from qgraph.samples import open_samples, signature, split
from qgraph.targets.base import Kernels, Session, Target
from qgraph.work_folder import work_folder

__all__ = ["Data", "Event", "Plan", "compile", "default_output", "verify"]

HELD_BACK = 0.2
RANDOM_SAMPLES = 4
BENCH_SECONDS = 0.4
BENCH_FEEDS = 4
_WHOLE = 2
"""A model with weights of more than this part of the memory for calibration is compared in slices..."""
_SLICE = 16
"""... of this part of it."""


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
class Plan:
    """What the user wishes of the three parts of a pipeline; None leaves a part to the target."""

    prepare: Pipeline | None = None
    compress: Pipeline | None = None
    lower: Pipeline | None = None

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
        unknown = sorted(set(document) - {"prepare", "pass", "lower", "target"})
        if unknown:
            raise UserError(
                f"the recipe has an unknown key '{unknown[0]}'; it may have prepare, pass, lower and target"
            )
        parts = {
            name: Pipeline.from_specs(specs_from_tables(document[name], name)) if name in document else None
            for name in ("prepare", "pass", "lower")
        }
        return cls(parts["prepare"], parts["pass"], parts["lower"])


def default_output(model: Path, target: str) -> Path:
    """Return MODEL.TARGET beside the model."""
    return model.parent / f"{model.name.removesuffix('.onnx')}.{target}"


def compile(  # noqa: A001 - the name that users look for
    model: str | Path | ir.Model,
    target: str | Target,
    *,
    output: str | Path | None = None,
    calibration: Data | str | Path | Iterable[Feeds] | None = None,
    verify_data: Data | str | Path | Iterable[Feeds] | None = None,
    passes: str | Pipeline | None = None,
    recipe: str | Path | None = None,
    settings: Sequence[str] = (),
    tolerance: Mapping[str, float] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    context: Context | None = None,
    force: bool = False,
    tune: bool = False,
    resume: bool = False,
    observer: Callable[[Event], None] | None = None,
) -> Artifact:
    """Compile a model for a target, verify the result against the source and write the artifact.

    Args:
        model: an ONNX file, or a model in memory (which is not changed).
        target: a target's name or instance.
        output: the artifact's folder; MODEL.TARGET beside the model by default (needed for a model in memory).
        calibration: samples for the passes that need activations; a fifth of them is held back for verification.
        verify_data: samples to verify on instead of held-back ones; with labels, accuracy is measured.
        passes: replaces the target's compress part.
        recipe: a recipe file that replaces the parts it names.
        settings: "pass.option=value" texts that override single options, in any part.
        tolerance: metric -> bound, such as {"sqnr": 30.0, "top1": 0.005}.
        shapes: input -> dimensions, to fix dynamic axes.
        context: seed, threads, memory bound and progress; calibration is filled in here.
        force: replace an artifact that stands at `output`.
        tune: let the target time candidates on this machine; the choice is in the artifact's recipe.
        resume: go on from the layers that a run which was stopped has finished, in `output` + '.work'.
        observer: called when each stage ends.

    Raises:
        UserError: the input, the data or an option is at fault; nothing is left behind.
        ToleranceError: compiled, but outside `tolerance`; the artifact is kept, marked unverified.
    """
    source_path = None if isinstance(model, ir.Model) else Path(model)
    chosen = registry.find("target", target)() if isinstance(target, str) else target
    folder = _output(output, source_path, chosen)
    refuse_existing(folder, force=force, source=source_path)
    plan = _plan(passes, recipe)
    overrides = _parse_settings(settings)
    run = _Run(chosen, context or Context(), observer or _ignore, source_path)
    with (
        staging(folder, force=force) as stage,
        _scratch_source(model, run) as source,
        work_folder(folder, resume=resume) as work,
    ):
        run.context = dataclasses.replace(run.context, work_folder=run.context.work_folder or work, _analyses={})
        built, plan = run.build(source, plan, overrides, shapes or {}, calibration, verify_data, tune=tune)
        files = _lower(chosen, built, stage)
        run.event("lower", _lowered(built, files, run.reports["lower"]))
        manifest, failures = run.prove(source, stage, plan, tolerance or {})
        run.publish(stage, manifest)
    run.event("write", f"{folder}")
    artifact = Artifact(folder, manifest)
    if failures:
        raise ToleranceError(
            f"{folder} is outside the tolerance: {'; '.join(failures)}. It is kept, marked unverified.",
            artifact,
        )
    return artifact


def _ignore(event: Event) -> None:
    del event


def _output(output: str | Path | None, source: Path | None, target: Target) -> Path:
    if output is not None:
        return Path(output)
    if source is None:
        raise UserError("a model in memory has no file name: pass output=FOLDER")
    return default_output(source, target.name)


def _plan(passes: str | Pipeline | None, recipe: str | Path | None) -> Plan:
    if passes is not None and recipe is not None:
        raise UserError("pass either passes or a recipe, not both: a recipe holds the passes")
    if recipe is not None:
        try:
            return Plan.from_recipe(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the recipe {recipe} cannot be read: {error}") from None
    if passes is None:
        return Plan()
    return Plan(compress=Pipeline.parse(passes) if isinstance(passes, str) else passes)


@contextlib.contextmanager
def _scratch_source(model: str | Path | ir.Model, run: _Run) -> Iterator[Path]:
    """Give the source as a file: the verification runs it in a session, as it was."""
    if not isinstance(model, ir.Model):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        path = Path(folder) / f"{model.graph.name or 'model'}.onnx"
        qgraph.ir.save(model, path)
        run.source_name = path.name
        yield path


def _lower(target: Target, model: ir.Model, stage: Path) -> list[str]:
    refused = target.check(model)
    if refused:
        first = "; ".join(f"'{node}': {reason}" for node, reason in refused[:3])
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(f"{target.name} cannot run this model: {first}{more}.")
    return target.lower(model, stage)


def _lowered(model: ir.Model, files: Sequence[str], report: Report) -> str:
    facts = f"{qgraph.ir.count_nodes(model)} nodes, {', '.join(files)}"
    return "   ".join([facts, ", ".join(dict.fromkeys(report.notes))]) if report.notes else facts


class _Run:
    """One compilation: the stages, and what they found out for the manifest and the report."""

    def __init__(
        self, target: Target, context: Context, observer: Callable[[Event], None], source: Path | None
    ) -> None:
        self.target = target
        self.context = context
        self.observer = observer
        self.source_name = source.name if source is not None else "model.onnx"
        self.reports: dict[str, Report] = {}
        self.samples: Samples | None = None
        self.labels: np.ndarray | None = None
        self.data_kind = "random inputs"
        self.source_facts: dict[str, Any] = {}
        self.started = self.mark = time.perf_counter()
        self.bench: Benchmark | None = None
        self.kernels: Kernels | None = None
        self.weights: dict[str, Any] | None = None
        self.limits: dict[str, int] = {}
        self.source_weight_bytes = 0
        self.shapes: Mapping[str, Sequence[int]] = {}

    def event(self, stage: str, text: str) -> None:
        now = time.perf_counter()
        self.observer(Event(stage, text, now - self.mark))
        self.mark = now

    def build(
        self,
        source: Path,
        plan: Plan,
        overrides: Sequence[tuple[str, str, spec.Value]],
        shapes: Mapping[str, Sequence[int]],
        calibration: Data | str | Path | Iterable[Feeds] | None,
        verify_data: Data | str | Path | Iterable[Feeds] | None,
        *,
        tune: bool,
    ) -> tuple[ir.Model, Plan]:
        """Load, prepare, compress and lower; return the model and the plan with all three parts filled in."""
        model = qgraph.ir.load(source)
        self.shapes = shapes
        for name, dims in shapes.items():
            qgraph.ir.set_input_shape(model, name, dims)
        self._open_data(model, calibration, verify_data)
        self.limits = index_limits(model)
        self.source_facts = _source_facts(self.source_name, source, model)
        self.source_weight_bytes = qgraph.ir.weight_bytes(model)
        self.event("load", _loaded(self.source_facts, model))

        prepare = _override(plan.prepare if plan.prepare is not None else self.target.prepare_passes(), overrides)
        self._run_part("prepare", prepare, model)

        compress = plan.compress
        if compress is None:
            compress = self.target.compress_passes(model, self.context)
            if tune:
                compress = self.target.tune(model, self.context, compress)
        compress = _override(compress, overrides)
        self._run_part("compress", compress, model)

        lower = _override(plan.lower if plan.lower is not None else self.target.lower_passes(), overrides)
        self._run_part("lower", lower, model)
        _refuse_unused(overrides, (prepare, compress, lower))
        self.weights = weight_facts(model)
        model.producer_name, model.producer_version = "qgraph", qgraph.__version__
        return model, Plan(prepare, compress, lower)

    def _open_data(
        self,
        model: ir.Model,
        calibration: Data | str | Path | Iterable[Feeds] | None,
        verify_data: Data | str | Path | Iterable[Feeds] | None,
    ) -> None:
        inputs = signature(model)
        if calibration is not None:
            data = Data.of(calibration)
            opened = data.open(inputs)
            calibrating, held_back = split(opened, HELD_BACK, self.context.seed)
            self.context = dataclasses.replace(self.context, calibration=calibrating, _analyses={})
            self.samples = held_back
            self.data_kind = "held-back samples" if len(opened) > 1 else "calibration sample, none held back"
            self.labels = held_back.labels(data.labels)
        if verify_data is not None:
            data = Data.of(verify_data)
            opened = data.open(inputs)
            self.samples, self.data_kind = opened, "samples of the verification data"
            self.labels = opened.labels(data.labels)

    def _run_part(self, part: str, pipeline: Pipeline, model: ir.Model) -> None:
        def after(report: Report) -> None:
            if part == "compress":
                self.event(report.name, _told(report))

        report = pipeline.run(model, context=self.context, after_pass=after)
        self.reports[part] = report
        if part == "prepare":
            self.event("prepare", _told(report))

    def prove(
        self, source: Path, stage: Path, plan: Plan, tolerance: Mapping[str, float]
    ) -> tuple[dict[str, Any], list[str]]:
        """Run source and result, write recipe and manifest, and return the manifest and the failed tolerances."""
        before, after, samples, sliced = self._sessions(source, stage)
        verification = verify_sessions(before, after, samples, labels=self.labels, progress=self.context.progress)
        failures = verification.meets(tolerance)
        stand_in = self.target.stand_in()
        where = f"   on {stand_in}" if stand_in else ""
        where += "   in slices, for its size; not timed" if sliced else ""
        self.event("verify", f"{verification.samples} {self.data_kind}   {verification.summary()}{where}")
        if not stand_in and not sliced:
            self.bench = _bench(before, after, samples, self.context.threads)
        (stage / "recipe.toml").write_text(_recipe(self.target, plan), encoding="utf-8")
        manifest = write_manifest(stage, self._facts(before, plan, verification, tolerance, failures))
        if self.bench is not None:
            self.event("bench", f"{self.bench.ratio('before', 'after'):.2f}x the speed of the source")
        return manifest, failures

    def _sessions(self, source: Path, stage: Path) -> tuple[Any, Session, Samples, bool]:
        """Open source and result, whole or, where one has too many weights for that, in slices."""
        room = self.context.calibration_memory
        if self.source_weight_bytes <= room // _WHOLE:
            self.kernels = self.target.kernels(stage)
            before: Any = open_session(source, threads=self.context.threads)
            after = self.target.session(stage, threads=self.context.threads)
            return before, after, self._verification_samples(before), False
        model = qgraph.ir.load(source)
        whole = SlicedSession(model, (), self.context, room=room // _SLICE)
        samples = self._verification_samples(whole)
        before = SlicedSession(model, samples, self.context, room=room // _SLICE)
        result = qgraph.ir.load(stage / "model.onnx") if (stage / "model.onnx").is_file() else None
        if result is None or qgraph.ir.weight_bytes(result) <= room // _WHOLE:
            self.kernels = self.target.kernels(stage)
            return before, self.target.session(stage, threads=self.context.threads), samples, True
        return before, SlicedSession(result, samples, self.context, room=room // _SLICE), samples, True

    def _verification_samples(self, session: Any) -> Samples:
        if self.samples is not None:
            return self.samples
        inputs = input_signature(session)
        return random_feeds(inputs, self.context.seed, self.shapes, count=RANDOM_SAMPLES, limits=self.limits)

    def _facts(
        self,
        session: Any,
        plan: Plan,
        verification: Verification,
        tolerance: Mapping[str, float],
        failures: Sequence[str],
    ) -> dict[str, Any]:
        left = [*self.reports["compress"].skipped, *self.reports["lower"].skipped]
        return {
            "qgraph": qgraph.__version__,
            "source": self.source_facts,
            "target": self.target.name,
            "pipeline": {
                "prepare": _text(plan.prepare),
                "compress": _text(plan.compress),
                "lower": _text(plan.lower),
            },
            "seed": self.context.seed,
            "versions": _versions(),
            "inputs": [
                dataclasses.asdict(dataclasses.replace(one, shape=list(self.shapes.get(one.name, one.shape))))
                for one in input_signature(session)
            ],
            "outputs": [output.to_json()["name"] for output in verification.outputs],
            "passes": [
                {"part": part, "name": one.name, "changed": one.changed, "notes": list(one.notes)}
                for part, report in self.reports.items()
                for one in report.parts
            ],
            "skipped": [{"node": node, "reason": reason} for node, reason in _unique(left)],
            "weights": self.weights,
            "kernels": None if self.kernels is None else _kernels_json(self.kernels),
            "stand_in": self.target.stand_in(),
            "verification": {"data": self.data_kind, **verification.to_json()},
            "tolerance": dict(tolerance),
            "failures": list(failures),
            "verified": not failures,
        }

    def publish(self, stage: Path, manifest: Mapping[str, Any]) -> None:
        """Write the files that hold timings."""
        bench = None if self.bench is None else self.bench.to_json()
        if bench is not None:
            _write_json(stage / "bench.json", bench)
        data = ReportData.build(
            manifest, bench, self.reports, seconds=time.perf_counter() - self.started, recipe=stage / "recipe.toml"
        )
        (stage / "report.html").write_text(render(data), encoding="utf-8")


def _bench(before: Session, after: Session, samples: Samples, threads: int) -> Benchmark:
    feeds = []
    for feed in samples:
        feeds.append(feed)
        if len(feeds) == BENCH_FEEDS:
            break
    return compare({"before": before, "after": after}, feeds, seconds=BENCH_SECONDS, threads=threads)


def _parse_settings(settings: Sequence[str]) -> list[tuple[str, str, spec.Value]]:
    """Parse "pass.option=value" texts, and refuse unknown passes and options before any work is done."""
    parsed = [spec.parse_setting(text) for text in settings]
    for name, option, _ in parsed:
        spec.require_option(registry.find("pass", name), name, option)
    return parsed


def _override(pipeline: Pipeline, overrides: Sequence[tuple[str, str, spec.Value]]) -> Pipeline:
    return Pipeline(_overridden(one, overrides) for one in pipeline)


def _overridden(one: Any, overrides: Sequence[tuple[str, str, spec.Value]]) -> Any:
    changes = {option: value for name, option, value in overrides if name == one.name}
    if not changes:
        return one
    return spec.build(type(one), spec.Spec(one.name, {**spec.to_spec(one).options, **changes}))


def _refuse_unused(overrides: Sequence[tuple[str, str, spec.Value]], parts: Sequence[Pipeline]) -> None:
    present = sorted({one.name for part in parts for one in part})
    for name, option, _ in overrides:
        if name not in present:
            raise UserError(f"--set {name}.{option}: the pipeline has no pass '{name}'. It has: {', '.join(present)}.")


def _text(pipeline: Pipeline | None) -> str:
    return "" if pipeline is None else pipeline.describe()


def _recipe(target: Target, plan: Plan) -> str:
    """Write the plan as a recipe, or say in a comment why it cannot be repeated from text."""
    lines = [f'target = "{target.name}"\n']
    for table, pipeline in (("prepare", plan.prepare), ("pass", plan.compress), ("lower", plan.lower)):
        if pipeline is None:
            continue
        try:
            lines.append(pipeline.to_toml(table) if len(pipeline) else f"{table} = []\n")
        except UserError as error:
            lines.append(f"# [[{table}]] is incomplete: {error}\n")
    lines.sort(key=lambda block: "[[" in block)
    return "\n".join(lines)


def _told(report: Report) -> str:
    notes = list(dict.fromkeys(report.notes))
    if not report.changed and report.skipped:
        (reason, count), *_ = Counter(one.reason for one in report.skipped).most_common(1)
        example = next(one.node for one in report.skipped if one.reason == reason)
        notes.append(f"nothing changed; '{example}'{f' and {count - 1} more' if count > 1 else ''}: {reason}")
        return ", ".join(notes)
    nodes = f"{report.nodes_before} -> {report.nodes_after} nodes"
    return "   ".join([nodes, ", ".join(notes)]) if notes else nodes


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


def _source_facts(name: str, source: Path, model: ir.Model) -> dict[str, Any]:
    """Return name, bytes and hash of a model as loaded from `source`.

    With external data, the bytes are those of all files, and the hash is that of the files' hashes.
    """
    files = [source, *qgraph.ir.data_files(model)]
    hashes = [sha256(path) for path in files]
    digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return {"name": name, "bytes": sum(path.stat().st_size for path in files), "sha256": digest}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "apache-tvm"):
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


def verify(
    artifact: str | Path,
    *,
    source: str | Path | None = None,
    data: Data | str | Path | Iterable[Feeds] | None = None,
    tolerance: Mapping[str, float] | None = None,
    context: Context | None = None,
) -> Verification:
    """Prove again that an artifact behaves like its source: hashes first, then both run on the same samples.

    Args:
        artifact: the folder.
        source: the model it was compiled from; looked for beside the artifact by default, and checked by its hash.
        data: samples to run; random inputs when None.
        tolerance: metric -> bound; those of the manifest when None.
        context: seed, threads and progress.

    Raises:
        UserError: the artifact is damaged, or the source is not there or not the one it was compiled from.
        ToleranceError: the figures lie outside the tolerance.
    """
    context = context or Context()
    opened = open_artifact(artifact)
    facts = opened.manifest["source"]
    path = Path(source) if source is not None else opened.path.resolve().parent / facts["name"]
    if not path.is_file():
        raise UserError(f"the source {facts['name']} is not at {path}. Say where it is with --source MODEL.onnx.")
    model = qgraph.ir.load(path)
    if _source_facts(path.name, path, model)["sha256"] != facts["sha256"]:
        raise UserError(f"{path} is not the model that {opened.path} was compiled from (its hash differs)")
    before, after = open_session(path, threads=context.threads), opened.session(threads=context.threads)
    samples: Any
    labels = None
    if data is None:
        inputs = input_signature(before)
        shapes = {one["name"]: one["shape"] for one in opened.manifest["inputs"] if _is_fixed(one["shape"])}
        samples = random_feeds(inputs, context.seed, shapes, count=RANDOM_SAMPLES, limits=index_limits(model))
    else:
        wrapped = Data.of(data)
        samples = wrapped.open(signature(model))
        labels = samples.labels(wrapped.labels)
    result = verify_sessions(before, after, samples, labels=labels, progress=context.progress)
    failures = result.meets(opened.manifest["tolerance"] if tolerance is None else tolerance)
    if failures:
        raise ToleranceError(f"{opened.path} is outside the tolerance: {'; '.join(failures)}", result)
    return result


def _is_fixed(shape: Sequence[int | str | None]) -> bool:
    return all(isinstance(axis, int) for axis in shape)
