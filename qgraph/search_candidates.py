"""Candidates of a search: what came of a pipeline, and how far it lies outside the bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from qgraph.bounds import Bounds
from qgraph.building import Built
from qgraph.pipeline import Pipeline
from qgraph.plan import Plan
from qgraph.report.ladder import Rung
from qgraph.runtime.figures import Verification
from qgraph.runtime.tolerances import at_least
from qgraph.search_workshop import Made
from qgraph.targets.base import Session

__all__ = ["Candidate", "Searched", "distance", "loss"]


@dataclasses.dataclass
class Candidate:
    """A pipeline that was tried.

    Attributes:
        name: what it adds.
        compress: the compress part.
        made: what came out.
        bytes: of its files.
        verification: on the verification data; None for candidates that are no nearer to the source than others.
        failures: what it lies outside of.
        speedup: of the source, where it was timed.
        seconds: median latency, where it was timed.
        remark: why it was left out.
        superseded: whether another one is taken in its place: of the same kernels with fewer bytes, or surer.
    """

    name: str
    compress: Pipeline
    made: Made
    bytes: int = 0
    verification: Verification | None = None
    failures: Sequence[str] = ()
    speedup: float | None = None
    seconds: float | None = None
    remark: str = ""
    superseded: bool = False

    @property
    def complete(self) -> bool:
        """Whether it was verified."""
        return self.verification is not None

    @property
    def met(self) -> bool:
        """Whether it is complete and within all bounds."""
        return self.complete and not self.failures

    def rung(self, bounds: Bounds, *, chosen: bool = False) -> Rung:
        """Return its row of the ladder."""
        figures = {}
        if self.verification is not None:
            for metric in dict.fromkeys(("sqnr", *bounds.tolerance)):
                figure = self.verification.figure(metric)
                if figure is not None and math.isfinite(figure):
                    figures[metric] = figure
        return Rung(
            name=self.name,
            pipeline=self.compress.describe(),
            figures=figures,
            bytes=self.bytes or None,
            seconds=self.seconds,
            speedup=self.speedup,
            met=self.met,
            chosen=chosen,
            remark=self.remark,
        )


@dataclasses.dataclass(frozen=True)
class Searched:
    """What a compilation has built, with a search or without.

    Attributes:
        plan: all three parts, as they were chosen.
        built: what was done.
        tested: session and figures, where it was verified already.
        rungs: the ladder; empty without a search.
        tried: what was tried, for a search that did not meet the bounds; ends in a space, or is ''.
        interrupted: whether Ctrl-C ended the search.
    """

    plan: Plan
    built: Built
    tested: tuple[Session, Verification] | None = None
    rungs: Sequence[Rung] = ()
    tried: str = ""
    interrupted: bool = False


def distance(one: Candidate, bounds: Bounds) -> float:
    """Return how far a candidate that was verified lies outside the bounds, in units of these; 0 within."""
    assert one.verification is not None
    size = bounds.budget.get("size", math.inf)
    latency = bounds.budget.get("latency", math.inf)
    total = max(0.0, one.bytes / size - 1) + max(0.0, 1 / (one.speedup or 1.0) / latency - 1)
    if any(output.broken for output in one.verification.outputs):
        return math.inf
    for metric, bound in bounds.tolerance.items():
        figure = one.verification.figure(metric)
        total += 1.0 if figure is None else _miss(metric, figure, bound)
    return total


def _miss(metric: str, figure: float, bound: float) -> float:
    """Return by how much a figure lies outside its bound, in units of the bound."""
    if metric == "cosine":
        return max(0.0, (bound - figure) / max(1 - bound, 1e-6))
    if at_least(metric):
        return max(0.0, (bound - figure) / max(abs(bound), 1.0))
    return max(0.0, (figure - bound) / max(bound, 1e-3))


def loss(metric: str, figure: float) -> float:
    """Return a figure as a loss that falls exponentially with the SQNR in dB, near enough."""
    if metric == "sqnr":
        return 10 ** (-figure / 20)
    return 1 - figure if metric == "cosine" else figure
