"""matmul-nbits against golden text, the numbers that the codes stand for, and the kernels that ONNX Runtime has."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from golden_rewrites import is_file

import qgraph.ir
from qgraph import capabilities
from qgraph.analysis.compressed_weights import compressed, parse_scheme
from qgraph.analysis.linear_layers import linear_layers
from qgraph.analysis.weight_storage import store
from qgraph.numerics.packing import to_container
from qgraph.numerics.weights import QuantizedWeight, quantize_weight
from qgraph.passes.matmul_nbits import MatmulNbits
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.session import open_session
from qgraph.targets.cuda import CudaInt4

GOLDEN = Path(__file__).resolve().parent.parent / "golden/matmul-nbits/every_kind.onnxtxt"
N = 48
MODELS = {
    "matmul": "(float[s,K] x) => (float[s,N] y) <float[1] W = {0}> { y = MatMul(x, W) }",
    "gemm": "(float[s,K] x) => (float[s,N] y) <float[1] W = {0}> { y = Gemm<transB=1>(x, W) }",
    "turned": "(float[s,K] x) => (float[s,N] y) <float[1] W = {0}> { t = Transpose(W) y = MatMul(x, t) }",
    "embedding": "(int64[s] x) => (float[s,K] y) <float[1] W = {0}> { y = Gather(W, x) }",
    "tied": "(int64[s] x) => (float[s,N] y) <float[1] W = {0}> { e = Gather(W, x) t = Transpose(W) y = MatMul(e, t) }",
}


def model_of(text: str, inputs: int, *, half: bool = False) -> ir.Model:
    """Return a model whose weight W has random values; K and N in the text are its sizes."""
    text = text.replace(",K]", f",{inputs}]").replace(",N]", f",{N}]")
    if half:
        text = text.replace("float[", "float16[")
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    weight = model.graph.initializers["W"]
    shape = (inputs, N) if "MatMul(x, W)" in text else (N, inputs)
    values = np.random.default_rng(0).standard_normal(shape)
    weight.const_value = ir.tensor(values.astype(np.float16 if half else np.float32), name="W")
    weight.shape, weight.type = ir.Shape(shape), ir.TensorType(weight.const_value.dtype)
    return model


def compress(model: ir.Model, scheme: str) -> QuantizedWeight:
    layer = linear_layers(model).layers[0]
    quantized = quantize_weight(layer.matrix(), parse_scheme(scheme), method="minmax")
    store(model, layer, quantized.scheme, lambda: quantized)
    return quantized


def lower(model: ir.Model, **options) -> Report:
    return Pipeline([MatmulNbits(**options)]).run(model).parts[0]


def run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, Counter[str]]:
    """Return the first output, and what is left after ONNX Runtime's optimisation."""
    path = folder / "model.onnx"
    qgraph.ir.save(model, path)
    session = open_session(path, optimised_path=folder / "optimised.onnx", threads=1)
    kernels = Counter(node.op_type for node in qgraph.ir.load(folder / "optimised.onnx").graph)
    return session.run(None, feeds)[0], kernels


def check(model: ir.Model, weights: np.ndarray, folder: Path, tolerance: float) -> Counter[str]:
    random = np.random.default_rng(1)
    tied, looked_up = "tied" in model.graph.meta, model.graph.inputs[0].dtype == ir.DataType.INT64
    x = random.integers(0, N, 7) if looked_up else random.standard_normal((7, weights.shape[1])).astype(np.float32)
    if model.graph.inputs[0].dtype == ir.DataType.FLOAT16:
        x = x.astype(np.float16)
    expected = weights[x] if looked_up else x.astype(np.float32) @ weights.T
    expected = expected @ weights.T if tied else expected
    y, kernels = run(model, folder, {"x": x})
    np.testing.assert_allclose(y, expected, atol=tolerance * np.abs(expected).max())
    return kernels


SCHEMES = [
    "int2g16a",
    "int2g64s",
    "int2g256a",
    "int2g0a",
    "int3g32s",
    "int3g128a",
    "int4g32a",
    "int4g16s",
    "int4g48a",
    "int4g0s",
    "int5g32a",
    "int6g64s",
    "int8g32a",
    "int8g512s",
    "mxfp4g32",
    "nvfp4g16",
    "ternaryg64",
    "ternaryg0",
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("kind", "inputs"), [("matmul", 192), ("gemm", 100), ("turned", 192), ("tied", 192)])
def test_what_the_codes_stand_for_is_what_runs(kind: str, inputs: int, scheme: str, tmp_path: Path):
    for level, tolerance in ((0, 2e-6), (4, 2e-2)):
        model = model_of(MODELS[kind], inputs)
        model.graph.meta.update({kind: True})
        quantized = compress(model, scheme)
        report = lower(model, accuracy_level=level)
        assert not report.skipped
        kernels = check(model, quantized.dequantize(), tmp_path, tolerance)
        expected = {"MatMulNBits": 1, "GatherBlockQuantized": 1} if kind == "tied" else {"MatMulNBits": 1}
        assert kernels == expected
        assert len(list(compressed(model))) == 1
        assert lower(model).changed == 0


