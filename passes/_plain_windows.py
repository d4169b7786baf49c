"""Norms of what lies in a window, in terms of AveragePool and functions of each element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.passes._plain_operators import Emitter, UnfitError, static_sizes

__all__ = ["local_response", "pooled_norm"]

_WINDOW = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


def local_response(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Emit an LRN: the window lies over neighbouring channels.

    Source: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks" (2012), section 3.3,
    with alpha divided by the size of the window as in ONNX.
    """
    value, attributes = node.inputs[0], node.attributes
    channels, *image = static_sizes(value, slice(1, None), "a size of its input is")
    size = attributes.get_int("size")
    squares = emit("Mul", value, value)
    rows = emit("Reshape", squares, emit.integers("rows", [0, 1, channels, math.prod(image)]))
    pads = [(size - 1) // 2, 0, size // 2, 0]
    means = emit("AveragePool", rows, kernel_shape=[size, 1], pads=pads, count_include_pad=1)
    mean = emit("Reshape", means, emit.integers("image", [0, channels, *image]))
    scaled = emit("Mul", mean, number(emit, "alpha", value, attributes.get_float("alpha", 1e-4)))
    total = emit("Add", scaled, number(emit, "bias", value, attributes.get_float("bias", 1.0)))
    power = emit("Pow", total, number(emit, "beta", value, -attributes.get_float("beta", 0.75)))
    return [emit("Mul", value, power)]


def pooled_norm(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Emit an LpPool: sums of powers are averages times the number of elements."""
    value, attributes = node.inputs[0], node.attributes
    if attributes.get_int("ceil_mode", 0):
        raise UnfitError("its windows may reach beyond the border (ceil_mode)")
    order = attributes.get_int("p", 2)
    if order == 2:
        terms = emit("Mul", value, value)
    else:
        terms = emit("Abs", value)
        terms = terms if order == 1 else emit("Pow", terms, number(emit, "order", value, order))
    kept = {name: attributes[name] for name in _WINDOW if name in attributes}
    means = emit("AveragePool", terms, count_include_pad=1, **kept)
    total = emit("Mul", means, number(emit, "count", value, math.prod(attributes.get_ints("kernel_shape"))))
    if order == 1:
        return [total]
    return [emit("Sqrt", total) if order == 2 else emit("Pow", total, number(emit, "root", value, 1 / order))]


def number(emit: Emitter, name: str, like: ir.Value | None, real: float) -> ir.Value:
    """Return a constant of the type of a tensor."""
    dtype = ir.DataType.FLOAT if like is None or like.dtype is None else like.dtype
    return emit.constant(name, np.asarray(real, dtype.numpy()))
