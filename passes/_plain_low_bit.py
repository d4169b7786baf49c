"""Weights of few bits in plain operators: bytes stay as they are stored, and are unpacked by masks and shifts.

bytes [..., n]    =>    [..., n * 8/bits]    lowest bits first, but in MatMulBnb4 the high half
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.numerics.formats import CODE_BOOKS
from qgraph.numerics.packing import pack_bits, unpack_bits
from qgraph.passes._plain_operators import Emitter, PlainAlready, Rewriting, UnfitError, static_sizes

__all__ = ["MICROSOFT", "STANDARD"]

_BYTE = 8
_FEW_BITS = {ir.DataType.INT4: 4, ir.DataType.UINT4: 4, ir.DataType.INT2: 2, ir.DataType.UINT2: 2}
_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
"""Magnitudes by the three low bits; the fourth is the sign."""
_LEVELS = {0: (*_FP4, *(-level for level in _FP4)), 1: CODE_BOOKS["nf4"].levels}
"""Of MatMulBnb4, by its `quant_type`."""


def unpacked(emit: Emitter, packed: ir.Value, bits: int, shape: Sequence[int]) -> ir.Value:
    """Emit what makes uint8 codes of `shape` of bytes; 0 in the shape keeps a size of the bytes."""
    if bits == _BYTE:
        return emit("Reshape", packed, emit.integers("shape", shape))
    mask = emit.constant("mask", np.asarray((1 << bits) - 1, np.uint8))
    parts = []
    for place in range(_BYTE // bits):
        moved = packed
        if place:
            shift = emit.constant(f"shift{place}", np.asarray(place * bits, np.uint8))
            moved = emit("BitShift", packed, shift, direction="RIGHT")
        kept = emit("BitwiseAnd", moved, mask)
        parts.append(emit("Unsqueeze", kept, emit.integers("last", [-1])))
    return emit("Reshape", emit.join(parts, -1), emit.integers("shape", shape))


def _scaled(emit: Emitter, codes: ir.Value, zeros: ir.Value, scales: ir.Value, dtype: ir.DataType) -> ir.Value:
    real = emit("Cast", codes, to=int(dtype))
    return emit("Mul", emit("Sub", real, zeros), scales)


def _known(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    array = qgraph.ir.constant(value)
    if array is None:
        raise UnfitError(f"its input {index} is computed")
    return array


# --- DequantizeLinear ------------------------------------------------------------------------------------------------


def _dequantize(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    value = node.inputs[0]
    block = node.attributes.get_int("block_size", 0)
    bits = 0 if value is None or value.dtype is None else _FEW_BITS.get(value.dtype, 0)
    if not block and not bits:
        raise PlainAlready
    scales, zeros = _known(node, 1), _known(node, 2)
    if value is None or scales is None:
        raise UnfitError("it has no data or scale")
    sizes = static_sizes(value, slice(None), "a size of its input is")
    shifted = scales.astype(np.float32) * 0 if zeros is None else zeros.astype(np.float32)
    codes = value
    if bits:
        stored = _known(node, 0)
        if stored is None:
            raise UnfitError("it has no data")
        least = 0 if value.dtype in (ir.DataType.UINT4, ir.DataType.UINT2) else -(1 << bits - 1)
        codes = _repacked(emit, stored.astype(np.int16) - least, bits, sizes)
        shifted = shifted - least
    axis = node.attributes.get_int("axis", 1)
    blocked, shape = _by_blocks(sizes, axis, block, scales)
    dtype = node.outputs[0].dtype or ir.DataType.FLOAT
    if blocked != sizes:
        codes = emit("Reshape", codes, emit.integers("blocks", blocked))
    spread = [_spread(array, sizes, axis, block, shape) for array in (shifted, scales)]
    number = dtype.numpy()
    made = _scaled(
        emit, codes, emit.constant("zero", spread[0].astype(number)), emit.constant("scale", spread[1].astype(number)),
        dtype,
    )  # fmt: skip
    return [emit("Reshape", made, emit.integers("back", sizes)) if blocked != sizes else made]


def _repacked(emit: Emitter, codes: np.ndarray, bits: int, sizes: Sequence[int]) -> ir.Value:
    flat = codes.astype(np.uint8).reshape(-1)
    if flat.size * bits % _BYTE:
        return emit.constant("codes", codes.astype(np.uint8))
    packed = pack_bits(flat.reshape(1, -1), bits).reshape(-1)
    return unpacked(emit, emit.constant("packed", packed), bits, sizes)


def _by_blocks(sizes: list[int], axis: int, block: int, scales: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the sizes with the axis of blocks as two, and what scales are reshaped to."""
    axis %= max(1, len(sizes))
    if not block:
        shape = [1] * len(sizes)
        if scales.ndim:
            shape[axis] = scales.size
        return sizes, shape
    if sizes[axis] % block:
        return sizes, []
    blocked = [*sizes[:axis], sizes[axis] // block, block, *sizes[axis + 1 :]]
    return blocked, [*blocked[: axis + 1], 1, *blocked[axis + 2 :]]


def _spread(array: np.ndarray, sizes: Sequence[int], axis: int, block: int, shape: Sequence[int]) -> np.ndarray:
    """Return scales or zero points in a form that broadcasts: one for each element where blocks are ragged."""
    if not array.ndim:
        return array
    if shape:
        return array.reshape(shape)
    return np.repeat(array, block, axis=axis).take(range(sizes[axis]), axis=axis)


# --- MatMulNBits, GatherBlockQuantized -------------------------------------------------------------------------------


def _matmul_nbits(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 128)
    inputs, outputs = node.attributes.get_int("K"), node.attributes.get_int("N")
    data, packed = node.inputs[0], node.inputs[1]
    scales = _known(node, 2)
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise UnfitError("it has a g_idx")
    if data is None or packed is None or scales is None or bits not in (2, 4, _BYTE):
        raise UnfitError(f"it has {bits} bits, or no weight")
    groups = -(-inputs // block)
    dtype = node.outputs[0].dtype or data.dtype or ir.DataType.FLOAT
    zeros = _zeros(_known(node, 3), bits, outputs, groups)
    codes = unpacked(emit, packed, bits, [outputs, groups, block])
    number = dtype.numpy()
    weight = _scaled(
        emit, codes, emit.constant("zero", zeros.reshape(outputs, groups, 1).astype(number)),
        emit.constant("scale", scales.reshape(outputs, groups, 1).astype(number)), dtype,
    )  # fmt: skip
    weight = emit("Reshape", weight, emit.integers("matrix", [outputs, groups * block]))
    if groups * block != inputs:
        weight = emit(
            "Slice", weight, emit.integers("start", [0]), emit.integers("end", [inputs]), emit.integers("axis", [1])
        )
    product = emit("MatMul", data, emit("Transpose", weight, perm=[1, 0]))
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    return [product if bias is None else emit("Add", product, bias)]


def _matmul_bnb4(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Write a product with a matrix of levels: rows end to end in blocks, two codes in a byte, the high half first."""
    data, packed, largest = node.inputs[:3]
    inputs, outputs = node.attributes.get_int("K"), node.attributes.get_int("N")
    block, levels = node.attributes.get_int("block_size"), _LEVELS.get(node.attributes.get_int("quant_type"))
    if levels is None or data is None or packed is None:
        raise UnfitError("its levels are neither FP4 nor NF4")
    if inputs * outputs % block or not node.attributes.get_int("transB", 1):
        raise UnfitError(f"its {outputs} rows of {inputs} are no whole blocks of {block}, or it has columns")
    dtype = node.outputs[0].dtype or data.dtype or ir.DataType.FLOAT
    high = emit("BitShift", packed, emit.constant("shift", np.asarray(4, np.uint8)), direction="RIGHT")
    low = emit("BitwiseAnd", packed, emit.constant("mask", np.asarray(15, np.uint8)))
    last = emit.integers("last", [-1])
    codes = emit.join([emit("Unsqueeze", emit("Reshape", half, last), last) for half in (high, low)], -1)
    places = emit("Cast", emit("Reshape", codes, emit.integers("blocks", [-1, block])), to=int(ir.DataType.INT32))
    table = emit.constant("levels", np.asarray(levels, dtype.numpy()))
    scales = emit("Reshape", largest, emit.integers("scales", [-1, 1]))
    weight = emit("Mul", emit("Gather", table, places, axis=0), scales)
    rows = emit("Reshape", weight, emit.integers("matrix", [outputs, inputs]))
    return [emit("MatMul", data, emit("Transpose", rows, perm=[1, 0]))]


def _zeros(packed: np.ndarray | None, bits: int, rows: int, groups: int) -> np.ndarray:
    if packed is None:
        return np.full((rows, groups), 1 << bits - 1, np.float32)
    if packed.dtype != np.uint8:
        return packed.reshape(rows, groups).astype(np.float32)
    return unpack_bits(packed.reshape(rows, -1), bits, groups).astype(np.float32)


def _gather(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 128)
    table, indices = node.inputs[0], node.inputs[1]
    scales = _known(node, 2)
    if table is None or indices is None or scales is None or table.dtype != ir.DataType.UINT8 or scales.ndim != 2:
        raise UnfitError("its table is no matrix of bytes")
    rows, groups = scales.shape
    width = static_sizes(table, [-1], "its width is")[0] * _BYTE // bits
    axis = node.attributes.get_int("quantize_axis", -1)
    if node.attributes.get_int("gather_axis", 0) != 0 or axis not in (-1, 1) or width != groups * block:
        raise UnfitError("it looks up something else than rows of whole groups")
    if indices.shape is None:
        raise UnfitError("the rank of its indices is not known")
    kept = [0] * len(indices.shape)
    dtype = node.outputs[0].dtype or ir.DataType.FLOAT
    number = dtype.numpy()
    zeros = _zeros(_known(node, 3), bits, rows, groups)
    codes = unpacked(emit, emit("Gather", table, indices, axis=0), bits, [*kept, groups, block])
    last = emit.integers("last", [-1])
    found = [
        emit("Unsqueeze", emit("Gather", emit.constant(name, array.astype(number)), indices, axis=0), last)
        for name, array in (("zero", zeros), ("scale", scales))
    ]
    return [emit("Reshape", _scaled(emit, codes, found[0], found[1], dtype), emit.integers("row", [*kept, width]))]


STANDARD: Mapping[str, Rewriting] = {"DequantizeLinear": _dequantize}
MICROSOFT: Mapping[str, Rewriting] = {
    "GatherBlockQuantized": _gather,
    "MatMulBnb4": _matmul_bnb4,
    "MatMulNBits": _matmul_nbits,
}
