"""fuse-norms against golden text, ONNX Runtime and the formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from golden_rewrites import as_written

from qgraph.passes.fuse_norms import FuseNorms
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.session import open_session

GOLDEN = Path(__file__).resolve().parent.parent / "golden/fuse-norms"
CASES = {path.stem: path.read_text().partition("\n---\n") for path in sorted(GOLDEN.glob("*.onnxtxt"))}
COUNTS = {"layer": 2, "rms": 3}
X = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32) * 3 + 1


def fuse(model: ir.Model) -> Report:
    return Pipeline([FuseNorms()]).run(model).parts[0]


def run(model: ir.Model) -> np.ndarray:
    return open_session(ir.to_proto(model).SerializeToString(), threads=1, optimise=False).run(None, {"x": X})[0]


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_as_written(name: str):
    _, report = as_written(GOLDEN / f"{name}.onnxtxt", fuse)
    assert (report.changed, list(report.skipped)) == (COUNTS[name], [])


@pytest.mark.parametrize("name", CASES)
def test_the_same_is_computed(name: str):
    model = ir.from_onnx_text(CASES[name][0])
    before = run(model)
    fuse(model)
    np.testing.assert_allclose(run(model), before, rtol=0, atol=1e-5)
    g, b, wide = np.arange(1.0, 9.0), np.arange(8.0, 0.0, -1.0), X.astype(np.float64)
    for index in range(COUNTS[name]):
        d = wide - wide.mean(-1, keepdims=True) if name == "layer" else wide
        wide = d / np.sqrt((d * d).mean(-1, keepdims=True) + 0.001) * g + (b if name == "layer" and index == 0 else 0)
    np.testing.assert_allclose(run(model), wide, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("layer", "last = {-1}", "last = {0}"),
        ("layer", "two = {2.0}", "two = {3.0}"),
        ("layer", "v1 = ReduceMean (p1, last)", "v1 = ReduceMean (p1, last)\n  other = Neg (v1)"),
        ("layer", "n1 = Div (d1, r1)", "n1 = Div (x, r1)"),
        ("rms", "last = {-1}", "last = {0}"),
        ("rms", "one = {1.0}", "one = {2.0}"),
        ("rms", '"" : 21', '"" : 18'),
    ],
)
def test_what_is_another_function_or_opset_stays(name: str, old: str, new: str):
    assert old in CASES[name][0]
    model = ir.from_onnx_text(CASES[name][0].replace(old, new))
    assert fuse(model).changed < COUNTS[name]


def test_an_opset_without_the_operator_is_spoken_of():
    model = ir.from_onnx_text(CASES["layer"][0].replace('"" : 18', '"" : 13'))
    (reason,) = {one.reason for one in fuse(model).skipped}
    assert reason == "the model is of opset 13, and LayerNormalization of opset 17: convert it first"