@pytest.mark.parametrize("scheme", ["int4g32a", "int8g0s", "int3g32a"])
@pytest.mark.parametrize("kind", MODELS)
def test_half_precision_has_the_same_kernels(kind: str, scheme: str, tmp_path: Path):
    model = model_of(MODELS[kind], 128, half=True)
    model.graph.meta.update({kind: True})
    quantized = compress(model, scheme)
    lower(model)
    kernels = check(model, quantized.dequantize(), tmp_path, 2e-2)
    assert set(kernels) <= {"MatMulNBits", "GatherBlockQuantized"}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_two_bits_never_have_a_block_without_kernel(bits: int):
    for group in (16, 32, 64, 128, 256, 0):
        model = model_of(MODELS["matmul"], 512)
        compress(model, f"int{bits}g{group}a")
        lower(model)
        (node,) = model.graph
        found = node.attributes.get_int("bits", 0), node.attributes.get_int("block_size", 0)
        assert found[0] >= bits
        assert found[0] != 2 or found[1] in (32, 64, 128)


def test_a_tied_weight_is_stored_once(tmp_path: Path):
    model = model_of(MODELS["tied"], 128)
    compress(model, "int4g32a")
    lower(model)
    qgraph.ir.save(model, tmp_path / "model.onnx")
    (weight,) = compressed(qgraph.ir.load(tmp_path / "model.onnx"))
    assert [reader.op_type for reader in weight.readers] == ["GatherBlockQuantized", "MatMulNBits"]
    assert weight.bytes == N * 128 // 2 + N * 4 * 4 + N * 2
    shape = 3 * 8  # of the Reshape
    assert qgraph.ir.weight_bytes(qgraph.ir.load(tmp_path / "model.onnx")) == weight.bytes + shape


@pytest.mark.parametrize(("scheme", "form"), [("int4g32a", (4, 16)), ("int4g32s", (4, 32)), ("int4g128a", (4, 32))])
def test_tables_have_no_gaps_between_the_zero_points_of_their_rows(scheme: str, form: tuple[int, int]):
    inputs = 128 + 64 if scheme == "int4g128a" else 96
    model = model_of(MODELS["tied"], inputs)
    compress(model, scheme)
    lower(model)
    (node,) = [node for node in model.graph if node.op_type == "GatherBlockQuantized"]
    assert (node.attributes.get_int("bits", 0), node.attributes.get_int("block_size", 0)) == form
    assert CudaInt4().check(model) == []


def test_nf4_runs_exactly_or_fast(tmp_path: Path):
    for option, operator, tolerance in (("exact", "MatMulBnb4", 2e-6), ("int8", "MatMulNBits", 1e-2)):
        model = model_of(MODELS["gemm"], 128)
        quantized = compress(model, "nf4g32")
        lower(model, nf4=option)
        assert check(model, quantized.dequantize(), tmp_path, tolerance) == {operator: 1}


def test_tied_nf4_is_one_weight_in_eight_bits(tmp_path: Path):
    model = model_of(MODELS["tied"], 128)
    model.graph.meta["tied"] = True
    quantized = compress(model, "nf4g32")
    lower(model, accuracy_level=0)
    kernels = check(model, to_container(quantized).dequantize(), tmp_path, 2e-6)
    assert kernels == {"GatherBlockQuantized": 1, "MatMulNBits": 1}


