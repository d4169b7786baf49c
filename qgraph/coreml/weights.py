"""Constants of a program in the smallest exact form that MIL has, and the rules that quantize.

    W = DequantizeLinear(Wq, scale, zero_point)   =>   constexpr_blockwise_shift_scale(data, scale, offset)
    Wq with at most 2, 4, 8, 16 or 64 levels      =>   its data = constexpr_lut_to_dense(indices, lut)
    Wq or W with many zeros                       =>   constexpr_sparse_to_dense, the scale before it

Integers and scales are taken as they are: nothing is rounded here. Scales that go along an axis stand at every axis in
MIL; where groups do not divide an axis, the scales are repeated over blocks that do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.coreml.data_types import MilType
from qgraph.coreml.site import Graph, Rule, Site, UnfitError, mil_type

__all__ = ["RULES", "StoredWeight", "constant_weight", "emit_array", "emit_weight", "sparse_pays"]

_STORED = {
    ir.DataType.INT4: MilType.INT4,
    ir.DataType.UINT4: MilType.UINT4,
    ir.DataType.INT8: MilType.INT8,
    ir.DataType.UINT8: MilType.UINT8,
    ir.DataType.INT2: MilType.INT4,
    ir.DataType.UINT2: MilType.UINT4,
    ir.DataType.INT32: MilType.INT32,
}
"""Integers of 32 bits are biases: MIL does not dequantize them, so they are written out."""
_INDICES = {1: MilType.UINT1, 2: MilType.UINT2, 3: MilType.UINT3, 4: MilType.UINT4, 6: MilType.UINT6}
_LEAST = 1024
"""Elements below which another form saves nothing worth an operation."""
_PAYS = 0.9
"""The share of the bytes that another form may take at most."""


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A quantized weight: (codes - offset) * scale, block by block.

    Attributes:
        codes: int8 or uint8, whatever the width.
        type: of the codes.
        scale: float, of the rank of the codes; each of its sizes divides that of the codes.
        offset: as `codes`, in the shape of `scale`; None for zero.
    """

    codes: np.ndarray
    type: MilType
    scale: np.ndarray
    offset: np.ndarray | None

    def laid_out(self, layout: Sequence[int]) -> StoredWeight:
        """Return the weight with its axes in another order."""
        if not layout:
            return self
        offset = None if self.offset is None else self.offset.transpose(layout)
        return StoredWeight(self.codes.transpose(layout), self.type, self.scale.transpose(layout), offset)

    def expanded(self) -> np.ndarray:
        """Return the numbers that the weight stands for, in the type of its scales."""
        codes = self.codes.astype(np.float64)
        if self.offset is not None:
            codes -= _repeated(self.offset, self.codes.shape)
        return np.asarray((codes * _repeated(self.scale, self.codes.shape)).astype(self.scale.dtype))


