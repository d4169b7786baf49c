"""Rewrites against golden text: files that hold the graph before, a line `---`, and the graph after.

A first line `# ...` gives the pipeline, where it is not the one that the test has for all. With QGRAPH_UPDATE_GOLDEN
set, the part after is written anew instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from qgraph.pipeline import Report

__all__ = ["as_written", "is_after", "is_file", "structure", "what_to_do", "without_values"]


def as_written(file: Path, rewrite: Callable[[ir.Model], Report]) -> tuple[ir.Model, Report]:
    """Hold a rewrite against a golden file, and a second run of it against the first; return model and report."""
    model = ir.from_onnx_text(what_to_do(file)[1])
    report = rewrite(model)
    text = ir.to_onnx_text(model)
    is_after(file, text)
    assert rewrite(model).changed == 0
    assert ir.to_onnx_text(model) == text
    return model, report


def what_to_do(file: Path, pipeline: str = "") -> tuple[str, str]:
    """Return the pipeline of a golden file, `pipeline` where it gives none, and the text of the graph before."""
    before = file.read_text(encoding="utf-8").partition("\n---\n")[0]
    first, _, rest = before.partition("\n")
    return (first[1:].strip(), rest) if first.startswith("#") else (pipeline, before)


def is_after(file: Path, text: str) -> None:
    """Hold the text of a graph against the part after of a golden file."""
    before = file.read_text(encoding="utf-8").partition("\n---\n")[0]
    is_file(file, f"{before}\n---\n{text.strip()}\n")


def is_file(file: Path, text: str) -> None:
    """Hold a text against a whole file."""
    if os.environ.get("QGRAPH_UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    else:
        assert text == file.read_text(encoding="utf-8")


def without_values(model: ir.Model) -> str:
    """Return the text of a model without the values of constants."""
    return re.sub(r" = +\{[^}]*\}", "", ir.to_onnx_text(model))


def structure(model: ir.Model) -> str:
    """Return it without the list of constants and of the shapes of intermediate values as well."""
    return re.sub(r"\n +<[^{]*>\n\{", "\n{", without_values(model))
