"""Convolutions, matrix products and maximum poolings of integers, accumulated in int32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qgraph.codegen.tvm_site import Element, Operand, Scalar, Site, Tensor, constant, dims, rule

__all__: list[str] = []


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


def _zero_point(site: Site, index: int) -> Scalar:
    """Return a zero point, which must be one known number; 0 where it is left out."""
    value = site.array(index, np.zeros((), np.int32))
    if value.size != 1 and np.any(value != value.flat[0]):
        raise site.refuse("it has a zero point for each channel; one for the whole tensor can be compiled")
    return Scalar(int(value.flat[0]), "int16", ())


# --- convolution ------------------------------------------------------------------------------------------------------


@rule("ConvInteger")
def _conv_integer(site: Site) -> Operand:
    from tvm import te, tirx

    batch, channels, *sizes = site.shape()
    outputs, inner, *kernel = site.shape(1)
    groups = int(site.attributes.get("group", 1))
    if inner * groups != channels or outputs % groups:
        raise site.refuse(f"its weight {site.shape(1)} and {groups} groups do not fit its {channels} input channels")
    axes = _axes(site, sizes, kernel)
    zero, weight_zero = _zero_point(site, 2), _zero_point(site, 3)
    zero_value = constant(zero.value, "int16")

    def described(x: Tensor, weight: Tensor) -> Tensor:
        # A padding element counts as the zero point, so that what is summed is 0 there.
        def centred(n: Element, c: Element, *at: Element) -> Element:
            source = [position - axis.before for position, axis in zip(at, axes, strict=True)]
            element = x(n, c, *source).astype("int16") - zero_value
            return tirx.if_then_else(_inside(at, axes), element, constant(0, "int16")) if padded else element

        padded = any(axis.is_padded for axis in axes)
        extents = [axis.extent if padded else axis.size for axis in axes]
        data = te.compute((batch, channels, *extents), centred, name="centred")
        channel, taps = te.reduce_axis((0, inner), name="c"), _kernel_axes(axes)

        def product(n: Element, o: Element, *windows: Element) -> Element:
            source = tirx.floordiv(o, outputs // groups) * inner + channel
            at = [axis.at(window, tap) for axis, window, tap in zip(axes, windows, taps, strict=True)]
            w = weight(o, channel, *taps).astype("int16") - constant(weight_zero.value, "int16")
            return te.sum(data(n, source, *at).astype("int32") * w.astype("int32"), axis=[channel, *taps])

        return te.compute((batch, outputs, *(axis.count for axis in axes)), product, name="accumulators")

    return site.compute(described, site[0], site[1])


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
    return _product(site, _zero_point(site, 2), _zero_point(site, 3), "int16", "int32")


@rule("MatMul")
def _matmul(site: Site) -> Operand:
    dtype = site.dtype()
    return _product(site, Scalar(0, dtype, ()), Scalar(0, dtype, ()), dtype, dtype)


def _product(site: Site, a_zero: Scalar, b_zero: Scalar, dtype: str, accumulator: str) -> Operand:
    from tvm import te

    a_shape, b_shape = site.shape(), site.shape(1)
    a = site.reshaped(site[0], (1, *a_shape)) if len(a_shape) == 1 else site[0]
    b = site.reshaped(site[1], (*b_shape, 1)) if len(b_shape) == 1 else site[1]
    (*a_rest, rows, length), (*b_rest, depth, columns) = dims(a), dims(b)
    if length != depth:
        raise site.refuse(f"its inputs {a_shape} and {b_shape} do not fit")
    rest = np.broadcast_shapes(tuple(a_rest), tuple(b_rest))

    def part(tensor: Tensor, own: Sequence[int], index: Sequence[Element], *last: Element) -> Element:
        before = index[len(index) - len(own) :]
        return tensor(*(0 if size == 1 else i for i, size in zip(before, own, strict=True)), *last).astype(dtype)

    def described(left: Tensor, right: Tensor) -> Tensor:
        k = te.reduce_axis((0, length), name="k")

        def element(*index: Element) -> Element:
            *batch, i, j = index
            x = part(left, a_rest, batch, i, k) - constant(a_zero.value, dtype)
            y = part(right, b_rest, batch, k, j) - constant(b_zero.value, dtype)
            return te.sum(x.astype(accumulator) * y.astype(accumulator), axis=k)

        return te.compute((*rest, rows, columns), element, name="accumulators")

    result = site.compute(described, a, b)
    squeezed = (*rest, *(() if len(a_shape) == 1 else (rows,)), *(() if len(b_shape) == 1 else (columns,)))
    return result if len(squeezed) == len(rest) + 2 else site.reshaped(result, squeezed)
