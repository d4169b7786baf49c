"""Costs against figures worked out by hand, and against published ones where the real models are at hand."""

import json

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.analysis.cost import Port, cost
from qgraph.errors import UserError

ORT = "com.microsoft"


def one_node(op_type, inputs, output, *, domain="", weights=None, **attributes):
    """Build a model of one node; `inputs` and `weights` map names to shapes (or arrays) in order."""
    weights = weights or {}
    values = []
    for name, shape in {**inputs, **weights}.items():
        if name in weights:
            tensor = ir.tensor(np.zeros(shape, np.float32) if isinstance(shape, list) else shape, name=name)
            values.append(ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)))
        else:
            values.append(ir.val(name, ir.DataType.FLOAT, shape))
    node = ir.node(op_type, values, attributes, domain=domain, name="the_node")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = None if output is None else ir.Shape(output)
    graph = ir.Graph(
        values[: len(inputs)],
        node.outputs,
        nodes=[node],
        initializers=values[len(inputs) :],
        opset_imports={"": 20, **({domain: 1} if domain else {})},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (one_node("MatMul", {"a": [4, 5]}, None, weights={"b": [5, 6]}), 4 * 5 * 6),
        (one_node("MatMul", {"a": [2, 3, 4, 5], "b": [2, 3, 5, 6]}, None), 2 * 3 * 4 * 5 * 6),
        (one_node("MatMul", {"a": [4, 5], "b": [7, 5, 6]}, None), 7 * 4 * 5 * 6),
        (one_node("MatMul", {"a": [5], "b": [5]}, None), 5),
        (one_node("Gemm", {"a": [4, 5]}, None, weights={"b": [6, 5]}, transB=1), 4 * 5 * 6),
        (one_node("Gemm", {"a": [5, 4]}, None, weights={"b": [5, 6]}, transA=1), 4 * 5 * 6),
        (one_node("Conv", {"x": [2, 3, 8, 8]}, None, weights={"w": [16, 3, 3, 3]}, pads=[1] * 4), 2 * 16 * 64 * 27),
        (one_node("Conv", {"x": [1, 8, 8, 8]}, None, weights={"w": [8, 1, 3, 3]}, group=8), 8 * 36 * 9),
        (one_node("ConvTranspose", {"x": [1, 4, 5, 5]}, None, weights={"w": [4, 6, 2, 2]}), 4 * 25 * 6 * 4),
        (
            one_node("LSTM", {"x": [7, 2, 3]}, None, weights={"w": [1, 20, 3], "r": [1, 20, 5]}, hidden_size=5),
            7 * 2 * 20 * (3 + 5),
        ),
        (one_node("Einsum", {"a": [2, 3, 4], "b": [2, 4, 5]}, None, equation="bij,bjk->bik"), 2 * 3 * 4 * 5),
        (
            one_node(
                "MatMulNBits",
                {"a": [3, 64]},
                [3, 10],
                domain=ORT,
                weights={"q": np.zeros((10, 2, 16), np.uint8), "s": [20]},
                K=64,
                N=10,
                bits=4,
                block_size=32,
            ),
            3 * 64 * 10,
        ),
        (
            one_node("MultiHeadAttention", {"q": [2, 7, 8], "k": [2, 9, 8], "v": [2, 9, 8]}, [2, 7, 8], domain=ORT),
            2 * (2 * 7 * 9 * 8),
        ),
        (
            one_node(
                "Attention",
                {"q": [2, 3, 8], "k": [2, 3, 4], "v": [2, 3, 4], "m": [3, 8], "pk": [2, 2, 5, 2], "pv": [2, 2, 5, 2]},
                [2, 3, 8],
                q_num_heads=4,
                kv_num_heads=2,
            ),
            2 * 4 * 3 * (5 + 3) * (2 + 2),
        ),
        (
            one_node("Attention", {"x": [2, 7, 8]}, [2, 7, 8], domain=ORT, weights={"w": [8, 24], "b": [24]}),
            2 * 7 * 8 * 24 + 2 * (2 * 7 * 7 * 8),
        ),
        (one_node("Relu", {"a": [4, 5]}, None), 0),
    ],
    ids=lambda value: next(iter(value.graph)).op_type if isinstance(value, ir.Model) else "",
)  # fmt: skip
def test_multiply_adds(model, expected):
    found = cost(model)
    assert found.unknown == []
    assert found.multiply_adds == expected


