"""The candidates of a search: made, compared on the tuning samples, and verified and timed where it is worth it.

Several are made at once where there are processors for it, here or on a Ray cluster.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from qgraph.analysis.quantization_sensitivity import Sensitivities
from qgraph.beginnings import Beginning
from qgraph.bounds import Bounds, bytes_of
from qgraph.building import Built
from qgraph.errors import UserError
from qgraph.pipeline import Context, Pipeline, Report, Samples
from qgraph.report.ladder import Rung
from qgraph.runtime.recorded import Recorded
from qgraph.samples import SampleSet
from qgraph.search_candidates import Candidate
from qgraph.search_executors import Executor, Here, Processes, Ray, in_order, portable
from qgraph.search_ranking import elements_of, harm
from qgraph.search_workshop import Job, Made, Workplace, Workshop
from qgraph.stages import Run, told

__all__ = ["Trials"]

_TUNING = 64
"""Tuning samples, at most."""
_RANKING = 4
"""Samples for the sensitivities of tensors, at most."""
_WORTH_PROCESSES = 2.0
"""Seconds that a candidate must take for processes to be started without being asked for."""
_MOST_PROCESSES = 8
_CORES_FOR_PROCESSES = 4
"""Fewer cores do more with threads, since what candidates share is then made once."""
_RECORDED = 4


class Trials:
    """All candidates of one search.

    Attributes:
        candidates: in the order in which they were made; the first is what a compilation without a search gives.
        worst: the nodes that were found to hurt the outputs most, the worst first.

    Args:
        run: the compilation; its source is open and recorded.
        model: the prepared model.
        lower: the lower part.
        bounds: what the user wants.
        scratch: folder of the candidates' files.
        executor: address of a Ray cluster, or None.
        observer: called with each rung as it is decided.
    """

    def __init__(
        self,
        run: Run,
        model: ir.Model,
        lower: Pipeline,
        bounds: Bounds,
        scratch: Path,
        *,
        executor: str | None,
        observer: Callable[[Rung], None],
    ) -> None:
        self.bounds = bounds
        self.candidates: list[Candidate] = []
        self.worst: list[str] = []
        self._run = run
        self._scratch = scratch
        self._address = executor
        self._observer = observer
        tuning = _tuning(run)
        recorded = Recorded(run.proof.source, len(tuning), run.context.calibration_memory // _RECORDED)
        # A context of its own: the reference that the run's gets from a candidate is not that of the others.
        context = dataclasses.replace(run.context, _analyses={})
        self._place = Workplace(model, run.target, lower, context, tuning, recorded)
        self._beginning = Beginning.of(run.line)
        self._shop = Workshop(self._place, self._beginning)
        self._executor: Executor | None = None
        self._known: set[Pipeline] = set()
        self._folders = 0
        self._harms: dict[Pipeline, tuple[Sensitivities | None, dict[str, int]]] = {}

    def first(self, compress: Pipeline) -> Candidate:
        """Make the first candidate as a compilation without a search would."""
        run = self._run

        def after(report: Report) -> None:
            run.event(report.name, told(report))

        folder = self._scratch / "first"
        built, context = self._shop.build(compress, folder, told=after)
        self._shop.quiet()
        run.event("lower", built.told())
        run.context.reference = context.reference
        first = Candidate("as the target does it", compress, Made(folder, built), bytes_of(folder))
        self._known.add(compress)
        self.candidates.append(first)
        self.complete(first, quiet=False)
        self.tell(first)
        return first

    def made(self, wanted: Sequence[tuple[str, Pipeline]] | Iterator[tuple[str, Pipeline]]) -> Iterator[Candidate]:
        """Make candidates, several at once where there are workers, and yield them in order."""
        executor = self._started()
        names: dict[Path, tuple[str, Pipeline]] = {}

        def jobs() -> Iterator[Job]:
            for name, pipeline in wanted:
                self._folders += 1
                folder = self._scratch / str(self._folders)
                names[folder] = name, pipeline
                yield Job(name, pipeline, folder, dict(self._shop.ranges.known))

        for job, made in in_order(executor, jobs()):
            self._shop.ranges.update(made.ranges)
            name, pipeline = names[job.folder]
            self._known.add(pipeline)
            candidate = Candidate(name, pipeline, made, bytes_of(made.folder) if made.built else 0, remark=made.error)
            self.candidates.append(candidate)
            yield candidate

    def _started(self) -> Executor:
        if self._executor is not None:
            return self._executor
        threads = self._run.context.threads
        folder = self._scratch / "shared"
        workers = threads or min(_MOST_PROCESSES, _cores())
        movable = portable(self._place, self.candidates[0].compress)
        if self._address is not None:
            if not movable:
                raise UserError(f"--executor {self._address}: passes or a target given as objects cannot travel")
            self._executor = Ray(self._place, self._address, workers=threads, folder=folder)
        elif workers < 2 or not movable or not (threads or self._worth_processes()):
            self._executor = Here(self._shop)
        else:
            self._executor = Processes(self._place, workers, threads=1, folder=folder)
        return self._executor

    def _worth_processes(self) -> bool:
        built = self.candidates[0].made.built
        return _cores() >= _CORES_FOR_PROCESSES and built is not None and built.compress.seconds > _WORTH_PROCESSES

    def knows(self, pipeline: Pipeline) -> bool:
        """Tell whether a candidate of this compress part was made."""
        return pipeline in self._known

    def finish(self) -> None:
        """Make no more candidates: nothing runs beside what comes next."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def complete(self, one: Candidate, *, quiet: bool = True) -> None:
        """Verify a candidate, and time it where a budget wants it."""
        if one.made.error:
            return
        session, verification = self._run.proof.verify(one.made.folder, quiet=quiet)
        if "latency" in self.bounds.budget:
            timed = self._run.proof.time({"after": session})
            if timed is not None:
                one.speedup, one.seconds = timed.ratio("before", "after"), timed["after"].seconds
        failures = [*verification.meets(self.bounds.tolerance), *self.bounds.over_budget(one.bytes, one.speedup)]
        one.failures, one.verification = failures, verification

    def tell(self, one: Candidate) -> None:
        """Tell the observer that a candidate was decided on."""
        self._observer(one.rung(self.bounds))

    def closeness(self, one: Candidate) -> float:
        """Return how near a candidate is on the tuning samples; of the first one this is not known beforehand."""
        if one.made.closeness == -math.inf and one.made.built is not None and one is self.candidates[0]:
            one.made = dataclasses.replace(one.made, closeness=self._shop.compare(one.made.folder))
        return one.made.closeness

    def harm(self, base: Candidate) -> tuple[Sensitivities | None, dict[str, int]]:
        """Return what the rounding of each tensor of a candidate does to the outputs, and node -> weights' elements."""
        known = self._harms.get(base.compress)
        if known is None:
            model, context, _ = self._shop.compress(base.compress)
            context.progress = self._run.context.progress
            found = harm(model, context, _spread(self._place.tuning, _RANKING))
            known = found, elements_of(context.reference, found) if context.reference is not None else {}
            self._harms[base.compress] = known
        return known

    def compressed(self, compress: Pipeline) -> tuple[ir.Model, Context]:
        """Return the model behind a compress part, not lowered, and the context after its passes."""
        model, context, _ = self._shop.compress(compress)
        return model, context

    def once_more(self, chosen: Candidate, stage: Path) -> Built:
        """Build what was chosen as its recipe would, with nothing that other candidates alone have found out."""
        built, context = Workshop(self._place, self._beginning).build(chosen.compress, stage)
        self._run.context.reference = context.reference
        self._run.event("build", f"{chosen.name}   {built.told()}")
        return built


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _tuning(run: Run) -> Samples:
    """Return the samples that candidates are compared on."""
    held_back = run.loaded.held_back
    apart = held_back is not None and run.loaded.given is not held_back
    samples = held_back if apart else run.context.calibration
    if samples is None:
        return run.proof.samples
    return _spread(samples, _TUNING)


def _spread(samples: Samples, count: int) -> Samples:
    """Return at most `count` of the samples, spread evenly over them."""
    if len(samples) <= count:
        return samples
    places = [(2 * number + 1) * len(samples) // (2 * count) for number in range(count)]
    if isinstance(samples, SampleSet):
        return SampleSet(samples.source, tuple(samples.indices[place] for place in places))
    return [feeds for number, feeds in enumerate(samples) if number in set(places)]
