"""A transposed convolution is a convolution of the image with zeros in between.

    y = ConvTranspose<strides = [2]>(x[n,c,4], W, b)
    =>
    wide = Reshape(Pad(Reshape(x, [n,c,4,1]), one zero behind each element), [n,c,8])
    y = Conv(wide, W flipped, its channels exchanged, b)

Every weight meets the element that it met before, so that only the order of sums differs. What the transposed form
cuts off (its pads) or leaves free at the end (output_padding, output_shape) becomes the padding of the convolution, or
a Slice before it where more is cut off than the kernel reaches. Groups and dilations stay what they are. The zeros in
between cost multiplications: as many times those of the transposed form as the strides' product.

Does not fire, with the reason in the report, for a computed weight and where the image's size is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_tracer import constant_tensor
from qgraph.passes._plain_operators import Emitter, UnfitError, rewrite, static_sizes
from qgraph.pipeline import Context, Pass, Report

__all__ = ["ConvTransposeToConv"]


@dataclass(frozen=True)
class ConvTransposeToConv(Pass):
    """Write ConvTranspose as zeros between the elements and a convolution."""

    name: ClassVar[str] = "conv-transpose-to-conv"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; `skipped` has every ConvTranspose that stays."""
        del context
        return rewrite(model, {"ConvTranspose": _convolved}, "as Conv")


@dataclass(frozen=True)
class _Axis:
    """One axis of the image.

    Attributes:
        size: of the input.
        stride: between the places where the elements of the input go.
        reach: of the dilated kernel beyond its first element.
        cut: how much of what the kernel writes is cut off at the start.
        output: the size of the output.
    """

    size: int
    stride: int
    reach: int
    cut: int
    output: int

    @property
    def margins(self) -> tuple[int, int]:
        """What the widened input must have more at its start and its end; negative for less."""
        start = self.reach - self.cut
        return start, self.output + self.reach - start - self.size * self.stride


def _convolved(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    weight = constant_tensor(node.inputs[1])
    if weight is None:
        raise UnfitError("its weight is computed")
    kernel = [int(dim) for dim in weight.shape.numpy()[2:]]
    sizes = static_sizes(node.inputs[0], slice(2, None), "the size of its image is")
    dilations = node.attributes.get_ints("dilations", [1] * len(sizes))
    axes = _axes(node, sizes, [(size - 1) * dilation for size, dilation in zip(kernel, dilations, strict=True)])
    groups = node.attributes.get_int("group", 1)
    wide = _cropped(_widened(node.inputs[0], axes, emit), axes, emit)
    inputs = [wide, emit.constant("weight", _exchanged(weight, groups)), *node.inputs[2:]]
    pads = [max(0, margin) for margins in zip(*(axis.margins for axis in axes), strict=True) for margin in margins]
    return [emit("Conv", *inputs, kernel_shape=kernel, dilations=dilations, pads=pads, group=groups)]


def _axes(node: ir.Node, sizes: Sequence[int], reaches: Sequence[int]) -> list[_Axis]:
    """Return the axes of the image, by the formulas of the operator's reference."""
    rank, attributes = len(sizes), node.attributes
    strides = attributes.get_ints("strides", [1] * rank)
    extra = attributes.get_ints("output_padding", [0] * rank)
    mode = attributes.get_string("auto_pad", "NOTSET")
    given = attributes.get_ints("output_shape", ())[-rank:]
    pads = attributes.get_ints("pads", [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
    axes = []
    for place, (size, stride, reach) in enumerate(zip(sizes, strides, reaches, strict=True)):
        full = stride * (size - 1) + extra[place] + reach + 1
        if given or mode.startswith("SAME"):
            total = max(0, full - (given[place] if given else size * stride))
            output = given[place] if given else full - total
            cut = total // 2 if mode == "SAME_UPPER" else total - total // 2
        else:
            cut, output = pads[place], full - pads[place] - pads[place + rank]
        axes.append(_Axis(size, stride, reach, cut, output))
    return axes


def _widened(value: ir.Value | None, axes: Sequence[_Axis], emit: Emitter) -> ir.Value | None:
    """Emit zeros behind every element along the axes with a stride."""
    if all(axis.stride == 1 for axis in axes):
        return value
    apart, behind, joined = [0, 0], [0, 0], [0, 0]
    for axis in axes:
        apart += [axis.size] if axis.stride == 1 else [axis.size, 1]
        behind += [0] if axis.stride == 1 else [0, axis.stride - 1]
        joined.append(axis.size * axis.stride)
    elements = emit("Reshape", value, emit.integers("apart", apart))
    padded = emit("Pad", elements, emit.integers("zeros", [0] * len(behind) + behind))
    return emit("Reshape", padded, emit.integers("wide", joined))


def _cropped(value: ir.Value | None, axes: Sequence[_Axis], emit: Emitter) -> ir.Value | None:
    """Emit a Slice of what Conv, whose padding is never negative, cannot leave out."""
    cuts = [(place, axis, *axis.margins) for place, axis in enumerate(axes, start=2) if min(axis.margins) < 0]
    if not cuts:
        return value
    starts = [max(0, -start) for _, _, start, _ in cuts]
    ends = [axis.size * axis.stride + min(0, end) for _, axis, _, end in cuts]
    places = [place for place, *_ in cuts]
    return emit(
        "Slice", value, emit.integers("starts", starts), emit.integers("ends", ends), emit.integers("axes", places)
    )


def _exchanged(weight: ir.TensorProtocol, groups: int) -> ir.TensorProtocol:
    """Return a weight [in, out / groups, ...] as one of Conv, [out, in / groups, ...], flipped along the image."""
    inputs, outputs, *kernel = (int(dim) for dim in weight.shape.numpy())

    def exchanged() -> np.ndarray:
        grouped = np.asarray(weight.numpy()).reshape(groups, inputs // groups, outputs, *kernel)
        flipped = np.flip(np.swapaxes(grouped, 1, 2), axis=tuple(range(3, 3 + len(kernel))))
        return flipped.reshape(groups * outputs, inputs // groups, *kernel)

    return qgraph.ir.lazy(exchanged, weight.dtype, [groups * outputs, inputs // groups, *kernel])