def test_what_is_not_known_has_its_reason():
    found = cost(one_node("Magic", {"a": [4, 5]}, [4, 5], domain="com.example"))
    (node,) = found.unknown
    assert node.op_type == "com.example::Magic"
    assert "operator Magic of domain 'com.example' is not known" in node.reason
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[4] x) => (float[n] y) { i = NonZero(x) f = Cast <to = 1> (i) y = MatMul(f, x) }"""
    found = cost(ir.from_onnx_text(text))
    assert [node.op_type for node in found.unknown] == ["MatMul"]
    assert "the shape of 'f' is not known" in found.unknown[0].reason
    assert found.peak_activation_bytes is None


DYNAMIC = """<ir_version: 10, opset_import: ["" : 20], producer_name: "somebody", producer_version: "1.2">
g (float[batch, seq, 8] x, float[batch, 2] z) => (float[batch, seq, 4] y)
<float[8, 4] w = {WEIGHTS}, int64[2] unused = {1, 2}> {
    m = MatMul(x, w)
    y = Relu(m)
}"""


def test_dynamic_axes_get_sizes_that_are_told():
    model = ir.from_onnx_text(DYNAMIC.replace("WEIGHTS", ", ".join(["0.5"] * 32)))
    found = cost(model)
    assert found.axes == {"batch": 1, "seq": 16}
    assert found.multiply_adds == 16 * 8 * 4
    assert cost(model, {"batch": 3, "seq": 5}).multiply_adds == 3 * 5 * 8 * 4
    assert found.inputs == (Port("x", "float32", ("batch", "seq", 8)), Port("z", "float32", ("batch", 2)))
    assert model.graph.inputs[0].shape == ir.Shape(["batch", "seq", 8])  # the model itself is not changed
    assert (found.producer, found.opset, found.ir_version) == ("somebody 1.2", 20, 10)
    assert found.operators == {"MatMul": 1, "Relu": 1}
    assert found.weights == {"fp32": 128, "int64": 16}
    assert found.parameters == 32 + 2
    assert [node.weight_bytes for node in found.nodes] == [128, 0]
    assert [node.activation_bytes for node in found.nodes] == [16 * 4 * 4] * 2
    json.dumps(found.to_json(), allow_nan=False)


def test_an_axis_that_is_named_as_a_sum_is_one():
    model = one_node("Add", {"x": ["batch", "past + seq"], "z": ["batch", "seq"]}, None)
    assert cost(model, {"past": 3}).axes == {"batch": 1, "past": 3, "seq": 16}
    assert cost(model, {"past + seq": 5}).axes == {"batch": 1, "past + seq": 5, "seq": 16}


def test_the_peak_of_activations_frees_each_tensor_after_its_last_reader():
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[100] x) => (float[100] y) {
        a = Relu(x)
        b = Concat <axis = 0> (a, a, a)
        c = Neg(a)
        d = ReduceMax <keepdims = 1> (b)
        y = Add(c, d)
    }"""
    # x 400, a 400, b 1200, c 400, d 4: at c all of a, b and c live, x is gone.
    assert cost(ir.from_onnx_text(text)).peak_activation_bytes == 400 + 1200 + 400


def test_subgraphs_and_functions_are_counted():
    text = """<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
    g (float[3, 4] x, bool c) => (float[3, 4] y) <float[4, 4] w = {WEIGHTS}> {
        p = local.project(x, w)
        y = If (c) <
            then_branch = yes () => (float[3, 4] a) { a = MatMul(p, w) },
            else_branch = no () => (float[3, 4] b) { b = Identity(p) }
        >
    }
    <domain: "local", opset_import: ["" : 20]> project (a, b) => (c) { c = MatMul(a, b) }"""
    model = ir.from_onnx_text(text.replace("WEIGHTS", ", ".join(["0.5"] * 16)))
    found = cost(model)
    assert found.functions == 1
    assert found.operators == {"MatMul": 2, "Identity": 1, "If": 1}
    assert found.multiply_adds == 2 * 3 * 4 * 4
    inner = [node for node in found.nodes if node.graph]
    assert [node.op_type for node in inner] == ["MatMul", "Identity"] or [n.op_type for n in inner] == [
        "Identity",
        "MatMul",
    ]
    assert {node.graph.rsplit(".", 1)[1] for node in inner} == {"then_branch", "else_branch"}
    assert len(model.functions) == 1


