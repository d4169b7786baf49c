"""The index of a build as a table and as a page: what was made of each target, with a link to its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qgraph.report import units
from qgraph.report.markup import Markup, clip, element
from qgraph.report.parts import document, name_cell, number, section, table
from qgraph.report.side_by_side import SideBySide, columns_of, fronts
from qgraph.report.terminal import Table

__all__ = ["Row", "render", "terminal_table"]

_STATES = {"built": "", "outside": "outside its bounds", "refused": "refused", "failed": "failed"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A target of a build.

    Attributes:
        name: of its folder.
        target: with its options.
        status: "built", "outside", "refused" or "failed".
        reason: why it is not simply built; ''.
        contender: which of the artifacts it is, or None where there is none.
        stand_in: what it was verified on instead of its device, or ''.
    """

    name: str
    target: str
    status: str
    reason: str
    contender: int | None
    stand_in: str


def terminal_table(rows: Sequence[Row], found: SideBySide) -> Table:
    """Return the targets as a table of texts."""
    columns = columns_of(found) if found.contenders else []
    lines = []
    for one in rows:
        figures = [texts[one.contender] if one.contender is not None else "–" for _, texts in columns]
        lines.append((one.name, *figures, _STATES[one.status] or "built"))
    titles = ("target", *(f">{title}" for title, _ in columns), "")
    return Table(titles, tuple(lines), title=f"{found.source}, {units.bytes_text(found.source_bytes)}")


def render(rows: Sequence[Row], found: SideBySide) -> str:
    """Return the index as a page."""
    made = sum(one.contender is not None for one in rows)
    told = f"{made} target{'s' * (made != 1)}" if made == len(rows) else f"{made} of {len(rows)} targets"
    heading = element("h1", clip(found.source), " ", element("small", told))
    facts = f"{units.bytes_text(found.source_bytes)}, SHA-256 {found.sha256[:16]}…"
    return document(
        f"{clip(found.source)}, {told}",
        element("header", heading, element("p", facts, class_="note")),
        section("Targets", _targets(rows, found), *_remarks(rows, found)),
        _without(rows),
        fronts(found),
        element("footer", "Built by qgraph."),
    )


def _targets(rows: Sequence[Row], found: SideBySide) -> Markup:
    columns = columns_of(found)
    lines = []
    for one in (row for row in rows if row.contender is not None):
        i = one.contender or 0
        link = element("a", clip(one.name, 100), href=f"{one.name}/report.html")
        unit = None if one.target == one.name else element("span", clip(one.target, 80), class_="unit")
        state = element("span", clip(one.reason, 300), class_="note wrong") if one.reason else None
        note = element("span", f"verified on {clip(one.stand_in, 160)}", class_="note") if one.stand_in else None
        place = element("td", element("span", i + 1, class_="chip met"), class_="place")
        figures = (number(texts[i], title) for title, texts in columns)
        lines.append(element("tr", place, name_cell(link, " ", unit, state, note), *figures, id=f"artifact{i + 1}"))
    return table(("", "target", *(f">{title}" for title, _ in columns)), lines, kind="ladder")


def _remarks(rows: Sequence[Row], found: SideBySide) -> list[Markup]:
    timed = any(one.seconds is not None for one in found.contenders)
    told = "In brackets, how many times smaller and faster than the source; each was timed beside it." if timed else ""
    if any(one.stand_in for one in rows):
        told = f"{told} What was verified on a stand-in was not run on its device, and not timed.".strip()
    return [element("p", told, class_="note")] if told else []


def _without(rows: Sequence[Row]) -> Markup | None:
    """Return the targets that have no artifact, with the reasons."""
    lines = [
        element("tr", name_cell(clip(one.name, 100), " ", element("span", _STATES[one.status], class_="unit")),
                element("td", clip(one.reason, 600)))
        for one in rows
        if one.contender is None
    ]  # fmt: skip
    return section("Not built", table(("target", "why"), lines)) if lines else None
