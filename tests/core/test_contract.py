"""What every registered pass and target keeps to."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qgraph import registry
from qgraph.pipeline import Context, Pass, Pipeline, Report
from qgraph.targets.base import Target

PASSES = registry.names("pass")
MADE_WITHOUT_OPTIONS = [name for name in PASSES if name not in ("onnx-ir", "rewrite")]

NOTHING_TO_DO = """
<ir_version: 10, opset_import: ["" : 21]>
nothing (float[2, 4] x) => (float[2, 4] y) { y = Shrink (x) }
"""
INTEGERS = """
<ir_version: 10, opset_import: ["" : 21]>
integers (float[2, 4] x) => (float[4, 2] y) <float s = {0.1}, uint8 z = {3}>
{ q = QuantizeLinear (x, s, z) t = Transpose (q) y = DequantizeLinear (t, s, z) }
"""
OF_THEIR_OWN = {"integer-requantize": INTEGERS}
"""Models without a match for passes that tell of every float operator by a mark on its node."""
PREPARED = {
    "qdq": "lift-constants,fold-constants",
    "dynamic-int8": "lift-constants,fold-constants",
    "full-qdq": "convert-opset{version=21},lift-constants,fold-constants",
    "integer-requantize": "convert-opset{version=21},lift-constants,fold-constants,full-qdq",
}
"""What has to be done to a model before a pass finds its matches."""
PLENTY_TO_DO = """
<ir_version: 8, opset_import: ["" : 17]>
plenty (float[N, 3, 8, 8] x) => (float[N, 10] y)
<float[4] zeros = {0, 0, 0, 0}, float[4] ones = {1, 1, 1, 1}, float[4] twos = {2, 2, 2, 2}>
{
    unused = Neg (x)
    shape = Constant <value = int64[4] {4, 3, 3, 3}> ()
    half = Constant <value = float[1] {0.5}> ()
    kernel = Expand (half, shape)
    c = Conv <pads = [1, 1, 1, 1]> (x, kernel)
    n = BatchNormalization (c, ones, zeros, zeros, twos)
    r = Relu (n)
    i = Identity (r)
    d = Dropout (i)
    p = GlobalAveragePool (d)
    f = Flatten (p)
    width = Constant <value = int64[2] {4, 10}> ()
    matrix = Expand (half, width)
    m = MatMul (f, matrix)
    same = MatMul (f, matrix)
    y = Add (m, same)
}
"""


def run(pipeline: str, model: ir.Model) -> Report:
    """Return the report on the last pass of a pipeline."""
    random = np.random.default_rng(0)
    shape = [2 if isinstance(size, ir.SymbolicDim) else size for size in model.graph.inputs[0].shape]
    feeds = [{"x": random.normal(size=shape).astype(np.float32)} for _ in range(4)]
    return Pipeline.parse(pipeline).run(model, calibration=feeds, context=Context(threads=1, opset=21)).parts[-1]


def plenty(name: str) -> ir.Model:
    model = ir.from_onnx_text(PLENTY_TO_DO)
    if name in PREPARED:
        run(PREPARED[name], model)
    return model


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_documented_frozen_dataclass(name: str):
    cls = registry.find("pass", name)
    assert issubclass(cls, Pass)
    assert cls.__dataclass_params__.frozen
    assert cls.__doc__.strip().endswith(".")
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "the docstring is the one that dataclass makes"
    if cls.__module__.startswith("qgraph.passes."):
        assert "=>" in importlib.import_module(cls.__module__).__doc__, "the module shows no graph before => after"


@pytest.mark.parametrize("name", MADE_WITHOUT_OPTIONS)
def test_a_pass_has_a_default_for_every_option_and_a_text_form(name: str):
    one = registry.find("pass", name)()
    pipeline = Pipeline([one])
    assert pipeline.to_text() == name
    assert Pipeline.parse(name) == Pipeline.from_toml(pipeline.to_toml()) == pipeline
    assert hash(one) == hash(dataclasses.replace(one))


@pytest.mark.parametrize("name", MADE_WITHOUT_OPTIONS)
def test_a_model_without_a_match_stays_untouched(name: str):
    model = ir.from_onnx_text(OF_THEIR_OWN.get(name, NOTHING_TO_DO))
    before = ir.to_proto(model).SerializeToString()
    report = run(name, model)
    assert ir.to_proto(model).SerializeToString() == before
    assert report.changed == 0


@pytest.mark.parametrize("name", MADE_WITHOUT_OPTIONS)
def test_a_model_is_valid_afterwards_and_a_second_run_changes_nothing(name: str):
    model = plenty(name)
    run(name, model)
    once = ir.to_proto(model)
    onnx.checker.check_model(once)
    if name != "to-bf16":  # for which a CPU has hardly any kernels
        onnxruntime.InferenceSession(once.SerializeToString(), providers=["CPUExecutionProvider"])
    again = run(name, model)
    assert again.changed == 0
    assert ir.to_proto(model).SerializeToString() == once.SerializeToString()


@pytest.mark.parametrize("name", MADE_WITHOUT_OPTIONS)
def test_a_pass_repeats_to_the_byte(name: str):
    results = []
    for _ in range(2):
        model = plenty(name)
        run(name, model)
        results.append(ir.to_proto(model).SerializeToString())
    assert results[0] == results[1]


@pytest.mark.parametrize("name", registry.names("target"))
def test_a_target_is_a_documented_frozen_dataclass(name: str):
    cls = registry.find("target", name)
    assert issubclass(cls, Target)
    assert cls.__dataclass_params__.frozen
    target = cls()
    assert target.summary
    assert "\n" not in target.summary
    assert target.extra in ("apple", "cpu", "cuda", "tvm")
    for pipeline in (target.prepare_passes(), target.lower_passes()):
        assert Pipeline.parse(pipeline.to_text()) == pipeline
