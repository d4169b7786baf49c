"""Which element each output of a nearest-neighbour Resize copies, along one axis.

Source: Resize of ONNX, https://onnx.ai/onnx/operators/onnx__Resize.html. Which of two elements is nearer can hang on
the last bit of the arithmetic, which the operator leaves open. Here it is as in ONNX Runtime 1.31: float32, and a
coordinate within 1e-6 of the middle between two elements counts as the middle. Earlier versions lack the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

__all__ = ["COORDINATES", "NEAREST", "nearest_indices"]

_HALF = np.float32(0.5)
_MIDDLE = 1e-6


class _Axis(NamedTuple):
    size: int
    outputs: int
    scale: np.float32


_Coordinates: TypeAlias = Callable[[np.ndarray, _Axis], np.ndarray]


def _half_pixel(x: np.ndarray, axis: _Axis) -> np.ndarray:
    return np.asarray((x + _HALF) / axis.scale - _HALF)


def _pytorch_half_pixel(x: np.ndarray, axis: _Axis) -> np.ndarray:
    return _half_pixel(x, axis) if axis.outputs > 1 else np.zeros_like(x)


def _half_pixel_symmetric(x: np.ndarray, axis: _Axis) -> np.ndarray:
    adjustment = np.float32(axis.outputs) / (axis.scale * np.float32(axis.size))
    offset = np.float32(axis.size) / np.float32(2) * (np.float32(1) - adjustment)
    # The one mode that ONNX Runtime computes in double and rounds then.
    return np.asarray(float(offset) + (x + 0.5).astype(np.float64) / float(axis.scale) - 0.5).astype(np.float32)


def _align_corners(x: np.ndarray, axis: _Axis) -> np.ndarray:
    if axis.outputs == 1:
        return np.zeros_like(x)
    return np.asarray(x * np.float32(axis.size - 1) / np.float32(axis.outputs - 1))


COORDINATES: Mapping[str, _Coordinates] = {
    "align_corners": _align_corners,
    "asymmetric": lambda x, axis: np.asarray(x / axis.scale),
    "half_pixel": _half_pixel,
    "half_pixel_symmetric": _half_pixel_symmetric,
    "pytorch_half_pixel": _pytorch_half_pixel,
}
"""`coordinate_transformation_mode` -> where an output lies on the input's axis."""

NEAREST: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "ceil": np.ceil,
    "floor": np.floor,
    "round_prefer_ceil": lambda x: np.asarray(np.floor(x) + (x - np.floor(x) >= 0.5 - _MIDDLE)),
    "round_prefer_floor": lambda x: np.asarray(np.floor(x) + (x - np.floor(x) > 0.5 + _MIDDLE)),
}
"""`nearest_mode` -> the element at a coordinate."""


def nearest_indices(size: int, outputs: int, scale: float, coordinates: str, nearest: str) -> np.ndarray:
    """Return the index into the input for each output along an axis.

    Args:
        size: elements of the input.
        outputs: elements of the output.
        scale: what the node gives, or `outputs` / `size` where it gives sizes; rounded to float32.
        coordinates: one of `COORDINATES`.
        nearest: one of `NEAREST`.

    Returns:
        int64 [outputs], in [0, size).
    """
    axis = _Axis(size, outputs, np.float32(scale))
    x = np.arange(outputs, dtype=np.float32)
    at = x if axis.scale == 1 else COORDINATES[coordinates](x, axis)
    return np.asarray(np.clip(NEAREST[nearest](at), 0, size - 1).astype(np.int64))
