"""What the generated sources are: readable, integer only, fused, the same every time; and what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.codegen.c_source import Footprint, emit_c
from qgraph.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from c_build import GCC, Graph, needs_gcc

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "codegen"
SMALL = """
<ir_version: 10, opset_import: ["" : 21, "qgraph" : 1]>
small (float[1, 2, 4, 4] image) => (float[1, 3] scores)
<
    float image_scale = {0.5}, uint8 image_zero = {128},
    int8[3, 2, 3, 3] weight = {
        1, -2, 3, -4, 5, -6, 7, -8, 9, -10, 11, -12, 13, -14, 15, -16, 17, -18, 1, 2, 3, 4, 5, 6, 7, 8, 9,
        -1, -2, -3, -4, -5, -6, -7, -8, -9, 0, 0, 0, 0, 127, 0, 0, 0, 0, 0, 0, 0, 0, -127, 0, 0, 0, 0
    },
    int32[1, 3, 1, 1] bias = {100, -200, 300},
    int32[3, 1, 1] multiplier = {1073741824, 1503238554, 2147483647}, int32[3, 1, 1] shift = {35, 36, 37},
    uint8 zero = {10}, uint8 low = {10}, uint8 high = {255},
    int64[2] axes = {2, 3}, int32 mean_multiplier = {1073741824}, int32 mean_shift = {34},
    int8 score_zero = {-3}, int8 score_low = {-128}, int8 score_high = {127}, float score_scale = {0.25}