def _repeated(grid: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    for axis, size in enumerate(shape):
        grid = np.repeat(grid, size // grid.shape[axis], axis=axis)
    return grid


def constant_weight(node: ir.Node) -> StoredWeight | None:
    """Return what a DequantizeLinear of constants holds; None if it dequantizes an activation."""
    arrays = [None if value is None else qgraph.ir.constant(value) for value in node.inputs]
    if arrays[0] is None or arrays[1] is None:
        return None
    value = node.inputs[0]
    kind = None if value is None or value.dtype is None else _STORED.get(value.dtype)
    if kind is None:
        raise UnfitError(f"it dequantizes {value.dtype if value else None}, and MIL integers of 4 and 8 bits only")
    codes = _whole(arrays[0], kind)
    given = [arrays[1], *(one for one in arrays[2:3] if one is not None)]
    grids = [_grid(node, codes.shape, array) for array in given]
    offset = _whole(grids[1], kind) if len(grids) > 1 and np.any(_whole(grids[1], kind)) else None
    return StoredWeight(codes, kind, grids[0], offset)


def _whole(array: np.ndarray, kind: MilType) -> np.ndarray:
    return np.ascontiguousarray(array.astype(kind.numpy))


def _grid(node: ir.Node, shape: Sequence[int], array: np.ndarray) -> np.ndarray:
    """Return scales or zero points with one element for each block of every axis."""
    rank = len(shape)
    axis, block = node.attributes.get_int("axis", 1) % max(rank, 1), node.attributes.get_int("block_size", 0)
    if array.size == 1:
        return array.reshape([1] * rank)
    if not block:
        return array.reshape([-1 if one == axis else 1 for one in range(rank)])
    if shape[axis] % block == 0:
        return array
    fine = math.gcd(block, shape[axis])
    return np.repeat(array, block // fine, axis=axis).take(range(shape[axis] // fine), axis=axis)


def emit_weight(graph: Graph, weight: StoredWeight, name: str) -> Any:
    """Add a quantized weight to the program, in the form that takes the fewest bytes."""
    if weight.type is MilType.INT32:
        return emit_array(graph, weight.expanded(), name)
    scale = graph.constant(np.ascontiguousarray(weight.scale), f"{name}_scale")
    levels = np.unique(weight.codes)
    bits = next((bits for bits in _INDICES if len(levels) <= 1 << bits), 8)
    size, kept = weight.codes.size, int(np.count_nonzero(weight.codes))
    table = size * bits + (8 << bits)
    sparse = size + kept * weight.type.bits if weight.offset is None and kept else math.inf
    least = _PAYS * size * weight.type.bits if size >= _LEAST else 0.0
    if sparse < min(least, table):
        mask = weight.codes != 0
        mask_var = _typed(graph, mask.astype(np.uint8), MilType.UINT1, f"{name}_mask")
        data = _typed(graph, weight.codes[mask], weight.type, f"{name}_nonzero")
        places, numbers = graph.emit(
            "constexpr_sparse_blockwise_shift_scale", name, data_mask=mask_var, nonzero_data=data, scale=scale
        )
        return graph.emit("constexpr_sparse_to_dense", name, nonzero_data=numbers, mask=places)
    if table < least:
        return _from_table(graph, weight, levels, bits, scale, name)
    data = _typed(graph, weight.codes, weight.type, f"{name}_codes")
    offset = {} if weight.offset is None else {"offset": _typed(graph, weight.offset, weight.type, f"{name}_offset")}
    return graph.emit("constexpr_blockwise_shift_scale", name, data=data, scale=scale, **offset)


def _from_table(graph: Graph, weight: StoredWeight, levels: np.ndarray, bits: int, scale: Any, name: str) -> Any:
    """A table of the codes that occur, and a scale on what it gives; tables hold whole bytes."""
    wide = MilType.INT8 if weight.codes.dtype.kind == "i" else MilType.UINT8
    table = np.zeros((*[1] * weight.codes.ndim, 1 << bits, 1), wide.numpy)
    table.reshape(-1)[: len(levels)] = levels
    indices = np.searchsorted(levels, weight.codes).astype(np.uint8)
    indices_var = _typed(graph, indices, _INDICES[bits], f"{name}_indices")
    data = graph.emit("constexpr_lut_to_dense", f"{name}_codes", indices=indices_var,
                      lut=_typed(graph, table, wide, f"{name}_table"))  # fmt: skip
    offset = {} if weight.offset is None else {"offset": _typed(graph, weight.offset, wide, f"{name}_offset")}
    return graph.emit("constexpr_blockwise_shift_scale", name, data=data, scale=scale, **offset)


def emit_array(graph: Graph, array: np.ndarray, name: str) -> Any:
    """Add a constant: whole numbers in 32 bits, and floats without their zeros where these are many."""
    array = np.asarray(array, order="C")
    if array.dtype.kind == "f" and sparse_pays(array, 8 * array.itemsize):
        mask = array != 0
        mask_var = _typed(graph, mask.astype(np.uint8), MilType.UINT1, f"{name}_mask")
        data = graph.constant(array[mask], f"{name}_nonzero")
        return graph.emit("constexpr_sparse_to_dense", name, nonzero_data=data, mask=mask_var)
    if array.dtype.kind in "iu" and array.dtype.itemsize != 1:
        limits = np.iinfo(np.int32)
        array = np.clip(array, limits.min, limits.max).astype(np.int32)
    return graph.constant(array, name)


def sparse_pays(array: np.ndarray, bits: int) -> bool:
    """Tell whether a mask and the elements that are not zero take clearly fewer bytes than all elements."""
    kept = int(np.count_nonzero(array))
    return bool(array.size >= _LEAST and kept > 0 and array.size + kept * bits < _PAYS * array.size * bits)


def _typed(graph: Graph, array: np.ndarray, kind: MilType, name: str) -> Any:
    return graph.constant(np.ascontiguousarray(array), name) if kind.bits >= 8 else graph.small(array, kind, name)


def _dequantize(site: Site) -> Any:
    """Of an activation: one scale, or one for each index of an axis."""
    if site.integer("block_size", 0):
        raise UnfitError("activations are quantized in blocks, and in MIL as a whole or by channel")
    zero = {"zero_point": site[2]} if site.has(2) else {}
    return site.emit("dequantize", input=site[0], scale=site[1], **zero, **_quantized_axis(site))


def _quantize(site: Site) -> Any:
    if site.integer("block_size", 0) or (
        site.has(2) and site.value(2).dtype not in (ir.DataType.INT8, ir.DataType.UINT8)
    ):
        raise UnfitError("activations are quantized to 8 bits in MIL, as a whole or by channel")
    kind = mil_type(site.node.outputs[0])
    zero = {"zero_point": site[2]} if site.has(2) else {}
    return site.emit("quantize", input=site[0], scale=site[1], output_dtype=kind.value, **zero, **_quantized_axis(site))


def _quantized_axis(site: Site) -> dict[str, int]:
    return {"axis": site.axis(1)} if site.array(1).ndim else {}


RULES: Mapping[str, Rule] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
