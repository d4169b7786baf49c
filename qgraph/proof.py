"""The proof that results behave like their source: both run on the same samples, and are timed beside one another.

A source with too many weights for the memory runs in slices, and so does such a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.sliced_session import SlicedSession
from qgraph.loading import Loaded
from qgraph.pipeline import Context, Samples
from qgraph.runtime.benchmark import Benchmark, compare
from qgraph.runtime.figures import Verification
from qgraph.runtime.recorded import Recorded
from qgraph.runtime.session import input_signature, open_session, random_feeds
from qgraph.runtime.user_metric import UserMetric
from qgraph.runtime.verification import refuse_unmeasurable
from qgraph.runtime.verification import verify as verify_sessions
from qgraph.sharing import Sharing
from qgraph.targets.base import Session, Target

__all__ = ["RANDOM_SAMPLES", "Proof"]

RANDOM_SAMPLES = 4
BENCH_SECONDS = 0.4
BENCH_FEEDS = 4
_WHOLE = 2
"""A model with weights of more than this part of the memory for calibration is compared in slices..."""
_SLICE = 16
"""... of this part of it."""
_RECORDED = 4
"""The source's outputs are kept up to this part of that memory."""


class Proof:
    """A source that is open, and what its results are compared with it on.

    Attributes:
        before: the source's session.
        samples: to verify on.
        sliced: whether the source runs in slices, for its size.

    Args:
        loaded: the source and its data.
        target: opens the results.
        context: seed, threads, memory bound and progress.
        metric: the user's own, or None.
        sharing: compilations of the same source, or None.
        root: key of the source among them.
    """

    def __init__(
        self,
        loaded: Loaded,
        target: Target,
        context: Context,
        metric: UserMetric | None = None,
        sharing: Sharing | None = None,
        root: str = "",
    ) -> None:
        self._loaded = loaded
        self._target = target
        self._context = context
        self._metric = metric
        self._sharing = sharing
        self._root = root
        self.sliced = self._in_slices(loaded.weight_bytes)
        self.before: Any
        self.samples: Samples
        self.before, self.samples = self._opened_in_slices() if self.sliced else self._opened()

    def _in_slices(self, weight_bytes: int) -> bool:
        return weight_bytes > self._context.calibration_memory // _WHOLE

    def _slices(self, model: ir.Model, samples: Samples) -> SlicedSession:
        return SlicedSession(model, samples, self._context, room=self._context.calibration_memory // _SLICE)

    def _opened_in_slices(self) -> tuple[SlicedSession, Samples]:
        model = qgraph.ir.load(self._loaded.path)
        samples = self._verification_samples(self._slices(model, ()))
        return self._slices(model, samples), samples

    def _opened(self) -> tuple[Any, Samples]:
        """Return the source's session and the samples; where compilations share them, its outputs are recorded."""
        path = self._loaded.path

        def open_it() -> tuple[Any, Samples]:
            session = open_session(path, threads=self._context.threads)
            samples = self._verification_samples(session)
            if self._sharing is None:
                return session, samples
            return self._sharing.recorded(self._root, samples, self._recording(session, samples)), samples

        if self._sharing is None:
            return open_it()
        key = ("source", path, self._sharing.token(self._loaded.given), self._root)
        found: tuple[Any, Samples] = self._sharing.once(key, open_it)
        return found

    def _verification_samples(self, session: Any) -> Samples:
        loaded = self._loaded
        if loaded.given is not None:
            return loaded.given
        inputs = input_signature(session)
        return random_feeds(inputs, self._context.seed, loaded.shapes, count=RANDOM_SAMPLES, limits=loaded.limits)

    def _recording(self, session: Any, samples: Samples) -> Recorded:
        return Recorded(session, len(samples), self._context.calibration_memory // _RECORDED)

    @property
    def source(self) -> Any:
        """The source's session, which runs whenever it is asked."""
        return self.before.session if isinstance(self.before, Recorded) else self.before

    def record(self) -> None:
        """Keep the source's outputs from its next run on, so that it runs once however many results are compared."""
        if not isinstance(self.before, Recorded):
            self.before = self._recording(self.before, self.samples)

    def refuse_unmeasurable(self, tolerance: Mapping[str, float]) -> None:
        """Raise a UserError for a bound on a metric that the source's outputs do not have."""
        bounds = {metric: bound for metric, bound in tolerance.items() if not metric.startswith("eval")}
        if bounds and not self.sliced:
            feeds = next(iter(self.samples))
            refuse_unmeasurable(bounds, self.before, feeds, labelled=self._loaded.labels is not None)

    def open_result(self, folder: Path) -> Session:
        """Open a result's files, in slices where both it and the source have too many weights."""
        result = folder / "model.onnx"
        if self.sliced and result.is_file():
            model = qgraph.ir.load(result)
            if self._in_slices(qgraph.ir.weight_bytes(model)):
                return self._slices(model, self.samples)
        return self._target.session(folder, threads=self._context.threads)

    def verify(self, folder: Path, *, quiet: bool = False) -> tuple[Session, Verification]:
        """Run source and result on the verification samples; `quiet` tells nobody how far it is."""
        after = self.open_result(folder)
        progress = None if quiet else self._context.progress
        verification = verify_sessions(self.before, after, self.samples, labels=self._loaded.labels, progress=progress)
        if self._sharing is not None and isinstance(self.before, Recorded):
            self._sharing.keep_outputs(self._root, self.samples, self.before)
        if self._metric is not None:
            figures = self._metric.source(self.before), self._metric(after)
            verification = dataclasses.replace(verification, eval_before=figures[0], eval_after=figures[1])
        return after, verification

    def release(self) -> None:
        """Let go of the source's session, unless compilations share it: nothing is compared with it any more."""
        if self._sharing is None:
            self.before = None

    def time(self, sessions: Mapping[str, Session], *, seconds: float = BENCH_SECONDS) -> Benchmark | None:
        """Time sessions beside the source; None where that says nothing of the target."""
        if self.sliced or self._target.stand_in():
            return None
        feeds = [feeds for _, feeds in zip(range(BENCH_FEEDS), self.samples, strict=False)]
        return compare({"before": self.source, **sessions}, feeds, seconds=seconds, threads=self._context.threads)
