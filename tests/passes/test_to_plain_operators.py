"""`to-plain-operators`: every rewriting against ONNX Runtime's own operator, and what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.numerics.packing import pack_bits
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.session import open_session

RANDOM = np.random.default_rng(0)
FLOAT, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
MS = "com.microsoft"
Constants = dict[str, Any]


def single(
    op_type: str, inputs: str, constants: Constants, x: np.ndarray, *, domain: str = "", out: int = FLOAT,
    opset: int = 21, **attributes: Any,
) -> ir.Model:  # fmt: skip
    """Return a model of one node; constants are arrays, or tensors of few bits."""
    tensors = [
        one if isinstance(one, onnx.TensorProto) else onnx.numpy_helper.from_array(one, name)
        for name, one in constants.items()
    ]
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op_type, inputs.split(","), ["y"], domain=domain, **attributes)],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, x.shape)],
        [onnx.helper.make_tensor_value_info("y", out, None)],
        tensors,
    )
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(MS, 1)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1)
    return session.run(None, {"x": x})[0] if model.graph.inputs else session.run(None, {})[0]


def plain(model: ir.Model) -> tuple[ir.Model, Report]:
    return model, Pipeline.parse("infer-shapes,to-plain-operators,infer-shapes").run(model)


def check(model: ir.Model, x: np.ndarray, *, atol: float = 1e-5) -> ir.Model:
    expected = run(model, x)
    rewritten, report = plain(model)
    assert report.changed, report.skipped
    assert all(node.domain == "" for node in rewritten.graph)
    np.testing.assert_allclose(run(rewritten, x), expected, rtol=1e-5, atol=atol)
    return rewritten


def floats(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def codes(dtype: str, *shape: int) -> np.ndarray:
    limits = np.iinfo(dtype)
    return RANDOM.integers(limits.min, limits.max + 1, shape).astype(dtype)


def few_bits(name: str, kind: int, array: np.ndarray) -> onnx.TensorProto:
    return onnx.helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("inputs", [64, 40])
def test_products_of_packed_weights(bits: int, zeros: bool, inputs: int):
    block, outputs = 32, 6
    groups = -(-inputs // block)
    constants: Constants = {
        "w": codes("uint8", outputs, groups, block * bits // 8),
        "s": floats(outputs * groups) * 0.1,
    }
    if zeros:
        constants["z"] = pack_bits(RANDOM.integers(0, 1 << bits, (outputs, groups)).astype(np.uint8), bits).reshape(-1)
    x = floats(3, inputs)
    names = ",".join(("x", *constants))
    model = single("MatMulNBits", names, constants, x, domain=MS, K=inputs, N=outputs, bits=bits, block_size=block)
    check(model, x, atol=2e-4)


def test_packed_weights_stay_as_small():
    constants = {"w": codes("uint8", 8, 2, 16), "s": floats(16)}
    x = floats(3, 64)
    model = single("MatMulNBits", "x,w,s", constants, x, domain=MS, K=64, N=8, bits=4, block_size=32)
    rewritten, _ = plain(model)
    packed = [one.const_value for one in rewritten.graph.initializers.values()]
    assert max(one.nbytes for one in packed if one is not None) == constants["w"].nbytes


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_packed_tables(bits: int):
    constants = {"w": codes("uint8", 10, 64 * bits // 8), "s": floats(10, 2)}
    x = np.array([[3, 0], [9, 3]], np.int64)
    model = single("GatherBlockQuantized", "w,x,s", constants, x, domain=MS, bits=bits, block_size=32, quantize_axis=1)
    check(model, x)


@pytest.mark.parametrize(("axis", "rows", "columns"), [(0, 32, 6), (1, 6, 32), (0, 40, 5)])
@pytest.mark.parametrize("kind", [onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT8])
def test_blocked_weights(axis: int, rows: int, columns: int, kind: int):
    low, high = {onnx.TensorProto.INT4: (-8, 8), onnx.TensorProto.UINT4: (0, 16), onnx.TensorProto.INT8: (-128, 128)}[
        kind
    ]
    blocks = [rows, columns]
    blocks[axis] = -(-blocks[axis] // 16)
    constants: Constants = {
        "w": few_bits("w", kind, RANDOM.integers(low, high, (rows, columns))),
        "s": floats(*blocks),
        "z": few_bits("z", kind, RANDOM.integers(low, high, blocks)),
    }
    x = floats(2, rows)
    model = single("DequantizeLinear", "w,s,z", constants, x, axis=axis, block_size=16)
    check(model, x)


def test_per_channel_weights_of_four_bits():
    constants: Constants = {"w": few_bits("w", onnx.TensorProto.INT4, RANDOM.integers(-8, 8, (8, 6))), "s": floats(6)}
    x = floats(1)
    check(single("DequantizeLinear", "w,s", constants, x, axis=1), x)


def test_dequantization_that_all_know_stays():
    x = codes("int8", 2, 3)
    _, report = plain(single("DequantizeLinear", "x,s", {"s": np.float32(0.5)}, x))
    assert not report.parts[1].changed
    assert not report.skipped


@pytest.mark.parametrize(("depth", "count"), [(3, 1), (80, 2)])
def test_integer_convolutions_are_exact(depth: int, count: int):
    x = codes("uint8", 1, depth, 6, 6)
    constants = {"w": codes("uint8", 4, depth, 3, 3), "zx": np.uint8(7), "zw": np.uint8(130)}
    model = single("ConvInteger", "x,w,zx,zw", constants, x, out=onnx.TensorProto.INT32, pads=[1, 1, 1, 1])
    rewritten = check(model, x, atol=0)
    assert sum(node.op_type == "Conv" for node in rewritten.graph) == count


def test_quantized_convolutions():
    x = codes("uint8", 1, 3, 8, 8)
    constants = {
        "xs": np.float32(0.02), "xz": np.uint8(120), "w": codes("int8", 4, 3, 3, 3), "ws": np.abs(floats(4)) * 0.01,
        "wz": np.zeros(4, np.int8), "ys": np.float32(0.05), "yz": np.uint8(3), "b": codes("int16", 4).astype(np.int32),
    }  # fmt: skip
    model = single("QLinearConv", "x,xs,xz,w,ws,wz,ys,yz,b", constants, x, out=UINT8, strides=[2, 2])
    check(model, x, atol=1)  # one step, for what lies in the middle


@pytest.mark.parametrize("op_type", ["QLinearAdd", "QLinearMul"])
def test_quantized_pairs(op_type: str):
    x = codes("uint8", 2, 9)
    constants = {
        "xs": np.float32(0.02), "xz": np.uint8(120), "w": codes("uint8", 9), "ws": np.float32(0.03),
        "wz": np.uint8(20), "ys": np.float32(0.05), "yz": np.uint8(3),
    }  # fmt: skip
    check(single(op_type, "x,xs,xz,w,ws,wz,ys,yz", constants, x, domain=MS, out=UINT8), x, atol=1)


def test_products_that_quantize_as_they_run():
    x = floats(2, 5, 16)
    constants = {"w": codes("int8", 16, 6), "s": np.abs(floats(6)), "z": np.zeros(6, np.int8), "b": floats(6)}
    check(single("DynamicQuantizeMatMul", "x,w,s,z,b", constants, x, domain=MS), x, atol=1e-4)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("shared", [1, 2])
def test_attention_of_the_standard(causal: int, shared: int):
    heads, width = 4, 8
    x = floats(2, 5, heads * width)
    constants = {"k": floats(2, 5, heads // shared * width), "v": floats(2, 5, heads // shared * width)}
    model = single(
        "Attention", "x,k,v", constants, x, opset=23, is_causal=causal, q_num_heads=heads, kv_num_heads=heads // shared
    )
    check(model, x)


def test_attention_with_a_mask():
    x = floats(2, 4, 5, 8)
    constants = {"k": floats(2, 4, 6, 8), "v": floats(2, 4, 6, 3), "m": RANDOM.integers(0, 2, (5, 6)).astype(bool)}
    constants["m"][:, 0] = True
    check(single("Attention", "x,k,v,m", constants, x, opset=23, scale=0.3), x)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_of_onnxruntime(masked: bool):
    x = floats(2, 5, 16)
    constants = {"w": floats(16, 48), "b": floats(48), "m": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)}
    if not masked:
        del constants["m"]
    check(single("Attention", ",".join(("x", *constants)), constants, x, domain=MS, num_heads=2), x, atol=1e-4)


def test_what_has_a_past_stays():
    x = floats(2, 4, 1, 8)
    constants = {name: floats(2, 4, 3, 8) for name in ("pk", "pv")}
    model, report = plain(single("Attention", "x,x,x,,pk,pv", constants, x, opset=23))
    assert [skip.reason for skip in report.skipped] == ["Attention stays: it has a past"]
    assert [node.op_type for node in model.graph] == ["Attention"]


@pytest.mark.parametrize(
    ("op_type", "constants", "attributes"),
    [
        ("Gelu", {}, {}),
        ("QuickGelu", {}, {"alpha": 1.5}),
        ("FastGelu", {"b": floats(16)}, {}),
        ("BiasGelu", {"b": floats(16)}, {}),
        ("FusedMatMul", {"w": floats(6, 16)}, {"transB": 1, "alpha": 0.5}),
        ("SkipLayerNormalization", {"s": floats(2, 3, 16), "g": floats(16), "b": floats(16), "c": floats(16)}, {}),
        ("SkipSimplifiedLayerNormalization", {"s": floats(2, 3, 16), "g": floats(16)}, {"epsilon": 1e-5}),
    ],
)
def test_fused_operators(op_type: str, constants: Constants, attributes: dict[str, Any]):
    x = floats(2, 3, 16)
    tolerance = 1e-3 if op_type == "FastGelu" else 1e-5  # ONNX Runtime's approximates tanh
    check(single(op_type, ",".join(("x", *constants)), constants, x, domain=MS, **attributes), x, atol=tolerance)


@pytest.mark.parametrize("activation", ["Relu", "Clip", ""])
def test_fused_convolutions(activation: str):
    x = floats(1, 3, 8, 8)
    constants = {"w": floats(4, 3, 3, 3), "b": floats(4)}
    attributes = {"activation": activation} if activation else {}
    if activation == "Clip":
        attributes["activation_params"] = [-0.5, 1.0]
    check(single("FusedConv", "x,w,b", constants, x, domain=MS, **attributes), x)
