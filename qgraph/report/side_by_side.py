"""Artifacts of one model beside each other, as data, as a table and as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qgraph.report import units
from qgraph.report.charts import Dot, split_bar
from qgraph.report.markup import Markup, clip, element
from qgraph.report.parts import document, name_cell, number, section, table
from qgraph.report.search_page import front_figure
from qgraph.report.terminal import Table

__all__ = ["Contender", "SideBySide", "columns_of", "fronts", "render", "terminal_table"]

_MOST = 60
_ROUNDING_DB = 80.0
_WIDEST = 160
"""Characters of a pipeline in a line of the terminal."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One artifact.

    Attributes:
        label: its folder's name, as far up as is needed to tell it from the others.
        path: as it was given.
        target: that it was compiled for.
        pipeline: its compress part, as text.
        verified: whether it met its own bounds.
        bytes: of the deployable files.
        seconds: latency; None where it was not timed.
        speedup: of the source's latency in the same run over its own; None where that is not known.
        sqnr_db: of its worst output; None where it is exact or undefined.
        exact: whether all outputs are equal to the source's.
        cosine: of its worst output.
        agreement: share of samples of the same largest score; None where no output looks like scores.
        accuracy_before: of the source on its labels; None without labels.
        accuracy: its own on the same.
        own_measure: what --eval returned for it; None without one.
        samples: that it was verified on.
        data: what they were.
        kernels: kind -> number of kernels that really run; empty where that is not known.
        left_alone: number of nodes that passes left alone and kernels that stay in float.
    """

    label: str
    path: str
    target: str
    pipeline: str
    verified: bool
    bytes: int
    seconds: float | None = None
    speedup: float | None = None
    sqnr_db: float | None = None
    exact: bool = False
    cosine: float | None = None
    agreement: float | None = None
    accuracy_before: float | None = None
    accuracy: float | None = None
    own_measure: float | None = None
    samples: int = 0
    data: str = ""
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    left_alone: int = 0

    @property
    def loss(self) -> float | None:
        """What it loses of the accuracy on its labels, as a fraction."""
        if self.accuracy is None or self.accuracy_before is None:
            return None
        return self.accuracy_before - self.accuracy


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Artifacts of one model.

    Attributes:
        source: the model's name.
        source_bytes: its size.
        sha256: its hash.
        contenders: in the order in which they were named.
        source_seconds: the source's latency where all were timed together.
        benchmark: that timing as JSON values, or None where each one's own figures are shown.
    """

    source: str
    source_bytes: int
    sha256: str
    contenders: tuple[Contender, ...]
    source_seconds: float | None = None
    benchmark: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "source": {"name": self.source, "bytes": self.source_bytes, "sha256": self.sha256},
            "artifacts": [{**dataclasses.asdict(one), "kernels": dict(one.kernels)} for one in self.contenders],
            "benchmark": None if self.benchmark is None else dict(self.benchmark),
        }

    @property
    def timing(self) -> str:
        """Where the latencies come from, in words."""
        if self.benchmark is None:
            return "Latency is that of each artifact's own compilation: the speeds compare, seconds may not."
        machine = self.benchmark["machine"]
        return (
            f"Timed in turn on {machine['cpu']}, {machine['cores']} cores, {machine['runtime']}; batch "
            f"{self.benchmark['batch']}, best of {self.benchmark['rounds']}."
        )

    @property
    def remarks(self) -> list[str]:
        """What to know before trusting the comparison."""
        found = [self.timing]
        if len({(one.samples, one.data) for one in self.contenders}) > 1:
            found.append("They were verified on different samples: errors compare only roughly.")
        return found


def columns_of(found: SideBySide) -> list[tuple[str, list[str]]]:
    """Return title and texts of the columns of figures that at least one has."""
    every = found.contenders
    columns: list[tuple[str, list[str]]] = [
        ("size", [f"{units.bytes_text(one.bytes)}{_smaller(found.source_bytes, one.bytes)}" for one in every])
    ]
    if any(one.seconds is not None for one in every):
        columns.append(("latency", [_latency(one) for one in every]))
    columns.append(("SQNR", [units.decibels(one.sqnr_db, exact=one.exact) for one in every]))
    columns.append(("cosine", ["–" if one.cosine is None else f"{one.cosine:.5f}" for one in every]))
    if any(one.accuracy is not None for one in every):
        columns.append(("accuracy", [_accuracy(one) for one in every]))
    elif any(one.agreement is not None for one in every):
        columns.append(("same top-1", [_percent(one.agreement) for one in every]))
    if any(one.own_measure is not None for one in every):
        columns.append(("eval", ["–" if one.own_measure is None else f"{one.own_measure:.5g}" for one in every]))
    return columns


def _smaller(before: int, after: int) -> str:
    return f" ({units.ratio_text(before / after)})" if after else ""


def _latency(one: Contender) -> str:
    if one.seconds is None:
        return "–"
    return f"{units.seconds_text(one.seconds)}{'' if one.speedup is None else f' ({units.ratio_text(one.speedup)})'}"


def _percent(value: float | None) -> str:
    return "–" if value is None else units.percent(value)


def _accuracy(one: Contender) -> str:
    loss = "" if one.loss is None or abs(one.loss) < 5e-5 else f" ({-100 * one.loss:+.2f})"
    return f"{_percent(one.accuracy)}{loss}"


