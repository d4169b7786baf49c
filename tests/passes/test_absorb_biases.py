"""absorb-biases against golden text, and against what ONNX Runtime computes before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import text_models
from golden_rewrites import as_written

import qgraph.ir
from qgraph.passes.absorb_biases import AbsorbBiases
from qgraph.pipeline import Pipeline, Report

GOLDEN = Path(__file__).resolve().parent.parent / "golden/absorb-biases"
CASES = {path.stem: path for path in sorted(GOLDEN.glob("*.onnxtxt"))}
COUNTS = {"block": 2, "without_beta": 1}
TEXTS = {name: path.read_text().partition("\n---\n")[0] for name, path in CASES.items()}


def absorb(model: ir.Model) -> Report:
    return Pipeline([AbsorbBiases()]).run(model).parts[0]


def ran(model: ir.Model) -> list[np.ndarray]:
    return text_models.ran(model, batch=3, seq=5)


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_as_written(name: str):
    _, report = as_written(CASES[name], absorb)
    assert (report.changed, list(report.skipped)) == (COUNTS[name], [])


@pytest.mark.parametrize("name", CASES)
def test_the_same_is_computed(name: str):
    model = ir.from_onnx_text(TEXTS[name])
    before = ran(model)
    assert absorb(model).changed
    for one, other in zip(ran(model), before, strict=True):
        np.testing.assert_allclose(one, other, atol=4e-6)


def test_what_differs_gets_new_names():
    model = ir.from_onnx_text(TEXTS["block"])
    absorb(model)
    names = {value.name for node in model.graph for value in node.outputs}
    assert not names & {"x", "q0", "k0", "v0"}
    assert names >= {"q", "v", "a", "o0", "y"}


def test_a_bias_that_dwarfs_what_it_would_join_stays():
    model = ir.from_onnx_text(TEXTS["without_beta"].replace("c = {1.0, 2.0, -1.0, 0.5}", "c = {1.0, 20.0, -1.0, 0.5}"))
    report = absorb(model)
    assert (report.changed, [one.node for one in report.skipped]) == (0, ["norm"])
    assert "rounding would show" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("without_beta", "int64[3] size)", "int64[3] size, float[batch, seq, 4] x)"),
        ("without_beta", "[rows] size = Shape (x)", "[rows] size = Shape (x)\n   [more] z = Relu (x)"),
        ("without_beta", "int64[3] size)", "int64[3] size, float[batch, seq, 4] m)"),
        ("without_beta", "int64[3] size)", "int64[3] size, float[batch, seq, 2] f0)"),
        ("without_beta", "float[", "double["),
        ("without_beta", "(s, g)", "(s, g, h)"),
        ("without_beta", "LayerNormalization (", "LayerNormalization <axis = 1> ("),
        ("without_beta", "Add (x, m)", "Add (x, x)"),
    ],
    ids=["norm put out", "norm read", "bias read", "product read", "doubles", "beta computed", "axis", "no bias"],
)
def test_it_does_not_fire_where_somebody_else_would_notice(name: str, old: str, new: str):
    model = ir.from_onnx_text(TEXTS[name].replace(old, new))
    before = ir.to_onnx_text(model)
    assert absorb(model).changed == 0
    assert ir.to_onnx_text(model) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a = Attention <", "a, present_k, present_v = Attention <"),
        ("kv_num_heads = 2>", "kv_num_heads = 2, softcap = 2.0>"),
        ("[k_sum] k = Add (k0, bk)", "[k_sum] k1 = Add (k0, bk)\n   [k_act] k = Relu (k1)"),
        ("=> (float[batch, seq, 4] y)", "=> (float[batch, seq, 4] y, float[batch, seq, 4] k)"),
    ],
    ids=["keys put out", "scores capped", "keys rectified", "keys read"],
)
def test_keys_keep_a_bias_that_shows(old: str, new: str):
    text = TEXTS["block"].replace(old, new)
    if "present_k" in new:
        text = text.replace("seq, 4] y)", "seq, 4] y, float[batch, 2, seq, 2] present_k)")
    model = ir.from_onnx_text(text)
    absorb(model)
    assert any(node.name == "k_sum" for node in model.graph)


def test_the_shift_reaches_keys_without_a_bias():
    """Keys that have none to correct notice nothing, since a shift of all keys alike leaves the probabilities."""
    model = ir.from_onnx_text(
        TEXTS["block"].replace("   [k_sum] k = Add (k0, bk)\n", "").replace("q, k, v)", "q, k0, v)")
    )
    before = ran(model)
    assert absorb(model).changed == 1
    np.testing.assert_allclose(ran(model)[0], before[0], atol=4e-6)
    assert not any(qgraph.ir.is_op(node, "Add") and node.name == "o_sum" for node in model.graph)


def test_a_product_that_is_added_to_what_it_multiplies_keeps_its_bias():
    """A shift of x would come through the product, and there would be nowhere to take it back."""
    text = """<ir_version: 10, opset_import: ["" : 17]>
    own (float[batch, seq, 2] s) => (float[batch, seq, 2] y)
    <float[2] g = {1.0, 2.0}, float[2, 2] w = {0.5, 1.0, -1.0, 0.25}, float[2] c = {0.5, -0.5}>
    { x = LayerNormalization (s, g)
      p = MatMul (x, w)
      m = Add (p, c)
      y = Add (x, m) }"""
    model = ir.from_onnx_text(text)
    assert absorb(model).changed == 0
    np.testing.assert_array_equal(ran(model)[0], ran(ir.from_onnx_text(text))[0])


def test_weights_are_read_only_where_something_is_absorbed():
    model = ir.from_onnx_text(TEXTS["without_beta"].replace("Add (x, m)", "Add (s, m)"))
    weight = model.graph.initializers["w"]

    def compute() -> np.ndarray:
        raise AssertionError("it was read")

    weight.const_value = qgraph.ir.lazy(compute, ir.DataType.FLOAT, [4, 2])
    assert absorb(model).changed == 0
