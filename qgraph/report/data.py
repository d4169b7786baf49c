"""What a report shows, as plain data: the page and the tables can be made again from it at any time."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qgraph import spec
from qgraph.pipeline import Report
from qgraph.report import units
from qgraph.report.ladder import Rung
from qgraph.report.layers import LayerFacts
from qgraph.runtime.benchmark import Benchmark
from qgraph.runtime.figures import OutputFigures, Verification

__all__ = ["Comparison", "PassFacts", "ReportData", "comparisons", "deployable_bytes", "target_text"]

_FOOTPRINT = {"flash": ("flash", "constants of the C code"), "ram": ("RAM", "activations of the C code")}
_PACKAGE = ".mlpackage/"
_NOT_DEPLOYED = frozenset({"recipe.toml"})


@dataclasses.dataclass(frozen=True)
class PassFacts:
    """One pass, as it ran."""

    part: str
    name: str
    nodes_before: int
    nodes_after: int
    changed: int
    skipped: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A line of the before/after table.

    Attributes:
        label: what is compared.
        before: figure of the source, as text.
        after: figure of the result, as text.
        change: in words, such as "4.0x smaller"; may be empty.
        remark: how it was taken; may be empty.
        share: after / before as a number where a bar can show it, else None.
        good: whether the change is for the better (True), for the worse (False) or neither (None).
    """

    label: str
    before: str
    after: str
    change: str = ""
    remark: str = ""
    share: float | None = None
    good: bool | None = None


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything that report.html shows; JSON values only.

    Attributes:
        manifest: the artifact's manifest.
        bench: the content of bench.json, or None where nothing was timed.
        passes: as they ran.
        seconds: that the whole compilation took, or None where it is not known.
        recipe: the text of recipe.toml.
        command: that makes the artifact again.
        layers: errors layer by layer, and histograms of the worst.
        search: the candidates of a search, in the order in which they were tried.
    """

    manifest: Mapping[str, Any]
    bench: Mapping[str, Any] | None = None
    passes: tuple[PassFacts, ...] = ()
    seconds: float | None = None
    recipe: str = ""
    command: str = ""
    layers: LayerFacts = dataclasses.field(default_factory=LayerFacts)
    search: tuple[Rung, ...] = ()

    @classmethod
    def build(
        cls,
        manifest: Mapping[str, Any],
        bench: Mapping[str, Any] | None,
        reports: Mapping[str, Report],
        *,
        seconds: float | None = None,
        recipe: Path | None = None,
        command: str = "",
        layers: LayerFacts | None = None,
        search: Sequence[Rung] | None = None,
    ) -> ReportData:
        """Gather the data.

        Args:
            manifest: as written.
            bench: as written, or None.
            reports: part of the pipeline -> its report.
            seconds: of the whole compilation.
            recipe: the recipe's file.
            command: that makes the artifact again; made up from the manifest when empty.
            layers: errors layer by layer; none were taken when None.
            search: the candidates of a search; when None, those that `bench` tells of.
        """
        passes = tuple(
            PassFacts(
                part=part,
                name=one.name,
                nodes_before=one.nodes_before,
                nodes_after=one.nodes_after,
                changed=one.changed,
                skipped=len(one.skipped),
                seconds=one.seconds,
                notes=tuple(one.notes),
            )
            for part, report in reports.items()
            for one in report.parts
        )
        text = recipe.read_text(encoding="utf-8") if recipe is not None else ""
        if search is None:
            search = tuple(Rung.from_json(one) for one in (bench or {}).get("search", ()))
        again = command or _command(manifest)
        return cls(manifest, bench, passes, seconds, text, again, layers or LayerFacts(), tuple(search))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ReportData:
        """Read what `to_json` wrote."""
        values = {field.name: document[field.name] for field in dataclasses.fields(cls)}
        passes = tuple(PassFacts(**{**one, "notes": tuple(one["notes"])}) for one in document["passes"])
        layers = LayerFacts.from_json(document["layers"])
        search = tuple(Rung.from_json(one) for one in document["search"])
        return cls(**{**values, "passes": passes, "layers": layers, "search": search})


def target_text(manifest: Mapping[str, Any]) -> str:
    """Return the target of an artifact as the command line takes it, with the options that it was given."""
    return spec.format_specs([spec.Spec(str(manifest["target"]), manifest.get("target_options", {}))])


def _command(manifest: Mapping[str, Any]) -> str:
    parts = ["qgraph", "compile", str(manifest["source"]["name"]), "--target", target_text(manifest)]
    if "held-back" in str(manifest.get("verification", {}).get("data", "")):
        parts += ["--calib", "DATA"]
    parts += ["--recipe", "recipe.toml", "--seed", str(manifest.get("seed", 0))]
    for name, sizes in manifest.get("shapes", {}).items():
        parts += ["--shape", f"{name}={','.join(map(str, sizes))}"]
    for form in manifest.get("emit", ()):
        parts += ["--emit", str(form)]
    for metric, bound in manifest.get("tolerance", {}).items():
        parts += ["--tolerance", f"{metric}={bound:g}"]
    return shlex.join(parts)


def deployable_bytes(manifest: Mapping[str, Any]) -> int:
    """Return the bytes of the files that are deployed: all that the manifest hashes but the recipe.

    A package (`model.mlpackage/`) is the model where there is one; other folders hold it once more, as code.
    """
    files = {name: int(entry["bytes"]) for name, entry in manifest["files"].items() if name not in _NOT_DEPLOYED}
    packaged = [size for name, size in files.items() if _PACKAGE in name]
    return sum(packaged or (size for name, size in files.items() if "/" not in name))


def comparisons(manifest: Mapping[str, Any], bench: Mapping[str, Any] | None) -> list[Comparison]:
    """Return the before/after table: size, what code needs, latency, output and, where there are labels, accuracy."""
    sizes = int(manifest["source"]["bytes"]), deployable_bytes(manifest)
    lines = [_ratio("size", sizes, units.bytes_text, ("smaller", "larger"))]
    needs = manifest.get("footprint", {})
    lines += [
        Comparison(label, "", units.bytes_text(needs[key]), "", remark)
        for key, (label, remark) in _FOOTPRINT.items()
        if key in needs
    ]
    if bench is not None and "candidates" in bench:
        timed = Benchmark.from_json(bench)
        names = [one.name for one in timed.candidates]
        if "before" in names and "after" in names:
            lines += _speed(timed)
    if manifest.get("verification"):
        lines += _behaviour(manifest["verification"])
    return lines


def _ratio(
    label: str,
    figures: tuple[float, float],
    text: Callable[[float], str],
    words: tuple[str, str],
    remark: str = "",
) -> Comparison:
    """Compare two figures of which the smaller is the better; within 1 % they are the same."""
    before, after = figures
    share = after / before if before > 0 else None
    if not share:
        return Comparison(label, text(before), text(after), "", remark)
    if 0.99 <= share <= 1.01:
        return Comparison(label, text(before), text(after), "the same", remark, share)
    times = units.ratio_text(1 / share if share < 1 else share)
    return Comparison(
        label, text(before), text(after), f"{times} {words[0 if share < 1 else 1]}", remark, share, share < 1
    )


def _speed(timed: Benchmark) -> list[Comparison]:
    before, after = timed["before"], timed["after"]
    threads = f"{timed.threads} thread{'s' if timed.threads > 1 else ''}" if timed.threads else "default threads"
    taken = f"batch {timed.batch}, {threads}; best of {timed.rounds}"
    lines = [
        _ratio("latency", (before.seconds, after.seconds), units.seconds_text, ("faster", "slower"), taken),
    ]
    if before.peak_bytes and after.peak_bytes:
        peaks = before.peak_bytes, after.peak_bytes
        lines.append(_ratio("memory", peaks, units.bytes_text, ("less", "more"), "peak of a fresh process"))
    return lines


def _behaviour(document: Mapping[str, Any]) -> list[Comparison]:
    verification = Verification.from_json(document)
    samples = f"{verification.samples} {document.get('data', 'samples')}"
    lines = [_output(verification, samples)]
    if verification.accuracy_before is not None and verification.accuracy_after is not None:
        gained = verification.accuracy_after - verification.accuracy_before
        lines.append(
            Comparison(
                "accuracy",
                units.percent(verification.accuracy_before),
                units.percent(verification.accuracy_after),
                "the same" if abs(gained) < 5e-5 else f"{100 * gained:+.2f} points",
                f"top-1 on {verification.labelled} labels",
                good=None if abs(gained) < 5e-5 else gained > 0,
            )
        )
    if verification.eval_before is not None and verification.eval_after is not None:
        lines.append(_own_measure(verification.eval_before, verification.eval_after))
    return lines


def _own_measure(before: float, after: float) -> Comparison:
    gained = after - before
    same = abs(gained) < 1e-9 * max(abs(before), 1.0)
    return Comparison(
        "eval",
        f"{before:.5g}",
        f"{after:.5g}",
        "the same" if same else f"{gained:+.3g}",
        "what --eval returns",
        good=None if same else gained > 0,
    )


def _output(verification: Verification, samples: str) -> Comparison:
    worst = verification.worst
    if worst is None:
        matches = [one.match for one in verification.outputs if one.match is not None]
        after = f"{units.percent(min(matches))} equal" if matches else "not compared"
        return Comparison("output", "exact", after, "", samples)
    return Comparison("output", "exact", _closeness(worst), "", samples)


def _closeness(output: OutputFigures) -> str:
    infinite = output.sqnr_db == float("inf")
    return units.decibels(None if infinite else output.sqnr_db, exact=infinite and not output.broken)
