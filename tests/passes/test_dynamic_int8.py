"""dynamic-int8 against golden text, arithmetic done by hand, and ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from golden_rewrites import as_written

import qgraph.ir
from qgraph import capabilities
from qgraph.passes.dynamic_int8 import DynamicInt8
from qgraph.pipeline import Pipeline, Report

GOLDEN = Path(__file__).resolve().parent.parent / "golden/dynamic-int8/every_kind.onnxtxt"
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def session(model: ir.Model, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def quantized(model: ir.Model, **options) -> Report:
    return Pipeline([DynamicInt8(**({"min_elements": 1} | options))]).run(model).parts[0]


def model_with(text: str, **weights: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f"{HEAD}\n{text}")
    for name, array in weights.items():
        value = next(v for node in qgraph.ir.walk(model) for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integer_product(x: np.ndarray, w: np.ndarray, *, per_channel: bool = True) -> np.ndarray:
    """What the kernel computes: uint8 times int8 in integers, by the operators' definitions."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    integers = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    columns = np.abs(w).max(axis=0 if per_channel else None, keepdims=True) / np.float32(127)
    return integers @ np.rint(w / columns) * scale * columns


def test_the_graph_is_as_written():
    _, report = as_written(GOLDEN, quantized)
    assert (report.changed, list(report.skipped)) == (4, [])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("readers", [1, 2])
def test_products_are_those_of_the_integers(per_channel: bool, readers: int):
    w, b, other = normal(32, 24) * np.linspace(0.1, 4, 24, dtype=np.float32), normal(24, seed=1), normal(32, 8, seed=2)
    last = "z = MatMul (x, other)" if readers == 2 else "z = Abs (x)"
    text = f"""g (float[n, m, 32] x, float[32, 24] w, float[24] b, float[32, 8] other)
        => (float[n, m, 24] y, float[n, m, k] z) {{ p = MatMul (x, w) y = Add (p, b) {last} }}"""
    weights = {"w": w, "b": b} | ({"other": other} if readers == 2 else {})
    if readers == 1:
        text = text.replace(", float[32, 8] other", "")
    model = model_with(text, **weights)
    report = quantized(model, per_channel=per_channel)
    assert report.changed == readers
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["DynamicQuantizeMatMul"] == (readers == 1)
    assert (kinds["DynamicQuantizeLinear"], kinds["MatMulIntegerToFloat"]) == ((1, 2) if readers == 2 else (0, 0))
    x = normal(2, 3, 32, seed=3) + 0.5
    y, z = session(model).run(None, {"x": x})
    np.testing.assert_allclose(y, integer_product(x, w, per_channel=per_channel) + b, rtol=0, atol=1e-4)
    if readers == 2:
        np.testing.assert_allclose(z, integer_product(x, other, per_channel=per_channel), rtol=0, atol=1e-4)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", ["", "float[16] b", "float[1, 16] b", "float[1] b"])
