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
    opset: int = 21, outputs: str = "y", **attributes: Any,
) -> ir.Model:  # fmt: skip
    """Return a model of one node; constants are arrays, or tensors of few bits."""
    tensors = [
        one if isinstance(one, onnx.TensorProto) else onnx.numpy_helper.from_array(one, name)
        for name, one in constants.items()
    ]
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op_type, inputs.split(","), outputs.split(","), domain=domain, **attributes)],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, x.shape)],
        [onnx.helper.make_tensor_value_info(name, out, None) for name in outputs.split(",")],
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


QUANTIZED: Constants = {
    "xs": np.float32(0.02), "xz": np.uint8(120), "w": codes("uint8", 9, 6), "ws": np.float32(0.03), "wz": np.uint8(20),
    "ys": np.float32(0.5), "yz": np.uint8(3),
}  # fmt: skip


@pytest.mark.parametrize("form", ["", "ends in floats", "with a bias", "transposed, per column"])
def test_quantized_linear_layers(form: str):
    x, constants, attributes = codes("uint8", 5, 9), dict(QUANTIZED), {"alpha": 0.5}
    bias = codes("int16", 6).astype(np.int32) if "bias" in form else None
    if "transposed" in form:
        x, attributes = x.T.copy(), {"transA": 1, "transB": 1}
        constants |= {"w": codes("int8", 6, 9), "ws": np.abs(floats(6)) * 0.1, "wz": np.zeros(6, np.int8)}
    outputs = "" if "floats" in form else ",ys,yz"
    constants = {name: one for name, one in constants.items() if outputs or name not in ("ys", "yz")}
    if bias is not None:
        constants["b"] = bias
    names = f"x,xs,xz,w,ws,wz,{'' if bias is None else 'b'}{outputs}"
    model = single("QGemm", names, constants, x, domain=MS, out=UINT8 if outputs else FLOAT, **attributes)
    check(model, x, atol=1 if outputs else 1e-4)  # one step, for what lies in the middle


@pytest.mark.parametrize("columns", [False, True])
def test_quantized_products(columns: bool):
    x, constants = codes("uint8", 2, 5, 9), dict(QUANTIZED)
    if columns:
        constants |= {"w": codes("int8", 9, 6), "ws": np.abs(floats(6)) * 0.1, "wz": np.zeros(6, np.int8)}
    check(single("QLinearMatMul", "x,xs,xz,w,ws,wz,ys,yz", constants, x, out=UINT8), x, atol=1)


def test_quantized_choices():
    x, constants = codes("uint8", 9, 6), {**QUANTIZED, "c": RANDOM.integers(0, 2, (9, 6)).astype(bool)}
    check(single("QLinearWhere", "c,x,xs,xz,w,ws,wz,ys,yz", constants, x, domain=MS, out=UINT8), x, atol=1)


