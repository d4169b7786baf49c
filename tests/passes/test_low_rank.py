"""`low-rank`: golden graphs, what the ranks save and lose, and errors of quantizers brought back.

A golden file `tests/golden/low-rank/<case>.onnxtxt` holds a pipeline, a model's text, `---`, and its text after,
without the values of constants. Inputs whose names do not begin with `x` are constants. QGRAPH_UPDATE_GOLDEN=1 writes
the second part anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden_rewrites import is_after, structure, what_to_do

import qgraph.compiler
import qgraph.ir
from qgraph.analysis.linear_layers import linear_layers
from qgraph.errors import UserError
from qgraph.models import digits_cnn, digits_encoder
from qgraph.passes import LowRank
from qgraph.pipeline import Feeds, Pipeline
from qgraph.targets.cpu import CpuFp32

FILES = sorted((Path(__file__).parent.parent / "golden" / "low-rank").glob("*.onnxtxt"))


def filled(text: str, seed: int = 0) -> ir.Model:
    """Read a model and turn the inputs that do not begin with x into constants: of rank 2, so that it is exact."""
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(seed)
    for value in list(proto.graph.input):
        if value.name.startswith("x"):
            continue
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = np.array([2]) if value.name.startswith("i_") else low(random, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        proto.graph.input.remove(value)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def low(random: np.random.Generator, shape: list[int]) -> np.ndarray:
    """Return an array of which every unfolding has rank 2 at most."""
    parts = [random.normal(size=(2, size)) for size in shape]
    letters = "abcd"[: len(shape)]
    return np.einsum(",".join(f"r{letter}" for letter in letters) + f"->{letters}", *parts)


def samples(model: ir.Model, count: int = 4, seed: int = 0) -> list[Feeds]:
    random = np.random.default_rng(seed)
    shapes = {str(one.name): [dim if isinstance(dim, int) else 3 for dim in one.shape] for one in model.graph.inputs}
    return [{name: random.normal(size=dims).astype(np.float32) for name, dims in shapes.items()} for _ in range(count)]


def run(model: ir.Model, feeds: list[Feeds]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in feeds])


def size(model: ir.Model) -> int:
    return sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)


@pytest.mark.parametrize("data", [True, False], ids=["activation", "svd"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path, data: bool):
    pipeline, text = what_to_do(path)
    model = filled(text)
    feeds = samples(model)
    exact, parameters = run(model, feeds), size(model)

    report = Pipeline.parse(pipeline).run(model, calibration=feeds if data else None)

    is_after(path, structure(model))
    assert (report.changed > 0) == (not path.stem.startswith("not-"))
    assert (size(model) < parameters) == (report.changed > 0)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_allclose(run(model, feeds), exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max())
    again = Pipeline.parse(pipeline).run(model, calibration=feeds if data else None)
    assert again.changed == 0


def trained(passes: str) -> tuple[float, int, int]:
    """Return the error of the encoder's logits relative to their power, and parameters before and after."""
    model, dataset = digits_encoder.build(), digits_encoder.dataset()
    CpuFp32().prepare_passes().run(model)
    feeds = [{"image": part} for part in np.array_split(dataset.calibration["image"][:64], 4)]
    held_back = [{"image": dataset.evaluation["image"][:200]}]
    exact, before = run(model, held_back), size(model)
    Pipeline.parse(passes).run(model, calibration=feeds)
    return float(np.square(run(model, held_back) - exact).sum() / np.square(exact).sum()), before, size(model)


def test_looking_at_activations_loses_less_than_half():
    plain, before, left = trained("low-rank{ratio=0.3,method=svd,min_elements=1024}")
    better, _, other = trained("low-rank{ratio=0.3,method=activation,min_elements=1024}")

    assert max(left, other) < 0.8 * before
    assert better < 0.5 * plain


def test_errors_count_as_they_change_the_outputs():
    alike, _, left = trained("low-rank{ratio=0.3,errors=layer,min_elements=1024}")
    better, before, other = trained("low-rank{ratio=0.3,min_elements=1024}")

    assert max(left, other) < 0.8 * before
    assert better < 0.8 * alike


def test_without_gradients_errors_count_alike():
    text = "<ir_version: 9, opset_import: ['' : 15]> g (float[n,8] x) => (float[n,16] y) { y = MatMul (x, w) }"
    proto = onnx.parser.parse_model(text.replace("'", '"'))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 16), np.float32), "w"))
    model = ir.from_proto(proto)

    report = Pipeline.parse("low-rank{min_elements=0}").run(model, calibration=samples(model))

    assert report.changed == 1
    assert any("count alike: gradients need opset 16" in note for note in report.notes)


def test_more_energy_takes_more_and_loses_less():
    rough, _, small = trained("low-rank{energy=0.8,min_elements=1024}")
    fine, before, large = trained("low-rank{energy=0.97,min_elements=1024}")

    assert small < large < before
    assert fine < rough


