"""Lowering rules: what moves elements without computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qgraph.coreml.data_types import MilType
from qgraph.coreml.site import Rule, Site, UnfitError
from qgraph.numerics.interpolation import interpolation_matrix
from qgraph.numerics.resize import nearest_indices

__all__ = ["RULES"]


def _to_result(site: Site) -> Any:
    """Reshape and its like: the sizes of the output are known."""
    return site.reshape(site[0], site.result())


def _transpose(site: Site) -> Any:
    rank = len(site.shape(0))
    return site.emit("transpose", x=site[0], perm=site.integers("perm", list(reversed(range(rank)))))


def _concat(site: Site) -> Any:
    values = [site[index] for index in range(len(site.node.inputs))]
    return (
        site.emit("concat", values=values, axis=site.axis(0)) if len(values) > 1 else site.emit("identity", x=values[0])
    )


def _split(site: Site) -> Any:
    axis = site.axis(0)
    sizes = [site.result(index)[axis] for index in range(len(site.node.outputs))]
    if len(sizes) == 1:
        return site.emit("identity", x=site[0])
    return site.emit("split", x=site[0], split_sizes=sizes, axis=axis)


def _slice(site: Site) -> Any:
    shape = site.shape(0)
    starts, ends = ([int(number) for number in site.array(index)] for index in (1, 2))
    axes = [int(axis) % len(shape) for axis in site.array(3)] if site.has(3) else list(range(len(starts)))
    steps = [int(number) for number in site.array(4)] if site.has(4) else [1] * len(starts)
    begin, end, stride = [0] * len(shape), list(shape), [1] * len(shape)
    for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        begin[axis], end[axis], stride[axis] = slice(start, stop, step).indices(shape[axis])
    whole = [stop < 0 for stop in end]
    return site.emit("slice_by_index", x=site[0], begin=begin, end=[max(stop, 0) for stop in end], stride=stride,
                     end_mask=whole)  # fmt: skip


def _pad(site: Site) -> Any:
    shape = site.shape(0)
    given = [int(number) for number in site.array(1)]
    axes = [int(axis) % len(shape) for axis in site.array(3)] if site.has(3) else list(range(len(shape)))
    before, after = [0] * len(shape), [0] * len(shape)
    for place, axis in enumerate(axes):
        before[axis], after[axis] = given[place], given[place + len(axes)]
    value = _cropped(site, before, after)
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(site.text("mode", "constant"))
    if mode is None:
        raise UnfitError(f"padding by '{site.text('mode', '')}' has no form in MIL")
    padding = [max(one, 0) for pair in zip(before, after, strict=True) for one in pair]
    first = next((place for place, one in enumerate(padding) if one), len(padding) - 2) // 2
    fill = site.array(2).item() if site.has(2) and mode == "constant" else 0
    return _padded(site, value, padding[2 * first :], mode, fill)


def _cropped(site: Site, before: Sequence[int], after: Sequence[int]) -> Any:
    """Return the input without what padding by less than nothing takes away."""
    if min((*before, *after), default=0) >= 0:
        return site[0]
    begin = [max(-one, 0) for one in before]
    end = [size + min(one, 0) for size, one in zip(site.shape(0), after, strict=True)]
    return site.emit("slice_by_index", x=site[0], begin=begin, end=end)


def _padded(site: Site, value: Any, padding: Sequence[int], mode: str, fill: float) -> Any:
    """Pad; what is no floating-point number goes through float32, which holds whole numbers up to 2^24."""
    kind = site.type()
    if not any(padding):
        return site.emit("identity", x=value)
    work = value if kind.is_float else site.emit("cast", x=value, dtype="fp32")
    constant = (kind if kind.is_float else MilType.FLOAT32).numpy.type(fill)
    padded = site.emit("pad", x=work, pad=list(padding), mode=mode, constant_val=constant)
    return padded if kind.is_float else site.emit("cast", x=padded, dtype=kind.value)


def _expand(site: Site) -> Any:
    before, after = site.shape(0), site.result()
    filled = (*[1] * (len(after) - len(before)), *before)
    value = site[0] if filled == before else site.reshape(site[0], filled)
    repeats = [size if old == 1 else 1 for old, size in zip(filled, after, strict=True)]
    return site.emit("tile", x=value, reps=repeats)


def _tile(site: Site) -> Any:
    return site.emit("tile", x=site[0], reps=[int(number) for number in site.array(1)])


def _depth_to_space(site: Site) -> Any:
    """The order of PyTorch (CRD) is that of MIL's pixel_shuffle; the other one is depth_to_space."""
    kind = "depth_to_space" if site.text("mode", "DCR") == "DCR" else "pixel_shuffle"
    factor = "block_size" if kind == "depth_to_space" else "upscale_factor"
    return site.emit(kind, x=site[0], **{factor: site.integer("blocksize", 1)})


