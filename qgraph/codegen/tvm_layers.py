"""Convolutions, matrix products and maximum poolings of integers, accumulated in int32."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from qgraph.codegen.tvm_site import Element, Operand, Site, Tensor, constant, dims, rule

__all__ = ["IN_LANES", "LANES"]

LANES = 16
"""Outputs that are computed side by side: as many int32 as the widest vector registers hold."""
IN_LANES = "in_lanes"
"""The name of the computation whose last axis these are, for `tvm_schedule`."""


@dataclasses.dataclass(frozen=True)
class _Axis:
    """How a kernel moves along one axis: `count` windows; the first starts `before` elements ahead of the input."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    count: int

    @property
    def extent(self) -> int:
        """Elements from the first window's start to the last one's end."""
        return (self.count - 1) * self.stride + (self.kernel - 1) * self.dilation + 1

    @property
    def is_padded(self) -> bool:
        """Whether a window reaches beyond the input."""
        return self.before > 0 or self.extent - self.before > self.size

    def at(self, window: Element, tap: Element) -> Element:
        """Return where an element of the kernel lies, counted from the first window's start."""
        return window * self.stride + tap * self.dilation


def _axes(site: Site, sizes: Sequence[int], kernel: Sequence[int]) -> list[_Axis]:
    rank = len(sizes)
    read = site.attributes.get
    strides, dilations = read("strides", (1,) * rank), read("dilations", (1,) * rank)
    pads, mode = read("pads", (0,) * 2 * rank), read("auto_pad", "NOTSET")
    axes = []
    for i, (size, width, stride, dilation) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        reach = (width - 1) * dilation + 1
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            count = -(-size // stride)
            total = max((count - 1) * stride + reach - size, 0)
            before = total // 2 if mode == "SAME_UPPER" else total - total // 2
        else:
            before, after = (0, 0) if mode == "VALID" else (pads[i], pads[i + rank])
            room = size + before + after - reach
            if room < 0:
                raise site.refuse(f"its kernel of {reach} is larger than its input of {size} with its padding")
            count = room // stride + 1
            if read("ceil_mode", 0):
                count = -(-room // stride) + 1
                count -= (count - 1) * stride >= size + before  # it would start behind the input
        axes.append(_Axis(size, width, stride, dilation, before, count))
    return axes


def _inside(positions: Sequence[Element], axes: Sequence[_Axis]) -> Element:
    """Tell whether a position, counted from the first windows' start, lies in the input."""
    from tvm import tirx

    return tirx.all(
        *(
            tirx.all(position >= axis.before, position < axis.before + axis.size)
            for position, axis in zip(positions, axes, strict=True)
        )
    )


def _kernel_axes(axes: Sequence[_Axis]) -> list[Any]:
    from tvm import te

    return [te.reduce_axis((0, axis.kernel), name=f"k{i}") for i, axis in enumerate(axes)]


def _zero_point(site: Site, index: int) -> int:
    """Return a zero point, which must be one known number; 0 where it is left out."""
    value = site.array(index, np.zeros((), np.int32))
    if np.any(value != value.flat[0]):
        raise site.refuse("it has a zero point for each channel; one for the whole tensor can be compiled")
    return int(value.flat[0])


# --- convolution ------------------------------------------------------------------------------------------------------


@rule("ConvInteger")
def _conv_integer(site: Site) -> Operand:
    channels, sizes = site.shape()[1], site.shape()[2:]
    outputs, inner, *kernel = site.shape(1)
    groups = int(site.attributes.get("group", 1))
    if inner * groups != channels or outputs % groups:
        raise site.refuse(f"its weight {site.shape(1)} and {groups} groups do not fit its {channels} input channels")
    axes = _axes(site, sizes, kernel)
    zero, weight_zero = _zero_point(site, 2), _zero_point(site, 3)
    weight = site[1]
    if not isinstance(weight, np.ndarray) or weight_zero or (groups > 1 and outputs // groups % LANES):
        return site.compute(functools.partial(_convolved, axes, groups, zero, weight_zero), site[0], weight)
    packed = functools.partial(_convolved_in_lanes, axes, groups, zero, outputs)
    return site.compute(packed, site[0], _in_lanes(weight))


def _in_lanes(weight: np.ndarray) -> np.ndarray:
    """Return the outputs, the first axis, in chunks, and those of a chunk side by side: [O, ...] -> [O/16, ..., 16]."""
    padded = np.pad(weight, [(0, -len(weight) % LANES)] + [(0, 0)] * (weight.ndim - 1))
    return np.ascontiguousarray(np.moveaxis(padded.reshape(-1, LANES, *weight.shape[1:]), 1, -1))


def _centred(x: Tensor, axes: Sequence[_Axis], zero: int) -> Tensor:
    """Return the input less its zero point, int32, as far as windows reach; padding counts as the zero point."""
    from tvm import te, tirx

    padded = any(axis.is_padded for axis in axes)

    def element(n: Element, c: Element, *at: Element) -> Element:
        source = [position - axis.before for position, axis in zip(at, axes, strict=True)]
        number = x(n, c, *source).astype("int32") - constant(zero, "int32")
        return tirx.if_then_else(_inside(at, axes), number, constant(0, "int32")) if padded else number

    return te.compute((*dims(x)[:2], *(axis.extent for axis in axes)), element, name="centred")


def _convolved(axes: Sequence[_Axis], groups: int, zero: int, weight_zero: int, x: Tensor, weight: Tensor) -> Tensor:
    from tvm import te, tirx

    outputs, inner = dims(weight)[:2]
    data = _centred(x, axes, zero)
    channel, taps = te.reduce_axis((0, inner), name="c"), _kernel_axes(axes)

    def element(n: Element, o: Element, *windows: Element) -> Element:
        source = tirx.floordiv(o, outputs // groups) * inner + channel
        at = [axis.at(window, tap) for axis, window, tap in zip(axes, windows, taps, strict=True)]
        factor = weight(o, channel, *taps).astype("int32") - weight_zero
        return te.sum(data(n, source, *at) * factor, axis=[channel, *taps])

    return te.compute((dims(x)[0], outputs, *(axis.count for axis in axes)), element, name="accumulators")


def _convolved_in_lanes(
    axes: Sequence[_Axis], groups: int, zero: int, outputs: int, x: Tensor, weight: Tensor
) -> Tensor:
    from tvm import te, tirx

    chunks, inner = dims(weight)[:2]
    data = _centred(x, axes, zero)
    channel, taps = te.reduce_axis((0, inner), name="c"), _kernel_axes(axes)
    counts = [axis.count for axis in axes]

    def element(n: Element, chunk: Element, *rest: Element) -> Element:
        *windows, lane = rest
        source = tirx.floordiv(chunk, chunks // groups) * inner + channel
        at = [axis.at(window, tap) for axis, window, tap in zip(axes, windows, taps, strict=True)]
        factor = weight(chunk, channel, *taps, lane).astype("int32")
        return te.sum(data(n, source, *at) * factor, axis=[channel, *taps])

    batch = dims(x)[0]
    in_lanes = te.compute((batch, chunks, *counts, LANES), element, name=IN_LANES)
    return te.compute(
        (batch, outputs, *counts),
        lambda n, o, *windows: in_lanes(n, tirx.floordiv(o, LANES), *windows, tirx.floormod(o, LANES)),
        name="accumulators",
    )


@rule("MaxPool")
def _max_pool(site: Site) -> Operand:
    from tvm import te, tirx

    if len(site.node.outputs) > 1 and site.node.outputs[1].uses():
        raise site.refuse("its second output, the indices, is read")
    batch, channels, *sizes = site.shape()
    axes = _axes(site, sizes, site.attributes["kernel_shape"])
    least = int(np.iinfo(site.dtype()).min)

    def described(x: Tensor) -> Tensor:
        taps = _kernel_axes(axes)

        def largest(n: Element, c: Element, *windows: Element) -> Element:
            at = [axis.at(window, tap) for axis, window, tap in zip(axes, windows, taps, strict=True)]
            element = x(n, c, *(position - axis.before for position, axis in zip(at, axes, strict=True)))
            if any(axis.is_padded for axis in axes):
                element = tirx.if_then_else(_inside(at, axes), element, constant(least, x.dtype))
            return te.max(element, axis=taps)

        return te.compute((batch, channels, *(axis.count for axis in axes)), largest, name="largest")

    return site.compute(described, site[0])


# --- matrix products --------------------------------------------------------------------------------------------------


@rule("MatMulInteger")
def _matmul_integer(site: Site) -> Operand:
    return _product(site, _zero_point(site, 2), _zero_point(site, 3), "int32")


@rule("MatMul")
def _matmul(site: Site) -> Operand:
    return _product(site, 0, 0, site.dtype())


def _product(site: Site, a_zero: int, b_zero: int, dtype: str) -> Operand:
    a_shape, b_shape = site.shape(), site.shape(1)
    a = site.reshaped(site[0], (1, *a_shape)) if len(a_shape) == 1 else site[0]
    b = site.reshaped(site[1], (*b_shape, 1)) if len(b_shape) == 1 else site[1]
    if dims(a)[-1] != dims(b)[-2]:
        raise site.refuse(f"its inputs {a_shape} and {b_shape} do not fit")
    rows, columns = dims(a)[-2], dims(b)[-1]
    if isinstance(b, np.ndarray) and b.ndim == 2 and not b_zero:
        result = site.compute(functools.partial(_multiplied, dtype, columns, a_zero), a, _in_lanes(b.T))
    else:

        def packed(left: Tensor, right: Tensor) -> Tensor:
            return _multiplied(dtype, columns, a_zero, left, _packed_columns(right, b_zero, dtype))

        result = site.compute(packed, a, b)
    rest = dims(result)[:-2]
    kept = (*rest, *(() if len(a_shape) == 1 else (rows,)), *(() if len(b_shape) == 1 else (columns,)))
    return result if len(kept) == len(rest) + 2 else site.reshaped(result, kept)


def _packed_columns(matrix: Tensor, zero: int, dtype: str) -> Tensor:
    """Return the columns of matrices in chunks: [..., K, N] -> [..., N/16, K, 16], the last one filled with 0."""
    from tvm import te, tirx

    *rest, depth, columns = dims(matrix)

    def element(*index: Element) -> Element:
        *batch, chunk, k, lane = index
        column = chunk * LANES + lane
        number = matrix(*batch, k, column).astype(dtype) - constant(zero, dtype)
        return tirx.if_then_else(column < columns, number, constant(0, dtype)) if columns % LANES else number

    return te.compute((*rest, -(-columns // LANES), depth, LANES), element, name="packed")


def _multiplied(dtype: str, columns: int, zero: int, a: Tensor, lanes: Tensor) -> Tensor:
    from tvm import te, tirx

    (*a_rest, rows, length), (*b_rest, chunks, _, _) = dims(a), dims(lanes)
    rest = np.broadcast_shapes(tuple(a_rest), tuple(b_rest))
    data = te.compute(dims(a), lambda *i: a(*i).astype(dtype) - constant(zero, dtype), name="centred")
    k = te.reduce_axis((0, length), name="k")

    def part(tensor: Tensor, own: Sequence[int], batch: Sequence[Element], *last: Element) -> Element:
        before = batch[len(batch) - len(own) :]
        index = [0 if size == 1 else i for i, size in zip(before, own, strict=True)]
        return tensor(*index, *last).astype(dtype)

    def element(*index: Element) -> Element:
        *batch, chunk, i, lane = index
        return te.sum(part(data, a_rest, batch, i, k) * part(lanes, b_rest, batch, chunk, k, lane), axis=k)

    in_lanes = te.compute((*rest, chunks, rows, LANES), element, name=IN_LANES)
    return te.compute(
        (*rest, rows, columns),
        lambda *i: in_lanes(*i[:-2], tirx.floordiv(i[-1], LANES), i[-2], tirx.floormod(i[-1], LANES)),
        name="accumulators",
    )