def test_both_products_are_quantized():
    model, dataset = digits_encoder.build(), digits_encoder.dataset()
    CpuFp32().prepare_passes().run(model)
    feeds = [{"image": part} for part in np.array_split(dataset.calibration["image"][:64], 4)]

    report = Pipeline.parse("low-rank{ratio=0.3,min_elements=1024},dynamic-int8").run(model, calibration=feeds)

    thinned = [name for name, rank in report.parts[0].figures["ranks"].items() if rank]
    assert thinned
    assert not [one for one in report.parts[1].skipped if any(one.node.startswith(f"{name}_") for name in thinned)]


def test_a_layer_that_would_not_get_cheaper_stays_whole():
    model = filled(FILES[3].read_text(encoding="utf-8").partition("\n")[2].partition("\n---\n")[0])

    report = Pipeline([LowRank(rank=5, min_elements=0)]).run(model)

    assert report.changed == 0
    assert {one.reason for one in report.skipped} == {"no rank that keeps enough would save multiply-adds"}


def test_the_error_of_two_bits_is_brought_back():
    model, dataset = digits_encoder.build(), digits_encoder.dataset()
    Pipeline.parse("convert-opset{version=21}").run(model)
    CpuFp32().prepare_passes().run(model)
    feeds = [{"image": part} for part in np.array_split(dataset.calibration["image"][:64], 4)]
    held_back = [{"image": dataset.evaluation["image"][:200]}]
    exact = run(model, held_back)
    errors = {}
    behind = ("", ",low-rank{of=error,rank=8,method=svd}", ",low-rank{of=error,rank=8}")
    for passes in (f"rtn{{bits=3}}{one}" for one in behind):
        copy = model.clone()
        Pipeline.parse(passes).run(copy, calibration=feeds)
        errors[passes] = np.square(run(copy, held_back) - exact).sum()
    rounded, plain, better = errors.values()

    assert better < plain < rounded
    assert better < 0.6 * rounded


def test_bringing_back_needs_a_quantizer_before():
    with pytest.raises(UserError, match="needs a quantizer of weights before it"):
        Pipeline([LowRank(of="error")]).run(digits_cnn.build())


@pytest.mark.parametrize("option", ["ratio=0", "ratio=1.0", "energy=1.5", "rank=-1"])
def test_options_out_of_range_are_refused(option: str):
    with pytest.raises(UserError, match="low-rank"):
        Pipeline.parse(f"low-rank{{{option}}}")


def test_a_weight_that_is_not_finite_is_named():
    model = digits_encoder.build()
    weight = next(layer.weight for layer in linear_layers(model).layers if layer.kind == "linear")
    array = weight.const_value.numpy().copy()
    array[0, 0] = np.nan
    weight.const_value = ir.tensor(array, name=weight.name)
    with pytest.raises(UserError, match=f"the weight '{weight.name}' of .* holds NaN"):
        Pipeline([LowRank(min_elements=0)]).run(model)


@pytest.mark.parametrize(
    ("target", "quantizer", "kernel"),
    [
        ("cpu-int8", "dynamic-int8{min_elements=0}", "DynamicQuantizeMatMul"),
        ("cpu-int4", "rtn{bits=4,group=32,min_elements=0}", "MatMulNBits"),
    ],
)
def test_both_products_run_in_few_bits_on_a_target(target: str, quantizer: str, kernel: str, tmp_path: Path):
    dataset = digits_encoder.dataset()
    feeds = [{"image": part} for part in np.array_split(dataset.calibration["image"][:64], 4)]
    source = tmp_path / "model.onnx"
    qgraph.ir.save(digits_encoder.build(), source)

    made = qgraph.compiler.compile(
        source, target, output=tmp_path / "out", calibration=feeds,
        passes=f"low-rank{{rank=16,min_elements=1024}},{quantizer}",
    )  # fmt: skip

    nodes = list(qgraph.ir.load(made.path / "model.onnx").graph)
    thin = [node.op_type for node in nodes if re.search(r"feed_forward/(up|down)/MatMul_[01]", node.name or "")]
    assert len(thin) == 12
    assert set(thin) == {kernel}


def test_activation_needs_data():
    with pytest.raises(UserError, match="'low-rank' with method=activation needs calibration data"):
        Pipeline([LowRank(method="activation")]).run(digits_cnn.build())


def test_the_same_every_time():
    models = []
    for _ in range(2):
        model, dataset = digits_encoder.build(), digits_encoder.dataset()
        feeds = [{"image": dataset.calibration["image"][:16]}]
        Pipeline([LowRank(ratio=0.3, min_elements=1024)]).run(model, calibration=feeds)
        models.append(ir.to_proto(model).SerializeToString())

    assert models[0] == models[1]
