"""Convolutions: by dot products of filters and patches, or directly where few filters share what they see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qgraph.codegen import c_text
from qgraph.codegen.c_fusion import input_of, producer_of
from qgraph.codegen.c_graph import IntegerGraph, refusal
from qgraph.codegen.c_kernel import Index, Kernel
from qgraph.codegen.c_products import ROW_TYPE, centred, minus, packed, rows_at_once, zero_point_of
from qgraph.codegen.c_rules import Access, Kind, Read, register
from qgraph.codegen.c_windows import Window, window_of

__all__: list[str] = []

_SHARED = 4
"""From this many filters on that see the same elements, these are laid side by side first."""


def _image_reads(graph: IntegerGraph, node: ir.Node) -> Sequence[Read]:
    if graph.constant(node.inputs[1]) is None:
        raise refusal(node, "its weight is computed")
    assert node.inputs[0] is not None
    return [(node.inputs[0], Access.MEMORY)]


@register(Kind.ROWS, "ConvInteger", reads=_image_reads)
def _convolution(kernel: Kernel, value: ir.Value, index: Index) -> str:
    del index
    node, graph = producer_of(value), kernel.graph
    weight = graph.constant(node.inputs[1])
    assert weight is not None
    weight = weight.astype(np.int32) - zero_point_of(graph, node, 3)
    groups = node.attributes.get_int("group", 1)
    window = window_of(graph, node, value, weight.shape[2:])
    spatial = list(
        range(len(graph.shape(kernel.fused.output)) - weight.ndim + 2, len(graph.shape(kernel.fused.output)))
    )
    if len(spatial) > 1 and kernel.alike(spatial):
        kernel.merge([*([axis] for axis in range(spatial[0])), spatial])
    if weight.shape[0] // groups >= _SHARED:
        _convolve_patches(kernel, value, weight, groups, window)
    else:
        _convolve_directly(kernel, value, weight, groups, window)
    return ""


def _place(kernel: Kernel, value: ir.Value, head: tuple[str, str], pixel: str, at: tuple[str, str]) -> Index:
    """Return the index of a pixel: its place counted along the rows where the kernel merges these, or `at`."""
    output = kernel.fused.output
    merged = len(kernel.shape(output)) < len(kernel.graph.shape(output))
    if merged or len(kernel.graph.shape(value)) == 3:
        return (*head, pixel)
    return (*head, *at)


def _row_and_column(window: Window, pixel: str) -> tuple[str, str]:
    rows, columns = window.output
    simple = c_text.grouped(pixel)
    row = "0" if rows == 1 else pixel if columns == 1 else f"{simple} / {columns}"
    return row, "0" if columns == 1 else pixel if rows == 1 else f"{simple} % {columns}"


def _convolve_patches(kernel: Kernel, value: ir.Value, weight: np.ndarray, groups: int, window: Window) -> None:
    filters, channels = weight.shape[0] // groups, weight.shape[1]
    length, pixels = int(weight[0].size), window.output[0] * window.output[1]
    count = rows_at_once(pixels, length)
    patches = kernel.buffer("patches", ROW_TYPE, count * length)
    weights, dot = packed(kernel, input_of(value, 1), weight)
    with (
        kernel.loops((kernel.graph.shape(value)[0], groups), "outer") as (image, group),
        kernel.steps("first", pixels, count) as (first, here),
    ):
        with kernel.block(f"for (int32_t p = 0; p < {here}; ++p)"):
            pixel = "p" if first == "0" else f"{first} + p"
            _fill_patch(kernel, value, (image, group, pixel), channels, window, f"{patches} + p * {length}")
        with kernel.block(f"for (int32_t f = 0; f < {filters}; ++f)"):
            channel = "f" if groups == 1 else kernel.local("channel", f"{group} * {filters} + f")
            with kernel.block(f"for (int32_t p = 0; p < {here}; ++p)"):
                call = f"{dot}({weights} + {channel} * {length}, {patches} + p * {length}, {length})"
                total = kernel.local("total", call)
                at = "0" if pixels == 1 else "p" if first == "0" else kernel.local("pixel", f"{first} + p")
                kernel.finish(_place(kernel, value, (image, channel), at, _row_and_column(window, at)), total)


def _fill_patch(kernel: Kernel, value: ir.Value, place: Index, channels: int, window: Window, target: str) -> None:
    """Copy what the window at a pixel covers of a group's channels."""
    source = input_of(value, 0)
    image, group, pixel = place
    zero_point = zero_point_of(kernel.graph, producer_of(value), 2)
    kernel.line(f"int16_t *patch = {target};")
    starts = _starts(kernel, window, _row_and_column(window, pixel))
    before = "" if group == "0" else f"{group} * {channels}"

    def copy(at: Index, element: str, condition: str) -> None:
        del at
        text = f"(int16_t)({minus(element, zero_point)})"
        kernel.line(f"*patch++ = {f'{condition} ? {text} : 0' if condition else text};")

    _go_through(kernel, source, image, (before, channels), window, starts, copy)


