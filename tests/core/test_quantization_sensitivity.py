"""Sensitivities against putting each error in on its own, and the cases that bookkeeping could get wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from scipy import stats

import qgraph.ir
from qgraph.analysis import perturbation_effects, perturbation_measures
from qgraph.analysis.perturbation_effects import effects
from qgraph.analysis.perturbations import Perturbation, Rounding
from qgraph.analysis.quantization_sensitivity import Sensitivities, tensor_sensitivities
from qgraph.analysis.quantized_tensors import quantized_tensors
from qgraph.errors import UserError
from qgraph.models import digits_cnn
from qgraph.pipeline import Context, Pipeline

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
PREPARE = "lift-constants,convert-opset{version=21},fold-constants,infer-shapes,remove-identity,fold-batch-norm"


def filled(text: str) -> ir.Model:
    """Return the model of a text, all inputs of which but the first are made constants."""
    model = ir.from_onnx_text(HEAD + text)
    rng = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        value.const_value = ir.tensor(rng.normal(size=value.shape.numpy()).astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def samples(shape: tuple[int, ...], count: int = 24) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(count)]


def quantized(model: ir.Model, context: Context, passes: str) -> tuple[ir.Model, ir.Model]:
    Pipeline.parse(f"{PREPARE},{passes}").run(model, context=context)
    assert context.reference is not None
    return context.reference, model


def one_by_one(model: ir.Model, context: Context, made: dict[str, Perturbation]) -> dict[str, float]:
    """Return the SQNR at the outputs under each error alone, in dB, from all samples."""
    outputs = [str(value.name) for value in model.graph.outputs]
    powers, unknown = perturbation_measures.measure(model, context, made, outputs)
    assert not unknown
    return {name: -10 * np.log10(power) for name, power in powers.items() if power > 0}


@pytest.fixture
def measure_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbation_measures, "_SAMPLES", 1000)


def agrees(reference: ir.Model, result: ir.Model, context: Context) -> Sensitivities:
    found = tensor_sensitivities(reference, result, context)
    tensors, _ = quantized_tensors(reference, result)
    truth = one_by_one(reference, context, {str(n): one.perturbation for n, one in enumerate(tensors)})
    pairs = [
        (found.tensors[number].output_sqnr_db, truth[str(number)])
        for number in range(len(tensors))
        if tensors[number].bits <= 8 and str(number) in truth
    ]
    estimates, measured = np.array(pairs).T
    assert stats.spearmanr(estimates, measured)[0] > 0.93
    assert np.mean(np.abs(estimates - measured) < 1.5) > 0.9
    return found


@pytest.mark.usefixtures("measure_on_all")
def test_a_network_on_the_digits():
    images = digits_cnn.dataset().calibration["image"]
    context = Context(threads=1, calibration=[{"image": images[start : start + 6]} for start in range(0, 12, 6)])
    reference, result = quantized(digits_cnn.build(), context, "qdq")
    found = agrees(reference, result, context)
    assert {one.method for one in found.tensors} == {"gradient"}
    assert not found.notes
    outputs = [
        np.concatenate([session(model).run(None, feed)[0] for feed in context.calibration])
        for model in (reference, result)
    ]
    error = np.sum((outputs[0] - outputs[1]) ** 2, dtype=np.float64)
    actual = 10 * np.log10(np.sum(outputs[0] ** 2, dtype=np.float64) / error)
    assert found.output_sqnr_db == pytest.approx(actual, abs=2.0)
    assert found.predicted() == pytest.approx(found.output_sqnr_db, abs=0.01)
    worst = found.worst_first()[:10]
    assert found.predicted(one.tensor for one in worst) > found.output_sqnr_db + 2
    again = Sensitivities.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again == found
    assert again.predicted() == pytest.approx(found.output_sqnr_db, abs=1.0)
    assert [one.node for one in again.nodes()] == [one.node for one in found.nodes()]


@pytest.mark.usefixtures("measure_on_all")
def test_four_bits_on_a_real_model(assets: Path):
    rng = np.random.default_rng(0)
    model = qgraph.ir.load(assets / "cifar10" / "resnet20_cifar10.onnx")
    name = next(str(value.name) for value in model.graph.inputs if value.const_value is None)
    feeds = [{name: rng.normal(size=(2, 3, 32, 32)).astype(np.float32)} for _ in range(2)]
    reference, result = quantized(model, Context(threads=1, calibration=feeds), "qdq{weights=int4}")
    found = tensor_sensitivities(reference, result, Context(threads=1, calibration=feeds))
    bits = {one.bits for one in found.tensors if one.kind == "weight"}
    assert bits == {4, 32}
    narrow = [one.own_sqnr_db for one in found.tensors if one.bits == 4]
    assert all(8 < figure < 30 for figure in narrow)
    assert all(one.kind == "weight" for one in found.worst_first()[:5])


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


BRANCHES = """
g (float[n, 4, 6, 6] x, float[4, 4, 3, 3] a, float[4, 4, 3, 3] b) => (float[n, 4, 6, 6] y)
{
    [first] h = Conv <pads = [1, 1, 1, 1]> (x, a)
    [bend] s = Sigmoid (h)
    [shared] i = Conv <pads = [1, 1, 1, 1]> (s, b)
    [again] j = Conv <pads = [1, 1, 1, 1]> (i, b)
    [side] t = Sin (i)
    [sum] y = Add (j, t)
}"""


@pytest.mark.usefixtures("measure_on_all")
def test_branches_and_shared_weights():
    """Only the readers of the rounded form count, and a weight with two readers through both of them."""
    context = Context(threads=1, calibration=samples((3, 4, 6, 6)))
    reference, result = quantized(filled(BRANCHES), context, "qdq{weights=int4}")
    found = agrees(reference, result, context)
    rows = {one.tensor: one for one in found.tensors}
    assert rows["b"].readers == ("shared", "again")
    assert rows["i"].readers in (("again",), ("again", "side"))
    assert rows["b"].bits == 4


def test_readers_of_the_float_tensor_are_spared():
    model = filled(BRANCHES)
    rounding = Rounding(np.float32(0.5), np.int8(0))
    context = Context(threads=1, calibration=samples((3, 4, 6, 6)))
    uses = {"both": frozenset(), "side": frozenset({("again", 0)}), "again": frozenset({("side", 0)})}
    made = {name: Perturbation("i", rounding, spared) for name, spared in uses.items()}
    found = effects(model, context, made)
    truth = one_by_one(model, context, made)
    for name in uses:
        assert found.sqnr_db([name]) == pytest.approx(truth[name], abs=1.0)
    assert found.sqnr_db(["side", "again"]) == pytest.approx(found.sqnr_db(["both"]), abs=0.01)


def test_saturation_counts():
    model = filled("g (float[n, 6] x, float[6, 3] w) => (float[n, 3] y) { [m] y = MatMul (x, w) }")
    fine, narrow = np.float32(6 / 255), np.float32(1 / 255)
    context = Context(threads=1, calibration=samples((4, 6)))
    found = effects(
        model,
        context,
        {
            "fine": Perturbation("x", Rounding(fine, np.uint8(128))),
            "saturated": Perturbation("x", Rounding(narrow, np.uint8(128))),
        },
    )
    own = [10 * np.log10(found.signal[index] / found.noise[index]) for index in range(2)]
    x = np.concatenate([feed["x"] for feed in context.calibration])
    error = np.clip(np.rint(x / narrow), -128, 127) * narrow - x
    assert own[1] == pytest.approx(10 * np.log10(np.sum(x**2) / np.sum(error**2)), abs=1e-3)
    assert own[0] > own[1] + 20
    assert found.sqnr_db(["fine"]) > found.sqnr_db(["saturated"]) + 20


def test_errors_may_be_arrays_and_functions():
    """The three ways to tell an error give the same."""
    model = filled(
        "g (float[n, 6] x, float[6, 3] w, float[3] b) => (float[n, 3] y) {"
        " h = MatMul (x, w) r = Relu (h) y = Add (r, b) }"
    )
    context = Context(threads=1, calibration=samples((4, 6)))
    step = np.float32(0.25)

    def error(array: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(array / step), -128, 127) * step - array

    weight = model.graph.initializers["w"].const_value.numpy()
    found = effects(model, context, {"r": Rounding(step, np.int8(0)), "w": error(weight), "b": np.ones(3, np.float32)})
    told = effects(model, context, {"r": error, "w": error(weight), "b": np.ones(3, np.float32)})
    np.testing.assert_allclose(found.draws, told.draws, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(found.noise, told.noise, rtol=1e-4)
    outputs = np.concatenate([session(model).run(None, feed)[0] for feed in context.calibration])
    expected = 10 * np.log10(np.sum(outputs.astype(np.float64) ** 2) / outputs.size)
    assert found.sqnr_db(["b"]) == pytest.approx(expected, abs=1.0)


def test_outputs_count_alike():
    """An output a thousand times as large does not hide the other's error."""
    model = filled(
        "g (float[n, 6] x) => (float[n, 6] y, float[n, 6] z) {"
        " k = Constant <value_float = 1000.0> () y = Mul (x, k) z = Neg (x) }"
    )
    context = Context(threads=1, calibration=samples((4, 6)))
    found = effects(model, context, {"x": Rounding(np.float32(0.2), np.int8(0))})
    own = 10 * np.log10(found.signal[0] / found.noise[0])
    assert found.sqnr_db(["x"]) == pytest.approx(own, abs=1.0)


