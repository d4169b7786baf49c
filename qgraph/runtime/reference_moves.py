"""Operators of ONNX that move integers or choose among them, in numpy, where folding constants leaves them out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from qgraph.numerics import operators
from qgraph.numerics.operators import Attributes, Inputs, NotFoldedError, Operator
from qgraph.numerics.resize import COORDINATES, NEAREST, nearest_indices

__all__ = ["MOVES"]

_PAD_MODES = {"constant": "constant", "edge": "edge", "reflect": "reflect", "wrap": "wrap"}


def _given(inputs: Inputs, index: int) -> np.ndarray | None:
    return inputs[index] if len(inputs) > index else None


def _axes_of(inputs: Inputs, index: int, rank: int) -> list[int]:
    given = _given(inputs, index)
    return list(range(rank)) if given is None else [int(axis) % rank for axis in given]


def _pad(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    data, axes = inputs[0], _axes_of(inputs, 3, inputs[0].ndim)
    starts, ends = np.asarray(inputs[1]).reshape(2, -1).tolist()
    before, after = [0] * data.ndim, [0] * data.ndim
    for axis, start, end in zip(axes, starts, ends, strict=True):
        before[axis], after[axis] = start, end
    kept = tuple(
        slice(max(-start, 0), size - max(-end, 0)) for start, end, size in zip(before, after, data.shape, strict=True)
    )
    widths = [(max(start, 0), max(end, 0)) for start, end in zip(before, after, strict=True)]
    mode = _PAD_MODES[attributes.get("mode", "constant")]
    if mode != "constant":
        return np.asarray(np.pad(data[kept], widths, mode=mode))  # type: ignore[call-overload]
    value = _given(inputs, 2)
    return np.pad(data[kept], widths, constant_values=0 if value is None else value.reshape(()))


def _split(attributes: Attributes, inputs: Inputs) -> tuple[np.ndarray, ...]:
    axis, sizes = int(attributes.get("axis", 0)), _given(inputs, 1)
    if sizes is None:
        count, whole = int(attributes["num_outputs"]), inputs[0].shape[axis]
        part = math.ceil(whole / count)
        sizes = np.array([*[part] * (count - 1), whole - part * (count - 1)])
    return tuple(np.split(inputs[0], np.cumsum(sizes)[:-1], axis=axis))


def _arg_max(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    data, axis = inputs[0], int(attributes.get("axis", 0))
    if attributes.get("select_last_index", 0):
        index = data.shape[axis] - 1 - np.argmax(np.flip(data, axis), axis=axis, keepdims=True)
    else:
        index = np.argmax(data, axis=axis, keepdims=True)
    return np.asarray(index if attributes.get("keepdims", 1) else np.squeeze(index, axis)).astype(np.int64)


def _arg_min(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    return _arg_max(attributes, [-inputs[0].astype(np.int64)])


def _top_k(attributes: Attributes, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """TopK: of equal elements the one with the lower index comes first."""
    data, axis, count = inputs[0], int(attributes.get("axis", -1)), int(inputs[1].item())
    if not 0 <= count <= data.shape[axis]:
        raise NotFoldedError(f"{count} of {data.shape[axis]} elements are not there")
    wide = data.astype(np.int64)
    order = np.argsort(-wide if attributes.get("largest", 1) else wide, axis=axis, kind="stable")
    indices = np.take(order, np.arange(count), axis=axis)
    return np.take_along_axis(data, indices, axis), indices.astype(np.int64)


def _scatter_elements(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    """ScatterElements: where an index comes several times, the last update stays."""
    data, indices, updates = inputs
    if attributes.get("reduction", "none") != "none":
        raise NotFoldedError("reduction")
    result, places = data.copy(), list(np.indices(indices.shape))
    places[int(attributes.get("axis", 0))] = indices
    result[tuple(places)] = updates
    return np.asarray(result)


def _depth_to_space(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    data, block = inputs[0], int(attributes["blocksize"])
    batch, depth, height, width = data.shape
    channels = depth // (block * block)
    if attributes.get("mode", "DCR") == "DCR":
        blocks = data.reshape(batch, block, block, channels, height, width).transpose(0, 3, 4, 1, 5, 2)
    else:
        blocks = data.reshape(batch, channels, block, block, height, width).transpose(0, 1, 4, 2, 5, 3)
    return np.asarray(blocks.reshape(batch, channels, height * block, width * block))


def _space_to_depth(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    data, block = inputs[0], int(attributes["blocksize"])
    batch, channels, height, width = data.shape
    blocks = data.reshape(batch, channels, height // block, block, width // block, block)
    moved = blocks.transpose(0, 3, 5, 1, 2, 4)
    return np.asarray(moved.reshape(batch, channels * block * block, height // block, width // block))


def _resize(attributes: Attributes, inputs: Inputs) -> np.ndarray:
    data, scales, sizes = inputs[0], _given(inputs, 2), _given(inputs, 3)
    coordinates = attributes.get("coordinate_transformation_mode", "half_pixel")
    nearest = attributes.get("nearest_mode", "round_prefer_floor")
    stretched = attributes.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if attributes.get("mode", "nearest") != "nearest" or not stretched:
        raise NotFoldedError("only mode nearest with the policy stretch is an operator on integers")
    if coordinates not in COORDINATES or nearest not in NEAREST:
        raise NotFoldedError(f"no coordinates {coordinates}, {nearest}")
    axes = [int(axis) % data.ndim for axis in attributes.get("axes", range(data.ndim))]
    for index, axis in enumerate(axes):
        size = data.shape[axis]
        if sizes is not None and sizes.size:
            outputs, scale = int(sizes[index]), int(sizes[index]) / size
        else:
            scale = float(np.asarray(scales)[index])
            outputs = math.floor(np.float32(size) * np.float32(scale))
        data = np.take(data, nearest_indices(size, outputs, scale, coordinates, nearest), axis=axis)
    return np.asarray(data)


def _as_folded(name: str) -> Operator:
    return lambda attributes, inputs: operators.evaluate(name, attributes, inputs)


# fmt: off
_AS_FOLDED = (
    "And", "Clip", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Flatten", "Gather", "GatherElements",
    "GatherND", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Not", "Or",
    "Range", "ReduceMax", "ReduceMin", "Reshape", "ScatterND", "Shape", "Sign", "Size", "Slice", "Squeeze", "Tile",
    "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
)
# fmt: on

MOVES: Mapping[str, Operator] = {
    **{name: _as_folded(name) for name in _AS_FOLDED},
    "ArgMax": _arg_max,
    "ArgMin": _arg_min,
    "DepthToSpace": _depth_to_space,
    "Pad": _pad,
    "Resize": _resize,
    "ScatterElements": _scatter_elements,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "TopK": _top_k,
}
"""Operators whose results are among their inputs, truth values or sizes."""
