"""Lowering rules: products, convolutions and pooling."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from qgraph.coreml.site import Rule, Site, UnfitError

__all__ = ["RULES"]

_MOST_AXES = 3
"""Rank of what `linear` multiplies."""


def _matmul(site: Site) -> Any:
    """A constant matrix goes in transposed, as the weight of a linear layer, which accelerators know."""
    rank = len(site.shape(0))
    if site.type().is_float and rank in (2, _MOST_AXES) and len(site.shape(1)) == 2 and site.is_constant(1):
        return site.emit("linear", x=site[0], weight=site.weight(1, (1, 0)))
    if rank == 1 or len(site.shape(1)) == 1:
        return _with_vector(site)
    return site.emit("matmul", x=site[0], y=site[1])


def _with_vector(site: Site) -> Any:
    """MIL multiplies matrices: a vector gets an axis of one, which the product loses again."""
    left, right = site[0], site[1]
    if len(site.shape(0)) == 1:
        left = site.emit("expand_dims", x=left, axes=[0])
    if len(site.shape(1)) == 1:
        right = site.emit("expand_dims", x=right, axes=[1])
    return site.reshape(site.emit("matmul", x=left, y=right), site.result())


def _gemm(site: Site) -> Any:
    alpha, beta = site.floating("alpha", 1.0), site.floating("beta", 1.0)
    turned = bool(site.integer("transB", 0))
    left = site.emit("transpose", x=site[0], perm=[1, 0]) if site.integer("transA", 0) else site[0]
    if alpha != 1.0:
        left = site.emit("mul", x=left, y=site.number(alpha))
    columns = site.result()[1]
    fused = site.has(2) and beta == 1.0 and site.is_constant(2) and site.shape(2) == (columns,)
    if site.is_constant(1):
        weight = site[1] if turned else site.weight(1, (1, 0))
        product = site.emit("linear", x=left, weight=weight, **({"bias": site[2]} if fused else {}))
    else:
        fused = False
        product = site.emit("matmul", x=left, y=site[1], transpose_y=turned)
    if not site.has(2) or fused:
        return product
    addend = site[2] if beta == 1.0 else site.emit("mul", x=site[2], y=site.number(beta))
    return site.emit("add", x=product, y=addend)


def window_padding(site: Site, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Return the padding of a window, (before, after) for each axis, whatever way the node says it in."""
    rank = len(kernel)
    mode = site.text("auto_pad", "NOTSET")
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * 2 * rank if mode == "VALID" else site.integers("pads", [0] * 2 * rank)
        return [pads[axis + end * rank] for axis in range(rank) for end in (0, 1)]
    found = []
    for size, window, stride, dilation in zip(site.shape(0)[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size, 0)
        half = total // 2
        found += [half, total - half] if mode == "SAME_UPPER" else [total - half, half]
    return found


def _window(site: Site) -> dict[str, Any]:
    """Return what a convolution and its transpose are told alike."""
    kernel = site.shape(1)[2:]
    strides, dilations = (site.integers(name, [1] * len(kernel)) for name in ("strides", "dilations"))
    return {
        "x": site[0],
        "weight": site[1],
        "strides": strides,
        "dilations": dilations,
        "pad_type": "custom",
        "pad": window_padding(site, kernel, strides, dilations),
        "groups": site.integer("group", 1),
        **({"bias": site[2]} if site.has(2) else {}),
    }


def _conv(site: Site) -> Any:
    return site.emit("conv", **_window(site))


def _conv_transpose(site: Site) -> Any:
    if "output_shape" in site.node.attributes or site.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UnfitError("it says its padding by the size of its output: write it as pads")
    window = _window(site)
    strides = window["strides"]
    if any(size > stride for size, stride in zip(site.integers("output_padding", [0] * len(strides)), strides)):  # noqa: B905
        raise UnfitError("its output_padding is larger than its strides")
    return site.emit("conv_transpose", output_shape=site.result(), **window)


def _pool(site: Site, kind: str) -> Any:
    kernel = site.integers("kernel_shape", [])
    strides = site.integers("strides", [1] * len(kernel))
    if any(one != 1 for one in site.integers("dilations", [1] * len(kernel))):
        raise UnfitError("windows with gaps (dilations) have no pooling in MIL")
    if len(site.node.outputs) > 1 and site.node.outputs[1].uses():
        raise UnfitError("MIL does not tell where the largest elements stand")
    padding = window_padding(site, kernel, strides, [1] * len(kernel))
    reached = _reached(site, kernel, strides, padding)
    parameters: dict[str, Any] = {}
    if kind == "avg_pool":
        counted = bool(site.integer("count_include_pad", 0))
        if counted and reached != padding:
            raise UnfitError("an average that counts its padding, but not what ceil_mode adds, has no form in MIL")
        parameters = {"exclude_padding_from_average": not counted}
    value = _in_float(site)
    pooled = site.emit(
        kind, x=value, kernel_sizes=kernel, strides=strides, pad_type="custom", pad=reached, **parameters
    )
    return pooled if value is site[0] else site.emit("cast", x=pooled, dtype=site.type().value)


def _in_float(site: Site) -> Any:
    """Return the first input; quantized numbers, which MIL does not pool, as float16, which holds them exactly."""
    return site[0] if site.type().is_float else site.emit("cast", x=site[0], dtype="fp16")


def _reached(site: Site, kernel: Sequence[int], strides: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Return the padding with what `ceil_mode` lets the last window reach beyond, so that it is said in one way."""
    found = list(padding)
    for axis, (before, after) in enumerate(zip(site.shape(0)[2:], site.result()[2:], strict=True)):
        needed = (after - 1) * strides[axis] + kernel[axis] - before - padding[2 * axis]
        found[2 * axis + 1] = max(needed, padding[2 * axis + 1])
    return found


def _global_pool(site: Site, kind: str) -> Any:
    value = _in_float(site)
    pooled = site.emit(kind, x=value, axes=list(range(2, len(site.shape(0)))), keep_dims=True)
    return pooled if value is site[0] else site.emit("cast", x=pooled, dtype=site.type().value)


RULES: Mapping[str, Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "AveragePool": functools.partial(_pool, kind="avg_pool"),
    "MaxPool": functools.partial(_pool, kind="max_pool"),
    "GlobalAveragePool": functools.partial(_global_pool, kind="reduce_mean"),
    "GlobalMaxPool": functools.partial(_global_pool, kind="reduce_max"),
}
