"""Weights of 16 bits and magnitudes of great range, end to end: C, TVM, the definitions and ONNX Runtime agree."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parent))
from c_build import Library, needs_gcc
from integer_compilation import assert_reference_agrees, compiled, feeds, graph

GRAPHS = {
    "conv": "(float[1,4,9,9] x, float[6,2,3,3] w, float[6] b) => (float[] y)"
    " { y = Conv<group=2, pads=[1,1,1,1], strides=[2,2]>(x, w, b) }",
    "conv_1d": "(float[1,1,300] x, float[5,1,256] w) => (float[] y) { c = Conv<strides=[8]>(x, w) y = Relu(c) }",
    "gemm": "(float[3,40] x, float[7,40] w, float[7] b) => (float[] y) { y = Gemm<transB=1>(x, w, b) }",
    "matmul_left": "(float[2,5,9] x, float[6,5] w) => (float[] y) { y = MatMul(w, x) }",
    "magnitude": "(float[1,2,64] x, float[10,2,16] w, float[5,1,1] p) => (float[] y)"
    " { c = Conv<strides=[4]>(x, w) k1 = Constant<value_ints=[1,5,2,13]>() r = Reshape(c, k1)"
    " t = Transpose<perm=[0,1,3,2]>(r) m = Mul(t, p) s = Mul(m, m) a = Constant<value_ints=[-1]>()"
    " u = ReduceSum<keepdims=0>(s, a) l = Sqrt(u) q = Sqrt(l) z = Mul(q, q) e = Constant<value_float=1e-4>()"
    " o = Add(z, e) y = Log(o) }",
    "chain": "(float[4,16] x, float[16,16] w, float[16,8] w1) => (float[] y)"
    " { a = MatMul(x, w) r = Relu(a) y = MatMul(r, w1) }",
}
OPTIONS = {
    "half-up": "wide_weights=all",
    "gemmlowp": "wide_weights=all,scales=pow2",
    "half-even": "wide_weights=all,wide=none,activations=int8",
}


def models(rounding: str) -> dict[str, ir.Model]:
    found = {name: compiled(graph(text), OPTIONS[rounding], rounding).integer for name, text in GRAPHS.items()}
    for model in found.values():
        Pipeline.parse("merge-duplicates,remove-unused,infer-shapes").run(model)
    return found


def edges(model: ir.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return inputs as the QuantizeLinear of a model makes them."""
    integers = {}
    for value in model.graph.inputs:
        (node,) = [use.node for use in value.uses()]
        scale, zero = (one.const_value.numpy() for one in node.inputs[1:3])
        codes = np.rint(inputs[value.name] / scale) + zero.astype(np.float32)
        limits = np.iinfo(zero.dtype)
        integers[value.name] = np.clip(codes, limits.min, limits.max).astype(zero.dtype)
    return integers


@needs_gcc
@pytest.mark.parametrize("rounding", OPTIONS)
def test_c(tmp_path: Path, rounding: str):
    made = models(rounding)
    library = Library(made, tmp_path)
    for name, model in made.items():
        for seed in range(3):
            inputs = feeds(model, seed)
            expected, made_by_c = assert_reference_agrees(model, inputs, name), library.run(name, edges(model, inputs))
            for value, found, codes in zip(model.graph.outputs, expected, made_by_c, strict=True):
                scale, zero = (one.const_value.numpy() for one in value.producer().inputs[1:3])
                real = (codes.astype(np.float32) - zero.astype(np.float32)) * scale
                np.testing.assert_array_equal(real, found, err_msg=name)
                assert len(np.unique(found)) > 5


@pytest.mark.parametrize("rounding", OPTIONS)
def test_tvm(tmp_path: Path, rounding: str):
    pytest.importorskip("tvm", reason="Apache TVM is not installed")
    import tvm_build

    for name, model in models(rounding).items():
        (tmp_path / name).mkdir()
        session = tvm_build.compiled(model, tmp_path / name)
        inputs = feeds(model, 5)
        for found, expected in zip(session.run(None, inputs), assert_reference_agrees(model, inputs), strict=True):
            np.testing.assert_array_equal(found, expected, err_msg=name)
