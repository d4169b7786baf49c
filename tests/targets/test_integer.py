"""`integer`: whole models in integers, what proves it, and the code beside them."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import qgraph
import qgraph.ir
from qgraph import verbs
from qgraph.artifact import Artifact
from qgraph.codegen.c_graph import IntegerGraph
from qgraph.errors import UserError
from qgraph.pipeline import Pipeline
from qgraph.runtime.reference import ReferenceSession
from qgraph.targets.integer import Integer

sys.path.insert(0, str(Path(__file__).parents[1] / "codegen"))
from c_build import FLAGS, GCC, needs_gcc

MODELS = ("digits_cnn", "digits_encoder")
POINTS = 0.3
"""Of accuracy that integers may cost."""
LEAST_SQNR = {"digits_cnn": 28.0, "digits_encoder": 35.0}


def data(name: str):
    return importlib.import_module(f"qgraph.models.{name}").dataset()


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Artifact, Path]:
    """Compile a model twice, for one image at a time, with C code; return it and the folder of the second time."""
    name, folder = request.param, tmp_path_factory.mktemp("integer")
    qgraph.ir.save(importlib.import_module(f"qgraph.models.{name}").build(), folder / f"{name}.onnx")
    images = data(name).calibration["image"][:64]
    artifacts = [
        qgraph.compile(
            folder / f"{name}.onnx",
            "integer",
            output=folder / output,
            calibration=[{"image": image[None]} for image in images],
            shapes={"image": (1, *images.shape[1:])},
            emit=("c",),
        )
        for output in ("a", "b")
    ]
    return name, artifacts[0], artifacts[1].path


def scores(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])


def test_what_it_costs_is_bounded(made):
    name, artifact, _ = made
    manifest = artifact.manifest
    (output,) = manifest["verification"]["outputs"]
    assert output["sqnr_db"] > LEAST_SQNR[name]
    assert output["broken"] == 0
    found = data(name)
    images, labels = found.evaluation["image"][:250], found.labels[:250]
    right = [
        np.mean(scores(path, images).argmax(axis=1) == labels)
        for path in (artifact.path.parent / f"{name}.onnx", artifact.path / "model.onnx")
    ]
    assert right[1] >= right[0] - POINTS / 100


def test_nothing_computes_in_float(made):
    _, artifact, _ = made
    model = qgraph.ir.load(artifact.path / "model.onnx")
    assert Integer().check(model) == []
    floats = [
        node.op_type for node in model.graph if any(v is not None and v.dtype is ir.DataType.FLOAT for v in node.inputs)
    ]
    assert sorted(floats) == ["DequantizeLinear", "QuantizeLinear"]
    kernels = artifact.manifest["kernels"]
    assert kernels["float"] == {}
    assert kernels["left_in_float"] == []
    assert kernels["integer"]["Requantize"] > 20


def test_the_runtime_and_the_definitions_agree(made):
    name, artifact, _ = made
    images = data(name).evaluation["image"][:5]
    reference = ReferenceSession(artifact.path / "model.onnx")
    by_definition = np.concatenate([reference.run(None, {"image": image[None]})[0] for image in images])
    np.testing.assert_array_equal(scores(artifact.path / "model.onnx", images), by_definition)


def test_compiling_twice_gives_the_same_bytes(made):
    _, artifact, again = made
    files = [path.relative_to(again) for path in again.rglob("*") if path.suffix in (".onnx", ".c", ".h", ".toml")]
    assert len(files) == 6
    for file in files:
        assert (artifact.path / file).read_bytes() == (again / file).read_bytes(), file


def test_the_manifest_says_what_the_code_needs(made):
    _, artifact, _ = made
    needs = artifact.manifest["footprint"]
    assert needs["flash"] > sum(one.const_value.nbytes for one in weights(artifact.path / "model.onnx")) * 0.9
    assert 10_000 < needs["ram"] < 100_000
    assert {
        f"c/{file}" for file in ("model.c", "model.h", "model_weights.h", "main.c", "Makefile")
    } <= artifact.manifest["files"].keys()


def weights(path: Path) -> list[ir.Value]:
    model = qgraph.ir.load(path)
    return [
        value for value in model.graph.initializers.values() if value.dtype is ir.DataType.INT8 and len(value.shape) > 1
    ]


@needs_gcc
def test_the_c_code_gives_the_same_bits(made, tmp_path: Path):
    name, artifact, _ = made
    source = (artifact.path / "c" / "model.c").read_text(encoding="utf-8")
    assert not re.search(r"\b(float|double)\b", source)
    command = [
        str(GCC),
        *FLAGS,
        "-shared",
        "-fPIC",
        "-o",
        str(tmp_path / "model.so"),
        str(artifact.path / "c" / "model.c"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    run = ctypes.CDLL(str(tmp_path / "model.so")).model_run
    model = qgraph.ir.load(artifact.path / "model.onnx")
    Pipeline.parse("infer-shapes,fold-constants,infer-shapes,remove-unused").run(model)
    graph = IntegerGraph(model)
    (read,), (write,) = graph.inputs, graph.outputs
    images = data(name).evaluation["image"][:100]
    found = []
    for image in images:
        limits = np.iinfo(read.dtype)
        codes = np.rint(image[None] / np.float32(read.scale)) + read.zero_point
        reading = np.ascontiguousarray(np.clip(codes, limits.min, limits.max).astype(read.dtype))
        writing = np.empty(write.shape, write.dtype)
        run(reading.ctypes.data_as(ctypes.c_void_p), writing.ctypes.data_as(ctypes.c_void_p))
        found.append((writing.astype(np.int32) - write.zero_point).astype(np.float32) * np.float32(write.scale))
    np.testing.assert_array_equal(np.concatenate(found), scores(artifact.path / "model.onnx", images))


@needs_gcc
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_example_builds(made, tmp_path: Path):
    _, artifact, _ = made
    shutil.copytree(artifact.path / "c", tmp_path / "c")
    subprocess.run(["make", f"CC={GCC}"], cwd=tmp_path / "c", check=True, capture_output=True)
    printed = subprocess.run(["./example"], cwd=tmp_path / "c", check=True, capture_output=True, text=True).stdout
    assert re.fullmatch(r"checksum of the outputs for zeros: [0-9a-f]{8}\n", printed)


@pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="Apache TVM is not installed")
def test_the_library_gives_the_same_bits(made, tmp_path: Path):
    from qgraph.codegen.tvm_library import TvmSession

    name, artifact, _ = made
    if name != "digits_cnn":
        pytest.skip("compiling the encoder takes more than a minute")
    again = qgraph.compile(
        artifact.path.parent / f"{name}.onnx",
        "integer",
        output=tmp_path / "so",
        calibration=[{"image": image[None]} for image in data(name).calibration["image"][:64]],
        shapes={"image": (1, *data(name).calibration["image"].shape[1:])},
        emit=("so",),
    )
    assert "no floating-point instruction" in again.manifest["footprint"]["library"]
    images = data(name).evaluation["image"][:20]
    session = TvmSession(again.path / "tvm")
    found = np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])
    np.testing.assert_array_equal(found, scores(again.path / "model.onnx", images))


# --- what check finds -------------------------------------------------------------------------------------------------

SMUGGLED = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[2,4] x) => (float[2,4] y) <float s = {0.1}, uint8 z = {3}>
{ q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) [smuggled] r = Relu (d)
  p = QuantizeLinear (r, s, z) y = DequantizeLinear (p, s, z) }
"""