@pytest.mark.parametrize("levels", [0, 1])
@pytest.mark.parametrize(("inputs", "block"), [(64, 32), (24, 16)])
def test_products_of_weights_of_levels(levels: int, inputs: int, block: int):
    outputs = 6
    x, blocks = floats(3, inputs), inputs * outputs // block
    constants = {"w": codes("uint8", inputs * outputs // 2), "a": np.abs(floats(blocks))}
    sizes = {"K": inputs, "N": outputs, "block_size": block, "quant_type": levels}
    check(single("MatMulBnb4", "x,w,a", constants, x, domain=MS, **sizes), x, atol=1e-4)


def test_weights_of_levels_in_ragged_blocks_stay():
    x, constants = floats(3, 24), {"w": codes("uint8", 60), "a": np.abs(floats(4))}
    model = single("MatMulBnb4", "x,w,a", constants, x, domain=MS, K=24, N=5, block_size=32, quant_type=1)
    assert "no whole blocks of 32" in plain(model)[1].skipped[0].reason


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("form", ["flat", "apart", "partly", "from a place"])
def test_rotary_embedding_of_onnxruntime(form: str, interleaved: int):
    heads, width, tokens = 3, 8, 5
    x = floats(2, heads, tokens, width) if form == "apart" else floats(2, tokens, heads * width)
    half = width // 4 if form == "partly" else width // 2
    ids = np.array([3], np.int64) if form == "from a place" else RANDOM.integers(0, 16, (2, tokens))
    constants = {"i": ids, "c": floats(16, half), "s": floats(16, half)}
    more = {"num_heads": heads, "rotary_embedding_dim": 2 * half} if form == "partly" else {}
    check(single("RotaryEmbedding", "x,i,c,s", constants, x, domain=MS, interleaved=interleaved, **more), x)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("form", ["flat", "apart", "by places"])
def test_rotary_embedding_of_the_standard(form: str, interleaved: int):
    heads, width, tokens = 3, 8, 5
    x = floats(2, tokens, heads * width) if form == "flat" else floats(2, heads, tokens, width)
    rows = (16,) if form == "by places" else (2, tokens)
    constants: Constants = {"c": floats(*rows, width // 2), "s": floats(*rows, width // 2)}
    if form == "by places":
        constants["i"] = RANDOM.integers(0, 16, (2, tokens))
    names = ",".join(("x", *constants))
    more = {"num_heads": heads} if form == "flat" else {}
    check(single("RotaryEmbedding", names, constants, x, opset=23, interleaved=interleaved, **more), x)


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


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_quantized_attention(columns: bool, masked: bool):
    x = codes("uint8", 2, 5, 16)
    scales, zeros = (np.abs(floats(48)) * 0.02, np.zeros(48, np.int8)) if columns else (np.float32(0.02), np.int8(3))
    constants = {
        "w": codes("int8", 16, 48), "b": floats(48), "xs": np.float32(0.03), "ws": scales,
        "m": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32), "xz": np.uint8(120), "wz": zeros,
    }  # fmt: skip
    if not masked:
        del constants["m"]
    names = f"x,w,b,xs,ws,{'m' if masked else ''},xz,wz"
    check(single("QAttention", names, constants, x, domain=MS, num_heads=2), x, atol=1e-4)


@pytest.mark.parametrize(
    "form",
    ["plain", "bias", "padding", "padding of pairs", "added", "causal", "apart", "past", "causal past", "narrow"],
)
def test_attention_of_many_heads(form: str):
    heads, width, value_width = 2, 8, 6 if form == "narrow" else 8
    x, constants = floats(2, 5, heads * width), {}
    if form == "apart":
        constants |= {"k": floats(2, heads, 7, width), "v": floats(2, heads, 7, width)}
    else:
        tokens = 5 if "causal" in form or "past" in form else 7
        constants |= {"k": floats(2, tokens, heads * width), "v": floats(2, tokens, heads * value_width)}
    optional: Constants = {
        "bias": {"b": floats(heads * (2 * width + value_width))},
        "padding": {"p": np.array([[1] * 7, [1] * 4 + [0] * 3], np.int32)},
        "padding of pairs": {"p": RANDOM.integers(0, 2, (2, 5, 7)).astype(np.int32)},
        "added": {"a": floats(1, heads, 5, 7)},
    }.get(form, {})
    constants |= optional
    names = f"x,k,v,{'b' if 'b' in optional else ''},{'p' if 'p' in optional else ''},{'a' if 'a' in optional else ''}"
    if "past" in form:
        constants |= {"pk": floats(2, heads, 3, width), "pv": floats(2, heads, 3, width)}
        names += ",pk,pv"
    more: dict[str, Any] = {"unidirectional": 1} if "causal" in form else {}
    more["outputs"] = "y,ok,ov" if "past" in form else "y"
    check(single("MultiHeadAttention", names, constants, x, domain=MS, num_heads=heads, scale=0.4, **more), x)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [("x", "its queries, keys and values are packed"), ("x,k,k,,p", "its padding is told by lengths")],
)
def test_attention_of_many_heads_that_stays(inputs: str, reason: str):
    x = floats(2, 5, 2, 3, 8) if inputs == "x" else floats(2, 5, 16)
    constants = {"k": floats(2, 5, 16), "p": np.array([5, 3], np.int32)} if inputs != "x" else {}
    _, report = plain(single("MultiHeadAttention", inputs, constants, x, domain=MS, num_heads=2))
    assert f"MultiHeadAttention stays: {reason}" in [skip.reason for skip in report.skipped]


GROUPED = [
    pytest.param({"rows": 4, "total": 4, "lengths": (3, 2)}, {}, id="prompt"),
    pytest.param({"rows": 4, "total": 4, "lengths": (3, 3), "past": 9}, {}, id="prompt into a buffer"),
    pytest.param({"rows": 1, "total": 7, "lengths": (6, 4), "past": 6}, {}, id="cache that grows"),
    pytest.param({"rows": 1, "total": 7, "lengths": (6, 2), "past": 9}, {"softcap": 2.0}, id="buffer, capped"),
    pytest.param({"rows": 3, "total": 7, "lengths": (6,), "past": 9}, {"scale": 0.4}, id="several behind a past"),
    pytest.param({"rows": 3, "total": 7, "lengths": (6,), "past": 4}, {"local_window_size": 2}, id="window"),
    pytest.param({"rows": 4, "total": 4, "lengths": (3, 3)}, {"local_window_size": 2}, id="window of a prompt"),
    pytest.param({"rows": 1, "total": 7, "lengths": (6, 4), "past": 9}, {"do_rotary": 1}, id="rotated"),
    pytest.param(
        {"rows": 4, "total": 4, "lengths": (3, 3)}, {"do_rotary": 1, "rotary_interleaved": 1}, id="prompt, rotated"
    ),
    pytest.param({"rows": 1, "total": 7, "lengths": (6, 4), "past": 9, "packed": True}, {"do_rotary": 1}, id="packed"),
    pytest.param({"rows": 1, "total": 7, "lengths": (6, 4), "past": 9, "added": True}, {}, id="added"),
]


@pytest.mark.parametrize(("form", "attributes"), GROUPED)
def test_attention_of_groups(form: dict[str, Any], attributes: dict[str, Any]):
    model, x, caches = grouped(form, attributes)
    expected = outputs_of(model, x)
    rewritten, report = plain(model)
    assert report.changed, report.skipped
    assert all(node.domain == "" for node in rewritten.graph)
    for found, right in zip(outputs_of(rewritten, x), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)
    assert [one.shape[2] for one in expected[1:]] == [caches] * 2


def grouped(form: dict[str, Any], attributes: dict[str, Any]) -> tuple[ir.Model, np.ndarray, int]:
    """Return a model of a GroupQueryAttention with three outputs, what to feed it, and the size of its cache."""
    heads, groups, width, samples, rows = 4, 2, 16, len(form["lengths"]), form["rows"]
    packed = form.get("packed", False)
    x = floats(samples, rows, (heads + 2 * groups if packed else heads) * width)
    constants: Constants = {} if packed else {name: floats(samples, rows, groups * width) for name in "kv"}
    constants |= {"l": np.array(form["lengths"], np.int32), "t": np.array(form["total"], np.int32)}
    past = form.get("past", 0)
    names = "x,," if packed else "x,k,v"
    if past:
        constants |= {name: floats(samples, groups, past, width) for name in ("pk", "pv")}
    names += ",pk,pv,l,t" if past else ",,,l,t"
    if "do_rotary" in attributes:
        constants |= {"c": floats(16, width // 2), "s": floats(16, width // 2)}
    names += ",c,s" if "do_rotary" in attributes else ",,"
    if form.get("added"):
        constants["a"] = floats(1, heads, rows, form["total"])
        names += ",,a"
    more = {"num_heads": heads, "kv_num_heads": groups, **attributes}
    model = single("GroupQueryAttention", names, constants, x, domain=MS, outputs="y,ok,ov", **more)
    return model, x, max(past, form["total"])


def outputs_of(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    return open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1).run(None, {"x": x})


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [({"smooth_softmax": 1}, "it has smooth_softmax=1"), ({"causal": 0}, "it has causal=0")],
)
def test_attention_of_groups_that_stays(attributes: dict[str, Any], reason: str):
    model, _, _ = grouped({"rows": 4, "total": 4, "lengths": (3, 3)}, attributes)
    assert f"GroupQueryAttention stays: {reason}" in [skip.reason for skip in plain(model)[1].skipped]


def test_slices_name_only_what_they_cut():
    x, far = floats(3, 9), 2**31 - 1
    constants = {"b": np.array([0, 2]), "e": np.array([far, far]), "a": np.array([0, 1]), "s": np.array([1, 1])}
    model = check(single("Slice", "x,b,e,a,s", constants, x), x)
    (node,) = model.graph
    assert [one.const_value.numpy().tolist() for one in node.inputs[1:] if one is not None and one.const_value] == [
        [2], [far], [1], [1],
    ]  # fmt: skip
    assert not plain(model)[1].parts[1].changed


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
