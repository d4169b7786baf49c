"""Which element Resize with mode "nearest" takes, worked out where code is written: no coordinate is computed later."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

__all__ = ["nearest_indices"]

_ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def nearest_indices(node: ir.Node, before: int, after: int, scale: float | None) -> np.ndarray:
    """Return the source of each element along an axis, int64 (after,).

    Args:
        node: a Resize.
        before: the size of the input's axis.
        after: the size of the output's.
        scale: of the axis, where the node gives scales and no sizes.

    Raises:
        ValueError: the node resizes in another way.
    """
    if node.attributes.get_string("mode", "nearest") != "nearest":
        raise ValueError("only the mode 'nearest' moves integers without computing between them")
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ValueError("a policy for the aspect ratio leaves the scale open; give scales")
    at = np.arange(after, dtype=np.float32)
    factor = np.float32(after / before if scale is None else scale)
    coordinates = _coordinates(node, at, before, after, factor)
    rounding = _ROUNDINGS[node.attributes.get_string("nearest_mode", "round_prefer_floor")]
    return np.clip(rounding(coordinates), 0, before - 1).astype(np.int64)


def _coordinates(node: ir.Node, at: np.ndarray, before: int, after: int, factor: np.float32) -> np.ndarray:
    """Return where in the input each element lies, float32, as onnx defines the transformations."""
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    half = np.float32(0.5)
    if mode == "asymmetric":
        return at / factor
    if mode == "align_corners":
        return at * np.float32(before - 1) / np.float32(after - 1) if after > 1 else np.zeros_like(at)
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and after > 1):
        return (at + half) / factor - half
    if mode == "pytorch_half_pixel":
        return np.zeros_like(at)
    if mode == "half_pixel_symmetric":
        adjustment = np.float32(after) / (factor * np.float32(before))
        centre = np.float32(before) / 2
        return centre * (1 - adjustment) + (at + half) / factor - half
    raise ValueError(f"its coordinates are '{mode}'")
