"""Integer graphs compiled by TVM against ONNX Runtime and the definitions in numpy: equal to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import qgraph.ir
from qgraph.codegen import tvm_disassembly, tvm_library, tvm_lowering
from qgraph.codegen.tvm_library import TvmSession
from qgraph.errors import UserError
from qgraph.numerics import integer_math, requantize
from qgraph.passes import _integer_functions as integer_functions

pytest.importorskip("tvm", reason="Apache TVM is not installed")

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

PRODUCTS = """
<ir_version: 10, opset_import: ["" : 21]>
products (uint8[2,4,9,8] u, int8[2,4,9,8] s, uint8[1,6,20] line, uint8[3,5] a, int8[2,5,4] b, int8[5] v,
          int32[2,3,5] m, int32[5,4] n) => (
    int32[2,3,9,8] plain, int32[2,3,5,4] signed, int32[2,4,7,4] grouped, int32[2,8,4,4] depthwise, int32[1,6,9] one,
    int32[2,3,9,8] pointwise, int32[2,3,9,8] same, int32[2,3,4] batched, int32[3] vector, int32[2,3,4] wide)
<int8[3,4,3,3] w = {W108}, int8[3,4,3,2] t = {W72}, int8[4,2,3,3] g = {W72}, int8[8,1,3,3] d = {W72},
 int8[6,1,4] l = {W24}, int8[3,4,1,1] p = {W12}, uint8 zu = {131}, int8 zs = {-5}, int8 none = {0}>
{
    plain = ConvInteger <pads = [1, 1, 1, 1]> (u, w, zu)
    signed = ConvInteger <strides = [2, 2], pads = [1, 0, 2, 1]> (s, t, zs)
    grouped = ConvInteger <group = 2, dilations = [1, 2], pads = [0, 1, 0, 0]> (u, g, zu, none)
    depthwise = ConvInteger <group = 4, strides = [2, 2], pads = [0, 1, 0, 1]> (u, d)
    one = ConvInteger <group = 6, dilations = [2], pads = [2, 2], strides = [2]> (line, l, zu)
    pointwise = ConvInteger (u, p, zu)
    same = ConvInteger <auto_pad = "SAME_UPPER"> (u, w, zu)
    batched = MatMulInteger (a, b, zu, zs)
    vector = MatMulInteger (a, v)
    wide = MatMul (m, n)
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


def parsed(text: str) -> ir.Model:
    """Return a model; W108 in its text stands for 108 random weights."""
    random = np.random.default_rng(1)
    for count in (256, 108, 72, 24, 12):
        while f"W{count}" in text:
            text = text.replace(f"W{count}", ", ".join(map(str, random.integers(-128, 128, count))), 1)
    return ir.from_onnx_text(text)


def compiled(model: ir.Model, folder: Path) -> TvmSession:
    assert tvm_library.emit_so(model, folder) == ["model.so", "signature.json"]
    return TvmSession(folder, threads=1)


def in_onnxruntime(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def assert_same(model: ir.Model, folder: Path, **changed: np.ndarray) -> None:
    session = compiled(model, folder)
    for seed in range(3):
        feeds = {**random_feeds(model, seed), **changed}
        expected, found = in_onnxruntime(model, feeds), session.run(None, feeds)
        for value, right, ours in zip(model.graph.outputs, expected, found, strict=True):
            assert (ours.dtype, ours.shape) == (right.dtype, right.shape), value.name
            np.testing.assert_array_equal(ours, right, err_msg=value.name)


@pytest.mark.parametrize(
    "text", [ELEMENTWISE, MOVEMENT, REDUCTIONS, PRODUCTS], ids=["elementwise", "movement", "reductions", "products"]
)
def test_standard_operators_give_the_bits_of_onnxruntime(text: str, tmp_path: Path):
    changed = {}
    if text is MOVEMENT:
        changed = {
            "i": np.array([[0, -1], [3, -4]]),
            "j": np.array([[0, 3], [-1, 1], [2, -4]], np.int32),
            "one": np.array(-1),
        }
    assert_same(parsed(text), tmp_path, **changed)


def called(name: str, inputs: Mapping[str, np.ndarray], rounding: str | None = None) -> ir.Model:
    """Return a model that calls an integer function, and nothing else, on graph inputs."""
    values = [ir.val(key, ir.DataType.from_numpy(one.dtype), one.shape) for key, one in inputs.items()]
    model = ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10)
    node = integer_functions.call(model, name, values, rounding)
    node.outputs[0].name = "y"
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    return model


def extremes(type_: type, limit: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return random numbers of every magnitude up to `limit`, the largest and smallest among them."""
    random = np.random.default_rng(seed)
    numbers = np.round(2.0 ** random.uniform(0, np.log2(limit), shape)).astype(np.int64)
    numbers = np.minimum(numbers, limit) * random.choice([-1, 1], shape)
    numbers.reshape(-1)[:5] = [limit, -limit, 0, 1, -1]
    return numbers.astype(type_)


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


def function_inputs(name: str) -> dict[str, np.ndarray]:
    """Return inputs that reach the limits that the function's definition sets."""
    random = np.random.default_rng(2)
    if name == "IntegerSqrt":
        x = np.abs(extremes(np.int64, 2**62, (200,)))
        roots = random.integers(1, 2**31, 100)
        return {"x": np.concatenate([x, roots**2, roots**2 - 1, roots**2 + 2 * roots])}
    if name == "RoundedDivide":
        a = extremes(np.int64, 2**61, (40, 50), 3)
        b = extremes(np.int64, 2**61, (50,), 4)
        b[10:30] = np.arange(-10, 10)
        return {"a": a, "b": b}
    if name == "TableInterpolate":
        table = random.integers(-(2**22), 2**22 + 1, 513).astype(np.int32)
        return {"x": np.arange(-(2**15), 2**15).astype(np.int16).reshape(64, -1), "table": table}
    if name == "Softmax":
        table = np.round(2**15 * np.exp(-np.arange(65) / 6)).astype(np.int32)
        table[-1] = 0
        x = extremes(np.int32, 2**20, (3, 4, 17))
        x[1] //= 2**12
        return {"x": x, "table": table, "divisor": np.array(37, np.int32), "one": np.array(2**15, np.int32)}
    x = extremes(np.int32, 2**15, (2, 5, 24))
    x[0, 3], x[1, 2] = 0, 7
    scalars = {"fraction": 24 * 2**8, "epsilon": 1000, "numerator": 2**12}
    return {"x": x} | {key: np.array(number, np.int64) for key, number in scalars.items()}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_function_gives_the_bits_of_its_definition(name: str, tmp_path: Path):
    inputs = function_inputs(name)
    (found,) = compiled(called(name, inputs), tmp_path).run(None, inputs)
    expected = DEFINITIONS[name](*inputs.values())
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


LAYER = """
<ir_version: 10, opset_import: ["" : 21, "qgraph" : 1]>
layer (float[1,3,8,8] x, float[1,3,8,8] beside) => (float[1,4,8,8] y, float[1,4,8,8] again, float[1,3,8,8] moved)
<float step = {0.5}, uint8 zero = {3}, float step16 = {0.001}, int16 zero16 = {0}, int8[4,3,3,3] w = {W108},
 int32[4,1,1] bias = {100, -2000, 0, 77}, int32[4,1,1] multiplier = {1073741824, 1573741823, 1473741824, 2147483647},
 int32[4,1,1] shift = {38, 39, 40, 37}, uint8 low = {0}, uint8 high = {255}, float out = {0.25},
 int8[256] table = {W256}>
{
    q = QuantizeLinear (x, step, zero)
    a = ConvInteger <pads = [1, 1, 1, 1]> (q, w, zero)
    b = Add (a, bias)
    r = qgraph.Requantize <rounding = "half-even"> (b, multiplier, shift, zero, low, high)
    i = Cast <to = 6> (r)
    t = Gather (table, i)
    y = DequantizeLinear (r, out, zero)
    again = DequantizeLinear (t, out)
    p = QuantizeLinear (beside, step16, zero16)
    m = Cast <to = 6> (p)
    moved = DequantizeLinear (m, step16)
}
"""


def layer() -> ir.Model:
    """Return a model of floats at its edges, with the functions that it calls."""
    model = parsed(LAYER)
    for node in model.graph:
        if node.domain == "qgraph":
            call = integer_functions.call(model, node.op_type, node.inputs, node.attributes.get_string("rounding"))
            qgraph.ir.replace_node(node, call)
    return model


def test_floats_at_the_edges_are_quantized_as_onnx_says(tmp_path: Path):
    model = layer()
    session = compiled(model, tmp_path)
    random = np.random.default_rng(0)
    feeds = {name: random.normal(0, 40, (1, 3, 8, 8)).astype(np.float32) for name in ("x", "beside")}
    feeds["x"].flat[:6] = [0.25, 0.75, 1e9, -1e9, -0.25, 126.25]  # ties, and what saturates
    expected = in_onnxruntime(model, feeds)
    for found, right in zip(session.run(None, feeds), expected, strict=True):
        np.testing.assert_array_equal(found, right)
        assert len(np.unique(found)) > 10
    (again,) = session.run(["again"], feeds)
    np.testing.assert_array_equal(again, expected[1])
    x, beside = session.signature.inputs
    inside = session.run_quantized({"q": x.quantize(feeds["x"]), "p": beside.quantize(feeds["beside"])})
    assert {name: str(one.dtype) for name, one in inside.items()} == {"r": "uint8", "t": "int8", "m": "int32"}
    np.testing.assert_array_equal((inside["r"].astype(np.float32) - 3) * np.float32(0.25), expected[0])
    with pytest.raises(UserError, match=r"input 'beside' is not fed \(given: x\)"):
        session.run(None, {"x": feeds["x"]})
    with pytest.raises(UserError, match=r"input 'x' is float64\[1, 3, 8, 8\], but .* float32\[1, 3, 8, 8\]"):
        session.run(None, {**feeds, "x": feeds["x"].astype(np.float64)})
    with pytest.raises(UserError, match="there is no output 'z'"):
        session.run(["z"], feeds)
    with pytest.raises(UserError, match="tensor 'p' is not fed"):
        session.run_quantized({"q": x.quantize(feeds["x"])})


def test_compiling_twice_gives_the_same_bytes(tmp_path: Path):
    files = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        tvm_library.emit_so(layer(), tmp_path / name)
        files.append([(tmp_path / name / file).read_bytes() for file in ("model.so", "signature.json")])
    assert files[0] == files[1]


def test_a_library_may_replace_one_that_is_open(tmp_path: Path):
    sessions = []
    for op in ("Neg", "Abs"):
        text = f'<ir_version: 10, opset_import: ["" : 21]> g (int32[3] x) => (int32[3] y) {{ y = {op} (x) }}'
        sessions.append(compiled(ir.from_onnx_text(text), tmp_path))
    x = np.array([1, 2, -3], np.int32)
    assert [session.run(None, {"x": x})[0].tolist() for session in sessions] == [[-1, -2, 3], [1, 2, 3]]


needs_objdump = pytest.mark.skipif(not tvm_disassembly.can_disassemble(), reason="objdump is not installed")


@needs_objdump
def test_the_code_of_integer_graphs_has_no_float_instructions(tmp_path: Path):
    models = [
        layer(),
        parsed(PRODUCTS),
        *(called(name, function_inputs(name)) for name in ("Softmax", "LayerNormalize")),
    ]
    for model in models:
        tvm_library.emit_so(model, tmp_path)
        assert tvm_disassembly.float_instructions(tmp_path / "model.so") == []


@needs_objdump
def test_float_instructions_are_found_where_there_are_some(tmp_path: Path):
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((64,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(builder.emit(relax.op.multiply(x, relax.op.add(x, relax.const(1.5)))))
        builder.emit_func_output(y)
    tvm.compile(builder.finalize(), target="llvm").export_library(str(tmp_path / "model.so"))
    found = tvm_disassembly.float_instructions(tmp_path / "model.so")
    assert {one.function.startswith(("fused_add", "add", "multiply")) for one in found} == {True}
    assert any("mul" in one.mnemonic for one in found)


def test_machine_code_is_told_apart():
    def found(*instructions: str, kind: str = "elf64-x86-64") -> list[str]:
        lines = [f"model.so:     file format {kind}", "0000000000001000 <layer_compute_>:"]
        lines += [f"    1000:\t{one}" for one in instructions]
        return [one.mnemonic for one in tvm_disassembly.scan(lines)]

    floats = [
        "addss  %xmm0,%xmm1",
        "vfmadd213ps (%rax),%ymm1,%ymm2",
        "cvtdq2ps %xmm0,%xmm0",
        "vcvttps2dq %zmm0,%zmm1",
        "divsd  %xmm0,%xmm1",
        "fld1",
        "vcmpltps %ymm0,%ymm1,%ymm2",
        "ucomiss %xmm0,%xmm1",
        "vdpbf16ps %zmm0,%zmm1,%zmm2",
    ]
    assert found(*floats) == [one.split()[0] for one in floats]
    integers = [
        "movaps %xmm0,%xmm1",
        "vmovups (%rax),%zmm0",
        "xorps  %xmm0,%xmm0",
        "vpaddd %ymm0,%ymm1,%ymm2",
        "imul   %rax,%rbx",
        "vpdpbusd %zmm0,%zmm1,%zmm2",
        "vblendvps %ymm0,%ymm1,%ymm2,%ymm3",
        "vpermilps $0x1,%ymm0,%ymm0",
        "shufps $0x1,%xmm0,%xmm1",
        "vbroadcastss (%rax),%ymm0",
        "call   1000 <other_compute_>",
        "add    $0x1,%eax",
        "sub    $0x1,%eax",
        "cmp    %eax,%ebx",
        "div    %rcx",
        "mul    %rcx",
        "vunpcklps %xmm0,%xmm1,%xmm2",
        "vinsertf128 $1,%xmm0,%ymm1,%ymm2",
        "maxps",
    ]
    assert found(*integers) == ["maxps"]
    assert found("call   1f00 <__truncsfhf2>") == ["call"]
    assert found(
        "fadd\ts0, s1, s2", "scvtf\ts0, w1", "fmov\tw0, s0", "add\tw0, w1, w2", kind="elf64-littleaarch64"
    ) == ["fadd", "scvtf"]


def test_what_cannot_be_compiled_is_refused(tmp_path: Path):
    def refused(text: str, match: str) -> None:
        with pytest.raises(UserError, match=match):
            tvm_lowering.build_module(
                ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21, "qgraph" : 1]> ' + text)
            )

    refused("g (int32[N,3] x) => (int32[N,3] y) { y = Neg (x) }", r"input 'x' has shape \[N,3\].* --shape x=1,3")
    refused(
        "g (int32[2] x) => (int32[2] y) { [odd] y = BitwiseNot (x) }",
        "node 'odd' .BitwiseNot.: there is no integer code",
    )
    refused("g (float[2] x) => (float[2] y) { [soft] y = Relu (x) }", "node 'soft' .Relu.: its input 'x' is in float")
    refused("g (float[2] x) => (float[2] y) { y = Identity (x) }", "its input 'x' is in float")
    refused(
        "g (int32[4] x, int64[2] s) => (int32[2,2] y) { [r] y = Reshape (x, s) }",
        "node 'r' .*'s' depends on the model's inputs",
    )
    refused(
        "g (int8[2] x) => (int8[2] y) <float s = {1}, int8 z = {0}> "
        "{ [d] a = DequantizeLinear (x, s, z) y = QuantizeLinear (a, s, z) }",
        "node 'd' .DequantizeLinear.",
    )
    refused(
        "g (int32[2] x) => (int8[2] y) <int32 m = {1}, int8 z = {0}> "
        "{ y = qgraph.Requantize <rounding = 'up'> (x, m, m, z, z, z) }".replace("'", '"'),
        "there is no rounding 'up'",
    )
    boundary = parsed(
        "<ir_version: 10, opset_import: ['' : 21]> g (int8[2] x) => (int8[2] y) { y = Neg (x) }".replace("'", '"')
    )
    next(iter(boundary.graph)).metadata_props["qgraph.boundary"] = "it has no integer form"
    with pytest.raises(UserError, match="a boundary, in float because it has no integer form"):
        tvm_lowering.build_module(boundary)
    with pytest.raises(UserError, match="TVM knows no target"):
        tvm_library.emit_so(layer(), tmp_path, target="abacus")
    with pytest.raises(UserError, match=r"signature.json is no signature"):
        TvmSession(tmp_path)
