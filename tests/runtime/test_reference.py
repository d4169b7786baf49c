"""The reference executor against ONNX Runtime, operator by operator, bit for bit; and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.errors import UserError
from qgraph.runtime.reference import ReferenceSession
from qgraph.runtime.session import open_session

RANDOM = np.random.default_rng(0)
TYPES = {"u8": np.uint8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "b": np.bool_}


def numbers(dtype: str, *shape: int, low: int | None = None, high: int | None = None) -> np.ndarray:
    """Return random integers of any size that their sums and products allow."""
    if dtype == "b":
        return RANDOM.integers(0, 2, shape).astype(bool)
    limits = np.iinfo(TYPES[dtype])
    bound = {"i32": 30_000, "i64": 1 << 31}.get(dtype, limits.max)
    least = max(limits.min, -bound) if low is None else low
    return RANDOM.integers(least, bound if high is None else high, shape, endpoint=True).astype(TYPES[dtype])


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def model_of(
    op_type: str, attributes: Mapping[str, Any], inputs: Sequence[np.ndarray | None], outputs: int
) -> ir.Model:
    values = [
        None
        if array is None
        else ir.Value(
            name=f"input{index}",
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape([f"n{index}_{axis}" for axis in range(array.ndim)]),
        )
        for index, array in enumerate(inputs)
    ]
    node = ir.node(op_type, values, attributes, num_outputs=outputs)
    for index, value in enumerate(node.outputs):
        value.name = f"output{index}"
    present = [value for value in values if value is not None]
    constants = present[1:] if op_type == "Resize" else []  # ONNX's inference wants to know them
    for value in constants:
        value.const_value = ir.tensor(inputs[values.index(value)], name=value.name)
    inputs = [value for value in present if value not in constants]
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=constants, opset_imports={"": 21}, name="main")
    return ir.Model(graph, ir_version=10)


def same(op_type: str, inputs: Sequence[np.ndarray | None], attributes: Mapping[str, Any], outputs: int = 1) -> None:
    model = model_of(op_type, attributes, inputs, outputs)
    feeds = {value.name: inputs[int(value.name[-1])] for value in model.graph.inputs}
    found = ReferenceSession(model).run(None, feeds)
    for value, array in zip(model.graph.outputs, found, strict=True):
        value.dtype = ir.DataType.from_numpy(array.dtype)
    session = open_session(ir.to_proto(model).SerializeToString(), threads=1)
    for expected, array in zip(session.run(None, feeds), found, strict=True):
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape), (op_type, attributes)
        np.testing.assert_array_equal(array, expected, err_msg=f"{op_type} {attributes}")


ALL = ("u8", "i8", "i16", "i32", "i64")
ELEMENTWISE = {
    "Add": ALL, "Sub": ("i8", "i16", "i32", "i64"), "Mul": ALL, "Max": ("u8", "i8", "i32"), "Min": ("u8", "i8", "i32"),
    "Equal": (*ALL, "b"), "Greater": ALL, "Less": ALL, "GreaterOrEqual": ALL, "LessOrEqual": ALL,
    "And": ("b",), "Or": ("b",), "Xor": ("b",),
}  # fmt: skip
SMALL = {"Add": 60, "Sub": 60, "Mul": 11}


@pytest.mark.parametrize(("op_type", "dtype"), [(op, dtype) for op, types in ELEMENTWISE.items() for dtype in types])
def test_two_operands(op_type: str, dtype: str):
    high = SMALL.get(op_type) if dtype in ("u8", "i8") else 127 if dtype == "i16" else None
    low = None if high is None else 0 if dtype == "u8" else -high
    for one, other in [((3, 4), (3, 4)), ((2, 3, 4), (3, 1)), ((), (5,)), ((2, 1, 3), (4, 1))]:
        same(op_type, [numbers(dtype, *one, low=low, high=high), numbers(dtype, *other, low=low, high=high)], {})


@pytest.mark.parametrize("dtype", ["i32", "i64"])
def test_division_and_remainder(dtype: str):
    for op_type in ("Div", "Mod"):
        same(op_type, [numbers(dtype, 40, low=0), numbers(dtype, 3, 40, low=1, high=99)], {})


@pytest.mark.parametrize("dtype", ["i8", "i16", "i32", "i64"])
def test_one_operand(dtype: str):
    for op_type in ("Abs", "Neg", "Sign", "Identity"):
        same(op_type, [numbers(dtype, 3, 50, low=-100, high=100)], {})


def test_truth():
    same("Not", [numbers("b", 3, 7)], {})
    for dtype in ("u8", "i8", "i32", "i64"):
        same("Where", [numbers("b", 3, 1), numbers(dtype, 3, 4), numbers(dtype, 4)], {})


@pytest.mark.parametrize("dtype", ["u8", "i8", "i32"])
def test_clip(dtype: str):
    x, low, high = numbers(dtype, 60), np.array(3, TYPES[dtype]), np.array(90, TYPES[dtype])
    for inputs in ([x, low, high], [x, None, high], [x, low]):
        same("Clip", inputs, {})


def test_casts():
    for one, other in itertools.product(TYPES, repeat=2):
        same("Cast", [numbers(one, 50, low=0, high=100)], {"to": ir.DataType.from_numpy(np.dtype(TYPES[other]))})
        same("CastLike", [numbers(one, 50, low=0, high=100), numbers(other, 1)], {})


def test_bits():
    x = RANDOM.integers(0, 1 << 62, 50).astype(np.uint64)
    for direction in ("LEFT", "RIGHT"):
        same("BitShift", [x, RANDOM.integers(0, 63, (3, 50)).astype(np.uint64)], {"direction": direction})
    for op_type in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
        same(op_type, [x, x[::-1].copy()], {})


@pytest.mark.parametrize("dtype", ["i32", "i64"])
def test_sums(dtype: str):
    x = numbers(dtype, 3, 4, 5)
    for axes, keep in itertools.product((None, ints(1), ints(0, -1)), (0, 1)):
        same("ReduceSum", [x] if axes is None else [x, axes], {"keepdims": keep})
    same("ReduceSum", [x, ints()], {"noop_with_empty_axes": 1})
    for axis, exclusive, reverse in itertools.product((0, -1), (0, 1), (0, 1)):
        same("CumSum", [x, np.array(axis)], {"exclusive": exclusive, "reverse": reverse})


@pytest.mark.parametrize("dtype", ["u8", "i8", "i32"])
def test_extremes(dtype: str):
    x = numbers(dtype, 3, 4, 5, low=0, high=6)
    for axes, keep in itertools.product((None, ints(1), ints(0, -1)), (0, 1)):
        for op_type in ("ReduceMax", "ReduceMin"):
            same(op_type, [x] if axes is None else [x, axes], {"keepdims": keep})
    for axis, keep, last in itertools.product((0, -1), (0, 1), (0, 1)):
        for op_type in ("ArgMax", "ArgMin"):
            same(op_type, [x], {"axis": axis, "keepdims": keep, "select_last_index": last})


@pytest.mark.parametrize("dtype", ALL)
def test_moves(dtype: str):
    x = numbers(dtype, 2, 3, 4)
    for inputs, op_type, attributes in [
        ([x, np.array([[2, -1], [0, 1]])], "Gather", {"axis": 1}),
        ([x, np.array(1)], "Gather", {"axis": -1}),
        ([x, RANDOM.integers(0, 3, (2, 2, 4))], "GatherElements", {"axis": 1}),
        ([x, x, x], "Concat", {"axis": -2}),
        ([x, ints(0, -1)], "Reshape", {}),
        ([x, ints(4, 6)], "Reshape", {}),
        ([x], "Transpose", {}),
        ([x], "Transpose", {"perm": [1, 2, 0]}),
        ([x[:, :1], ints(1)], "Squeeze", {}),
        ([x, ints(0, -1)], "Unsqueeze", {}),
        ([x], "Flatten", {"axis": 2}),
        ([x, ints(0), ints(9), ints(2), ints(2)], "Slice", {}),
        ([x, ints(-1, 5), ints(-9, -9), ints(1, 0), ints(-1, -1)], "Slice", {}),
        ([x[:, :1], ints(2, 3, 1)], "Expand", {}),
        ([x, ints(1, 2, 3)], "Tile", {}),
        ([x], "Shape", {"start": 1}),
        ([x], "Size", {}),
    ]:
        same(op_type, inputs, attributes)
    same("Split", [x, ints(1, 3)], {"axis": 2}, outputs=2)
    same("Split", [x], {"axis": 1, "num_outputs": 2}, outputs=2)


def test_made_from_shapes():
    same("ConstantOfShape", [ints(2, 3)], {"value": ir.tensor(np.array([7], np.int32))})
    for dtype in ("i16", "i32", "i64"):
        same("Range", [np.array(number, TYPES[dtype]) for number in (3, -8, -3)], {})
    for upper in (0, 1):
        same("Trilu", [numbers("i64", 2, 4, 5), np.array(-1)], {"upper": upper})


@pytest.mark.parametrize("dtype", ["u8", "i8", "i32", "i64"])
def test_pad(dtype: str):
    x = numbers(dtype, 2, 4, 5)
    for mode, pads in itertools.product(("constant", "edge", "reflect"), [(0, 1, 2, 0, 3, 1), (0, 0, 1, 0, 0, 3)]):
        same("Pad", [x, ints(*pads)], {"mode": mode})
        same("Pad", [x, ints(pads[2], pads[1], pads[5], pads[4]), None, ints(2, -2)], {"mode": mode})
    same("Pad", [x, ints(0, 1, -2, 0, -1, 1), np.array(7, TYPES[dtype])], {})


@pytest.mark.parametrize("dtype", ["u8", "i8"])
def test_depth_and_space(dtype: str):
    try:
        for mode in ("DCR", "CRD"):
            same("DepthToSpace", [numbers(dtype, 2, 12, 2, 3)], {"blocksize": 2, "mode": mode})
        same("SpaceToDepth", [numbers(dtype, 2, 3, 4, 6)], {"blocksize": 2})
    except UserError as error:
        pytest.skip(f"this ONNX Runtime lacks the kernel: {error}")


COORDINATES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("nearest", NEAREST)
def test_resize(coordinates: str, nearest: str):
    x = numbers("u8", 1, 2, 5, 7)
    modes = {"coordinate_transformation_mode": coordinates, "nearest_mode": nearest, "mode": "nearest"}
    for sizes in [(10, 14), (3, 4), (1, 1), (7, 5), (5, 21), (25, 2), (9, 12), (11, 6)]:
        same("Resize", [x, None, None, ints(1, 2, *sizes)], modes)
        same("Resize", [x, None, None, ints(*sizes)], {**modes, "axes": [2, 3]})
    for scales in [(2, 2), (3, 0.5), (1.3, 0.7), (2.6, 1 / 3), (1.5, 2.5), (0.2, 0.15), (1, 4)]:
        same("Resize", [x, None, np.array([1, 1, *scales], np.float32)], modes)
        same("Resize", [x, None, np.array(scales[::-1], np.float32)], {**modes, "axes": [-1, -2]})


POOLS = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 3], "ceil_mode": 1},
    {"kernel_shape": [2, 3], "strides": [3, 2], "pads": [0, 1, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "dilations": [2, 3], "strides": [1, 2]},
    {"kernel_shape": [2, 2], "dilations": [3, 2], "pads": [1, 1, 0, 1], "ceil_mode": 1, "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [2, 4], "strides": [2, 3], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "VALID"},
]


@pytest.mark.parametrize("dtype", ["u8", "i8"])
@pytest.mark.parametrize("attributes", POOLS)
def test_max_pool(dtype: str, attributes: Mapping[str, Any]):
    for sizes in [(7, 8), (6, 9), (11, 5)]:
        same("MaxPool", [numbers(dtype, 2, 3, *sizes)], attributes)


def test_max_pool_along_one_axis():
    for ceil, size in itertools.product((0, 1), range(5, 12)):
        same("MaxPool", [numbers("i8", 2, 3, size)], {"kernel_shape": [3], "strides": [4], "ceil_mode": ceil})
        pads = {"pads": [1, 1], "ceil_mode": ceil}
        same("MaxPool", [numbers("u8", 2, 3, size)], {"kernel_shape": [2], "strides": [3], **pads})


CONVOLUTIONS = [
    ((1, 4, 6, 7), (6, 4, 3, 3), {}),
    ((2, 4, 6, 7), (6, 2, 3, 2), {"group": 2, "pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ((1, 4, 9, 9), (8, 1, 3, 3), {"group": 4, "pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    ((1, 3, 8, 8), (3, 1, 3, 3), {"group": 3, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((1, 3, 8, 7), (2, 3, 2, 2), {"auto_pad": "SAME_LOWER", "strides": [3, 2]}),
    ((1, 3, 8, 8), (2, 3, 3, 3), {"auto_pad": "VALID"}),
    ((1, 5, 1, 1), (7, 5, 1, 1), {}),
    ((2, 4, 11), (6, 4, 3), {"pads": [1, 2], "strides": [2]}),
    ((2, 4, 11), (4, 1, 5), {"group": 4, "pads": [4, 0], "dilations": [2]}),
    ((1, 2, 4, 5, 6), (3, 2, 2, 2, 3), {"pads": [1, 0, 1, 0, 1, 0]}),
]


@pytest.mark.parametrize(("x", "w", "attributes"), CONVOLUTIONS)
@pytest.mark.parametrize("dtype", ["u8", "i8"])
def test_convolution(x: tuple[int, ...], w: tuple[int, ...], attributes: Mapping[str, Any], dtype: str):
    data, weight = numbers(dtype, *x), numbers("i8", *w)
    same("ConvInteger", [data, weight], attributes)
    same("ConvInteger", [data, weight, numbers(dtype)], attributes)
    same("ConvInteger", [data, weight, numbers(dtype), np.array(0, np.int8)], attributes)


@pytest.mark.parametrize("a", ["u8", "i8"])
@pytest.mark.parametrize("b", ["u8", "i8"])
def test_products_of_eight_bits(a: str, b: str):
    for one, other in [
        ((3, 5), (5, 4)),
        ((2, 3, 5), (5, 4)),
        ((2, 1, 3, 5), (3, 5, 4)),
        ((5,), (5, 4)),
        ((3, 5), (5,)),
    ]:
        x, y = numbers(a, *one), numbers(b, *other)
        same("MatMulInteger", [x, y], {})
        same("MatMulInteger", [x, y, numbers(a), numbers(b)], {})
    same("MatMulInteger", [numbers(a, 3, 5), numbers(b, 5, 4), numbers(a), numbers(b, 4)], {})


def test_products_of_32_bits():
    for one, other in [((3, 5), (5, 4)), ((2, 3, 5), (5, 4)), ((2, 1, 3, 5), (3, 5, 4))]:
        same("MatMul", [numbers("i32", *one, low=-9999, high=9999), numbers("i32", *other, low=-9999, high=9999)], {})


@pytest.mark.parametrize("dtype", ["u8", "i8", "i16"])
def test_both_ends(dtype: str):
    halves = (np.arange(-40, 40, dtype=np.float32) / 2 * np.float32(0.25)).reshape(4, 20)
    x = np.concatenate([halves, RANDOM.normal(size=(4, 20)).astype(np.float32) * 30])
    for scale in (np.array(0.25, np.float32), RANDOM.uniform(0.01, 0.3, 20).astype(np.float32)):
        zero_point = np.full(scale.shape, 0 if dtype == "i16" else 3, TYPES[dtype])
        same("QuantizeLinear", [x, scale, zero_point], {"axis": 1})
        same("DequantizeLinear", [numbers(dtype, 8, 20), scale, zero_point], {"axis": 1})
    same("DequantizeLinear", [numbers("i32", 8, 20) * 60_000, np.array(0.37, np.float32)], {})


MODEL = """
<ir_version: 10, opset_import: ["" : 21, "qgraph" : 1, "other" : 1]>
g (bool flag, int8[2, N] x) => (int8[2, N] y, int32[2, N] z)
<int32 multiplier = {{1073741824}}, int32 shift = {{31}}, int8 zero = {{1}}, int8 low = {{-100}}, int8 high = {{100}}>
{{
    wide = Cast <to = 6> (x)
    y = qgraph.Requantize:{rounding} <rounding = "{rounding}"> (wide, multiplier, shift, zero, low, high)
    z = If (flag) <
        then_branch = then () => (int32[2, N] a) {{ a = other.Twice (wide) }},
        else_branch = else () => (int32[2, N] b) {{ three = Constant <value = int32 {{3}}> () b = Mul (wide, three) }}
    >
}}
<domain: "other", opset_import: ["" : 21]>
Twice (x) => (y) {{ y = Add (x, x) }}
"""


def small_model(rounding: str = "half") -> ir.Model:
    return ir.from_onnx_text(MODEL.format(rounding=rounding).replace(":half", "").replace('"half"', '"half-up"'))


def test_functions_branches_and_the_trace():
    session = ReferenceSession(small_model())
    x = np.array([[3, 4, -3], [-128, 127, 0]], np.int8)
    y, z = session.run(None, {"flag": np.array(True), "x": x})
    assert y.tolist() == [[3, 3, 0], [-63, 65, 1]]
    assert z.tolist() == [[6, 8, -6], [-256, 254, 0]]
    (other,) = session.run(["z"], {"flag": np.array(False), "x": x})
    assert other.tolist() == [[9, 12, -9], [-384, 381, 0]]
    assert list(session.trace({"flag": np.array(True), "x": x})) == ["flag", "x", "wide", "y", "a", "z"]
    assert list(session.trace({"flag": np.array(False), "x": x})) == ["flag", "x", "wide", "y", "three", "b", "z"]


@pytest.mark.parametrize(
    ("feeds", "outputs", "message"),
    [
        ({}, None, "there is no array for input 'flag'"),
        ({"flags": np.array(True)}, None, "the model has no input 'flags'. Did you mean 'flag'?"),
        (
            {"flag": np.array(True), "x": np.zeros((2, 1), np.uint8)},
            None,
            "input 'x' is of int8, and its array of uint8",
        ),
        ({"flag": np.array(True), "x": np.zeros((1, 1), np.int8)}, None, "input 'x' has shape [2,N], which"),
        ({"flag": np.array(True), "x": np.zeros(2, np.int8)}, None, "input 'x' has shape [2,N], which"),
        ({}, ["w"], "the model has no output 'w'."),
    ],
)
def test_feeds_that_do_not_fit(feeds: Mapping[str, np.ndarray], outputs: list[str] | None, message: str):
    with pytest.raises(UserError) as raised:
        ReferenceSession(small_model()).run(outputs, feeds)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("op_type", "inputs", "message"),
    [
        (
            "Sin",
            [np.zeros(2, np.float32)],
            "Sin 'node_Sin_0' cannot be computed: the reference knows no such operator",
        ),
        ("Add", [np.zeros(2, np.float32)] * 2, "it is of float"),
        ("Add", [np.full(2, 100, np.int8)] * 2, "200 to 200 leaves int8"),
        ("Mul", [np.full(2, 1 << 20, np.int32)] * 2, "leaves int32"),
        ("Mul", [np.full(2, 1 << 40)] * 2, "leaves int64"),
        ("ReduceSum", [np.full(3, 1 << 30, np.int32)], "leaves int32"),
        ("MatMulInteger", [np.full((1, 40_000), 255, np.uint8), np.full((40_000, 1), 255, np.uint8)], "leaves int32"),
        ("Div", [np.ones(2, np.int32), np.zeros(2, np.int32)], "integer division by zero"),
        ("Gather", [np.arange(3), np.array(5)], "out of bounds"),
    ],
)
def test_what_is_refused(op_type: str, inputs: list[np.ndarray], message: str):
    session = ReferenceSession(model_of(op_type, {}, inputs, 1))
    with pytest.raises(UserError) as raised:
        session.run(None, {f"input{index}": array for index, array in enumerate(inputs)})
    assert message in str(raised.value)
