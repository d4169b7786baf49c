"""Rewrites against golden text: files that hold the graph before, a line `---`, and the graph after."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from qgraph.pipeline import Report

__all__ = ["as_written"]


def as_written(file: Path, rewrite: Callable[[ir.Model], Report]) -> tuple[ir.Model, Report]:
    """Hold a rewrite against a golden file, and a second run of it against the first; return model and report.

    With QGRAPH_UPDATE_GOLDEN set, the file is written anew instead.
    """
    before, _, after = file.read_text().partition("\n---\n")
    model = ir.from_onnx_text(before)
    report = rewrite(model)
    text = ir.to_onnx_text(model).strip()
    if os.environ.get("QGRAPH_UPDATE_GOLDEN"):
        file.write_text(f"{before.strip()}\n---\n{text}\n")
    assert text == after.strip() or os.environ.get("QGRAPH_UPDATE_GOLDEN")
    assert rewrite(model).changed == 0
    assert ir.to_onnx_text(model).strip() == text
    return model, report
