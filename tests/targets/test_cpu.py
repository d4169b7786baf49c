"""What `cpu-int8` decides, from nothing but the model and its table of costs, and what it tells of the kernels."""

from __future__ import annotations

import tomllib
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.analysis.integer_plan import integer_plan
from qgraph.errors import UserError
from qgraph.pipeline import Context, Pipeline
from qgraph.targets.cpu_costs import better_in_float, graph_cost, node_cost, table
from qgraph.targets.cpu_int8 import CpuInt8

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
CNN = """g (float[n,3,64,64] x, float[32,3,3,3] w1, float[64,32,3,3] w2, float[64,64,3,3] w3, float[64,10] w4)
=> (float[n,10] y) {
    [stem] a = Conv <strides = [2,2], pads = [1,1,1,1]> (x, w1)
    b = Relu (a)
    [second] c = Conv <pads = [1,1,1,1]> (b, w2)
    d = Relu (c)
    [third] e = Conv <pads = [1,1,1,1]> (d, w3)
    f = GlobalAveragePool (e)
    h = Flatten (f)
    [head] y = MatMul (h, w4)
}"""
TINY = """g (float[n,1,12,12] x, float[4,1,3,3] w1, float[4,4,3,3] w2) => (float[n,4,8,8] y) {
    a = Conv (x, w1)
    b = Relu (a)
    y = Conv (b, w2)
}"""
ENCODER = """g (float[n,16,256] x, float[256,1024] w1, float[1024,256] w2, float[256] k, float[256] l)
=> (float[n,16,256] y) {
    a = MatMul (x, w1)
    b = Gelu (a)
    c = MatMul (b, w2)
    d = Add (c, x)
    y = LayerNormalization (d, k, l)
}"""
PATCHES = """g (float[n,3,64,64] x, float[256,3,16,16] w, float[256,4096] w1, float[4096,256] w2, int64[3] i_shape)
=> (float[n,16,256] y) {
    [patches] p = Conv <strides = [16,16]> (x, w)
    q = Reshape (p, i_shape)
    t = Transpose <perm = [0,2,1]> (q)
    a = MatMul (t, w1)
    b = Gelu (a)
    c = MatMul (b, w2)
    a1 = MatMul (c, w1)
    b1 = Gelu (a1)
    y = MatMul (b1, w2)
}"""


def model(text: str) -> ir.Model:
    proto = onnx.parser.parse_model(HEAD + text)
    generator = np.random.default_rng(0)
    for value in list(proto.graph.input):
        if value.name == "x":
            continue
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = np.array([0, 256, 16]) if value.name == "i_shape" else generator.normal(size=shape) * 0.1
        kind = np.int64 if value.name == "i_shape" else np.float32
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(kind), value.name))
        proto.graph.input.remove(value)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def feeds(one: ir.Model, count: int = 4) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    shape = [dim if isinstance(dim, int) else 1 for dim in one.graph.inputs[0].shape]
    return [{"x": generator.normal(size=shape).astype(np.float32)} for _ in range(count)]


def decide(one: ir.Model, *, calibrated: bool = True) -> Pipeline:
    return CpuInt8().compress_passes(one, Context(calibration=feeds(one) if calibrated else None))


def compiled(one: ir.Model, folder: Path) -> CpuInt8:
    target, context = CpuInt8(), Context(calibration=feeds(one), threads=1)
    for pipeline in (target.compress_passes(one, context), target.lower_passes()):
        pipeline.run(one, context=context)
    target.lower(one, folder)
    return target


def test_the_first_layer_of_an_image_network_stays_in_float() -> None:
    (qdq,) = [one for one in decide(model(CNN)) if one.name == "qdq"]
    assert "stem" in qdq.exclude
    assert not {"second", "third"} & set(qdq.exclude)


def test_decisions_repeat_and_leave_the_model_alone() -> None:
    one = model(CNN)
    before = ir.to_proto(one).SerializeToString(deterministic=True)
    assert decide(one).to_text() == decide(model(CNN)).to_text()
    assert ir.to_proto(one).SerializeToString(deterministic=True) == before


def test_kernels_are_counted_and_float_ones_explained(tmp_path: Path) -> None:
    kernels = compiled(model(CNN), tmp_path).kernels(tmp_path)
    assert kernels.integer["QLinearConv"] == 2
    assert kernels.floating["Conv"] == 1
    reasons = [reason for _, reason in kernels.left_in_float]
    assert any("float is faster here" in reason for reason in reasons)
    assert len(reasons) == sum(kernels.floating.values())


