"""compile(): a model and a target go in, a verified artifact comes out.

    load -> prepare -> calibrate, compress -> lower -> check -> write -> verify -> bench -> publish

With bounds, and a target that knows how to get nearer to them, what is compressed is searched for (`qgraph.search`).
Everything is written to a temporary folder beside the artifact and renamed at the end, so that a failure, a full disk
or Ctrl-C leaves nothing half-done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

import qgraph.ir
from qgraph import building
from qgraph.analysis.index_limits import index_limits
from qgraph.artifact import Artifact, open_artifact, refuse_existing, staging
from qgraph.bounds import Bounds
from qgraph.cache import Cache
from qgraph.errors import SearchInterrupted, ToleranceError, UserError
from qgraph.loading import Data, source_facts
from qgraph.pipeline import Context, Feeds, Pipeline
from qgraph.plan import Override, Plan, override, parse_settings, refuse_unused
from qgraph.proof import RANDOM_SAMPLES
from qgraph.report.ladder import Rung
from qgraph.runtime.figures import Verification
from qgraph.runtime.session import input_signature, open_session, random_feeds
from qgraph.runtime.user_metric import UserMetric
from qgraph.runtime.verification import verify as verify_sessions
from qgraph.samples import signature
from qgraph.search import Search, Searched, can_climb
from qgraph.search_executors import parse_executor
from qgraph.sharing import Sharing
from qgraph.stages import Event, Run, ignore, told
from qgraph.target_options import read_target, refuse_untunable, with_option
from qgraph.targets.base import Session, Target
from qgraph.work_folder import work_folder

__all__ = ["Data", "Event", "Plan", "compile", "default_output", "run_passes", "verify"]


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
    recipe: str | Path | Plan | None = None,
    settings: Sequence[str] = (),
    tolerance: Mapping[str, float] | None = None,
    evaluation: str | Callable[[Session], float] | None = None,
    budget: Mapping[str, float] | None = None,
    executor: str = "",
    shapes: Mapping[str, Sequence[int]] | None = None,
    context: Context | None = None,
    force: bool = False,
    tune: bool = False,
    trials: int = 0,
    resume: bool = False,
    emit: Sequence[str] = (),
    cache: str | Path | Cache | None = None,
    sharing: Sharing | None = None,
    observer: Callable[[Event], None] | None = None,
    on_rung: Callable[[Rung], None] | None = None,
) -> Artifact:
    """Compile a model for a target, verify the result against the source and write the artifact.

    Args:
        model: an ONNX file, or a model in memory (which is not changed).
        target: a target's name, with options as `name{option=value}`, or an instance.
        output: the artifact's folder; MODEL.TARGET beside the model by default (needed for a model in memory).
        calibration: samples for the passes that need activations; a fifth of them is held back for verification.
        verify_data: samples to verify on instead of held-back ones; with labels, accuracy is measured.
        passes: replaces the target's compress part.
        recipe: a recipe file, or what one holds, that replaces the parts it names.
        settings: "pass.option=value" texts that override single options, in any part.
        tolerance: metric -> bound, such as {"sqnr": 30.0, "top1": 0.005}. Where the target's first pipeline does not
            meet them, better ones are searched for (see `qgraph.search`); a recipe is taken as it is.
        evaluation: a measure of one's own, for the tolerance `eval`: a function of a session that returns a number,
            higher being better, or its name as module:function (see `qgraph.runtime.user_metric`).
        budget: "size" -> bytes of the deployable files, "latency" -> share of the source's: the most accurate result
            within them is searched for.
        executor: where the search makes candidates: "" for processes of this machine, as many at once as
            `context.threads` says, or the address of a Ray cluster, `ray://HOST:PORT` or `ray://local`.
        shapes: input -> dimensions, to fix dynamic axes.
        context: seed, threads, memory bound and progress; calibration is filled in here.
        force: replace an artifact that stands at `output`.
        tune: let the target time candidates on this machine; the choice is in the artifact's recipe.
        trials: how many kernels a target that searches for its kernels may time; 0 for its own choice.
        resume: go on from the layers that a run which was stopped has finished, in `output` + '.work'.
        emit: code to write beside the model, for targets that write any: "c", "so".
        cache: a folder where the model is kept behind passes that take long, for the next compilation of it.
        sharing: what several compilations of a model share (see `qgraph.sharing`), instead of `cache`.
        observer: called when each stage ends.
        on_rung: called with each candidate of a search when it is decided on.

    Raises:
        UserError: the input, the data or an option is at fault; nothing is left behind.
        ToleranceError: compiled, but outside `tolerance` or `budget`; the artifact is kept, marked unverified.
        SearchInterrupted: Ctrl-C came after the first candidate was complete; the best one is kept.
    """
    source_path = None if isinstance(model, ir.Model) else Path(model)
    chosen = read_target(target) if isinstance(target, str) else target
    if emit:
        chosen = chosen.emitting(emit)
    if trials:
        chosen = with_option(chosen, "trials", trials, f"--tune {trials}")
    if tune:
        refuse_untunable(chosen)
    folder = _output(output, source_path, chosen)
    refuse_existing(folder, force=force, source=source_path)
    plan = Plan.of(passes, recipe)
    overrides = parse_settings(settings)
    bounds = Bounds(dict(tolerance or {}), dict(budget or {}))
    address = parse_executor(executor)
    if sharing is None and cache is not None:
        sharing = Sharing(cache if isinstance(cache, Cache) else Cache(cache), memory=False)
    metric = _metric(evaluation, bounds.tolerance)
    context = context or Context()
    with (
        staging(folder, force=force) as stage,
        _as_file(model) as source,
        work_folder(folder, resume=resume) as work,
    ):
        run = Run(
            chosen,
            dataclasses.replace(context, work_folder=context.work_folder or work, _analyses={}),
            source,
            shapes=shapes or {},
            calibration=calibration,
            verify_data=verify_data,
            metric=metric,
            sharing=sharing,
            observer=observer or ignore,
        )
        if bounds:
            run.proof.refuse_unmeasurable(bounds.tolerance)
        plan = _filled(plan, run, overrides, tune=tune)
        if bounds and recipe is None and not run.proof.sliced and can_climb(chosen, plan):
            run.proof.record()
            search = Search(run, run.line.model, plan, bounds, overrides, executor=address, observer=on_rung or ignore)
            result = search.into(stage, work)
        else:
            result = _straight(run, plan, stage)
        manifest = run.finish(stage, result.plan, result.built, bounds, result.tested)
        run.publish(stage, manifest, result.built, result.rungs)
    run.event("write", f"{folder}")
    artifact = Artifact(folder, manifest)
    if result.interrupted:
        raise SearchInterrupted(artifact)
    if manifest["failures"]:
        bounded = " and the ".join(name for name in ("tolerance", "budget") if manifest.get(name))
        state = f"is outside the {bounded}" if bounded else "is not verified"
        raise ToleranceError(
            f"{folder} {state}: {'; '.join(manifest['failures'])}. {result.tried}It is kept, marked unverified.",
            artifact,
        )
    return artifact


def run_passes(
    model: Path,
    target: Target,
    *,
    sharing: Sharing,
    context: Context,
    calibration: Data | None = None,
    verify_data: Data | None = None,
    passes: Pipeline | None = None,
    recipe: Plan | None = None,
    settings: Sequence[str] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Run all that `compile` does up to the lowered model, for what that leaves in `sharing`; see there.

    Raises:
        UserError, PassError: as `compile` does.
        BusyError: another process runs the next pass over the same model.
    """
    run = Run(
        target, context, model, shapes=shapes or {}, calibration=calibration, verify_data=verify_data, sharing=sharing
    )
    plan = _filled(Plan.of(passes, recipe), run, parse_settings(settings), tune=False)
    run.line.run(plan.compress or Pipeline())
    run.line.run(plan.lower or Pipeline())


