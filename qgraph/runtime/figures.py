"""The figures of a comparison of a result with its source, output by output, and what they miss of a tolerance.

`qgraph.runtime.verification` says what each figure is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qgraph.runtime.tolerances import at_least, known

__all__ = ["OutputFigures", "Verification"]

_EPSILON = 1e-9
_TELL = {
    "sqnr": "SQNR is {:.2f} dB, less than {:g}",
    "cosine": "cosine is {:.6g}, less than {:g}",
    "max_abs": "the largest error is {:.4g}, more than {:g}",
    "top1": "top-1 agreement loses {:.2%}, more than {:.2%}",
}


@dataclasses.dataclass(frozen=True)
class OutputFigures:
    """How one output of the result compares with the source's.

    Attributes:
        name: of the output.
        dtype: as the source gives it.
        values: number of values compared.
        sqnr_db: None where it is undefined or the output holds no floats.
        cosine: like it.
        max_abs_error: None for outputs that hold no floats.
        match: share of equal values, for integers and booleans.
        top1_agreement: for outputs that look like class scores: [N, C] or [N, C, 1, ...], or [N, ..., C] where the
            name says `logits` or labels have that shape; C >= 2.
        broken: number of values that are finite in the source and NaN or infinite in the result.
        excluded: number of values left out because one side or both are not finite.
        remark: why the output, or a part of it, was not compared.
    """

    name: str
    dtype: str
    values: int = 0
    sqnr_db: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None
    match: float | None = None
    top1_agreement: float | None = None
    broken: int = 0
    excluded: int = 0
    remark: str = ""

    @property
    def exact(self) -> bool:
        """Whether every value is the same."""
        return not self.remark and not self.broken and (self.sqnr_db == math.inf or self.match == 1.0)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; an infinite SQNR is null, and the largest error beside it 0."""
        return {
            **dataclasses.asdict(self),
            "sqnr_db": None if self.sqnr_db == math.inf else self.sqnr_db,
            "exact": self.exact,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> OutputFigures:
        """Read what `to_json` wrote."""
        values = {field.name: document[field.name] for field in dataclasses.fields(cls)}
        if document["max_abs_error"] == 0:
            values["sqnr_db"] = math.inf
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Verification:
    """The comparison of a result with its source, output by output.

    Attributes:
        samples: number of samples (rows of a batch counted one by one).
        outputs: in the model's order.
        labelled: number of labels that accuracy was measured on.
        accuracy_before: top-1 accuracy of the source, or None without labels.
        accuracy_after: of the result.
        eval_before: what the user's own measure gives for the source, higher being better; None without one.
        eval_after: for the result.
    """

    samples: int
    outputs: tuple[OutputFigures, ...]
    labelled: int = 0
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    eval_before: float | None = None
    eval_after: float | None = None

    @property
    def worst(self) -> OutputFigures | None:
        """The output of the least SQNR, or None where none has one."""
        rated = [output for output in self.outputs if output.sqnr_db is not None]
        return min(rated, key=lambda output: output.sqnr_db or 0.0, default=None)

    def summary(self) -> str:
        """Return one line such as "SQNR 31.2 dB   cosine 0.9993"; of several outputs, the worst."""
        parts: list[str] = []
        worst = self.worst
        if worst is not None and worst.sqnr_db == math.inf:
            parts.append("exact")
        elif worst is not None:
            parts.append(f"SQNR {worst.sqnr_db:.1f} dB")
            if worst.cosine is not None:
                parts.append(f"cosine {worst.cosine:.5f}")
        matches = [output.match for output in self.outputs if output.match is not None]
        if matches and worst is None:
            parts.append(f"{min(matches):.2%} of the values equal")
        if self.accuracy_before is not None and self.accuracy_after is not None:
            parts.append(f"accuracy {self.accuracy_before:.2%} -> {self.accuracy_after:.2%}")
        if self.eval_before is not None and self.eval_after is not None:
            parts.append(f"eval {self.eval_before:g} -> {self.eval_after:g}")
        if len(self.outputs) > 1 and worst is not None and worst.sqnr_db != math.inf:
            parts.append(f"worst output: {worst.name}")
        broken = sum(output.broken for output in self.outputs)
        if broken:
            parts.append(f"{broken} values became NaN or infinite")
        return "   ".join(parts) if parts else "no output can be compared"

    def agreement_told(self) -> str:
        """Return, for bounds on top1, that agreement with the source stands for accuracy where there are no labels."""
        agreements = [one.top1_agreement for one in self.outputs if one.top1_agreement is not None]
        if self.accuracy_before is not None or not agreements:
            return ""
        return f"   top-1 agreement {min(agreements):.2%} (there are no labels for top1: --labels NAME)"

    def figure(self, metric: str) -> float | None:
        """Return what a bound on `metric` is compared with: of several outputs, the worst; None where undefined."""
        if metric == "top1" and self.accuracy_before is not None and self.accuracy_after is not None:
            return self.accuracy_before - self.accuracy_after
        if metric in ("eval", "eval_share"):
            return self._eval_loss(metric)
        figures = [figure for one in self.outputs if (figure := _figure(one, metric)) is not None]
        worst = min if at_least(metric) else max
        return worst(figures, default=None)

    def _eval_loss(self, metric: str) -> float | None:
        if self.eval_before is None or self.eval_after is None:
            return None
        loss = self.eval_before - self.eval_after
        if metric == "eval" or loss <= 0:
            return loss
        return loss / abs(self.eval_before) if self.eval_before else math.inf

    def meets(self, tolerances: Mapping[str, float]) -> list[str]:
        """Return what lies outside the tolerances, one line each; an empty list means that all are met.

        Values that were finite in the source and are not in the result fail whatever the tolerances are. A metric
        that cannot be computed for any output fails too, and so does a result of which no output can be compared at
        all: nothing was proven.

        Args:
            tolerances: metric (see `tolerances.METRICS`) -> bound; `top1` as a fraction.

        Raises:
            UserError: a metric is unknown.
        """
        for metric in tolerances:
            known(metric)
        failures = [
            f"output '{output.name}' has {output.broken} NaN or infinite values that are finite in the source"
            for output in self.outputs
            if output.broken
        ]
        for metric, bound in tolerances.items():
            failures += self._misses(metric, bound)
        if not failures and not any(map(_compared, self.outputs)):
            failures.append("no output holds values that can be compared, so nothing was proven: give other samples")
        return failures

    def _misses(self, metric: str, bound: float) -> list[str]:
        if metric == "top1" and self.accuracy_before is not None and self.accuracy_after is not None:
            loss = self.accuracy_before - self.accuracy_after
            return [] if loss <= bound + _EPSILON else [f"top-1 accuracy loses {loss:.2%}, more than {bound:.2%}"]
        if metric in ("eval", "eval_share"):
            return self._misses_eval(metric, bound)
        compared = [(output.name, output.remark, _figure(output, metric)) for output in self.outputs]
        if all(figure is None for _, _, figure in compared):
            return [f"{metric} cannot be computed for any output"]
        failures = [f"output '{name}': {remark}, so {metric} proves nothing" for name, remark, _ in compared if remark]
        if at_least(metric):
            failures += [
                f"{metric} of output '{output.name}' is undefined: the source gives zeros only"
                for output in self.outputs
                if output.max_abs_error is not None and _figure(output, metric) is None
            ]
        failures += [
            f"{_TELL[metric].format(figure, bound)} (output '{name}')"
            for name, _, figure in compared
            if figure is not None and not _inside(metric, figure, bound)
        ]
        return failures

    def _misses_eval(self, metric: str, bound: float) -> list[str]:
        loss = self._eval_loss(metric)
        if loss is None:
            return ["eval was not measured: pass --eval MODULE:FUNCTION"]
        told = f"eval loses {loss:.2%}, more than {bound:.2%}" if metric == "eval_share" else None
        return [] if loss <= bound + _EPSILON else [told or f"eval loses {loss:.6g}, more than {bound:g}"]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, all finite."""
        return {**dataclasses.asdict(self), "outputs": [output.to_json() for output in self.outputs]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Verification:
        """Read what `to_json` wrote; other keys are left alone."""
        names = [field.name for field in dataclasses.fields(cls)]
        values: dict[str, Any] = {
            name: document.get(name) if name.startswith("eval") else document[name] for name in names
        }
        return cls(**{**values, "outputs": tuple(OutputFigures.from_json(one) for one in document["outputs"])})


def _figure(output: OutputFigures, metric: str) -> float | None:
    agreement = output.top1_agreement
    figures = {
        "sqnr": output.sqnr_db,
        "cosine": output.cosine,
        "max_abs": output.max_abs_error,
        "top1": None if agreement is None else 1 - agreement,
    }
    return figures[metric]


def _compared(output: OutputFigures) -> bool:
    return not (output.sqnr_db is None and output.max_abs_error is None and output.match is None)


def _inside(metric: str, figure: float, bound: float) -> bool:
    return figure >= bound if at_least(metric) else figure <= bound + _EPSILON
