"""smooth-quant: exact in float, better in 8 bits, and free behind attention."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from golden_rewrites import is_after, what_to_do

import qgraph.ir
from qgraph.errors import UserError
from qgraph.passes.smooth_quant import SmoothQuant
from qgraph.pipeline import Pipeline, Report

GOLDEN = Path(__file__).resolve().parent.parent / "golden/smooth-quant"
HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
LAYERS = """g (float[n, 32] x, float[32] spread, float[32, 24] w, float[24, 32] t)
    => (float[n, 24] y, float[n, 24] z, float[n, 32] seen)
{
    wide = Mul (x, spread)
    seen = Identity (wide)
    y = MatMul (wide, w)
    z = Gemm <transB = 1> (wide, t)
}"""
BEHIND_ATTENTION = """g (float[n, m, 32] x, float[32] c, float[32, 32] v, float[32, 16] w) => (float[n, m, 16] y)
{
    product = MatMul (x, v)
    values = Add (product, c)
    mixed = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, values)
    y = MatMul (mixed, w)
}"""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def outliers(size: int) -> np.ndarray:
    return np.where(np.arange(size) % 16 == 3, 40.0, 1.0).astype(np.float32)


def model_with(text: str, **weights: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f"{HEAD}\n{text}")
    for name, array in weights.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def layers(spread: np.ndarray) -> ir.Model:
    small = 1 / spread
    return model_with(LAYERS, spread=spread, w=normal(32, 24) * small[:, None], t=normal(24, 32, seed=1) * small)


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, {"x": x})


def smooth(model: ir.Model, *, rank: int = 2, **options) -> Report:
    feeds = [{"x": normal(*(2, 16, 32)[3 - rank :], seed=seed)} for seed in range(4)]
    return Pipeline([SmoothQuant(**options)]).run(model, calibration=feeds).parts[0]


def error(model: ir.Model, x: np.ndarray, exact: list[np.ndarray]) -> float:
    Pipeline.parse("dynamic-int8{min_elements=1}").run(model)
    return max(float(np.abs(one - other).max()) for one, other in zip(run(model, x), exact, strict=True))


def test_products_of_one_input_share_a_mul_and_lose_less():
    x, exact = normal(16, 32, seed=9), run(layers(outliers(32)), normal(16, 32, seed=9))
    model = layers(outliers(32))
    report = smooth(model)
    assert report.changed == 2
    assert report.notes[0].startswith("1 of 1 inputs smoothed, ")
    assert Counter(node.op_type for node in model.graph) == {"Mul": 2, "Identity": 1, "MatMul": 1, "Gemm": 1}
    onnx.checker.check_model(ir.to_proto(model))
    for one, other in zip(run(model, x), exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    before, after = report.figures["signal_to_noise"]["wide"]
    assert after > before + 15
    assert error(model, x, exact) < 0.2 * error(layers(outliers(32)), x, exact)


def test_what_makes_the_input_takes_the_factors():
    text, small = LAYERS.replace("seen = Identity (wide)", "seen = Identity (x)"), 1 / outliers(32)
    model = model_with(text, spread=outliers(32), w=normal(32, 24) * small[:, None], t=normal(24, 32, seed=1) * small)
    x = normal(16, 32, seed=9)
    exact = run(model, x)
    assert smooth(model).changed == 2
    assert Counter(node.op_type for node in model.graph) == {"Mul": 1, "Identity": 1, "MatMul": 1, "Gemm": 1}
    for one, other in zip(run(model, x), exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def test_weights_that_are_no_numbers_are_told():
    model = layers(outliers(32))
    node = next(node for node in model.graph if node.op_type == "MatMul")
    broken = node.inputs[1].const_value.numpy().copy()
    broken[0, 0] = np.inf
    node.inputs[1].const_value = ir.tensor(broken, name=node.inputs[1].name)
    with pytest.raises(UserError, match="holds NaN or infinity: mend the model"):
        smooth(model)


def test_a_second_run_changes_nothing():
    model = layers(outliers(32))
    smooth(model)
    text = ir.to_onnx_text(model)
    assert smooth(model).changed == 0
    assert ir.to_onnx_text(model) == text


def test_the_alpha_that_was_found_is_told_and_can_be_given():
    model = layers(outliers(32))
    report = smooth(model)
    (alpha,) = report.figures["alpha"].values()
    assert report.notes[0].endswith("1 above a threshold" if alpha is None else f"alpha {alpha:g}")
    noise = {}
    for given in (0.0, 0.5, 0.9):
        model = layers(outliers(32))
        report = smooth(model, alpha=given)
        assert list(report.notes) == [f"1 of 1 inputs smoothed, alpha {given:g}"]
        assert {node.metadata_props.get("qgraph.smoothed") for node in model.graph} == {None, f"{given:g}"}
        noise[given] = report.figures["signal_to_noise"]["wide"]
        text = ir.to_onnx_text(model)
        assert smooth(model, alpha=given).changed == 0
        assert ir.to_onnx_text(model) == text
    assert noise[0.5][1] > noise[0.5][0]
    with pytest.raises(ValueError, match="from 0 to 1"):
        SmoothQuant(alpha=1.5)


@pytest.mark.parametrize("case", ["mul", "norm"])
def test_golden(case: str):
    path = GOLDEN / f"{case}.onnxtxt"
    model = ir.from_onnx_text(what_to_do(path)[1])
    rows = np.float32([[1, 4], [-1, 2], [0.5, -4]])  # channels that reach 1 and 4, which a norm keeps
    Pipeline([SmoothQuant(alpha=0.5)]).run(model, calibration=[{"x": rows}])
    is_after(path, ir.to_onnx_text(model))


def test_options_are_read_and_written():
    for text in ("smooth-quant", "smooth-quant{alpha=0.5,activations=static}"):
        assert Pipeline.parse(text).to_text() == text
    assert list(Pipeline.parse("smooth-quant{alpha=search}")) == [SmoothQuant()]
    with pytest.raises(UserError, match="alpha"):
        Pipeline.parse("smooth-quant{alpha=much}")


def test_a_mul_has_to_pay_for_itself():
    behind = LAYERS.replace("seen = Identity (wide)", "seen = Identity (x)")
    small = 1 / outliers(32)
    weights = {"spread": outliers(32), "w": normal(32, 24) * small[:, None], "t": normal(24, 32, seed=1) * small}
    assert smooth(model_with(LAYERS, **weights), mul_gain=60.0).changed == 0
    assert (
        smooth(model_with(behind, **weights), mul_gain=60.0, tolerated=0.0).changed == 2
    )  # 'spread' takes the factors
    assert smooth(model_with(behind, **weights), least_gain=60.0).changed == 0


def test_one_scale_for_all_samples_is_another_measure():
    feeds = [{"x": scale * normal(16, 32, seed=seed)} for seed, scale in enumerate((1.0, 8.0))]
    noise = {}
    for kind in ("dynamic", "static"):
        report = Pipeline([SmoothQuant(activations=kind)]).run(layers(outliers(32)), calibration=feeds).parts[0]
        noise[kind] = report.figures["signal_to_noise"]["wide"][0]
    assert noise["static"] < noise["dynamic"] - 3


def test_what_has_no_outliers_is_left():
    model = layers(np.ones(32, np.float32))
    text = ir.to_onnx_text(model)
    assert smooth(model).changed == 0
    assert ir.to_onnx_text(model) == text
    assert smooth(layers(outliers(32)), tolerated=0.0).changed == 0
    assert smooth(layers(outliers(32)), least_gain=60.0).changed == 0


def test_behind_attention_it_costs_no_operator():
    spread = outliers(32)
    weights = {"v": normal(32, 32) * spread, "c": spread, "w": normal(32, 16, seed=1) / spread[:, None]}
    x = normal(2, 16, 32, seed=9)
    model = model_with(BEHIND_ATTENTION, **weights)
    exact = run(model, x)[0]
    report = smooth(model, rank=3)
    assert report.changed == 1
    assert Counter(node.op_type for node in model.graph) == {"MatMul": 2, "Add": 1, "Attention": 1}
    assert set(model.graph.initializers) == {"v_smooth", "c_smooth", "w_smooth"}
    np.testing.assert_allclose(run(model, x)[0], exact, rtol=2e-6, atol=2e-5)
    assert smooth(model, rank=3).changed == 0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("y = MatMul (wide, w)", "y = MatMul (wide, w) more = Neg (w)", "its weight is used elsewhere too"),
        ("y = MatMul (wide, w)", "turned = Transpose (w) y = MatMul (wide, turned)", "it multiplies activations"),
    ],
)
def test_what_does_not_fit_says_why(old: str, new: str, reason: str):
    weights = {"spread": outliers(32), "t": normal(24, 32)}
    weights["w"] = normal(24, 32) if "turned" in new else normal(32, 24)
    model = model_with(LAYERS.replace(old, new).replace("float[32, 24] w", "float[a, b] w"), **weights)
    report = smooth(model)
    assert [(one.node, one.reason) for one in report.skipped] == [("MatMul->y", reason)]


def test_excluded_nodes_and_missing_samples():
    model = layers(outliers(32))
    report = smooth(model, exclude=("*",))
    assert report.changed == 0
    assert {one.reason for one in report.skipped} == {"it is excluded"}
    with pytest.raises(UserError, match="calibration"):
        Pipeline([SmoothQuant()]).run(layers(outliers(32)))
    assert qgraph.ir.check(model) is None


def test_products_inside_subgraphs_are_named():
    text = """g (float[n, 32] x, bool c, float[32, 24] w) => (float[n, 24] y)
    {
        y = If (c) <then_branch = a () => (float[n, 24] p) { [inner] p = MatMul (x, w) },
                    else_branch = b () => (float[n, 24] q) { [other] q = MatMul (x, w) }>
    }"""
    report = Pipeline([SmoothQuant()]).run(model_with(text), calibration=[])
    assert {one.node for one in report.skipped} == {"inner", "other"}
    assert {one.reason for one in report.skipped} == {"it is inside a subgraph, which calibration does not see"}
