"""Interpolation along an axis is a product with a constant matrix.

    y = Resize<linear>(x[n,c,4,6])    to [n,c,8,12]
    =>
    y = Transpose(MatMul(Transpose(MatMul(x, A[6,12])), B[4,8]))

Each column of a matrix holds the weights of what one element of the result is made of; only sizes that change take
one, and Transpose brings their axis to the end. Linear and cubic, with the coordinates of the operator's reference. A
product takes as many multiplications for an element as the axis is long: this is for what has products and no Resize.

Does not fire, with the reason in the report, in mode nearest, which mixes nothing; for tf_crop_and_resize, antialias
and kept aspect ratios; where scales are computed or a size that changes is not known; and for scales other than one
that change no size: ONNX Runtime copies, the reference interpolates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.numerics.interpolation import COORDINATES, interpolation_matrix
from qgraph.passes._plain_operators import Emitter, UnfitError, rewrite
from qgraph.pipeline import Context, Pass, Report

__all__ = ["ResizeToMatmul"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_Change: TypeAlias = tuple[int, int, float]
"""The size of an axis before and after, and the scale."""


@dataclass(frozen=True)
class ResizeToMatmul(Pass):
    """Write linear and cubic Resize as products with constant matrices."""

    name: ClassVar[str] = "resize-to-matmul"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; `skipped` has every Resize that stays."""
        del context
        return rewrite(model, {"Resize": _multiplied}, "as MatMul")


def _multiplied(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    attributes, value = node.attributes, node.inputs[0]
    coordinates = attributes.get_string("coordinate_transformation_mode", "half_pixel")
    _require_interpolation(node, coordinates)
    if value is None or value.shape is None or value.dtype not in _FLOATS:
        raise UnfitError("its input is not known to be of floats of a known rank")
    cubic = attributes.get_float("cubic_coeff_a", -0.75) if attributes.get_string("mode") == "cubic" else None
    outside = attributes.get_int("exclude_outside", 0) != 0
    changes = _changes(node, list(value.shape))
    if changes and all(before == after for before, after, _ in changes.values()):
        raise UnfitError("its scales change no size, which runtimes take in different ways")
    if not changes:
        return [emit("Identity", value)]
    rank, dtype = len(value.shape), value.dtype.numpy()
    order = list(range(rank))
    for axis in sorted(changes, reverse=True):
        place = order.index(axis)
        if place < rank - 1:
            swap = [*range(place), rank - 1, *range(place + 1, rank - 1), place]
            value, order = emit("Transpose", value, perm=swap), [order[index] for index in swap]
        matrix = interpolation_matrix(*changes[axis], coordinates, cubic_coefficient=cubic, exclude_outside=outside)
        value = emit("MatMul", value, emit.constant(f"axis{axis}", matrix.astype(dtype)))
    if order != list(range(rank)):
        value = emit("Transpose", value, perm=[order.index(axis) for axis in range(rank)])
    return [value]


def _require_interpolation(node: ir.Node, coordinates: str) -> None:
    attributes = node.attributes
    if attributes.get_string("mode", "nearest") == "nearest":
        raise UnfitError("its mode nearest mixes nothing")
    if coordinates not in COORDINATES:
        raise UnfitError(f"its coordinates are {coordinates}")
    if attributes.get_int("antialias", 0):
        raise UnfitError("it smooths (antialias)")
    if attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise UnfitError("its sizes depend on one another (keep_aspect_ratio_policy)")


def _changes(node: ir.Node, dims: Sequence[int | ir.SymbolicDim]) -> Mapping[int, _Change]:
    """Return what happens to the axes that are resized."""
    scales, sizes = (node.inputs[place] if len(node.inputs) > place else None for place in (2, 3))
    axes = [axis % len(dims) for axis in node.attributes.get_ints("axes", range(len(dims)))]
    if sizes is None:
        factors = qgraph.ir.constant(scales)
        if factors is None:
            raise UnfitError("its scales are computed")
        scaled = zip(axes, factors.tolist(), strict=True)
        return {axis: _scaled(dims[axis], factor) for axis, factor in scaled if factor != 1}
    known, shape = qgraph.ir.constant(sizes), node.outputs[0].shape
    if known is None and shape is None:
        raise UnfitError("its sizes are computed")
    after = known.tolist() if known is not None else [shape[axis] for axis in axes] if shape is not None else []
    pairs = [(axis, dims[axis], size) for axis, size in zip(axes, after, strict=True)]
    return {axis: _sized(before, size) for axis, before, size in pairs if not _is_same(before, size)}


def _is_same(before: int | ir.SymbolicDim, after: int | ir.SymbolicDim) -> bool:
    return before == after and (isinstance(before, int) or before.value is not None)


def _scaled(before: int | ir.SymbolicDim, scale: float) -> _Change:
    if not isinstance(before, int):
        raise UnfitError("a size that changes is not known")
    return before, int(np.float32(before) * np.float32(scale)), scale


def _sized(before: int | ir.SymbolicDim, after: int | ir.SymbolicDim) -> _Change:
    if not isinstance(before, int) or not isinstance(after, int):
        raise UnfitError("a size that changes is not known")
    return before, after, after / before
