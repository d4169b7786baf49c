"""The moves of a search: smaller forms, steps of a ladder, nodes of a higher precision, sets of nodes in float."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence

from qgraph.pipeline import Pipeline
from qgraph.plan import Override, override
from qgraph.search_candidates import Candidate
from qgraph.search_edits import before_loss, changed, keep_precise, way_name
from qgraph.search_precision import float_sets
from qgraph.search_ranking import is_luck
from qgraph.search_trials import Trials
from qgraph.targets.base import Step, Target

__all__ = ["Moves", "precise"]

_LEAST_GAIN = 0.1
"""dB that a step must bring to be taken."""
_INTEGER_ACTIVATIONS = ("dynamic-int8", "qdq")


class Moves:
    """Makes candidates from others.

    Args:
        trials: takes them.
        target: has the ladder, and smaller forms.
        overrides: the user's settings, which no step changes.
    """

    def __init__(self, trials: Trials, target: Target, overrides: Sequence[Override]) -> None:
        self._trials = trials
        self._target = target
        self._overrides = overrides

    def ladder(self, base: Candidate) -> Sequence[Step]:
        """Return what may bring a candidate nearer to the source."""
        return self._target.ladder(base.compress)

    def smaller(self, base: Candidate) -> list[tuple[str, Pipeline]]:
        """Return name and compress part of the target's smaller forms."""
        return [(name, override(one, self._overrides)) for name, one in self._target.smaller(base.compress)]

    def changed(self, base: Candidate, change: str) -> Pipeline | None:
        """Return the compress part after a change, written as in `Step`; None where it finds no such pass."""
        pipeline = changed(base.compress, change)
        return None if pipeline is None else override(pipeline, self._overrides)

    def made(self, name: str, compress: Pipeline) -> Candidate:
        """Make, verify and tell of a candidate."""
        (one,) = self._trials.made([(name, compress)])
        self._trials.complete(one)
        self._trials.tell(one)
        return one

    def higher(
        self, base: Candidate, nodes: Sequence[str], to: str, count: int, *, surer: Candidate | None = None
    ) -> Candidate:
        """Make and verify the candidate with the first `count` of the nodes at a higher precision.

        Where it meets the bounds by luck, it is not taken, but `surer` is, or what lies between.
        """
        (one,) = self._trials.made([precise(base, nodes, to, count)])
        self._trials.complete(one)
        if surer is not None and one.met and one.verification is not None:
            close = one.made.closeness, surer.made.closeness
            if is_luck(self._trials.bounds.tolerance, one.verification.samples, *close):
                one.superseded, one.remark = True, "too few samples to be sure"
        self._trials.tell(one)
        return one

    def steps(self, base: Candidate, ladder: Sequence[Step], *, until_met: bool) -> Candidate:
        """Take every step that helps, and return where that leads."""
        for step in ladder:
            best = base
            tried = []
            for one in self._trials.made(self._ways(base, step)):
                tried.append(one)
                if one.made.closeness > max(best.made.closeness, self._trials.closeness(base) + _LEAST_GAIN):
                    best = one
            if best is not base:
                self._trials.complete(best)
            for one in tried:
                if one is not best and not one.made.error:
                    self._leave(one, base)
                self._trials.tell(one)
            base = best
            if until_met and base.met:
                break
        return base

    def _leave(self, one: Candidate, base: Candidate) -> None:
        """Drop a candidate that is not nearer to the source than another."""
        gain = one.made.closeness - self._trials.closeness(base)
        helps = gain > _LEAST_GAIN
        one.remark = f"{gain:+.1f} dB{', less than its alternative' if helps else ''}" if math.isfinite(gain) else ""
        shutil.rmtree(one.made.folder, ignore_errors=True)

    def _ways(self, base: Candidate, step: Step) -> Iterator[tuple[str, Pipeline]]:
        for way in step.ways:
            pipeline = self.changed(base, way)
            if pipeline is not None and not self._trials.knows(pipeline):
                yield way_name(step.name, way, step.ways), pipeline

    def float_sets(self, base: Candidate) -> list[tuple[float, list[str]]]:
        """Return ever larger sets of nodes to keep in float; none for weights alone, whose nodes do not hang together.

        For activations that are quantized at run time, static ones stand in.
        """
        if not any(one.name in _INTEGER_ACTIVATIONS for one in base.compress):
            return []
        return float_sets(*self._trials.compressed(before_loss(base.compress)), base.compress)

    def kept_in_float(self, base: Candidate, nodes: Sequence[str]) -> Candidate:
        """Make and verify the candidate with some nodes in float."""
        name = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} in float"
        return self.made(name, keep_precise(base.compress, nodes, "float"))


def precise(base: Candidate, nodes: Sequence[str], to: str, count: int) -> tuple[str, Pipeline]:
    """Return name and compress part of a candidate with the first `count` of the nodes at a higher precision."""
    what = "8 bits" if to == "int8" else "float"
    name = f"{count} node{'s' if count > 1 else ''} in {what}"
    return name, keep_precise(base.compress, nodes[:count], to)
