"""Nodes without a kernel, and the reasons that are given."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qgraph import capabilities
from qgraph.analysis.kernel_support import refusal, refusal_of, unsupported

TABLE = """
runtime = "Some Runtime"
provider = ""
version = "1.2"
opset = 21
[sources]
manual = "its manual"
[conversions]
bfloat16 = "float32"
"""


def reasons(operators: str, body: str, opset: int = 17, inputs: str = "float[1,4,6,6] x") -> list[tuple[str, str]]:
    table = capabilities.parse(TABLE + operators, "some")
    text = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> g ({inputs}) => (y) {{ {body} }}'
    return [tuple(one) for one in unsupported(ir.from_onnx_text(text), table)]  # type: ignore[misc]


def operator(name: str, rest: str) -> str:
    return f"[[operators]]\nname = '{name}'\nsource = 'manual'\n{rest}\n"


RELU = "y = Relu(x)"
PAIR = "y = Add(x, x)"


@pytest.mark.parametrize(
    ("operators", "body", "reason"),
    [
        (operator("Add", ""), RELU, "Some Runtime has no Relu"),
        (operator("Relu", ""), RELU, None),
        (operator("Relu", "since = 18"), RELU, "Relu: opset 17, and Some Runtime takes from 18"),
        (operator("Relu", "until = 16"), RELU, "Relu: opset 17, and Some Runtime takes 0 to 16"),
        (operator("Relu", "since = 17\nuntil = 17"), RELU, None),
        (
            operator("Relu", "inputs = { 0 = ['int8'] }") + operator("Relu", "inputs = { 0 = ['int32', 'int8'] }"),
            RELU,
            "Relu: input 0 is float32, and Some Runtime takes int8, int32",
        ),
        (operator("Relu", "inputs = { 0 = ['int8'] }") + operator("Relu", "inputs = { 0 = ['float32'] }"), RELU, None),
        (
            operator("Add", "inputs = { 0 = ['float32'], '*' = ['int8'] }"),
            PAIR,
            "Add: input 1 is float32, and Some Runtime takes int8",
        ),
        (
            operator("Relu", "outputs = { 0 = ['int8'] }\nnote = 'integers only'"),
            RELU,
            "Relu: output 0 is float32, and Some Runtime takes int8 (integers only)",
        ),
        (
            operator("Relu", "inputs = { 0 = ['int8'] }") + operator("Relu", "constraints = ['constant 0']"),
            RELU,
            "Relu: input 0 must be constant for Some Runtime",
        ),
        (
            operator("Relu", "constraints = ['rank 0 in 2..3']"),
            RELU,
            "Relu: input 0 has 4 dimensions, and Some Runtime takes 2 to 3",
        ),
        (operator("Relu", "constraints = ['rank 0 in 2, 4', 'static', 'static 0', 'present 0']"), RELU, None),
        (operator("Relu", "constraints = ['absent 1']"), RELU, None),
        (operator("Relu", "constraints = ['scalar 0']"), RELU, "Relu: input 0 must have one element for Some Runtime"),
        (operator("Relu", "constraints = ['present 1']"), RELU, "Relu: input 1 must be there for Some Runtime"),
        (operator("Relu", "constraints = ['absent 0']"), RELU, "Relu: input 0 must be left out for Some Runtime"),
        (operator("Relu", "constraints = ['outputs 1']"), RELU, None),
        (
            operator("MaxPool", "constraints = ['outputs 1']"),
            "y, i = MaxPool <kernel_shape = [2, 2]> (x)",
            "MaxPool: output 1 must be left out for Some Runtime",
        ),
        (operator("Relu", "constraints = ['multiple 0 1 4']"), RELU, None),
        (
            operator("Relu", "constraints = ['multiple 0 -1 4']"),
            RELU,
            "Relu: axis -1 of input 0 is 6, no multiple of 4 for Some Runtime",
        ),
        (
            operator("LeakyRelu", "constraints = ['attribute alpha in 0.5']"),
            "y = LeakyRelu <alpha: float = 0.25> (x)",
            "LeakyRelu: attribute alpha is 0.25, and Some Runtime takes 0.5",
        ),
        (operator("LeakyRelu", "constraints = ['attribute alpha in 0.01']"), "y = LeakyRelu(x)", None),
        (
            operator("MaxPool", "constraints = ['attribute kernel_shape in 2 2']"),
            "y = MaxPool <kernel_shape = [3, 3]> (x)",
            "MaxPool: attribute kernel_shape is 3 3, and Some Runtime takes 2 2",
        ),
        (
            operator("MaxPool", "constraints = ['attribute strides in 2 2']"),
            "y = MaxPool <kernel_shape = [3, 3]> (x)",
            "MaxPool: attribute strides is not set, and Some Runtime takes 2 2",
        ),
        (operator("com.microsoft.Gelu", ""), "y = com.microsoft.Gelu(x)", None),
        (operator("Gelu", ""), "y = com.microsoft.Gelu(x)", "Some Runtime has no com.microsoft.Gelu"),
    ],
)  # fmt: skip
def test_reasons(operators: str, body: str, reason: str | None):
    assert [told for _, told in reasons(operators, body)] == ([] if reason is None else [reason])


def test_types_that_the_runtime_converts_fit_where_it_computes():
    relu = operator("Relu", "inputs = { 0 = ['float32'] }")
    assert reasons(relu, RELU, inputs="bfloat16[2] x") == []
    assert reasons(relu, RELU, inputs="float16[2] x") != []


def test_what_is_not_known_fits_except_where_shapes_must_be_known():
    unknown = operator("Relu", "constraints = ['rank 0 in 2', 'scalar 0', 'multiple 0 0 4']")
    assert reasons(unknown, RELU, inputs="float[] x") == []
    static = operator("Relu", "constraints = ['static']")
    assert reasons(static, RELU, inputs="float[n,4] x") == [
        ("Relu->y", "Relu: the shape of 'x' must be known for Some Runtime")
    ]


def test_types_of_inner_values_are_inferred():
    table = operator("Relu", "inputs = { 0 = ['float32'] }") + operator("Cast", "")
    assert [node for node, _ in reasons(table, "h = Cast <to = 7> (x) y = Relu(h)")] == ["Relu->y"]


def test_an_opset_that_the_runtime_does_not_know():
    assert reasons(operator("Relu", ""), RELU, opset=22) == [
        ("Relu->y", "Some Runtime of 1.2 knows opsets up to 21, not 22")
    ]


def test_constants_are_no_nodes_and_count_as_constant():
    table = operator("Add", "constraints = ['constant 1']")
    assert reasons(table, "c = Constant <value = float[1] {1.0}> () y = Add(x, c)") == []


def test_nodes_of_subgraphs_count():
    branches = "then_branch = t () => (o) { o = Relu(x) }, else_branch = e () => (p) { p = Abs(x) }"
    body = f"c = Constant <value_ints = [1]> () b = Cast <to = 9> (c) y = If(b) <{branches}>"
    found = reasons(operator("If", "") + operator("Cast", "") + operator("Abs", "since = 13"), body)
    assert found == [("Relu->o", "Some Runtime has no Relu")]


def test_a_node_that_is_in_no_graph_yet():
    table = capabilities.parse(TABLE + operator("Relu", "since = 13\ninputs = { 0 = ['int8'] }"), "some")
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [value])
    assert refusal(node, table) == "Relu: input 0 is float32, and Some Runtime takes int8"
    assert refusal(node, table, opsets={"": 12}) == "Relu: opset 12, and Some Runtime takes from 13"


def test_an_operator_that_is_yet_to_be_written():
    entry = "inputs = { 0 = ['float32'], 1 = ['int8'] }\nconstraints = ['attribute bits in 2, 4']"
    table = capabilities.parse(TABLE + operator("com.microsoft.Some", entry), "some")
    types = (ir.DataType.FLOAT, ir.DataType.INT8)
    assert refusal_of("com.microsoft.Some", types, table, {"bits": 4}) is None
    assert refusal_of("com.microsoft.Some", (None, None), table, {"bits": 4}) is None
    told = refusal_of("com.microsoft.Some", types, table, {"bits": 3})
    assert told == "com.microsoft.Some: attribute bits is 3, and Some Runtime takes 2, 4"
    assert refusal_of("com.microsoft.Other", types, table) == "Some Runtime has no com.microsoft.Other"