def _filled(plan: Plan, run: Run, overrides: Sequence[Override], *, tune: bool) -> Plan:
    """Prepare the model, and return the plan with all three parts."""
    target = run.target
    prepare = override(plan.prepare if plan.prepare is not None else target.prepare_passes(), overrides)
    run.prepare(prepare)
    compress = plan.compress
    if compress is None:
        model = run.line.model
        compress = target.compress_passes(model, run.context)
        compress = target.tune(model, run.context, compress) if tune else compress
    compress = override(compress, overrides)
    if plan.compress is not None:
        target.refuse_passes(compress)
    lower = override(plan.lower if plan.lower is not None else target.lower_passes(), overrides)
    refuse_unused(overrides, (prepare, compress, lower))
    return Plan(prepare, compress, lower)


def _straight(run: Run, plan: Plan, stage: Path) -> Searched:
    """Build what the plan says, and nothing else."""
    compress, lower = plan.compress or Pipeline(), plan.lower or Pipeline()
    report = run.line.run(compress, after_pass=lambda one: run.event(one.name, told(one)))
    lowered = run.line.run(lower)
    built = building.write(run.line.model, run.target, report, lowered, stage)
    run.event("lower", built.told())
    return Searched(plan, built)


def _metric(evaluation: str | Callable[[Session], float] | None, tolerance: Mapping[str, float]) -> UserMetric | None:
    if evaluation is not None:
        return UserMetric(evaluation)
    if "eval" in tolerance or "eval_share" in tolerance:
        raise UserError("tolerance eval bounds what your own measure loses: name it with --eval MODULE:FUNCTION")
    return None