def test_an_output_may_be_a_scalar():
    model = filled("g (float[n, 6] x) => (float y) { s = Sin (x) y = ReduceMean <keepdims = 0> (s) }")
    context = Context(threads=1, calibration=samples((4, 6)))
    found = effects(model, context, {"x": lambda array: array * 0.01})
    assert 30 < found.sqnr_db(["x"]) < 50


@pytest.mark.usefixtures("measure_on_all")
def test_what_has_no_gradient_is_measured():
    model = filled(
        "g (float[n, 6] x, float[6, 6] w) => (float[n, 6] y) {"
        ' [m] h = MatMul (x, w) [e] i = Einsum <equation = "ij->ij"> (h) [a] y = Sin (i) }'
    )
    context = Context(threads=1, calibration=samples((4, 6)))
    rounding = Rounding(np.float32(0.1), np.int8(0))
    found = effects(model, context, {"x": rounding, "i": rounding, "h": lambda array: array * 0.01})
    assert set(found.measured) == {"x"}
    assert set(found.unknown) == {"h"}
    assert "no gradient" in found.unknown["h"]
    h = np.concatenate([feed["x"] for feed in context.calibration])
    error = np.clip(np.rint(h / 0.1), -128, 127) * np.float32(0.1) - h
    weight = model.graph.initializers["w"].const_value.numpy()
    exact, changed = (np.sin(array @ weight) for array in (h, h + error))
    expected = np.sum((exact - changed) ** 2) / np.sum(exact**2)
    assert found.measured["x"] == pytest.approx(expected, rel=1e-3)
    assert found.power(["x", "i"]) == pytest.approx(found.power(["x"]) + found.power(["i"]))


