"""to-fp16 against golden text, and in ONNX Runtime against the float32 model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.analysis.compressed_weights import compressed
from qgraph.analysis.linear_layers import linear_layers
from qgraph.analysis.weight_storage import store
from qgraph.errors import UserError
from qgraph.models import digits_encoder
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, quantize_weight
from qgraph.passes import MatmulNbits, ToFp16
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.session import open_session

sys.path.insert(0, str(Path(__file__).parent))

import half_precision
from half_precision import Feeds, check_golden, left, model_of, normal, run, sqnr_db


def convert(model: ir.Model, feeds: list[Feeds] | None = None, **options) -> Report:
    return half_precision.convert(ToFp16(**options), model, feeds)


NORM = """
norm (float[s,64] x) => (float[s,64] y) <float two = {2}, float eps = {1e-6}, float[64] g = {0}, float[64,64] w = {0}>
{
    [square] p = Pow(x, two)
    [mean] m = ReduceMean<axes = [-1]>(p)
    [shift] e = Add(m, eps)
    [root] r = Sqrt(e)
    [divide] n = Div(x, r)
    [gain] h = Mul(n, g)
    [product] y = MatMul(h, w)
}
""".replace("<axes = [-1]>(p)", "(p, axes)").replace("float two", "int64[1] axes = {-1}, float two")


def norm_model() -> ir.Model:
    return model_of(NORM, g=normal(64), w=normal(64, 64) / 8)


def test_a_norm_stays_in_float32_as_a_whole_and_does_not_overflow():
    before, after = norm_model(), norm_model()
    report = convert(after)
    assert set(left(report)) == {"square", "mean", "shift", "root", "divide"}
    casts = [node for node in after.graph if node.op_type == "Cast"]
    assert len(casts) == 2  # after the quotient, and to the output: the input is float32 anyway
    x = 1000 * normal(5, 64)  # whose squares float16 cannot hold
    np.testing.assert_allclose(run(after, {"x": x})[0], run(before, {"x": x})[0], atol=2e-2)


@pytest.mark.parametrize("case", ["layers", "rotary"])
def test_golden(case: str):
    check_golden(ToFp16(), case)


MASKED = """
masked (float[4,4] x, bool[4,4] m) => (float[4,4] y)
<float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float lowest = {-3.4028235e38}, float[1] two = {2}>
{
    s = MatMul(x, w)
    a = Where(m, s, lowest)
    b = Add(a, lowest)
    c = Where(m, a, b)
    y = Softmax(c)
}
"""


@pytest.mark.parametrize("measured", [False, True])
def test_masks_are_cut_off_and_still_mask(measured: bool):
    before, after = model_of(MASKED), model_of(MASKED)
    mask = np.tril(np.ones((4, 4), bool))
    report = convert(after, [{"x": normal(4, 4), "m": mask}] if measured else None)
    assert "1 mask cut off at -16384" in report.notes
    assert not report.skipped
    results = [run(model, {"x": normal(4, 4), "m": mask})[0] for model in (before, after)]
    assert (results[1][~mask] == 0).all()
    np.testing.assert_allclose(results[1], results[0], atol=2e-3)


def test_constants_out_of_range_keep_their_node():
    text = """
    g (float[4,4] x) => (float[4,4] y)
    <float[4,4] w = {1}, float[1] large = {1e6}, float[1] small = {1e-7}, float[4] near = {1, 2, 65504, -65504}>
    {
        [product] a = MatMul(x, w)
        [scale] b = Mul(a, large)
        [back] c = Mul(b, small)
        [fine] y = Add(c, near)
    }
    """
    model = model_of(text, w=np.eye(4, dtype=np.float32))
    report = convert(model)
    assert set(left(report)) == {"scale", "back"}  # back reads what scale may have made large
    assert "reaches 1e+06" in left(report)["scale"]
    assert "1e-07 is smaller" in left(report)["back"]
    (y,) = run(model, {"x": np.eye(4, dtype=np.float32)})
    np.testing.assert_allclose(y, 0.1 * np.eye(4) + [1, 2, 65504, -65504], atol=2e-3)


def test_what_overflows_on_the_samples_stays_in_float32():
    text = """
    g (float[2,8] x) => (float[2,8] y) <float[8,8] w = {0}, float[8,8] v = {0}, float[1] part = {0.0625}>
    {
        [large] a = MatMul(x, w)
        [shrink] b = Mul(a, part)
        [after] y = MatMul(b, v)
    }
    """
    before, after, blind = (
        model_of(text, w=np.full((8, 8), 2000, np.float32), v=np.eye(8, dtype=np.float32)) for _ in range(3)
    )
    feeds = {"x": np.full((2, 8), 8, np.float32)}
    report = convert(after, [feeds])
    assert set(left(report)) == {"large", "shrink"}
    assert "'a' reaches 1.28e+05 on the samples" in left(report)["large"]
    np.testing.assert_allclose(run(after, feeds)[0], run(before, feeds)[0], rtol=1e-3)
    convert(blind)
    assert next(iter(blind.graph)).op_type == "Cast"
    assert all(value.dtype == ir.DataType.FLOAT16 for value in blind.graph[1].outputs)  # 'a' without samples
    assert not convert(model_of(text, w=normal(8, 8), v=normal(8, 8)), [feeds], measure=False).skipped


def test_inputs_and_outputs_may_become_float16():
    before, after = norm_model(), norm_model()
    convert(after, keep_io=False)
    assert [value.dtype for value in (*after.graph.inputs, *after.graph.outputs)] == [ir.DataType.FLOAT16] * 2
    x = normal(5, 64)
    (y,) = run(after, {"x": x.astype(np.float16)})
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, run(before, {"x": x})[0], atol=2e-2)


@pytest.mark.parametrize("keep_io", [True, False])
def test_a_weight_that_a_caller_may_replace_is_no_constant(keep_io: bool):
    text = "g (float[2,8] x) => (float[2,8] y) <float[8,8] w = {0}> { h = MatMul(x, w) y = Relu(h) }"
    before, after = (model_of(text, w=normal(8, 8)) for _ in range(2))
    for model in (before, after):
        model.graph.inputs.append(model.graph.initializers["w"])
    convert(after, keep_io=keep_io)
    x, dtype = normal(2, 8), np.float32 if keep_io else np.float16
    for given in ({}, {"w": normal(8, 8, seed=1)}):
        found = run(after, {"x": x.astype(dtype)} | given)[0]
        np.testing.assert_allclose(found, run(before, {"x": x} | given)[0], atol=2e-2)


def test_subgraphs_stay_and_get_what_they_read_in_float32():
    text = """
    g (float[2,4] x, bool c) => (float[2,4] y) <float[4,4] w = {0}>
    {
        h = MatMul(x, w)
        [choice] k = If(c) <then_branch = a () => (float[2,4] p) { p = Relu(h) },
                            else_branch = b () => (float[2,4] q) { q = Neg(h) }>
        y = Add(k, h)
    }
    """
    before, after = (model_of(text, w=normal(4, 4)) for _ in range(2))
    report = convert(after)
    assert set(left(report)) == {"choice"}
    for choice in (True, False):
        feeds = {"x": normal(2, 4), "c": np.array(choice)}
        np.testing.assert_allclose(run(after, feeds)[0], run(before, feeds)[0], atol=5e-3)


def test_operators_with_float32_by_definition():
    text = """
    g (float[1,3,4,4] x) => (float[1,3,8,8] y) <float[3,3,1,1] w = {0}, float[4] scales = {1, 1, 2, 2}>
    {
        a = Conv(x, w)
        y = Resize<mode = "nearest">(a, , scales)
    }
    """
    before, after = (model_of(text, w=normal(3, 3, 1, 1)) for _ in range(2))
    assert not convert(after).skipped
    assert after.graph.initializers["scales"].dtype == ir.DataType.FLOAT
    feeds = {"x": normal(1, 3, 4, 4)}
    np.testing.assert_allclose(run(after, feeds)[0], run(before, feeds)[0], atol=5e-3)


@pytest.mark.parametrize("order", ["to-fp16,matmul-nbits", "matmul-nbits,to-fp16", "to-fp16"])
def test_compressed_weights_get_scales_in_float16_and_are_computed_once(order: str, tmp_path: Path):
    model = norm_model()
    calls = []
    (layer,) = linear_layers(model).layers

    def produce():
        calls.append(layer.name)
        return quantize_weight(layer.matrix(), WeightScheme())

    store(model, layer, WeightScheme(), produce)
    Pipeline([{"to-fp16": ToFp16(), "matmul-nbits": MatmulNbits()}[name] for name in order.split(",")]).run(model)
    qgraph.ir.save(model, tmp_path / "model.onnx")
    assert len(calls) == 1
    loaded = qgraph.ir.load(tmp_path / "model.onnx")
    (weight,) = compressed(loaded)
    assert weight.tensors[1].dtype == ir.DataType.FLOAT16
    (y,) = open_session(tmp_path / "model.onnx", threads=1).run(None, {"x": normal(5, 64)})
    expected = run(norm_model(), {"x": normal(5, 64)})[0]
    np.testing.assert_allclose(y, expected, atol=0.1 * np.abs(expected).max())


def test_a_model_in_float16_is_left_as_it_is():
    model = model_of(
        "g (float16[2,4] x) => (float[2,4] y) <float16[4,4] w = {0}> "
        "{ a = MatMul(x, w) b = Cast<to = 1>(a) c = Softmax(b) y = Add(c, b) }",
        w=normal(4, 4).astype(np.float16),
    )
    convert(model)
    assert [node.op_type for node in model.graph][:2] == ["MatMul", "Cast"]


def compressed_model(size: float, order: str = "to-fp16") -> ir.Model:
    """Return a model whose compressed weight is `size` times as large as usual, and what makes up for it."""
    model = norm_model()
    (layer,) = linear_layers(model).layers
    weight = size * layer.matrix()

    def produce() -> QuantizedWeight:
        return quantize_weight(weight, WeightScheme())

    store(model, layer, WeightScheme(), produce)
    passes = {"to-fp16": ToFp16(exclude=("w_dequantize", "product")[: order.count("!")]), "matmul-nbits": MatmulNbits()}
    Pipeline([passes[name] for name in order.rstrip("!").split(",")]).run(model)
    return model


@pytest.mark.parametrize("size", [1e9, 1e-9], ids=["overflow", "vanish"])
@pytest.mark.parametrize("order", ["to-fp16", "to-fp16,matmul-nbits", "matmul-nbits,to-fp16"])
def test_scales_that_overflow_or_vanish_are_refused(order: str, size: float, tmp_path: Path):
    with pytest.raises(UserError, match=r"float16 cannot hold the scales .*exclude=\["):
        qgraph.ir.save(compressed_model(size, order), tmp_path / "model.onnx")
    model = compressed_model(size, f"{order}!!")
    qgraph.ir.save(model, tmp_path / "model.onnx")
    (y,) = open_session(tmp_path / "model.onnx", threads=1).run(None, {"x": normal(5, 64)})
    expected = size * run(norm_model(), {"x": normal(5, 64)})[0]
    np.testing.assert_allclose(y, expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.parametrize("size", [1e9, 1e-9], ids=["overflow", "vanish"])
def test_scales_that_were_loaded_keep_their_node(size: float, tmp_path: Path):
    model = norm_model()
    (layer,) = linear_layers(model).layers
    store(model, layer, WeightScheme(), lambda: quantize_weight(size * layer.matrix(), WeightScheme()))
    qgraph.ir.save(model, tmp_path / "model.onnx")
    loaded = qgraph.ir.load(tmp_path / "model.onnx")
    reasons = left(convert(loaded))
    dequantize = next(node.name for node in loaded.graph if node.op_type == "DequantizeLinear")
    assert "its constant reaches" in reasons[dequantize]
    expected = size * run(norm_model(), {"x": normal(5, 64)})[0]
    (y,) = run(loaded, {"x": normal(5, 64)})
    if size < 1:  # what is larger is more than float16 can hold behind the product too
        np.testing.assert_allclose(y, expected, atol=0.1 * np.abs(expected).max())


def test_weights_that_would_vanish_keep_their_node():
    model = norm_model()
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(1e-7 * weight.const_value.numpy(), name="w")
    assert "where float16 has few bits left" in left(convert(model))["product"]
    text = (
        "g (float[2,8] x) => (float[2,8] y) <float[8,8] w = {0}, float[8] b = {0}> { a = MatMul(x, w) y = Add(a, b) }"
    )
    assert not convert(model_of(text, w=normal(8, 8), b=1e-8 * normal(8))).skipped  # added, it is lost in float32 too


def test_the_encoder_keeps_its_answers():
    pytest.importorskip("sklearn")
    model = digits_encoder.build()
    Pipeline.parse("lift-constants,convert-opset{version=21},fold-constants").run(model)
    assert convert(model).changed > 100
    feeds = {"image": digits_encoder.dataset().evaluation["image"][:200]}
    (exact,), (found,) = run(digits_encoder.build(), feeds), run(model, feeds)
    assert sqnr_db(exact, found) > 50