def test_gemm_keeps_its_factors(trans_b: int, bias: str):
    w = normal(16, 32) if trans_b else normal(32, 16)
    weights = {"w": w}
    if bias:
        weights["b"] = normal(*{"float[16] b": (16,), "float[1, 16] b": (1, 16), "float[1] b": (1,)}[bias], seed=1)
    inputs = f"float[n, 32] x, float{list(w.shape)} w" + (f", {bias}" if bias else "")
    call = f"Gemm <alpha = 0.5, beta = 3.0, transB = {trans_b}> (x, w{', b' if bias else ''})"
    model = model_with(f"g ({inputs}) => (float[n, 16] y) {{ y = {call} }}", **weights)
    assert quantized(model).changed == 1
    x = normal(5, 32, seed=2)
    expected = integer_product(x, (w.T if trans_b else w) * 0.5) + 3.0 * weights.get("b", np.zeros(1)).reshape(-1)
    np.testing.assert_allclose(session(model).run(None, {"x": x})[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("columns", [128, 96, 48])
def test_embeddings_are_within_half_a_step(columns: int):
    table = normal(50, columns) * np.linspace(0.01, 3, 50, dtype=np.float32)[:, None]
    text = f"g (int64[n] i, float[50, {columns}] t) => (float[n, {columns}] y) {{ y = Gather <axis = 0> (t, i) }}"
    model = model_with(text, t=table)
    assert quantized(model).changed == 1
    ids = np.array([0, 7, 49, 7])
    found = session(model).run(None, {"i": ids})[0]
    block = next(size for size in (128, 64, 32, 16) if columns % size == 0)
    step = np.abs(table.reshape(50, -1, block)).max(-1, keepdims=True) / 127
    assert (np.abs(found - table[ids]).reshape(4, -1, block) <= step[ids] * 0.501).all()
    assert quantized(model_with(text, t=table), embeddings=False).changed == 0


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_lstm_stays_close_to_float(direction: str, per_channel: bool):
    directions = 2 if direction == "bidirectional" else 1
    weights = {"w": normal(directions, 64, 24) * 0.3, "r": normal(directions, 64, 16, seed=1) * 0.3}
    weights["b"] = normal(directions, 128, seed=2) * 0.1
    inputs = ", ".join(f"float{list(array.shape)} {name}" for name, array in weights.items())
    call = f'y, h = LSTM <hidden_size = 16, direction = "{direction}"> (x, w, r, b)'
    outputs = f"float[s, {directions}, n, 16] y, float[{directions}, n, 16] h"
    text = f"g (float[s, n, 24] x, {inputs}) => ({outputs}) {{ {call} }}"
    model = model_with(text, **weights)
    x = normal(7, 3, 24, seed=3)
    before = session(model).run(None, {"x": x})
    assert quantized(model, per_channel=per_channel).changed == 1
    assert [node.op_type for node in model.graph] == ["DynamicQuantizeLSTM"]
    for one, other in zip(before, session(model).run(None, {"x": x}), strict=True):
        assert 0 < np.abs(one - other).max() < 0.03


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        ("g (float[n, 4] x, float[4, n] z) => (float[n, n] y) { y = MatMul (x, z) }", {}, "multiplies activations"),
        ("g (float[4, 4] w, float[4, n] x) => (float[4, n] y) { y = MatMul (w, x) }", {"w": (4, 4)}, "left factor"),
        ("g (float[n, 4] x, float[2, 4, 4] w) => (float[2, n, 4] y) { y = MatMul (x, w) }", {"w": (2, 4, 4)}, "3 dim"),
        (
            "g (float[4, n] x, float[4, 4] w) => (float[n, 4] y) { y = Gemm <transA = 1> (x, w) }",
            {"w": (4, 4)},
            "transp",
        ),
        ("g (float[4] x, float[4, 4] w) => (float[4] y) { y = MatMul (x, w) }", {"w": (4, 4)}, "a vector"),
        (
            "g (float[n, 4] x, float[4, 4] w) => (float[n, 4] y, float[4, 4] v) { y = MatMul (x, w) v = Neg (w) }",
            {"w": (4, 4)},
            "read by 'Neg->v' too",
        ),
        ("g (int64[n] i, float[4, 9] w) => (float[n, 9] y) { y = Gather (w, i) }", {"w": (4, 9)}, "multiple of 16"),
        (
            "g (float[1, 4, 8, 8] x, float[4, 4, 1, 1] w) => (float[1, 4, 8, 8] y) { y = Conv (x, w) }",
            {"w": (4, 4, 1, 1)},
            "'qdq' quantizes them",
        ),
    ],
)
def test_what_stays_in_float_says_why(text: str, weights: dict[str, tuple[int, ...]], reason: str):
    model = model_with(text, **{name: normal(*shape) for name, shape in weights.items()})
    before = ir.to_proto(model).SerializeToString()
    report = quantized(model)
    assert report.changed == 0
    assert [reason in skipped.reason for skipped in report.skipped] == [True]
    assert ir.to_proto(model).SerializeToString() == before


PLAIN = "g (float[n, 32] x, float[32, 32] w) => (float[n, 32] y) { [first] y = MatMul (x, w) }"


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_stay_in_float(fault: float):
    weight = normal(96, 64)
    weight[3, 5] = fault
    text = "g (float[n, 96] x, float[96, 64] w) => (float[n, 64] y) { y = MatMul (x, w) }"
    report = quantized(model_with(text, w=weight))
    assert (report.changed, [one.reason for one in report.skipped]) == (0, ["its weight 'w' holds NaN or infinity"])


def test_options_leave_things_alone():
    for options, reason in (({"exclude": ("fir*",)}, "it is excluded"), ({"min_elements": 2000}, "1024 elements")):
        report = quantized(model_with(PLAIN, w=normal(32, 32)), **options)
        assert report.changed == 0
        assert reason in report.skipped[0].reason
    half = model_with(PLAIN.replace("float[", "float16["), w=normal(32, 32).astype(np.float16))
    assert "its weight is float16" in quantized(half).skipped[0].reason


def test_a_reduced_range_has_seven_bits():
    model = model_with(PLAIN, w=normal(32, 32))
    quantized(model, reduce_range=True)
    integers = next(v for name, v in model.graph.initializers.items() if name.endswith("int8")).const_value.numpy()
    assert (integers.min(), integers.max()) >= (-63, 0)
    assert integers.max() <= 63
    assert max(-int(integers.min()), int(integers.max())) == 63