BIASED = {
    "add behind": "{ p = MatMul(x, W) y = Add(b, p) }",
    "gemm": "{ y = Gemm<transB=1>(x, W, b) }",
    "gemm with beta": "{ y = Gemm<transB=1, beta=3.0>(x, W, b) }",
    "gemm with rows": "{ y = Gemm<transB=1>(x, W, r) }",
}


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("kind", BIASED)
def test_a_bias_is_added(kind: str, level: int, tmp_path: Path):
    head = "(float[7,K] x, float[7,N] r) => (float[7,N] y) <float[1] W = {0}, float[1] b = {0}> "
    model = model_of(head + BIASED[kind], 64)
    random = np.random.default_rng(2)
    bias, rows = random.standard_normal(N).astype(np.float32), random.standard_normal((7, N)).astype(np.float32)
    value = model.graph.initializers["b"]
    value.const_value, value.shape = ir.tensor(bias, name="b"), ir.Shape([N])
    quantized = compress(model, "int4g32a")
    assert not lower(model, accuracy_level=level).skipped
    x = random.standard_normal((7, 64)).astype(np.float32)
    y, kernels = run(model, tmp_path, {"x": x, "r": rows})
    added = {"gemm with rows": rows, "gemm with beta": 3 * bias}.get(kind, bias)
    expected = x @ quantized.dequantize().T + added
    np.testing.assert_allclose(y, expected, atol=(2e-6 if level == 0 else 2e-2) * np.abs(expected).max())
    assert kernels["MatMulNBits"] == 1
    if kind in ("add behind", "gemm"):
        assert kernels == {"MatMulNBits": 1}


def test_levels_by_name():
    model = model_of("(float[s,K] x) => (float[s,N] y) <float[1] W = {0}> { [head] y = MatMul(x, W) }", 64)
    compress(model, "int4g32a")
    lower(model, exact=("he*",))
    assert next(iter(model.graph)).attributes.get_int("accuracy_level", -1) == 0


LEFT_ALONE = {
    "no kernel for fp8e4m3": (MODELS["matmul"], "fp8e4m3g32"),
    "not a multiple of 16": (MODELS["matmul"], "int4g24a"),
    "factor alpha": (MODELS["gemm"].replace("transB=1", "transB=1, alpha=2.0"), "int4g32a"),
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_left_alone_with_a_reason(reason: str, tmp_path: Path):
    text, scheme = LEFT_ALONE[reason]
    model = model_of(text, 128)
    quantized = compress(model, scheme)
    report = lower(model)
    assert report.changed == 0
    assert [reason in one.reason for one in report.skipped] == [True]
    factor = 2 if "alpha" in reason else 1
    check(model, factor * quantized.dequantize(), tmp_path, 2e-6)


def test_what_a_table_has_no_kernel_for_keeps_its_weight(monkeypatch: pytest.MonkeyPatch):
    def skipped(kind: str, table: str) -> list[str]:
        model = model_of(MODELS[kind], 128)
        compress(model, "int4g32a")
        return [one.reason for one in lower(model, table=table).skipped]

    assert skipped("matmul", "onnxruntime-cpu") == skipped("tied", "onnxruntime-cpu") == []
    table = capabilities.table("onnxruntime-cpu")
    without = dataclasses.replace(table, operators={"com.microsoft.MatMulNBits": table.operators["Conv"]})
    monkeypatch.setattr("qgraph.capabilities.table", lambda name: without)
    assert skipped("matmul", "") == []
    (told,) = skipped("matmul", "onnxruntime-cpu")
    assert told.startswith("there is no kernel for it: com.microsoft.MatMulNBits: input 1 is uint8, and ONNX Runtime's")
    assert any("has no com.microsoft.GatherBlockQuantized" in one for one in skipped("tied", "onnxruntime-cpu"))


def test_weights_of_a_file_are_lowered_like_new_ones(tmp_path: Path):
    results = []
    for reload in (False, True):
        model = model_of(MODELS["tied"], 96)
        compress(model, "int3g32s")
        if reload:
            qgraph.ir.save(model, tmp_path / "standard.onnx")
            model = qgraph.ir.load(tmp_path / "standard.onnx")
        lower(model)
        qgraph.ir.save(model, tmp_path / "model.onnx")
        results.append((tmp_path / "model.onnx").read_bytes())
    assert results[0] == results[1]


FOREIGN = [
    ("uint4", 32, True), ("uint4", 32, False), ("int4", 32, False), ("int4", 32, True), ("int4", 0, False),
    ("uint8", 16, True), ("int8", 64, True),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "block", "zero_points"), FOREIGN)
