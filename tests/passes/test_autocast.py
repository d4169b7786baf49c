"""autocast against golden text, and in ONNX Runtime against the float32 model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.analysis.compressed_weights import compressed
from qgraph.analysis.linear_layers import linear_layers
from qgraph.analysis.weight_storage import store
from qgraph.errors import UserError
from qgraph.models import digits_encoder
from qgraph.numerics.weights import WeightScheme, quantize_weight
from qgraph.passes import Autocast
from qgraph.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parent))

from half_precision import check_golden, convert, emulated, left, model_of, normal, run, sqnr_db

F16, BF16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
LAYERS = """
g (float[s,8] x) => (float[s,8] y) <float[8,8] w = {0}, float[8] b = {0}, int64[1] axes = {-1}>
{
    [first] h = MatMul(x, w)
    [bias] a = Add(h, b)
    [relu] r = Relu(a)
    [second] p = MatMul(r, w)
    [sum] m = ReduceMean(p, axes)
    [centre] c = Sub(p, m)
    [softmax] t = Softmax(c)
    [third] y = MatMul(t, w)
}
"""


def layers() -> ir.Model:
    return model_of(LAYERS, w=normal(8, 8), b=normal(8, seed=1))


def test_golden():
    check_golden(Autocast(), "layers")


@pytest.mark.parametrize(("dtype", "decibels"), [("float16", 55), ("bfloat16", 36)])
def test_classes_decide_and_the_others_follow_the_widest(dtype: str, decibels: float):
    before, after = layers(), layers()
    report = convert(Autocast(dtype=dtype), after)
    assert set(left(report)) == {"sum", "centre", "softmax"}
    assert "ReduceMean sums" in left(report)["sum"]
    assert left(report)["centre"] == "what it reads is float32, and it is not among 'half'"
    types = {value.name: value.dtype for node in after.graph for value in node.outputs}
    assert {types[name] for name in ("h", "a", "r", "p")} == {BF16 if dtype == "bfloat16" else F16}
    x = normal(5, 8, seed=2)
    (exact,), (found,) = run(before, {"x": x}), run(emulated(after), {"x": x})
    assert sqnr_db(exact, found) > decibels


def test_the_list_is_an_option():
    report = convert(Autocast(half=("Relu", "Softmax")), layers())
    assert report.changed == 4  # the products behind them follow
    assert set(left(report)) == {"first", "bias", "sum", "centre"}
    assert Pipeline.parse("autocast{dtype=bfloat16,half=[MatMul,Conv]}").to_text().count("MatMul") == 1
    with pytest.raises(ValueError, match="no operator Matmul"):
        Autocast(half=("Matmul",))
    with pytest.raises(ValueError, match="positive"):
        Autocast(largest=0.0)


def test_what_is_large_on_the_samples_stays_in_float32():
    x = np.ones((2, 8), np.float32)
    for scale, options, expected in ((1e4, {}, {"first", "bias", "relu"}), (1e4, {"measure": False}, set()),
                                     (1.0, {"largest": 5.0}, {"first", "bias", "relu"}),
                                     (1e4, {"dtype": "bfloat16"}, set())):  # fmt: skip
        model = model_of(LAYERS, w=scale * np.ones((8, 8), np.float32), b=np.zeros(8, np.float32))
        reasons = left(convert(Autocast(**options), model, [{"x": x}]))
        assert expected <= set(reasons) - {"sum", "centre", "softmax", "second", "third"}
        assert bool(expected) == ("first" in reasons)
    assert (
        "reaches 8 on the samples, and 'largest' is 5"
        in left(
            convert(
                Autocast(largest=5.0),
                model_of(LAYERS, w=np.ones((8, 8), np.float32), b=np.zeros(8, np.float32)),
                [{"x": x}],
            )
        )["first"]
    )


def test_constants_that_float16_cannot_hold_and_excluded_nodes():
    model = model_of(LAYERS, w=normal(8, 8), b=np.full(8, 1e6, np.float32))
    reasons = left(convert(Autocast(exclude=("third",)), model))
    assert reasons["third"] == "it is excluded"
    assert "reaches 1e+06" in reasons["bias"]
    assert reasons["relu"].startswith("what it reads")
    large = model_of(LAYERS, w=np.full((8, 8), 1e6, np.float32), b=normal(8))
    assert {"first", "second", "third"} <= set(left(convert(Autocast(), large)))


def test_what_reads_constants_only_follows_its_readers():
    model = layers()
    for layer in linear_layers(model).layers[:1]:
        store(model, layer, WeightScheme(), lambda layer=layer: quantize_weight(layer.matrix(), WeightScheme()))
    assert not any("dequantize" in name for name in left(convert(Autocast(), model)))
    (weight,) = compressed(model)
    assert weight.tensors[1].dtype == F16
    other = layers()
    for layer in linear_layers(other).layers[:1]:
        store(other, layer, WeightScheme(), lambda layer=layer: quantize_weight(layer.matrix(), WeightScheme()))
    assert left(convert(Autocast(exclude=("first",)), other))["w_dequantize"] == "who reads it computes in float32"


def test_old_opsets_are_refused_for_bfloat16():
    with pytest.raises(UserError, match="bfloat16 needs opset 13"):
        Pipeline([Autocast(dtype="bfloat16")]).run(model_of(LAYERS.replace(", axes", ""), opset=12))


@pytest.mark.parametrize(("dtype", "decibels"), [("float16", 55), ("bfloat16", 36)])
def test_the_encoder_keeps_its_answers(dtype: str, decibels: float):
    pytest.importorskip("sklearn")
    model = digits_encoder.build()
    Pipeline.parse("lift-constants,convert-opset{version=21},fold-constants").run(model)
    calibration = [{"image": part} for part in np.array_split(digits_encoder.dataset().calibration["image"], 8)]
    report = convert(Autocast(dtype=dtype), model, calibration)
    assert report.changed > 40
    feeds = {"image": digits_encoder.dataset().evaluation["image"][:200]}
    (exact,), (found,) = run(digits_encoder.build(), feeds), run(emulated(model), feeds)
    assert sqnr_db(exact, found) > decibels
    assert (exact.argmax(1) == found.argmax(1)).mean() > 0.995
