"""`sparsify`: what gets zeros and what does not, how much the methods lose, and that zeros survive what follows."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.analysis.sparse_weights import sparse_weights
from qgraph.errors import UserError
from qgraph.models import digits_cnn, digits_encoder
from qgraph.numerics.sparsity import SparseResult, follows, parse_pattern, sparse_gptq
from qgraph.passes import Sparsify
from qgraph.pipeline import Context, Feeds, Pass, PassError, Pipeline, Report
from qgraph.targets.cpu import CpuFp32

NETWORK = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n,8,6,6] x) => (float[n,10] y) {
    [conv] a = Conv <pads = [1,1,1,1]> (x, w1)
    b = Relu (a)
    [grouped] c = Conv <group = 4> (b, w2)
    d = GlobalAveragePool (c)
    e = Flatten (d)
    [odd] f = Gemm (e, w3)
    [product] g1 = MatMul (f, w4)
    y = MatMul (g1, w5)
}
"""
SHAPES = {"w1": (16, 8, 3, 3), "w2": (16, 4, 1, 1), "w3": (16, 32), "w4": (32, 10), "w5": (10, 10)}


def network(seed: int = 0) -> ir.Model:
    proto = onnx.parser.parse_model(NETWORK)
    random = np.random.default_rng(seed)
    for name, shape in SHAPES.items():
        array = (random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def samples(count: int = 6, seed: int = 1) -> list[Feeds]:
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=(4, 8, 6, 6)).astype(np.float32)} for _ in range(count)]


def run(model: ir.Model, feeds: list[Feeds]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in feeds])


def array(model: ir.Model, name: str) -> np.ndarray:
    return np.asarray(model.graph.initializers[name].const_value.numpy())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_zeros_run_along_the_inputs_of_each_output(method: str):
    model = network()

    report = Pipeline([Sparsify(method=method, min_elements=0)]).run(model, calibration=samples())

    kernel, product = array(model, "w1"), array(model, "w3")
    assert ((kernel.reshape(16, 2, 4, 9) != 0).sum(axis=2) == 2).all(), "channels of every element of the kernel"
    assert ((product.reshape(4, 4, 32) != 0).sum(axis=1) == 2).all(), "rows of a matrix [K, N]"
    assert array(model, "w2").all()
    assert report.changed == 3
    assert {tuple(one) for one in report.skipped} == {
        ("grouped", "its channels are in groups"),
        ("MatMul->y", "its 10 inputs are no multiple of 4"),
    }
    assert [one.node.name for one in sparse_weights(model)] == ["conv", "odd", "product"]


def test_a_second_run_finds_nothing_to_do():
    model = network()
    Pipeline([Sparsify(min_elements=0)]).run(model, calibration=samples())
    once = ir.to_proto(model).SerializeToString()

    report = Pipeline([Sparsify(min_elements=0)]).run(model, calibration=samples())

    assert report.changed == 0
    assert ir.to_proto(model).SerializeToString() == once


@pytest.mark.parametrize(("pattern", "zeros"), [("1:4", 0.75), ("unstructured", 0.6), ("block", 0.6)])
def test_other_patterns(pattern: str, zeros: float):
    model = network()

    Pipeline([Sparsify(pattern=pattern, ratio=0.6, min_elements=0)]).run(model, calibration=samples())

    assert np.mean(array(model, "w3") == 0) == pytest.approx(zeros, abs=0.05)


def test_the_methods_lose_less_and_less():
    model, dataset = digits_encoder.build(), digits_encoder.dataset()
    CpuFp32().prepare_passes().run(model)
    feeds = [{"image": part} for part in np.array_split(dataset.calibration["image"][:32], 2)]
    held_back = [{"image": dataset.evaluation["image"][:200]}]
    exact = run(model, held_back)
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        copy = model.clone()
        Pipeline([Sparsify(method=method)]).run(copy, calibration=feeds)
        errors[method] = np.square(run(copy, held_back) - exact).sum()

    assert errors["sparsegpt"] < 0.5 * errors["wanda"]
    assert errors["wanda"] < errors["magnitude"]


@pytest.mark.parametrize("drift", [None, 0.5])
def test_weights_make_up_for_all_that_sparse_layers_before_have_changed(
    drift: float | None, monkeypatch: pytest.MonkeyPatch
):
    aims = []

    def recording(weight: np.ndarray, *arguments: object, **options: object) -> SparseResult:
        aims.append(weight)
        return sparse_gptq(weight, *arguments, **options)

    monkeypatch.setattr("qgraph.passes.sparsify.sparse_gptq", recording)
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n,16] x) => (y) '
    text += "<float[16,24] a = {0}, float[24,8] b = {0}> { h = MatMul (x, a)  r = Relu (h)  y = MatMul (r, b) }"
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(3)
    plain = {name: random.normal(size=shape).astype(np.float32) for name, shape in (("a", (16, 24)), ("b", (24, 8)))}
    for name, values in plain.items():
        model.graph.initializers[name].const_value = ir.tensor(values, name=name)
    x = random.normal(size=(300, 16)).astype(np.float32)
    options = {} if drift is None else {"drift": drift}
    Pipeline([Sparsify(min_elements=0, **options)]).run(model, calibration=[{"x": part} for part in np.split(x, 3)])

    before, now = (np.maximum(x @ one, 0).astype(np.float64) for one in (plain["a"], array(model, "a")))
    gram = now.T @ now
    damping = 0.01 * np.trace(gram) / 24
    moved = np.linalg.solve(gram + damping * np.eye(24), now.T @ (before - now) @ plain["b"]).T
    np.testing.assert_allclose(aims[1] - plain["b"].T, (drift or 1.0) * moved, rtol=1e-3, atol=1e-4)
    assert np.abs(moved).max() > 0.05


