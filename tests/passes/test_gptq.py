"""gptq: better outputs than rounding, whatever reads the weights, and a run that was stopped goes on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qgraph.analysis.compressed_weights import compressed
from qgraph.analysis.linear_layers import linear_layers
from qgraph.analysis.sparse_weights import sparse_weights
from qgraph.errors import UserError
from qgraph.numerics.gptq import GptqResult, gptq
from qgraph.numerics.sparsity import Pattern, follows
from qgraph.numerics.weights import WeightScheme, quantize_weight
from qgraph.passes._weight_options import set_bits
from qgraph.passes.gptq import Gptq
from qgraph.passes.rtn import Rtn
from qgraph.pipeline import Context, Pipeline, Report

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
LAYERS = """g (float[n, 32] x, float[32, 48] a, float[48, 32] b, float[32, 48] c, float[24, 48] d, float[24] e)
    => (float[n, 24] y)
{
    one = MatMul (x, a)
    act = Relu (one)
    two = MatMul (act, b)
    sum = Add (two, x)
    three = MatMul (sum, c)
    [last] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (three, d, e)
}"""
TIED = """g (int64[n] ids, float[40, 32] table, float[32, 32] w) => (float[n, 40] y)
{
    x = Gather (table, ids)
    h = MatMul (x, w)
    h2 = MatMul (h, w)
    t = Transpose <perm = [1, 0]> (table)
    y = MatMul (h2, t)
}"""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def correlated(rows: int, seed: int) -> np.ndarray:
    return (normal(rows, 8, seed=seed) @ normal(8, 32, seed=9) + 0.3 * normal(rows, 32, seed=seed + 1)).astype(
        np.float32
    )


def model_of(text: str, dtype: type[np.generic] = np.float32) -> ir.Model:
    model = ir.from_onnx_text(f"{HEAD}\n{text}")
    for number, value in enumerate(list(model.graph.inputs)[1:]):
        array = (0.3 * normal(*value.shape.numpy(), seed=number)).astype(dtype)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def context(**changes: object) -> Context:
    feeds = [{"x": correlated(40, seed)} for seed in range(0, 20, 2)]
    return dataclasses.replace(Context(calibration=feeds, threads=1), **changes)


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def apply(model: ir.Model, one: Gptq, given: Context) -> Report:
    return Pipeline([one]).run(model, context=given).parts[0]


def gptq_of(**options: object) -> Gptq:
    return Gptq(**{"min_elements": 0, **options})


def error(changed: ir.Model, text: str = LAYERS) -> float:
    feed = {"x": correlated(200, 100)}
    return float(np.square(run(model_of(text), feed) - run(changed, feed)).sum())


def rounded(scheme: WeightScheme) -> ir.Model:
    """Round every weight to the nearest, as float."""
    model = model_of(LAYERS)
    for layer in linear_layers(model).layers:
        matrix = quantize_weight(layer.matrix(), scheme).dequantize()
        layer.weight.const_value = ir.tensor(np.ascontiguousarray(matrix if layer.transposed else matrix.T))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 3, "symmetric": True, "group": 16},
        {"bits": 2, "drift": 0.0, "sequential": "block"},
        {"format": "nf4", "order": "none"},
        {"bits": 4, "group": 0, "refine": 0},
    ],
    ids=str,
)
def test_outputs_are_nearer_than_by_rounding_to_the_nearest(options: dict[str, object]) -> None:
    model = model_of(LAYERS)
    chosen = gptq_of(**options)
    report = apply(model, chosen, context())
    assert report.changed == 4
    scheme = WeightScheme(chosen.format, chosen.bits, chosen.group, chosen.symmetric)
    assert {one.scheme for one in compressed(model)} == {scheme}
    assert error(model) < 0.7 * error(rounded(scheme))
    assert all(0 < one["relative_error"] < 0.3 for one in report.figures["layers"].values())


@pytest.mark.parametrize("drift", [None, 0.5])
def test_weights_make_up_for_all_that_the_layers_before_have_changed(
    drift: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    aims = []

    def recording(weight: np.ndarray, *arguments: object, **options: object) -> GptqResult:
        aims.append(weight)
        return gptq(weight, *arguments, **options)

    monkeypatch.setattr("qgraph.passes.gptq.gptq", recording)
    model, given = model_of(LAYERS), context()
    apply(model, gptq_of(bits=2, **({} if drift is None else {"drift": drift})), given)

    first = next(one for one in compressed(model) if one.name == "a").quantized().dequantize()
    plain = {name: model_of(LAYERS).graph.initializers[name].const_value.numpy() for name in "ab"}
    x = np.concatenate([feed["x"] for feed in given.samples("a test")])
    before, now = np.maximum(x @ plain["a"], 0).astype(np.float64), np.maximum(x @ first.T, 0).astype(np.float64)
    gram = now.T @ now
    damping = 0.1 * 48 / len(x) * np.trace(gram) / 48  # grows with the inputs for each row seen
    moved = np.linalg.solve(gram + damping * np.eye(48), now.T @ (before - now) @ plain["b"]).T
    np.testing.assert_allclose(aims[1] - plain["b"].T, (drift or 1.0) * moved, rtol=1e-3, atol=1e-4)
    assert np.abs(moved).max() > 0.05


def test_tied_and_shared_weights_stay_one() -> None:
    model = model_of(TIED)
    feeds = [{"ids": np.random.default_rng(seed).integers(0, 40, 16)} for seed in range(8)]
    before = run(model, feeds[0])
    report = apply(model, gptq_of(bits=8), context(calibration=feeds))
    found = list(compressed(model))
    assert report.changed == 4
    assert sorted(one.name for one in found) == ["table", "w"]
    assert sorted(len(one.readers) for one in found) == [2, 2]
    np.testing.assert_allclose(run(model, feeds[0]), before, atol=0.02 * np.abs(before).max())


def test_a_table_gets_no_zeros_where_the_output_layer_shares_it() -> None:
    model = model_of(TIED)
    feeds = [{"ids": np.random.default_rng(seed).integers(0, 40, 16)} for seed in range(8)]
    report = apply(model, gptq_of(sparse="2:4"), context(calibration=feeds))
    assert "1 of them 2:4" in report.notes
    sparse = list(sparse_weights(model))
    assert len(sparse) == 2
    for one in sparse:
        assert one.matrix is not None
        assert follows(one.matrix, Pattern("neighbours"))


def test_layers_whose_inputs_do_not_fit_a_pattern_are_told() -> None:
    model = model_of(LAYERS)
    report = apply(model, gptq_of(sparse="3:5"), context())
    told = "not 3:5, since their inputs are no multiple of 5: MatMul->one, MatMul->two, MatMul->three and 1 more"
    assert told in report.notes
    assert not list(sparse_weights(model))


def test_what_is_left_alone_is_told_and_stays_as_it_is() -> None:
    model = model_of(TIED)
    report = apply(model, gptq_of(exclude=("MatMul->h",), embeddings=False), context())
    assert report.changed == 0
    reasons = dict(report.skipped)
    assert reasons["MatMul->h"] == "it is excluded" or "excluded" in reasons["MatMul->h"]
    assert "shared with 'MatMul->h'" in reasons["MatMul->h2"]
    assert "embeddings=false; the output layer shares it" in reasons["MatMul->y"]


def test_widths_chosen_before_count_and_are_forgotten() -> None:
    model = model_of(LAYERS)
    layers = linear_layers(model).layers
    set_bits(layers[0].node, 8)
    set_bits(layers[1].node, 16)
    report = apply(model, gptq_of(bits=3), context())
    assert [one.scheme.bits for one in compressed(model)] == [8, 3, 3]
    assert ("MatMul->two", "it was chosen to stay in float") in report.skipped
    assert not any("qgraph.bits" in node.metadata_props for node in (layers[0].node, layers[2].node))


def test_a_second_run_finds_nothing_to_do() -> None:
    model = model_of(LAYERS)
    apply(model, gptq_of(), context())
    text = ir.to_proto(model).SerializeToString()
    report = apply(model, gptq_of(), context())
    assert report.changed == 0
    assert {reason for _, reason in report.skipped} == {"its weight is compressed already"}
    assert ir.to_proto(model).SerializeToString() == text


def test_too_little_calibration_and_ragged_groups_are_noted() -> None:
    model = model_of(LAYERS)
    report = apply(model, gptq_of(), context(calibration=[{"x": correlated(5, 0)}]))
    assert any("fewer calibration rows than inputs" in note for note in report.notes)
    text = "the last group is shorter in MatMul->two (48 inputs in groups of 32), last"
    assert any(text in note for note in report.notes)


@pytest.mark.parametrize("bad", [{"bits": 7}, {"format": "int9"}, {"group": -1}])
def test_schemes_that_are_none_are_an_error_of_the_user(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match="gptq"):
        apply(model_of(LAYERS), gptq_of(**bad), context())


def test_it_is_named_where_calibration_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'gptq' needs calibration data"):
        apply(model_of(LAYERS), gptq_of(), context(calibration=None, work_folder=tmp_path / "work"))


@pytest.mark.parametrize("options", [{"refine": -1}, {"drift": 5.0}, {"drift": -0.1}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        apply(model_of(TIED), gptq_of(**options), context())


def test_a_negative_damping_is_refused() -> None:
    with pytest.raises(UserError, match="0 or more, not -1"):
        apply(model_of(TIED), gptq_of(damping=-1.0), context())


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = model_of(LAYERS)
    model.graph.initializers["b"].const_value = ir.tensor(np.full((48, 32), np.nan, np.float32))
    with pytest.raises(UserError, match=r"'b' of 'MatMul->two' holds NaN"):
        apply(model, gptq_of(), context())


def test_an_old_opset_is_refused_before_any_work() -> None:
    model = model_of(LAYERS)
    model.graph.opset_imports[""] = 20
    with pytest.raises(UserError, match="convert-opset"):
        apply(model, gptq_of(), context(calibration=None))


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = 0

    def counted(*arguments: object, **options: object) -> GptqResult:
        nonlocal done
        done += 1
        return gptq(*arguments, **options)

    monkeypatch.setattr("qgraph.passes.gptq.gptq", counted)
    whole = model_of(LAYERS)
    expected = apply(whole, gptq_of(), context())
    work = tmp_path / "work"
    steps = 0

    def stop(step: str, done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(model_of(LAYERS), gptq_of(), context(work_folder=work, progress=stop))
    kept = sorted(path.name for path in work.iterdir())
    assert 0 < len([name for name in kept if name.endswith(".npz")]) < 4
    assert all(name.endswith(".npz") for name in kept)

    (work / kept[0]).write_bytes((work / kept[0]).read_bytes()[:-40])  # one was damaged since
    model = model_of(LAYERS)
    done = 0
    report = apply(model, gptq_of(), context(work_folder=work))
    assert done == 4 - (len(kept) - 1)
    assert (report.notes, report.figures) == (expected.notes, expected.figures)
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(whole).SerializeToString()

    other = model_of(LAYERS)
    other.graph.initializers["a"].const_value = ir.tensor(normal(32, 48, seed=77))
    done = 0
    apply(other, gptq_of(), context(work_folder=work))
    assert done == 4


def test_a_work_folder_that_vanishes_is_told(tmp_path: Path) -> None:
    work = tmp_path / "work"

    def remove(step: str, done: int, total: int) -> None:
        if done > total * 0.6 and work.exists():
            shutil.rmtree(work)

    with pytest.raises(UserError, match="was removed during this run"):
        apply(model_of(LAYERS), gptq_of(), context(work_folder=work, progress=remove))


CONVOLUTIONS = """g (float[n, 6, 12, 12] x, float[16, 6, 3, 3] first, float[16, 1, 3, 3] second,
    float[24, 8, 1, 1] third, float[24, 8, 2, 2] fourth, float[16, 16, 3, 3] fifth, float[8, 10] last)
    => (float[n, 10] y)
{
    a = Conv <pads = [1, 1, 1, 1]> (x, first)
    b = Relu (a)
    c = Conv <pads = [1, 1, 1, 1], group = 16, strides = [2, 2]> (b, second)
    d = Relu (c)
    [twice] e = Conv <auto_pad = "SAME_UPPER"> (d, fifth)
    f = Add (e, d)
    h = Conv <group = 2> (f, third)
    i = Relu (h)
    j = ConvTranspose <strides = [2, 2]> (i, fourth)
    k = GlobalAveragePool (j)
    l = Flatten (k)
    y = MatMul (l, last)
}"""
ALL = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def images(seed: int, count: int = 4) -> np.ndarray:
    basis = normal(20, 6 * 144, seed=99)
    return (normal(count, 20, seed=seed) @ basis / 4 + 0.5).reshape(count, 6, 12, 12).astype(np.float32)


def image_context(**changes: object) -> Context:
    return context(calibration=[{"x": images(seed)} for seed in range(8)], **changes)


def convolution_error(changed: ir.Model) -> float:
    feed = {"x": images(50, 16)}
    before = run(model_of(CONVOLUTIONS), feed)
    return float(np.square(before - run(changed, feed)).sum() / np.square(before).sum())


@pytest.mark.parametrize("options", [{}, {"drift": 0.0}, {"sequential": "block"}, {"refine": 0}], ids=str)
def test_convolutions_are_nearer_than_by_rounding_to_the_nearest(options: dict[str, object]) -> None:
    model, plain = model_of(CONVOLUTIONS), model_of(CONVOLUTIONS)
    report = apply(model, gptq_of(group=0, symmetric=True, ops=ALL, **options), image_context())
    Pipeline([Rtn(group=0, symmetric=True, ops=ALL, min_elements=0)]).run(plain)
    assert report.changed == 6
    assert [one.scheme for one in compressed(model)] == [WeightScheme("int", 4, 0, symmetric=True)] * 6
    assert convolution_error(model) < 0.4 * convolution_error(plain)


def test_a_convolution_has_one_positive_scale_for_each_output_and_reads_back() -> None:
    model = model_of(CONVOLUTIONS)
    given = image_context()
    reference = run(model, {"x": images(50)})
    report = apply(model, gptq_of(ops=("Conv", "ConvTranspose")), given)
    assert ("MatMul->y", "MatMul is not among 'ops'") in report.skipped
    assert given.reference is not None
    np.testing.assert_array_equal(run(given.reference, {"x": images(50)}), reference)
    loaded = ir.from_proto(ir.to_proto(model))
    for before, after in zip(compressed(model), compressed(loaded), strict=True):
        assert before.dequantize is not None
        scale = before.tensors[1].const_value.numpy()
        assert scale.shape == (before.outputs,)
        assert (scale > 0).all()
        axis = before.dequantize.attributes["axis"].as_int()
        assert before.tensors[0].const_value.shape[axis] == before.outputs
        assert before.inputs * before.outputs == before.tensors[0].const_value.size
        np.testing.assert_array_equal(before.quantized().dequantize(), after.quantized().dequantize())


def test_widths_and_names_of_convolutions_count() -> None:
    model = model_of(CONVOLUTIONS)
    set_bits(model.graph.node("twice"), 8)
    report = apply(model, gptq_of(ops=("Conv",), exclude=("*->h",)), image_context())
    assert [one.scheme.bits for one in compressed(model)] == [4, 4, 8]
    reasons = dict(report.skipped)
    assert reasons["Conv->h"] == "it is excluded"
    assert reasons["ConvTranspose->j"] == "ConvTranspose is not among 'ops'"
    again = apply(model, gptq_of(ops=("Conv",), exclude=("*->h",)), image_context())
    assert again.changed == 0
    assert dict(again.skipped)["twice"] == "its weight is compressed already"


def test_an_operator_without_weights_to_round_is_refused() -> None:
    with pytest.raises(UserError, match="ops has 'Relu'"):
        apply(model_of(CONVOLUTIONS), gptq_of(ops=("Relu",)), image_context())