def _space_to_depth(site: Site) -> Any:
    return site.emit("space_to_depth", x=site[0], block_size=site.integer("blocksize", 1))


def _triangle(site: Site) -> Any:
    offset = int(site.array(1).item()) if site.has(1) else 0
    rows, columns = site.shape(0)[-2:]
    keep = np.triu(np.ones((rows, columns), bool), offset)
    if not site.integer("upper", 1):
        keep = np.tril(np.ones((rows, columns), bool), offset)
    return site.emit("select", cond=site.constant(keep), a=site[0], b=site.number(0))


def _resize(site: Site) -> Any:
    """Nearest elements are gathered, and lines interpolated by the operator for images or as a product."""
    mode, coordinates = site.text("mode", "nearest"), site.text("coordinate_transformation_mode", "half_pixel")
    if coordinates == "tf_crop_and_resize" or site.integer("antialias", 0):
        raise UnfitError("neither crops nor antialiasing have a form in MIL")
    before, after = site.shape(0), site.result()
    axes = [axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    value = site[0]
    if not axes:
        return site.emit("identity", x=value)
    rank = len(before)
    scales = _scales(site, before, after)
    if mode == "linear" and coordinates in _SAMPLING and rank > 2 and min(axes) >= rank - 2 and _exact(site, scales):
        return site.emit("resize_bilinear", x=value, target_size_height=after[-2], target_size_width=after[-1],
                         sampling_mode=_SAMPLING[coordinates])  # fmt: skip
    for axis in axes:
        if mode == "nearest":
            picked = nearest_indices(before[axis], after[axis], scales[axis], coordinates,
                                     site.text("nearest_mode", "round_prefer_floor"))  # fmt: skip
            value = _picked(site, value, axis, picked, before[axis])
        else:
            value = _interpolated(site, value, axis, before[axis], after[axis], scales[axis])
    return value


_SAMPLING = {"half_pixel": "UNALIGN_CORNERS", "align_corners": "STRICT_ALIGN_CORNERS"}


def _scales(site: Site, before: Sequence[int], after: Sequence[int]) -> list[float]:
    """Return the factor of every axis: what the node gives, or the ratio of the sizes."""
    found = [new / old for old, new in zip(before, after, strict=True)]
    if not site.has(2) or site.array(2).size == 0:
        return found
    given = [float(number) for number in site.array(2)]
    axes = [axis % len(before) for axis in site.integers("axes", list(range(len(before))))]
    for axis, scale in zip(axes, given, strict=True):
        found[axis] = scale
    return found


def _exact(site: Site, scales: Sequence[float]) -> bool:
    """Tell whether the factors are the ratios of the sizes, of which alone MIL's operator knows."""
    ratios = [new / old for old, new in zip(site.shape(0), site.result(), strict=True)]
    return bool(np.allclose(scales, ratios, rtol=1e-6, atol=0))


def _picked(site: Site, value: Any, axis: int, picked: np.ndarray, size: int) -> Any:
    times = len(picked) // size
    images = axis >= len(site.shape(0)) - 2 and len(site.shape(0)) > 2 and site.type().is_float
    if images and times > 1 and np.array_equal(picked, np.repeat(np.arange(size), times)):
        side = "height" if axis == len(site.shape(0)) - 2 else "width"
        return site.emit("upsample_nearest_neighbor", x=value, **{f"scale_factor_{side}": times})
    return site.emit("gather", x=value, indices=picked.astype(np.int32), axis=axis)


def _interpolated(site: Site, value: Any, axis: int, before: int, after: int, scale: float) -> Any:
    cubic = site.floating("cubic_coeff_a", -0.75) if site.text("mode", "nearest") == "cubic" else None
    matrix = interpolation_matrix(
        before, after, scale, site.text("coordinate_transformation_mode", "half_pixel"),
        cubic_coefficient=cubic, exclude_outside=bool(site.integer("exclude_outside", 0)),
    )  # fmt: skip
    rank = len(site.shape(0))
    order = [*(one for one in range(rank) if one != axis), axis]
    moved = value if order[axis] == axis else site.emit("transpose", x=value, perm=order)
    product = site.emit("matmul", x=moved, y=site.constant(matrix.astype(site.type().numpy)))
    back = [order.index(one) for one in range(rank)]
    return product if order[axis] == axis else site.emit("transpose", x=product, perm=back)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _to_result),
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Trilu": _triangle,
    "Resize": _resize,
}
