"""Which layers of a lowered model add products in 16 bits on processors without VNNI, by the table."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.analysis.byte_products import saturating_weights
from qgraph.capabilities import table
from qgraph.targets.cpu_saturation import saturating

CPU = table("onnxruntime-cpu")
HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def layer(text: str, inputs: str, **weights: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f"{HEAD} g ({inputs}) => (y) {{ {text} }}")
    for value in list(model.graph.inputs):
        if value.name in weights:
            value.const_value = ir.tensor(weights[value.name])
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    return model


def reached(model: ir.Model, *processors: str) -> list[str]:
    names = processors or ("avx2", "avx512")
    found = [value for node in qgraph.ir.walk(model) for value in saturating_weights(node, CPU, names)]
    return [value.name or "" for value in found]


QDQ = """d = DequantizeLinear (x, s)
    e = DequantizeLinear (w, s)
    y = {} (d, e)"""


@pytest.mark.parametrize(
    ("text", "x", "w", "cut"),
    [
        ("Conv", "uint8[1,8,8,8]", "int8[8,8,3,3]", True),
        ("Conv", "int8[1,8,8,8]", "int8[8,8,3,3]", True),  # the runtime makes unsigned activations of them
        ("Conv", "uint8[1,8,8,8]", "uint8[8,8,3,3]", False),
        ("Conv <group = 8>", "uint8[1,8,8,8]", "int8[8,1,3,3]", False),
        ("Conv <group = 8>", "uint8[1,8,8,8]", "int8[16,1,3,3]", True),
        ("Conv <group = 2>", "uint8[1,8,8,8]", "int8[8,4,3,3]", True),
        ("MatMul", "uint8[4,8]", "int8[8,8]", True),
        ("Gemm", "uint8[4,8]", "int8[8,8]", True),
        ("ConvTranspose", "uint8[1,8,8,8]", "int8[8,8,3,3]", False),
    ],
)
def test_layers_between_quantizers_count_as_the_kernels_that_they_become(text: str, x: str, w: str, cut: bool):
    model = layer(QDQ.format(text), f"{x} x, float s, {w} w")
    assert reached(model) == (["w"] if cut else [])
    assert reached(model, "vnni") == []


def test_kernels_as_they_are_written():
    dynamic = "y = com.microsoft.DynamicQuantizeMatMul (x, w, s)"
    assert reached(layer(dynamic, "float[4,8] x, int8[8,8] w, float s")) == ["w"]
    assert reached(layer(dynamic, "float[4,8] x, uint8[8,8] w, float s")) == []
    recurrence = "y = com.microsoft.DynamicQuantizeLSTM <hidden_size = 2> (x, w, r, , , , , , s, z, s, z)"
    inputs = "float[1,2,8] x, int8[1,8,8] w, int8[1,2,8] r, float[1] s, int8[1] z"
    assert reached(layer(recurrence, inputs)) == ["w", "r"]
    assert reached(layer("y = MatMulInteger (x, w)", "uint8[4,8] x, int8[8,8] w")) == ["w"]
    assert reached(layer("y = MatMul (x, w)", "float[4,8] x, float[8,8] w")) == []


def test_types_that_are_not_known_may_be_any():
    model = layer("q = QuantizeLinear (x, s)\n d = DequantizeLinear (q, s)\n e = DequantizeLinear (w, s)\n"
                  "y = MatMul (d, e)", "float[4,8] x, float s, int8[8,8] w")  # fmt: skip
    for node in model.graph:
        node.outputs[0].type = None
    assert reached(model) == ["w"]


def test_weights_of_seven_bits_never_saturate():
    large, small = (np.full((8, 8), number, np.int8) for number in (65, 64))
    text, inputs = "y = MatMulInteger (x, w)", "uint8[4,8] x, int8[8,8] w"
    ((_, reason),) = saturating(layer(text, inputs, w=large))
    assert "may sum up to 33150" in reason
    assert saturating(layer(text, inputs, w=small)) == []
    assert saturating(layer(text, inputs, w=large), ["vnni"]) == []
