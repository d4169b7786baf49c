"""The drawings of the report: small SVG elements that stretch to the width of the page.

Lines and areas are drawn in a box that stretches both ways, with strokes that do not. Dots and texts stand at places
in per cent, so that they keep their size at any width: a chart is as readable on a telephone as on a desk. Colours are
those of the style sheet. What a pointer tells of an element, or a click leads to, needs no script.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from qgraph.report.markup import Markup, clip, element

__all__ = ["Dot", "Scale", "bar", "histogram", "profile", "scale", "scatter", "split_bar", "step_front"]

_HEIGHT = 100
_COLUMNS = 300
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


def bar(share: float, *, kind: str = "") -> Markup:
    """Return a horizontal bar over a track; `share` is cut to 0 to 1. It is decoration: the figure stands beside it."""
    width = f"{100 * min(max(share, 0.0), 1.0):.2f}"
    return element(
        "svg",
        element("rect", class_="track", width=100, height=4),
        element("rect", class_=f"fill {kind}".strip(), width=width, height=4),
        class_="bar",
        viewBox="0 0 100 4",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def split_bar(parts: Sequence[tuple[str, float]]) -> Markup:
    """Return one bar divided among (kind, amount)."""
    total = sum(amount for _, amount in parts) or 1.0
    start = 0.0
    pieces = []
    for kind, amount in parts:
        width = 100 * amount / total
        pieces.append(element("rect", class_=f"fill {kind}".strip(), x=f"{start:.2f}", width=f"{width:.2f}", height=4))
        start += width
    return element(
        "svg", *pieces, class_="bar split", viewBox="0 0 100 4", preserveAspectRatio="none", aria_hidden="true"
    )


def profile(
    values: Sequence[float], low: float, high: float, label: str, *, told: Sequence[str] = (), links: Sequence[str] = ()
) -> Markup:
    """Return a line through `values`, drawn between `low` at the bottom and `high` at the top.

    Args:
        values: at least one; beyond 300, each point is the least of its neighbours.
        low: value at the bottom edge.
        high: value at the top edge; above it, values are drawn there.
        label: read out instead of the drawing.
        told: what a pointer over each value tells; as many as values, or none.
        links: the id that a click on each leads to; '' for none.
    """
    chosen = _thin(values)
    step = 100 / max(len(chosen) - 1, 1)
    heights = [_HEIGHT * (1 - (min(max(values[i], low), high) - low) / (high - low or 1)) for i in chosen]
    points = " ".join(f"{i * step:.2f},{height:.1f}" for i, height in enumerate(heights))
    worst = min(range(len(chosen)), key=lambda i: values[chosen[i]])
    grid = [
        element("line", class_="grid", x1=0, x2=100, y1=y, y2=y, vector_effect="non-scaling-stroke")
        for y in (0, _HEIGHT / 2, _HEIGHT)
    ]
    columns = [_column(i * step, step, told[at], links[at] if links else "") for i, at in enumerate(chosen) if told]
    return element(
        "svg",
        *grid,
        element("polygon", class_="area", points=f"0,{_HEIGHT} {points} {(len(chosen) - 1) * step:.2f},{_HEIGHT}"),
        element("polyline", class_="line", points=points, vector_effect="non-scaling-stroke"),
        # A stroke of no length with round ends is a dot that stays round when the drawing is stretched.
        element(
            "path", class_="dot", d=f"M{worst * step:.2f} {heights[worst]:.1f}h0", vector_effect="non-scaling-stroke"
        ),
        *columns,
        class_="profile",
        viewBox=f"0 0 100 {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )


def _column(middle: float, width: float, told: str, link: str) -> Markup:
    """Return a column of the drawing that tells what stands there when pointed at."""
    start, end = max(middle - width / 2, 0.0), min(middle + width / 2, 100.0)
    area = element(
        "rect", element("title", told), class_="hit", x=f"{start:.2f}", width=f"{end - start:.2f}", height=100
    )
    # Not in the order of the keyboard: the same links stand in the list below.
    return element("a", area, href=f"#{link}", tabindex=-1) if link else area


def _thin(values: Sequence[float]) -> list[int]:
    """Return the places of the values that are drawn."""
    width = -(-len(values) // _COLUMNS)
    groups = (range(i, min(i + width, len(values))) for i in range(0, len(values), width))
    return [min(group, key=values.__getitem__) for group in groups]


def histogram(counts: Sequence[int], low: float, high: float, limits: tuple[float, float] | None, label: str) -> Markup:
    """Return bars as high as the logarithms of `counts`; those outside of `limits` are set off.

    Args:
        counts: of equally wide bins.
        low: left edge of the first bin.
        high: right edge of the last bin; above `low`.
        limits: the range that is marked; None for none.
        label: read out instead of the drawing.
    """
    most = math.log1p(max(counts, default=0)) or 1.0
    width = len(counts)
    inside: list[str] = []
    outside: list[str] = []
    # A bin that a limit cuts counts as inside.
    edges = (0.0, float(width)) if limits is None else tuple((one - low) / (high - low) * width for one in limits)
    for i, count in enumerate(counts):
        if count:
            height = max(_HEIGHT * math.log1p(count) / most, 3.0)
            drawn = outside if i + 1 <= edges[0] + 1e-6 or i >= edges[1] - 1e-6 else inside
            drawn.append(f"M{i} {_HEIGHT}v-{height:.1f}h1v{height:.1f}z")
    parts = [
        element("path", class_="bars", d="".join(inside)),
        element("path", class_="bars beyond", d="".join(outside)),
    ]
    if limits is not None:
        parts.insert(
            0, element("rect", class_="reach", x=f"{edges[0]:.2f}", width=f"{edges[1] - edges[0]:.2f}", height=100)
        )
        parts += [
            element(
                "line",
                class_="limit",
                x1=f"{x:.2f}",
                x2=f"{x:.2f}",
                y1=0,
                y2=_HEIGHT,
                vector_effect="non-scaling-stroke",
            )
            for x in edges
        ]
    return element(
        "svg", *parts, class_="histogram", viewBox=f"0 0 {width} {_HEIGHT}", preserveAspectRatio="none", role="img",
        aria_label=label,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """An axis: from `low` at the left or at the bottom to `high`, with marks."""

    low: float
    high: float
    marks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Return where a value lies, in per cent of the way."""
        return 100 * (value - self.low) / (self.high - self.low)


