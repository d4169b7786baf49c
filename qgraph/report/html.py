"""report.html: one self-contained page."""

from __future__ import annotations

import html

from qgraph.report.data import ReportData, comparisons

__all__ = ["render"]


def render(data: ReportData) -> str:
    """Return the page."""
    rows = "".join(
        f"<tr><th>{html.escape(one.label)}<td>{html.escape(one.before)}<td>{html.escape(one.after)}"
        for one in comparisons(data.manifest, data.bench)
    )
    return f"<!doctype html><meta charset=utf-8><title>qgraph</title><table>{rows}</table>"
