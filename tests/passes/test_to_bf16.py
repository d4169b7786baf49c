"""to-bf16 against golden text, and, with its rounding emulated, against the float32 model in ONNX Runtime."""

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
from qgraph.passes import ToBf16
from qgraph.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parent))

from half_precision import check_golden, convert, emulated, left, model_of, normal, run, sqnr_db

BF16 = ir.DataType.BFLOAT16
NORM = """
norm (float[s,64] x) => (float[s,64] y)
<int64[1] axes = {-1}, float two = {2}, float eps = {1e-9}, float[64] g = {0}, float[64,64] w = {0}>
{
    [square] p = Pow(x, two)
    [mean] m = ReduceMean(p, axes)
    [shift] e = Add(m, eps)
    [root] r = Sqrt(e)
    [divide] n = Div(x, r)
    [gain] h = Mul(n, g)
    [product] y = MatMul(h, w)
}
"""


def norm_model() -> ir.Model:
    return model_of(NORM, g=normal(64), w=normal(64, 64) / 8)


@pytest.mark.parametrize("case", ["layers", "rotary"])
def test_golden(case: str):
    check_golden(ToBf16(), case)


def test_sums_stay_in_float32_and_what_is_small_or_large_does_not():
    before, after = norm_model(), norm_model()
    report = convert(ToBf16(), after)
    assert set(left(report)) == {"square", "mean", "shift", "root", "divide"}
    assert after.graph.initializers["w"].dtype == BF16
    for size in (1e-4, 1.0, 1e15):
        x = size * normal(5, 64)
        (exact,), (found,) = run(before, {"x": x}), run(emulated(after), {"x": x})
        assert sqnr_db(exact, found) > 40


def test_masks_do_not_become_infinite():
    text = """
    masked (float[4,4] x, bool[4,4] m, int64[2] size) => (float[4,4] y)
    <float[4,4] w = {0}, float lowest = {-3.4028235e38}, float one = {1}>
    {
        s = MatMul(x, w)
        a = Where(m, s, lowest)
        [fill] f = ConstantOfShape<value = float[1] {-3.4028235e38}>(size)
        b = Where(m, a, f)
        [softmax] y = Softmax(b)
    }
    """
    for opset in (19, 21):  # ConstantOfShape has bfloat16 from 20 on
        before, after = (model_of(text, opset=opset, w=np.eye(4, dtype=np.float32)) for _ in range(2))
        report = convert(ToBf16(), after)
        assert set(left(report)) == {"softmax"} | ({"fill"} if opset == 19 else set())
        assert "1 mask cut off at -3.38953e+38" in report.notes
        mask = np.tril(np.ones((4, 4), bool))
        mask[0] = False  # of which a softmax of minus infinities would make NaN
        feeds = {"x": normal(4, 4), "m": mask, "size": np.array([4, 4])}
        (exact,), (found,) = run(before, feeds), run(emulated(after), feeds)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, exact, atol=1e-2)


INTEGERS = """
g (float[s,8] x, int64[s,1] ids, bool[s,1] flag) => (float[s,8] y) <float[8,8] w = {0}, float half = {0.5}>
{
    [numbers] a = Cast<to = 1>(ids)
    [scaled] b = Mul(a, half)
    [choice] c = Cast<to = 1>(flag)
    p = MatMul(x, w)
    q = Mul(p, b)
    y = Mul(q, c)
}
"""


def test_numbers_made_of_integers_stay_exact_unless_they_are_small():
    feeds = {"x": normal(3, 8), "ids": np.array([[1], [7], [257]]), "flag": np.ones((3, 1), bool)}
    small = feeds | {"ids": np.array([[1], [7], [256]])}
    for calibration, expected in ((None, {"numbers", "scaled"}), ([feeds], {"numbers", "scaled"}), ([small], set())):
        before, after = (model_of(INTEGERS, w=normal(8, 8)) for _ in range(2))
        report = convert(ToBf16(), after, calibration)
        assert set(left(report)) == expected
        (exact,), (found,) = run(before, feeds), run(emulated(after), feeds)
        assert sqnr_db(exact, found) > 40
    assert "up to 256 only" in left(convert(ToBf16(), model_of(INTEGERS, w=normal(8, 8))))["numbers"]


def test_logits_stay_if_asked():
    text = """
    g (float[s,8] x) => (float[s,8] y) <float[8,8] w = {0}, float[8] b = {0}>
    {
        [first] h = MatMul(x, w)
        r = Relu(h)
        [last] p = MatMul(r, w)
        [bias] l = Add(p, b)
        [shape] y = Identity(l)
    }
    """
    model = model_of(text, w=normal(8, 8), b=normal(8))
    report = convert(ToBf16(keep_logits=True), model)
    assert left(report) == dict.fromkeys(("last", "bias", "shape"), "it makes the output 'y'")
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT  # which the last product reads as it was
    assert model.graph.initializers["w_bf16"].dtype == BF16
    assert not convert(ToBf16(), model_of(text, w=normal(8, 8), b=normal(8))).skipped


def test_operators_wait_for_the_opset_that_has_them():
    text = "g (float[1,3,4,4] x) => (float[1,3,4,4] y) <float[3,3,1,1] w = {0}> { [conv] y = Conv(x, w) }"
    weight = normal(3, 3, 1, 1)
    assert left(convert(ToBf16(), model_of(text, w=weight))) == {
        "conv": "it is not defined for bfloat16 before opset 22"
    }
    model = model_of(text, opset=22, w=weight)
    assert not convert(ToBf16(), model).skipped
    assert model.graph.initializers["w"].dtype == BF16
    with pytest.raises(UserError, match="bfloat16 needs opset 13"):
        Pipeline([ToBf16()]).run(model_of(text, opset=12, w=weight))


def test_attention_sums_in_float32():
    text = """
    g (float[1,4,8] x) => (float[1,4,8] y)
    { y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x) }
    """
    model = model_of(text, opset=23)
    assert convert(ToBf16(), model).changed == 1
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert attention.attributes.get_int("softmax_precision") == ir.DataType.FLOAT


def test_inputs_and_outputs_may_become_bfloat16_and_nodes_may_be_excluded():
    model = norm_model()
    report = convert(ToBf16(keep_io=False, exclude=("prod*",)), model)
    assert [value.dtype for value in model.graph.inputs] == [BF16]
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT]
    assert left(report)["product"] == "it is excluded"


def test_compressed_weights_get_scales_in_bfloat16():
    model = norm_model()
    (layer,) = linear_layers(model).layers
    store(model, layer, WeightScheme(), lambda: quantize_weight(layer.matrix(), WeightScheme()))
    convert(ToBf16(), model)
    (weight,) = compressed(model)
    assert weight.tensors[1].dtype == BF16
    x = normal(5, 64)
    (exact,), (found,) = run(norm_model(), {"x": x}), run(emulated(model), {"x": x})
    assert sqnr_db(exact, found) > 18


def test_the_encoder_keeps_its_answers():
    pytest.importorskip("sklearn")
    model = digits_encoder.build()
    Pipeline.parse("lift-constants,convert-opset{version=21},fold-constants").run(model)
    report = convert(ToBf16(), model)
    assert report.changed > 100
    feeds = {"image": digits_encoder.dataset().evaluation["image"][:200]}
    (exact,), (found,) = run(digits_encoder.build(), feeds), run(emulated(model), feeds)
    assert sqnr_db(exact, found) > 32
    assert (exact.argmax(1) == found.argmax(1)).mean() > 0.995
