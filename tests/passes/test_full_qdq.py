"""`full-qdq`: golden graphs, what the numbers lose, widths, masks, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from integer_compilation import check_golden, compiled, feeds, graph, in_onnxruntime

from qgraph.analysis.integer_units import integer_units
from qgraph.errors import UserError
from qgraph.passes._full_qdq_weights import style_of, weight_errors
from qgraph.passes.full_qdq import FullQdq
from qgraph.pipeline import Pipeline

GOLDEN = Path(__file__).parent.parent / "golden" / "full-qdq"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.onnxtxt")), ids=lambda path: path.stem)
def test_golden(path: Path):
    _, report = check_golden(path, "full-qdq")
    (part,) = report.parts
    assert (part.changed > 0) == (not path.stem.startswith("not-")), "cases that stay are called not-..."


def test_scores_keep_their_range_beside_a_mask():
    """What a Where puts in the place of scores must not widen the scale that they share with its result."""
    model = graph(
        "(float[2,4,8] x, bool[2,1,4] c, float[8,8] w) => (float[] y) { q = MatMul(x, w) t = Transpose<perm=[0,2,1]>(q)"
        " s = MatMul(q, t) l = Constant<value_float=-3.4e38>() a = Where(c, s, l) p = Softmax(a) y = MatMul(p, q) }"
    )
    one = compiled(model)
    (scores,) = [node for node in one.quantized.graph if node.op_type == "QuantizeLinear" and node.name == "s_q"]
    assert float(scores.inputs[1].const_value.numpy().item()) < 0.01
    inputs = feeds(model, 3)
    (exact,), (found,) = in_onnxruntime(model, inputs), in_onnxruntime(one.integer, inputs)
    assert np.sqrt(np.mean((exact - found) ** 2)) < 0.05 * np.sqrt(np.mean(exact**2))


def test_a_function_does_not_pass_through_what_is_quantized():
    """A choice between x and a function of it is no function of x alone once the one in between is rounded."""
    model = graph(
        "(float[3,8] x, float[8,4] w) => (float[] y, float[] z) { s = Softplus(x) d = Div(x, s) z = MatMul(d, w)"
        " r = Relu(d) k = Constant<value_float=0.1>() g = Greater(r, k) y = Where(g, r, x) }"
    )
    one = compiled(model)
    assert not any(part.skipped for report in one.reports for part in report.parts)
    again = one.quantized.clone()
    samples = [feeds(model, seed) for seed in range(4)]
    assert Pipeline.parse("full-qdq").run(again, calibration=samples).parts[0].changed == 0


def test_old_opsets_are_refused():
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]>\ng (float[2,4] x) => (float[2,4] y) { y = Relu(x) }'
    )
    with pytest.raises(UserError, match="full-qdq needs opset 21, and the model has 17: put convert-opset before it"):
        Pipeline.parse("full-qdq").run(model, calibration=[{"x": np.zeros((2, 4), np.float32)}])
    with pytest.raises(UserError, match="integer-requantize needs opset 21, and the model has 17"):
        Pipeline.parse("integer-requantize").run(model)


SPECTRUM = (
    "(float[1,1,512] x, float[24,1,64] w, float[16,12] w1) => (float[] y)"
    " { c = Conv<strides=[16]>(x, w) k1 = Constant<value_ints=[1,12,2,29]>() r = Reshape(c, k1) s = Mul(r, r)"
    " a = Constant<value_ints=[2]>() t = ReduceSum<keepdims=0>(s, a) m = Sqrt(t) q = Mul(m, m)"
    " e = Constant<value_float=1e-8>() u = Add(q, e) l = Log(u) y = MatMul(w1, l) }"
)
"""Filters, the energies of their pairs, and a layer that reads the logarithms of these."""


def stored_weights(model: ir.Model) -> dict[str, ir.DataType]:
    """Return the types of the weights that layers read."""
    nodes = [node for node in model.graph if node.op_type in ("Conv", "MatMul", "Gemm")]
    read = [value.producer() for node in nodes for value in node.inputs if value is not None]
    stored = [node.inputs[0] for node in read if node is not None and node.op_type == "DequantizeLinear"]
    return {value.name: value.dtype for value in stored if value.producer() is None}


def test_weights_have_16_bits_where_8_are_measured_to_hurt():
    """A filter's stop band is what its weights' rounding makes of it, and a logarithm shows that."""
    model = graph(SPECTRUM)
    time, tones = np.arange(64), np.arange(12)[:, None] * 0.02 + 0.05
    waves = np.stack([np.cos(2 * np.pi * tones * time), np.sin(2 * np.pi * tones * time)], 1).reshape(24, 1, 64)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * (time + 0.5) / 64)) ** 2
    model.graph.initializers["w"].const_value = ir.tensor((waves * window).astype(np.float32), name="w")
    Pipeline.parse("root-magnitudes").run(model)
    samples = [{"x": np.sin(np.arange(512) * (0.3 + 0.05 * n)).astype(np.float32)[None, None]} for n in range(6)]

    def run(options: str) -> tuple[ir.Model, float, list[str]]:
        quantized = model.clone()
        (part,) = Pipeline.parse(f"full-qdq{{{options}}}").run(quantized, calibration=samples).parts
        (exact,), (found,) = in_onnxruntime(model, samples[5]), in_onnxruntime(quantized, samples[5])
        return quantized, float(np.sum((exact - found) ** 2) / np.sum(exact**2)), list(part.notes)

    automatic, noise, notes = run("")
    assert stored_weights(automatic)["w_q"] is ir.DataType.INT16
    assert any(note.startswith("weight of ") and "16 bits, as 8 leave" in note for note in notes)
    narrow, narrow_noise, notes = run("wide_weights=none")
    assert set(stored_weights(narrow).values()) == {ir.DataType.INT8}
    assert not any("16 bits, as 8 leave" in note for note in notes)
    assert noise < narrow_noise / 4
    assert set(stored_weights(run("wide_weights=all")[0]).values()) == {ir.DataType.INT16}


def test_predictions_follow_the_options_of_weights():
    """The rounding of weights that is foreseen is the one that is done: of 4 bits, and with one scale."""
    model = graph("(float[4,16] x, float[16,8] w) => (float[] y) { y = MatMul(x, w) }")
    units = integer_units(model.graph).units
    for options in (FullQdq(), FullQdq(weights="int4"), FullQdq(per_channel=False), FullQdq(scales="pow2")):
        quantized = model.clone()
        Pipeline([options]).run(quantized, calibration=[feeds(model, 0)])
        (node,) = [one for one in quantized.graph if one.outputs[0].name == "w_dq"]
        codes, scale = (value.const_value.numpy() for value in node.inputs[:2])
        exact = model.graph.initializers["w"].const_value.numpy()
        error = weight_errors(units, style_of(options))["w"]
        np.testing.assert_array_equal(error, codes.astype(np.float32) * scale - exact)


def test_biases_beside_weights_of_16_bits_survive_the_runtime():
    """A bias in units of input times weight leaves int32 here, to which ONNX Runtime would round it."""
    model = graph("(float[1,2,6,6] x, float[3,2,3,3] w, float[3] b) => (float[] y) { y = Conv(x, w, b) }")
    model.graph.initializers["b"].const_value = ir.tensor(np.array([9e3, -3e4, 2e4], np.float32), name="b")
    quantized = compiled(model, "wide_weights=all,scales=pow2").quantized
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    data = ir.to_proto(quantized).SerializeToString()
    (found,) = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"]).run(None, feeds(model, 1))
    (exact,) = in_onnxruntime(model, feeds(model, 1))
    np.testing.assert_allclose(found, exact, atol=2)
