"""What MIL's operations compute, in numpy: movement, look-ups, resizing.

Written from the definitions of the operations (apple.github.io/coremltools, MIL ops), not from the lowering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qgraph.coreml.semantics import Semantics, axes_of

__all__ = ["SEMANTICS"]


def _slice(
    x: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> np.ndarray:
    none = [False] * x.ndim
    begins, ends = (none if mask is None else mask for mask in (begin_mask, end_mask))
    assert squeeze_mask is None or not np.any(squeeze_mask)
    steps = [1] * x.ndim if stride is None else stride
    cut = tuple(
        slice(None if begins[axis] else int(begin[axis]), None if ends[axis] else int(end[axis]), int(steps[axis]))
        for axis in range(x.ndim)
    )
    return x[cut]


def _split(x: np.ndarray, axis: int, num_splits: Any = None, split_sizes: Any = None) -> list[np.ndarray]:
    parts = int(num_splits) if split_sizes is None else np.cumsum(split_sizes)[:-1].tolist()
    return list(np.split(x, parts, axis=int(axis)))


def _pad(x: np.ndarray, pad: np.ndarray, mode: str = "constant", constant_val: Any = 0.0) -> np.ndarray:
    """`pad` speaks of the last axes."""
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + [tuple(map(int, pair)) for pair in pad.reshape(-1, 2)]
    if mode == "constant":
        return np.pad(x, pairs, constant_values=constant_val)
    return np.pad(x, pairs, mode="edge" if mode == "replicate" else "reflect")


def _gather(
    x: np.ndarray, indices: np.ndarray, axis: int = 0, batch_dims: int = 0, validate_indices: Any = False
) -> np.ndarray:
    del validate_indices
    assert batch_dims == 0
    return np.take(x, indices, axis=int(axis))


def _gather_along(x: np.ndarray, indices: np.ndarray, axis: int = 0, validate_indices: Any = False) -> np.ndarray:
    del validate_indices
    return np.take_along_axis(x, indices.astype(np.int64), int(axis))


def _gather_nd(x: np.ndarray, indices: np.ndarray, batch_dims: int = 0, validate_indices: Any = False) -> np.ndarray:
    del validate_indices
    batch = int(batch_dims)
    if batch == 0:
        return np.asarray(x[tuple(np.moveaxis(indices, -1, 0))])
    lead = x.shape[:batch]
    flat, inner = x.reshape(-1, *x.shape[batch:]), indices.reshape(-1, *indices.shape[batch:])
    found = np.stack([one[tuple(np.moveaxis(where, -1, 0))] for one, where in zip(flat, inner, strict=True)])
    return found.reshape(*lead, *found.shape[1:])


_UPDATES: Mapping[str, Any] = {
    "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
}  # fmt: skip


def _put(result: np.ndarray, place: Any, updates: np.ndarray, mode: str) -> np.ndarray:
    if mode == "update":
        result[place] = updates
    else:
        _UPDATES[mode].at(result, place, updates)
    return result


def _scatter_nd(
    data: np.ndarray, indices: np.ndarray, updates: np.ndarray, mode: str = "add", validate_indices: Any = False
) -> np.ndarray:
    del validate_indices
    return _put(data.copy(), tuple(np.moveaxis(indices, -1, 0)), updates, mode)


def _scatter_along(
    data: np.ndarray,
    indices: np.ndarray,
    updates: np.ndarray,
    axis: int = 0,
    mode: str = "add",
    validate_indices: Any = False,
) -> np.ndarray:
    del validate_indices
    place: list[np.ndarray] = list(np.indices(indices.shape))
    place[int(axis)] = indices
    return _put(data.copy(), tuple(place), updates, mode)


def _one_hot(
    indices: np.ndarray, one_hot_vector_size: Any, axis: int = -1, on_value: Any = 1, off_value: Any = 0
) -> np.ndarray:
    hit = indices[..., None] == np.arange(int(one_hot_vector_size))
    return np.moveaxis(np.where(hit, on_value, off_value), -1, int(axis))


def _depth_to_space(x: np.ndarray, block_size: int) -> np.ndarray:
    """Channels go [block row, block column, channel]."""
    n, channels, height, width = x.shape
    b = int(block_size)
    split = x.reshape(n, b, b, channels // (b * b), height, width)
    return split.transpose(0, 3, 4, 1, 5, 2).reshape(n, channels // (b * b), height * b, width * b)


def _pixel_shuffle(x: np.ndarray, upscale_factor: int) -> np.ndarray:
    """Channels go [channel, block row, block column]."""
    n, channels, height, width = x.shape
    b = int(upscale_factor)
    split = x.reshape(n, channels // (b * b), b, b, height, width)
    return split.transpose(0, 1, 4, 2, 5, 3).reshape(n, channels // (b * b), height * b, width * b)


def _space_to_depth(x: np.ndarray, block_size: int) -> np.ndarray:
    n, channels, height, width = x.shape
    b = int(block_size)
    split = x.reshape(n, channels, height // b, b, width // b, b)
    return split.transpose(0, 3, 5, 1, 2, 4).reshape(n, channels * b * b, height // b, width // b)


def _upsample_nearest(x: np.ndarray, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> np.ndarray:
    return np.repeat(np.repeat(x, int(scale_factor_height), axis=-2), int(scale_factor_width), axis=-1)


def _grid(before: int, after: int, mode: str) -> np.ndarray:
    """Return where on the axis the outputs lie."""
    places = np.arange(after, dtype=np.float64)
    if mode == "STRICT_ALIGN_CORNERS":
        points = places * ((before - 1) / (after - 1)) if after > 1 else places
    else:
        assert mode == "UNALIGN_CORNERS"
        points = (places + 0.5) * before / after - 0.5
    return np.clip(points, 0, before - 1)


def _resize_bilinear(
    x: np.ndarray, target_size_height: Any, target_size_width: Any, sampling_mode: str = "DEFAULT"
) -> np.ndarray:
    for axis, size in ((-2, int(target_size_height)), (-1, int(target_size_width))):
        points = _grid(x.shape[axis], size, sampling_mode)
        low = np.floor(points).astype(int)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        share = (points - low).astype(x.dtype).reshape(-1, *[1] * (-axis - 1))
        x = x.take(low, axis=axis) * (1 - share) + x.take(high, axis=axis) * share
    return x


def _concat(values: Sequence[np.ndarray], axis: int, interleave: Any = False) -> np.ndarray:
    assert not interleave
    return np.concatenate(values, axis=int(axis))


SEMANTICS: Mapping[str, Semantics] = {
    "fill": lambda shape, value=0.0: np.full([int(size) for size in shape], value),
    "reshape": lambda x, shape: x.reshape([int(size) for size in shape]),
    "transpose": lambda x, perm: x.transpose([int(axis) for axis in perm]),
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(int(axis) for axis in axes)),
    "squeeze": lambda x, axes=None: np.squeeze(x, axes_of(axes, x.ndim)),
    "tile": lambda x, reps: np.tile(x, [int(number) for number in reps]),
    "concat": _concat,
    "split": _split,
    "slice_by_index": _slice,
    "pad": _pad,
    "gather": _gather,
    "gather_along_axis": _gather_along,
    "gather_nd": _gather_nd,
    "scatter_nd": _scatter_nd,
    "scatter_along_axis": _scatter_along,
    "one_hot": _one_hot,
    "depth_to_space": _depth_to_space,
    "pixel_shuffle": _pixel_shuffle,
    "space_to_depth": _space_to_depth,
    "upsample_nearest_neighbor": _upsample_nearest,
    "resize_bilinear": _resize_bilinear,
}
