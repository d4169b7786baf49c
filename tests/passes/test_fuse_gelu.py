"""fuse-gelu against golden text, ONNX Runtime and the formula."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from golden_rewrites import as_written

import qgraph.ir
from qgraph.passes.fuse_gelu import FuseGelu
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.session import open_session

GOLDEN = Path(__file__).resolve().parent.parent / "golden/fuse-gelu"
CASES = {path.stem: path.read_text().partition("\n---\n") for path in sorted(GOLDEN.glob("*.onnxtxt"))}
COUNTS = {"exact": 3, "by_tanh": 2}
X = np.linspace(-6, 6, 8 * 50, dtype=np.float32).reshape(50, 8)


def fuse(model: ir.Model) -> Report:
    return Pipeline([FuseGelu()]).run(model).parts[0]


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
    np.testing.assert_allclose(run(model), before, rtol=0, atol=2e-6)


def test_it_is_gelu():
    model = ir.from_onnx_text(CASES["exact"][0])
    fuse(model)
    values = X.astype(np.float64)
    for _ in range(COUNTS["exact"]):
        values = values * np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))(values)
    np.testing.assert_allclose(run(model), values, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("exact", "root = {1.4142135381698608}", "root = {1.4143}"),
        ("exact", "half = {0.5}", "half = {0.51}"),
        ("exact", "one = {1.0}", "one = {-1.0}"),
        ("by_tanh", "three = {3.0}", "three = {2.0}"),
        ("by_tanh", "cubic = {0.04471500217914581}", "cubic = {0.0447}"),
        ("by_tanh", "root = {0.7978845834732056}", "root = {0.8}"),
    ],
)
def test_other_constants_are_another_function(name: str, old: str, new: str):
    assert old in CASES[name][0]
    model = ir.from_onnx_text(CASES[name][0].replace(old, new))
    assert fuse(model).changed < COUNTS[name]
    assert any(qgraph.ir.is_op(node, "Erf", "Tanh") for node in model.graph)


def test_what_is_read_elsewhere_stays():
    model = ir.from_onnx_text(CASES["exact"][0].replace("m3 = Mul (a3, half)", "m0 = Neg (e3)\n m3 = Mul (a3, half)"))
    assert fuse(model).changed == COUNTS["exact"] - 1


def test_an_opset_without_the_operator_is_spoken_of():
    model = ir.from_onnx_text(CASES["exact"][0].replace('"" : 21', '"" : 17'))
    before = ir.to_onnx_text(model)
    report = fuse(model)
    assert {one.reason for one in report.skipped} == {
        "the model is of opset 17, and Gelu of opset 20: convert it first"
    }
    assert ir.to_onnx_text(model) == before
