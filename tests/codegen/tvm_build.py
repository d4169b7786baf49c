"""Models for TVM, and what compiles and runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.codegen.tvm_library import TvmSession, emit_so
from qgraph.passes import _integer_functions as integer_functions
from qgraph.runtime.session import open_session

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


def parsed(text: str) -> ir.Model:
    """Return a model; W108 in its text stands for 108 random weights."""
    random = np.random.default_rng(1)
    for count in (256, 108, 72, 24, 12):
        while f"W{count}" in text:
            text = text.replace(f"W{count}", ", ".join(map(str, random.integers(-128, 128, count))), 1)
    return ir.from_onnx_text(text)


def layer() -> ir.Model:
    """Return a model of floats at its edges, with the functions that it calls."""
    model = parsed(LAYER)
    for node in model.graph:
        if node.domain == "qgraph":
            call = integer_functions.call(model, node.op_type, node.inputs, node.attributes.get_string("rounding"))
            qgraph.ir.replace_node(node, call)
    return model


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


def compiled(model: ir.Model, folder: Path) -> TvmSession:
    assert emit_so(model, folder) == ["model.so", "signature.json"]
    return TvmSession(folder, threads=1)


def in_onnxruntime(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    session = open_session(ir.to_proto(model).SerializeToString(), threads=1)
    return session.run(None, dict(feeds))
