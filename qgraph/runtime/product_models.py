"""Models of one kernel, or one layer, that multiplies bytes, and what exact sums give; see `product_probes`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.runtime.session import open_session

__all__ = [
    "COLUMNS",
    "EXTREMES",
    "WIDTH",
    "Probe",
    "attention",
    "blocks",
    "convolution",
    "layer",
    "product",
    "recurrence",
]

_OPSET = 21
_IR_VERSION = 10
_WRONG = 0.05
"""Relative error from which a sum has saturated: rounding stays below a hundredth, saturation takes more."""
WIDTH, COLUMNS = 64, 32
_ACTIVATION = 255
"""Of every activation less its zero point."""
EXTREMES = {"uint8": (255,), "int8": (127, -128)}
"""Of weights."""
_QUANTIZED = 100
"""What exact results are quantized to, less or more than their zero point."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """One model, what it is fed, and what exact sums give.

    Attributes:
        model: of one node.
        feeds: of its inputs.
        exact: every element of its output.
    """

    model: ir.Model
    feeds: Mapping[str, np.ndarray]
    exact: float

    def saturates(self) -> bool:
        """Run it, and tell whether sums have saturated.

        Raises:
            UserError: ONNX Runtime is not installed, or refuses the model.
        """
        session = open_session(ir.to_proto(self.model).SerializeToString(), threads=1)
        result = np.asarray(session.run(None, dict(self.feeds))[0], np.float64)
        return bool(np.abs(result - self.exact).max() > _WRONG * abs(self.exact))


def _probe(
    kernel: str,
    inputs: Sequence[np.ndarray | None],
    exact: float,
    dtype: np.dtype | type = np.float32,
    outputs: int = 1,
    **attributes: Any,
) -> Probe:
    """Return the probe of a kernel whose first input is fed; `dtype` is that of the output."""
    domain, _, op_type = kernel.rpartition(".")
    values: list[ir.Value | None] = []
    for index, array in enumerate(inputs):
        if array is None:
            values.append(None)
            continue
        tensor = ir.tensor(array, name=f"c{index}")
        value = ir.Value(name=f"c{index}", type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        value.const_value = tensor if index else None
        values.append(value)
    node = ir.node(op_type, values, attributes, domain=domain, num_outputs=outputs)
    for index, output in enumerate(node.outputs):
        output.name = f"y{index}"
    result = node.outputs[0]
    result.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
    fed = values[0]
    assert fed is not None
    graph = ir.Graph([fed], [result], nodes=[node], initializers=[one for one in values[1:] if one is not None],
                     opset_imports={"": _OPSET, "com.microsoft": 1}, name="product")  # fmt: skip
    feed = inputs[0]
    assert feed is not None
    return Probe(ir.Model(graph, ir_version=_IR_VERSION), {"c0": feed}, exact)


def _scalar(number: float, dtype: np.dtype | type = np.float32) -> np.ndarray:
    return np.array(number, dtype)


def _activations(dtype: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Return activations and their zero point, 255 apart."""
    limits = np.iinfo(dtype)
    return np.full(shape, limits.max, dtype), _scalar(limits.min, np.dtype(dtype))