def test_a_network_too_small_for_integers_is_left_in_float(tmp_path: Path) -> None:
    one = model(TINY)
    assert [(one.name, one.exclude) for one in decide(one)] == [("qdq", ("*",))]
    kernels = compiled(one, tmp_path).kernels(tmp_path)
    assert not kernels.integer
    assert Counter(kernels.floating) == {"Conv": 2}


def test_a_transformer_is_quantized_dynamically() -> None:
    names = [one.name for one in decide(model(ENCODER), calibrated=False)]
    assert names == ["dynamic-int8"]


def test_without_samples_a_convolutional_network_asks_for_them() -> None:
    one = model(CNN)
    with pytest.raises(UserError, match="needs calibration data: pass --calib"):
        decide(one, calibrated=False).run(one)


def test_without_samples_a_transformer_leaves_its_few_convolutions_in_float() -> None:
    one = model(PATCHES)
    pipeline = decide(one, calibrated=False)
    assert [each.name for each in pipeline] == ["dynamic-int8"]
    assert pipeline.run(one).changed == 4


def test_average_pools_become_convolutions_before_they_are_quantized(tmp_path: Path) -> None:
    pool = "p = AveragePool <kernel_shape = [2,2], strides = [2,2]> (d)"
    one = model(CNN.replace("[third] e = Conv <pads = [1,1,1,1]> (d,", f"{pool}\n    e = Conv <pads = [1,1,1,1]> (p,"))
    kernels = compiled(one, tmp_path).kernels(tmp_path)
    assert kernels.integer["QLinearConv"] == 3
    assert "QLinearAveragePool" not in kernels.integer


def test_tuning_returns_a_candidate_and_leaves_the_model_alone() -> None:
    one = model(CNN)
    context = Context(calibration=feeds(one), threads=1)
    before = ir.to_proto(one).SerializeToString(deterministic=True)
    target = CpuInt8()
    default = target.compress_passes(one, context)
    tuned = target.tune(one, context, default)
    assert tuned in (default, Pipeline.parse("qdq"), Pipeline.parse("dynamic-int8"), Pipeline())
    assert Pipeline.from_toml(tuned.to_toml()) == tuned
    assert ir.to_proto(one).SerializeToString(deterministic=True) == before


def test_the_table_holds_what_was_learned_of_the_kernels() -> None:
    """The facts that decisions rest on; a table measured on another machine may well change some of them."""
    one = model(CNN)
    cost = {node.name: (node_cost(node, "int8"), node_cost(node, "float")) for node in one.graph}
    assert cost["third"][0] * 2 < cost["third"][1], "wide convolutions gain most"
    assert cost["stem"][0] > cost["stem"][1], "three channels suit no integer kernel"
    pool = (table()["pool-int8"]["element"], table()["pool-float"]["element"])
    assert pool[0] > 10 * pool[1]


def test_costs_fall_with_every_decision() -> None:
    graph = model(CNN).graph
    excluded = better_in_float(graph, lambda _: None)
    all_integer = graph_cost(graph, integer_plan(graph, lambda _: None))
    chosen = graph_cost(graph, integer_plan(graph, lambda node: "float" if node in excluded else None))
    all_float = graph_cost(graph, integer_plan(graph, lambda _: "float"))
    assert chosen < min(all_integer, all_float)


def test_the_table_is_complete() -> None:
    text = resources.files("qgraph.targets").joinpath("cpu_costs.toml").read_text(encoding="utf-8")
    kernels = {name for name, row in tomllib.loads(text).items() if isinstance(row, dict)}
    for how in ("float", "int8"):
        convolutions = ("convolution", "first-convolution", "odd-convolution", "depthwise", "odd-depthwise", "grouped")
        assert {f"{one}-{how}" for one in (*convolutions, "arithmetic", "lookup", "pool", "transpose")} <= kernels
    assert {"quantize", "dequantize", "reorder", "product-float", "product-int8", "product-dynamic"} <= kernels
    assert all(cost >= 0 for row in table().values() for cost in row.values())


def test_a_network_that_is_faster_in_float_says_so(tmp_path: Path) -> None:
    tiny = model(TINY)
    pipeline = CpuInt8().compress_passes(tiny, Context())
    report = pipeline.run(tiny)
    assert not report.changed
    assert {one.node for one in report.skipped} >= {"Conv->a", "Conv->y"}
    assert all("float is faster here" in one.reason for one in report.skipped)
