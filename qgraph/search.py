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

    whether a step helps           the tuning samples: by a tenth of a dB at least of the worst output's SQNR. These
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
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from qgraph.bounds import Bounds
from qgraph.pipeline import Pipeline
from qgraph.plan import Override, Plan
from qgraph.report.ladder import Rung
from qgraph.search_budget import Filling
from qgraph.search_candidates import Candidate, Searched, distance
from qgraph.search_climb import Climb
from qgraph.search_edits import quantizes
from qgraph.search_moves import Moves
from qgraph.search_trials import Trials
from qgraph.stages import Run
from qgraph.targets.base import Target
from qgraph.work_folder import SCRATCH

__all__ = ["Search", "Searched", "can_climb"]

_SAME_SPEED = 1.05
_TIMED = 8
"""Candidates that are timed beside one another at the end, at most."""
_SECONDS = 0.15
"""For timing one of them."""
_NAMED = 3


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
        self._model = model
        self._plan = plan
        self._bounds = bounds
        self._overrides = overrides
        self._address = executor
        self._observer = observer

    def into(self, stage: Path, work: Path) -> Searched:
        """Search, and put the files of what was chosen into `stage`.

        Args:
            stage: an empty folder.
            work: folder in which the candidates' files can be while it lasts.
        """
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=work) as scratch:
            trials = self._trials(Path(scratch))
            chosen, interrupted = self._climb(trials)
            assert chosen.made.built is not None
            plan, built = dataclasses.replace(self._plan, compress=chosen.compress), chosen.made.built
            if chosen is trials.candidates[0] or chosen.made.exact or interrupted:
                for path in chosen.made.folder.iterdir():
                    shutil.move(path, stage / path.name)
            else:
                built = trials.once_more(chosen, stage)
            as_made = not any(chosen.made.folder.iterdir())
        if as_made and chosen.verification is not None:
            tested = self._run.proof.open_result(stage), chosen.verification
        else:
            tested = self._run.proof.verify(stage, quiet=True)
        rungs = [one.rung(self._bounds, chosen=one is chosen) for one in trials.candidates]
        return Searched(plan, built, tested, rungs, _tried(trials), interrupted)

    def _trials(self, scratch: Path) -> Trials:
        return Trials(
            self._run,
            self._model,
            self._plan.lower or Pipeline(),
            self._bounds,
            scratch,
            executor=self._address,
            observer=self._observer,
        )

    def _climb(self, trials: Trials) -> tuple[Candidate, bool]:
        """Return the candidate to take, and whether Ctrl-C has ended the search.

        It is the fastest that meets all bounds, or the nearest to them.
        """
        first = trials.first(self._plan.compress or Pipeline())
        moves = Moves(trials, self._run.target, self._overrides)
        try:
            if self._bounds.budget:
                Filling(trials, moves).fill_budget(first)
            elif not first.met:
                Climb(trials, moves).meet_tolerance(first)
            return self._choose(trials), False
        except KeyboardInterrupt:
            return self._best(trials.candidates), True
        finally:
            trials.finish()

    def _choose(self, trials: Trials) -> Candidate:
        complete = [one for one in trials.candidates if one.complete]
        trials.finish()
        if len(complete) == 1:
            return complete[0]
        self._time(trials, complete)
        met = [one for one in complete if one.met]
        if self._bounds.budget:
            return max(met, key=lambda one: trials.closeness(one)) if met else self._best(complete)
        if not met:
            return self._best(complete)
        fastest = min(one.seconds or math.inf for one in met if not one.superseded)
        ties = [one for one in met if not one.superseded and (one.seconds or math.inf) <= _SAME_SPEED * fastest]
        return min(ties, key=lambda one: (one.bytes, trials.candidates.index(one)))

    def _time(self, trials: Trials, complete: Sequence[Candidate]) -> None:
        """Time the candidates beside one another: those within the bounds, then the others, the last first."""
        ordered = sorted(complete, key=lambda one: (not one.met, -trials.candidates.index(one)))[:_TIMED]
        sessions = {str(number): self._run.proof.open_result(one.made.folder) for number, one in enumerate(ordered)}
        timed = self._run.proof.time(sessions, seconds=_SECONDS * (len(sessions) + 1))
        if timed is None:
            return
        for number, one in enumerate(ordered):
            one.seconds, one.speedup = timed[str(number)].seconds, timed.ratio("before", str(number))

    def _best(self, candidates: Sequence[Candidate]) -> Candidate:
        """Return the complete candidate that is nearest to the bounds; of equals the earlier one."""
        return min((one for one in candidates if one.complete), key=lambda one: distance(one, self._bounds))


def _tried(trials: Trials) -> str:
    """Return in one line what was tried and how far it got."""
    steps = [f"{one.name}{f' ({one.remark})' if one.remark else ''}" for one in trials.candidates[1:]]
    parts = [f"Tried: {', '.join(steps)}. "] if steps else []
    if trials.worst:
        parts.append(f"Worst: {', '.join(repr(name) for name in trials.worst[:_NAMED])}. ")
    return "".join(parts)
