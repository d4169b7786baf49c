"""How factors for channels go up through what images go through (see `qgraph.analysis.channel_rules`).

Conv, ConvTranspose     end: the output channels of W, and the bias
BatchNormalization      end: scale and bias
PRelu                   as Relu: its slope per channel is of the channel before and after
Clip                    as Relu where it clips at zero and nowhere else
MaxPool, AveragePool, GlobalMaxPool, GlobalAveragePool, Resize      on, alike for all places of a channel
ReduceMax, ReduceMean, ReduceMin, ReduceSum                         on
Pad                     on, with zeros or what is there already
Slice, Gather           on: elements that are picked by constants
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_tracer import (
    NONE,
    Found,
    Key,
    NoSourceError,
    Rule,
    Source,
    Tracer,
    at,
    constant_tensor,
    tie,
)

__all__ = ["SPATIAL_RULES", "clip_bounds", "weight_inputs", "weight_outputs"]


def convolved(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """Conv and ConvTranspose."""
    del tracer, value
    weight = _own_weight(node)
    rank, groups = len(weight), node.attributes.get_int("group", 1)
    outputs = weight[0] if node.op_type == "Conv" else weight[1] * groups
    channels, ties = per_channel(ids, rank, outputs)
    sources = [Source(node, 1, weight_outputs(node, channels, weight))]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        if constant_tensor(node.inputs[2]) is None:
            raise NoSourceError(f"the bias of {at(node)} is computed")
        sources.append(Source(node, 2, channels))
    return Found(tuple(sources), ties, linear=False)


def _own_weight(node: ir.Node) -> tuple[int, ...]:
    value = node.inputs[1]
    tensor = constant_tensor(value)
    if value is None or tensor is None:
        raise NoSourceError(f"{at(node)} has a weight that cannot be rewritten")
    if qgraph.ir.only_consumer(value) is None:
        raise NoSourceError(f"the weight of {at(node)} is used elsewhere too")
    return tuple(tensor.shape.numpy())


def weight_outputs(node: ir.Node, channels: np.ndarray, weight: tuple[int, ...]) -> np.ndarray:
    """Spread ids of output channels over a convolution's weight.

    Args:
        node: Conv, of weight [out, in / groups, ...], or ConvTranspose, of weight [in, out / groups, ...].
        channels: int, (out,).
        weight: its shape.

    Returns:
        int, broadcasts against the weight.
    """
    flat = [1] * (len(weight) - 2)
    if node.op_type == "Conv":
        return channels.reshape(-1, 1, *flat)
    return _by_group(channels, node, weight).reshape(-1, weight[1], *flat)


def weight_inputs(node: ir.Node, channels: np.ndarray, weight: tuple[int, ...]) -> np.ndarray:
    """Spread ids of input channels, int (in,), over a convolution's weight; see `weight_outputs`."""
    flat = [1] * (len(weight) - 2)
    if node.op_type == "ConvTranspose":
        return channels.reshape(-1, 1, *flat)
    return _by_group(channels, node, weight).reshape(-1, weight[1], *flat)


