"""`coreml-operators` and `coreml-partitions`: what ONNX Runtime's CoreML provider takes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.analysis.kernel_support import unsupported
from qgraph.capabilities import table
from qgraph.pipeline import Pipeline
from qgraph.runtime.session import open_session


def parsed(text: str, signature: str = "(float[2,3] x) => (float[2,3] y)") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> g {signature} {text}')


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1)
    return np.asarray(session.run(None, {"x": x})[0])


REWRITTEN = {
    "Neg": ("{ y = Neg (x) }", ["Mul"]),
    "Abs": ("{ y = Abs (x) }", ["Mul", "Max"]),
    "Floor": ("{ y = Floor (x) }", ["Mul", "Ceil", "Mul"]),
    "Min": ("{ a = Exp (x) y = Min (x, a) }", ["Exp", "Mul", "Mul", "Max", "Mul"]),
    "Sum": ("{ a = Exp (x) y = Sum (x, a, x) }", ["Exp", "Add", "Add"]),
    "HardSwish": ("{ y = HardSwish (x) }", ["HardSigmoid", "Mul"]),
    "Expand": ("<int64[3] s = {4, 2, 3}> { y = Expand (x, s) }", ["Reshape", "Tile"]),
    "Expand of one": ("<int64[2] s = {2, 3}> { y = Expand (x, s) }", ["Tile"]),
    "ReduceL2": ("<int64[1] a = {1}> { y = ReduceL2 (x, a) }", ["Mul", "ReduceSum", "Sqrt"]),
    "ReduceSumSquare": ("{ y = ReduceSumSquare <keepdims = 0> (x) }", ["Mul", "ReduceSum"]),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_operators_become_those_of_the_provider(name: str):
    text, operators = REWRITTEN[name]
    model = parsed(text, "(float[2,3] x) => (float y)")
    model.graph.outputs[0].shape = None
    Pipeline.parse("infer-shapes").run(model)
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32) * 3
    before = run(model, x)

    report = Pipeline.parse("coreml-operators").run(model)

    assert report.changed == 1
    assert [node.op_type for node in model.graph] == operators
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-6)
    assert Pipeline.parse("infer-shapes,coreml-operators").run(model).parts[-1].changed == 0
    assert unsupported(model, table("coreml-mlprogram")) == []


@pytest.mark.parametrize(
    ("text", "signature", "reasons"),
    [
        ("{ y = Neg (x) }", "(int64[2] x) => (int64[2] y)", []),
        ("{ y = Expand (x, s) }", "(float[2] x, int64[2] s) => (float[n,2] y)",
         ["Expand stays: the sizes of its output are not known before it runs"]),
        ("<int64[0] a = {}> { y = ReduceL2 <noop_with_empty_axes = 1> (x, a) }", "(float[2] x) => (float[2] y)",
         ["ReduceL2 stays: it may reduce nothing (noop_with_empty_axes)"]),
    ],
)  # fmt: skip
def test_what_stays_is_told(text: str, signature: str, reasons: list[str]):
    model = parsed(text, signature)
    before = ir.to_onnx_text(model)
    report = Pipeline.parse("coreml-operators").run(model)
    assert report.changed == 0
    assert [one.reason for one in report.skipped] == reasons
    assert ir.to_onnx_text(model) == before


def test_the_parts_are_told_and_what_cuts_them():
    model = parsed("{ a = Relu (x) b = Log (a) d = Exp (b) y = Add (d, a) }")
    before = ir.to_onnx_text(model)

    report = Pipeline.parse("coreml-partitions").run(model).parts[-1]

    assert list(report.notes) == ["CoreML provider: 2 partitions, 3 of 4 nodes, cut by 1 Log ('Log->b')"]
    assert [(one.node, one.reason) for one in report.skipped] == [
        ("Log->b", "ONNX Runtime's CoreMLExecutionProvider has no Log")
    ]
    assert report.figures == {"partitions": 2, "taken": 3, "nodes": 4}
    assert ir.to_onnx_text(model) == before


@pytest.mark.parametrize(
    ("text", "signature", "reason"),
    [
        ("{ y = Conv (x, w) }", "(float[1,2,5,5] x, float[3,2,1,1] w) => (float[1,3,5,5] y)",
         "input 1 must be constant"),
        ("{ y = MaxPool <kernel_shape = [2,2], ceil_mode = 1> (x) }", "(float[1,2,5,5] x) => (float[1,2,4,4] y)",
         "ceil_mode"),
        ("<float[3] b = {1, 2, 3}, float[4,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}> { y = Gemm (x, w, b) }",
         "(float[2,4] x) => (float[2,3] y)", None),
        ("<float16[1] e = {2}> { y = Pow (x, e) }", "(float16[2] x) => (float16[2] y)", "input 0 is float16"),
        ("{ y = Add (x, x) }", "(int64[2] x) => (int64[2] y)", "input 0 is int64"),
    ],
)  # fmt: skip
def test_the_table_knows_the_providers_constraints(text: str, signature: str, reason: str | None):
    found = unsupported(parsed(text, signature), table("coreml-mlprogram"))
    assert [one.reason for one in found if reason is None or reason not in one.reason] == []
    assert len(found) == (reason is not None)
