"""Every standard operator of integer graphs as C, against ONNX Runtime, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from c_build import Graph, Library, needs_gcc, run_checked, run_onnx, sanitizers

RANDOM = np.random.default_rng(5)
CASES: dict[str, Graph] = {}


def integers(dtype: str, *shape: int, low: int | None = None, high: int | None = None) -> np.ndarray:
    """Return random integers of a type, from all of it by default, but for int32 and int64 from +-1000."""
    wide = dtype in ("int32", "int64")
    limits = np.iinfo(dtype)
    least, most = (-1000, 1000) if wide else (limits.min, limits.max)
    return RANDOM.integers(least if low is None else low, (most if high is None else high) + 1, shape).astype(dtype)


def i64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def scalar(number: int, dtype: str = "int32") -> np.ndarray:
    return np.array(number, dtype)


def case(build: Callable[[], Graph]) -> Callable[[], Graph]:
    CASES[build.__name__.strip("_")] = build()
    return build


def one(name: str, op_type: str, x: np.ndarray, *inputs: object, **attributes: object) -> None:
    """Register a graph of one operator."""
    graph = Graph(x=x)
    CASES[name] = graph.gives(graph.op(op_type, "x", *inputs, **attributes))


def two(name: str, op_type: str, a: np.ndarray, b: np.ndarray, **attributes: object) -> None:
    """Register a graph of one operator of two inputs."""
    graph = Graph(a=a, b=b)
    CASES[name] = graph.gives(graph.op(op_type, "a", "b", **attributes))


# --- elementwise -----------------------------------------------------------------------------------------------------

for _op in ("Add", "Sub", "Mul"):
    for _dtype in ("int32", "int64"):
        two(f"{_op.lower()}_{_dtype}", _op, integers(_dtype, 2, 3, 4), integers(_dtype, 2, 3, 4))
    two(f"{_op.lower()}_broadcast", _op, integers("int32", 2, 3, 1, 4), integers("int32", 5, 1))
two("div", "Div", integers("int32", 30, low=0), integers("int32", 30, low=1, high=9))
two("div_int64", "Div", integers("int64", 30, low=0) << 40, integers("int64", 30, low=1, high=9))
for _op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
    two(_op.lower(), _op, integers("int32", 4, 20, high=-990), integers("int32", 20, high=-990))
for _op in ("And", "Or", "Xor"):
    two(_op.lower(), _op, integers("uint8", 40, high=1).astype(bool), integers("uint8", 40, high=1).astype(bool))
for _op in ("Max", "Min"):
    for _dtype in ("int32", "int64", "uint8", "int8"):
        two(f"{_op.lower()}_{_dtype}", _op, integers(_dtype, 4, 7), integers(_dtype, 7))
for _op in ("Abs", "Neg", "Sign"):
    one(_op.lower(), _op, integers("int32", 50))
one("not", "Not", integers("uint8", 40, high=1).astype(bool))
one("clip", "Clip", integers("int32", 50), scalar(-300), scalar(200))
one("clip_below", "Clip", integers("uint8", 50), None, scalar(200, "uint8"))
for _dtype in ("uint8", "int8"):
    _ends = np.iinfo(_dtype)
    _low, _high = scalar(_ends.min, _dtype), scalar(_ends.max, _dtype)
    one(f"clip_to_all_of_{_dtype}", "Clip", integers(_dtype, 50), _low, _high)
    one(f"max_of_lowest_{_dtype}", "Max", integers(_dtype, 50), _low)
    one(f"min_of_highest_{_dtype}", "Min", integers(_dtype, 50), _high)
    one(f"greater_than_highest_{_dtype}", "Greater", integers(_dtype, 50), _high)
    one(f"less_than_lowest_{_dtype}", "Less", integers(_dtype, 50), _low)
    one(f"at_least_lowest_{_dtype}", "GreaterOrEqual", integers(_dtype, 50), _low)
    one(f"pool_of_{_dtype}", "ReduceMax", integers(_dtype, 5, 50), i64(1))
    one(f"arg_of_{_dtype}", "ArgMin", integers(_dtype, 5, 50), axis=1)
one("greater_than_highest_int32", "Greater", integers("int32", 50), scalar((1 << 31) - 1))
one("clip_crossed", "Clip", integers("int32", 50), scalar(300), scalar(200))
for _to in (ir.DataType.INT8, ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.INT16):
    one(f"cast_to_{_to.name.lower()}", "Cast", integers("int32", 50, low=-100, high=100), to=_to)
one("cast_of_uint8", "Cast", integers("uint8", 50), to=ir.DataType.INT32)


@case
def _where() -> Graph:
    graph = Graph(c=integers("uint8", 3, 1, high=1).astype(bool), a=integers("int32", 3, 5), b=integers("int32", 5))
    return graph.gives(graph.op("Where", "c", "a", "b"))


@case
def _a_chain_with_many_readers() -> Graph:
    graph = Graph(x=integers("uint8", 2, 3, 4, 4), y=integers("int8", 3, 1, 1))
    wide = graph.op("Sub", graph.op("Cast", "x", to=ir.DataType.INT32), scalar(128))
    other = graph.op("Cast", "y", to=ir.DataType.INT32)
    product = graph.op("Mul", wide, other)
    total = graph.op("Add", product, wide)
    low = graph.op("Min", total, product)
    return graph.gives(graph.op("Sub", low, graph.op("Transpose", total, perm=[0, 1, 3, 2])), product)


@case
def _shifts() -> Graph:
    graph = Graph(x=integers("int64", 20, low=0))
    bits = graph.op("Cast", "x", to=ir.DataType.UINT64)
    left = graph.op("BitShift", bits, scalar(5, "uint64"), direction="LEFT")
    right = graph.op("BitShift", left, scalar(7, "uint64"), direction="RIGHT")
    return graph.gives(graph.op("Cast", right, to=ir.DataType.INT64))


# --- moving ----------------------------------------------------------------------------------------------------------

IMAGE = integers("int8", 2, 4, 6, 8)
one("transpose", "Transpose", IMAGE, perm=[0, 3, 1, 2])
one("transpose_all", "Transpose", IMAGE)
one("expand", "Expand", integers("int8", 3, 1), i64(2, 3, 5))
one("tile", "Tile", integers("int8", 2, 3), i64(2, 3))
one("slice", "Slice", IMAGE, i64(1, 0), i64(4, 7), i64(1, -1), i64(1, 2))
one("slice_back", "Slice", IMAGE, i64(-1, 5), i64(-100, 0), i64(2, 3), i64(-1, -2))
one("pad", "Pad", IMAGE, i64(0, 1, 0, 2, 0, 0, 1, 3), scalar(7, "int8"))
one("pad_axes", "Pad", IMAGE, i64(1, 2), None, i64(-1))
one("crop", "Pad", IMAGE, i64(0, 0, -1, 2, 0, 0, -2, -3), scalar(7, "int8"))
one("pad_edge", "Pad", integers("int32", 3, 4), i64(1, 2, 0, 3), mode="edge")
one("pad_reflect", "Pad", integers("int32", 3, 5), i64(1, 4, 2, 3), mode="reflect")
one("pad_wrap", "Pad", integers("int32", 3, 5), i64(1, 4, 2, 3), mode="wrap")
one("trilu_upper", "Trilu", integers("int64", 2, 4, 5), scalar(1, "int64"))
one("trilu_lower", "Trilu", integers("int64", 4, 5), scalar(-1, "int64"), upper=0)

one("gather_slices", "Gather", IMAGE, i64(3, 0, -1, -1), axis=1)
one("gather_one", "Gather", IMAGE, scalar(2, "int64"), axis=3)
one("gather_grid", "Gather", IMAGE, np.array([[1, 2], [-1, 0]]), axis=2)
two("gather_dynamic", "Gather", integers("int8", 4, 5, 3), integers("int64", 2, 3, low=-5, high=4), axis=1)
two("gather_elements", "GatherElements", integers("int32", 4, 5), integers("int64", 4, 2, low=-5, high=4), axis=1)
for _axis in (0, 1):
    _graph = Graph(x=integers("int16", 4, 5), i=integers("int64", 2, 3, low=-4, high=3), u=integers("int16", 2, 3))
    CASES[f"scatter_elements_{_axis}"] = _graph.gives(_graph.op("ScatterElements", "x", "i", "u", axis=_axis))
for _depth, _rest in ((1, (3, 5)), (2, (5,)), (3, ())):
    _places = integers("int64", 2, 3, _depth, low=-3, high=2)
    _graph = Graph(x=integers("uint8", 4, 3, 5), i=_places, u=integers("uint8", 2, 3, *_rest))
    CASES[f"scatter_nd_{_depth}"] = _graph.gives(_graph.op("ScatterND", "x", "i", "u"))
    _graph = Graph(x=integers("int32", 4, 3, 5), u=integers("int32", 2, 3, *_rest))
    _sum = _graph.op("Add", "x", scalar(3))
    _put = _graph.op("ScatterND", _sum, _places, _graph.op("Neg", "u"))
    CASES[f"scatter_nd_known_{_depth}"] = _graph.gives(_graph.op("Abs", _put))
for _mode in ("DCR", "CRD"):
    one(f"depth_to_space_{_mode.lower()}", "DepthToSpace", integers("uint8", 2, 8, 3, 2), blocksize=2, mode=_mode)


for _mode in ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"):
    for _nearest in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
        _how = {"coordinate_transformation_mode": _mode, "nearest_mode": _nearest, "mode": "nearest"}
        _tag = f"{_mode}_{_nearest}"
        _small = integers("int8", 1, 2, 5, 4)
        one(f"resize_{_tag}", "Resize", _small, None, np.array([1, 1, 2, 1.5], np.float32), **_how)
        one(f"resize_to_{_tag}", "Resize", _small, None, None, i64(1, 2, 3, 9), **_how)


@case
def _tables() -> Graph:
    graph = Graph(x=integers("uint8", 2, 30), y=integers("int8", 2, 30), z=integers("int64", 2, 30, low=-4, high=3))
    unsigned = graph.op("Gather", integers("int8", 256), graph.op("Cast", "x", to=ir.DataType.INT32))
    moved = graph.op("Add", graph.op("Cast", "y", to=ir.DataType.INT32), scalar(128))
    signed = graph.op("Gather", integers("int8", 256), moved)
    return graph.gives(unsigned, signed, graph.op("Gather", integers("int64", 4), "z"))


@case
def _concat() -> Graph:
    graph = Graph(a=integers("int8", 2, 3, 4), b=integers("int8", 2, 1, 4))
    parts = graph.op("Concat", "a", "b", graph.op("Max", "a", "b"), "a", axis=1)
    return graph.gives(parts, graph.op("Concat", parts, parts, axis=-1))


@case
def _split() -> Graph:
    graph = Graph(x=integers("int8", 2, 7))
    first = graph.op("Split", "x", i64(2, 4, 1), axis=-1, count=3)
    node = first.producer()
    assert node is not None
    return graph.gives(*node.outputs)


@case
def _views() -> Graph:
    graph = Graph(x=integers("int8", 2, 3, 4))
    flat = graph.op("Flatten", "x", axis=1)
    again = graph.op("Reshape", graph.op("Max", flat, scalar(3, "int8")), i64(4, -1))
    column = graph.op("Unsqueeze", graph.op("Squeeze", graph.op("Unsqueeze", again, i64(0)), i64(0)), i64(1))
    return graph.gives(flat, graph.op("Identity", column), graph.op("Min", column, again))


@case
def _outputs_that_no_kernel_writes() -> Graph:
    graph = Graph(x=integers("int8", 2, 3))
    constant = graph.op("Constant", value=ir.tensor(integers("int32", 4)))
    larger = graph.op("Max", "x", scalar(3, "int8"))
    return graph.gives(graph.op("Identity", "x"), constant, larger, graph.op("Reshape", larger, i64(6)))


@case
def _filled() -> Graph:
    graph = Graph(x=integers("int32", 3, 700))
    zeros = graph.op("ConstantOfShape", i64(3, 700), value=ir.tensor(np.array([4], np.int32)))
    return graph.gives(graph.op("Add", "x", zeros))


# --- reductions ------------------------------------------------------------------------------------------------------

for _op in ("ReduceMax", "ReduceMin", "ReduceSum"):
    one(f"{_op.lower()}_keep", _op, integers("int32", 2, 3, 4, 5), i64(2, 3))
    one(f"{_op.lower()}_drop", _op, integers("int32", 2, 3, 4, 5), i64(1, -1), keepdims=0)
    one(f"{_op.lower()}_all", _op, integers("int32", 2, 3), keepdims=0)
one("reduce_nothing", "ReduceSum", integers("int64", 2, 3), noop_with_empty_axes=1)
one("reduce_max_uint8", "ReduceMax", integers("uint8", 2, 30), i64(1))
for _op in ("ArgMax", "ArgMin"):
    for _last in (0, 1):
        _few = integers("int8", 3, 9, 2, low=-2, high=2)
        one(f"{_op.lower()}_{_last}", _op, _few, axis=1, keepdims=_last, select_last_index=_last)
for _largest in (0, 1):
    for _axis in (0, 1, -1):
        _graph = Graph(x=integers("int8", 3, 9, 2, low=-3, high=3))
        _first = _graph.op("TopK", "x", i64(2), count=2, axis=_axis, largest=_largest)
        _more = _graph.op("Add", _first.producer().outputs[1], scalar(1, "int64"))
        CASES[f"top_k_{_largest}_{_axis % 3}"] = _graph.gives(_first, _more)
for _exclusive in (0, 1):
    for _reverse in (0, 1):
        _how = {"exclusive": _exclusive, "reverse": _reverse}
        one(f"cumsum_{_exclusive}{_reverse}", "CumSum", integers("int32", 3, 4, 2), scalar(1), **_how)
POOLED = integers("uint8", 2, 3, 9, 10)
one("pool", "MaxPool", POOLED, kernel_shape=[2, 2], strides=[2, 2])
one("pool_padded", "MaxPool", POOLED, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
one("pool_ceil", "MaxPool", POOLED, kernel_shape=[3, 2], strides=[3, 4], ceil_mode=1)
one("pool_dilated", "MaxPool", POOLED.view(np.int8), kernel_shape=[2, 3], dilations=[3, 2])
one("pool_same", "MaxPool", POOLED, kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER")
one("pool_lower", "MaxPool", POOLED, kernel_shape=[3, 2], strides=[2, 1], auto_pad="SAME_LOWER")
one("pool_signal", "MaxPool", integers("int8", 2, 3, 9), kernel_shape=[3], strides=[2], pads=[1, 0])


@case
def _reductions_among_others() -> Graph:
    graph = Graph(x=integers("uint8", 2, 3, 4, 5))
    wide = graph.op("Sub", graph.op("Cast", "x", to=ir.DataType.INT32), scalar(100))
    mean = graph.op("Div", graph.op("Max", graph.op("ReduceSum", wide, i64(2, 3)), scalar(0)), scalar(20))
    return graph.gives(graph.op("Add", wide, mean), graph.op("ReduceSum", graph.op("Mul", wide, wide), i64(1)))


# --- products --------------------------------------------------------------------------------------------------------


def convolution(
    name: str, x: np.ndarray, w: np.ndarray, zero: int | None = None, w_zero: int | None = None, **attributes: object
) -> None:
    graph = Graph(x=x)
    zeros = [] if zero is None else [scalar(zero, str(x.dtype))]
    zeros += [] if w_zero is None else [scalar(w_zero, str(w.dtype))]
    y = graph.op("ConvInteger", "x", w, *zeros, **attributes)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    biased = graph.op("Add", y, integers("int32", w.shape[0]).reshape(shape))
    CASES[f"conv_{name}"] = graph.gives(graph.op("Clip", biased, scalar(-30000), scalar(40000)))


convolution("plain", integers("uint8", 1, 3, 8, 8), integers("int8", 5, 3, 3, 3), 128)
convolution("no_zero_point", integers("uint8", 1, 3, 8, 8), integers("int8", 5, 3, 3, 3))
convolution("batch", integers("uint8", 3, 2, 9, 7), integers("int8", 6, 2, 3, 2), 3, pads=[1, 0, 1, 1], strides=[2, 1])
convolution(
    "dilated", integers("uint8", 1, 2, 9, 9), integers("int8", 4, 2, 3, 3), 9, dilations=[2, 3], pads=[2, 3, 2, 3]
)
convolution("groups", integers("uint8", 2, 6, 5, 5), integers("int8", 12, 2, 3, 3), 200, group=3, pads=[1, 1, 1, 1])
convolution("depthwise", integers("uint8", 2, 6, 7, 7), integers("int8", 6, 1, 3, 3), 77, group=6, pads=[1, 1, 1, 1])
convolution("depth_two", integers("uint8", 1, 3, 7, 7), integers("int8", 6, 1, 3, 3), 77, group=3, strides=[2, 2])
convolution("few_filters", integers("uint8", 1, 3, 7, 7), integers("int8", 2, 3, 3, 3), 77)
convolution("pointwise", integers("uint8", 2, 9, 6, 7), integers("int8", 8, 9, 1, 1), 5)
convolution("to_a_point", integers("uint8", 2, 9, 3, 3), integers("int8", 8, 9, 3, 3), 5)
convolution("signal", integers("uint8", 2, 3, 20), integers("int8", 5, 3, 4), 5, strides=[3], pads=[2, 1])
convolution("signal_depthwise", integers("uint8", 2, 3, 20), integers("int8", 3, 1, 4), 5, group=3, pads=[2, 1])
convolution(
    "same", integers("uint8", 1, 3, 8, 9), integers("int8", 5, 3, 3, 2), 8, auto_pad="SAME_LOWER", strides=[2, 2]
)
convolution("unsigned_weight", integers("uint8", 1, 3, 5, 5), integers("uint8", 5, 3, 3, 3), 8, 120)
convolution("column", integers("uint8", 1, 3, 9, 1), integers("int8", 5, 3, 3, 1), 8, pads=[1, 0, 1, 0])


@case
def _conv_and_what_is_not_alike_in_all_pixels() -> Graph:
    graph = Graph(x=integers("uint8", 1, 3, 6, 6), row=integers("int32", 1, 1, 1, 6), r=integers("int32", 1, 6, 6, 4))
    y = graph.op("ConvInteger", "x", integers("int8", 4, 3, 3, 3), scalar(3, "uint8"), pads=[1, 1, 1, 1])
    turned = graph.op("Transpose", "r", perm=[0, 3, 1, 2])
    return graph.gives(graph.op("Add", graph.op("Mul", y, "row"), turned))


@case
def _conv_whose_only_pixel_scales_all_pixels() -> Graph:
    graph = Graph(x=integers("uint8", 1, 3, 6, 6), p=integers("uint8", 1, 3, 1, 1))
    gate = graph.op("ConvInteger", "p", integers("int8", 3, 3, 1, 1), scalar(3, "uint8"))
    gate = graph.op("Cast", graph.op("Clip", gate, scalar(-128), scalar(127)), to=ir.DataType.INT8)
    pixels, gates = (graph.op("Cast", one, to=ir.DataType.INT32) for one in ("x", gate))
    return graph.gives(graph.op("Mul", pixels, gates))


@case
def _two_convolutions_that_meet() -> Graph:
    graph = Graph(x=integers("uint8", 1, 3, 6, 6), p=integers("uint8", 1, 4, 6, 6))
    one_ = graph.op("ConvInteger", "x", integers("int8", 4, 3, 1, 1), scalar(3, "uint8"))
    two_ = graph.op("ConvInteger", "p", integers("int8", 4, 4, 3, 3), scalar(7, "uint8"), pads=[1, 1, 1, 1])
    return graph.gives(graph.op("Max", graph.op("Add", one_, two_), scalar(0)))


def product(
    name: str, a: np.ndarray, b: np.ndarray, zero_a: int = 0, zero_b: int = 0, *, constant: bool = False
) -> None:
    graph = Graph(a=a) if constant else Graph(a=a, b=b)
    zeros = [scalar(zero_a, str(a.dtype)), scalar(zero_b, str(b.dtype))]
    y = graph.op("MatMulInteger", "a", b if constant else "b", *zeros)
    CASES[f"product_{name}"] = graph.gives(graph.op("Max", y, integers("int32", b.shape[-1])))


product("of_tensors", integers("uint8", 2, 3, 4, 5), integers("int8", 2, 3, 5, 6), 100, 4)
product("broadcast", integers("uint8", 3, 4, 5), integers("uint8", 5, 6), 100, 99)
product("broadcast_left", integers("int8", 4, 5), integers("int8", 3, 5, 6), 10, -9)
product("with_weights", integers("uint8", 2, 30, 5), integers("int8", 5, 6), 100, constant=True)
product("with_one_row", integers("int8", 1, 50), integers("int8", 50, 10), 100, -3, constant=True)
product("with_unsigned_weights", integers("uint8", 20, 5), integers("uint8", 5, 1), 100, 130, constant=True)
product("with_batched_weights", integers("uint8", 2, 3, 5), integers("int8", 2, 5, 4), 100, constant=True)
two("product_int32", "MatMul", integers("int32", 2, 3, 4), integers("int32", 4, 5))


@case
def _attention() -> Graph:
    graph = Graph(x=integers("uint8", 1, 6, 8), m=integers("int32", 1, 1, 6, 6))
    heads = []
    for _ in range(3):
        wide = graph.op("MatMulInteger", "x", integers("int8", 8, 8), scalar(120, "uint8"))
        low = graph.op("Cast", graph.op("Clip", wide, scalar(-128), scalar(127)), to=ir.DataType.INT8)
        heads.append(graph.op("Transpose", graph.op("Reshape", low, i64(1, 6, 2, 4)), perm=[0, 2, 1, 3]))
    turned = graph.op("Transpose", heads[1], perm=[0, 1, 3, 2])
    scores = graph.op("Add", graph.op("MatMulInteger", heads[0], turned), "m")
    weights = graph.op("Cast", graph.op("Clip", scores, scalar(0), scalar(255)), to=ir.DataType.UINT8)
    mixed = graph.op("Transpose", graph.op("MatMulInteger", weights, heads[2]), perm=[0, 2, 1, 3])
    return graph.gives(graph.op("Reshape", mixed, i64(1, 6, 8)))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library({name: graph.model for name, graph in CASES.items()}, tmp_path_factory.mktemp("c"))


@needs_gcc
@pytest.mark.parametrize("name", CASES)
def test_c_gives_what_onnx_runtime_gives(library: Library, name: str):
    graph = CASES[name]
    wanted = run_onnx(graph.model, graph.feeds)
    found = library.run(name, graph.feeds)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@needs_gcc
def test_no_memory_is_misused_and_nothing_overflows(tmp_path: Path):
    if not sanitizers(tmp_path):
        pytest.skip("gcc has no address sanitizer here")
    found = run_checked({name: (graph.model, graph.feeds) for name, graph in CASES.items()}, tmp_path)
    for name, outputs in found.items():
        for a, b in zip(outputs, run_onnx(CASES[name].model, CASES[name].feeds), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


@needs_gcc
@pytest.mark.parametrize("dtype", ["int8", "int32"])
def test_space_to_depth(tmp_path: Path, dtype: str):
    # ONNX Runtime has it for float only.
    graph = Graph(x=integers(dtype, 2, 3, 4, 6))
    graph.gives(graph.op("SpaceToDepth", "x", blocksize=2))
    (found,) = Library({"m": graph.model}, tmp_path).run("m", graph.feeds)
    blocks = graph.feeds["x"].reshape(2, 3, 2, 2, 3, 2).transpose(0, 3, 5, 1, 2, 4)
    np.testing.assert_array_equal(found, blocks.reshape(2, 12, 2, 3))
