"""Operators that move elements without changing them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from qgraph.codegen.tvm_site import Element, Operand, Site, Tensor, constant, dims, rule
from qgraph.numerics import operators
from qgraph.numerics.resize import COORDINATES, nearest_indices

__all__: list[str] = []


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(site: Site) -> Operand:
    # numpy tells the shape from an array of this shape that takes no memory.
    stand_in = np.broadcast_to(np.zeros((), bool), site.shape())
    others = [site.array(at) for at in range(1, len(site.inputs)) if site.optional(at) is not None]
    (result,) = operators.evaluate(site.node.op_type, site.attributes, [stand_in, *others])
    return site.reshaped(site[0], result.shape)


@rule("Transpose")
def _transpose(site: Site) -> Operand:
    from tvm import te

    shape = site.shape()
    order = tuple(site.attributes.get("perm", reversed(range(len(shape)))))

    def described(x: Tensor) -> Tensor:
        return te.compute([shape[axis] for axis in order], lambda *i: x(*(i[order.index(a)] for a in range(len(i)))))

    return site.compute(described, site[0])


@rule("Expand")
def _expand(site: Site) -> Operand:
    return _spread(site, np.broadcast_shapes(site.shape(), site.integers(1)))


def _spread(site: Site, shape: Sequence[int]) -> Operand:
    from tvm import te

    own = site.shape()
    skipped = len(shape) - len(own)

    def described(x: Tensor) -> Tensor:
        return te.compute(
            shape, lambda *i: x(*(0 if size == 1 else one for size, one in zip(own, i[skipped:], strict=True)))
        )

    return site.compute(described, site[0])


@rule("Tile")
def _tile(site: Site) -> Operand:
    return _take(site, {a: np.tile(np.arange(n), times) for a, (n, times) in _with(site, site.integers(1))})


def _with(site: Site, numbers: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    return list(enumerate(zip(site.shape(), numbers, strict=True)))


# --- by known positions ----------------------------------------------------------------------------------------------


def _take(site: Site, positions: Mapping[int, np.ndarray]) -> Operand:
    """Return the elements at known positions along some axes; the others stay whole."""
    from tvm import te

    shape = site.shape()
    moved = {axis: one for axis, one in positions.items() if not np.array_equal(one, np.arange(shape[axis]))}
    if not moved:
        return site[0]
    tables = {axis: one for axis, one in moved.items() if _line(one) is None}
    left = [len(moved[axis]) if axis in moved else size for axis, size in enumerate(shape)]

    def described(x: Tensor, *given: Tensor) -> Tensor:
        looked_up = dict(zip(tables, given, strict=True))

        def source(axis: int, index: Element) -> Element:
            if axis in looked_up:
                return looked_up[axis](index)
            line = _line(moved[axis]) if axis in moved else (0, 1)
            assert line is not None
            return index * line[1] + line[0]

        return te.compute(left, lambda *i: x(*(source(axis, one) for axis, one in enumerate(i))))

    arrays = [one.astype(np.int32) for one in tables.values()]
    return site.compute(described, site[0], *arrays)


def _line(positions: np.ndarray) -> tuple[int, int] | None:
    """Return start and step of positions that are evenly spaced."""
    if len(positions) == 1:
        return int(positions[0]), 1
    steps = np.diff(positions)
    return (int(positions[0]), int(steps[0])) if np.all(steps == steps[0]) else None


@rule("Slice")
def _slice(site: Site) -> Operand:
    starts, ends = site.integers(1), site.integers(2)
    axes = site.integers(3, range(len(starts)))
    steps = site.integers(4, (1,) * len(starts))
    positions = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = site.shape()[axis]
        bounds = [np.array([number]) for number in (start, end, 0, step)]
        (positions[axis % len(site.shape())],) = operators.evaluate("Slice", {}, [np.arange(size), *bounds])
    return _take(site, positions)


@rule("Split")
def _split(site: Site) -> list[Operand]:
    axis = site.axis()
    size, count = site.shape()[axis], len(site.node.outputs)
    given = site.integers(1) if site.optional(1) is not None else site.attributes.get("split")
    part = -(-size // count)
    lengths = list(given) if given is not None else [part] * (count - 1) + [size - part * (count - 1)]
    ends = list(itertools.accumulate(lengths))
    return [_take(site, {axis: np.arange(end - n, end)}) for n, end in zip(lengths, ends, strict=True)]


@rule("Pad")
def _pad(site: Site) -> Operand:
    shape = site.shape()
    pads = site.integers(1)
    given = site.integers(3, range(len(shape)))
    before, after = [0] * len(shape), [0] * len(shape)
    for at, axis in enumerate(given):
        before[axis], after[axis] = pads[at], pads[at + len(given)]
    mode = site.attributes.get("mode", "constant")
    if mode == "constant":
        return _pad_constant(site, before, after)
    ranges = enumerate(zip(shape, before, after, strict=True))
    return _take(site, {axis: _padded_positions(size, low, high, mode) for axis, (size, low, high) in ranges})


def _padded_positions(size: int, before: int, after: int, mode: str) -> np.ndarray:
    cut = np.arange(size)[max(-before, 0) : size - max(-after, 0)]
    return np.pad(cut, (max(before, 0), max(after, 0)), mode=mode)  # type: ignore[call-overload, no-any-return]


def _pad_constant(site: Site, before: Sequence[int], after: Sequence[int]) -> Operand:
    from tvm import te, tirx

    shape = site.shape()
    value = site.optional(2)
    left = [low + size + high for low, size, high in zip(before, shape, after, strict=True)]

    def described(x: Tensor, fill: Tensor) -> Tensor:
        def element(*index: Element) -> Element:
            source = [one - low for one, low in zip(index, before, strict=True)]
            inside = [tirx.all(one >= 0, one < size) for one, size in zip(source, shape, strict=True)]
            return tirx.if_then_else(tirx.all(*inside), x(*source), fill(*(0 for _ in dims(fill))))

        return te.compute(left, element, name="padded")

    return site.compute(described, site[0], np.zeros((), site.dtype()) if value is None else value)


@rule("Resize")
def _resize(site: Site) -> Operand:
    shape, read = site.shape(), site.attributes.get
    coordinates = read("coordinate_transformation_mode", "half_pixel")
    if read("mode", "nearest") != "nearest" or coordinates not in COORDINATES:
        raise site.refuse(f"only mode 'nearest' with coordinates of {', '.join(COORDINATES)} moves integers")
    if read("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise site.refuse("a policy for the aspect ratio leaves the sizes open; give scales")
    axes = [axis % len(shape) for axis in read("axes", range(len(shape)))]
    scales = site.optional(2)
    if scales is not None and 0 not in dims(scales):
        factors = [float(factor) for factor in site.array(2)]
        sizes = [math.floor(shape[axis] * factor) for axis, factor in zip(axes, factors, strict=True)]
    else:
        sizes = list(site.integers(3))
        factors = [size / shape[axis] for axis, size in zip(axes, sizes, strict=True)]
    nearest = read("nearest_mode", "round_prefer_floor")
    return _take(
        site,
        {
            axis: nearest_indices(shape[axis], size, factor, coordinates, nearest)
            for axis, size, factor in zip(axes, sizes, factors, strict=True)
        },
    )


# --- by positions that depend on data --------------------------------------------------------------------------------


@rule("Gather")
def _gather(site: Site) -> Operand:
    from tvm import te

    shape, axis = site.shape(), site.axis()
    end = axis + len(site.shape(1))

    def described(x: Tensor, index: Tensor) -> Tensor:
        return te.compute(
            (*shape[:axis], *dims(index), *shape[axis + 1 :]),
            lambda *i: x(*i[:axis], _position(index(*i[axis:end]), shape[axis]), *i[end:]),
            name="gathered",
        )

    return site.compute(described, *site.operands, elementwise=len(shape) == 1)


@rule("GatherElements")
def _gather_elements(site: Site) -> Operand:
    from tvm import te

    shape, axis = site.shape(), site.axis()

    def described(x: Tensor, index: Tensor) -> Tensor:
        return te.compute(
            dims(index), lambda *i: x(*i[:axis], _position(index(*i), shape[axis]), *i[axis + 1 :]), name="gathered"
        )

    return site.compute(described, *site.operands)


def _position(index: Element, size: int) -> Element:
    """Return an index counted from the front, held to the axis: a wrong one must not read other memory."""
    from tvm import tirx

    wide = index.astype("int64")
    from_front = tirx.Select(wide < 0, wide + size, wide)
    return tirx.min(tirx.max(from_front, constant(0, "int64")), constant(size - 1, "int64"))


# --- by position ------------------------------------------------------------------------------------------------------


@rule("Concat")
def _concat(site: Site) -> Operand:
    from tvm import te, tirx

    axis = site.axis()
    starts = list(itertools.accumulate((site.shape(at)[axis] for at in range(len(site.inputs))), initial=0))
    shape = [*site.shape()[:axis], starts[-1], *site.shape()[axis + 1 :]]

    def described(*tensors: Tensor) -> Tensor:
        def element(*index: Element) -> Element:
            *rest, last = [
                one(*index[:axis], 0 if dims(one)[axis] == 1 else index[axis] - start, *index[axis + 1 :])
                for one, start in zip(tensors, starts[:-1], strict=True)
            ]
            result = last
            for one, end in reversed(list(zip(rest, starts[1:-1], strict=True))):
                result = tirx.if_then_else(index[axis] < end, one, result)
            return result

        return te.compute(shape, element, name="joined")

    return site.compute(described, *site.operands)


@rule("DepthToSpace")
def _depth_to_space(site: Site) -> Operand:
    from tvm import te, tirx

    n, channels, height, width = site.shape()
    block = int(site.attributes["blocksize"])
    depth = channels // (block * block)
    by_columns = site.attributes.get("mode", "DCR") == "CRD"

    def described(x: Tensor) -> Tensor:
        def element(b: Element, c: Element, h: Element, w: Element) -> Element:
            part = tirx.floormod(h, block) * block + tirx.floormod(w, block)
            channel = c * (block * block) + part if by_columns else part * depth + c
            return x(b, channel, tirx.floordiv(h, block), tirx.floordiv(w, block))

        return te.compute((n, depth, height * block, width * block), element)

    return site.compute(described, site[0])


@rule("SpaceToDepth")
def _space_to_depth(site: Site) -> Operand:
    from tvm import te, tirx

    n, depth, height, width = site.shape()
    block = int(site.attributes["blocksize"])

    def described(x: Tensor) -> Tensor:
        def element(b: Element, c: Element, h: Element, w: Element) -> Element:
            part = tirx.floordiv(c, depth)
            row, column = tirx.floordiv(part, block), tirx.floormod(part, block)
            return x(b, tirx.floormod(c, depth), h * block + row, w * block + column)

        return te.compute((n, depth * block * block, height // block, width // block), element)

    return site.compute(described, site[0])


@rule("Trilu")
def _trilu(site: Site) -> Operand:
    from tvm import te, tirx

    offset = int(site.array(1, 0).item())
    upper = bool(site.attributes.get("upper", 1))
    zero = np.zeros((), site.dtype()).item()

    def described(x: Tensor) -> Tensor:
        def element(*index: Element) -> Element:
            row, column = index[-2:]
            kept = column - row >= offset if upper else column - row <= offset
            return tirx.Select(kept, x(*index), constant(zero, x.dtype))

        return te.compute(site.shape(), element)

    return site.compute(described, site[0])
