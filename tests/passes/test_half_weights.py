"""half-weights: what is stored, what stays, and that nothing is left to do at run time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.passes.half_weights import HalfWeights
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.session import open_session
from qgraph.targets.cpu_fp16 import CpuFp16

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 64] x, float[64, 32] w, float[32] b, float[32, 32] square) => (float[n, 32] y) {
    m = MatMul (x, w)
    r = Relu (m)
    again = MatMul (r, square)
    y = Add (again, b)
}"""
RANDOM = np.random.default_rng(0)
SQUARE = RANDOM.normal(size=(32, 32)).astype(np.float32)
WEIGHT = RANDOM.normal(size=(64, 32)).astype(np.float32)


def model(weight: np.ndarray = WEIGHT) -> ir.Model:
    one = ir.from_onnx_text(TEXT)
    for value, array in zip(list(one.graph.inputs)[1:], (weight, SQUARE[0], SQUARE), strict=True):
        value.const_value = ir.tensor(array, name=value.name)
        one.graph.register_initializer(value)
    Pipeline.parse("lift-constants").run(one)
    return one


def halve(one: ir.Model) -> Report:
    return Pipeline([HalfWeights()]).run(one).parts[0]


def test_weights_are_stored_in_float16_and_small_ones_are_not(tmp_path: Path):
    one = model()
    assert halve(one).changed == 2
    kinds = {value.name: value.dtype for value in one.graph.initializers.values()}
    half = ir.DataType.FLOAT16
    assert kinds == {"w_float16": half, "square_float16": half, "b": ir.DataType.FLOAT}
    once = ir.to_onnx_text(one)
    assert halve(one).changed == 0
    assert ir.to_onnx_text(one) == once
    qgraph.ir.save(one, tmp_path / "model.onnx")
    x = RANDOM.normal(size=(4, 64)).astype(np.float32)
    found = open_session(tmp_path / "model.onnx").run(None, {"x": x})[0]
    wide = [array.astype(np.float16).astype(np.float32) for array in (WEIGHT, SQUARE)]
    np.testing.assert_allclose(found, np.maximum(x @ wide[0], 0) @ wide[1] + SQUARE[0], rtol=0, atol=1e-4)


def test_the_runtime_widens_them_at_load(tmp_path: Path):
    one = model()
    halve(one)
    qgraph.ir.save(one, tmp_path / "model.onnx")
    open_session(tmp_path / "model.onnx", optimised_path=tmp_path / "optimised.onnx")
    operators = {node.op_type for node in qgraph.ir.load(tmp_path / "optimised.onnx").graph}
    assert "Cast" not in operators, "the kernels would read float16 at every run"


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (np.where(np.arange(64)[:, None] == 3, 7e4, WEIGHT), "reaches 7e+04, and float16 ends at 65504"),
        (WEIGHT * 1e-7, "where float16 has few bits left"),
        (np.where(np.arange(64)[:, None] == 3, np.nan, WEIGHT), "it holds NaN or infinity"),
    ],
)
def test_what_float16_cannot_hold_stays_and_says_why(weight: np.ndarray, reason: str):
    one = model(weight.astype(np.float32))
    report = halve(one)
    assert report.changed == 1
    assert [(skipped.node, reason in skipped.reason) for skipped in report.skipped] == [("w", True)]
    assert one.graph.initializers["w"].dtype == ir.DataType.FLOAT


def test_arm_computes_in_float16():
    one = model()
    CpuFp16(cpu="neon").lower_passes().run(one)
    assert {node.outputs[0].dtype for node in one.graph if node.op_type == "MatMul"} == {ir.DataType.FLOAT16}
    one = model()
    CpuFp16().lower_passes().run(one)
    assert {node.outputs[0].dtype for node in one.graph if node.op_type == "MatMul"} <= {ir.DataType.FLOAT, None}
    assert {value.dtype for value in one.graph.initializers.values()} == {ir.DataType.FLOAT16, ir.DataType.FLOAT}
