"""Quantized weights in the layouts that operators read, exact to the bit, and back.

    matmul_nbits            com.microsoft MatMulNBits: B [N, G, group * bits / 8], low bits first
    gather_block_quantized  com.microsoft GatherBlockQuantized: rows of packed codes
    matmul_bnb4             com.microsoft MatMulBnb4: NF4, high half first
    onnx_int, onnx_float8   the inputs of an ONNX DequantizeLinear with block_size

Not every width has a kernel. `container` names the scheme that holds a scheme's numbers exactly and that kernels do
execute, and `to_container` brings a weight there:

    3 bits -> 4      5 and 6 bits -> 8      ternary -> 2      mxfp4, nvfp4 -> 8 (their levels are halves of integers)

NF4 has levels that no integers hold: MatMulBnb4 runs it exactly, and in 8 bits each level moves by at most 1/254.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qgraph.numerics.weights import QuantizedWeight, WeightScheme, levels

__all__ = [
    "BnbWeight",
    "DequantizeInputs",
    "PackedWeight",
    "block_size",
    "container",
    "from_matmul_nbits",
    "gather_block_quantized",
    "matmul_bnb4",
    "matmul_nbits",
    "onnx_float8",
    "onnx_int",
    "pack_bits",
    "to_container",
    "unpack_bits",
    "widen",
]

_LARGEST_BLOCK = {2: 128, 4: 256, 8: 256}
"""The longest block that MatMulNBits runs with integer kernels; a scale for the whole row is repeated over these."""
_LEAST_BLOCK = 16
_ROWS = 1 << 16
"""Bytes of codes that are packed at a time, so that they stay in the cache."""
_FLOAT8 = {"fp8e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "fp8e5m2": np.dtype(ml_dtypes.float8_e5m2)}
_ONNX_TYPES = {
    (2, True): np.dtype(ml_dtypes.int2),
    (2, False): np.dtype(ml_dtypes.uint2),
    (4, True): np.dtype(ml_dtypes.int4),
    (4, False): np.dtype(ml_dtypes.uint4),
    (8, True): np.dtype(np.int8),
    (8, False): np.dtype(np.uint8),
}


class PackedWeight(NamedTuple):
    """What MatMulNBits and GatherBlockQuantized read.

    Attributes:
        codes: uint8, [N, G, block * bits / 8] or [N, ceil(K * bits / 8)].
        scales: float32, [N * G] or [N, G].
        zero_points: uint8, packed, each row filled up to whole bytes; None when all are 2^(bits-1).
        block: inputs that share a scale: the operators' `block_size`.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    block: int


class BnbWeight(NamedTuple):
    """What MatMulBnb4 reads: codes uint8 [N * K / 2], scales float32 [N * K / block], and the block."""

    codes: np.ndarray
    scales: np.ndarray
    block: int


class DequantizeInputs(NamedTuple):
    """The inputs and attributes of a DequantizeLinear.

    Attributes:
        values: codes in their ONNX type (ml_dtypes for 2 and 4 bits and float8), one to an element, [N, K] or [K, N].
        scale: float32, blocked along `axis`, or [N] when rows have one scale.
        zero_point: as `values`, in the shape of `scale`; None when it is 0.
        axis: of the blocks, or of the scales.
        block_size: 0 when rows have one scale.
    """

    values: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    axis: int
    block_size: int


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes along the last axis, the first into the lowest bits of a byte; rows are filled up with zeros.

    Args:
        codes: uint8 [..., n], below 2^bits.
        bits: 2, 4 or 8.

    Returns:
        uint8 [..., ceil(n * bits / 8)]; at 8 bits `codes` itself.

    Raises:
        ValueError: another width.
    """
    _require_width(bits)
    if bits == 8:
        return codes
    share = 8 // bits
    short = -codes.shape[-1] % share
    if short:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    shape = (*codes.shape[:-1], codes.shape[-1] // share)
    # Neighbouring codes are read as one little-endian word and moved together by shifts.
    words = np.ascontiguousarray(codes).reshape(-1).view("<u2" if share == 2 else "<u4")
    packed = np.empty(words.size, np.uint8)
    step = _ROWS // share
    work = np.empty(min(step, words.size), words.dtype)
    for start in range(0, words.size, step):
        word = words[start : start + step]
        part = work[: word.size]
        np.right_shift(word, 8 - bits, out=part)
        part |= word
        if share == 4:
            # Two shifts of 12 bring the upper pair beside the lower one.
            np.copyto(packed[start : start + step], (part & 0xF) | (part >> 12), casting="unsafe")
        else:
            np.copyto(packed[start : start + step], part, casting="unsafe")
    return packed.reshape(shape)


def unpack_bits(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Return the first `size` codes (uint8 [..., size]) of each row that `pack_bits` packed.

    Raises:
        ValueError: the width is not 2, 4 or 8, or the rows are shorter.
    """
    _require_width(bits)
    share = 8 // bits
    if packed.shape[-1] * share < size:
        raise ValueError(f"rows of {packed.shape[-1]} bytes do not hold {size} codes of {bits} bits")
    if bits == 8:
        return packed[..., :size]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :size]


