"""Integer graphs compiled by TVM against ONNX Runtime and the definitions in numpy: equal to the bit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.numerics import integer_math, requantize
from qgraph.runtime.reference import ReferenceSession

pytest.importorskip("tvm", reason="Apache TVM is not installed")

sys.path.insert(0, str(Path(__file__).parent))
from integer_models import random_integer_feeds, random_integer_model
from tvm_build import PRODUCTS, called, compiled, extremes, function_inputs, in_onnxruntime, parsed

RANDOM_MODELS = 16
"""Each takes most of a second to compile."""

ELEMENTWISE = """
<ir_version: 10, opset_import: ["" : 21]>
elementwise (int32[2,3,4] a, int32[3,1] b, uint8[2,3,4] u, int8[4] s, int64[2,3,4] w, bool[2,3,4] p, bool[4] q) => (
    int32[2,3,4] add, int32[2,3,4] sub, int32[2,3,4] mul, int32[2,3,4] div, int64[2,3,4] wide, int32[2,3,4] neg,
    int32[2,3,4] abs, int32[2,3,4] sign, int32[2,3,4] max, int32[2,3,4] min, int32[2,3,4] clip, uint8[2,3,4] clip8,
    int32[2,3,4] floor, int32[2,3,4] crossed, int32[2,3,4] where, bool[2,3,4] equal, bool[2,3,4] greater,
    bool[2,3,4] less, bool[2,3,4] ge, bool[2,3,4] le, bool[2,3,4] and, bool[2,3,4] or, bool[2,3,4] xor, bool[2,3,4] not,
    int16[2,3,4] short, int64[4] long, bool[2,3,4] truth, int32[2,3,4] number,
    bool[2,3,4] alike)
<int32 low = {-7}, int32 high = {9}, uint8 low8 = {10}, uint8 high8 = {200}, int32 three = {3}>
{
    add = Add (a, b)            sub = Sub (a, b)            mul = Mul (a, b)
    m = Abs (a)                 n = Abs (b)                 o = Add (n, three)
    div = Div (m, o)            wide = Mul (w, w)           neg = Neg (a)
    abs = Abs (a)               sign = Sign (a)             max = Max (a, b, three)
    min = Min (b, a)            clip = Clip (a, low, high)  clip8 = Clip (u, low8, high8)
    floor = Clip (a, low)       crossed = Clip (a, high, low)
    where = Where (p, a, b)     equal = Equal (a, b)        greater = Greater (a, b)
    less = Less (a, b)          ge = GreaterOrEqual (a, b)  le = LessOrEqual (a, b)
    and = And (p, q)            or = Or (p, q)              xor = Xor (p, q)
    not = Not (p)               short = Cast <to = 5> (u)   long = Cast <to = 7> (s)
    truth = Cast <to = 9> (a)   number = Cast <to = 6> (p)
    alike = Equal (p, q)
}
"""

MOVEMENT = """
<ir_version: 10, opset_import: ["" : 21]>
movement (uint8[1,4,6,5] u, int32[3,4] a, int8[2,3] s, int64[2,2] i, int32[3,2] j, int64 one, bool c) => (
    uint8[1,4,30] reshaped, uint8[4,30] flat, uint8[4,6,5] squeezed, uint8[1,1,4,6,5] unsqueezed, uint8[5,4,1,6] turned,
    int32[2,3,4] expanded, int8[4,9] tiled, int32[2,2] slice, int32[3,2] back, int32[2,4] split0, int32[1,4] split1,
    uint8[1,2,6,5] half0, uint8[1,2,6,5] half1, int32[4,6] pad, int8[2,3] cut, uint8[1,4,8,9] edge,
    uint8[1,4,9,8] reflect, int32[3,2,2] gathered, int32[4] row, int32[3,2] elements, int32[3,9] joined,
    uint8[1,1,12,10] dcr, uint8[1,1,12,10] crd, uint8[1,24,2,5] deep, int32[3,4] lower, int32[3,4] upper,
    uint8[1,4,12,10] nearest, uint8[1,4,3,7] sized, uint8[1,4,9,4] symmetric, int32[3,4] branch, int64[4] shape,
    int32[2,2] full, int64[4] range)