def test_a_large_weight_is_quantized_when_it_is_written():
    model = model_with(
        PLAIN.replace("[32, 32]", "[32, 40000]").replace("[n, 32] y", "[n, 40000] y"), w=normal(32, 40000)
    )
    assert quantized(model).changed == 1
    stored = next(v.const_value for name, v in model.graph.initializers.items() if name.endswith("int8"))
    assert isinstance(stored, ir.LazyTensor)
    x = normal(2, 32, seed=1)
    w = normal(32, 40000)
    np.testing.assert_allclose(session(model).run(None, {"x": x})[0], integer_product(x, w), rtol=0, atol=2e-4)


def test_nodes_in_a_subgraph_are_quantized_with_their_own_input():
    text = """g (bool c, float[n, 32] x, float[32, 32] w) => (float[n, 32] y) {
        y = If (c) <then_branch = t () => (float[n, 32] a) { a = MatMul (x, w) },
                    else_branch = e () => (float[n, 32] b) { d = MatMul (x, w) b = Neg (d) }>
    }"""
    model = model_with(text, w=normal(32, 32))
    assert quantized(model).changed == 2
    onnx.checker.check_model(ir.to_proto(model))
    x = normal(3, 32, seed=1)
    for condition, sign in ((True, 1), (False, -1)):
        found = session(model).run(None, {"c": np.array(condition), "x": x})[0]
        np.testing.assert_allclose(found, sign * integer_product(x, normal(32, 32)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("other", ["e", "h"])
def test_the_runtime_does_not_fuse_what_gets_slower(tmp_path: Path, other: str):
    text = """g (int64[n, m] i, float[9, 32] t, float[32, 32] w, float[32, 32] v, float[32] s)
        => (float[n, m, 32] y, float[n, m, 32] k) {
        e = Gather (t, i)
        d = MatMul (e, w)
        h = MatMul (e, v)
        a = Add (d, OTHER)
        f = LayerNormalization (a, s, s)
        g = MatMul (f, w)
        b = Add (g, f)
        y = LayerNormalization (b, s, s)
        k = Neg (h)
    }"""
    text = text.replace("OTHER", other)
    text = text if other == "e" else text.replace("k = Neg (h)", "k = Neg (e)")
    model = model_with(text, t=normal(9, 32), w=normal(32, 32), v=normal(32, 32, seed=1), s=normal(32))
    Pipeline.parse("infer-shapes").run(model)
    ids = {"i": np.array([[0, 8, 3]])}
    before = session(model).run(None, ids)[0]
    assert quantized(model).changed == 4
    session(model, tmp_path / "optimised.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert (kinds["LayerNormalization"], kinds["SkipLayerNormalization"]) == (2, 0)
    assert kinds["Sub"] == 2
    # What is negated is another tensor than the one of that name was: comparisons go by names.
    assert {node.inputs[1].name for node in model.graph if node.op_type == "Sub"} == {"d_negated", "g_negated"}
    assert np.abs(session(model).run(None, ids)[0] - before).max() < 0.05


def test_a_node_that_is_marked_for_float_stays_there():
    text = "g (float[n, 64] x, float[64, 64] w) => (float[n, 64] y) { [layer] y = MatMul (x, w) }"
    model = model_with(text, w=normal(64, 64))
    model.graph[0].metadata_props.update({"qgraph.bits": "16", "qgraph.float": "it hurts"})
    report = quantized(model)
    assert report.changed == 0
    assert [tuple(one) for one in report.skipped] == [("layer", "it hurts")]


def test_a_layer_without_a_kernel_stays_in_float_and_says_why(monkeypatch: pytest.MonkeyPatch):
    table = capabilities.table("onnxruntime-cpu")
    entries = {name: one for name, one in table.operators.items() if "DynamicQuantizeMatMul" not in name}
    without = dataclasses.replace(table, operators=entries)
    monkeypatch.setattr("qgraph.capabilities.table", lambda name: without)
    model = model_with(
        "g (float[2,8] x, float[8,4] w) => (float[2,4] y) { [layer] y = MatMul(x, w) }", w=np.ones((8, 4), np.float32)
    )
    report = quantized(model)
    (told,) = report.skipped
    assert told.node == "layer"
    assert told.reason == (
        "there is no kernel for it: ONNX Runtime's CPUExecutionProvider has no com.microsoft.DynamicQuantizeMatMul"
    )
    assert report.changed == 0