def scale(values: Sequence[float], *, marks: int = 4) -> Scale:
    """Return an axis with round marks on which all values lie, none on its edge.

    Args:
        values: finite numbers, at least one.
        marks: about how many.
    """
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    start, end = low - room, high + room
    if low >= 0:
        start = max(start, 0.0)
    rough = (end - start) / marks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in _STEPS if power * one >= rough * 0.999)
    first = math.ceil(start / step - 1e-9)
    last = math.floor(end / step + 1e-9)
    return Scale(start, end, tuple(step * i for i in range(first, last + 1)))


@dataclasses.dataclass(frozen=True)
class Dot:
    """A point of a scatter plot: what it says inside, where it lies, what it tells, its kind, and where it leads."""

    text: str
    x: float
    y: float
    told: str
    kind: str = ""
    link: str = ""


def step_front(dots: Sequence[Dot], *, rising: bool) -> list[Dot]:
    """Return the dots that no other beats: none has at most their x and a better y (or the same y at less x).

    Args:
        dots: to choose from; less x is better.
        rising: whether more y is better.
    """
    sign = 1.0 if rising else -1.0
    front: list[Dot] = []
    for dot in sorted(dots, key=lambda one: (one.x, -sign * one.y)):
        if not front or sign * dot.y > sign * front[-1].y:
            front.append(dot)
    return front


def scatter(
    dots: Sequence[Dot],
    across: tuple[Scale, Sequence[str]],
    up: tuple[Scale, Sequence[str]],
    label: str,
    *,
    front: Sequence[Dot] = (),
    bound: float | None = None,
    limit: float | None = None,
    falling: bool = False,
) -> Markup:
    """Return dots with texts inside, and a staircase through those of the front.

    Args:
        dots: the last ones are drawn on top.
        across: the horizontal axis, and the text of each of its marks.
        up: the vertical axis, likewise.
        label: read out instead of the drawing.
        front: by rising x.
        bound: a height that is marked.
        limit: a place across that is marked.
        falling: draw the least y at the top.
    """

    def x_of(value: float) -> str:
        return f"{across[0].place(value):.2f}%"

    def y_of(value: float) -> str:
        place = up[0].place(value)
        return f"{place if falling else 100 - place:.2f}%"

    parts: list[Markup] = []
    for value, text in zip(up[0].marks, up[1], strict=True):
        parts.append(element("line", class_="grid", x1="0%", x2="100%", y1=y_of(value), y2=y_of(value)))
        parts.append(element("text", text, class_="mark", x=0, y=y_of(value), dx=-8, dy="0.32em", text_anchor="end"))
    for value, text in zip(across[0].marks, across[1], strict=True):
        parts.append(element("text", text, class_="mark", x=x_of(value), y="100%", dy="1.5em", text_anchor="middle"))
    parts.append(element("line", class_="edge", x1="0%", x2="100%", y1="100%", y2="100%"))
    if bound is not None and up[0].low <= bound <= up[0].high:
        parts.append(element("line", class_="bound", x1="0%", x2="100%", y1=y_of(bound), y2=y_of(bound)))
    if limit is not None and across[0].low <= limit <= across[0].high:
        parts.append(element("line", class_="bound", x1=x_of(limit), x2=x_of(limit), y1="0%", y2="100%"))
    for one, other in itertools.pairwise(front):
        parts.append(element("line", class_="front", x1=x_of(one.x), x2=x_of(other.x), y1=y_of(one.y), y2=y_of(one.y)))
        parts.append(
            element("line", class_="front", x1=x_of(other.x), x2=x_of(other.x), y1=y_of(one.y), y2=y_of(other.y))
        )
    parts += [_dot(one, x_of(one.x), y_of(one.y)) for one in dots]
    return element("svg", *parts, class_="scatter", role="img", aria_label=label)


def _dot(one: Dot, x: str, y: str) -> Markup:
    drawn = (
        element("title", clip(one.told)),
        element("circle", cx=x, cy=y, r=10),
        element("text", one.text, x=x, y=y, dy="0.34em", text_anchor="middle"),
    )
    kind = f"spot {one.kind}".strip()
    return element("a", *drawn, class_=kind, href=f"#{one.link}") if one.link else element("g", *drawn, class_=kind)