<int64[3] to3 = {0, 4, -1}, int64[1] first = {0}, int64[3] like = {2, 1, 1}, int64[2] times = {2, 3},
 int64[2] from = {0, -1}, int64[2] until = {2, -100}, int64[2] axes = {0, 1}, int64[2] steps = {1, -2},
 int64[1] end = {1000}, int64[1] second = {1}, int64[1] step = {2}, int64[2] parts = {2, 1},
 int64[4] around = {1, 0, 0, 2}, int32 fill = {-5}, int64[2] less = {-1, 1}, int64[1] last = {-1},
 int64[8] edges = {0, 0, 1, 2, 0, 0, 1, 2}, int64[4] mirrors = {2, 1, 1, 2}, int64[2] space = {2, 3}, float roi = {},
 float[4] twice = {1, 1, 2, 2}, int64[4] sizes = {1, 4, 3, 7}, int64[4] other = {1, 4, 9, 4}, int64 zero = {0},
 int64 four = {4}, int64 single = {1}, int32[2,2] twos = {2, 2, 2, 2}, int64 diagonal = {-1}>
{
    reshaped = Reshape (u, to3)             flat = Flatten <axis = 2> (u)    squeezed = Squeeze (u, first)
    unsqueezed = Unsqueeze (u, first)       turned = Transpose <perm = [3, 1, 0, 2]> (u)
    expanded = Expand (a, like)             tiled = Tile (s, times)
    slice = Slice (a, from, until, axes, steps)
    back = Slice (a, second, end, second, step)
    split0, split1 = Split <axis = 0> (a, parts)
    half0, half1 = Split <axis = 1, num_outputs = 2> (u)
    pad = Pad (a, around, fill)             cut = Pad (s, less, , last)
    edge = Pad <mode = "edge"> (u, edges)   reflect = Pad <mode = "reflect"> (u, mirrors, , space)
    gathered = Gather <axis = 1> (a, i)     row = Gather (a, one)            elements = GatherElements <axis = 1> (a, j)
    column = Slice (a, second, end, second, end)
    joined = Concat <axis = 1> (a, a, column)
    dcr = DepthToSpace <blocksize = 2> (u)
    crd = DepthToSpace <blocksize = 2, mode = "CRD"> (u)
    deep = SpaceToDepth <blocksize = 1> (u)
    lower = Trilu <upper = 0> (a, diagonal) upper = Trilu (a)
    nearest = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
        (u, , twice)
    sized = Resize <mode = "nearest"> (u, , , sizes)
    symmetric = Resize <mode = "nearest", coordinate_transformation_mode = "align_corners"> (u, , , other)
    branch = If (c) <then_branch = t () => (int32[3,4] x) { x = Neg (a) },
                     else_branch = e () => (int32[3,4] y) { y = Add (a, fill) }>
    shape = Shape (u)
    full = Add (twos, twos)
    range = Range (zero, four, single)
}
"""

REDUCTIONS = """
<ir_version: 10, opset_import: ["" : 21]>
reductions (int32[2,3,5] a, uint8[1,3,7,6] u, int8[1,2,9] s, int64[2,6] w) => (
    int32[2,1,5] sum, int32[2] sums, int32[1,1,1] all, int64[2] long, int32[3,5] max, int32[2,3,1] min, uint8[1,3] max8,
    int64[2,1,5] arg, int64[2,3] last, int64[3,5] least, int64[2,6] running, int64[2,6] later,
    uint8[1,3,4,3] pool, uint8[1,3,4,3] ceil, int8[1,2,4] pool1, uint8[1,3,3,4] dilated, uint8[1,3,4,3] same)
<int64[1] one = {1}, int64[2] rest = {1, 2}, int64[1] first = {0}, int64[1] minus = {-1}, int64[2] picture = {-2, -1},
 int64 axis = {1}>
{
    sum = ReduceSum (a, one)                sums = ReduceSum <keepdims = 0> (a, rest)    all = ReduceSum (a)
    long = ReduceSum <keepdims = 0> (w, minus)
    max = ReduceMax <keepdims = 0> (a, first)   min = ReduceMin (a, minus)  max8 = ReduceMax <keepdims = 0> (u, picture)
    arg = ArgMax <axis = 1> (a)             last = ArgMax <axis = -1, keepdims = 0, select_last_index = 1> (a)
    least = ArgMin <axis = 0, keepdims = 0> (a)
    running = CumSum (w, axis)              later = CumSum <exclusive = 1, reverse = 1> (w, axis)
    pool = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 0]> (u)
    ceil = MaxPool <kernel_shape = [2, 3], strides = [2, 2], ceil_mode = 1> (u)
    pool1 = MaxPool <kernel_shape = [2], strides = [2]> (s)
    dilated = MaxPool <kernel_shape = [3, 2], dilations = [2, 2]> (u)
    same = MaxPool <kernel_shape = [3, 2], strides = [2, 2], auto_pad = "SAME_LOWER"> (u)
}
"""

PLACES = """
<ir_version: 10, opset_import: ["" : 21]>
places (uint8[4,3,5] x, int16[2,3] n, int64[2,1] i, int64[2,2,2] p, uint8[2,3,5] rows, uint8[2,2,5] lines, int8[3,4] s,
    int16[2,1] put) => (
    int16[2,3] elements, int16[2,3] columns, uint8[4,3,5] by_row, uint8[4,3,5] by_line, uint8[4,3,5] known,
    int8[3,2] most, int64[3,2] where, int8[2,4] least, int64[2,4] there)
