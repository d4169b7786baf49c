"""Operators on arrays against onnx's reference implementation, and what is left uncomputed on purpose."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qgraph.numerics import operators

F = np.array([[1.5, -2.5, 0.0], [4.0, 0.25, -7.75]], dtype=np.float32)
G = np.array([[2.0, 0.5, -1.0]], dtype=np.float32)
I = np.array([[7, -7, 0], [9, 2, -5]], dtype=np.int64)  # noqa: E741 - integers
J = np.array([2, -3, 4], dtype=np.int64)
T = np.array([[True, False, True], [False, False, True]])


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


CASES = [
    *[(name, {}, [F]) for name in ("Abs", "Ceil", "Cos", "Exp", "Floor", "Identity", "IsNaN", "Neg", "Relu", "Round")],
    *[(name, {}, [F]) for name in ("Sign", "Sin", "Tanh", "Size", "Shape", "NonZero", "Transpose", "Flatten")],
    *[(name, {}, [np.abs(F) + 1]) for name in ("Log", "Reciprocal", "Sqrt")],
    *[(name, {}, [F, G]) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Equal", "Greater", "Less")],
    *[(name, {}, [F, G]) for name in ("GreaterOrEqual", "LessOrEqual")],
    *[(name, {}, [T, T[:1]]) for name in ("And", "Or", "Xor")],
    ("Not", {}, [T]),
    ("Where", {}, [T, F, G]),
    ("Add", {}, [I, J]),
    ("Mod", {}, [I, J]),
    ("Mod", {"fmod": 1}, [F, G]),
    ("Pow", {}, [np.abs(F), G]),
    ("Pow", {}, [I, np.array(2, dtype=np.int64)]),
    ("MatMul", {}, [F, F.T.copy()]),
    ("Cast", {"to": 7}, [F]),
    ("Cast", {"to": 10}, [F]),
    ("Cast", {"to": 1}, [I]),
    ("Cast", {"to": 9}, [F]),
    ("CastLike", {}, [F, I]),
    ("Clip", {}, [F, np.float32(-1), np.float32(2)]),
    ("Concat", {"axis": -1}, [F, F]),
    ("ConstantOfShape", {"value": np.array([3], dtype=np.int32)}, [ints(2, 3)]),
    ("CumSum", {}, [F, np.array(1, dtype=np.int64)]),
    ("Expand", {}, [G, ints(2, 1, 3)]),
    ("Gather", {"axis": 1}, [F, ints(2, -1, 0)]),
    ("GatherElements", {"axis": 1}, [F, np.array([[0, 2], [1, -1]])]),
    ("GatherND", {}, [F, np.array([[0, 2], [1, 1]])]),
    ("ScatterND", {}, [F, np.array([[0, 2], [1, 1]]), np.array([8, 9], dtype=np.float32)]),
    ("Pad", {}, [F, ints(0, 1, 2, 0), np.float32(5)]),
    ("Range", {}, [np.array(3), np.array(-8), np.array(-3)]),
    ("Range", {}, [np.float32(0), np.float32(2), np.float32(0.3)]),
    ("ReduceMax", {"keepdims": 0}, [F, ints(1)]),
    ("ReduceMean", {}, [F]),
    ("ReduceMin", {}, [F, ints(-2)]),
    ("ReduceProd", {}, [I, ints(0)]),
    ("ReduceSum", {"keepdims": 0}, [F, ints(0, 1)]),
    ("ArgMax", {"axis": 1, "keepdims": 0}, [F]),
    ("ArgMin", {}, [F]),
    ("Reshape", {}, [F, ints(0, -1, 1)]),
    ("Reshape", {"allowzero": 1}, [F[:0], ints(0, 5)]),
    ("Shape", {"start": 1}, [F]),
    ("Slice", {}, [F, ints(0), ints(9), ints(1), ints(2)]),
    ("Slice", {}, [F, ints(-1, 5), ints(-9, -9), ints(1, 0), ints(-1, -1)]),
    ("Slice", {}, [F, ints(1, 1), ints(2, -1)]),
    ("Split", {"axis": 1}, [F, ints(1, 2)]),
    ("Squeeze", {}, [G, ints(0)]),
    ("Squeeze", {}, [G]),
    ("Tile", {}, [G, ints(2, 3)]),
    ("Transpose", {"perm": [1, 0]}, [F]),
    ("Trilu", {"upper": 0}, [F, np.array(-1)]),
    ("Unsqueeze", {}, [F, ints(0, -1)]),
    ("Flatten", {"axis": 0}, [F]),
]


@pytest.mark.parametrize(
    ("op_type", "attributes", "inputs"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_the_reference_computes_the_same(op_type: str, attributes: dict, inputs: list[np.ndarray]):
    outputs = ["y0", "y1"][: 2 if op_type == "Split" else 1]
    names = [f"x{index}" for index in range(len(inputs))]
    values = {k: onnx.numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in attributes.items()}
    node = helper.make_node(op_type, names, outputs, **values)
    types = [helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype) for array in inputs]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, types, strict=True)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    expected = ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))

    found = operators.evaluate(op_type, attributes, [np.asarray(array) for array in inputs])

    for one, other in zip(expected, found, strict=True):
        assert np.asarray(one).dtype == other.dtype
        np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-6)


def test_integers_divide_towards_zero():
    """The reference implementation rounds down here; the specification, and runtimes, cut off as C does."""
    (found,) = operators.evaluate("Div", {}, [I, J])
    np.testing.assert_array_equal(found, [[3, 2, 0], [4, 0, -1]])


def test_old_forms_take_attributes():
    for op_type, attributes, expected in [
        ("Slice", {"axes": [1], "starts": [1], "ends": [3]}, F[:, 1:3]),
        ("Unsqueeze", {"axes": [0]}, F[None]),
        ("ReduceSum", {"axes": [0], "keepdims": 0}, F.sum(0)),
        ("Clip", {"min": -1.0}, np.maximum(F, -1)),
        ("Pad", {"pads": [1, 0, 0, 0], "value": 2.0}, np.pad(F, [(1, 0), (0, 0)], constant_values=2)),
    ]:
        np.testing.assert_allclose(operators.evaluate(op_type, attributes, [F])[0], expected)


@pytest.mark.parametrize(
    ("op_type", "attributes", "inputs"),
    [
        ("RandomNormal", {"shape": [2]}, []),
        ("QuantizeLinear", {}, [F, np.float32(1)]),
        ("Div", {}, [I, I]),
        ("Mod", {}, [I, I]),
        ("Cast", {"to": 3}, [F * 100]),
        ("Cast", {"to": 7}, [F + np.inf]),
        ("Cast", {"to": 8}, [F]),
        ("Cast", {}, [F]),
        ("Gather", {}, [F, ints(5)]),
        ("Reshape", {}, [F, ints(7)]),
        ("Concat", {"axis": 3}, [F]),
        ("Add", {}, [F, np.zeros(5, np.float32)]),
        ("ScatterND", {"reduction": "add"}, [F, np.array([[0]]), F[:1]]),
        ("ArgMax", {"select_last_index": 1}, [F]),
        ("ReduceMean", {}, [I]),
        ("Pad", {"mode": "reflect"}, [F, ints(1, 0, 0, 0)]),
    ],
)  # fmt: skip
def test_what_is_not_defined_is_not_computed(op_type: str, attributes: dict, inputs: list[np.ndarray]):
    with pytest.raises(operators.NotFoldedError):
        operators.evaluate(op_type, attributes, inputs)
