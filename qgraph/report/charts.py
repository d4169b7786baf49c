"""The drawings of the report: small SVG elements that stretch to the width of the page."""

from __future__ import annotations

from collections.abc import Sequence

from qgraph.report.markup import Markup, element

__all__ = ["bar", "profile", "split_bar"]

_HEIGHT = 100
_MOST_POINTS = 1500


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


def profile(values: Sequence[float], low: float, high: float, label: str) -> Markup:
    """Return a line through `values`, drawn between `low` at the bottom and `high` at the top.

    Args:
        values: at least one; beyond 1500, each point is the least of its neighbours.
        low: value at the bottom edge.
        high: value at the top edge; above it, values are drawn there.
        label: read out instead of the drawing.
    """
    values = _thin(values)
    step = 100 / max(len(values) - 1, 1)
    heights = [_HEIGHT * (1 - (min(max(value, low), high) - low) / (high - low or 1)) for value in values]
    points = " ".join(f"{i * step:.2f},{height:.1f}" for i, height in enumerate(heights))
    worst = min(range(len(values)), key=values.__getitem__)
    grid = [
        element("line", class_="grid", x1=0, x2=100, y1=y, y2=y, vector_effect="non-scaling-stroke")
        for y in (0, _HEIGHT / 2, _HEIGHT)
    ]
    return element(
        "svg",
        *grid,
        element("polygon", class_="area", points=f"0,{_HEIGHT} {points} {(len(values) - 1) * step:.2f},{_HEIGHT}"),
        element("polyline", class_="line", points=points, vector_effect="non-scaling-stroke"),
        # A stroke of no length with round ends is a dot that stays round when the drawing is stretched.
        element(
            "path", class_="dot", d=f"M{worst * step:.2f} {heights[worst]:.1f}h0", vector_effect="non-scaling-stroke"
        ),
        class_="profile",
        viewBox=f"0 0 100 {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )


def _thin(values: Sequence[float]) -> Sequence[float]:
    if len(values) <= _MOST_POINTS:
        return values
    width = -(-len(values) // _MOST_POINTS)
    return [min(values[i : i + width]) for i in range(0, len(values), width)]