def _output(output: str | Path | None, source: Path | None, target: Target) -> Path:
    if output is not None:
        return Path(output)
    if source is None:
        raise UserError("a model in memory has no file name: pass output=FOLDER")
    return default_output(source, target.name)


@contextlib.contextmanager
def _as_file(model: str | Path | ir.Model) -> Iterator[Path]:
    """Give the source as a file: the verification runs it in a session, as it was."""
    if not isinstance(model, ir.Model):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        path = Path(folder) / f"{model.graph.name or 'model'}.onnx"
        qgraph.ir.save(model, path)
        yield path


def verify(
    artifact: str | Path,
    *,
    source: str | Path | None = None,
    data: Data | str | Path | Iterable[Feeds] | None = None,
    tolerance: Mapping[str, float] | None = None,
    evaluation: str | Callable[[Session], float] | None = None,
    context: Context | None = None,
) -> Verification:
    """Prove again that an artifact behaves like its source: hashes first, then both run on the same samples.

    Args:
        artifact: the folder.
        source: the model it was compiled from; looked for beside the artifact by default, or where the index of its
            build says, and checked by its hash.
        data: samples to run; random inputs when None.
        tolerance: metric -> bound; those of the manifest when None, without the one on `eval` unless `evaluation` is
            given.
        evaluation: a measure of one's own, as for `compile`.
        context: seed, threads and progress.

    Raises:
        UserError: the artifact is damaged, or the source is not there or not the one it was compiled from.
        ToleranceError: the figures lie outside the tolerance.
    """
    context = context or Context()
    opened = open_artifact(artifact)
    facts = opened.manifest["source"]
    path = Path(source) if source is not None else opened.source
    if not path.is_file():
        raise UserError(f"the source {facts['name']} is not at {path}. Say where it is with --source MODEL.onnx.")
    model = qgraph.ir.load(path)
    if source_facts(path, model)["sha256"] != facts["sha256"]:
        raise UserError(f"{path} is not the model that {opened.path} was compiled from (its hash differs)")
    if tolerance is None:
        kept: Mapping[str, float] = opened.manifest["tolerance"]
        tolerance = {name: kept[name] for name in kept if evaluation is not None or not name.startswith("eval")}
    metric = _metric(evaluation, tolerance)
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
    if metric is not None:
        result = dataclasses.replace(result, eval_before=metric.source(before), eval_after=metric(after))
    failures = result.meets(tolerance)
    if failures:
        raise ToleranceError(f"{opened.path} is outside the tolerance: {'; '.join(failures)}", result)
    return result


def _is_fixed(shape: Sequence[int | str | None]) -> bool:
    return all(isinstance(axis, int) for axis in shape)
