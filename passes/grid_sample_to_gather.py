"""Sampling at computed places is gathering: where, and with which weights, are functions of one coordinate each.

    y = GridSample<linear>(x[n,c,h,w], grid[n,i,j,2])
    =>
    u, v = Split(grid)                      u across, v down; then for u (and v alike):
    p = ((u + 1) * w - 1) / 2               in elements
    a = Floor(p);  f = p - a                from 0 to 1
    l = a inside ? 1 - f : 0                the weight of the element before, r that of the element after
    s = Cast(Clip(a, 0, w - 1));  t = Cast(Clip(a + 1, 0, w - 1))
    y = sum over the four neighbours of GatherElements(Reshape(x, [n,c,h*w]), row * w + column) * weight * weight

So a whole sampling is made of functions of one tensor, whole numbers, movements and products, each of which integers
compute. Mode nearest takes one neighbour, at Round(p). Outside of the image are zeros, or (padding_mode border) what
lies at the border, for which p is clipped first.

Does not fire, with the reason in the report, for cubic interpolation, for padding_mode reflection, for volumes, and
where the sizes of the image are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir

from qgraph.passes._plain_operators import Emitter, UnfitError, rewrite, static_sizes
from qgraph.pipeline import Context, Pass, Report

__all__ = ["GridSampleToGather"]

_INT32 = int(ir.DataType.INT32)
_IMAGE = 4


@dataclass(frozen=True)
class GridSampleToGather(Pass):
    """Write linear and nearest GridSample as gathering and weighted sums."""

    name: ClassVar[str] = "grid-sample-to-gather"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; `skipped` has every GridSample that stays."""
        del context
        return rewrite(model, {"GridSample": _sampled}, "as GatherElements")


class _Neighbour(NamedTuple):
    """An element beside a place, along one axis.

    Attributes:
        place: int32 [n,1,i*j].
        weight: float [n,1,i*j]; None for one.
    """

    place: ir.Value
    weight: ir.Value | None


def _sampled(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    image, grid = node.inputs
    mode = {"bilinear": "linear"}.get(given := node.attributes.get_string("mode", "linear"), given)
    padding = node.attributes.get_string("padding_mode", "zeros")
    if mode not in ("linear", "nearest"):
        raise UnfitError(f"its mode is {mode}")
    if padding not in ("zeros", "border"):
        raise UnfitError(f"its padding_mode is {padding}")
    if image is None or image.shape is None or len(image.shape) != _IMAGE or image.dtype is not ir.DataType.FLOAT:
        raise UnfitError("its input is not known to be images in float32")
    channels, height, width = static_sizes(image, slice(1, None), "a size of its images is")
    sampled = static_sizes(grid, slice(1, 3), "a size of its grid is")
    assert grid is not None
    parts = emit.split(grid, [1, 1], 3)
    flat = emit.integers("places", [0, 1, sampled[0] * sampled[1]])
    corners = node.attributes.get_int("align_corners", 0) != 0
    across, down = (
        _Axis(emit.within(name), size, border=padding == "border").neighbours(
            emit("Reshape", part, flat), mode, corners=corners
        )
        for name, part, size in zip(("u", "v"), parts, (width, height), strict=True)
    )
    rows = emit("Reshape", image, emit.integers("rows", [0, channels, height * width]))
    terms = [_weighted(emit, rows, channels, width, one, other) for one in down for other in across]
    total = terms[0]
    for term in terms[1:]:
        total = emit("Add", total, term)
    return [emit("Reshape", total, emit.integers("image", [0, channels, *sampled]))]


def _weighted(
    emit: Emitter, rows: ir.Value, channels: int, width: int, down: _Neighbour, across: _Neighbour
) -> ir.Value:
    """Emit one neighbour of every place, times its weight."""
    start = emit("Mul", down.place, emit.constant("width", np.asarray(width, np.int32)))
    place = emit("Tile", emit("Add", start, across.place), emit.integers("channels", [1, channels, 1]))
    value = emit("GatherElements", rows, place, axis=2)
    if down.weight is None or across.weight is None:
        return value
    return emit("Mul", value, emit("Mul", down.weight, across.weight))


@dataclass(frozen=True)
class _Axis:
    """An axis of the image, of `size` elements; coordinates from -1 to 1 run over it."""

    emit: Emitter
    size: int
    border: bool

    def neighbours(self, coordinate: ir.Value, mode: str, *, corners: bool) -> list[_Neighbour]:
        """Emit the neighbours of every place: one in mode nearest, else two."""
        place = self._place(coordinate, corners=corners)
        if mode == "nearest":
            nearest = self.emit("Round", place)
            return [_Neighbour(self._stored(nearest), None if self.border else self._inside(nearest))]
        before = self.emit("Floor", place)
        after = self.emit("Add", before, self._number("one", 1))
        share = self.emit("Sub", place, before)
        weights = [self.emit("Sub", self._number("one", 1), share), share]
        if not self.border:
            weights = [
                self.emit("Mul", weight, self._inside(one))
                for weight, one in zip(weights, (before, after), strict=True)
            ]
        return [_Neighbour(self._stored(one), weight) for one, weight in zip((before, after), weights, strict=True)]

    def _place(self, coordinate: ir.Value, *, corners: bool) -> ir.Value:
        """Emit coordinates in elements: -1 and 1 are the middles of the outer elements (`corners`), or their ends."""
        factor = (self.size - 1) / 2 if corners else self.size / 2
        scaled = self.emit("Mul", coordinate, self._number("half", factor))
        place = self.emit("Add", scaled, self._number("middle", (self.size - 1) / 2))
        return self._clipped(place) if self.border else place

    def _clipped(self, place: ir.Value) -> ir.Value:
        return self.emit("Clip", place, self._number("first", 0), self._number("last", self.size - 1))

    def _stored(self, place: ir.Value) -> ir.Value:
        return self.emit("Cast", self._clipped(place), to=_INT32)

    def _inside(self, place: ir.Value) -> ir.Value:
        """Emit 1 where a whole number is the place of an element, else 0."""
        inside = self.emit("Equal", self._clipped(place), place)
        return self.emit("Where", inside, self._number("one", 1), self._number("zero", 0))

    def _number(self, name: str, real: float) -> ir.Value:
        return self.emit.constant(name, np.asarray(real, np.float32))