@pytest.mark.usefixtures("measure_on_all")
def test_pieces_of_a_batch_give_the_same(monkeypatch: pytest.MonkeyPatch):
    """Little memory cuts feeds into rows; where rows depend on one another, they stay together."""
    context = Context(threads=1, calibration=samples((8, 4, 6, 6), 2))
    model, made = filled(BRANCHES), {"i": Rounding(np.float32(0.5), np.int8(0))}
    whole = effects(model, context, made, draws=512)
    few = Context(threads=1, calibration=context.calibration, calibration_memory=1)
    monkeypatch.setattr(perturbation_effects, "_MOST_REPEATS", 64)
    rows = effects(model, few, made, draws=512)
    assert rows.noise == pytest.approx(whole.noise, rel=1e-4)
    assert rows.sqnr_db(["i"]) == pytest.approx(whole.sqnr_db(["i"]), abs=1.0)
    mixed = filled(
        "g (float[n, 6] x) => (float[n, 6] y) { t = Constant <value_ints = [0]> ()"
        " m = ReduceMean (x, t) y = Mul (x, m) }"
    )
    context = Context(threads=1, calibration=samples((8, 6)), calibration_memory=1)
    found = effects(mixed, context, {"x": Rounding(np.float32(0.1), np.int8(0))})
    truth = one_by_one(mixed, context, {"x": Perturbation("x", Rounding(np.float32(0.1), np.int8(0)))})
    assert found.sqnr_db(["x"]) == pytest.approx(truth["x"], abs=1.5)