def test_a_float_node_is_found_wherever_it_is():
    model = ir.from_onnx_text(SMUGGLED)
    Pipeline.parse("infer-shapes").run(model)
    assert [one.node for one in Integer().check(model)] == ["smuggled"]
    inside = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>\n'
        "g (float[2] x, bool c) => (float[2] y) <float s = {0.1}, uint8 z = {3}> { q = QuantizeLinear (x, s, z)\n"
        " p = If (c) <then_branch = a () => (uint8[2] m) { d = DequantizeLinear (q, s, z) [hidden] h = Neg (d)"
        " m = QuantizeLinear (h, s, z) }, else_branch = b () => (uint8[2] n) { n = Identity (q) }>\n"
        " y = DequantizeLinear (p, s, z) }"
    )
    Pipeline.parse("infer-shapes").run(inside)
    assert [one.node for one in Integer().check(inside)] == ["hidden"]


def test_a_float_node_in_a_function_is_found():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21, "my" : 1]>\n'
        "g (float[2] x) => (float[2] y) <float s = {0.1}, uint8 z = {3}>\n"
        "{ q = QuantizeLinear (x, s, z) p = my.twice (q) y = DequantizeLinear (p, s, z) }\n"
        '<domain: "my", opset_import: ["" : 21]> twice (a) => (b)\n'
        "{ f = Cast <to = 1> (a) [inner] h = Add (f, f) b = Cast <to = 2> (h) }"
    )
    Pipeline.parse("infer-shapes").run(model)
    assert "inline-functions" in Integer().check(model)[0].reason


