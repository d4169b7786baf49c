"""Reports as text: the step lines and tables that the command line prints.

Everything here is a pure function from plain data to text (for files, pipes and logs) or to a `rich` renderable (for
terminals). Nothing is printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qgraph.report.data import Comparison, comparisons
from qgraph.report.ladder import Rung
from qgraph.report.units import METRIC_NAMES, bytes_text, metric_text, ratio_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text

__all__ = [
    "Table",
    "before_after",
    "before_after_rich",
    "left_text",
    "progress_text",
    "rung_text",
    "safe",
    "seconds_left",
    "step",
    "step_rich",
    "to_rich",
    "to_text",
    "undone_text",
]

STEP_WIDTH = 17
_RUNG_WIDTH = 30
_UNDONE = 5


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        columns: titles; one that starts with `>` is set flush right.
        rows: each as long as `columns`.
        title: a line above, or ''.
        note: a line below, or ''.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    note: str = ""


def safe(text: str) -> str:
    """Show control characters as escapes: names in models are not to be trusted with the terminal."""
    return "".join(
        char if char.isprintable() or char == " " else char.encode("unicode_escape").decode() for char in text
    )


def step(name: str, text: str) -> str:
    """Return one aligned line: the step's name, then what it did."""
    name = safe(name)
    gap = " " if len(name) >= STEP_WIDTH else ""
    return f"{name:<{STEP_WIDTH}}{gap}{safe(text)}".rstrip()


def step_rich(name: str, text: str) -> Text:
    """Return the line of `step` for a terminal, the name in bold."""
    from rich.text import Text

    line = Text(step(name, text))
    line.stylize("bold", 0, len(safe(name)))
    return line


def seconds_left(elapsed: float, done: int, total: int) -> float | None:
    """Return how long a step will still take if it goes on as it went so far, or None where nothing tells.

    Args:
        elapsed: seconds since it began.
        done: units that are done.
        total: units in all.
    """
    return elapsed / done * (total - done) if 0 < done <= total else None


def left_text(seconds: float) -> str:
    """Return 53 s left, or 2 min 5 s left."""
    whole = max(round(seconds), 1)
    return f"{whole} s left" if whole < 100 else f"{seconds_text(whole)} left"


def progress_text(elapsed: float, done: int, total: int) -> str:
    """Return how far a step is, such as "12/38   32 %   1 min 20 s, about 2 min 53 s left"."""
    left = seconds_left(elapsed, done, total)
    share = f"   {100 * done / total:.0f} %" if total > 0 else ""
    rest = f", about {left_text(left)}" if left else ""
    return f"{done}/{total}{share}   {seconds_text(elapsed)}{rest}"


def rung_text(rung: Rung, metrics: Iterable[str] = ()) -> str:
    """Return a candidate of a search in one line: name, what was measured, size, speed, and what became of it.

    Args:
        rung: the candidate.
        metrics: those of the candidates before, so that columns stand below one another; it may lack some.
    """
    measured = [_measured(rung, metric) for metric in dict.fromkeys((*metrics, *rung.figures))]
    size = "" if rung.bytes is None else bytes_text(rung.bytes)
    speed = "" if rung.speedup is None else ratio_text(rung.speedup)
    parts = [f"{rung.name:<{_RUNG_WIDTH}}", *measured, f"{size:>8}", f"{speed:>5}", rung.state]
    return "   ".join([*parts, *([rung.remark] if rung.remark else [])]).rstrip()


def _measured(rung: Rung, metric: str) -> str:
    name = METRIC_NAMES.get(metric, metric)
    value = rung.figures.get(metric)
    return f"{name} {metric_text(metric, value):>8}" if value is not None else " " * (len(name) + 9)


def to_text(table: Table) -> str:
    """Set a table in plain lines, columns two spaces apart, without trailing space."""
    right = [column.startswith(">") for column in table.columns]
    lines = [
        [column.removeprefix(">") for column in table.columns],
        *([safe(cell) for cell in row] for row in table.rows),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    set_lines = [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*([table.title] if table.title else []), *set_lines, *([table.note] if table.note else [])])


def to_rich(table: Table) -> RichTable:
    """Set a table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    rich_table = RichTable(
        title=table.title or None, caption=table.note or None, title_justify="left", caption_justify="left",
        box=SIMPLE_HEAD, pad_edge=False, title_style="bold",
    )  # fmt: skip
    for column in table.columns:
        rich_table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in table.rows:
        rich_table.add_row(*(Text(safe(cell)) for cell in row))
    return rich_table


def before_after(manifest: Mapping[str, Any], bench: Mapping[str, Any] | None) -> str:
    """Return the before/after table of an artifact as plain lines.

    Args:
        manifest: of the artifact.
        bench: content of bench.json, or None.
    """
    lines = comparisons(manifest, bench)
    widths = _widths(lines)
    head = f"  {'':<{widths[0]}}  {'before':>{widths[1]}}  {'after':>{widths[2]}}"
    return "\n".join([head, *(_comparison_line(line, widths) for line in lines)])


def _widths(lines: Sequence[Comparison]) -> tuple[int, int, int, int]:
    return (
        max([10, *(len(line.label) for line in lines)]),
        max([9, *(len(line.before) for line in lines)]),
        max([9, *(len(line.after) for line in lines)]),
        max([0, *(len(line.change) for line in lines)]),
    )


def _comparison_line(line: Comparison, widths: tuple[int, int, int, int]) -> str:
    remark = f"({safe(line.remark)})" if line.remark else ""
    return (
        f"  {line.label:<{widths[0]}}  {line.before:>{widths[1]}}  {line.after:>{widths[2]}}"
        f"    {line.change:<{widths[3]}}   {remark}"
    ).rstrip()


def before_after_rich(manifest: Mapping[str, Any], bench: Mapping[str, Any] | None) -> Text:
    """Return the same table for a terminal: good changes green, bad ones yellow, remarks dim."""
    from rich.text import Text

    lines = comparisons(manifest, bench)
    widths = _widths(lines)
    styles = {True: "green", False: "yellow", None: ""}
    text = Text()
    text.append(f"  {'':<{widths[0]}}  {'before':>{widths[1]}}  {'after':>{widths[2]}}", style="dim")
    for line in lines:
        plain = Text("\n" + _comparison_line(line, widths))
        if line.change:
            plain.highlight_words([line.change], styles[line.good])
        if line.remark:
            plain.highlight_words([f"({safe(line.remark)})"], "dim")
        text.append_text(plain)
    return text


def undone_text(undone: Sequence[str]) -> str:
    """Return the line on layers that are stored in integers and run in float."""
    named = ", ".join(undone[:_UNDONE])
    more = f" and {len(undone) - _UNDONE} more" if len(undone) > _UNDONE else ""
    layers = "1 layer is" if len(undone) == 1 else f"{len(undone)} layers are"
    return f"NOT AS PROMISED: {layers} stored in integers but run in float: {named}{more}"
