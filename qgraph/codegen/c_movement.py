"""Operators that move elements: an element of the output is one of the input, elsewhere, or a constant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.codegen import c_text
from qgraph.codegen.c_fusion import input_of, producer_of
from qgraph.codegen.c_graph import IntegerGraph, refusal
from qgraph.codegen.c_kernel import Index, Kernel, broadcast_index
from qgraph.codegen.c_rules import Access, Kind, Read, first, once, register
from qgraph.numerics.resize import COORDINATES, nearest_indices

__all__ = ["axis_map"]

_MANY = first(Access.MANY)


def axis_map(kernel: Kernel, sources: np.ndarray, index: str, name: str) -> str:
    """Return which element of an axis of the input lies at `index` of an axis of the output.

    Args:
        kernel: is being written.
        sources: int (size of the output's axis,), the index in the input for each.
        index: an expression.
        name: of the table that is written where no formula is found.
    """
    places = np.arange(sources.size)
    if sources.size == 1 or (sources == sources[0]).all():
        return str(int(sources[0]))
    step = int(sources[1] - sources[0])
    if (sources == sources[0] + step * places).all():
        scaled = c_text.times(index, abs(step))
        return c_text.plus(scaled, int(sources[0])) if step > 0 else f"{int(sources[0])} - {c_text.grouped(scaled)}"
    simple = c_text.grouped(index)
    repeats = int((sources == 0).argmin())
    if repeats > 1 and (sources == places // repeats).all():
        return f"{simple} / {repeats}"
    period = int(sources.max()) + 1
    if (sources == places % period).all():
        return f"{simple} % {period}"
    return f"{kernel.constants.name(name, sources)}[{index}]"


def _mapped(kernel: Kernel, value: ir.Value, index: Index, axis: int, sources: np.ndarray) -> Index:
    mapped = axis_map(kernel, sources, index[axis], f"{value.name}_axis_{axis}")
    return (*index[:axis], mapped, *index[axis + 1 :])


@register(Kind.VIEW, "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze", reads=first(Access.MEMORY))
def _view(kernel: Kernel, value: ir.Value, index: Index) -> str:
    raise AssertionError(f"{kernel.name}: a view has no text ({value.name}{index})")


@register(Kind.MOVE, "Transpose", reads=once)
def _transpose(kernel: Kernel, value: ir.Value, index: Index) -> str:
    rank = len(index)
    order = list(producer_of(value).attributes.get_ints("perm", range(rank)[::-1]))
    return kernel.element(input_of(value), tuple(index[order.index(axis)] for axis in range(rank)))


@register(Kind.MOVE, "Expand", reads=_MANY)
def _expand(kernel: Kernel, value: ir.Value, index: Index) -> str:
    return kernel.element(input_of(value), broadcast_index(kernel, input_of(value), index))


@register(Kind.MOVE, "Tile", reads=_MANY)
def _tile(kernel: Kernel, value: ir.Value, index: Index) -> str:
    shape = kernel.graph.shape(value)
    for axis, size in enumerate(kernel.graph.shape(input_of(value))):
        index = _mapped(kernel, value, index, axis, np.arange(shape[axis]) % size)
    return kernel.element(input_of(value), index)


@register(Kind.MOVE, "Slice", reads=once)
def _slice(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node, graph = producer_of(value), kernel.graph
    shape = graph.shape(input_of(value))
    starts, ends = graph.integers(node, 1), graph.integers(node, 2)
    axes = graph.integers(node, 3, list(range(len(starts))))
    steps = graph.integers(node, 4, [1] * len(starts))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis]
        # Python's own rules for ends, but that what still lies before the start after counting from the end is none.
        stop = None if step < 0 and end < -size else end
        index = _mapped(kernel, value, index, axis % len(shape), np.arange(size)[start:stop:step])
    return kernel.element(input_of(value), index)


@register(Kind.MOVE, "Split", reads=once)
def _split(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node, graph = producer_of(value), kernel.graph
    axis = node.attributes.get_int("axis", 0) % len(index)
    before = sum(graph.shape(other)[axis] for other in node.outputs[: node.outputs.index(value)])
    return kernel.element(input_of(value), (*index[:axis], c_text.plus(index[axis], before), *index[axis + 1 :]))


@register(Kind.MOVE, "Pad", reads=once)
def _pad(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node, graph = producer_of(value), kernel.graph
    shape, mode = graph.shape(input_of(value)), node.attributes.get_string("mode", "constant")
    pads = graph.integers(node, 1)
    axes = graph.integers(node, 3, list(range(len(shape))))
    inside = []
    for position, axis in enumerate(axes):
        before, after = pads[position], pads[position + len(axes)]
        axis, size = axis % len(shape), shape[axis]
        if mode != "constant":
            kept = np.arange(size)[max(-before, 0) : size - max(-after, 0)]
            index = _mapped(kernel, value, index, axis, _padded(kept, max(before, 0), max(after, 0), mode))
            continue
        moved = c_text.plus(index[axis], -before)
        inside += [f"{moved} >= 0"] * (before > 0) + [f"{moved} < {size}"] * (after > 0)
        index = (*index[:axis], moved, *index[axis + 1 :])
    if not inside:
        return kernel.element(input_of(value), index)
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    other = "0" if filler is None else kernel.element(filler, ("0",) * len(graph.shape(filler)))
    return _guarded(kernel, value, " && ".join(inside), index, other)


def _padded(kept: np.ndarray, before: int, after: int, mode: str) -> np.ndarray:
    """Return indices with more of them at both ends, as the modes "edge", "reflect" and "wrap" of Pad say."""
    places, last = np.arange(-before, kept.size + after), kept.size - 1
    if mode == "wrap":
        return np.asarray(kept[places % kept.size])
    if mode == "reflect" and last > 0:
        places = last - np.abs(last - places % (2 * last))
    return np.asarray(kept[np.clip(places, 0, last)])


def _guarded(kernel: Kernel, value: ir.Value, condition: str, index: Index, other: str) -> str:
    """Return an element of the input where a condition holds, and something else elsewhere."""
    name = kernel.fresh()
    kernel.line(f"{c_text.temporary_type(kernel.graph.dtype(value))} {name} = {other};")
    with kernel.block(f"if ({condition})"):
        kernel.line(f"{name} = {kernel.element(input_of(value), index)};")
    return name


@register(Kind.MOVE, "Trilu", reads=once)
def _trilu(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node = producer_of(value)
    (diagonal,) = kernel.graph.integers(node, 1, [0])
    sign = ">=" if node.attributes.get_int("upper", 1) else "<="
    return _guarded(kernel, value, f"{index[-1]} {sign} {c_text.plus(index[-2], diagonal)}", index, "0")


@register(Kind.MOVE, "Resize", reads=_MANY)
def _resize(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node, graph = producer_of(value), kernel.graph
    before, after = graph.shape(input_of(value)), graph.shape(value)
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if node.attributes.get_string("mode", "nearest") != "nearest" or coordinates not in COORDINATES:
        raise refusal(
            node, f"of resizing, only mode 'nearest' with coordinates of {', '.join(COORDINATES)} moves integers"
        )
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise refusal(node, "a policy for the aspect ratio leaves its scales open; give them, and no sizes")
    nearest = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    scales = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    for position, axis in enumerate(node.attributes.get_ints("axes", range(len(before)))):
        axis %= len(before)
        given = after[axis] / before[axis] if scales is None or not scales.size else float(scales[position])
        sources = nearest_indices(before[axis], after[axis], given, coordinates, nearest)
        index = _mapped(kernel, value, index, axis, sources)
    return kernel.element(input_of(value), index)


@register(Kind.MOVE, "DepthToSpace", reads=once)
def _depth_to_space(kernel: Kernel, value: ir.Value, index: Index) -> str:
    node = producer_of(value)
    block, channels = node.attributes.get_int("blocksize"), kernel.graph.shape(value)[1]
    image, channel, row, column = index[0], *map(c_text.grouped, index[1:])
    inner = c_text.offset((f"{row} % {block}", f"{column} % {block}"), (block, block))
    if node.attributes.get_string("mode", "DCR") == "DCR":
        source = f"({inner}) * {channels} + {channel}"
    else:
        source = f"{channel} * {block * block} + {inner}"
    return kernel.element(input_of(value), (image, source, f"{row} / {block}", f"{column} / {block}"))


@register(Kind.MOVE, "SpaceToDepth", reads=once)
def _space_to_depth(kernel: Kernel, value: ir.Value, index: Index) -> str:
    block, channels = producer_of(value).attributes.get_int("blocksize"), kernel.graph.shape(input_of(value))[1]
    image, channel, row, column = index[0], *map(c_text.grouped, index[1:])
    at_row = f"{row} * {block} + {channel} / {channels * block}"
    at_column = f"{column} * {block} + {channel} / {channels} % {block}"
    return kernel.element(input_of(value), (image, f"{channel} % {channels}", at_row, at_column))


def _nothing(graph: IntegerGraph, node: ir.Node) -> Sequence[Read]:
    del graph, node
    return []


@register(Kind.MOVE, "ConstantOfShape", reads=_nothing)
def _filled(kernel: Kernel, value: ir.Value, index: Index) -> str:
    del index
    attribute = producer_of(value).attributes.get("value")
    number = 0 if attribute is None else attribute.as_tensor().numpy().item()
    return c_text.literal(number, kernel.graph.dtype(value))