def _go_through(
    kernel: Kernel,
    source: ir.Value,
    image: str,
    channels: tuple[str, int],
    window: Window,
    starts: tuple[str, str],
    write: Callable[[Index, str, str], None],
) -> None:
    """Write loops over what a window covers: one without conditions for windows that lie in the image as a whole.

    Args:
        kernel: is being written.
        source: the images.
        image: which of them.
        channels: what to add the channel to, and how many there are.
        window: slides over them.
        starts: its first row and column.
        write: gets the place in the window (channel, row, column), the element, and the condition under which it is
            in the image ("" for always).
    """
    before, count = channels

    def loops(*, checked: bool) -> None:
        with kernel.loops((count, *window.kernel), "k") as (channel, down, right):
            places = ((starts[0], down), (starts[1], right))
            element, condition = _seen(kernel, source, (image, _sum(before, channel)), window, places)
            write((channel, down, right), element, condition if checked else "")

    whole = window.wholly_inside(starts)
    if not whole:
        loops(checked=False)
        return
    with kernel.block(f"if ({whole})"):
        loops(checked=False)
    with kernel.block("else"):
        loops(checked=True)


def _sum(*parts: str) -> str:
    return " + ".join(part for part in parts if part not in ("", "0")) or "0"


def _starts(kernel: Kernel, window: Window, at: tuple[str, str]) -> tuple[str, str]:
    """Write where the window of a pixel starts, and return the row and the column."""
    row, column = at
    # A signal has one row, which no window leaves.
    top = "0" if window.size[0] == window.output[0] == 1 else kernel.local("top", window.start(0, row))
    return top, kernel.local("left", window.start(1, column))


def _seen(
    kernel: Kernel, source: ir.Value, head: tuple[str, str], window: Window, places: Sequence[tuple[str, str]]
) -> tuple[str, str]:
    """Return an element that a window covers, and the condition under which it is in the image ("" for always)."""
    shape = kernel.graph.shape(source)
    at, conditions = [], []
    for axis, (start, step) in enumerate(places):
        moved = c_text.times(step, window.dilations[axis])
        place = _sum(start, moved)
        at.append(place)
        conditions.append(window.inside(axis, place))
    spatial = at if len(shape) == 4 else at[1:]
    element = f"{kernel.pointer(source)}[{c_text.offset((*head, *spatial), shape)}]"
    return element, " && ".join(part for part in conditions if part)


def _convolve_directly(kernel: Kernel, value: ir.Value, weight: np.ndarray, groups: int, window: Window) -> None:
    source, (batch, filters) = input_of(value, 0), kernel.graph.shape(value)[:2]
    channels, per_group = weight.shape[1], weight.shape[0] // groups
    zero_point = zero_point_of(kernel.graph, producer_of(value), 2)
    weights = kernel.constants.name(input_of(value, 1).name or "weight", weight)
    with (
        kernel.loops((batch, filters), "outer") as (image, channel),
        kernel.loops(window.output, "at") as (row, column),
    ):
        starts = _starts(kernel, window, (row, column))
        kernel.line("int32_t total = 0;")
        group = channel if per_group == 1 else f"{channel} / {per_group}"
        before = c_text.times(group, channels) if groups > 1 else ""

        def add(at: Index, element: str, condition: str, channel: str = channel) -> None:
            offset = c_text.offset((channel, *at), (filters, channels, *window.kernel))
            product = f"total += {centred(element, zero_point)} * {weights}[{offset}];"
            kernel.line(f"if ({condition}) {{ {product} }}" if condition else product)

        _go_through(kernel, source, image, (before, channels), window, starts, add)
        pixel = c_text.offset((row, column), window.output)
        kernel.finish(_place(kernel, value, (image, channel), pixel, (row, column)), "total")
