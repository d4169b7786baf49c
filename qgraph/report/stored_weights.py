"""The quantized weight of a layer as it stands in an artifact, in whatever form the target reads it.

DequantizeLinear(Wq, scale, zero_point)     per tensor, per channel, or in blocks; of int4 perhaps behind a Cast
DynamicQuantizeMatMul, MatMulIntegerToFloat
MatMulNBits
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.numerics.packing import from_matmul_nbits

__all__ = ["Grid", "StoredWeight", "layer_of", "read_grid", "stored_weight"]

_FUSED = {"DynamicQuantizeMatMul": (2, 3), "MatMulIntegerToFloat": (3, 5)}
"""Operator -> the inputs that hold scale and zero point of the weight."""
_LAYERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "MatMulNBits", *_FUSED})
_THROUGH = frozenset({"QuantizeLinear", "DequantizeLinear", "Relu", "Clip", "Cast", "Identity", "Sigmoid", "Tanh"})
_FARTHEST = 6
_MOST_ELEMENTS = 1 << 24
"""Larger weights are not read: their forms would take a multiple of this in memory."""


class Grid(NamedTuple):
    """Integers and what they stand for: real = (integer - zero) * scale."""

    scale: np.ndarray
    zero: np.ndarray
    lowest: int
    highest: int
    dtype: str


class StoredWeight(NamedTuple):
    """A weight in integers.

    Attributes:
        name: of the tensor that holds them.
        codes: the integers, in the layout of the float weight.
        scale: float32, broadcasts to `codes`.
        zero: float32, likewise.
        lowest: integer that the type can hold.
        highest: likewise.
        dtype: of the integers.
        scales: how many there are.
    """

    name: str
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    lowest: int
    highest: int
    dtype: str
    scales: int


def layer_of(value: ir.Value | None) -> ir.Node | None:
    """Return the layer with a weight that makes a value, through what is applied to its output."""
    for _ in range(_FARTHEST):
        node = None if value is None else value.producer()
        if node is None:
            return None
        if node.op_type in _LAYERS:
            return node
        computed = [one for one in node.inputs if one is not None and one.producer() is not None]
        if node.op_type == "Add" and len(computed) == 1:  # a bias
            value = computed[0]
        elif node.op_type in _THROUGH:
            value = node.inputs[0]
        else:
            return None
    return None


def _span(dtype: ir.DataType) -> tuple[int, int]:
    lowest = -(1 << (dtype.bitwidth - 1)) if dtype.is_signed() else 0
    return lowest, lowest + (1 << dtype.bitwidth) - 1


def read_grid(node: ir.Node, integers: ir.Value, place: tuple[int, int] = (1, 2)) -> Grid | None:
    """Read scale and zero point of a node, or return None where they are no constants of integers.

    Args:
        node: that has them.
        integers: what it makes or reads.
        place: which inputs hold scale and zero point.
    """
    scale = qgraph.ir.constant(node.inputs[place[0]])
    told = node.inputs[place[1]] if len(node.inputs) > place[1] else None
    zero = qgraph.ir.constant(told)
    dtype = told.dtype if told is not None and told.dtype is not None else integers.dtype
    if scale is None or dtype is None or not dtype.is_integer() or dtype.bitwidth > 16:
        return None
    zeros = np.zeros(1, np.float32) if zero is None else zero.astype(np.float32)
    return Grid(scale.astype(np.float32), zeros, *_span(dtype), dtype.name.lower())


def stored_weight(layer: ir.Node) -> StoredWeight | None:
    """Return the quantized weight of a layer, its second input; None where it has none or of a form unknown here."""
    weight = layer.inputs[1]
    if weight is None:
        return None
    if layer.op_type == "MatMulNBits":
        return _packed(layer, weight)
    if layer.op_type in _FUSED:
        grid = read_grid(layer, weight, _FUSED[layer.op_type])
        return None if grid is None else _laid_out(weight, grid, -1, 0)
    node = weight.producer()
    if node is None or not qgraph.ir.is_op(node, "DequantizeLinear"):
        return None
    integers = node.inputs[0]
    cast = integers.producer() if integers is not None else None
    if cast is not None and qgraph.ir.is_op(cast, "Cast"):  # fewer bits in the file than the kernels read
        integers = cast.inputs[0]
    grid = None if integers is None else read_grid(node, integers)
    if integers is None or grid is None or integers.dtype is None or integers.const_value is None:
        return None
    lowest, highest = _span(integers.dtype)
    grid = grid._replace(lowest=lowest, highest=highest, dtype=integers.dtype.name.lower())
    return _laid_out(
        integers, grid, node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    )  # fmt: skip


def _laid_out(integers: ir.Value, grid: Grid, axis: int, block: int) -> StoredWeight | None:
    codes = None if _is_large(integers) else qgraph.ir.constant(integers)
    if codes is None:
        return None
    codes = codes.astype(np.float32)
    axis %= max(codes.ndim, 1)
    spread = [_spread(array, codes.shape, axis, block) for array in (grid.scale, grid.zero)]
    if spread[0] is None or spread[1] is None:
        return None
    return StoredWeight(
        integers.name or "", codes, spread[0], spread[1], grid.lowest, grid.highest, grid.dtype, int(grid.scale.size)
    )  # fmt: skip


def _spread(array: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray | None:
    """Return scales or zero points in a form that broadcasts, or None where they do not fit."""
    if array.size == 1:
        return array.reshape((1,) * len(shape))
    if block:
        repeated = np.repeat(array, block, axis=axis)
        return np.take(repeated, np.arange(shape[axis]), axis=axis) if repeated.ndim == len(shape) else None
    if array.size != shape[axis]:
        return None
    return array.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _is_large(integers: ir.Value) -> bool:
    return integers.const_value is not None and integers.const_value.size > _MOST_ELEMENTS


def _packed(layer: ir.Node, weight: ir.Value) -> StoredWeight | None:
    if _is_large(weight):
        return None
    codes, scales = qgraph.ir.constant(weight), qgraph.ir.constant(layer.inputs[2])
    zeros_input = layer.inputs[3] if len(layer.inputs) > 3 else None
    zeros = qgraph.ir.constant(zeros_input)
    if codes is None or scales is None or (zeros_input is not None and (zeros is None or zeros.dtype != np.uint8)):
        return None
    bits, block = layer.attributes.get_int("bits", 4), layer.attributes.get_int("block_size", 32)
    inputs = layer.attributes.get_int("K", 0)
    found = from_matmul_nbits(codes, scales, zeros, inputs=inputs, bits=bits, block=block)
    zero = np.zeros_like(found.scale) if found.zero_point is None else found.zero_point.astype(np.float32)
    scale, zero = (np.repeat(one, block, axis=1)[:, :inputs].T for one in (found.scale, zero))
    top = (1 << bits) - 1
    stored = found.codes.T.astype(np.float32)
    return StoredWeight(weight.name or "", stored, scale, zero, 0, top, f"uint{bits}", int(scales.size))
