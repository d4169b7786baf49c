"""The search: from the cheapest pipeline up a ladder of better ones, until the user's bounds are met.

    as the target does it -> ranges -> equalization -> bias correction -> learned rounding -> worst nodes precise

Weights of 4 bits may be so far from the bounds that no rounding can mend it. Whether 8 bits would do is then tried
first, and the way goes straight from there: as many nodes back to 4 bits as the bounds allow, those that gain most size
for what they harm before the others. Such candidates share all ranges and learn nothing, so that each is cheap. The
ladder is climbed besides where next to no weight could go back.

Each step of the target's ladder (`Target.ladder`) has one way or several; the best stays if it helps. Steps for the
rounding of weights are left out where activations do all the harm, and the other way round, as the sensitivity of every
tensor tells. Then the nodes that hurt the outputs most keep a higher precision: as many as are predicted to do (for one
bound; 1 where nothing can be predicted), twice as many and so on until the bounds are met, in the end as few as
hold. The first candidate that meets all bounds ends the climb; if that is the very first, nothing else was tried.

What is decided on which data:

    whether a step helps           the tuning samples: by at least `_LEAST_GAIN` dB of the worst output's SQNR. These
                                   are the held-back part of the calibration data where the user gave verification data
                                   of its own, and calibration samples otherwise
    whether the bounds are met     the verification data, which decide nothing else: so what is proven in the end was
                                   not chosen on the data that prove it, but for when to stop
    which of several is taken      time, measured at the end with all of them and the source in turn; within 5 % the
                                   smaller one, then the earlier one

With `--budget`, the ladder runs the other way: every step that helps is taken, then as many nodes as fit are kept in
float, or, where 8 bits are too many, as many as fit keep 8 bits among weights of 4.

The result is a pipeline, made once more on its own where it was made with what other candidates had found out: its
recipe repeats the choice without the search, to the byte.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from qgraph.analysis.quantization_sensitivity import Sensitivities
from qgraph.beginnings import Beginning
from qgraph.building import Built
from qgraph.errors import UserError
from qgraph.pipeline import Pipeline, Report, Samples
from qgraph.plan import Override, Plan, override
from qgraph.report.ladder import Rung
from qgraph.runtime.recorded import Recorded
from qgraph.samples import SampleSet
from qgraph.search_candidates import Candidate, Searched, distance, loss
from qgraph.search_edits import before_loss, changed, keep_precise, quantizes, way_name
from qgraph.search_executors import Executor, Here, Processes, Ray, in_order, portable
from qgraph.search_precision import float_sets, wanted_sqnr
from qgraph.search_ranking import (
    between,
    elements_of,
    first_count,
    harm,
    is_far,
    is_luck,
    near_enough,
    relevant,
    saves_little,
    worst_nodes,
)
from qgraph.search_workshop import Job, Made, Workplace, Workshop
from qgraph.stages import Bounds, Run, bytes_of, told
from qgraph.targets.base import Step, Target
from qgraph.work_folder import SCRATCH

__all__ = ["Search", "Searched", "can_climb"]

_LEAST_GAIN = 0.1
_TUNING = 64
"""Tuning samples, at most."""
_TRIM = 4
"""Nodes of a higher precision are trimmed to within this part of their number."""
_RANKING = 4
"""Samples for the sensitivities of tensors, at most."""
_SAME_SPEED = 1.05
_TIMED = 8
"""Candidates that are timed beside one another at the end, at most."""
_SECONDS = 0.15
"""For timing one of them."""
_WORTH_PROCESSES = 2.0
"""Seconds that a candidate must take for processes to be started without being asked for."""
_MOST_PROCESSES = 8
_CORES_FOR_PROCESSES = 4
"""Fewer cores do more with threads, since what candidates share is then made once."""
_RECORDED = 4
_NAMED = 3
_INTEGER_ACTIVATIONS = ("dynamic-int8", "qdq")


def can_climb(target: Target, plan: Plan) -> bool:
    """Tell whether there is anything to try beyond the plan."""
    compress = plan.compress or Pipeline()
    return bool(target.ladder(compress)) or quantizes(compress)


class Search:
    """One search.

    Args:
        run: the compilation; its source is open and recorded.
        model: the prepared model.
        plan: all three parts, to begin with.
        bounds: what the user wants.
        overrides: the user's settings, which no step changes.
        executor: address of a Ray cluster, or None.
        observer: called with each rung as it is decided.
    """

    def __init__(
        self,
        run: Run,
        model: ir.Model,
        plan: Plan,
        bounds: Bounds,
        overrides: Sequence[Override],
        *,
        executor: str | None,
        observer: Callable[[Rung], None],
    ) -> None:
        self._run = run
        self._bounds = bounds
        self._overrides = overrides
        self._plan = plan
        self._scratch = Path()
        self._address = executor
        self._observer = observer
        tuning = _tuning(run)
        source = run.before.session if isinstance(run.before, Recorded) else run.before
        recorded = Recorded(source, len(tuning), run.context.calibration_memory // _RECORDED)
        # A context of its own: the reference that the run's gets from a candidate is not that of the others.
        context = dataclasses.replace(run.context, _analyses={})
        self._place = Workplace(model, run.target, plan.lower or Pipeline(), context, tuning, recorded)
        self._beginning = Beginning.of(run.line)
        self._shop = Workshop(self._place, self._beginning)
        self._executor: Executor | None = None
        self._known: set[Pipeline] = set()
        self._folders = 0
        self._harms: dict[Pipeline, tuple[Sensitivities | None, dict[str, int]]] = {}
        self.candidates: list[Candidate] = []
        self.worst: list[str] = []
        self.interrupted = False

    # --- the climb ----------------------------------------------------------------------------------------------------

    def into(self, stage: Path, work: Path) -> Searched:
        """Search, and put the files of what was chosen into `stage`.

        Args:
            stage: an empty folder.
            work: folder in which the candidates' files can be while it lasts.
        """
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=work) as scratch:
            self._scratch = Path(scratch)
            chosen = self._climb(self._plan.compress or Pipeline())
            assert chosen.made.built is not None
            plan, built = dataclasses.replace(self._plan, compress=chosen.compress), chosen.made.built
            if chosen is self.candidates[0] or chosen.made.exact or self.interrupted:
                for path in chosen.made.folder.iterdir():
                    shutil.move(path, stage / path.name)
            else:
                built = self._once_more(chosen, stage)
            as_made = not any(chosen.made.folder.iterdir())
        if as_made and chosen.verification is not None:
            tested = self._run.open_result(stage), chosen.verification
        else:
            tested = self._run.verify(stage, quiet=True)
        rungs = [one.rung(self._bounds, chosen=one is chosen) for one in self.candidates]
        return Searched(plan, built, tested, rungs, self._tried(), self.interrupted)

    def _once_more(self, chosen: Candidate, stage: Path) -> Built:
        """Build what was chosen as its recipe would, with nothing that other candidates alone have found out."""
        built, context = Workshop(self._place, self._beginning).build(chosen.compress, stage)
        self._run.context.reference = context.reference
        self._run.event("build", f"{chosen.name}   {built.told()}")
        return built

    def _climb(self, compress: Pipeline) -> Candidate:
        """Return the candidate to take: the fastest that meets all bounds, or the nearest to them."""
        first = self._first(compress)
        try:
            if self._bounds.budget:
                self._fill_budget(first)
            elif not first.met:
                self._meet_tolerance(first)
            return self._choose()
        except KeyboardInterrupt:
            self.interrupted = True
            return self._best(self.candidates)
        finally:
            if self._executor is not None:
                self._executor.close()

    def _tried(self) -> str:
        """Return in one line what was tried and how far it got."""
        steps = [f"{one.name}{f' ({one.remark})' if one.remark else ''}" for one in self.candidates[1:]]
        parts = [f"Tried: {', '.join(steps)}. "] if steps else []
        if self.worst:
            parts.append(f"Worst: {', '.join(repr(name) for name in self.worst[:_NAMED])}. ")
        return "".join(parts)

    def _first(self, compress: Pipeline) -> Candidate:
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
        self._complete(first, quiet=False)
        self._tell(first)
        return first

    def _meet_tolerance(self, first: Candidate) -> None:
        found, _ = self._harm(first)
        if self._fewer_bits_for_some(first, found):
            return
        base = self._steps(first, relevant(self._run.target.ladder(first.compress), found), until_met=True)
        if base.met or not quantizes(base.compress):
            return
        if _four_bits(base.compress):
            base = self._precise(base, "int8")
        if not base.met:
            self._in_float(base)

    def _fewer_bits_for_some(self, first: Candidate, found: Sensitivities | None) -> bool:
        """Where 4 bits harm too much for a better rounding to mend it, find the nodes that need 8; tell if few do."""
        by_qdq = any(one.name == "qdq" and getattr(one, "weights", None) == "int4" for one in first.compress)
        if not by_qdq or not math.isfinite(self._closeness(first)):
            return False
        _, elements = self._harm(first)
        nodes = worst_nodes(found, "int8", elements)
        if len(nodes) < 2 or not is_far(self._wanted(), self._closeness(first), math.inf):
            return False
        whole = self._try(first, nodes, "int8", len(nodes))
        if not whole.met or not is_far(self._wanted(), self._closeness(first), whole.made.closeness):
            return False
        self.worst = nodes
        failing, holding, held = 0, len(nodes), whole
        while not near_enough(nodes, elements, failing, holding):
            middle = between(nodes, elements, failing, holding)
            one = self._try(first, nodes, "int8", middle, surer=whole)
            if one.met and not one.superseded:
                held.superseded = True  # by the same kernels with less to read
                held, holding = one, middle
            else:
                failing = middle
        return not saves_little(nodes, elements, holding)

    def _wanted(self) -> float | None:
        """Return the SQNR in dB that the bounds ask for; None where they are on other metrics."""
        return self._bounds.tolerance.get("sqnr") if len(self._bounds.tolerance) == 1 else None

    def _try(
        self, base: Candidate, nodes: Sequence[str], to: str, count: int, *, surer: Candidate | None = None
    ) -> Candidate:
        """Make and verify the candidate with the first `count` of the nodes at a higher precision.

        Where it meets the bounds by luck, it is not taken, but `surer` is, or what lies between.
        """
        (one,) = self._made([_precise(base, nodes, to, count)])
        self._complete(one)
        if surer is not None and one.met and one.verification is not None:
            close = one.made.closeness, surer.made.closeness
            if is_luck(self._bounds.tolerance, one.verification.samples, *close):
                one.superseded, one.remark = True, "too few samples to be sure"
        self._tell(one)
        return one

    def _steps(self, base: Candidate, ladder: Sequence[Step], *, until_met: bool) -> Candidate:
        """Take every step that helps, and return where that leads."""
        for step in ladder:
            best = base
            tried = []
            for one in self._made(self._ways(base, step)):
                tried.append(one)
                if one.made.closeness > max(best.made.closeness, self._closeness(base) + _LEAST_GAIN):
                    best = one
            if best is not base:
                self._complete(best)
            for one in tried:
                if one is not best and not one.made.error:
                    self._leave(one, base)
                self._tell(one)
            base = best
            if until_met and base.met:
                break
        return base

    def _leave(self, one: Candidate, base: Candidate) -> None:
        """Drop a candidate that is not nearer to the source than another."""
        gain = one.made.closeness - self._closeness(base)
        helps = gain > _LEAST_GAIN
        one.remark = f"{gain:+.1f} dB{', less than its alternative' if helps else ''}" if math.isfinite(gain) else ""
        shutil.rmtree(one.made.folder, ignore_errors=True)

    def _ways(self, base: Candidate, step: Step) -> Iterator[tuple[str, Pipeline]]:
        for way in step.ways:
            pipeline = changed(base.compress, way)
            pipeline = None if pipeline is None else override(pipeline, self._overrides)
            if pipeline is not None and pipeline not in self._known:
                yield way_name(step.name, way, step.ways), pipeline

    def _precise(self, base: Candidate, to: str) -> Candidate:
        """Give the worst nodes a higher precision: ever more of them until the bounds are met, then as few as hold."""
        found, elements = self._harm(base)
        nodes = self.worst = worst_nodes(found, to, elements)
        if not nodes:
            return base
        count = min(len(nodes), self._first_count(found, nodes, to))
        counts = [count]
        while count < len(nodes):
            count = min(2 * count, len(nodes))
            counts.append(count)
        failing, best, holding = 0, base, 0
        for count, one in zip(counts, self._made(_precise(base, nodes, to, count) for count in counts), strict=False):
            self._complete(one)
            self._tell(one)
            best = one if one.complete else best
            if one.met:
                holding = count
                break
            failing = count
        while holding - failing > max(1, holding // _TRIM):
            middle = (holding + failing) // 2
            one = self._try(base, nodes, to, middle)
            if one.met:
                holding, best = middle, one
            else:
                failing = middle
        return best

    def _in_float(self, base: Candidate) -> None:
        """Keep in float what belongs together: ever more of it until the bounds are met, then as little as holds."""
        sets = self._float_sets(base)
        if not sets:
            self._precise(base, "float")
            return
        self.worst = sets[0][1]
        wanted = self._wanted_in_float()
        place = next((number for number, (goal, _) in enumerate(sets) if goal >= wanted), len(sets) - 1)
        failing, stride = -1, 1
        while not self._kept_in_float(base, sets[place][1]).met:
            failing = place
            if place == len(sets) - 1:
                return
            place, stride = min(place + stride, len(sets) - 1), 2 * stride
        while place - failing > 1:
            middle = (place + failing) // 2
            if self._kept_in_float(base, sets[middle][1]).met:
                place = middle
            else:
                failing = middle

    def _float_sets(self, base: Candidate) -> list[tuple[float, list[str]]]:
        """Return ever larger sets of nodes to keep in float; none for weights alone, whose nodes do not hang together.

        For activations that are quantized at run time, static ones stand in.
        """
        if not any(one.name in _INTEGER_ACTIVATIONS for one in base.compress):
            return []
        model, context, _ = self._shop.compress(before_loss(base.compress))
        return float_sets(model, context, base.compress)

    def _kept_in_float(self, base: Candidate, nodes: Sequence[str]) -> Candidate:
        """Make and verify the candidate with some nodes in float."""
        name = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} in float"
        (one,) = self._made([(name, keep_precise(base.compress, nodes, "float"))])
        self._complete(one)
        self._tell(one)
        return one

    def _wanted_in_float(self) -> float:
        """Return the predicted SQNR with which to begin."""
        (metric, bound), *others = self._bounds.tolerance.items()
        return 0.0 if others else wanted_sqnr(self._losses(metric), loss(metric, bound))

    def _losses(self, metric: str) -> list[tuple[float, float]]:
        """Return SQNR and loss of the candidates that were verified, rising."""
        verified = [one.verification for one in self.candidates if one.verification is not None]
        figures = [(one.figure("sqnr"), one.figure(metric)) for one in verified]
        known = [(sqnr, figure) for sqnr, figure in figures if sqnr is not None and figure is not None]
        return sorted((sqnr, loss(metric, figure)) for sqnr, figure in known)

    def _first_count(self, found: Sensitivities | None, nodes: Sequence[str], to: str) -> int:
        """Return with how many nodes to begin: where one bound is missed, as many as are predicted to meet it."""
        (metric, bound), *others = self._bounds.tolerance.items()
        if others:
            return 1
        return first_count(found, nodes, to, self._losses(metric), loss(metric, bound))

    # --- with a budget ------------------------------------------------------------------------------------------------

    def _fill_budget(self, first: Candidate) -> None:
        base = self._smaller(first) if first.bytes > self._bounds.budget.get("size", math.inf) else first
        base = self._steps(base, self._run.target.ladder(base.compress), until_met=False)
        if "qdq" not in [one.name for one in base.compress]:
            return
        if not self._broken(base):
            self._most_in_float(base)
            return
        four = changed(base.compress, "qdq.weights=int4")
        if four is None:
            return
        (small,) = self._made([("weights of 4 bits", override(four, self._overrides))])
        self._complete(small)
        self._tell(small)
        if small.made.error or self._broken(small):
            return
        small = self._steps(small, self._run.target.ladder(small.compress), until_met=False)
        self._most(small, "int8")

    def _most_in_float(self, base: Candidate) -> None:
        """Keep as much in float as the budget allows, what hurts most first."""
        sets = self._float_sets(base)
        if not sets:
            self._most(base, "float")
            return
        self.worst = sets[0][1]
        holding, breaking = -1, len(sets)
        while breaking - holding > 1:
            middle = (holding + breaking) // 2
            one = self._kept_in_float(base, sets[middle][1])
            if one.made.error or self._broken(one):
                breaking = middle
            else:
                holding = middle

    def _smaller(self, first: Candidate) -> Candidate:
        """Return the first of the target's smaller forms that is within the size, the last one, or what there is."""
        found = first
        wanted = [(name, override(one, self._overrides)) for name, one in self._run.target.smaller(first.compress)]
        for one in self._made(wanted):
            self._complete(one)
            self._tell(one)
            if one.complete:
                found = one
                if one.bytes <= self._bounds.budget["size"]:
                    break
        return found

    def _most(self, base: Candidate, to: str) -> None:
        """Give as many nodes a higher precision as the budget allows, the worst first."""
        found, elements = self._harm(base)
        nodes = self.worst = worst_nodes(found, to, elements)
        holding, breaking = 0, len(nodes) + 1
        while breaking - holding > 1:
            count = (holding + breaking) // 2 if breaking <= len(nodes) else len(nodes)
            one = self._try(base, nodes, to, count)
            if one.made.error or self._broken(one):
                breaking = count
            else:
                holding = count

    def _broken(self, one: Candidate) -> list[str]:
        return self._bounds.over_budget(one.bytes, one.speedup)

    # --- candidates ---------------------------------------------------------------------------------------------------

    def _made(self, wanted: Sequence[tuple[str, Pipeline]] | Iterator[tuple[str, Pipeline]]) -> Iterator[Candidate]:
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

    def _closeness(self, one: Candidate) -> float:
        """Return how near a candidate is on the tuning samples; of the first one this is not known beforehand."""
        if one.made.closeness == -math.inf and one.made.built is not None and one is self.candidates[0]:
            one.made = dataclasses.replace(one.made, closeness=self._shop.compare(one.made.folder))
        return one.made.closeness

    def _complete(self, one: Candidate, *, quiet: bool = True) -> None:
        """Verify a candidate, and time it where a budget wants it."""
        if one.made.error:
            return
        session, verification = self._run.verify(one.made.folder, quiet=quiet)
        if "latency" in self._bounds.budget:
            timed = self._run.time({"after": session})
            if timed is not None:
                one.speedup, one.seconds = timed.ratio("before", "after"), timed["after"].seconds
        failures = [*verification.meets(self._bounds.tolerance), *self._bounds.over_budget(one.bytes, one.speedup)]
        one.failures, one.verification = failures, verification

    def _tell(self, one: Candidate) -> None:
        self._observer(one.rung(self._bounds))

    def _harm(self, base: Candidate) -> tuple[Sensitivities | None, dict[str, int]]:
        """Return what the rounding of each tensor of a candidate does to the outputs, and node -> weights' elements."""
        known = self._harms.get(base.compress)
        if known is None:
            model, context, _ = self._shop.compress(base.compress)
            context.progress = self._run.context.progress
            found = harm(model, context, _spread(self._place.tuning, _RANKING))
            known = found, elements_of(context.reference, found) if context.reference is not None else {}
            self._harms[base.compress] = known
        return known

    # --- the choice ---------------------------------------------------------------------------------------------------

    def _choose(self) -> Candidate:
        complete = [one for one in self.candidates if one.complete]
        if self._executor is not None:
            self._executor.close()  # nothing else may run while candidates are timed
            self._executor = None
        if len(complete) == 1:
            return complete[0]
        self._time(complete)
        met = [one for one in complete if one.met]
        if self._bounds.budget:
            return max(met, key=lambda one: self._closeness(one)) if met else self._best(complete)
        if not met:
            return self._best(complete)
        fastest = min(one.seconds or math.inf for one in met if not one.superseded)
        ties = [one for one in met if not one.superseded and (one.seconds or math.inf) <= _SAME_SPEED * fastest]
        return min(ties, key=lambda one: (one.bytes, self.candidates.index(one)))

    def _time(self, complete: Sequence[Candidate]) -> None:
        """Time the candidates beside one another: those within the bounds, then the others, the last first."""
        ordered = sorted(complete, key=lambda one: (not one.met, -self.candidates.index(one)))[:_TIMED]
        sessions = {str(number): self._run.open_result(one.made.folder) for number, one in enumerate(ordered)}
        timed = self._run.time(sessions, seconds=_SECONDS * (len(sessions) + 1))
        if timed is None:
            return
        for number, one in enumerate(ordered):
            one.seconds, one.speedup = timed[str(number)].seconds, timed.ratio("before", str(number))

    def _best(self, candidates: Sequence[Candidate]) -> Candidate:
        """Return the complete candidate that is nearest to the bounds; of equals the earlier one."""
        return min((one for one in candidates if one.complete), key=lambda one: distance(one, self._bounds))


def _precise(base: Candidate, nodes: Sequence[str], to: str, count: int) -> tuple[str, Pipeline]:
    what = "8 bits" if to == "int8" else "float"
    name = f"{count} node{'s' if count > 1 else ''} in {what}"
    return name, keep_precise(base.compress, nodes[:count], to)


def _four_bits(pipeline: Pipeline) -> bool:
    return any(getattr(one, "weights", None) == "int4" or getattr(one, "bits", 8) <= 4 for one in pipeline)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _tuning(run: Run) -> Samples:
    """Return the samples that candidates are compared on."""
    apart = run.held_back is not None and run.given is not run.held_back
    samples = run.held_back if apart else run.context.calibration
    if samples is None:
        return run.samples
    return _spread(samples, _TUNING)


def _spread(samples: Samples, count: int) -> Samples:
    """Return at most `count` of the samples, spread evenly over them."""
    if len(samples) <= count:
        return samples
    places = [(2 * number + 1) * len(samples) // (2 * count) for number in range(count)]
    if isinstance(samples, SampleSet):
        return SampleSet(samples.source, tuple(samples.indices[place] for place in places))
    return [feeds for number, feeds in enumerate(samples) if number in set(places)]
