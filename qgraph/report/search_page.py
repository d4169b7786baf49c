"""The page's section on a search: the ladder as it was climbed, and accuracy against size and latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qgraph.report import units
from qgraph.report.charts import Dot, Scale, scale, scatter, step_front
from qgraph.report.data import ReportData
from qgraph.report.ladder import Rung
from qgraph.report.markup import Markup, clip, element
from qgraph.report.parts import name_cell, number, section, table
from qgraph.report.units import METRIC_NAMES, metric_text
from qgraph.runtime.tolerances import at_least

__all__ = ["front_figure", "leading_metric", "search_section"]

_RUNGS = 60
_MOST_METRICS = 2


def search_section(data: ReportData) -> Markup | None:
    """Return the rungs in the order in which they were tried, and the front that they make."""
    rungs = data.search[:_RUNGS]
    if not rungs:
        return None
    bounds: Mapping[str, Any] = data.manifest.get("tolerance", {})
    metrics = _metrics(rungs, bounds)
    columns = ("", "candidate", *(f">{METRIC_NAMES.get(one, one)}" for one in metrics), ">size", ">latency", "result")
    rows = [_rung_row(i, one, metrics) for i, one in enumerate(rungs, start=1)]
    figures = []
    if metrics:
        bound = bounds.get(metrics[0])
        budget = data.manifest.get("budget", {})
        room = budget["size"] / 1e6 if "size" in budget else None
        rated = [(i, one) for i, one in enumerate(rungs, start=1) if metrics[0] in one.figures]
        sized = [_dot(i, one, one.bytes / 1e6, metrics[0]) for i, one in rated if one.bytes is not None]
        timed = [_dot(i, one, one.seconds * 1e3, metrics[0]) for i, one in rated if one.seconds is not None]
        figures = [
            front_figure(dots, metrics[0], across, bound, limit)
            for dots, across, limit in ((sized, "size, MB", room), (timed, "latency, ms", None))
            if len(dots) > 1
        ]
    cut = len(data.search) - len(rungs)
    rest = (
        element("p", f"{cut} more candidates are not shown; bench.json has them all.", class_="note") if cut else None
    )
    return section("How it was found", table(columns, rows, kind="ladder"), rest, _fronts(figures))


def _fronts(figures: Sequence[Markup]) -> Markup | None:
    if not figures:
        return None
    note = "The line joins what nothing else beats in both; dashes mark the bound. The filled one was chosen."
    return element("div", element("div", *figures, class_="pair"), element("p", note, class_="note"))


def leading_metric(figures: Sequence[Mapping[str, float]], bounds: Mapping[str, Any]) -> str | None:
    """Return the metric that counts: one that is bounded and was measured, or else the first that was measured."""
    measured = list(dict.fromkeys(metric for one in figures for metric in one))
    return next((metric for metric in bounds if metric in measured), measured[0] if measured else None)


def _metrics(rungs: Sequence[Rung], bounds: Mapping[str, Any]) -> list[str]:
    leading = leading_metric([one.figures for one in rungs], bounds)
    if leading is None:
        return []
    rest = dict.fromkeys(metric for one in rungs for metric in one.figures if metric != leading)
    return [leading, *rest][:_MOST_METRICS]


def _rung_row(place: int, one: Rung, metrics: Sequence[str]) -> Markup:
    told = element("span", clip(one.remark), class_="note") if one.remark else None
    name: Markup | str = clip(one.name, 100)
    if one.pipeline:
        passes = element("code", clip(one.pipeline, 400))
        name = element("details", element("summary", element("span", name)), passes, class_="more")
    speed = f" ({units.ratio_text(one.speedup)})" if one.speedup is not None else ""
    return element(
        "tr",
        element("td", element("span", place, class_=f"chip {_kind(one)}".strip()), class_="place"),
        name_cell(name, told),
        *(_metric_cell(one, metric) for metric in metrics),
        number("–" if one.bytes is None else units.bytes_text(one.bytes), "size"),
        number("–" if one.seconds is None else f"{units.seconds_text(one.seconds)}{speed}", "latency"),
        element("td", element("b", one.state) if one.chosen else one.state, class_="state"),
        id=f"rung{place}",
    )


def _metric_cell(one: Rung, metric: str) -> Markup:
    value = one.figures.get(metric)
    return number("–" if value is None else metric_text(metric, value), METRIC_NAMES.get(metric, metric))


def _kind(one: Rung) -> str:
    return "chosen" if one.chosen else "met" if one.met else ""


def _dot(place: int, one: Rung, x: float, metric: str) -> Dot:
    told = f"{one.name}: {metric_text(metric, one.figures[metric])}, {one.state}"
    return Dot(str(place), x, one.figures[metric], told, _kind(one), f"rung{place}")


def front_figure(
    dots: Sequence[Dot], metric: str, across: str, bound: float | None, limit: float | None = None
) -> Markup:
    """Return a scatter plot of a metric against what it costs, with the front.

    Args:
        dots: at least one.
        metric: of the vertical axis; the better end is at the top.
        across: title of the horizontal axis, of which less is better.
        bound: of the metric, or None.
        limit: of the horizontal axis, or None.
    """
    rising = at_least(metric)
    up = scale([dot.y for dot in dots] + ([bound] if bound is not None else []))
    right = scale([dot.x for dot in dots] + ([limit] if limit is not None else []))
    front = step_front(dots, rising=rising)
    label = f"{METRIC_NAMES.get(metric, metric)} against {across}: {len(dots)} candidates"
    ordered = sorted(dots, key=lambda dot: dot.kind == "chosen")
    marks = [f"{100 * value:g} %" if metric in ("top1", "eval_share") else f"{value:.4g}" for value in up.marks]
    drawing = scatter(
        ordered, (right, _marks(right)), (up, marks), label, front=front, bound=bound, limit=limit, falling=not rising
    )  # fmt: skip
    name = METRIC_NAMES.get(metric, metric) + (", dB" if metric == "sqnr" else "")
    title = element("div", element("span", clip(name, 40)), class_="what")
    return element("figure", title, drawing, element("figcaption", element("span", across)), class_="plot")


def _marks(axis: Scale) -> list[str]:
    return [f"{value:.4g}" for value in axis.marks]