@pytest.mark.parametrize("flipped", [False, True])
def test_what_others_have_stored_is_taken_as_well(
    dtype: str, block: int, zero_points: bool, flipped: bool, tmp_path: Path
):
    random = np.random.default_rng(3)
    bits, signed = int(dtype[-1]), dtype.startswith("i")
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    groups = 128 // block if block else 1
    values, zeros = random.integers(low, high, (N, 128)), random.integers(low, high, (N, groups))
    scale = random.uniform(0.01, 0.02, (N, groups)).astype(np.float32)
    spread = np.repeat(zeros, 128 // groups, axis=1) if zero_points else 0
    weights = (values - spread) * np.repeat(scale, 128 // groups, axis=1)

    def stored(array: np.ndarray) -> np.ndarray:
        array = array[:, 0] if array.shape[1] == 1 and not block else array
        return array if flipped or array.ndim == 1 else array.T

    third = ", z" if zero_points else ""
    axis = f"axis = {1 if flipped else 0}, block_size = {block}" if block else f"axis = {0 if flipped else 1}"
    product = "Gemm<transB = 1>(x, w)" if flipped else "MatMul(x, w)"
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[s,128] x) => (float[s,{N}] y) '
        "<float[1] q = {0}, float[1] s0 = {0}, float[1] z = {0}> "
        f"{{ w = DequantizeLinear<{axis}>(q, s0{third}) y = {product} }}"
    )
    integers = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}.get(dtype, np.dtype(dtype))
    arrays = {"q": stored(values).astype(integers), "s0": stored(scale), "z": stored(zeros).astype(integers)}
    for name, array in arrays.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
    assert not lower(model, accuracy_level=0).skipped
    assert check(model, weights.astype(np.float32), tmp_path, 2e-6) == {"MatMulNBits": 1}


def test_rows_of_eight_bits_belong_to_quantized_activations():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[s,2] x) => (float[s,2] y) '
        "<int8[2,2] q = {1, 2, 3, 4}, float[2] s0 = {0.5, 0.25}> "
        "{ w = DequantizeLinear<axis = 1>(q, s0) y = MatMul(x, w) }"
    )
    assert list(compressed(model)) == []
    assert lower(model).changed == 0


def test_golden():
    model = ir.from_onnx_text("""
<ir_version: 10, opset_import: ["" : 21]>
kinds (int64[s] ids) => (float[s,2] y, float[s,2] z)
<float[4,16] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, -1, -2, -3, -4, -5, -6, -7, -8, -9, -10,
                      -11, -12, -13, -14, -15, 0, 15, 0, 15, 0, 15, 0, 15, 0, 15, 0, 15, 0, 15, 0, 15, 15, 0, 0, 0, 0,
                      0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 15},
 float[4,2] w = {0, 1, 2, 3, -4, -5, 6, 7}, float[2] b = {1, 2}, float[2,4] v = {7, 5, 3, 1, -1, -3, -5, 7}>
{
    words = Gather (table, ids)
    turned = Transpose (table)
    scores = MatMul (words, turned)
    [first] product = MatMul (scores, w)
    y = Add (product, b)
    [second] z = Gemm <transB = 1> (scores, v, b)
}
""")
    schemes = {"table": "int4g16a", "w": "int3g16s", "v": "int3g16s"}
    for layer in {layer.weight: layer for layer in linear_layers(model).layers}.values():
        quantized = quantize_weight(layer.matrix(), parse_scheme(schemes[layer.weight.name]), method="minmax")
        store(model, layer, quantized.scheme, lambda quantized=quantized: quantized)
    before = ir.to_onnx_text(model)
    assert not lower(model).skipped
    is_file(GOLDEN, f"{before.rstrip()}\n---\n{ir.to_onnx_text(model).rstrip()}\n")


@pytest.mark.parametrize("kind", ["embedding", "tied"])
@pytest.mark.parametrize("scheme", ["int2g32a", "int2g0a", "nf4g32"])
def test_tables_that_a_gpu_could_not_look_up_take_more_bits(kind: str, scheme: str, tmp_path: Path):
    model = model_of(MODELS[kind], 64)
    model.graph.meta.update({kind: True})
    weights = compress(model, scheme).dequantize()
    Pipeline(one for one in CudaInt4().lower_passes() if one.name == "matmul-nbits").run(model)
    assert CudaInt4().check(model) == []
    assert "DequantizeLinear" not in check(model, weights, tmp_path, 2e-2)


def test_a_table_that_no_width_fits_is_dequantized_for_a_gpu(tmp_path: Path):
    model = model_of(MODELS["embedding"], 100)
    model.graph.meta.update({"embedding": True})
    weights = compress(model, "int4g32a").dequantize()
    report = Pipeline(one for one in CudaInt4().lower_passes() if one.name == "matmul-nbits").run(model).parts[0]
    assert "as CUDA reads them" in report.skipped[0].reason
    assert CudaInt4().check(model) == []
    check(model, weights, tmp_path, 2e-6)
