"""Every rule of TensorRT's explicit quantization, with a graph that breaks it and one that keeps it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.analysis.tensorrt_rules import RULES, broken_rules

INPUTS = "float[1,8,8,8] x, float[8,8,1,1] w"
CONSTANTS = """<float s = {0.5}, float s2 = {0.25}, float negative = {-0.5}, float zero = {0},
 int8 z = {0}, int8 z3 = {3}, uint8 zu = {0}, int32 z32 = {0},
 float[8] many = {1,2,3,4,5,6,7,8}, int8[8] zs = {0,0,0,0,0,0,0,0}, int32[8] b = {1,2,3,4,5,6,7,8},
 int8[8,8,1,1] wq = {WEIGHT}>""".replace("WEIGHT", ",".join("1" * 64))
GOOD = """
    xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)
    wd = DequantizeLinear<axis = 0>(wq, many, zs)
    c = Conv(xd, wd)  r = Relu(c)
    rq = QuantizeLinear(r, s2, z)  rd = DequantizeLinear(rq, s2, z)
    d = Conv(rd, wd)  y = Add(d, xd)
"""


def model(body: str, opset: int = 21) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    g ({INPUTS}, float computed) => (float[1,8,8,8] y) {CONSTANTS} {{ {body} }}"""
    proto = onnx.parser.parse_model(
        text.replace("int8[8,8,1,1] wq = {0}", f"int8[8,8,1,1] wq = {{{','.join('1' * 64)}}}")
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


BROKEN = {
    "zero point": GOOD.replace("QuantizeLinear(x, s, z)", "QuantizeLinear(x, s, z3)"),
    "quantized type": GOOD.replace("(x, s, z)", "(x, s, zu)").replace("(xq, s, z)", "(xq, s, zu)"),
    "scale": GOOD.replace("(r, s2, z)", "(r, negative, z)"),
    "activations per tensor": GOOD.replace("QuantizeLinear(x, s, z)", "QuantizeLinear<axis = 1>(x, many, zs)"),
    "Q and D in pairs": GOOD.replace("DequantizeLinear(xq, s, z)", "DequantizeLinear(xm, s, z)").replace(
        "xd =", "xm = MaxPool<kernel_shape = [1,1]>(xq)  xd ="
    ),
    "Q before D": GOOD.replace("DequantizeLinear(xq, s, z)", "DequantizeLinear(xm, s, z)").replace(
        "xd =", "xm = MaxPool<kernel_shape = [1,1]>(xq)  xd ="
    ),
    "channel axis": GOOD.replace("<axis = 0>(wq", "<axis = 1>(wq"),
    "bias in float": GOOD.replace("Conv(xd, wd)", "Conv(xd, wd, bd)").replace(
        "c =", "bd = DequantizeLinear<axis = 0>(b, many)  c ="
    ),
    "all inputs of a layer": GOOD.replace("Conv(xd, wd)", "Conv(x, wd)"),
    "Q behind the activation": GOOD.replace("r = Relu(c)", "cq = QuantizeLinear(c, s, z)  r = Relu(cd)").replace(
        "r = Relu", "cd = DequantizeLinear(cq, s, z)  r = Relu"
    ),
    "residual": GOOD.replace("Add(d, xd)", "Add(d, x)"),
    "one scale": GOOD.replace("Conv(xd, wd)", "Conv(md, wd)").replace(
        "c =",
        "m = MaxPool<kernel_shape = [1,1]>(xd)  mq = QuantizeLinear(m, s2, z)  md = DequantizeLinear(mq, s2, z)  c =",
    ),
    "operators": GOOD.replace("y = Add(d, xd)", "e = Add(d, xd)  y = com.microsoft.QLinearSigmoid(e)"),
}


def test_a_model_that_keeps_them_all():
    assert broken_rules(model(GOOD)) == []


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_each_rule_is_broken_by_its_graph(rule: str):
    broken = broken_rules(model(BROKEN[rule]))

    assert any(one.reason.endswith(f"({rule})") for one in broken), broken


def test_every_rule_names_its_source():
    assert all(rule.source for rule in RULES)
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_the_reasons_name_node_and_number():
    ((node, reason),) = broken_rules(model(BROKEN["zero point"]))

    assert node == "QuantizeLinear->xq"
    assert reason == "its zero point is 3, and TensorRT's quantization is symmetric: it must be 0 (zero point)"


def test_float8_needs_opset_19_and_no_int8_beside_it():
    mixed = model(GOOD)
    quantize = next(node for node in mixed.graph if node.name == "" and node.op_type == "QuantizeLinear")
    zero = ir.Value(name="z8", const_value=ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn), name="z8"))
    zero.dtype = ir.DataType.FLOAT8E4M3FN
    mixed.graph.initializers["z8"] = zero
    quantize.replace_input_with(2, zero)
    quantize.outputs[0].dtype = ir.DataType.FLOAT8E4M3FN
    assert any("(one quantized type)" in one.reason for one in broken_rules(mixed))

    mixed.graph.opset_imports[""] = 18
    assert any("it needs opset 19, and the model has 18 (opset)" in one.reason for one in broken_rules(mixed))


def test_four_bit_weights_need_no_quantized_input():
    text = GOOD.replace("Conv(xd, wd)", "Conv(x, wd)")
    low = model(text)
    low.graph.initializers["wq"].dtype = ir.DataType.INT4

    assert [one for one in broken_rules(low) if "all inputs" in one.reason] == []