def test_precisions_of_packed_and_narrow_weights():
    packed = one_node(
        "MatMulNBits", {"a": [3, 64]}, [3, 10], domain=ORT,
        weights={"q": np.zeros((10, 2, 16), np.uint8), "s": [20]}, K=64, N=10, bits=4, block_size=32,
    )  # fmt: skip
    found = cost(packed)
    assert found.weights == {"int4": 320, "fp32": 80}
    assert found.parameters == 640 + 20
    half = one_node("MatMul", {"a": [3, 4]}, None, weights={"b": np.zeros((4, 2), np.float16)})
    assert cost(half).weights == {"fp16": 16}
    nibbles = one_node("DequantizeLinear", {}, [4], weights={"b": [4]})
    nibbles.graph.initializers["b"].const_value = ir.tensor([1, -2, 3, -4, 5], dtype=ir.DataType.INT4, name="b")
    assert cost(nibbles).weights == {"int4": 3}


def test_a_model_beyond_two_gigabytes_is_counted_without_reading_a_weight():
    def read():
        raise AssertionError("the weight was read")

    rows = 1 << 20
    tensor = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([rows, 1024]), name="w")
    model = one_node("MatMul", {"a": [1, rows]}, None, weights={"w": [1, 1]})
    model.graph.initializers["w"].const_value = tensor
    found = cost(model)
    assert found.weight_bytes == 4 << 30
    assert found.multiply_adds == 1 << 30


def test_initializers_that_may_be_overridden_are_weights_and_no_inputs():
    text = """<ir_version: 3, opset_import: ["" : 7]>
    g (float[2, 8] x, int64[2] shape) => (float[n, m] y) <int64[2] shape = {4, 4}> { y = Reshape(x, shape) }"""
    found = cost(ir.from_onnx_text(text))
    assert [port.name for port in found.inputs] == ["x"]
    assert found.activation_bytes == 64


@pytest.mark.parametrize(
    ("file", "millions"),
    [
        ("cifar10/resnet20_cifar10.onnx", 40.55),  # He et al. 2016 and its reimplementations: 0.041 G
        ("mobilenet_v2/mobilenetv2_1.0_224.onnx", 300.8),  # Sandler et al. 2018, table 4: 300 M
        ("squeezenet1.0/squeezenet1.0_fp32.onnx", 349.2),
    ],
)
def test_published_multiply_adds_of_real_models(assets, file, millions):
    found = cost(qgraph.ir.load(assets / file))
    assert found.unknown == []
    assert found.multiply_adds / 1e6 == pytest.approx(millions, rel=0.001)


def test_functions_that_call_one_another_in_a_circle_are_bad_input():
    call = ir.node("Round", [value := ir.val("a", ir.DataType.FLOAT, [2])], domain="mine")
    body = ir.Graph([value], call.outputs, nodes=[call], opset_imports={"mine": 1}, name="body")
    model = one_node("Round", {"x": [2]}, [2], domain="mine")
    function = ir.Function("mine", "Round", graph=body, attributes=[])
    model.functions[function.identifier()] = function
    with pytest.raises(UserError, match="Export without functions"):
        cost(model)


def test_a_dequantized_weight_is_no_activation():
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[1,10] x) => (float[1,100] y) <int8[10,100] w = {}, float s = {0.5}>
    {
        d = DequantizeLinear (w, s)
        y = MatMul (x, d)
    }""".replace("{}", "{" + ", ".join(["1"] * 1000) + "}")
    assert cost(ir.from_onnx_text(text)).peak_activation_bytes == 40 + 400
