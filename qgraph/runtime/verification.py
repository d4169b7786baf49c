"""Proof that a result behaves like its source: both run on the same samples, and every output is compared.

With s the source's values of an output and r the result's, over all samples together:

    SQNR       10 log10( sum s^2 / sum (s - r)^2 ) in dB: infinite where they are equal, undefined where s is all zero
    cosine     sum s r / sqrt( sum s^2 * sum r^2 ): 1 where they are equal, undefined where s or r is all zero
    max error  max |s - r|
    top-1      share of samples whose largest score is of the same class (ties: the first class)
    match      share of equal values, for outputs of integers and booleans
    accuracy   share of labelled samples whose largest score is that of the label, for the source and for the result

Where a feed has a mask [batch, positions], what an output [batch, positions, ...] holds at masked positions is padding
that nobody reads, and stays out.

Samples stream through: nothing is kept but sums, in float64. Values that are not finite stay out of the sums and are
counted. Figures are rounded to few digits, so that the same build gives the same manifest on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qgraph.errors import UserError
from qgraph.pipeline import Feeds, PassError, Progress, Samples
from qgraph.runtime.figures import OutputFigures, Verification
from qgraph.runtime.metrics import ErrorSums, round_figure
from qgraph.runtime.recorded import Recorded
from qgraph.runtime.session import first_line
from qgraph.targets.base import Session

__all__ = ["refuse_unmeasurable", "verify"]


def refuse_unmeasurable(metrics: Iterable[str], source: Session, feeds: Feeds, *, labelled: bool) -> None:
    """Raise a UserError for a metric that the outputs of `source`, run on one feed, do not have.

    Args:
        metrics: as in `tolerances.METRICS`, without those of the user's own measure.
        source: the model as it was given.
        feeds: a sample.
        labelled: whether there are labels; what they are for is then settled by `verify`.
    """
    outputs = _run_source(source, feeds, 0)
    names = _output_names(source, len(outputs))
    told = ", ".join(f"'{name}' {_described(one)}" for name, one in zip(names, outputs, strict=True))
    arrays = [(name, one) for name, one in zip(names, outputs, strict=True) if isinstance(one, np.ndarray)]
    has_floats = any(one.dtype.kind not in "biuOSU" for _, one in arrays)
    has_scores = any(
        one.dtype.kind not in "biuOSU" and _class_axis(one.shape, name, None) is not None for name, one in arrays
    )
    for metric in metrics:
        if metric == "top1" and not has_scores and not labelled:
            raise UserError(
                f"tolerance top1: no output looks like class scores [N, classes] (there are: {told}), and there are no "
                "labels: name them with --labels NAME, give --verify-data with labels, or bound sqnr or cosine"
            )
        if metric != "top1" and not has_floats:
            raise UserError(
                f"tolerance {metric}: the model has no output of floats (there are: {told}). "
                "Measure what counts with --eval MODULE:FUNCTION and --tolerance eval=VALUE."
            )


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else _kind(value)


def verify(
    source: Session,
    result: Session,
    samples: Samples,
    *,
    labels: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Run source and result on the same samples and compare every output.

    Args:
        source: the model as it was given.
        result: the compiled model, with the same inputs and outputs.
        samples: feeds; each may hold a batch along the first axis.
        labels: integer class indices [total rows], or [total rows, ...] for scores [rows, ..., C]; negative ones are
            ignored.
        progress: called as `progress("verify", done, total)`.

    Raises:
        UserError: there are no samples, the source refuses one, or the labels do not fit.
        PassError: the result refuses a sample that the source runs, or has other outputs.
    """
    total = len(samples)
    if not total:
        raise UserError("there are no samples to verify on: give more calibration samples, or data of its own")
    if labels is not None:
        labels = _checked_labels(labels)
    if isinstance(source, Recorded):
        source.restart()
    comparisons: list[_Comparison] = []
    rows = 0
    for number, feeds in enumerate(samples):
        before = _run_source(source, feeds, number)
        after = _run_result(result, feeds, number)
        if not comparisons:
            comparisons = [_Comparison(name) for name in _output_names(source, len(before))]
        if len(after) != len(before):
            raise PassError(f"the compiled model has {len(after)} outputs, its source {len(before)}")
        batch = _rows(feeds, before)
        piece = None if labels is None else labels[rows : rows + batch]
        kept = _kept_positions(feeds)
        for comparison, one, other in zip(comparisons, before, after, strict=True):
            comparison.add(one, other, piece, kept)
        rows += batch
        if progress is not None:
            progress("verify", number + 1, total)
    scored = None if labels is None else _scored(labels, rows, comparisons)
    return Verification(
        samples=rows,
        outputs=tuple(comparison.figures() for comparison in comparisons),
        labelled=scored.labelled if scored else 0,
        accuracy_before=round_figure(scored.right_before / scored.labelled, 6) if scored else None,
        accuracy_after=round_figure(scored.right_after / scored.labelled, 6) if scored else None,
    )


def _run_source(session: Session, feeds: Feeds, number: int) -> list[Any]:
    try:
        return session.run(None, feeds)
    except (MemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"the model cannot run sample {number}: {first_line(error)}") from error


def _run_result(session: Session, feeds: Feeds, number: int) -> list[Any]:
    try:
        return session.run(None, feeds)
    except (MemoryError, UserError):
        raise
    except Exception as error:
        raise PassError(
            f"the compiled model fails on sample {number}, which its source runs: {first_line(error)}"
        ) from (error)


