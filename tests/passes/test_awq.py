"""awq: exact in float, better once the weights are rounded, and a Mul only where it must be and pays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import qgraph.ir
from qgraph.analysis.linear_layers import linear_layers
from qgraph.analysis.scale_folding import foldings, input_source, replace_constant, scale_input
from qgraph.errors import UserError
from qgraph.models import corpus, pydoc_decoder
from qgraph.numerics.weights import WeightScheme, quantize_weight
from qgraph.passes._weight_options import set_bits
from qgraph.passes.awq import Awq
from qgraph.pipeline import Context, Pipeline, Report

HEAD = '<ir_version: 11, opset_import: ["" : 23]>'
BLOCK = """g (float[b, n, 64] x, float[64] g, float[64, 96] u, float[64, 96] v, float[96, 64] w) => (float[b, n, 64] y)
{
    z = RMSNormalization <axis = -1> (x, g)
    gate = MatMul (z, u)
    act = Sigmoid (gate)
    up = MatMul (z, v)
    both = Mul (act, up)
    down = MatMul (both, w)
    y = Add (x, down)
}"""
BARE = """g (float[b, n, 64] x, float[64, 96] u) => (float[b, n, 96] y, float[b, n, 64] t)
{
    t = Sin (x)
    y = MatMul (t, u)
}"""


def network(text: str, spread: float = 2.0) -> ir.Model:
    """Fill in weights; the norm gives channels of very different size."""
    rng = np.random.default_rng(0)
    model = ir.from_onnx_text(f"{HEAD}\n{text}")
    for value in list(model.graph.inputs)[1:]:
        shape = value.shape.numpy()
        array = rng.normal(size=shape) / 8 if len(shape) == 2 else np.exp(spread * rng.normal(size=shape))
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def rows(seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(2, 24, 64))
    return (x * np.where(np.arange(64) % 16 == 3, 1.0, 0.02)).astype(np.float32)


def awq(model: ir.Model, **options) -> Report:
    return Pipeline([Awq(**options)]).run(model, calibration=[{"x": rows(seed)} for seed in range(6)]).parts[0]


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def rounded(model: ir.Model, bits: int, group: int = 32) -> ir.Model:
    """Put every weight rounded to the nearest in its place."""
    for layers in linear_layers(model).by_weight.values():
        matrix = quantize_weight(layers[0].matrix(), WeightScheme(bits=bits, group=group)).dequantize()
        stored = np.ascontiguousarray(matrix if layers[0].transposed else matrix.T)
        replace_constant(model, [input_source(layer) for layer in layers], ir.tensor(stored), "rounded")
    return model


def error(model: ir.Model, exact: np.ndarray, bits: int) -> float:
    return float(((run(rounded(model, bits), {"x": rows(9)}) - exact) ** 2).mean())


@pytest.mark.parametrize("bits", [3, 4])
def test_norm_and_gate_take_the_scales_and_rounding_loses_less(bits: int):
    exact, model = run(network(BLOCK), {"x": rows(9)}), network(BLOCK)
    report = awq(model, bits=bits)
    assert report.changed == 3
    assert list(report.notes) == ["2 of 2 inputs scaled, 2 of them without a Mul"]
    assert Counter(node.op_type for node in model.graph) == Counter(node.op_type for node in network(BLOCK).graph)
    assert set(model.graph.initializers) == {"g_awq", "u_awq", "v_awq_1", "w_awq"}
    assert qgraph.ir.check(model) is None
    np.testing.assert_allclose(run(model, {"x": rows(9)}), exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    assert error(model, exact, bits) < 0.8 * error(network(BLOCK), exact, bits)
    for before, after in report.figures["output_error"].values():
        assert after < before


def test_a_mul_is_spent_only_where_it_pays():
    model = network(BARE)
    report = awq(model)
    assert report.changed == 1
    assert report.notes[1] == "a Mul scales 't': 't' is an output of the model"
    assert [node.op_type for node in model.graph] == ["Sin", "Mul", "MatMul"]
    exact = run(network(BARE), {"x": rows(9)})
    np.testing.assert_allclose(run(model, {"x": rows(9)}), exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    model = network(BARE)
    report = awq(model, least_gain=0.99)
    assert report.changed == 0
    assert "is needed: 't' is an output of the model" in report.skipped[0].reason
    assert [node.op_type for node in model.graph] == ["Sin", "MatMul"]


def test_what_is_left_out_keeps_its_input():
    """An excluded layer reads what the others do: scaling that takes a Mul of their own."""
    model = network(BLOCK)
    report = awq(model, exclude=("MatMul->gate", "MatMul->down"), least_gain=0.0)
    assert [(one.node, one.reason) for one in report.skipped] == [
        ("MatMul->gate", "it is excluded"),
        ("MatMul->down", "it is excluded"),
    ]
    assert {"u", "g", "w"} <= set(model.graph.initializers)
    model = network(BLOCK)
    set_bits(next(node for node in model.graph if node.op_type == "MatMul"), 16)
    assert ("MatMul->gate", "it was chosen to stay in float") in [tuple(one) for one in awq(model).skipped]


def test_samples_are_needed_and_no_layer_is_no_fault():
    with pytest.raises(UserError, match="calibration"):
        Pipeline([Awq()]).run(network(BLOCK))
    assert (
        Pipeline([Awq()]).run(ir.from_onnx_text(f"{HEAD}\ng (float[n] x) => (float[n] y) {{ y = Sin (x) }}")).changed
        == 0
    )


def test_a_weight_that_is_not_finite_is_named():
    model = network(BARE)
    broken = model.graph.initializers["u"].const_value.numpy().copy()
    broken[3, 4] = np.nan
    model.graph.initializers["u"].const_value = ir.tensor(broken, name="u")
    with pytest.raises(UserError, match=r"awq: 'MatMul->y': .*nan"):
        awq(model)
    with pytest.raises(UserError, match="grid"):
        awq(network(BARE), grid=0)
    with pytest.raises(UserError, match=r"awq: .*7"):
        awq(network(BARE), bits=7)


def test_one_block_at_a_time_gives_the_same_bytes():
    bounds = (1 << 30, 1)
    models = [network(BLOCK) for _ in bounds]
    for model, bound in zip(models, bounds, strict=True):
        context = Context(calibration=[{"x": rows(seed)} for seed in range(4)], calibration_memory=bound, threads=1)
        Pipeline([Awq()]).run(model, context=context)
    first, second = (ir.to_proto(model).SerializeToString() for model in models)
    assert first == second


def outlying() -> ir.Model:
    """Return the trained decoder with channels of very different size, as large models have them: the same function."""
    model, rng = pydoc_decoder.build(), np.random.default_rng(5)
    for folding in foldings(model, Context()):
        scale_input(model, folding, np.exp(rng.normal(size=folding.channels))[folding.tied], suffix="wild")
    return model


def test_a_trained_decoder_with_outliers_loses_less():
    """The divergence of its predictions on held-out text from those in float, by rounding to 4 bits."""
    inputs = corpus.windows(corpus.held_out_text(), pydoc_decoder.WINDOW, 8)
    samples = corpus.windows(corpus.training_text(), pydoc_decoder.WINDOW, 6)

    def chances(model: ir.Model) -> np.ndarray:
        logits = run(model, {"input_ids": inputs}).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    exact = chances(pydoc_decoder.build())

    def loss(model: ir.Model) -> float:
        return float((np.exp(exact) * (exact - chances(rounded(model, 4)))).sum(axis=-1).mean())

    scaled = outlying()
    feeds = [{"input_ids": sample[None]} for sample in samples]
    report = Pipeline([Awq(grid=4)]).run(scaled, calibration=feeds).parts[0]
    assert report.changed == 28
    assert list(report.notes) == ["16 of 16 inputs scaled, 16 of them without a Mul"]
    before, after = loss(outlying()), loss(scaled)
    assert after < 0.7 * before, (before, after)