class Unfinished(Integer):
    """The target without the pass that makes integers."""

    def lower_passes(self) -> Pipeline:
        return Pipeline.parse("remove-unused")


def test_what_check_finds_stops_the_compilation(tmp_path: Path):
    qgraph.ir.save(ir.from_onnx_text(SMUGGLED), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"integer cannot run this model.*smuggled"):
        qgraph.compile(tmp_path / "m.onnx", Unfinished(), passes="remove-identity")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_type_that_is_not_known_proves_nothing():
    model = ir.from_onnx_text(SMUGGLED)
    Pipeline.parse("infer-shapes,integer-requantize").run(model)
    assert Integer().check(model) == []
    model.graph[-2].outputs[0].type = None
    assert "is not known" in Integer().check(model)[0].reason


def test_what_runs_where_is_told_for_code_and_without(made, tmp_path: Path):
    """Function by function of the C code; of the graph alone, node by node. The counts agree with the manifest's."""
    _, artifact, _ = made
    in_c = verbs.inspect(artifact.path, placement=True).placement
    assert {node.provider for node in in_c.nodes} == {"C"}
    assert in_c.counted("arithmetic").keys() <= {"integer", "none"}
    source = (artifact.path / "c" / "model.c").read_text()
    assert all(f"{node.name}(" in source for node in in_c.nodes)
    assert artifact.manifest["placement"]["kernels"] == in_c.summary()["kernels"]

    shutil.copytree(artifact.path, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "c")
    in_onnx = Integer().placement(tmp_path / "bare")
    assert {node.provider for node in in_onnx.nodes} == {"CPUExecutionProvider"}
    counted = {kernel.rpartition(".")[2]: count for kernel, count in in_onnx.kernels()["integer"].items()}
    assert counted == artifact.manifest["kernels"]["integer"]


def test_open_sizes_are_named_where_they_keep_a_model_in_float():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,4] x, float[2,batch] state) => (float[n] y) <int64[1] flat = {-1}, int64 one = {1}> {
        size = Size(x)  many = Greater(size, one)
        y = If (many) <then_branch = a () => (float[p] r) { r = Reshape(x, flat) },
                       else_branch = b () => (float[q] s) { s = Reshape(state, flat) }>
    }""")
    message = r"while sizes of 'x', 'state' are open.* --shape x=BATCH,4 --shape state=2,BATCH, with numbers for BATCH$"
    with pytest.raises(UserError, match=message):
        Integer().check(model)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("Einsum<equation = 'bii->bi'>(x)", "Einsum has no integer form as it is used here: 'bii' takes a diagonal"),
        ("GridSample<mode = 'cubic'>(y, grid)", "GridSample has no integer form as it is used here: its mode is cubic"),
    ],
)
def test_the_refusal_of_code_says_what_is_in_the_way(node: str, reason: str, tmp_path: Path):
    model = ir.from_onnx_text(f"""<ir_version: 9, opset_import: ["" : 20]>
    g (float[2,4,4] x, float[1,1,4,4] y, float[1,2,2,2] grid) => (float[N] z, float[M] used) <int64[1] flat = {{-1}}> {{
        r = {node.replace("'", '"')}  z = Reshape(r, flat)
        one = Reshape(x, flat) two = Reshape(y, flat) three = Reshape(grid, flat)
        used = Concat<axis = 0>(one, two, three)
    }}""")
    random = np.random.default_rng(0)
    shapes = {"x": (2, 4, 4), "y": (1, 1, 4, 4), "grid": (1, 2, 2, 2)}
    feeds = [{name: random.uniform(-1, 1, shape).astype(np.float32) for name, shape in shapes.items()} for _ in "ab"]
    with pytest.raises(UserError, match=re.escape(reason)):
        qgraph.compile(model, "integer", calibration=feeds, emit=("c",), output=tmp_path / "out")