def _weights(dtype: str, weight: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(shape, weight, dtype), _scalar(0, np.dtype(dtype))


def _result(total: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, int]:
    """Return scale and zero point of a quantized result, and the exact one."""
    zero = (np.iinfo(dtype).max + np.iinfo(dtype).min + 1) // 2
    return _scalar(abs(total) / _QUANTIZED), _scalar(zero, dtype), zero + (_QUANTIZED if total > 0 else -_QUANTIZED)


def product(kernel: str, activations: str, stored: str, rows: int, weight: int) -> Probe:
    """A product [rows, 64] x [64, 32]."""
    x, x_zero = _activations(activations if activations != "float32" else "uint8", rows, WIDTH)
    w, w_zero = _weights(stored, weight, WIDTH, COLUMNS)
    total = WIDTH * _ACTIVATION * weight
    one = _scalar(1)
    if kernel == "MatMulInteger":
        return _probe(kernel, [x, w, x_zero, w_zero], total, np.int32)
    if kernel == "com.microsoft.MatMulIntegerToFloat":
        return _probe(kernel, [x, w, one, one, x_zero, w_zero], total)
    if kernel == "com.microsoft.DynamicQuantizeMatMul":
        return _probe(kernel, [np.full((rows, WIDTH), _ACTIVATION, np.float32), w, one, w_zero], total)
    scale, zero, exact = _result(total, x.dtype)
    bias = [None] if kernel == "com.microsoft.QGemm" else []
    return _probe(kernel, [x, one, x_zero, w, one, w_zero, *bias, scale, zero], exact, x.dtype)


def convolution(
    kernel: str, activations: str, stored: str, channels: int, size: int, group: int, axes: int, weight: int
) -> Probe:
    """A convolution with as many channels as outputs."""
    last = kernel == "com.microsoft.QLinearConv"
    image = [8] * axes
    x, x_zero = _activations(activations, *([1, *image, channels] if last else [1, channels, *image]))
    w, w_zero = _weights(stored, weight, channels, channels // group, *[size] * axes)
    total = channels // group * size**axes * _ACTIVATION * weight
    one = _scalar(1)
    if kernel == "ConvInteger":
        return _probe(kernel, [x, w, x_zero, w_zero], total, np.int32, group=group)
    attributes = {"channels_last": 1} if last else {}
    scale, zero, exact = _result(total, x.dtype)
    inputs = [x, one, x_zero, w, one, w_zero, scale, zero]
    return _probe(kernel, inputs, exact, x.dtype, group=group, **attributes)


def layer(op_type: str, activations: str, stored: str, shape: Sequence[int], group: int, weight: int) -> Probe:
    """A layer between QuantizeLinear and DequantizeLinear, as models write it: the runtime may change types first."""
    zero = np.iinfo(activations).min
    w, w_zero = _weights(stored, weight, *shape)
    flat = op_type != "Conv"
    taken = shape[0] if flat else int(np.prod(shape[1:]))
    total = taken * _ACTIVATION * weight
    scale, y_zero, _ = _result(total, np.dtype(activations))
    x = np.full((4, shape[0]) if flat else (1, shape[1] * group, 8, 8), _ACTIVATION, np.float32)
    attributes = {} if flat else {"group": group}
    x_value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))
    arrays = {"one": _scalar(1), "x_zero": _scalar(zero, np.dtype(activations)), "w": w, "w_zero": w_zero,
              "scale": scale, "y_zero": y_zero}  # fmt: skip
    constants = {name: _constant(name, array) for name, array in arrays.items()}
    one, y_scale, y_point = constants["one"], constants["scale"], constants["y_zero"]
    q = ir.node("QuantizeLinear", [x_value, one, constants["x_zero"]])
    d = ir.node("DequantizeLinear", [q.outputs[0], one, constants["x_zero"]])
    e = ir.node("DequantizeLinear", [constants["w"], one, constants["w_zero"]])
    computed = ir.node(op_type, [d.outputs[0], e.outputs[0]], attributes)
    back = ir.node("QuantizeLinear", [computed.outputs[0], y_scale, y_point])
    last = ir.node("DequantizeLinear", [back.outputs[0], y_scale, y_point])
    nodes = [q, d, e, computed, back, last]
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"v{index}"
    last.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x_value], [last.outputs[0]], nodes=nodes, initializers=list(constants.values()),
                     opset_imports={"": _OPSET}, name="layer")  # fmt: skip
    return Probe(ir.Model(graph, ir_version=_IR_VERSION), {"x": x}, total)


def _constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    value.const_value = tensor
    return value


def attention(activations: str, stored: str, weight: int) -> Probe:
    """Attention of rows that are all the same: the values come out, whatever the scores."""
    x, x_zero = _activations(activations, 1, 4, WIDTH)
    w, w_zero = _weights(stored, weight, WIDTH, 3 * WIDTH)
    scale = _scalar(1 / abs(WIDTH * _ACTIVATION * weight))
    bias = np.zeros(3 * WIDTH, np.float32)
    inputs = [x, w, bias, scale, _scalar(1), None, x_zero, w_zero]
    return _probe("com.microsoft.QAttention", inputs, math.copysign(1, weight), num_heads=2)


def recurrence(stored: str, weight: int) -> Probe:
    """One step of an LSTM whose gates all see the same sum, scaled to 1 or -1."""
    hidden = 16
    w, zero = _weights(stored, weight, 1, WIDTH, 4 * hidden)
    scale = np.array([1 / abs(WIDTH * weight)], np.float32)
    r, r_scale = np.zeros((1, hidden, 4 * hidden), w.dtype), np.ones(1, np.float32)
    x = np.ones((1, 2, WIDTH), np.float32)
    sign = math.copysign(1, weight)
    gate = 1 / (1 + math.exp(-sign))
    exact = gate * math.tanh(gate * math.tanh(sign))
    zeros = zero.reshape(1)
    inputs = [x, w, r, None, None, None, None, None, scale, zeros, r_scale, zeros]
    return _probe("com.microsoft.DynamicQuantizeLSTM", inputs, exact, hidden_size=hidden)


def blocks(bits: int, rows: int) -> Probe:
    """A MatMulNBits that rounds activations to 8 bits."""
    block = 32
    packed = np.full((COLUMNS, WIDTH // block, block * bits // 8), 255, np.uint8)
    scales = np.ones(COLUMNS * (WIDTH // block), np.float32)
    largest = (1 << bits - 1) - 1
    attributes: Mapping[str, Any] = {"K": WIDTH, "N": COLUMNS, "bits": bits, "block_size": block, "accuracy_level": 4}
    x = np.ones((rows, WIDTH), np.float32)
    return _probe("com.microsoft.MatMulNBits", [x, packed, scales], WIDTH * largest, **attributes)
