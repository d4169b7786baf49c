"""`apple-fp16`, `apple-int8`, `apple-int4`: packages that behave, and what is refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
import qgraph.ir
from qgraph import registry, verbs
from qgraph.compiler import verify
from qgraph.coreml import toolkit
from qgraph.coreml.structure import examine
from qgraph.errors import UserError
from qgraph.models import digits_cnn, digits_encoder, digits_mobilenet
from qgraph.runtime.session import open_session

MODELS = {"cnn": digits_cnn, "encoder": digits_encoder, "mobilenet": digits_mobilenet}
TARGETS = ("apple-fp16", "apple-int8", "apple-int4")
BOUNDS = {"apple-fp16": 45.0, "apple-int8": 24.0, "apple-int4": 12.0}
"""The least SQNR, in dB, of the interpreter's output against ONNX Runtime's in float32, over the reference models."""


@pytest.fixture
def coremltools() -> None:
    pytest.importorskip("coremltools", reason="coremltools is not installed")


def shapes(model: ir.Model) -> dict[str, list[int]]:
    return {
        str(value.name): [size if isinstance(size, int) else 1 for size in value.shape]
        for value in model.graph.inputs
        if value.const_value is None
    }


def compiled(name: str, target: str, folder: Path) -> qgraph.Artifact:
    model = MODELS[name].build()
    return qgraph.compile(model, target, output=folder / f"{name}.{target}", shapes=shapes(model))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], qgraph.Artifact]:
    """Return what compiles a reference model, once for each target."""
    folder = tmp_path_factory.mktemp("apple")
    return functools.cache(lambda name, target: compiled(name, target, folder))


@pytest.mark.usefixtures("coremltools")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_reference_models_compile_and_behave(name: str, target: str, built: Callable[[str, str], qgraph.Artifact]):
    artifact = built(name, target)
    assert artifact.verified
    assert artifact.manifest["verification"]["outputs"][0]["sqnr_db"] > BOUNDS[target]
    assert "not run on a device" in artifact.manifest["stand_in"] or sys.platform == "darwin"
    found = examine(artifact.path / "model.mlpackage")
    assert found.faults == ()
    compressed = sum(one.count for form, one in found.weights.items() if form != "dense")
    assert (compressed > 0) == (target != "apple-fp16")
    assert compressed == (0 if target == "apple-fp16" else len(artifact.manifest["weights"]["tensors"]))
    kernels = artifact.manifest["kernels"]
    assert bool(kernels["low_bit"]) == (target != "apple-fp16")


@pytest.mark.usefixtures("coremltools")
def test_a_build_repeats_to_the_byte(built: Callable[[str, str], qgraph.Artifact], tmp_path: Path):
    files = compiled("cnn", "apple-int4", tmp_path).manifest["files"]
    assert files == built("cnn", "apple-int4").manifest["files"]
    assert len(files) == 4


@pytest.mark.usefixtures("coremltools")
def test_fewer_bits_are_fewer_bytes(built: Callable[[str, str], qgraph.Artifact]):
    sizes = []
    for target in TARGETS:
        artifact = built("encoder", target)
        sizes.append(sum(one["bytes"] for one in artifact.manifest["footprint"]["weights"].values()))
        assert artifact.report.table().splitlines()[1].split()[0] == "size"
    assert sizes[0] > 1.9 * sizes[1] > 1.9 * 1.6 * sizes[2]


@pytest.mark.usefixtures("coremltools")
@pytest.mark.parametrize("target", ["apple-fp16", "apple-int8{onnx=true}"])
def test_the_onnx_model_computes_the_same_for_the_provider(target: str, built: Callable[[str, str], qgraph.Artifact]):
    artifact = built("encoder", target)
    model = qgraph.ir.load(artifact.path / "model.onnx")
    assert not [node for node in model.graph if node.op_type.endswith("QuantizeLinear") or "Dequantize" in node.op_type]
    feeds = {"image": np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)}
    feeds = {"image": feeds["image"].reshape(model.graph.inputs[0].shape.numpy())}
    (packaged,) = artifact.run(None, feeds)
    (onnx,) = open_session(artifact.path / "model.onnx", threads=1).run(None, feeds)
    np.testing.assert_allclose(packaged, onnx, rtol=0, atol=0.01 * np.abs(onnx).max())
    (told,) = [part for part in artifact.manifest["passes"] if part["name"] == "coreml-partitions"]
    assert told["notes"][0].startswith("CoreML provider: 1 partition")


@pytest.mark.usefixtures("coremltools")
def test_an_artifact_opens_again_and_verifies(tmp_path: Path):
    model = tmp_path / "digits.onnx"
    qgraph.ir.save(digits_cnn.build(), model)
    artifact = qgraph.compile(model, "apple-fp16", output=tmp_path / "cnn", shapes=shapes(digits_cnn.build()))
    found = verify(artifact.path, source=model)
    assert found.outputs[0].to_json()["sqnr_db"] > BOUNDS["apple-fp16"]


@pytest.mark.usefixtures("coremltools")
def test_quantized_activations_become_operations_of_the_package(tmp_path: Path):
    images = digits_cnn.dataset().calibration["image"][:8]
    feeds = [{"image": image[None]} for image in images]
    artifact = qgraph.compile(
        digits_cnn.build(), "apple-int8", output=tmp_path / "cnn", shapes=shapes(digits_cnn.build()), passes="qdq",
        calibration=feeds,
    )  # fmt: skip
    found = examine(artifact.path / "model.mlpackage")
    assert found.operations["quantize"] > 3
    assert found.operations["dequantize"] > 3
    assert found.weights["blockwise_shift_scale"].count > 3
    assert artifact.manifest["verification"]["outputs"][0]["sqnr_db"] > 20


def parsed(text: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}')


REFUSED = {
    "dynamic": (
        "g (float[N,4] x, float[2,M] z) => (float[N,4] y) { r = ReduceSum <keepdims = 0> (z) y = Mul (x, r) }",
        r"needs every size, and the shape of 'x', 'z' is dynamic: .* --shape x=1,4 --shape z=2,1",
    ),
    "operator": (
        "g (float[4] x) => (int64[1,n] y) { y = NonZero (x) }",
        r"apple-\w+ cannot run this model: 'NonZero->y': NonZero has no form in ML Programs: the size of its result",
    ),
    "type": (
        "g (double[4] x) => (double[4] y) { y = Exp (x) }",
        "'x': it is a float64 input of the model, and Core ML has no",
    ),
    "axes": (
        "g (float[1,1,1,1,1,4] x) => (float[1,1,1,1,1,4] y) { y = Exp (x) }",
        "has 6 axes, and Core ML has at most 5",
    ),
    "empty": ("g (float[0,4] x) => (float[0,4] y) { y = Exp (x) }", "'x' is 0x4, and Core ML has no empty arrays"),
    "twice": ("g (float[4] x) => (float[4] y, float[4] y) { y = Exp (x) }", "'y': it is an output 2 times"),
    "rule": ("g (float[4] x, float[4] z) => (float[4] y) { y = Mod <fmod = 1> (x, z) }", r"'Mod->y' \(Mod\): .*fmod=1"),
}


@pytest.mark.usefixtures("coremltools")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_in_one_line(name: str, target: str, tmp_path: Path):
    text, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as told:
        qgraph.compile(parsed(text), target, output=tmp_path / "out")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_the_error_names_the_extra(target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    toolkit.toolkit.cache_clear()
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(UserError, match=r"pip install 'qgraph-compiler\[apple\]'"):
        qgraph.compile(digits_cnn.build(), target, output=tmp_path / "out")
    toolkit.toolkit.cache_clear()


@pytest.mark.usefixtures("coremltools")
def test_a_package_is_run_without_coremltools(
    monkeypatch: pytest.MonkeyPatch, built: Callable[[str, str], qgraph.Artifact]
):
    artifact = built("cnn", "apple-int8")
    monkeypatch.setitem(sys.modules, "coremltools", None)
    (logits,) = artifact.run(None, {str(one["name"]): np.zeros(one["shape"], np.float32)
                                    for one in artifact.manifest["inputs"]})  # fmt: skip
    assert logits.shape == (1, 10)


@pytest.mark.usefixtures("coremltools")
@pytest.mark.parametrize(
    ("path", "target", "bound"),
    [("mnist/mnist_cntk.onnx", "apple-int4", 18), ("silero_vad/silero_vad_16k_op15.onnx", "apple-fp16", 40),
     ("stories260k/stories260K.onnx", "apple-int8", 30)],
)  # fmt: skip
def test_real_models(assets: Path, path: str, target: str, bound: float, tmp_path: Path):
    fixed = {"input_ids": [1, 16]} if "stories" in path else {}
    fixed = {"input": [1, 576], "state": [2, 1, 128]} if "silero" in path else fixed
    artifact = qgraph.compile(assets / path, target, output=tmp_path / "out", shapes=fixed)
    for output in artifact.manifest["verification"]["outputs"]:
        assert output["sqnr_db"] > bound
    assert examine(artifact.path / "model.mlpackage").faults == ()


def test_every_target_says_what_it_brings():
    for name in TARGETS:
        target = registry.find("target", name)()
        assert target.extra == "apple"
        assert not target.needs_calibration


@pytest.mark.usefixtures("coremltools")
@pytest.mark.parametrize("target", ["apple-fp16", "apple-int8"])
def test_what_runs_where_is_told(target: str, built: Callable[[str, str], qgraph.Artifact]):
    """Operation by operation of the package; where there is a model.onnx, what the provider makes of it as well."""
    artifact = built("cnn", target)
    placement = verbs.inspect(artifact.path, placement=True).placement
    kernels, placed = artifact.manifest["kernels"], placement.kernels()
    assert {node.provider for node in placement.nodes} == {"Core ML"}
    assert placed.get("low-bit", {}) == kernels["low_bit"]
    assert {kind: placed["float"][kind] for kind in kernels["float"]} == kernels["float"]
    conv = next(node for node in placement.nodes if node.kernel == "conv")
    assert conv.precision == "float16 -> float16"
    assert ("CoreML provider: 1 partition" in placement.runtime) == (target == "apple-fp16")
    assert any("/stem" in node.sources[0] for node in placement.nodes) == (target == "apple-fp16")


@pytest.mark.usefixtures("coremltools")
def test_texts_among_the_inputs_are_refused_in_one_line(tmp_path: Path):
    """They are no arrays of bytes: calibration failed on them, deep inside a pass."""
    text = """<ir_version: 9, opset_import: ["" : 19]> g (float[8,64] x, string[2] s) => (float[8,64] y, string[2] t)
    <float[1] w = {0}> { y = MatMul(x, w)  t = Identity(s) }"""
    model = ir.from_onnx_text(text)
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), name="w")
    weight.shape = weight.const_value.shape
    feeds = [{"x": np.ones((8, 64), np.float32) * i, "s": np.array(["a", "long"], object)} for i in range(1, 5)]
    with pytest.raises(UserError, match="'s' is STRING, which ML Programs do not have"):
        qgraph.compile(model, "apple-int4", calibration=feeds, output=tmp_path / "out")
    artifact = qgraph.compile(model, "cpu-int4", calibration=feeds, output=tmp_path / "int4")
    assert artifact.manifest["kernels"]["integer"] == {"MatMulNBits": 1}
