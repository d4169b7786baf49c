"""`cpu-int8` for processors with and without VNNI, and for Arm: which integers, and that none saturate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.errors import UserError
from qgraph.numerics.dot_products import saturating_product
from qgraph.pipeline import Context, Pipeline
from qgraph.runtime.processor import is_arm
from qgraph.target_options import options_of, read_target
from qgraph.targets import cpu_int8
from qgraph.targets.cpu_int8 import CpuInt8
from qgraph.targets.cpu_saturation import saturating

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
PRODUCTS = """g (float[n,16,256] x) => (float[n,16,256] y) {
    a = MatMul (x, w1)
    b = Gelu (a)
    c = MatMul (b, w2)
    y = Softmax (c)
}"""
CONVOLUTIONS = """g (float[n,32,32,32] x) => (float[n,64,32,32] y) {
    a = Conv <pads = [1,1,1,1]> (x, w1)
    b = Relu (a)
    c = Conv <pads = [1,1,1,1]> (b, w2)
    d = Relu (c)
    y = Conv <pads = [1,1,1,1]> (d, w3)
}"""
"""Its first layer is faster in float."""
SHAPES = {PRODUCTS: ((256, 1024), (1024, 256)), CONVOLUTIONS: ((64, 32, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3))}


def model(text: str) -> ir.Model:
    one = ir.from_onnx_text(
        HEAD + text.replace(" x)", f" x{''.join(f', float{list(s)} w{i + 1}' for i, s in enumerate(SHAPES[text]))})")
    )
    random = np.random.default_rng(0)
    for value in list(one.graph.inputs)[1:]:
        value.const_value = ir.tensor(np.abs(random.normal(size=value.shape.numpy())).astype(np.float32) * 0.05)
        one.graph.register_initializer(value)
    Pipeline.parse("lift-constants").run(one)
    return one


def compiled(text: str, processor: str, passes: str | None = None) -> tuple[CpuInt8, ir.Model, Pipeline]:
    target, one = CpuInt8(cpu=processor), model(text)
    random = np.random.default_rng(1)
    shape = [dim if isinstance(dim, int) else 1 for dim in one.graph.inputs[0].shape]
    feeds = [{"x": random.normal(size=shape).astype(np.float32)} for _ in range(2)]
    context = Context(calibration=feeds, threads=1)
    pipeline = target.compress_passes(one, context) if passes is None else Pipeline.parse(passes)
    (pipeline + target.lower_passes()).run(one, context=context)
    return target, one, pipeline


def integer_weights(one: ir.Model) -> list[np.ndarray]:
    return [
        array
        for value in one.graph.initializers.values()
        if value.dtype == ir.DataType.INT8 and (array := qgraph.ir.constant(value)).size > 4096
    ]


@pytest.mark.parametrize("text", SHAPES)
def test_without_vnni_no_sum_of_two_products_saturates(text: str):
    target, one, _ = compiled(text, "avx2")
    weights = integer_weights(one)
    assert len(weights) == 2
    assert target.check(one) == []
    for array in weights:
        matrix = array if text == PRODUCTS else array.reshape(len(array), -1).T
        left = np.full((1, len(matrix)), 255, np.uint8)
        exact = left.astype(np.int32) @ matrix.astype(np.int32)
        np.testing.assert_array_equal(saturating_product(left, matrix), exact)


@pytest.mark.parametrize("text", SHAPES)
def test_with_vnni_weights_take_the_whole_range_and_would_saturate_without(text: str):
    target, one, pipeline = compiled(text, "")
    assert target.check(one) == []
    assert len(saturating(one)) == 2
    assert compiled(text, "vnni")[2] == pipeline
    array = max(integer_weights(one), key=np.size)
    matrix = array if text == PRODUCTS else array.reshape(len(array), -1).T
    left = np.full((1, len(matrix)), 255, np.uint8)
    assert (saturating_product(left, matrix) != left.astype(np.int32) @ matrix.astype(np.int32)).any()


@pytest.mark.parametrize(("text", "passes"), [(PRODUCTS, "dynamic-int8"), (CONVOLUTIONS, "qdq")])
def test_passes_of_ones_own_that_would_saturate_are_refused(text: str, passes: str):
    target, one, _ = compiled(text, "avx2", passes)
    refused = target.check(one)
    assert len(refused) == len(SHAPES[text])
    assert all("may sum up to 64770, and processors without VNNI saturate at 32767" in reason for _, reason in refused)
    target, one, _ = compiled(text, "avx2", f"{passes}{{reduce_range=true}}")
    assert target.check(one) == []


def test_arm_gets_signed_activations_in_the_same_integer_kernels(tmp_path: Path):
    target, one, pipeline = compiled(CONVOLUTIONS, "neon")
    (qdq,) = [one for one in pipeline if one.name == "qdq"]
    assert qdq.activations == "int8"
    target.lower(one, tmp_path)
    # Of a runtime for x86, only that it has the same kernels is known; for Arm it fuses otherwise.
    assert CpuInt8().kernels(tmp_path).integer["QLinearConv"] == 2
    assert (target.kernels(tmp_path) is None) == (not is_arm())


def test_the_search_rounds_to_the_integers_of_the_processor():
    static = Pipeline.parse("qdq")
    for processor, bits in (("", "8"), ("avx2", "7")):
        ways = [way for step in CpuInt8(cpu=processor).ladder(static) for way in step.ways]
        assert f"adaround{{bits={bits}}} < qdq" in ways


def test_the_processor_is_an_option_of_the_target():
    assert read_target("cpu-int8{cpu=avx2}") == CpuInt8(cpu="avx2")
    assert options_of(CpuInt8(cpu="avx2")) == {"cpu": "avx2"}
    assert options_of(CpuInt8()) == {}
    with pytest.raises(UserError, match="cpu"):
        read_target("cpu-int8{cpu=sparc}")


def test_running_where_it_would_saturate_is_spoken_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, one, _ = compiled(PRODUCTS, "")
    target.lower(one, tmp_path)
    target.session(tmp_path)
    monkeypatch.setattr(cpu_int8, "lacks_integer_dot_products", lambda: True)
    with pytest.warns(UserWarning, match="compile with --cpu avx2"):
        target.session(tmp_path)
    CpuInt8(cpu="avx2").session(tmp_path)
    assert "without VNNI" in CpuInt8(cpu="vnni").stand_in()


def test_what_is_for_arm_says_that_it_was_not_run_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_int8, "is_arm", lambda: False)
    assert "not run on Arm" in CpuInt8(cpu="neon").stand_in()
    monkeypatch.setattr(cpu_int8, "is_arm", lambda: True)
    assert CpuInt8(cpu="neon").stand_in() == ""