def container(scheme: WeightScheme) -> WeightScheme:
    """Return the scheme that kernels execute and that holds the scheme's numbers; see the module's docstring."""
    if scheme.is_integer:
        return dataclasses.replace(scheme, bits={3: 4, 5: 8, 6: 8}.get(scheme.bits, scheme.bits))
    if scheme.format in _FLOAT8:
        return scheme
    bits = 2 if scheme.format == "ternary" else 8
    return WeightScheme(bits=bits, group=scheme.group, symmetric=True)


def to_container(weight: QuantizedWeight) -> QuantizedWeight:
    """Return a weight in its container: the same numbers, except for NF4; see the module's docstring."""
    scheme = weight.scheme
    target = container(scheme)
    if target == scheme:
        return weight
    if scheme.is_integer:
        return widen(weight, target.bits)
    factor = {"ternary": 1.0, "nf4": 127.0}.get(scheme.format, 2.0)
    table = (np.rint(levels(scheme) * factor) + target.centre).astype(np.uint8)
    scale = weight.scale / np.float32(factor)
    return QuantizedWeight(table[weight.codes], scale, np.full(scale.shape, target.centre, np.uint8), target)


def widen(weight: QuantizedWeight, bits: int) -> QuantizedWeight:
    """Return a weight of integers in at least as many bits: the same numbers, symmetric ones around the new centre."""
    scheme, zero_point = weight.scheme, weight.zero_point
    assert zero_point is not None
    if bits == scheme.bits:
        return weight
    target = dataclasses.replace(scheme, bits=bits)
    if not scheme.symmetric:
        return dataclasses.replace(weight, scheme=target)
    codes = weight.codes + np.uint8(target.centre - scheme.centre)
    return QuantizedWeight(codes, weight.scale, np.full_like(zero_point, target.centre), target)


def block_size(scheme: WeightScheme) -> int:
    """Return the block of MatMulNBits for a scheme of 2, 4 or 8 bits: its group, or 128 or 256 of a whole row.

    Raises:
        ValueError: there is no such kernel.
    """
    _require_width(scheme.bits)
    if not scheme.is_integer:
        raise ValueError(f"MatMulNBits has no kernel for {scheme.format}")
    block = scheme.group or _LARGEST_BLOCK[scheme.bits]
    if block < _LEAST_BLOCK or block > 256 or block & (block - 1):
        raise ValueError(f"MatMulNBits has blocks of 16, 32, 64, 128 or 256, not {block}")
    return block


