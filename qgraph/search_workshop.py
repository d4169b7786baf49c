"""Where the candidates of a search are made: what they share is made once.

    prepared model --> [pass, pass, ...] --> lower --> files --> runs on the tuning samples
                   shared by candidates that begin alike      compared with the source's outputs

Candidates are pipelines over the same prepared model. States of the model behind common beginnings are kept, and so are
the ranges of activations, by the passes that have changed a value before they were taken: a mark on a node, or another
set of nodes to quantize, does not make them wrong. A workshop pickles as its `Workplace`, so that workers have their
own; ranges travel between them with jobs and results.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qgraph import building
from qgraph.analysis.calibration import Calibration, Range, calibrate
from qgraph.beginnings import Beginning
from qgraph.building import Built
from qgraph.errors import UserError
from qgraph.numerics.schemes import UINT8, Scheme
from qgraph.pipeline import Context, Pass, PassError, Pipeline, Report, Samples
from qgraph.runtime.figures import Verification
from qgraph.runtime.verification import verify
from qgraph.sharing import joined
from qgraph.targets.base import Session, Target

__all__ = ["Job", "Made", "Ranges", "SharingContext", "Workplace", "Workshop", "closeness"]

_STATES = 6
"""States of the model that are kept; they share their weights."""

RangeKey = tuple[Any, ...]


class Ranges:
    """Ranges of activations by what they depend on: the passes before, the method, the scheme, the tensor."""

    def __init__(self) -> None:
        self.known: dict[RangeKey, Range | str] = {}
        self._calls: set[RangeKey] = set()
        self.fresh: dict[RangeKey, Range | str] = {}

    def update(self, others: Mapping[RangeKey, Range | str]) -> None:
        """Take over what another workshop has found."""
        self.known.update(others)

    def take_fresh(self) -> dict[RangeKey, Range | str]:
        """Return what was found since the last call."""
        fresh, self.fresh = self.fresh, {}
        return fresh

    def calibrate(
        self,
        values: tuple[str, ...],
        model: ir.Model,
        context: Context,
        tensors: tuple[str, ...],
        method: str = "minmax",
        scheme: Scheme = UINT8,
        per_channel: tuple[tuple[str, int], ...] = (),
    ) -> tuple[Calibration, bool]:
        """Return what `qgraph.analysis.calibration.calibrate` does, running the model for unknown tensors only.

        Also returns whether one call alone has given it: runtimes fuse other nodes when other tensors are watched, and
        then the last bits may differ.

        Args:
            values: the passes that have changed values so far.
            model: see there, as for the others.
            context: see there.
            tensors: see there.
            method: see there.
            scheme: see there.
            per_channel: see there.
        """
        axes = dict(per_channel)
        call = (values, method, scheme, tensors, per_channel)
        keys = {name: (values, method, scheme, name, axes.get(name)) for name in dict.fromkeys((*tensors, *axes))}
        missing = tuple(name for name, key in keys.items() if key not in self.known)
        if len(missing) == len(keys):
            self._calls.add(call)
        if missing:
            wanted = tuple((name, axis) for name, axis in per_channel if name in missing)
            found = calibrate(model, context, missing, method, scheme, wanted)
            fresh = {keys[name]: found[name] if name in found else found.unavailable[name] for name in missing}
            self.known.update(fresh)
            self.fresh.update(fresh)
        all_of_them = {name: self.known[key] for name, key in keys.items()}
        found_all = Calibration(
            {name: one for name, one in all_of_them.items() if isinstance(one, Range)},
            {name: one for name, one in all_of_them.items() if isinstance(one, str)},
        )
        return found_all, call in self._calls


@dataclasses.dataclass
class SharingContext(Context):
    """A context whose ranges are those of all candidates."""

    ranges: Ranges = dataclasses.field(default_factory=Ranges)
    values: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    exact: bool = True

    def analyse(self, analysis: Callable[..., Any], model: ir.Model, *arguments: Any) -> Any:
        """Return the analysis, ranges from those of all candidates."""
        if analysis is calibrate:
            found, exact = self.ranges.calibrate(self.values, model, self, *arguments)
            self.exact = self.exact and exact
            return found
        return super().analyse(analysis, model, *arguments)

    def follow(self, one: Pass) -> None:
        """Note that a pass has changed the model. What marks it has made tells in the next pass that changes values."""
        if calibrate in one.preserves:
            self.marks = (*self.marks, repr(one))
        else:
            self.values, self.marks = (*self.values, *self.marks, repr(one)), ()


@dataclasses.dataclass(frozen=True)
class Job:
    """A candidate to make.

    Attributes:
        name: what it is, for people.
        compress: its compress part; as text where it goes to another process.
        folder: where its files go; is made.
        ranges: what other workshops have found since the last job.
    """

    name: str
    compress: Pipeline | str
    folder: Path
    ranges: Mapping[RangeKey, Range | str] = dataclasses.field(default_factory=dict)

    @property
    def pipeline(self) -> Pipeline:
        """The compress part."""
        return Pipeline.parse(self.compress) if isinstance(self.compress, str) else self.compress


@dataclasses.dataclass(frozen=True)
class Made:
    """A candidate that was made, or why it could not be.

    Attributes:
        folder: of its files.
        built: what was done to it.
        closeness: to the source, on the tuning samples, in dB (see `closeness`).
        seconds: that making and running it took.
        error: why there is no such candidate; '' where there is one.
        exact: whether it is to the byte what its pipeline makes on its own.
        ranges: found on the way.
        files: name -> bytes, where the folder is on another machine.
    """

    folder: Path
    built: Built | None = None
    closeness: float = -math.inf
    seconds: float = 0.0
    error: str = ""
    exact: bool = False
    ranges: Mapping[RangeKey, Range | str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] | None = None


@dataclasses.dataclass(frozen=True)
class Workplace:
    """What candidates are made of.

    Attributes:
        model: the prepared model.
        target: for which they are.
        lower: the lower part.
        context: seed, threads, memory bound, and the calibration samples.
        tuning: samples that candidates are compared on.
        source: gives the source's outputs for `tuning`.
    """

    model: ir.Model
    target: Target
    lower: Pipeline
    context: Context
    tuning: Samples
    source: Session


@dataclasses.dataclass(frozen=True)
class _State:
    """The model behind the first passes of a pipeline."""

    model: ir.Model
    reports: tuple[Report, ...]
    reference: ir.Model | None
    values: tuple[str, ...]
    marks: tuple[str, ...]
    exact: bool
    promises: tuple[Callable[[ir.Model], str | None], ...]


class Workshop:
    """Makes candidates one after the other.

    Args:
        place: what they are made of.
        beginning: where the prepared model stands among what compilations share; None shares nothing with them.
    """

    def __init__(self, place: Workplace, beginning: Beginning | None = None) -> None:
        self.place = place
        self._beginning = beginning
        self.ranges = Ranges()
        self._progress = place.context.progress
        self._states: OrderedDict[tuple[Pass, ...], _State] = OrderedDict()

    def quiet(self) -> None:
        """Tell nobody how far a pass is, from now on."""
        self._progress = Context().progress

    def make(self, job: Job) -> Made:
        """Make a candidate and compare it with the source."""
        started = time.perf_counter()
        self.ranges.update(job.ranges)
        try:
            built, context = self.build(job.pipeline, job.folder)
            close = self.compare(job.folder)
        except (UserError, PassError) as error:
            return Made(job.folder, error=" ".join(str(error).split()), ranges=self.ranges.take_fresh())
        fresh = self.ranges.take_fresh()
        return Made(job.folder, built, close, time.perf_counter() - started, exact=context.exact, ranges=fresh)

    def build(
        self, pipeline: Pipeline, folder: Path, *, told: Callable[[Report], None] | None = None
    ) -> tuple[Built, SharingContext]:
        """Make a candidate, and return what was done and the context after its passes.

        Args:
            pipeline: its compress part.
            folder: where its files go; is made if need be.
            told: called with the report of every pass of the compress part.

        Raises:
            UserError: the model, an option or the target refuses it.
            PassError: a pass is at fault.
        """
        model, context, report = self.compress(pipeline, told=told)
        folder.mkdir(parents=True, exist_ok=True)
        lowered = self.place.lower.run(model, context=context)
        return building.write(model, self.place.target, report, lowered, folder), context

    def compare(self, folder: Path) -> float:
        """Run a candidate on the tuning samples, and return its closeness to the source."""
        session = self.place.target.session(folder, threads=self.place.context.threads)
        return closeness(verify(self.place.source, session, self.place.tuning))

    def compress(
        self, pipeline: Pipeline, *, told: Callable[[Report], None] | None = None
    ) -> tuple[ir.Model, SharingContext, Report]:
        """Return the compressed model, the context after its passes, and the report of the compress part."""
        known, state = self._longest(pipeline)
        model = state.model.clone()
        context = SharingContext(
            **{
                field.name: getattr(self.place.context, field.name)
                for field in dataclasses.fields(Context)
                if field.init and not field.name.startswith("_")
            },
            ranges=self.ranges,
        )
        context.progress = self._progress
        context.reference, context.exact = state.reference, state.exact
        context.values, context.marks = state.values, state.marks
        context.promises = list(state.promises)
        reports = list(state.reports)
        rest = pipeline.passes[known:]

        def after(report: Report) -> None:
            one = rest[len(reports) - known]
            reports.append(report)
            if report.changed:
                context.follow(one)
            kept = _State(
                model.clone(),
                tuple(reports),
                context.reference,
                context.values,
                context.marks,
                context.exact,
                tuple(context.promises),
            )
            self._keep(pipeline.passes[: len(reports)], kept)
            if self._beginning is not None and context.exact:
                self._beginning.keep(pipeline.passes[: len(reports)], model, context, reports)
            if told is not None:
                told(report)

        for report in reports:
            if told is not None:
                told(report)
        if not rest:
            summed = Pipeline().run(model, context=context)
        else:
            summed = Pipeline(rest).run(model, context=context, after_pass=after)
        return model, context, joined(summed, reports)

    def _longest(self, pipeline: Pipeline) -> tuple[int, _State]:
        """Return how many passes of the pipeline have run already, here or elsewhere, and the model behind them."""
        context = self.place.context
        known, state = (
            0,
            _State(self.place.model, (), context.reference, (), (), exact=True, promises=tuple(context.promises)),
        )
        for count in range(len(pipeline), 0, -1):
            kept = self._states.get(pipeline.passes[:count])
            if kept is not None:
                self._states.move_to_end(pipeline.passes[:count])
                known, state = count, kept
                break
        found = None if self._beginning is None else self._beginning.find(pipeline.passes, known)
        if found is None:
            return known, state
        count, shared = found
        followed = SharingContext()
        for one, report in zip(pipeline.passes, shared.reports, strict=False):
            if report.changed:
                followed.follow(one)
        return count, _State(
            shared.model,
            shared.reports,
            shared.reference,
            followed.values,
            followed.marks,
            exact=True,
            promises=shared.promises,
        )

    def _keep(self, passes: tuple[Pass, ...], state: _State) -> None:
        self._states[passes] = state
        while len(self._states) > _STATES:
            self._states.popitem(last=False)


def closeness(verification: Verification) -> float:
    """Return how near a result is to its source, in dB: the SQNR of its worst output.

    Where no output holds floats, the share of equal values stands for the signal. Infinite where all is equal, negative
    infinity where values have become NaN or infinite.
    """
    if any(one.broken for one in verification.outputs):
        return -math.inf
    worst = verification.worst
    if worst is not None and worst.sqnr_db is not None:
        return worst.sqnr_db
    matches = [one.match for one in verification.outputs if one.match is not None]
    if not matches:
        return -math.inf
    return math.inf if min(matches) >= 1 else -10 * math.log10(1 - min(matches))
