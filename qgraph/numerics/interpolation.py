"""Interpolation along one axis as a matrix.

Source: Resize in the operators' reference, https://onnx.ai/onnx/operators/onnx__Resize.html; the cubic kernel is that
of Keys, "Cubic Convolution Interpolation for Digital Image Processing" (1981).
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["COORDINATES", "interpolation_matrix"]

COORDINATES = ("align_corners", "asymmetric", "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel")
"""What coordinate_transformation_mode may be."""


def interpolation_matrix(
    before: int,
    after: int,
    scale: float,
    coordinates: str = "half_pixel",
    *,
    cubic_coefficient: float | None = None,
    exclude_outside: bool = False,
) -> np.ndarray:
    """Return the matrix that resizes a row: row @ matrix.

    Args:
        before: the size of the row.
        after: its size afterwards.
        scale: after / before, up to the rounding of `after`.
        coordinates: one of `COORDINATES`.
        cubic_coefficient: `a` of the cubic kernel; None interpolates linearly.
        exclude_outside: weigh only what is inside the row; otherwise its ends go on outside.

    Returns:
        float64 [before, after]; its columns sum to 1.
    """
    reach = 1 if cubic_coefficient is None else 2
    matrix = np.zeros((before, after))
    for column, centre in enumerate(_centres(before, after, scale, coordinates)):
        places = np.arange(math.floor(centre) - reach + 1, math.floor(centre) + reach + 1)
        weights = _kernel(np.abs(places - centre), cubic_coefficient)
        if exclude_outside:
            weights = np.where((places >= 0) & (places < before), weights, 0.0)
            weights = weights / weights.sum()
        np.add.at(matrix[:, column], np.clip(places, 0, before - 1), weights)
    return matrix


def _centres(before: int, after: int, scale: float, coordinates: str) -> np.ndarray:
    """Return where in the source the elements of the result lie."""
    places = np.arange(after, dtype=np.float64)
    if coordinates == "align_corners":
        return places * ((before - 1) / max(1, after - 1))
    if coordinates == "asymmetric":
        return places / scale
    if coordinates == "pytorch_half_pixel" and after == 1:
        return places
    shift = (before - after / scale) / 2 if coordinates == "half_pixel_symmetric" else 0.0
    return (places + 0.5) / scale - 0.5 + shift


def _kernel(distance: np.ndarray, cubic: float | None) -> np.ndarray:
    """Return the weights of elements at a distance below 2 (linearly: up to 1) from the point."""
    if cubic is None:
        return np.asarray(np.maximum(0.0, 1 - distance))
    near = ((cubic + 2) * distance - (cubic + 3)) * distance**2 + 1
    far = cubic * (((distance - 5) * distance + 8) * distance - 4)
    return np.asarray(np.where(distance <= 1, near, far))
