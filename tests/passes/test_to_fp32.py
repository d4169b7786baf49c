"""to-fp32: golden graph, values kept, what stays in float64 and why, and that every target takes such a model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.errors import UserError
from qgraph.passes import ToFp32

sys.path.insert(0, str(Path(__file__).parent))

import half_precision
from half_precision import check_golden, left, run


def test_golden():
    """What is widened from integers on purpose stays, and a mask is cut off."""
    check_golden(ToFp32(), "layers")


def model_of(body: str, matrix: np.ndarray, *, opset: int = 21) -> ir.Model:
    text = (
        f'<ir_version: 10, opset_import: ["" : {opset}]> g (double[n,64] x) => (double[n,64] y) <double[1,1] w = {{0}}>'
    )
    model = ir.from_onnx_text(f"{text} {{ {body} }}")
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(matrix, name="w")
    value.shape = value.const_value.shape
    return model


LAYER = "[layer] h = MatMul(x, w) [bend] y = Tanh(h)"
MATRIX = np.random.default_rng(0).normal(size=(64, 64)) / 8


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": part} for part in np.random.default_rng(1).normal(size=(4, 2, 64))]


def test_inputs_and_outputs_keep_their_types():
    before, after = model_of(LAYER, MATRIX), model_of(LAYER, MATRIX)
    report = half_precision.convert(ToFp32(), after)
    assert list(report.notes) == ["2 nodes of float64 in float32"]
    assert after.graph.initializers["w"].dtype == ir.DataType.FLOAT
    (found,) = run(after, feeds()[0])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, run(before, feeds()[0])[0], atol=1e-6)


def test_a_constant_beyond_float32_stays_with_its_node():
    report = half_precision.convert(ToFp32(), model_of(LAYER, 1e300 * MATRIX))
    assert left(report) == {"layer": "its constant is beyond float32, which ends at 3.4e38"}


def test_what_a_subgraph_reads_is_widened_again():
    body = """h = MatMul(x, w) one = Constant<value = bool {1}>()
    [choose] y = If (one) <
        then_branch = t () => (double[n,64] a) { a = Neg(h) }, else_branch = e () => (double[n,64] b) { b = Neg(h) }>"""
    before, after = model_of(body, MATRIX), model_of(body, MATRIX)
    report = half_precision.convert(ToFp32(), after)
    assert left(report)["choose"] == "it has subgraphs, which stay as they are"
    np.testing.assert_allclose(run(after, feeds()[0])[0], run(before, feeds()[0])[0], atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, w) [pack] s = SequenceConstruct(x, h) c = ConcatFromSequence<axis = 0>(s) y = Relu(c)",
        "h = MatMul(x, w) [pack] s = SplitToSequence<axis = 1>(h) c = ConcatFromSequence<axis = 1>(s) y = Relu(c)",
        "h = MatMul(x, w) [pack] s = Optional(h) c = OptionalGetElement(s) y = Relu(c)",
    ],
    ids=["made", "split", "optional"],
)
def test_sequences_keep_what_is_in_them(body: str):
    before, after = model_of(body, MATRIX), model_of(body, MATRIX)
    assert "pack" in left(half_precision.convert(ToFp32(), after))
    assert after.graph.initializers["w"].dtype == ir.DataType.FLOAT
    np.testing.assert_allclose(run(after, feeds()[0])[0], run(before, feeds()[0])[0], atol=1e-5)


def test_a_matrix_that_a_caller_may_replace_is_no_constant():
    before, after = model_of(LAYER, MATRIX), model_of(LAYER, MATRIX)
    for model in (before, after):
        model.graph.inputs.append(model.graph.initializers["w"])
    half_precision.convert(ToFp32(), after)
    given = feeds()[0] | {"w": -MATRIX}
    for one in (feeds()[0], given):
        np.testing.assert_allclose(run(after, one)[0], run(before, one)[0], atol=1e-6)


@pytest.mark.parametrize("target", ["cuda-fp16", "cuda-int4", "cpu-fp16"])
def test_a_model_of_float64_is_compressed_as_one_of_float32(target: str, tmp_path: Path):
    source = tmp_path / "model.onnx"
    qgraph.save(model_of(LAYER, MATRIX, opset=17), source)

    artifact = qgraph.compile(source, target, calibration=feeds(), output=tmp_path / "out")

    assert (artifact.path / "model.onnx").stat().st_size < 0.4 * source.stat().st_size
    notes = [note for one in artifact.manifest["passes"] for note in one["notes"]]
    assert "2 nodes of float64 in float32" in notes


def test_a_runtime_without_float64_says_which_inputs_are_at_fault(tmp_path: Path):
    message = (
        r"'x': it is a float64 input of the model, and Core ML has no float64: export the model with float32 there"
    )
    with pytest.raises(UserError, match=message):
        qgraph.compile(model_of(LAYER, MATRIX), "apple-fp16", shapes={"x": (2, 64)}, output=tmp_path / "out")
