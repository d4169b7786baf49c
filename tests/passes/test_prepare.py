"""The preparation passes: golden text for each, values kept on handwritten and real models, time linear.

A golden file `tests/golden/<pass>/<case>.onnxtxt` holds a model's text, `---`, and its text after the pass. A first
line `# ...` gives the pipeline if it is not the pass alone. QGRAPH_UPDATE_GOLDEN=1 writes the second part anew.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden_rewrites import is_after, what_to_do

import qgraph.ir
from qgraph.pipeline import Pipeline

GOLDEN = Path(__file__).parent.parent / "golden"
PASSES = (
    "convert-opset",
    "deduplicate-initializers",
    "fold-batch-norm",
    "fold-constants",
    "gemm-to-matmul-add",
    "infer-shapes",
    "inline-functions",
    "lift-constants",
    "matmul-add-to-gemm",
    "merge-duplicates",
    "remove-identity",
    "remove-unused",
)
PREPARE = (
    "inline-functions,lift-constants,convert-opset,fold-constants,remove-identity,fold-batch-norm,"
    "deduplicate-initializers,merge-duplicates,remove-unused"
)
FILES = [path for name in PASSES for path in sorted((GOLDEN / name).glob("*.onnxtxt"))]


def random_feeds(inputs: Mapping[str, tuple[str, list[int | str]]], seed: int = 0) -> dict[str, np.ndarray]:
    """Return arrays for inputs: name -> (type as the runtime writes it, shape)."""
    generator = np.random.default_rng(seed)
    sizes = {"batch": 2, "seq": 7, "sequence": 576}
    feeds = {}
    for name, (kind, dims) in inputs.items():
        shape = [dim if isinstance(dim, int) else sizes.get(dim, 3) for dim in dims]
        if "bool" in kind:
            feeds[name] = np.asarray(generator.random(shape) > 0.5)
        elif "int" in kind:
            dtype = np.int32 if "int32" in kind else np.int64
            feeds[name] = np.asarray(16000 if name == "sr" else generator.integers(1, 3, shape), dtype=dtype)
        else:
            feeds[name] = np.asarray(generator.normal(size=shape) * 4, np.float16 if "16" in kind else np.float32)
    return feeds


def run(source: Path | bytes, inputs: Mapping[str, np.ndarray] | None = None) -> tuple[dict[str, np.ndarray], list]:
    """Run a model; return the feeds (random ones if none are given) and the outputs."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    wanted = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    feeds = random_feeds(wanted) if inputs is None else {name: inputs[name] for name in wanted}
    return feeds, session.run(None, feeds)


def assert_same(before: list, after: list, tolerance: float) -> None:
    for one, other in zip(before, after, strict=True):
        assert one.dtype == other.dtype
        scale = float(np.abs(one.astype(np.float64)).max(initial=0)) or 1.0
        np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden(path: Path):
    pipeline, before = what_to_do(path, path.parent.name)
    model = ir.from_onnx_text(before)
    feeds, expected = run(ir.to_proto(model).SerializeToString())

    report = Pipeline.parse(pipeline).run(model)

    is_after(path, ir.to_onnx_text(model))
    assert (report.changed > 0) == (not path.stem.startswith("not-")), "cases that stay are called not-..."
    onnx.checker.check_model(ir.to_proto(model))
    assert_same(expected, run(ir.to_proto(model).SerializeToString(), feeds)[1], 1e-6)
    assert Pipeline.parse(pipeline.rpartition(",")[2]).run(model).changed == 0, "a second run changes something"


def test_every_pass_has_cases():
    assert {path.parent.name for path in FILES} >= set(PASSES) - {"convert-opset"}