def test_a_convolutional_network_keeps_its_accuracy():
    model, dataset = digits_cnn.build(), digits_cnn.dataset()
    CpuFp32().prepare_passes().run(model)
    feeds = [{"image": part} for part in np.array_split(dataset.calibration["image"][:32], 2)]
    before = np.mean(run(model, [{"image": dataset.evaluation["image"]}]).argmax(axis=1) == dataset.labels)

    Pipeline([Sparsify()]).run(model, calibration=feeds)

    after = np.mean(run(model, [{"image": dataset.evaluation["image"]}]).argmax(axis=1) == dataset.labels)
    assert after >= before - 0.01


@pytest.mark.parametrize("quantizer", [
    "rtn{bits=4,symmetric=true}", "rtn{bits=4}", "qdq", "qdq{weights=int4}", "hqq",
    "gptq{bits=4,min_elements=0}", "gptq{bits=4,symmetric=true,group=0,min_elements=0,ops=[Conv,Gemm,MatMul]}",
    "gptq{format=nf4,min_elements=0}", "adaround{bits=4}",
])  # fmt: skip
def test_zeros_survive_rounding(quantizer: str):
    model = network()

    Pipeline.parse(f"sparsify{{min_elements=0}},{quantizer}").run(model, calibration=samples())

    checked = [one for one in sparse_weights(model) if one.matrix is not None]
    assert len(checked) >= 2
    for one in checked:
        assert one.matrix is not None
        assert follows(one.matrix, parse_pattern("2:4", 0.5))


@dataclasses.dataclass(frozen=True)
class FillIn(Pass):
    """Write over zeros."""

    name: ClassVar[str] = "fill-in"

    def apply(self, model: ir.Model, context: Context) -> Report:
        del context
        value = model.graph.initializers["w3"]
        value.const_value = ir.tensor(np.ones((16, 32), np.float32), name="w3")
        return Report(changed=1)


def test_a_pass_that_fills_zeros_in_is_named():
    with pytest.raises(PassError, match=r"'fill-in' broke .* the weight of 'odd' was 2:4, and has lost zeros"):
        Pipeline([Sparsify(min_elements=0), FillIn()]).run(network(), calibration=samples())


def test_without_data_the_magnitude_decides():
    report = Pipeline([Sparsify(min_elements=0)]).run(network())

    assert report.notes[0] == "3 weights 2:4 by magnitude"
    with pytest.raises(UserError, match="'sparsify' with method=wanda needs calibration data"):
        Pipeline([Sparsify(method="wanda")]).run(network())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("pattern=4:4", "keeps none or all"),
        ("pattern=half", "there is no pattern 'half'"),
        ("pattern=unstructured,ratio=1.0", "not between 0 and 1"),
    ],
)
def test_patterns_that_there_are_not_are_refused(options: str, message: str):
    with pytest.raises(UserError, match=message):
        Pipeline.parse(f"sparsify{{{options}}}")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_weight_that_is_not_finite_is_named(method: str):
    model = network()
    bad = array(model, "w3").copy()
    bad[0, 0] = np.inf
    model.graph.initializers["w3"].const_value = ir.tensor(bad, name="w3")
    with pytest.raises(UserError, match="the weight 'w3' of 'odd' holds NaN or infinity"):
        Pipeline([Sparsify(min_elements=0, method=method)]).run(model, calibration=samples())


def test_zeros_and_rounding_in_one_sweep_lose_less_than_one_after_the_other():
    model, dataset = digits_encoder.build(), digits_encoder.dataset()
    CpuFp32().prepare_passes().run(model)
    Pipeline.parse("convert-opset{version=21}").run(model)
    feeds = [{"image": part} for part in np.array_split(dataset.calibration["image"][:32], 2)]
    held_back = [{"image": dataset.evaluation["image"][:200]}]
    exact = run(model, held_back)
    errors = []
    for passes in ("gptq{bits=3,sparse=2:4}", "sparsify,rtn{bits=3}"):
        copy = model.clone()
        Pipeline.parse(passes).run(copy, calibration=feeds)
        assert len([one for one in sparse_weights(copy) if one.matrix is not None]) >= 8
        errors.append(np.square(run(copy, held_back) - exact).sum())

    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("pattern", ["unstructured", "block", "2:4"])
def test_a_weight_of_zeros_alone_may_follow_any_pattern(pattern: str):
    model = network()
    model.graph.initializers["w1"].const_value = ir.tensor(np.zeros(SHAPES["w1"], np.float32), name="w1")
    report = Pipeline.parse(f"sparsify{{pattern={pattern},method=magnitude}}").run(model).parts[0]
    assert report.changed
    assert not array(model, "w1").any()
    assert {one.node.name for one in sparse_weights(model)} >= {"conv"}