def _output_names(session: Session, count: int) -> list[str]:
    get_outputs = getattr(session, "get_outputs", None)
    return [str(one.name) for one in get_outputs()] if get_outputs else [f"output {i}" for i in range(count)]


def _rows(feeds: Feeds, outputs: Sequence[Any]) -> int:
    """Return the number of samples in a feed: the outputs' common first axis, where an input has it too, else 1."""
    inputs = {array.shape[0] for array in feeds.values() if array.ndim}
    firsts = [value.shape[0] for value in outputs if isinstance(value, np.ndarray) and value.ndim]
    return int(firsts[0]) if firsts and firsts[0] in inputs else 1


def _checked_labels(labels: np.ndarray) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer) or not labels.ndim:
        raise UserError(f"labels must be class indices in an integer array, not {labels.dtype} of shape {labels.shape}")
    return labels.astype(np.int64)


def _scored(labels: np.ndarray, rows: int, comparisons: Sequence[_Comparison]) -> _Comparison | None:
    """Return the output that the labels are for; None when every label is negative."""
    if len(labels) != rows:
        raise UserError(f"there are {len(labels)} labels for {rows} samples")
    wanted = int(np.sum(labels >= 0))
    if not wanted:
        return None
    for comparison in comparisons:
        if comparison.labelled == wanted:
            return comparison
    shapes = ", ".join(f"'{one.name}' {list(one.shape)}" for one in comparisons)
    raise UserError(
        f"no output holds class scores for the labels, which are of shape {list(labels.shape)} and go up to "
        f"{labels.max()} (there are: {shapes})"
    )


def _kept_positions(feeds: Feeds) -> np.ndarray | None:
    """Return where the mask [batch, positions] of a feed is not zero, or None where the feed has no such input."""
    masks = [
        array
        for name, array in feeds.items()
        if "mask" in name.lower() and array.ndim == 2 and array.dtype.kind in "biu"
    ]
    return masks[0] != 0 if len(masks) == 1 else None


class _Comparison:
    """The running comparison of one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = ""
        self.shape: tuple[int, ...] = ()
        self.sums = ErrorSums()
        self.compared = self.equal = 0
        self.classified = self.agreed = 0
        self.labelled = self.right_before = self.right_after = 0
        self.remarks: dict[str, int] = {}

    def add(self, source: Any, result: Any, labels: np.ndarray | None, kept: np.ndarray | None = None) -> None:
        """Take in the output of one feed.

        Args:
            source: what the source gives.
            result: what the result gives.
            labels: those of its rows.
            kept: [batch, positions], true where a position of the feed is not padding.
        """
        if not isinstance(source, np.ndarray) or not isinstance(result, np.ndarray):
            self.dtype = type(source).__name__
            self._remark(f"not compared: {_kind(source)}")
            return
        self.dtype, self.shape = str(source.dtype), source.shape
        if source.dtype.kind in "OSU":
            self._remark("not compared: text")
            return
        if source.shape != result.shape:
            self._remark(f"shapes differ ({list(source.shape)} and {list(result.shape)})")
            return
        if source.dtype.kind in "biu":
            self.compared += source.size
            self.equal += int(np.sum(source == result))
            return
        if kept is not None and source.ndim >= 3 and source.shape[:2] == kept.shape:
            self.sums.add(source[kept], result[kept])
        else:
            self.sums.add(source, result)
        self._classify(source, result, labels)

    def _remark(self, text: str) -> None:
        self.remarks[text] = self.remarks.get(text, 0) + 1

    def _classify(self, source: np.ndarray, result: np.ndarray, labels: np.ndarray | None) -> None:
        axis = _class_axis(source.shape, self.name, labels)
        if axis is None:
            return
        before, after = np.argmax(source, axis=axis), np.argmax(result, axis=axis)
        self.classified += before.size
        self.agreed += int(np.sum(before == after))
        if labels is None:
            return
        if labels.size == before.size and labels.max(initial=-1) < source.shape[axis]:
            wanted = labels.reshape(before.shape)
            known = wanted >= 0
            self.labelled += int(known.sum())
            self.right_before += int(np.sum((before == wanted) & known))
            self.right_after += int(np.sum((after == wanted) & known))

    def figures(self) -> OutputFigures:
        sums = self.sums
        has_floats = sums.values > sums.excluded
        return OutputFigures(
            name=self.name,
            dtype=self.dtype,
            values=sums.values + self.compared,
            sqnr_db=sums.sqnr_db,
            cosine=sums.cosine,
            max_abs_error=round_figure(sums.max_abs, 4) if has_floats else None,
            match=round_figure(self.equal / self.compared, 6) if self.compared else None,
            top1_agreement=round_figure(self.agreed / self.classified, 6) if self.classified else None,
            broken=sums.broken,
            excluded=sums.excluded,
            remark="; ".join(
                f"{text}" if count == 1 or text.startswith("not") else f"{text}, {count} times"
                for text, count in list(self.remarks.items())[:2]
            ),
        )


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a sequence"
    return "a map" if isinstance(value, dict) else type(value).__name__


def _class_axis(shape: tuple[int, ...], name: str, labels: np.ndarray | None) -> int | None:
    if len(shape) >= 2 and shape[1] >= 2 and all(size == 1 for size in shape[2:]):
        return 1
    if len(shape) < 3 or shape[-1] < 2:
        return None
    fits = labels is not None and labels.shape == shape[:-1]
    return len(shape) - 1 if fits or "logits" in name.lower() else None
