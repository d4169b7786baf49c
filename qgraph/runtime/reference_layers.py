"""Convolution, products, pooling and the two ends of a quantized graph, in numpy, by a loop over kernel positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qgraph.numerics.operators import Attributes, Inputs, NotFoldedError, Operator
from qgraph.runtime.reference_arithmetic import fitting

__all__ = ["LAYERS"]

_INT32 = np.dtype(np.int32)


class _Windows(NamedTuple):
    """How a kernel moves over the spatial axes, one entry each.

    Attributes:
        begin: elements put before.
        end: elements put after, those included that only `ceil_mode` reaches.
        counts: windows.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    counts: tuple[int, ...]

    def padded(self, x: np.ndarray, value: int) -> np.ndarray:
        """Pad the spatial axes of `x`, [N, C, ...]."""
        return np.pad(x, [(0, 0), (0, 0), *zip(self.begin, self.end, strict=True)], constant_values=value)

    def positions(self, padded: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yield each kernel position with the elements that it meets in all windows, [N, C, *counts]."""
        for position in itertools.product(*map(range, self.kernel)):
            places = tuple(
                slice(at * dilation, at * dilation + (count - 1) * stride + 1, stride)
                for at, dilation, count, stride in zip(position, self.dilations, self.counts, self.strides, strict=True)
            )
            yield position, padded[(slice(None), slice(None), *places)]


def _windows(attributes: Attributes, sizes: Sequence[int], kernel: Sequence[int]) -> _Windows:
    rank = len(sizes)
    strides, dilations = (tuple(attributes.get(name, [1] * rank)) for name in ("strides", "dilations"))
    reach = [(width - 1) * dilation + 1 for width, dilation in zip(kernel, dilations, strict=True)]
    mode = attributes.get("auto_pad", "NOTSET")
    begin, end, counts = [], [], []
    for axis, size in enumerate(sizes):
        pads = _pads(attributes, mode, axis, rank, size, strides[axis], reach[axis])
        room = size + sum(pads) - reach[axis]
        count = room // strides[axis] + 1
        if attributes.get("ceil_mode", 0) and mode == "NOTSET":
            count = -(-room // strides[axis]) + 1
            # A window that starts in the padding at the end holds nothing.
            count -= (count - 1) * strides[axis] >= size + pads[0]
        begin.append(pads[0])
        end.append(max(pads[1], (count - 1) * strides[axis] + reach[axis] - size - pads[0]))
        counts.append(count)
    return _Windows(tuple(kernel), strides, dilations, tuple(begin), tuple(end), tuple(counts))


def _pads(
    attributes: Attributes, mode: str, axis: int, rank: int, size: int, stride: int, reach: int
) -> tuple[int, int]:
    if mode.startswith("SAME"):
        total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
        less, more = total // 2, total - total // 2
        return (less, more) if mode == "SAME_UPPER" else (more, less)
    if mode == "VALID":
        return 0, 0
    pads = attributes.get("pads", [0] * 2 * rank)
    return int(pads[axis]), int(pads[axis + rank])


def _zero_point(inputs: Inputs, index: int) -> np.ndarray:
    given = inputs[index] if len(inputs) > index else None
    return np.zeros((), np.int64) if given is None else given.astype(np.int64)


def _conv_integer(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    """ConvInteger: x [N, C, ...], w [M, C / groups, ...], zero points scalar, that of w also [M].

    A product of two 9-bit integers has 17 bits, so float64 adds up fewer than 2^35 of them exactly.
    """
    x, weight = inputs[0], inputs[1].astype(np.int64)
    weight = weight - _zero_point(inputs, 3).reshape(-1, *[1] * (weight.ndim - 1))
    groups, zero_point = int(attributes.get("group", 1)), _zero_point(inputs, 2)
    windows = _windows(attributes, x.shape[2:], weight.shape[2:])
    padded = windows.padded(x.astype(np.int64), int(zero_point.item())) - zero_point
    batch, channels, outputs = x.shape[0], x.shape[1], weight.shape[0]
    filters = weight.reshape(groups, outputs // groups, channels // groups, *weight.shape[2:]).astype(np.float64)
    total = np.zeros((batch, groups, outputs // groups, math.prod(windows.counts)))
    for position, met in windows.positions(padded):
        columns = met.reshape(batch, groups, channels // groups, math.prod(windows.counts)).astype(np.float64)
        total += filters[(..., *position)] @ columns
    return fitting(total.reshape(batch, outputs, *windows.counts), _INT32)


def _matmul_integer(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    """MatMulInteger: zero points scalar, or of a one per row [M] and of b one per column [N]; exact as above."""
    del attributes
    zero_a, zero_b = _zero_point(inputs, 2), _zero_point(inputs, 3)
    if zero_a.ndim == 1 and zero_a.size > 1:
        zero_a = zero_a.reshape(-1, 1)
    a, b = inputs[0].astype(np.int64) - zero_a, inputs[1].astype(np.int64) - zero_b
    return fitting(np.asarray(a.astype(np.float64) @ b.astype(np.float64)), _INT32)


def _max_pool(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    """MaxPool: padding never wins, being the least number of the type."""
    x = inputs[0]
    windows = _windows(attributes, x.shape[2:], attributes["kernel_shape"])
    least = int(np.iinfo(x.dtype).min)
    result = np.full((*x.shape[:2], *windows.counts), least, x.dtype)
    for _, met in windows.positions(windows.padded(x, least)):
        result = np.maximum(result, met)
    return result


def _along(parameter: np.ndarray, attributes: Attributes, rank: int) -> np.ndarray:
    if attributes.get("block_size", 0) or parameter.ndim > 1:
        raise NotFoldedError("it is quantized in blocks")
    if parameter.size == 1:
        return parameter.reshape(())
    shape = [1] * rank
    shape[int(attributes.get("axis", 1))] = -1
    return parameter.reshape(shape)


def _quantize_linear(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    """QuantizeLinear: saturate(round_half_even(x / scale) + zero_point), the quotient in float32."""
    if len(inputs) < 3 or inputs[2] is None:
        raise NotFoldedError("it has no zero point")
    x, scale, zero_point = inputs
    limits = np.iinfo(zero_point.dtype)
    quotient = np.rint(x / _along(scale, attributes, x.ndim)).astype(np.float64)
    moved = quotient + _along(zero_point, attributes, x.ndim).astype(np.float64)
    return np.asarray(np.clip(moved, limits.min, limits.max)).astype(zero_point.dtype)


def _dequantize_linear(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    """DequantizeLinear: (x - zero_point) * scale, the difference exact, the product in float32."""
    x, scale = inputs[:2]
    zero_point = _along(_zero_point(inputs, 2), attributes, x.ndim)
    difference = (x.astype(np.int64) - zero_point).astype(scale.dtype)
    return np.asarray(difference * _along(scale, attributes, x.ndim))


LAYERS: Mapping[str, Operator] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize_linear,
    "MatMulInteger": _matmul_integer,
    "MaxPool": _max_pool,
    "QuantizeLinear": _quantize_linear,
}
"""Operators with a kernel, products, and what leads from floats to integers and back."""