>
{
    pixels = QuantizeLinear (image, image_scale, image_zero)
    sums = ConvInteger <pads = [1, 1, 1, 1]> (pixels, weight, image_zero)
    biased = Add (sums, bias)
    features = qgraph.Requantize <rounding = "half-up"> (biased, multiplier, shift, zero, low, high)
    wide = Cast <to = 6> (features)
    offset = Cast <to = 6> (zero)
    centred = Sub (wide, offset)
    total = ReduceSum <keepdims = 0> (centred, axes)
    mean = qgraph.Requantize <rounding = "half-even"> (
        total, mean_multiplier, mean_shift, score_zero, score_low, score_high)
    scores = DequantizeLinear (mean, score_scale, score_zero)
}
"""


def small() -> ir.Model:
    return ir.from_onnx_text(SMALL)


def emitted(folder: Path, model: ir.Model, name: str = "model") -> tuple[Footprint, str]:
    folder.mkdir(exist_ok=True)
    footprint = emit_c(model, folder, name)
    return footprint, (folder / f"{name}.c").read_text(encoding="utf-8")


def test_golden(tmp_path: Path):
    emitted(tmp_path, small(), "small")
    for file in ("small.c", "small.h", "small_weights.h"):
        assert (tmp_path / file).read_text(encoding="utf-8") == (GOLDEN / file).read_text(encoding="utf-8"), file


def test_the_same_model_gives_the_same_bytes(tmp_path: Path):
    for folder in ("a", "b"):
        emitted(tmp_path / folder, small())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_footprint(tmp_path: Path):
    footprint, _ = emitted(tmp_path, small())
    image, scores = footprint.inputs[0], footprint.outputs[0]
    assert (image.source, image.shape, image.dtype, image.scale, image.zero_point) == (
        *("image", (1, 2, 4, 4), np.uint8, 0.5, 128),
    )
    assert (scores.source, scores.shape, scores.dtype, scores.scale, scores.zero_point) == (
        *("scores", (1, 3), np.int8, 0.25, -3),
    )
    # 54 weights, 3 biases of 16 bits, 3 multipliers of 32, 3 shifts of 8.
    assert footprint.flash == 54 + 6 + 12 + 3
    assert footprint.ram == 48  # the features of 8 bits: no accumulator lies in memory
    assert footprint.kernels == 2


def test_nothing_computes_in_float(tmp_path: Path):
    emitted(tmp_path, small())
    for path in tmp_path.glob("model*"):
        assert not re.search(r"\b(float|double|math\.h|malloc)\b", path.read_text(encoding="utf-8"))


@needs_gcc
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_example_runs(tmp_path: Path):
    emitted(tmp_path, small())
    run = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    subprocess.run(["make", f"CC={GCC}"], **run)
    zeros = subprocess.run(["./example"], **run).stdout
    assert re.fullmatch(r"checksum of the outputs for zeros: [0-9a-f]{8}\n", zeros)
    (tmp_path / "in").write_bytes(bytes(range(32)))
    subprocess.run(["./example", "in", "out"], **run)
    assert len((tmp_path / "out").read_bytes()) == 3
    short = subprocess.run(["./example", "Makefile.missing", "out"], cwd=tmp_path, capture_output=True, check=False)
    assert short.returncode == 2


# --- fusion ----------------------------------------------------------------------------------------------------------


def requantized(graph: Graph, x: ir.Value, kind: str = "uint8") -> ir.Value:
    limits = np.iinfo(kind)
    scalars = [np.array(number, kind) for number in (3, limits.min, limits.max)]
    fixed = np.array(1 << 30, np.int32), np.array(35, np.int32)
    return graph.op("Requantize", x, *fixed, *scalars, domain="qgraph", rounding="half-up")


def residual() -> Graph:
    """Return two convolutions and the sum around the second, as residual networks have it."""
    graph = Graph(x=np.zeros((1, 4, 6, 6), np.uint8))
    zero, weight = np.array(3, np.uint8), np.ones((4, 4, 3, 3), np.int8)
    first = requantized(graph, graph.op("ConvInteger", "x", weight, zero, pads=[1, 1, 1, 1]))
    second = requantized(graph, graph.op("ConvInteger", first, weight, zero, pads=[1, 1, 1, 1]))
    terms = [graph.op("Cast", one, to=ir.DataType.INT32) for one in (first, second)]
    return graph.gives(requantized(graph, graph.op("Add", *terms)))


def test_a_residual_block_is_two_kernels(tmp_path: Path):
    footprint, text = emitted(tmp_path, residual().model)
    assert footprint.kernels == 2
    # The features in between and the patches, and no accumulator.
    assert footprint.ram == 144 + 16 * 36 * 2
    assert "int32_t *" not in text


def test_sums_in_32_bits_lie_in_memory_nowhere(tmp_path: Path):
    graph = Graph(x=np.zeros((1, 4, 6, 6), np.uint8))
    zero, weight = np.array(3, np.uint8), np.ones((4, 4, 3, 3), np.int8)
    one, other = (requantized(graph, graph.op("ConvInteger", "x", weight, zero)) for _ in range(2))
    together = graph.op("Concat", one, graph.op("Transpose", other, perm=[0, 1, 3, 2]), axis=1)
    graph.gives(graph.op("Min", together, graph.op("Concat", other, one, axis=1)))
    _, text = emitted(tmp_path, graph.model)
    assert "int32_t *" not in text
    terms = [graph.op("Cast", requantized(graph, graph.op("ConvInteger", "x", weight, zero)), to=6) for _ in range(2)]
    graph.gives(requantized(graph, graph.op("Add", *terms)))
    _, text = emitted(tmp_path, graph.model)
    assert "int32_t *" not in text


def test_what_several_nodes_read_lies_in_memory(tmp_path: Path):
    graph = Graph(x=np.zeros((10, 10), np.int32), y=np.zeros((10, 10), np.int32))
    product = graph.op("Mul", "x", "y")
    a, b = graph.op("Abs", product), graph.op("Neg", product)
    graph.gives(graph.op("Max", a, graph.op("Transpose", b, perm=[1, 0])))
    footprint, _ = emitted(tmp_path, graph.model)
    assert (footprint.kernels, footprint.ram) == (2, 400)


def test_an_elementwise_kernel_may_write_where_it_reads(tmp_path: Path):
    graph = Graph(x=np.zeros((10, 10), np.int8))
    turned = graph.op("Transpose", "x", perm=[1, 0])
    flat = graph.op("Reshape", turned, np.array([100]))
    larger = graph.op("Reshape", graph.op("Max", flat, np.array(3, np.int8)), np.array([4, 25]))
    graph.gives(graph.op("Transpose", larger, perm=[1, 0]))
    footprint, text = emitted(tmp_path, graph.model)
    assert (footprint.kernels, footprint.ram) == (3, 112)
    assert "max_0(const int8_t *x0, int8_t *y)" in text


def test_the_whole_row_is_softmaxs_only_memory(tmp_path: Path):
    graph = Graph(x=np.zeros((2, 5, 40), np.uint8))
    wide = graph.op("Sub", graph.op("Cast", "x", to=ir.DataType.INT32), np.array(3, np.int32))
    table = np.arange(64, -1, -1, dtype=np.int32) << 9
    scores = graph.op("Softmax", wide, table, np.array(9, np.int32), np.array(255, np.int32), domain="qgraph")
    graph.gives(requantized(graph, scores))
    footprint, _ = emitted(tmp_path, graph.model)
    assert (footprint.kernels, footprint.ram) == (1, 160)


# --- bad input -------------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, text: str, name: str = "model") -> str:
    with pytest.raises(UserError) as caught:
        emit_c(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21, "qgraph" : 1]> {text}'), tmp_path, name)
    message = str(caught.value)
    assert "\n" not in message
    assert not list(tmp_path.iterdir())
    return message


def test_a_dynamic_input_is_refused_with_the_flag(tmp_path: Path):
    message = refusal(tmp_path, "g (int8[N, 3, 8] x) => (int8[N, 3, 8] y) { y = Identity (x) }")
    assert "'x'" in message
    assert "--shape x=1,3,8" in message


def test_an_operator_without_integer_code_is_named(tmp_path: Path):
    message = refusal(tmp_path, "g (int32[3] x) => (int32[3] y) { y = Mod (x, x) }")
    assert message == "node 'Mod->y' (Mod) cannot be written as integer code: there is no integer code for it"


def test_a_boundary_is_named_with_its_reason(tmp_path: Path):
    text = """g (int8[3] x, float s, int8 z) => (float[3] y) <float s = {0.5}, int8 z = {0}>
        { a = DequantizeLinear (x, s, z) b = Sin (a) c = QuantizeLinear (b, s, z) y = DequantizeLinear (c, s, z) }"""
    text = text.replace(", float s, int8 z)", ")")
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or node.outputs[0].name != "y":
            node.metadata_props["qgraph.boundary"] = "a sine of 16 bits"
    with pytest.raises(UserError, match=r"node 'QuantizeLinear->c'.*boundary.*a sine of 16 bits"):
        emit_c(model, tmp_path)


def test_float_inputs_must_be_quantized(tmp_path: Path):
    message = refusal(tmp_path, "g (float[3] x) => (float[3] y) { y = Abs (x) }")
    assert "node 'Abs->y' (Abs)" in message
    assert "the float input 'x'" in message


def test_sizes_that_depend_on_data_are_refused(tmp_path: Path):
    message = refusal(tmp_path, "g (int8[6] x, int64[2] s) => (int8[A, B] y) { y = Reshape (x, s) }")
    assert "node 'Reshape->y' (Reshape)" in message
    assert "not known" in message


def test_a_name_must_be_an_identifier(tmp_path: Path):
    assert "'2x'" in refusal(tmp_path, "g (int8[6] x) => (int8[6] y) { y = Identity (x) }", "2x")
