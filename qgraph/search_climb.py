"""A search with bounds on accuracy: as little is mended as meets them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qgraph.analysis.quantization_sensitivity import Sensitivities
from qgraph.pipeline import Pipeline
from qgraph.search_candidates import Candidate, loss
from qgraph.search_edits import quantizes
from qgraph.search_moves import Moves, precise
from qgraph.search_precision import wanted_sqnr
from qgraph.search_ranking import (
    between,
    first_count,
    is_far,
    near_enough,
    relevant,
    saves_little,
    worst_nodes,
)
from qgraph.search_trials import Trials

__all__ = ["Climb"]

_TRIM = 4
"""Nodes of a higher precision are trimmed to within this part of their number."""


class Climb:
    """The way up from a first candidate that does not meet the tolerance.

    Args:
        trials: takes the candidates.
        moves: makes them.
    """

    def __init__(self, trials: Trials, moves: Moves) -> None:
        self._trials = trials
        self._moves = moves
        self._tolerance = trials.bounds.tolerance

    def meet_tolerance(self, first: Candidate) -> None:
        """Try until a candidate meets all bounds, or there is nothing more to try."""
        found, _ = self._trials.harm(first)
        if self._fewer_bits_for_some(first, found):
            return
        base = self._moves.steps(first, relevant(self._moves.ladder(first), found), until_met=True)
        if base.met or not quantizes(base.compress):
            return
        if _four_bits(base.compress):
            base = self._precise(base, "int8")
        if not base.met:
            self._in_float(base)

    def _fewer_bits_for_some(self, first: Candidate, found: Sensitivities | None) -> bool:
        """Where 4 bits harm too much for a better rounding to mend it, find the nodes that need 8; tell if few do."""
        by_qdq = any(one.name == "qdq" and getattr(one, "weights", None) == "int4" for one in first.compress)
        if not by_qdq or not math.isfinite(self._trials.closeness(first)):
            return False
        _, elements = self._trials.harm(first)
        nodes = worst_nodes(found, "int8", elements)
        if len(nodes) < 2 or not is_far(self._wanted(), self._trials.closeness(first), math.inf):
            return False
        whole = self._moves.higher(first, nodes, "int8", len(nodes))
        if not whole.met or not is_far(self._wanted(), self._trials.closeness(first), whole.made.closeness):
            return False
        self._trials.worst = nodes
        failing, holding, held = 0, len(nodes), whole
        while not near_enough(nodes, elements, failing, holding):
            middle = between(nodes, elements, failing, holding)
            one = self._moves.higher(first, nodes, "int8", middle, surer=whole)
            if one.met and not one.superseded:
                held.superseded = True  # by the same kernels with less to read
                held, holding = one, middle
            else:
                failing = middle
        return not saves_little(nodes, elements, holding)

    def _wanted(self) -> float | None:
        """Return the SQNR in dB that the bounds ask for; None where they are on other metrics."""
        return self._tolerance.get("sqnr") if len(self._tolerance) == 1 else None

    def _precise(self, base: Candidate, to: str) -> Candidate:
        """Give the worst nodes a higher precision: ever more of them until the bounds are met, then as few as hold."""
        found, elements = self._trials.harm(base)
        nodes = self._trials.worst = worst_nodes(found, to, elements)
        if not nodes:
            return base
        count = min(len(nodes), self._first_count(found, nodes, to))
        counts = [count]
        while count < len(nodes):
            count = min(2 * count, len(nodes))
            counts.append(count)
        failing, best, holding = 0, base, 0
        wanted = (precise(base, nodes, to, count) for count in counts)
        for count, one in zip(counts, self._trials.made(wanted), strict=False):
            self._trials.complete(one)
            self._trials.tell(one)
            best = one if one.complete else best
            if one.met:
                holding = count
                break
            failing = count
        while holding - failing > max(1, holding // _TRIM):
            middle = (holding + failing) // 2
            one = self._moves.higher(base, nodes, to, middle)
            if one.met:
                holding, best = middle, one
            else:
                failing = middle
        return best

    def _in_float(self, base: Candidate) -> None:
        """Keep in float what belongs together: ever more of it until the bounds are met, then as little as holds."""
        sets = self._moves.float_sets(base)
        if not sets:
            self._precise(base, "float")
            return
        self._trials.worst = sets[0][1]
        wanted = self._wanted_in_float()
        place = next((number for number, (goal, _) in enumerate(sets) if goal >= wanted), len(sets) - 1)
        failing, stride = -1, 1
        while not self._moves.kept_in_float(base, sets[place][1]).met:
            failing = place
            if place == len(sets) - 1:
                return
            place, stride = min(place + stride, len(sets) - 1), 2 * stride
        while place - failing > 1:
            middle = (place + failing) // 2
            if self._moves.kept_in_float(base, sets[middle][1]).met:
                place = middle
            else:
                failing = middle

    def _wanted_in_float(self) -> float:
        """Return the predicted SQNR with which to begin."""
        (metric, bound), *others = self._tolerance.items()
        return 0.0 if others else wanted_sqnr(self._losses(metric), loss(metric, bound))

    def _losses(self, metric: str) -> list[tuple[float, float]]:
        """Return SQNR and loss of the candidates that were verified, rising."""
        verified = [one.verification for one in self._trials.candidates if one.verification is not None]
        figures = [(one.figure("sqnr"), one.figure(metric)) for one in verified]
        known = [(sqnr, figure) for sqnr, figure in figures if sqnr is not None and figure is not None]
        return sorted((sqnr, loss(metric, figure)) for sqnr, figure in known)

    def _first_count(self, found: Sensitivities | None, nodes: Sequence[str], to: str) -> int:
        """Return with how many nodes to begin: where one bound is missed, as many as are predicted to meet it."""
        (metric, bound), *others = self._tolerance.items()
        if others:
            return 1
        return first_count(found, nodes, to, self._losses(metric), loss(metric, bound))


def _four_bits(pipeline: Pipeline) -> bool:
    return any(getattr(one, "weights", None) == "int4" or getattr(one, "bits", 8) <= 4 for one in pipeline)
