"""flatten-rows against golden text, and against what ONNX Runtime computes before and after."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import text_models
from golden_rewrites import as_written

from qgraph.passes.flatten_rows import FlattenRows
from qgraph.pipeline import Pipeline, Report

GOLDEN = Path(__file__).resolve().parent.parent / "golden/flatten-rows"
CASES = {path.stem: path for path in sorted(GOLDEN.glob("*.onnxtxt"))}
COUNTS = {"block": 8, "fixed_sizes": 3}
TEXTS = {name: path.read_text().partition("\n---\n")[0] for name, path in CASES.items()}


def flatten(model: ir.Model) -> Report:
    return Pipeline([FlattenRows()]).run(model).parts[0]


def ran(model: ir.Model, batch: int = 3, seq: int = 5) -> list[np.ndarray]:
    return text_models.ran(model, batch=batch, seq=seq)


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_as_written(name: str):
    _, report = as_written(CASES[name], flatten)
    assert (report.changed, list(report.skipped)) == (COUNTS[name], [])


@pytest.mark.parametrize(("batch", "seq"), [(3, 5), (1, 5), (0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", CASES)
def test_the_same_is_computed(name: str, batch: int, seq: int):
    model = ir.from_onnx_text(TEXTS[name])
    before = ran(model, batch, seq)
    assert flatten(model).changed
    Pipeline.parse("matmul-add-to-gemm,remove-unused").run(model)
    for one, other in zip(ran(model, batch, seq), before, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_products_and_sums_become_gemm():
    model = ir.from_onnx_text(TEXTS["block"])
    flatten(model)
    Pipeline.parse("matmul-add-to-gemm,remove-unused").run(model)
    counts = Counter(node.op_type for node in model.graph)
    assert (counts["Gemm"], counts["MatMul"], counts["Add"]) == (1, 2, 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float[", "double["),
        ("Add (p, b)", "Relu (p)"),
        ("Add (p, b)", "Add (p, p)"),
        ("(float[2, 5, 2, 3] y)", "(float[2, 5, 2, 3] y, float[2, 5, 2, 3] p)"),
        ("x) =>", "x, float[4, 3] w) =>"),
        ("float[2, 5, 2, 4] x", "float x"),
        ("(float[2, 5, 2, 3] y)", "(float[2, 5, 2, 3] y, float[2, 5, 2, 3] s)"),
        ("float[2, 5, 2, 4] x) => (float[2, 5, 2, 3]", "float[2, n, 2, 4] x) => (float[2, n, 2, 3]"),
    ],
    ids=["doubles", "no sum", "sum with itself", "product put out", "matrix given", "no shape", "sum put out", "empty"],
)
def test_it_does_not_fire_where_nothing_is_won_or_known(old: str, new: str):
    text = TEXTS["fixed_sizes"].replace(old, new)
    if "x, float[4, 3] w" in new:
        text = text.replace(
            "<float[4, 3] w = {1.0, -0.5, 0.5, 0.25, 0.5, 1.0, -1.0, 0.5, 0.25, 0.75, 1.0, -0.5}, ", "<"
        )
    model = ir.from_onnx_text(text)
    before = ir.to_onnx_text(model)
    assert flatten(model).changed == 0
    assert ir.to_onnx_text(model) == before


def test_a_summand_of_another_shape_stays_outside():
    """Positions are the same for every sample: no matrix of rows."""
    text = TEXTS["block"].replace("float[batch, seq, 3] r", "float[1, seq, 3] r")
    model = ir.from_onnx_text(text)
    before = ran(model)
    assert flatten(model).changed == 2
    for one, other in zip(ran(model), before, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
