"""`guard-float`: golden graphs, and the proof that ONNX Runtime would round the weights without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden_rewrites import as_written, what_to_do

from qgraph.pipeline import Pipeline

FILES = sorted((Path(__file__).parent.parent / "golden" / "guard-float").glob("*.onnxtxt"))


def run(model: ir.Model, feeds: dict[str, np.ndarray], *, optimise: bool = True) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, feeds)


def random_feeds(model: ir.Model) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else 4 for dim in value.shape]
        integers = generator.integers(0, 256, shape).astype(np.uint8)
        feeds[value.name] = integers if value.dtype == ir.DataType.UINT8 else integers.astype(np.float32)
    return feeds


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    before = ir.from_onnx_text(what_to_do(path)[1])
    feeds = random_feeds(before)
    exact = run(before, feeds, optimise=False)

    model, report = as_written(path, Pipeline.parse("guard-float").run)

    assert (report.changed > 0) == (not path.stem.startswith("not-"))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for one, other in zip(exact, run(model, feeds, optimise=False), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(exact, run(model, feeds), strict=True):
        assert np.abs(one.astype(float) - other).max() <= 1, "the runtime has rounded the weights"


def test_the_runtime_needs_the_guard() -> None:
    """When this fails, ONNX Runtime has mended it, and the pass can go."""
    channels = 2
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(channels, 1, 3, 3)).astype(np.float32) * np.array([1, 1e-4])[:, None, None, None]
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (uint8[1,2,8,8] x) => (uint8[1,2,6,6] y)
        <float[2,1,3,3] w = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[2] b = {0.0,0.0}, float s = {0.05},
         uint8 z = {128}, float t = {0.00001}> {
            d = DequantizeLinear (x, s, z)
            c = Conv <group = 2> (d, w, b)
            y = QuantizeLinear (c, t, z)
        }"""
    )
    model.graph.initializers["w"].const_value = ir.tensor(weight.astype(np.float32), name="w")
    feeds = random_feeds(model)
    exact = run(model, feeds, optimise=False)[0].astype(int)

    assert np.abs(run(model, feeds)[0] - exact).max() > 20
    Pipeline.parse("guard-float").run(model)
    assert np.abs(run(model, feeds)[0] - exact).max() <= 1
