"""adaround: convolutions of all kinds and products, nearer to the float model than by rounding to the nearest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import qgraph
from qgraph.analysis.compressed_weights import compressed
from qgraph.errors import UserError
from qgraph.numerics.weights import WeightScheme
from qgraph.passes._weight_options import set_bits
from qgraph.passes.adaround import AdaRound
from qgraph.passes.rtn import Rtn
from qgraph.pipeline import Context, Pipeline, Report

OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
NET = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 6, 12, 12] x, float[16, 6, 3, 3] first, float[16, 1, 3, 3] second, float[16, 16, 3, 3] third,
    float[24, 8, 1, 1] fourth, float[24, 8, 2, 2] fifth, float[10, 8] last, float[10] bias) => (float[n, 10] y)
{
    a = Conv <pads = [1, 1, 1, 1]> (x, first)
    b = Relu (a)
    [depthwise] c = Conv <pads = [1, 1, 1, 1], group = 16, strides = [2, 2]> (b, second)
    d = Relu (c)
    e = Conv <auto_pad = "SAME_LOWER"> (d, third)
    f = Add (e, d)
    [grouped] h = Conv <group = 2> (f, fourth)
    i = Relu (h)
    j = ConvTranspose <strides = [2, 2]> (i, fifth)
    k = GlobalAveragePool (j)
    l = Flatten (k)
    [head] y = Gemm <transB = 1> (l, last, bias)
}"""


def model_of() -> ir.Model:
    model = ir.from_onnx_text(NET)
    for number, value in enumerate(list(model.graph.inputs)[1:]):
        array = 0.3 * np.random.default_rng(number).normal(size=value.shape.numpy())
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def images(seed: int, count: int = 4) -> np.ndarray:
    basis = np.random.default_rng(99).normal(size=(20, 6 * 144)) / 4
    images = np.random.default_rng(seed).normal(size=(count, 20)) @ basis + 0.5
    return images.reshape(count, 6, 12, 12).astype(np.float32)


def context(**changes: object) -> Context:
    return dataclasses.replace(Context(calibration=[{"x": images(seed)} for seed in range(8)], threads=1), **changes)


def apply(model: ir.Model, given: Context | None = None, **options: object) -> Report:
    return Pipeline([AdaRound(**options)]).run(model, context=given or context()).parts[0]


def run(model: ir.Model) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": images(50, 16)})[0]


def error(changed: ir.Model) -> float:
    before = run(model_of())
    return float(np.square(before - run(changed)).sum() / np.square(before).sum())


@pytest.mark.parametrize("options", [{}, {"refine": 0}, {"bits": 3, "sequential": "block"}, {"drift": 0.0}], ids=str)
def test_outputs_are_nearer_than_by_rounding_to_the_nearest(options: dict[str, object]) -> None:
    model, plain = model_of(), model_of()
    report = apply(model, **options)
    bits = options.get("bits", 4)
    Pipeline([Rtn(bits=bits, group=0, symmetric=True, ops=OPS, min_elements=0)]).run(plain)
    assert report.changed == 6
    assert [one.scheme for one in compressed(model)] == [WeightScheme("int", bits, 0, symmetric=True)] * 6
    assert all((one.tensors[1].const_value.numpy() > 0).all() for one in compressed(model))
    assert {one.tensors[0].dtype for one in compressed(model)} == {ir.DataType.INT4}
    assert error(model) < 0.6 * error(plain)
    assert set(report.figures["layers"]) >= {"depthwise", "grouped", "head"}


def test_marks_and_names_count_and_the_float_model_is_kept() -> None:
    model, given = model_of(), context()
    before = run(model)
    set_bits(model.graph.node("depthwise"), 8)
    set_bits(model.graph.node("grouped"), 16)
    report = apply(model, given, exclude=("head",))
    assert [one.scheme.bits for one in compressed(model)] == [4, 8, 4, 4]
    assert dict(report.skipped) == {"grouped": "it was chosen to stay in float", "head": "it is excluded"}
    assert "qgraph.bits" not in model.graph.node("depthwise").metadata_props
    assert model.graph.node("grouped").metadata_props["qgraph.bits"] == "16"
    assert given.reference is not None
    np.testing.assert_array_equal(run(given.reference), before)


def test_depthwise_convolutions_may_have_bits_of_their_own() -> None:
    model = model_of()
    apply(model, depthwise_bits=8)
    assert [one.scheme.bits for one in compressed(model)] == [4, 8, 4, 4, 4, 4]
    kept = model_of()
    report = apply(kept, depthwise_bits=16)
    assert dict(report.skipped) == {"depthwise": "it was chosen to stay in float"}


def test_a_second_run_finds_nothing_to_do_and_bytes_repeat() -> None:
    model, twin = model_of(), model_of()
    apply(model)
    apply(twin)
    text = ir.to_proto(model).SerializeToString()
    assert ir.to_proto(twin).SerializeToString() == text
    assert apply(model).changed == 0
    assert ir.to_proto(model).SerializeToString() == text


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    whole, model = model_of(), model_of()
    apply(whole)

    def stop(step: str, done: int, total: int) -> None:
        if done > total * 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(model_of(), context(work_folder=tmp_path, progress=stop))
    assert any(tmp_path.glob("*.npz"))
    apply(model, context(work_folder=tmp_path))
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(whole).SerializeToString()


@pytest.mark.parametrize(
    "bad", [{"group": 32}, {"symmetric": False}, {"steps": 0}, {"refine": -1}, {"bits": 7}, {"drift": 2.0}], ids=str
)
def test_options_that_do_not_go_together_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match="adaround"):
        apply(model_of(), **bad)


def test_it_is_named_where_calibration_is_missing() -> None:
    with pytest.raises(UserError, match="'adaround' needs calibration data"):
        apply(model_of(), context(calibration=None))


def test_a_real_network_in_4_bits_stays_near_its_float_model(assets: Path) -> None:
    """ResNet-20 with all weights in 4 bits, one scale for each output: about 11 dB when rounded to the nearest."""
    with np.load(assets / "cifar10" / "cifar10_dev_calib.npz") as file:
        images = file["images"][:140].astype(np.float32) / 255
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = ((images - mean) / deviation).astype(np.float32).transpose(0, 3, 1, 2)
    path = assets / "cifar10" / "resnet20_cifar10.onnx"
    name = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()[0].name
    prepare = "lift-constants,convert-opset{version=21},fold-constants,remove-identity,fold-batch-norm"

    def outputs(passes: str) -> np.ndarray:
        model = qgraph.load(path)
        calibration = [{name: part} for part in np.split(x[:100], 5)]
        Pipeline.parse(prepare + passes).run(model, context=Context(calibration=calibration, threads=1))
        proto = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, {name: x[100:]})[0]

    before, plain, ours = (
        outputs(passes)
        for passes in ("", ",rtn{group=0,symmetric=true,min_elements=0,ops=[Conv,Gemm,MatMul]}", ",adaround")
    )
    ratios = [10 * np.log10(np.square(before).sum() / np.square(before - one).sum()) for one in (plain, ours)]
    assert ratios[1] > 19
    assert ratios[1] > ratios[0] + 6