def terminal_table(found: SideBySide) -> Table:
    """Return the comparison as a table of texts, a row for each artifact."""
    columns = columns_of(found)
    rows = [
        (
            f"{one.label}{'' if one.verified else ' (not verified)'}",
            one.target,
            *(texts[i] for _, texts in columns),
            f"{one.kernels['integer']}/{sum(one.kernels.values())}" if "integer" in one.kernels else "–",
            str(one.left_alone),
            clip(one.pipeline, _WIDEST) or "–",
        )
        for i, one in enumerate(found.contenders)
    ]
    titles = ("artifact", "target", *(f">{title}" for title, _ in columns), ">integer kernels", ">left alone", "passes")
    size = units.bytes_text(found.source_bytes)
    seconds = "" if found.source_seconds is None else f", {units.seconds_text(found.source_seconds)}"
    return Table(titles, tuple(rows), title=f"{found.source}, {size}{seconds}", note=" ".join(found.remarks))


def render(found: SideBySide) -> str:
    """Return the comparison as a page."""
    count = len(found.contenders)
    heading = element("h1", clip(found.source), " ", element("small", f"{count} artifacts"))
    facts = f"{units.bytes_text(found.source_bytes)}, SHA-256 {found.sha256[:16]}…"
    header = element("header", heading, element("p", clip(facts), class_="note"))
    return document(
        f"{clip(found.source)}, {count} artifacts",
        header,
        section("Side by side", _table(found), *(element("p", clip(text), class_="note") for text in found.remarks)),
        fronts(found),
        _kernels(found),
        _made(found),
        element("footer", "Compared by qgraph."),
    )


def _table(found: SideBySide) -> Markup:
    columns = columns_of(found)
    rows = []
    for i, one in enumerate(found.contenders[:_MOST]):
        state = None if one.verified else element("span", "outside its tolerance", class_="note wrong")
        name = name_cell(clip(one.label, 100), " ", element("span", clip(one.target, 40), class_="unit"), state)
        figures = (number(texts[i], title) for title, texts in columns)
        rows.append(element("tr", _place(i), name, *figures, id=f"artifact{i + 1}"))
    return table(("", "artifact", *(f">{title}" for title, _ in columns)), rows, kind="ladder")


def _place(i: int) -> Markup:
    return element("td", element("span", i + 1, class_="chip met"), class_="place")


def _made(found: SideBySide) -> Markup:
    """Return the passes of each."""
    rows = [
        element(
            "tr",
            _place(i),
            name_cell(element("code", clip(one.pipeline, 400)) if one.pipeline else "no passes"),
            number(f"{one.left_alone:,}", "left alone"),
        )
        for i, one in enumerate(found.contenders[:_MOST])
    ]
    return section("How each was made", table(("", "passes that compress", ">nodes left alone"), rows, kind="ladder"))


def fronts(found: SideBySide) -> Markup | None:
    """Return what each loses against what it takes: accuracy where all have labels, else SQNR."""
    every = list(enumerate(found.contenders[:_MOST]))
    labelled = all(one.loss is not None for _, one in every)
    metric = "top1" if labelled else "sqnr"
    rounding = [one.label for _, one in every if not labelled and (one.sqnr_db or 0.0) > _ROUNDING_DB]
    rated = [(i, one, one.loss if labelled else one.sqnr_db) for i, one in every if one.label not in rounding]
    sized = [_dot(i, one, one.bytes / 1e6, y) for i, one, y in rated if y is not None]
    # Seconds of different runs do not compare; shares of the source's time do.
    shares = [
        _dot(i, one, 1 / one.speedup, y) for i, one, y in rated if y is not None and one.speedup is not None
    ]  # fmt: skip
    pairs = [(sized, "size, MB"), (shares, "latency, share of the source's")]
    figures = [front_figure(dots, metric, across, None) for dots, across in pairs if len(dots) > 1]
    if not figures:
        return None
    aside = f" Not drawn, for its error is that of float32: {clip(', '.join(rounding), 200)}." if rounding else ""
    note = element("p", f"The line joins what nothing else beats in both.{aside}", class_="note")
    return section("What it costs, what it saves", element("div", *figures, class_="pair"), note)


def _dot(i: int, one: Contender, x: float, y: float) -> Dot:
    return Dot(str(i + 1), x, y, f"{one.label}: {one.target}", "met", f"artifact{i + 1}")


def _kernels(found: SideBySide) -> Markup | None:
    rows = []
    names = {"integer": "", "low_bit": "", "float": "soft", "other": "rest"}
    for one in found.contenders[:_MOST]:
        if one.kernels:
            parts: Sequence[tuple[str, float]] = [(names[key], float(one.kernels.get(key, 0))) for key in names]
            integer = one.kernels.get("integer", 0) + one.kernels.get("low_bit", 0)
            cells = (
                name_cell(clip(one.label, 100)),
                element("td", split_bar(parts), class_="drawn"),
                number(f"{integer:,}", "in integers"),
                number(f"{one.kernels.get('float', 0):,}", "in float"),
                number(f"{one.kernels.get('other', 0):,}", "others"),
            )
            rows.append(element("tr", *cells))
    if not rows:
        return None
    return section(
        "What really runs", table(("artifact", "", ">in integers", ">in float", ">others"), rows, kind="layers")
    )
