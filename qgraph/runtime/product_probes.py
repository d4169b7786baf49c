"""How ONNX Runtime's kernels for the CPU add products of bytes on the processor at hand: small models that are run.

    vpmaddubsw    u8[2n], s8[2n]  ->  s16[n]      saturate(a0 * b0 + a1 * b1)       processors without VNNI

All activations of a probe are as large as they can be, and all weights as large or as small, so that a kernel that adds
two neighbouring products in 16 bits gives another result than their sum. Where a kernel has several ways (one row or
more, channels that fill registers or do not), a form has a probe for each. Source: Intel 64 and IA-32 Architectures
Software Developer's Manual, volume 2, PMADDUBSW; see `qgraph.numerics.dot_products`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.capabilities import ByteProduct
from qgraph.errors import UserError
from qgraph.runtime.session import open_session

__all__ = ["FORMS", "Form", "Probe", "found_products"]

SOURCE = "product"
_OPSET = 21
_IR_VERSION = 10
_WRONG = 0.05
"""Relative error from which a sum has saturated: rounding stays below a hundredth, saturation takes more."""
_ROWS = (1, 8)
_WIDTH, _COLUMNS = 64, 32
_ACTIVATION = 255
"""Of every activation less its zero point."""
_EXTREMES = {"uint8": (255,), "int8": (127, -128)}
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


@dataclasses.dataclass(frozen=True)
class Form:
    """A kernel with data types, and conditions in words.

    Attributes:
        kernel: as tables call it.
        weights: its inputs that are weights.
        activations: their type; "float32" where it quantizes them itself.
        stored: type of the weights.
        when: what else holds.
        builds: make the probes.
    """

    kernel: str
    weights: tuple[int, ...]
    activations: str
    stored: str
    when: tuple[str, ...]
    builds: tuple[Callable[[], Probe], ...] = dataclasses.field(repr=False, compare=False)


def found_products(processor: str, forms: Sequence[Form] | None = None) -> Iterator[ByteProduct]:
    """Yield how each form adds up here; forms that the installed runtime has no kernel for are left out.

    Args:
        processor: what the one at hand is called where sums saturate.
        forms: all, if not given.

    Raises:
        UserError: ONNX Runtime is not installed.
    """
    for form in FORMS if forms is None else forms:
        try:
            wrong = [build().saturates() for build in form.builds]
        except UserError:
            continue
        yield ByteProduct(form.kernel, form.weights, form.activations, form.stored, form.when,
                          (processor,) if any(wrong) else (), SOURCE)  # fmt: skip


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


def _product(kernel: str, activations: str, stored: str, rows: int, weight: int) -> Probe:
    """A product [rows, 64] x [64, 32]."""
    x, x_zero = _activations(activations if activations != "float32" else "uint8", rows, _WIDTH)
    w, w_zero = _weights(stored, weight, _WIDTH, _COLUMNS)
    total = _WIDTH * _ACTIVATION * weight
    one = _scalar(1)
    if kernel == "MatMulInteger":
        return _probe(kernel, [x, w, x_zero, w_zero], total, np.int32)
    if kernel == "com.microsoft.MatMulIntegerToFloat":
        return _probe(kernel, [x, w, one, one, x_zero, w_zero], total)
    if kernel == "com.microsoft.DynamicQuantizeMatMul":
        return _probe(kernel, [np.full((rows, _WIDTH), _ACTIVATION, np.float32), w, one, w_zero], total)
    scale, zero, exact = _result(total, x.dtype)
    bias = [None] if kernel == "com.microsoft.QGemm" else []
    return _probe(kernel, [x, one, x_zero, w, one, w_zero, *bias, scale, zero], exact, x.dtype)


def _convolution(
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


def _attention(activations: str, stored: str, weight: int) -> Probe:
    """Attention of rows that are all the same: the values come out, whatever the scores."""
    x, x_zero = _activations(activations, 1, 4, _WIDTH)
    w, w_zero = _weights(stored, weight, _WIDTH, 3 * _WIDTH)
    scale = _scalar(1 / abs(_WIDTH * _ACTIVATION * weight))
    bias = np.zeros(3 * _WIDTH, np.float32)
    inputs = [x, w, bias, scale, _scalar(1), None, x_zero, w_zero]
    return _probe("com.microsoft.QAttention", inputs, math.copysign(1, weight), num_heads=2)


def _recurrence(stored: str, weight: int) -> Probe:
    """One step of an LSTM whose gates all see the same sum, scaled to 1 or -1."""
    hidden = 16
    w, zero = _weights(stored, weight, 1, _WIDTH, 4 * hidden)
    scale = np.array([1 / abs(_WIDTH * weight)], np.float32)
    r, r_scale = np.zeros((1, hidden, 4 * hidden), w.dtype), np.ones(1, np.float32)
    x = np.ones((1, 2, _WIDTH), np.float32)
    sign = math.copysign(1, weight)
    gate = 1 / (1 + math.exp(-sign))
    exact = gate * math.tanh(gate * math.tanh(sign))
    zeros = zero.reshape(1)
    inputs = [x, w, r, None, None, None, None, None, scale, zeros, r_scale, zeros]
    return _probe("com.microsoft.DynamicQuantizeLSTM", inputs, exact, hidden_size=hidden)


def _blocks(bits: int, rows: int) -> Probe:
    """A MatMulNBits that rounds activations to 8 bits."""
    block = 32
    packed = np.full((_COLUMNS, _WIDTH // block, block * bits // 8), 255, np.uint8)
    scales = np.ones(_COLUMNS * (_WIDTH // block), np.float32)
    largest = (1 << bits - 1) - 1
    attributes: Mapping[str, Any] = {"K": _WIDTH, "N": _COLUMNS, "bits": bits, "block_size": block, "accuracy_level": 4}
    x = np.ones((rows, _WIDTH), np.float32)
    return _probe("com.microsoft.MatMulNBits", [x, packed, scales], _WIDTH * largest, **attributes)


_PAIRS = (("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8"), ("int8", "uint8"))
_DENSE = ((32, 3, 1, 2), (20, 3, 1, 2), (32, 1, 1, 2), (32, 3, 2, 2))
_DEPTHWISE = ((32, 3, 32, 2), (20, 3, 20, 2), (32, 5, 32, 2), (32, 3, 32, 1), (32, 3, 32, 3))
"""Channels, size of the kernel, groups, axes of the image."""


def _forms() -> Iterator[Form]:
    products = {
        "MatMulInteger": 1,
        "com.microsoft.MatMulIntegerToFloat": 1,
        "QLinearMatMul": 3,
        "com.microsoft.QGemm": 3,
    }
    for (kernel, index), pair in itertools.product(products.items(), _PAIRS):
        yield Form(kernel, (index,), *pair, (), _built(_product, pair[1], ((kernel, *pair, rows) for rows in _ROWS)))
    kernel = "com.microsoft.DynamicQuantizeMatMul"
    for stored in _EXTREMES:
        builds = _built(_product, stored, ((kernel, "float32", stored, rows) for rows in _ROWS))
        yield Form(kernel, (1,), "float32", stored, (), builds)
    convolutions = {"ConvInteger": 1, "QLinearConv": 3, "com.microsoft.QLinearConv": 3}
    for (kernel, index), pair in itertools.product(convolutions.items(), _PAIRS):
        for when, sizes in (((), _DENSE), (("depthwise",), _DEPTHWISE)):
            builds = _built(_convolution, pair[1], ((kernel, *pair, *one) for one in sizes))
            yield Form(kernel, (index,), *pair, when, builds)
    for pair in _PAIRS:
        yield Form("com.microsoft.QAttention", (1,), *pair, (), _built(_attention, pair[1], (pair,)))
    for stored in _EXTREMES:
        builds = _built(_recurrence, stored, ((stored,),))
        yield Form("com.microsoft.DynamicQuantizeLSTM", (1, 2), "float32", stored, (), builds)
    for bits in (2, 4, 8):
        builds = tuple(functools.partial(_blocks, bits, rows) for rows in _ROWS)
        yield Form("com.microsoft.MatMulNBits", (1,), "float32", "uint8", (f"{bits} bits",), builds)


def _built(
    build: Callable[..., Probe], stored: str, arguments: Iterable[Sequence[Any]]
) -> tuple[Callable[[], Probe], ...]:
    """Return the probes of weights of both extremes, for each of some arguments."""
    return tuple(functools.partial(build, *one, weight) for one in arguments for weight in _EXTREMES[stored])


FORMS: tuple[Form, ...] = tuple(_forms())
"""Every form of which a table may say something."""
