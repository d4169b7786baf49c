"""What MIL's operations compute, in numpy: compressed constants, and quantization of activations.

constexpr_blockwise_shift_scale           scale * (data - offset), each over the block of the data that it stands for
constexpr_lut_to_dense                    the table's entry at each index; tables may be one to a block
constexpr_sparse_to_dense                 the elements in the places of the mask, in order, and zeros elsewhere
constexpr_sparse_blockwise_shift_scale    the mask, and the elements scaled by where they stand
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qgraph.coreml.semantics import Semantics

__all__ = ["SEMANTICS"]


def _over_blocks(grid: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat what stands for blocks over these."""
    for axis, size in enumerate(shape):
        grid = np.repeat(grid, size // grid.shape[axis], axis=axis)
    return grid


def _shift_scale(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    numbers = data.astype(np.float32)
    if offset is not None:
        numbers = numbers - _over_blocks(offset, data.shape).astype(np.float32)
    return np.asarray(numbers * _over_blocks(scale, data.shape))


def _lut(indices: np.ndarray, lut: np.ndarray, vector_axis: Any = None) -> np.ndarray:
    assert vector_axis is None
    tables = _over_blocks(lut, (*indices.shape, *lut.shape[-2:]))
    return np.take_along_axis(tables[..., 0], indices[..., None].astype(np.int64), -1)[..., 0]


def _sparse(nonzero_data: np.ndarray, mask: np.ndarray) -> np.ndarray:
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def _sparse_shift_scale(
    data_mask: np.ndarray, nonzero_data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    return data_mask, _shift_scale(_sparse(nonzero_data, data_mask), scale, offset)[data_mask != 0]


def _by_axis(parameter: np.ndarray, rank: int, axis: Any) -> np.ndarray:
    if parameter.ndim == 0:
        return parameter
    return parameter.reshape([-1 if one == int(axis) % rank else 1 for one in range(rank)])


def _dequantize(input: np.ndarray, scale: np.ndarray, zero_point: Any = None, axis: Any = None) -> np.ndarray:  # noqa: A002
    numbers = input.astype(np.float32)
    if zero_point is not None:
        numbers = numbers - _by_axis(np.asarray(zero_point), input.ndim, axis).astype(np.float32)
    return np.asarray(numbers * _by_axis(scale, input.ndim, axis))


def _quantize(
    input: np.ndarray,  # noqa: A002
    scale: np.ndarray,
    output_dtype: str,
    zero_point: Any = None,
    axis: Any = None,
) -> np.ndarray:
    shift = 0 if zero_point is None else _by_axis(np.asarray(zero_point), input.ndim, axis).astype(np.float32)
    limits = np.iinfo(output_dtype)
    numbers = np.rint(input / _by_axis(scale, input.ndim, axis)) + shift
    return np.asarray(np.clip(numbers, limits.min, limits.max).astype(output_dtype))


SEMANTICS: Mapping[str, Semantics] = {
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _lut,
    "constexpr_sparse_to_dense": _sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_shift_scale,
    "dequantize": _dequantize,
    "quantize": _quantize,
}