<int64[1] two = {2}, int64[2,1] fixed = {3, -3}>
{
    elements = ScatterElements <axis = 0> (n, i, put)       columns = ScatterElements <axis = -1> (n, i, put)
    by_row = ScatterND (x, i, rows)                         by_line = ScatterND (x, p, lines)
    known = ScatterND (x, fixed, rows)
    most, where = TopK (s, two)                             least, there = TopK <axis = 0, largest = 0> (s, two)
}
"""


def random_array(type_: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    if type_ == "bool":
        return random.integers(0, 2, shape).astype(bool)
    limits = np.iinfo(type_)
    return random.integers(max(limits.min, -1000), min(limits.max, 1000) + 1, shape).astype(type_)


def random_feeds(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        value.name: random_array(str(value.dtype.numpy()), tuple(value.shape.numpy()), random)
        for value in model.graph.inputs
    }


def assert_same(model: ir.Model, folder: Path, **changed: np.ndarray) -> None:
    session = compiled(model, folder)
    for seed in range(3):
        feeds = {**random_feeds(model, seed), **changed}
        expected, found = in_onnxruntime(model, feeds), session.run(None, feeds)
        for value, right, ours in zip(model.graph.outputs, expected, found, strict=True):
            assert (ours.dtype, ours.shape) == (right.dtype, right.shape), value.name
            np.testing.assert_array_equal(ours, right, err_msg=value.name)


@pytest.mark.parametrize(
    "text",
    [ELEMENTWISE, MOVEMENT, REDUCTIONS, PRODUCTS, PLACES],
    ids=["elementwise", "movement", "reductions", "products", "places"],
)
def test_standard_operators_give_the_bits_of_onnxruntime(text: str, tmp_path: Path):
    changed = {}
    if text is MOVEMENT:
        changed = {
            "i": np.array([[0, -1], [3, -4]]),
            "j": np.array([[0, 3], [-1, 1], [2, -4]], np.int32),
            "one": np.array(-1),
        }
    if text is PLACES:
        changed = {
            "i": np.array([[1], [-1]]),
            "p": np.array([[[0, 2], [3, 1]], [[-1, -3], [0, 2]]]),  # the first place twice: the last update stays
            "s": np.random.default_rng(0).integers(-2, 3, (3, 4)).astype(np.int8),
        }
    assert_same(parsed(text), tmp_path, **changed)


def test_a_scalar_has_no_loops(tmp_path: Path):
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    scalar (int64 a, int64 b) => (int64 sum, bool more) { s = Abs (a)  sum = Add (s, b)  more = Greater (a, b) }
    """
    assert_same(parsed(text), tmp_path)


@pytest.mark.parametrize("rounding", requantize.ROUNDINGS)
def test_requantize_gives_the_bits_of_its_definition(rounding: str, tmp_path: Path):
    random = np.random.default_rng(0)
    x = extremes(np.int32, 2**31 - 1, (2, 126, 40))
    x[0, :, 5] = -(2**31)
    multiplier = random.integers(2**30, 2**31, (126, 1)).astype(np.int32)
    multiplier[::7] = 2**30  # many ties
    multiplier[3], multiplier[4] = 0, 2**31 - 1
    shift = (np.arange(126) // 2).reshape(126, 1).astype(np.int32)
    inputs = {"x": x, "multiplier": multiplier, "shift": shift}
    inputs |= {name: np.array(one, np.int16) for name, one in [("zero", -3), ("low", -32768), ("high", 32767)]}
    (found,) = compiled(called("Requantize", inputs, rounding), tmp_path).run(None, inputs)
    expected = requantize.requantize(x, multiplier, shift, inputs["zero"], inputs["low"], inputs["high"], rounding)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 1000


DEFINITIONS = {
    "IntegerSqrt": integer_math.integer_sqrt,
    "RoundedDivide": integer_math.rounded_divide,
    "TableInterpolate": integer_math.table_interpolate,
    "Softmax": integer_math.softmax,
    "LayerNormalize": integer_math.layer_normalize,
    "RMSNormalize": integer_math.rms_normalize,
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_function_gives_the_bits_of_its_definition(name: str, tmp_path: Path):
    inputs = function_inputs(name)
    (found,) = compiled(called(name, inputs), tmp_path).run(None, inputs)
    expected = DEFINITIONS[name](*inputs.values())
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_random_models_give_the_bits_of_the_reference_and_of_onnxruntime(tmp_path: Path):
    for seed in range(RANDOM_MODELS):
        model = random_integer_model(seed)
        session, reference = compiled(model, tmp_path), ReferenceSession(model)
        for feed_seed in range(2):
            feeds = random_integer_feeds(model, feed_seed)
            runs = (session.run(None, feeds), reference.run(None, feeds), in_onnxruntime(model, feeds))
            for value, ours, expected, right in zip(model.graph.outputs, *runs, strict=True):
                assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), f"seed {seed}: {value.name}"
                np.testing.assert_array_equal(ours, expected, err_msg=f"seed {seed}: {value.name}")
                np.testing.assert_array_equal(ours, right, err_msg=f"seed {seed}: {value.name}")
