"""Symbolic sizes, and what is inferred from them where real models do not reach."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.analysis import symbols
from qgraph.analysis.shapes import Shapes

B, S = symbols.symbol("batch"), symbols.symbol("seq")


def test_sizes_that_are_written_the_same_are_equal():
    assert symbols.product([B, S, 384]) == symbols.product([12, 32, S, B])
    assert symbols.sub(symbols.add(S, 5), S) == 5
    assert symbols.floordiv(symbols.product([B, S, 384]), symbols.mul(B, 12)) == symbols.mul(S, 32)
    assert str(symbols.floordiv(symbols.add(S, 1), 2)) == "floor((seq+1)/(2))"
    assert str(symbols.add(symbols.mul(S, 2), -3)) == "2*seq-3"
    assert symbols.floordiv(S, 0) is None
    assert symbols.minimum(S, 512) == symbols.minimum(512, S)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (1, S, S),
        (S, 1, S),
        (7, S, 7),
        (S, S, S),
        (symbols.minimum(S, 512), S, S),
        (symbols.minimum(S, 1), S, symbols.symbol("broadcast(min(1,seq),seq)")),
        (B, S, symbols.symbol("broadcast(batch,seq)")),
    ],
)
def test_broadcasting(one: symbols.Dim, other: symbols.Dim, expected: symbols.Dim):
    assert symbols.broadcast(one, other) == symbols.broadcast(other, one) == expected


def test_nothing_blows_up():
    size: symbols.Dim = symbols.add(B, S)
    for _ in range(200):
        size = symbols.mul(size, symbols.add(size, 1))
    assert len(str(size)) < 5000
    number: symbols.Dim = 10
    for _ in range(100):
        number = symbols.mul(number, number)
    assert not isinstance(number, int)


def shapes_of(text: str, opset: int = 17) -> dict[str, str]:
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    shapes = Shapes(model).run()
    values = [value for node in model.graph for value in node.outputs]
    return {v.name or "": f"[{','.join(map(str, shapes.dims(v) or ['none']))}]" for v in values}


@pytest.mark.parametrize(
    ("expression", "shape"),
    [
        ("Slice(x, c1, cmax, c1)", "[batch,max(0,seq-1),8]"),
        ("Slice(x, c0, cm1, c1)", "[batch,max(0,seq-1),8]"),
        ("Slice(x, cm1, cmax, c1)", "[batch,min(1,seq),8]"),
        ("Slice(x, c0, c2, c1)", "[batch,min(2,seq),8]"),
        ("Flatten(x)", "[batch,8*seq]"),
        ("Tile(x, t)", "[batch,2*seq,24]"),
        ("Pad(x, p)", "[batch,seq+3,8]"),
        ("Concat<axis = 1>(x, x)", "[batch,2*seq,8]"),
        ("ReduceMean<axes = [-1], keepdims = 0>(x)", "[batch,seq]"),
        ("NonZero(x)", "[3,y.1]"),
        ('Einsum<equation = "bsd,btd->bst">(x, x)', "[batch,seq,seq]"),
        ("TopK(x, c2)", "[batch,seq,2]"),
        ("OneHot(i, c2, v)", "[batch,2]"),
        ("MatMul(x, w)", "[batch,seq,3]"),
        ("GatherND(x, n)", "[4,8]"),
        ("Resize(x, , r)", "[batch,2*seq,4]"),
        ("CumSum(x, c1)", "[batch,seq,8]"),
        ("Det(q)", "[batch]"),  # by onnx itself
    ],
)
def test_rules(expression: str, shape: str):
    text = f"""g (float[batch,seq,8] x, int64[batch] i, float[batch,4,4] q) => (float[a] z)
    <int64[1] c0 = {{0}}, int64[1] c1 = {{1}}, int64[1] c2 = {{2}}, int64[1] cm1 = {{-1}},
     int64[1] cmax = {{9223372036854775807}}, int64[3] t = {{1,2,3}}, int64[6] p = {{0,1,0,0,2,0}},
     float[8,3] w = {{{",".join(["1.0"] * 24)}}}, float[3] r = {{1.0,2.0,0.5}}, float[2] v = {{0.0,1.0}},
     int64[4,2] n = {{0,0,0,0,0,0,0,0}}> {{ y = {expression} z = Identity(i) }}"""
    assert shapes_of(text)["y"] == shape


def test_a_shape_that_changes_in_a_loop_is_not_believed():
    text = """g (float[n,4] x, int64 k, bool c) => (float[a,4] y, float[n,4] z) {
        y, z = Loop (k, c, x, x) <body = b (int64 i, bool e, float[p,4] u, float[n,4] v)
            => (bool f, float[q,4] u2, float[n,4] v2) {
            f = Identity (e) u2 = Concat <axis = 0> (u, v) v2 = Neg (v) }>
    }"""
    found = shapes_of(text)
    assert found["y"] != "[n,4]"
    assert "n" not in found["y"].replace("none", "")


def test_sizes_that_a_file_claims_in_between_are_not_believed():
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17, "my" : 1]>\n'
        "g (float[n,4] x) => (float[n,4] y, int64[2] s) <float[1,4] a, float[7,7] b>"
        "{ a = Abs(x) b = my.op(x) s = Shape(b) y = Neg(a) }"
    )
    shapes = Shapes(model).run()
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert [str(dim) for dim in shapes.dims(values["a"]) or ()] == ["n", "4"]
    assert [str(dim) for dim in shapes.dims(values["b"]) or ()] == ["b.0", "b.1"], "its rank at most"
    assert shapes.array(values["s"]) is None
    assert "not a standard operator" in shapes.reasons[values["b"]]


def test_a_name_that_is_a_sum_is_read_as_one():
    past = symbols.symbol("past")
    assert symbols.declared("past + seq") == symbols.add(past, S) == symbols.declared("seq+past")
    assert symbols.declared("seq + 1") == symbols.add(S, 1)
    assert symbols.declared("past") == past
    for name in ("a + b*c", "a + ", "max(a,b) + c", "a - b"):
        assert symbols.declared(name) == symbols.symbol(name)


def test_equal_sizes_cancel_before_dividing():
    total = symbols.add(B, S)
    assert symbols.quotient([B, 2, symbols.mul(S, 3), total], [total, 6, B]) == S
    assert symbols.quotient([total, 4], [S]) is None
    assert symbols.quotient([S], [0]) is None


def test_the_rows_behind_a_cache_are_the_new_ones():
    model = ir.Model(
        ir.Graph([], [], nodes=[], name="g", opset_imports={"": 17}),
        ir_version=8,
    )
    mask = ir.Value(name="mask", shape=ir.Shape(["batch", "past + seq"]), type=ir.TensorType(ir.DataType.INT64))
    past = ir.Value(name="cache", shape=ir.Shape(["batch", "past"]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.extend([mask, past])
    begin = ir.node("Shape", [past], {"start": 1, "end": 2})
    ends = [
        qgraph.ir.initializer(model.graph, name, np.array([size])) for name, size in (("end", 2**63 - 1), ("axis", 1))
    ]
    new = ir.node("Slice", [mask, begin.outputs[0], *ends])
    model.graph.extend([begin, new])
    assert Shapes(model).run().dims(new.outputs[0]) == (B, S)