def test_constants_in_other_forms_are_paired():
    """Sub becomes Add, Div becomes Mul, Gemm loses its factors; tables are looked up in integers."""
    text = """g (int64[n] ids, float[2048, 16] t, float[16, 8] w, float[8] b, float[16, 16] v) => (float[n, 8] y)
    {
        [look] r = Gather (t, ids)
        [mix] m = MatMul (r, v)
        two = Constant <value_float = 2.0> ()
        [minus] s = Sub (m, two)
        [over] d = Div (s, two)
        [head] y = Gemm <alpha = 0.5, beta = 2.0> (d, w, b)
    }"""
    rng = np.random.default_rng(0)
    context = Context(threads=1, calibration=[{"ids": rng.integers(0, 2048, 32)} for _ in range(4)])
    reference, result = quantized(filled(text), context, "qdq")
    found = tensor_sensitivities(reference, result, context)
    assert not found.notes
    weights = {one.tensor: one.own_sqnr_db for one in found.tensors if one.kind == "weight"}
    assert {"t", "w", "b", "v"} <= set(weights)
    assert all(figure is None or figure > 30 for figure in weights.values())


def test_nodes_without_names_are_paired():
    """The Conv takes the Relu's name, and is found behind it."""
    text = BRANCHES.replace("s = Sigmoid (h)", "s = Relu (h)")
    text = re.sub(r"\[\w+\] ", "", text)
    context = Context(threads=1, calibration=samples((3, 4, 6, 6), 4))
    reference, result = quantized(filled(text), context, "qdq")
    found = tensor_sensitivities(reference, result, context)
    assert not found.notes
    rows = {one.tensor: one for one in found.tensors}
    assert rows["a"].readers == ("Conv->h",)
    assert rows["b"].readers == ("Conv->i", "Conv->j")
    assert rows["s"].readers == ("Conv->i",)


def test_refusals():
    context = Context(threads=1, calibration=samples((4, 6)))
    model = filled("g (float[n, 6] x, float[6, 3] w) => (float[n, 3] y) { y = MatMul (x, w) }")
    with pytest.raises(UserError, match="no tensor is quantized"):
        tensor_sensitivities(model, model, context)
    with pytest.raises(UserError, match="needs calibration data"):
        effects(model, Context(), {"x": Rounding(np.float32(1), np.int8(0))})
    with pytest.raises(ValueError, match="no value 'nobody'"):
        effects(model, context, {"nobody": Rounding(np.float32(1), np.int8(0))})


def test_a_weight_that_a_subgraph_reads_too_is_measured():
    text = """g (float[n, 6] x, float[6, 6] w) => (float[n, 6] y) {
        h = MatMul (x, w)
        zero = Constant <value = float {0}> ()
        sum = ReduceSum <keepdims = 0> (x)
        positive = Greater (sum, zero)
        y = If (positive) <
            then_branch = one () => (float[n, 6] a) { a = MatMul (h, w) },
            else_branch = two () => (float[n, 6] b) { b = Neg (h) }
        >
    }"""
    model, context = filled(text), Context(calibration=samples((4, 6), count=4), threads=1)
    weight = model.graph.initializers["w"].const_value.numpy()
    found = effects(model, context, {"w": (0.01 * weight).astype(np.float32)})
    assert list(found.measured) == ["w"]
    assert 0 < found.power(["w"]) < 0.01
