"""A search with a budget: the most accurate result within it."""

from __future__ import annotations

import math

from qgraph.search_candidates import Candidate
from qgraph.search_moves import Moves
from qgraph.search_ranking import worst_nodes
from qgraph.search_trials import Trials

__all__ = ["Filling"]


class Filling:
    """What fills a budget from a first candidate on.

    Args:
        trials: takes the candidates.
        moves: makes them.
    """

    def __init__(self, trials: Trials, moves: Moves) -> None:
        self._trials = trials
        self._moves = moves
        self._budget = trials.bounds.budget

    def fill_budget(self, first: Candidate) -> None:
        """Take every step that helps, then give as much a higher precision as fits."""
        base = self._smaller(first) if first.bytes > self._budget.get("size", math.inf) else first
        base = self._moves.steps(base, self._moves.ladder(base), until_met=False)
        if "qdq" not in [one.name for one in base.compress]:
            return
        if not self._broken(base):
            self._most_in_float(base)
            return
        four = self._moves.changed(base, "qdq.weights=int4")
        if four is None:
            return
        small = self._moves.made("weights of 4 bits", four)
        if small.made.error or self._broken(small):
            return
        small = self._moves.steps(small, self._moves.ladder(small), until_met=False)
        self._most(small, "int8")

    def _most_in_float(self, base: Candidate) -> None:
        """Keep as much in float as the budget allows, what hurts most first."""
        sets = self._moves.float_sets(base)
        if not sets:
            self._most(base, "float")
            return
        self._trials.worst = sets[0][1]
        holding, breaking = -1, len(sets)
        while breaking - holding > 1:
            middle = (holding + breaking) // 2
            one = self._moves.kept_in_float(base, sets[middle][1])
            if one.made.error or self._broken(one):
                breaking = middle
            else:
                holding = middle

    def _smaller(self, first: Candidate) -> Candidate:
        """Return the first of the target's smaller forms that is within the size, the last one, or what there is."""
        found = first
        for one in self._trials.made(self._moves.smaller(first)):
            self._trials.complete(one)
            self._trials.tell(one)
            if one.complete:
                found = one
                if one.bytes <= self._budget["size"]:
                    break
        return found

    def _most(self, base: Candidate, to: str) -> None:
        """Give as many nodes a higher precision as the budget allows, the worst first."""
        found, elements = self._trials.harm(base)
        nodes = self._trials.worst = worst_nodes(found, to, elements)
        holding, breaking = 0, len(nodes) + 1
        while breaking - holding > 1:
            count = (holding + breaking) // 2 if breaking <= len(nodes) else len(nodes)
            one = self._moves.higher(base, nodes, to, count)
            if one.made.error or self._broken(one):
                breaking = count
            else:
                holding = count

    def _broken(self, one: Candidate) -> list[str]:
        return self._trials.bounds.over_budget(one.bytes, one.speedup)