REAL = [
    "mobilenet_v2/mobilenetv2_1.0_224.onnx",
    "cifar10/resnet20_cifar10.onnx",
    "face_rfb320/version-RFB-320.onnx",
    "fastestdet/FastestDet.onnx",
    "mnist/mnist_cntk.onnx",
    "silero_vad/silero_vad_16k_op15.onnx",
    "squeezenet1.0/squeezenet1.0_fp32.onnx",
    "squeezenet1.0/SqueezeNet_fp16.onnx",
    "stories260k/stories260K.onnx",
    "basic_pitch/nmp.onnx",
]
NODES = dict(zip(REAL, [100, 54, 125, 211, 11, 78, 65, 65, 308, 240], strict=True))
"""What preparation leaves; fewer is better."""


@pytest.mark.parametrize("name", REAL)
def test_real_models_are_prepared_and_compute_the_same(assets, tmp_path, name: str):
    feeds, before = run(assets / name)
    model = qgraph.ir.load(assets / name)
    report = Pipeline.parse(PREPARE).run(model)
    assert report.nodes_after <= NODES[name]
    assert report.seconds < 2
    qgraph.ir.save(model, tmp_path / "after.onnx")
    assert_same(before, run(tmp_path / "after.onnx", feeds)[1], 2e-6)
    assert Pipeline.parse(PREPARE).run(model).changed == 0
    assert model.graph.opset_imports[""] == 21
    assert not [node for node in qgraph.ir.walk(model) if node.op_type in ("Constant", "BatchNormalization", "Dropout")]


@pytest.mark.parametrize("name", REAL)
def test_shapes_are_those_that_the_runtime_finds(assets, tmp_path, name: str):
    """Make everything in between an output, and compare: numbers are equal, and a symbol has one value."""
    model = qgraph.ir.load(assets / name)
    Pipeline.parse("lift-constants,infer-shapes").run(model)
    values = [
        value for node in model.graph for value in node.outputs if value.name and isinstance(value.type, ir.TensorType)
    ]
    shapes = {value.name: value.shape for value in values if not value.is_graph_output()}
    for value in values:
        if not value.is_graph_output():
            value.shape = None
            model.graph.outputs.append(value)
    qgraph.ir.save(model, tmp_path / "all.onnx")
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(tmp_path / "all.onnx", options)
    feeds = random_feeds({value.name: (value.type, value.shape) for value in session.get_inputs()})
    names = [output.name for output in session.get_outputs()]
    meaning: dict[str, set[int]] = {}
    for output, array in zip(names, session.run(None, feeds), strict=True):
        found = shapes.get(output)
        if found is None:
            continue
        assert len(found) == array.ndim, output
        for dim, size in zip(found, array.shape, strict=True):
            if isinstance(dim, int):
                assert dim == size, (output, found, array.shape)
            else:
                meaning.setdefault(str(dim), set()).add(size)
    assert all(len(sizes) == 1 for sizes in meaning.values()), meaning


def test_time_is_linear_in_the_graph():
    """Ten times the nodes must not take much more than ten times as long."""

    def chain(length: int) -> ir.Model:
        x = ir.Value(name="x", shape=ir.Shape(["n", 4]), type=ir.TensorType(ir.DataType.FLOAT))
        nodes, value = [], x
        for index in range(length):
            op_type = ("Relu", "Neg", "Identity", "Abs", "Shape")[index % 5]
            if op_type == "Shape":
                shape = ir.node("Shape", [value], name=f"s{index}")
                node = ir.node("Reshape", [value, shape.outputs[0]], name=f"n{index}")
                nodes.append(shape)
            else:
                node = ir.node(op_type, [value], name=f"n{index}")
            nodes.append(node)
            value = node.outputs[0]
        value.name, value.type, value.shape = "y", x.type, x.shape
        return ir.Model(ir.Graph([x], [value], nodes=nodes, opset_imports={"": 17}, name="chain"), ir_version=8)

    def seconds(length: int) -> float:
        model = chain(length)
        start = time.process_time()
        Pipeline.parse(PREPARE).run(model)
        assert qgraph.ir.count_nodes(model) < length
        return time.process_time() - start

    seconds(100)
    assert seconds(5000) < 20 * max(seconds(500), 0.02)
