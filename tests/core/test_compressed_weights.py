"""Compressed weights in the graph: standard ONNX that runs, and that gives back what was put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.analysis.compressed_weights import compressed, format_scheme, parse_scheme
from qgraph.analysis.linear_layers import linear_layers
from qgraph.analysis.weight_storage import store
from qgraph.errors import UserError
from qgraph.numerics.weights import WeightScheme, quantize_weight
from qgraph.runtime.session import open_session

BODIES = {
    "matmul": "({dtype}[s,K] x) => ({dtype}[s,N] y) <{dtype}[1] W = {{0}}> {{ y = MatMul(x, W) }}",
    "gemm": "({dtype}[s,K] x) => ({dtype}[s,N] y) <{dtype}[1] W = {{0}}> {{ y = Gemm<transB=1>(x, W) }}",
    "tied": "(int64[s] x) => ({dtype}[s,N] y) <{dtype}[1] W = {{0}}>"
    " {{ e = Gather(W, x) t = Transpose<perm=[1,0]>(W) y = MatMul(e, t) }}",
}
INTEGERS = [
    parse_scheme(t)
    for t in ["int2g32a", "int2g0a", "int3g16s", "int4g32a", "int4g0s", "int5g64a", "int6g32s", "int8g0a"]
]
BOOKS = [WeightScheme(name) for name in ("nf4", "fp8e4m3", "fp8e5m2", "mxfp4", "nvfp4", "ternary")]
N = 48


def model_of(kind: str, inputs: int = 100, *, dtype: str = "float", opset: int = 21) -> ir.Model:
    body = BODIES[kind].format(dtype=dtype).replace("[s,K]", f"[s,{inputs}]").replace("[s,N]", f"[s,{N}]")
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]> g {body}')
    weight = model.graph.initializers["W"]
    shape = (inputs, N) if kind == "matmul" else (N, inputs)
    values = np.random.default_rng(0).standard_normal(shape)
    weight.const_value = ir.tensor(values.astype(np.float16 if dtype == "float16" else np.float32), name="W")
    weight.shape, weight.type = ir.Shape(shape), ir.TensorType(weight.const_value.dtype)
    return model


def feed_of(kind: str, inputs: int, dtype: str = "float") -> np.ndarray:
    random = np.random.default_rng(1)
    if kind == "tied":
        return random.integers(0, N, 7)
    return random.standard_normal((7, inputs)).astype(np.float16 if dtype == "float16" else np.float32)


@pytest.mark.parametrize("scheme", INTEGERS + BOOKS, ids=format_scheme)
@pytest.mark.parametrize(("kind", "inputs", "opset"), [("matmul", 100, 21), ("gemm", 128, 25), ("tied", 100, 25)])
def test_a_weight_runs_and_comes_back(scheme: WeightScheme, kind: str, inputs: int, opset: int, tmp_path: Path):
    model = model_of(kind, inputs, opset=opset)
    layer = linear_layers(model).layers[0]
    quantized = quantize_weight(layer.matrix(), scheme)
    store(model, layer, scheme, lambda: quantized)
    assert qgraph.ir.check(model) is None
    assert next(compressed(model)).quantized() is quantized

    path = tmp_path / "model.onnx"
    qgraph.ir.save(model, path)
    (found,) = compressed(qgraph.ir.load(path))
    assert (found.name, found.scheme, found.outputs, found.inputs) == ("W", scheme, N, inputs)
    assert len(found.readers) == (2 if kind == "tied" else 1)
    back = found.quantized()
    np.testing.assert_array_equal(back.codes, quantized.codes)
    np.testing.assert_allclose(back.scale, quantized.scale, rtol=1e-6)
    if quantized.zero_point is not None:
        np.testing.assert_array_equal(back.zero_point, quantized.zero_point)

    x = feed_of(kind, inputs)
    (y,) = open_session(path, optimise=False).run(None, {"x": x})
    weights = quantized.dequantize()
    expected = (weights[x] if kind == "tied" else x) @ weights.T
    # The standard form keeps nf4 on a grid of 1/127 only.
    np.testing.assert_allclose(y, expected, atol=(1e-2 if scheme.format == "nf4" else 1e-5) * np.abs(expected).max())


@pytest.mark.parametrize("kind", BODIES)
def test_half_precision_keeps_its_type(kind: str, tmp_path: Path):
    model = model_of(kind, dtype="float16")
    layer = linear_layers(model).layers[0]
    quantized = quantize_weight(layer.matrix(), WeightScheme())
    store(model, layer, WeightScheme(), lambda: quantized)
    qgraph.ir.save(model, tmp_path / "model.onnx")
    x = feed_of(kind, 100, "float16")
    (y,) = open_session(tmp_path / "model.onnx", optimise=False).run(None, {"x": x})
    weights = quantized.dequantize()
    expected = (weights[x] if kind == "tied" else x.astype(np.float32)) @ weights.T
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, expected, atol=4e-3 * np.abs(expected).max())


@pytest.mark.parametrize("kind", BODIES)
def test_an_input_scale_is_undone_in_front_of_every_reader(kind: str, tmp_path: Path):
    model = model_of(kind)
    layer = linear_layers(model).layers[0]
    matrix = layer.matrix()
    scale = np.random.default_rng(2).uniform(0.5, 2.0, 100).astype(np.float32)
    quantized = quantize_weight(matrix / scale, WeightScheme("int", 8, 16))
    store(model, layer, WeightScheme("int", 8, 16), lambda: quantized, input_scale=scale)
    assert qgraph.ir.check(model) is None
    qgraph.ir.save(model, tmp_path / "model.onnx")
    x = feed_of(kind, 100)
    (y,) = open_session(tmp_path / "model.onnx", optimise=False).run(None, {"x": x})
    expected = (matrix[x] if kind == "tied" else x) @ matrix.T
    np.testing.assert_allclose(y, expected, atol=2e-2 * np.abs(expected).max())


def test_bytes_and_bits_of_information(tmp_path: Path):
    model = model_of("matmul", 128)
    layer = linear_layers(model).layers[0]
    scheme = WeightScheme("int", 3, 32)
    quantized = quantize_weight(layer.matrix(), scheme)
    store(model, layer, scheme, lambda: quantized)
    (found,) = compressed(model)
    assert found.bytes == N * 128 // 2 + N * 4 * 4 + N * 4 // 2
    assert found.information_bits == N * 128 * scheme.bits_per_weight(128)


def test_schemes_as_text():
    for scheme in [*INTEGERS, *BOOKS]:
        assert parse_scheme(format_scheme(scheme)) == scheme
    for text in ("int4g32", "int9g32a", "nf4", "fp4g32", ""):
        with pytest.raises(UserError, match="no scheme of weights"):
            parse_scheme(text)


def test_an_old_opset_is_refused():
    model = model_of("matmul", opset=17)
    layer = linear_layers(model).layers[0]
    with pytest.raises(UserError, match=r"need opset 21.*convert-opset"):
        store(model, layer, WeightScheme(), lambda: quantize_weight(layer.matrix(), WeightScheme()))