def _by_group(channels: np.ndarray, node: ir.Node, weight: tuple[int, ...]) -> np.ndarray:
    """Return the channels that each row of the weight meets: a row meets those of its own group alone."""
    groups = node.attributes.get_int("group", 1)
    return channels if groups == 1 else np.repeat(channels.reshape(groups, -1), weight[0] // groups, axis=0)


def per_channel(
    ids: np.ndarray, rank: int, channels: int
) -> tuple[np.ndarray, tuple[tuple[np.ndarray, np.ndarray], ...]]:
    """Return the id of each channel of images [batch, channels, ...], and the ties between its places."""
    if ids.ndim > rank:
        raise NoSourceError("its dimensions are not certain")
    ids = ids.reshape([1] * (rank - ids.ndim) + list(ids.shape))
    if ids.shape[0] != 1 or ids.shape[1] not in (1, channels):
        raise NoSourceError("what images go through is laid out another way")
    flat = np.broadcast_to(ids[0], (channels, *ids.shape[2:])).reshape(channels, -1)
    first, rest = flat[:, :1], flat[:, 1:]
    return flat[:, 0], (tie(np.broadcast_to(first, rest.shape), rest),) if rest.size else ()


def _normalized(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """BatchNormalization at inference, whose scale and bias take the factors."""
    if value is not node.outputs[0] or node.attributes.get_int("training_mode", 0) != 0:
        raise NoSourceError(f"{at(node)} normalizes with statistics of the batch")
    scale = constant_tensor(node.inputs[1])
    if scale is None or constant_tensor(node.inputs[2]) is None:
        raise NoSourceError(f"{at(node)} has no constant scale and bias")
    channels, ties = per_channel(ids, len(tracer.dims(value)), scale.size)
    return Found((Source(node, 1, channels), Source(node, 2, channels)), ties, linear=False)


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return the bounds of a Clip, infinite where there are none, or None where they are computed."""
    ends = [node.attributes.get_float("min", -math.inf), node.attributes.get_float("max", math.inf)]
    for index, value in enumerate(node.inputs[1:3]):
        if value is None:
            continue
        bound = qgraph.ir.constant(value)
        if bound is None or bound.size != 1:
            return None
        ends[index] = float(bound.reshape(()))
    return ends[0], ends[1]


def _clipped(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    bounds = clip_bounds(node)
    if bounds is None:
        raise NoSourceError(f"the bounds of {at(node)} are computed")
    largest = float(np.finfo(np.float32).max)
    if not all(bound == 0.0 or abs(bound) >= largest for bound in bounds):
        raise NoSourceError(f"{at(node)} clips at {bounds[0]:g} and {bounds[1]:g}, which every channel would move")
    return tracer.bent(node, value, ids)


def _pooled(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """All places of a channel are alike, so that they may be mixed."""
    if value is not node.outputs[0]:
        raise NoSourceError(f"it is a side output of {at(node)}")
    if node.op_type == "Resize":
        mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
        axes = node.attributes.get_ints("axes", ())
        if mode == "tf_crop_and_resize" or axes:
            raise NoSourceError(f"{at(node)} may fill in numbers, or lists its axes")
    source = node.inputs[0]
    dims = tracer.dims(source) if source is not None else ()
    if len(dims) < 3 or not isinstance(dims[1], int) or tracer.dims(value)[1] != dims[1]:
        raise NoSourceError(f"the channels of {at(node)} are not certain")
    channels, ties = per_channel(ids, len(dims), dims[1])
    up = tracer.up(source, channels.reshape(-1, *[1] * (len(dims) - 2)), [node])
    return Found(ties=ties) + dataclasses.replace(up, linear=False)


def _reduced(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """What is reduced over takes one factor."""
    del value
    source = node.inputs[0]
    rank = len(tracer.dims(source)) if source is not None else 0
    given = qgraph.ir.constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if len(node.inputs) > 1 and node.inputs[1] is not None and given is None:
        raise NoSourceError(f"the axes of {at(node)} are computed")
    listed = given.reshape(-1).tolist() if given is not None else list(node.attributes.get_ints("axes", ()))
    if node.attributes.get_int("noop_with_empty_axes", 0) and not listed:
        return tracer.up(source, ids, [node])  # it gives what it reads, whatever keepdims says
    axes = sorted(int(axis) % rank for axis in listed or range(rank))
    if node.attributes.get_int("keepdims", 1):
        ids = ids.reshape([1] * (rank - ids.ndim) + list(ids.shape))
    else:
        ids = np.expand_dims(ids.reshape([1] * (rank - len(axes) - ids.ndim) + list(ids.shape)), axes)
    return dataclasses.replace(tracer.up(source, ids, [node]), linear=False)


def _padded(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    rank = len(tracer.dims(value))
    given = qgraph.ir.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if given is None or given.size != 2 * rank:
        raise NoSourceError(f"{at(node)} pads by amounts that are computed, or lists its axes")
    if node.attributes.get_string("mode", "constant") == "constant":
        filled = node.inputs[2] if len(node.inputs) > 2 else None
        number = np.zeros(()) if filled is None else qgraph.ir.constant(filled)
        if number is None or number.any():
            raise NoSourceError(f"{at(node)} pads with another number than zero")
    ids = ids.reshape([1] * (rank - ids.ndim) + list(ids.shape))
    before, after = np.split(given.reshape(-1), 2)
    for axis in range(rank):
        size = ids.shape[axis]
        if size == 1 or not (before[axis] or after[axis]):
            continue
        if before[axis] < 0 or after[axis] < 0 or node.attributes.get_string("mode", "constant") != "constant":
            raise NoSourceError(f"{at(node)} pads channels with channels, or cuts them off")
        ids = np.take(ids, range(int(before[axis]), size - int(after[axis])), axis)
    return tracer.up(node.inputs[0], ids, [node])


def _sliced(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """A part; the rest stays as it is, as far as this reader goes."""
    del value
    source = node.inputs[0]
    dims = tracer.dims(source) if source is not None else ()
    given = [None if one is None else qgraph.ir.constant(one) for one in node.inputs[1:]]
    if len(given) < 2 or any(one is not None and given[index] is None for index, one in enumerate(node.inputs[1:])):
        raise NoSourceError(f"{at(node)} picks what is computed")
    arrays = [[] if one is None else [int(number) for number in one.reshape(-1)] for one in given]
    starts, ends = arrays[0], arrays[1]
    axes = arrays[2] if len(arrays) > 2 and arrays[2] else list(range(len(starts)))
    steps = arrays[3] if len(arrays) > 3 and arrays[3] else [1] * len(starts)
    ids = ids.reshape([1] * (len(dims) - ids.ndim) + list(ids.shape))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = dims[axis]
        if ids.shape[axis] == 1:
            continue
        if not isinstance(size, int):
            raise NoSourceError(f"{at(node)} picks from channels whose number is not known")
        ids = _spread(ids, axis % len(dims), np.arange(size)[start:end:step], size)
    return tracer.up(source, ids, [node])


def _gathered(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """A part that constant indices pick, each once."""
    source, indices = node.inputs[0], qgraph.ir.constant(node.inputs[1])
    dims = tracer.dims(source) if source is not None else ()
    rank = len(tracer.dims(value))
    axis = node.attributes.get_int("axis", 0) % max(1, len(dims))
    size = dims[axis] if dims else None
    if indices is None or indices.ndim > 1 or not isinstance(size, int):
        raise NoSourceError(f"{at(node)} picks what is computed")
    places = np.atleast_1d(indices) % size
    if len(set(places.tolist())) < places.size:
        raise NoSourceError(f"{at(node)} picks a channel twice")
    ids = ids.reshape([1] * (rank - ids.ndim) + list(ids.shape))
    if indices.ndim == 0:
        ids = np.expand_dims(ids, axis)
    shape = list(ids.shape)
    shape[axis] = places.size
    return tracer.up(source, _spread(np.broadcast_to(ids, shape), axis, places, size), [node])


def _spread(ids: np.ndarray, axis: int, places: np.ndarray, size: int) -> np.ndarray:
    """Put ids at `places` of an axis of `size`, and none elsewhere."""
    shape = list(ids.shape)
    if shape[axis] != places.size:
        raise NoSourceError("what is picked has another size than what is read")
    shape[axis] = size
    spread = np.full(shape, NONE)
    np.moveaxis(spread, axis, 0)[places] = np.moveaxis(ids, axis, 0)
    return spread


_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Resize")
_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")

SPATIAL_RULES: Mapping[Key, Rule] = {
    ("", "Conv"): convolved,
    ("", "ConvTranspose"): convolved,
    ("", "BatchNormalization"): _normalized,
    ("", "PRelu"): Tracer.bent,
    ("", "Clip"): _clipped,
    **{("", op): _pooled for op in _POOLS},
    **{("", op): _reduced for op in _REDUCTIONS},
    ("", "Pad"): _padded,
    ("", "Slice"): _sliced,
    ("", "Gather"): _gathered,
}
