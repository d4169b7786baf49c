"""fuse-rotary against golden text, ONNX Runtime and the formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from golden_rewrites import as_written

from qgraph.passes.fuse_rotary import FuseRotary
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.session import open_session

GOLDEN = Path(__file__).resolve().parent.parent / "golden/fuse-rotary"
CASES = {path.stem: path.read_text().partition("\n---\n") for path in sorted(GOLDEN.glob("*.onnxtxt"))}
COUNTS = {"computed": 2, "table": 1}
SIZES = {"batch": 3, "seq": 5}


def fuse(model: ir.Model) -> Report:
    return Pipeline([FuseRotary()]).run(model).parts[0]


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {value.name: [SIZES.get(str(dim), dim) for dim in value.shape] for value in model.graph.inputs}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def run(model: ir.Model) -> list[np.ndarray]:
    session = open_session(ir.to_proto(model).SerializeToString(), threads=1)
    return session.run(None, feeds(model))


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_as_written(name: str):
    model, report = as_written(GOLDEN / f"{name}.onnxtxt", fuse)
    assert (report.changed, list(report.skipped)) == (COUNTS[name], [])
    assert model.graph.opset_imports[""] == 23


@pytest.mark.parametrize("name", CASES)
def test_the_same_is_computed(name: str):
    model = ir.from_onnx_text(CASES[name][0])
    before = run(model)
    fuse(model)
    for one, other in zip(run(model), before, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_it_turns_pairs_by_their_angles():
    model = ir.from_onnx_text(CASES["computed"][0])
    fuse(model)
    given = feeds(model)
    pairs = given["q"][..., :2].astype(np.complex128) + 1j * given["q"][..., 2:]
    turned = pairs * np.exp(1j * given["f"].astype(np.float64))[:, None]
    np.testing.assert_allclose(run(model)[0], np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("computed", "both = Concat <axis = -1> (f, f)", "g = Neg (f)\n both = Concat <axis = -1> (f, g)"),
        ("computed", "half = {2}", "half = {1}"),
        ("computed", "qt = Concat <axis = -1> (qn, ql)", "qt = Concat <axis = -1> (ql, qn)"),
        ("table", "0.5,0.9,0.5,0.9", "0.5,0.9,0.5,0.8"),
        ("table", "axis = {-1}", "axis = {-2}"),
        ("table", '"" : 21', '"" : 20'),
    ],
)
def test_other_rotations_stay(name: str, old: str, new: str):
    assert old in CASES[name][0]
    model = ir.from_onnx_text(CASES[name][0].replace(old, new))
    before = ir.to_onnx_text(model)
    report = fuse(model)
    assert report.changed < COUNTS[name]
    assert report.changed or ir.to_onnx_text(model) == before


def test_an_opset_without_the_operator_is_spoken_of():
    model = ir.from_onnx_text(CASES["table"][0].replace('"" : 21', '"" : 20'))
    (reason,) = {one.reason for one in fuse(model).skipped}
    assert reason == "the model is of opset 20, and RotaryEmbedding of opset 23: convert it to 21 first"
