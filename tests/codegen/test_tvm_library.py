"""The library that TVM makes of an integer graph: its edges, its bytes, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.codegen import tvm_library, tvm_lowering
from qgraph.codegen.tvm_library import TvmSession
from qgraph.errors import UserError

pytest.importorskip("tvm", reason="Apache TVM is not installed")

sys.path.insert(0, str(Path(__file__).parent))

from tvm_build import compiled, in_onnxruntime, layer, parsed


def test_floats_at_the_edges_are_quantized_as_onnx_says(tmp_path: Path):
    model = layer()
    session = compiled(model, tmp_path)
    random = np.random.default_rng(0)
    feeds = {name: random.normal(0, 40, (1, 3, 8, 8)).astype(np.float32) for name in ("x", "beside")}
    feeds["x"].flat[:6] = [0.25, 0.75, 1e9, -1e9, -0.25, 126.25]  # ties, and what saturates
    expected = in_onnxruntime(model, feeds)
    for found, right in zip(session.run(None, feeds), expected, strict=True):
        np.testing.assert_array_equal(found, right)
        assert len(np.unique(found)) > 10
    (again,) = session.run(["again"], feeds)
    np.testing.assert_array_equal(again, expected[1])
    x, beside = session.signature.inputs
    inside = session.run_quantized({"q": x.quantize(feeds["x"]), "p": beside.quantize(feeds["beside"])})
    assert {name: str(one.dtype) for name, one in inside.items()} == {"r": "uint8", "t": "int8", "m": "int32"}
    np.testing.assert_array_equal((inside["r"].astype(np.float32) - 3) * np.float32(0.25), expected[0])
    with pytest.raises(UserError, match=r"input 'beside' is not fed \(given: x\)"):
        session.run(None, {"x": feeds["x"]})
    with pytest.raises(UserError, match=r"input 'x' is float64\[1, 3, 8, 8\], but .* float32\[1, 3, 8, 8\]"):
        session.run(None, {**feeds, "x": feeds["x"].astype(np.float64)})
    with pytest.raises(UserError, match="there is no output 'z'"):
        session.run(["z"], feeds)
    with pytest.raises(UserError, match="tensor 'p' is not fed"):
        session.run_quantized({"q": x.quantize(feeds["x"])})


def test_compiling_twice_gives_the_same_bytes(tmp_path: Path):
    files = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        tvm_library.emit_so(layer(), tmp_path / name)
        files.append([(tmp_path / name / file).read_bytes() for file in ("model.so", "signature.json")])
    assert files[0] == files[1]


def test_a_library_may_replace_one_that_is_open(tmp_path: Path):
    sessions = []
    for op in ("Neg", "Abs"):
        text = f'<ir_version: 10, opset_import: ["" : 21]> g (int32[3] x) => (int32[3] y) {{ y = {op} (x) }}'
        sessions.append(compiled(ir.from_onnx_text(text), tmp_path))
    x = np.array([1, 2, -3], np.int32)
    assert [session.run(None, {"x": x})[0].tolist() for session in sessions] == [[-1, -2, 3], [1, 2, 3]]


def test_what_cannot_be_compiled_is_refused(tmp_path: Path):
    def refused(text: str, match: str) -> None:
        with pytest.raises(UserError, match=match):
            tvm_lowering.build_module(
                ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21, "qgraph" : 1]> ' + text)
            )

    refused("g (int32[N,3] x) => (int32[N,3] y) { y = Neg (x) }", r"input 'x' has shape \[N,3\].* --shape x=1,3")
    refused(
        "g (int32[2] x) => (int32[2] y) { [odd] y = BitwiseNot (x) }",
        "node 'odd' .BitwiseNot.: there is no integer code",
    )
    refused("g (float[2] x) => (float[2] y) { [soft] y = Relu (x) }", "node 'soft' .Relu.: its input 'x' is in float")
    refused("g (float[2] x) => (float[2] y) { y = Identity (x) }", "its input 'x' is in float")
    refused(
        "g (int32[4] x, int64[2] s) => (int32[2,2] y) { [r] y = Reshape (x, s) }",
        "node 'r' .*'s' depends on the model's inputs",
    )
    refused(
        "g (int8[2] x) => (int8[2] y) <float s = {1}, int8 z = {0}> "
        "{ [d] a = DequantizeLinear (x, s, z) y = QuantizeLinear (a, s, z) }",
        "node 'd' .DequantizeLinear.",
    )
    refused(
        "g (int32[2] x) => (int8[2] y) <int32 m = {1}, int8 z = {0}> "
        "{ y = qgraph.Requantize <rounding = 'up'> (x, m, m, z, z, z) }".replace("'", '"'),
        "there is no rounding 'up'",
    )
    boundary = parsed(
        "<ir_version: 10, opset_import: ['' : 21]> g (int8[2] x) => (int8[2] y) { y = Neg (x) }".replace("'", '"')
    )
    next(iter(boundary.graph)).metadata_props["qgraph.boundary"] = "it has no integer form"
    with pytest.raises(UserError, match="a boundary, in float because it has no integer form"):
        tvm_lowering.build_module(boundary)
    with pytest.raises(UserError, match="TVM knows no target"):
        tvm_library.emit_so(layer(), tmp_path, target="abacus")
    with pytest.raises(UserError, match="is of kind 'c', but libraries are made for CPUs"):
        tvm_library.emit_so(layer(), tmp_path, target={"kind": "c"})
    with pytest.raises(UserError, match=r"signature.json is no signature"):
        TvmSession(tmp_path)