def matmul_nbits(weight: QuantizedWeight) -> PackedWeight:
    """Return a weight as MatMulNBits reads it; a ragged last block is filled with codes that stand for zero.

    Args:
        weight: integers of 2, 4 or 8 bits, or what has such a container.

    Returns:
        codes [N, G, block * bits / 8], scales [N * G], zero points [N * ceil(G * bits / 8)].

    Raises:
        ValueError: there is no such kernel: another width or block.
    """
    weight = to_container(weight)
    block = block_size(weight.scheme)
    assert weight.zero_point is not None
    outputs, inputs = weight.codes.shape
    groups = -(-inputs // block)
    codes, scale, zero_point = weight.codes, weight.scale, weight.zero_point
    if scale.shape[1] != groups:
        scale, zero_point = np.repeat(scale, groups, axis=1), np.repeat(zero_point, groups, axis=1)
    short = groups * block - inputs
    if short:
        codes = np.concatenate([codes, np.repeat(zero_point[:, -1:], short, axis=1)], axis=1)
    bits = weight.scheme.bits
    packed = pack_bits(codes, bits).reshape(outputs, groups, block * bits // 8)
    zeros = None if weight.scheme.symmetric else pack_bits(zero_point, bits).reshape(-1)
    return PackedWeight(packed, np.ascontiguousarray(scale).reshape(-1), zeros, block)


def from_matmul_nbits(
    codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, *, inputs: int, bits: int, block: int
) -> QuantizedWeight:
    """Return the weight of a MatMulNBits node.

    Args:
        codes: uint8 [N, G, block * bits / 8].
        scales: real numbers, N * G of them.
        zero_points: uint8, packed; all are 2^(bits-1) when None.
        inputs: K.
        bits: 2, 4 or 8.
        block: the node's `block_size`.

    Raises:
        ValueError: the arrays do not fit.
    """
    outputs, groups = codes.shape[0], -(-inputs // block)
    scheme = WeightScheme(bits=bits, group=block, symmetric=zero_points is None)
    unpacked = unpack_bits(codes.reshape(outputs, -1), bits, inputs)
    if zero_points is None:
        zeros = np.full((outputs, groups), scheme.centre, np.uint8)
    else:
        zeros = unpack_bits(zero_points.reshape(outputs, -1), bits, groups)
    return QuantizedWeight(unpacked, scales.astype(np.float32).reshape(outputs, groups), zeros, scheme)


def gather_block_quantized(weight: QuantizedWeight) -> PackedWeight:
    """Return an embedding table as GatherBlockQuantized reads it (gather_axis 0, quantize_axis 1).

    Args:
        weight: integers of 2, 4 or 8 bits, or what has such a container.

    Returns:
        codes [N, ceil(K * bits / 8)], scales [N, G], zero points [N, ceil(G * bits / 8)].

    Raises:
        ValueError: there is no such kernel: another width or block.
    """
    weight = to_container(weight)
    block = block_size(weight.scheme)
    assert weight.zero_point is not None
    groups = -(-weight.codes.shape[1] // block)
    scale, zero_point = weight.scale, weight.zero_point
    if scale.shape[1] != groups:
        scale, zero_point = np.repeat(scale, groups, axis=1), np.repeat(zero_point, groups, axis=1)
    bits = weight.scheme.bits
    zeros = None if weight.scheme.symmetric else pack_bits(zero_point, bits)
    return PackedWeight(pack_bits(weight.codes, bits), scale, zeros, block)


def matmul_bnb4(weight: QuantizedWeight) -> BnbWeight:
    """Return an NF4 weight as MatMulBnb4 (quant_type 1) reads it: blocks of the rows laid end to end.

    Raises:
        ValueError: the format is another, or a row does not divide into whole blocks.
    """
    outputs, inputs = weight.codes.shape
    block = weight.scheme.group or inputs
    if weight.scheme.format != "nf4":
        raise ValueError(f"MatMulBnb4 has no kernel for {weight.scheme.format}")
    if inputs % block or block % 2 or block & (block - 1) or block < _LEAST_BLOCK:
        raise ValueError(f"MatMulBnb4 cannot cut rows of {inputs} into blocks of {block}")
    pairs = weight.codes.reshape(outputs * inputs // 2, 2)
    return BnbWeight((pairs[:, 0] << 4) | pairs[:, 1], np.ascontiguousarray(weight.scale).reshape(-1), block)


def onnx_int(weight: QuantizedWeight, *, transposed: bool) -> DequantizeInputs:
    """Return a weight as the inputs of an ONNX DequantizeLinear: signed without zero point when symmetric.

    Args:
        weight: integers of 2, 4 or 8 bits, or what has such a container.
        transposed: laid out [N, K] (axis 1), else [K, N] (axis 0).

    Raises:
        ValueError: the container is no integer.
    """
    weight = to_container(weight)
    scheme = weight.scheme
    if weight.zero_point is None:
        raise ValueError(f"{scheme.format} is held by no integer")
    _require_width(scheme.bits)
    dtype = _ONNX_TYPES[scheme.bits, scheme.symmetric]
    codes = weight.codes if transposed else np.ascontiguousarray(weight.codes.T)
    if scheme.symmetric:
        # Turning the highest bit over subtracts the centre, in the two's complement of `bits` bits.
        values = (codes ^ np.uint8(scheme.centre)).view(dtype)
        zero_point = None
    else:
        values = codes.view(dtype)
        zero_point = weight.zero_point.view(dtype)
    return _laid_out(values, weight.scale, zero_point, scheme, transposed=transposed)


def onnx_float8(weight: QuantizedWeight, *, transposed: bool) -> DequantizeInputs:
    """Return an fp8 weight as the inputs of an ONNX DequantizeLinear; arguments as for `onnx_int`.

    Raises:
        ValueError: the format is another.
    """
    if weight.scheme.format not in _FLOAT8:
        raise ValueError(f"{weight.scheme.format} is no 8-bit float")
    table = levels(weight.scheme).astype(_FLOAT8[weight.scheme.format])
    values = table[weight.codes if transposed else np.ascontiguousarray(weight.codes.T)]
    return _laid_out(values, weight.scale, None, weight.scheme, transposed=transposed)


def _laid_out(
    values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, scheme: WeightScheme, *, transposed: bool
) -> DequantizeInputs:
    if scheme.group == 0:
        rows = None if zero_point is None else zero_point[:, 0]
        return DequantizeInputs(values, np.ascontiguousarray(scale[:, 0]), rows, 0 if transposed else 1, 0)
    if not transposed:
        scale = np.ascontiguousarray(scale.T)
        zero_point = None if zero_point is None else np.ascontiguousarray(zero_point.T)
    return DequantizeInputs(values, scale, zero_point, 1 if transposed else 0, scheme.group)


def _require_width(bits: int) -> None:
    if bits not in _LARGEST_BLOCK:
        raise ValueError(f"codes are packed at 2, 4 or 8 bits, not {bits}")
