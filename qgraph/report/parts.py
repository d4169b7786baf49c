"""What the pages are put together from: the document, sections, tables and their cells."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Sequence

from qgraph.report.markup import Child, Markup, element, join
from qgraph.report.units import METRIC_NAMES, bytes_text, metric_text
from qgraph.runtime.tolerances import at_least

__all__ = [
    "bound_text",
    "budget_text",
    "document",
    "name_cell",
    "number",
    "row",
    "section",
    "table",
]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_NO_BREAK = "\u00a0"


def document(title: str, *children: Child) -> str:
    """Return a whole page as HTML 5."""
    style = importlib.resources.files("qgraph.report").joinpath("report.css").read_text(encoding="utf-8")
    head = join(
        [
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", name="referrer", content="no-referrer"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("title", f"{title} – qgraph"),
            element("style", Markup(style)),
        ]
    )
    body = element("body", element("main", *children))
    return f"<!doctype html>\n{element('html', element('head', head), body, lang='en')}\n"


def section(title: str, *children: Child) -> Markup:
    """Return a part of the page with its heading."""
    return element("section", element("h2", title), *children)


def table(columns: Sequence[str], rows: Iterable[Markup], *, kind: str = "") -> Markup:
    """Return a table; a column that starts with `>` holds numbers. On narrow screens, rows are stacked by the style."""
    head = [element("th", name.removeprefix(">"), class_="n" if name.startswith(">") else None) for name in columns]
    return element(
        "table", element("thead", element("tr", *head)), element("tbody", *rows), class_=f"stack {kind}".strip()
    )


def row(*cells: Markup) -> Markup:
    """Return a row of a table."""
    return element("tr", *cells)


def number(text: Child, label: str) -> Markup:
    """Return a cell that holds a number; `label` stands before it where the table has no head."""
    return element("td", text, class_="n", data_label=label)


def name_cell(*children: Child) -> Markup:
    """Return a cell that holds a name, and takes the whole width of a narrow screen."""
    return element("td", *children, class_="name")


def bound_text(metric: str, value: float) -> str:
    """Return a bound in words, such as "SQNR ≥ 30 dB"."""
    sign = "≥" if at_least(metric) else "≤"
    shown = f"{value:g} dB" if metric == "sqnr" else metric_text(metric, value)
    return f"{METRIC_NAMES.get(metric, metric)} {sign} {shown}".replace(" ", _NO_BREAK)


def budget_text(name: str, value: float) -> str:
    """Return a budget in words, such as "size ≤ 8.00 MB" or "latency ≤ 0.5x"."""
    return f"{name} ≤ {bytes_text(value) if name == 'size' else f'{value:g}x'}".replace(" ", _NO_BREAK)
