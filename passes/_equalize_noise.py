"""What quantization noise costs, of every layer and activation that `equalize` can scale, from calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.activations import Watch
from qgraph.analysis.channel_groups import ChannelGroups, Layer
from qgraph.analysis.channel_tracer import NONE, Source
from qgraph.analysis.reductions import Observation, Request
from qgraph.analysis.spatial_rules import clip_bounds
from qgraph.errors import UserError
from qgraph.numerics.equalization import Magnitudes, channel_sum
from qgraph.numerics.noise_balance import ActivationNoise, WeightNoise
from qgraph.pipeline import Context

__all__ = ["Seen", "magnitudes", "observe", "terms"]

_DRAWS = 32
"""Elements of each channel that are drawn from a feed."""
_ACTIVATION_LEVELS = 255
_LEAST_VARIANCE = 0.05
"""Of a channel's, as a share of the mean over its layer: a channel that hardly moves does not count for more."""
_ROUNDING = 1e-10
"""Of a value's mean square: a variance below it is what float32 leaves of a constant, whose square counts instead."""
_LEAST_PASSING = 1e-3
_BENDING = ("Clip", "LeakyRelu", "PRelu", "Relu")


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What calibration has shown of a value, float64 (channels,) each.

    Attributes:
        low: the least number.
        high: the largest.
        mean: of what was drawn.
        square: the mean square.
        passing: how often a Relu or Clip that alone reads the value lets it through.
        drawn: how many different numbers of each channel were drawn, of all samples.
    """

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    passing: np.ndarray
    drawn: int


class _Sums:
    """Adds up one value's observations, feed by feed."""

    def __init__(self, bounds: tuple[float, float]) -> None:
        self._bounds = bounds
        self._feeds = self._drawn = 0
        self._low = self._high = self._mean = self._square = self._passing = np.zeros(())

    def add(self, one: Observation) -> None:
        sample = one.sample
        first = self._feeds == 0
        self._feeds += 1
        self._drawn += np.unique(sample, axis=1).shape[1]  # of few places some are drawn twice
        self._low = one.low if first else np.minimum(self._low, one.low)
        self._high = one.high if first else np.maximum(self._high, one.high)
        self._mean = self._mean + sample.mean(axis=1, dtype=np.float64)
        self._square = self._square + np.square(sample, dtype=np.float64).mean(axis=1)
        self._passing = self._passing + ((sample > self._bounds[0]) & (sample < self._bounds[1])).mean(axis=1)

    def seen(self) -> Seen:
        count = self._feeds
        mean, square, passing = (total / count for total in (self._mean, self._square, self._passing))
        return Seen(self._low, self._high, mean, square, passing, self._drawn)


def observe(model: ir.Model, context: Context, axes: Mapping[ir.Value, int]) -> dict[ir.Value, Seen]:
    """Run the model on the calibration samples; values that cannot be watched are left out.

    Args:
        model: is not changed.
        context: with samples.
        axes: the axis of the channels of each value.
    """
    values = {value.name or "": value for value in axes}
    sums = {name: _Sums(_open_between(value)) for name, value in values.items()}
    watch = Watch(model, context, [Request(name, axes[value], _DRAWS) for name, value in values.items()])
    seen: dict[str, None] = {}
    for name, one in watch:
        sums[name].add(one)
        seen[name] = None
    return {values[name]: sums[name].seen() for name in seen if name not in watch.unavailable}


def magnitudes(groups: ChannelGroups) -> list[Magnitudes]:
    """Return |weight| of each layer, the largest of each kernel, and those of what normalizes channels.

    Raises:
        UserError: a weight holds NaN or infinity.
    """
    scales = [one for one in groups.vectors if one.node.op_type == "BatchNormalization" and one.index == 1]
    norms = [Magnitudes(np.abs(_array(one)), one.channels, np.array([NONE])) for one in scales]
    return [*map(_magnitudes, groups.layers), *norms]


def _magnitudes(layer: Layer) -> Magnitudes:
    weight = _weight(layer)
    made, read = _spread(layer.made, weight.ndim), _spread(layer.weight.channels, weight.ndim)
    return Magnitudes(np.abs(weight).max(axis=_kernel_axes(layer, weight), keepdims=True, initial=0.0), made, read)


def _weight(layer: Layer) -> np.ndarray:
    return _array(layer.weight)


def _array(source: Source) -> np.ndarray:
    """Read a constant: float64, finite."""
    array = qgraph.ir.constant(source.value)
    assert array is not None
    weight = np.asarray(array, np.float64)
    if not np.isfinite(weight).all():
        label = qgraph.ir.node_label(source.node)
        raise UserError(f"equalize: the weight of '{label}' holds NaN or infinity: mend the model")
    return weight


def _spread(ids: np.ndarray, rank: int) -> np.ndarray:
    return ids.reshape([1] * (rank - ids.ndim) + list(ids.shape))


def _kernel_axes(layer: Layer, weight: np.ndarray) -> tuple[int, ...]:
    inputs, outputs = _spread(layer.inputs, weight.ndim), _spread(layer.outputs, weight.ndim)
    return tuple(axis for axis in range(2, weight.ndim) if inputs.shape[axis] == outputs.shape[axis] == 1)


def _channel_ids(ids: np.ndarray | None, channels: int, axis: int) -> np.ndarray | None:
    """Return the class of each channel of a value, from ids that broadcast against it; None if there are none."""
    if ids is None or (ids < 0).all():
        return None
    if ids.size in (1, channels):
        return np.broadcast_to(ids.reshape(-1), (channels,))
    return ids.reshape(channels, -1)[:, 0] if axis == 1 and ids.size % channels == 0 else None


def terms(
    groups: ChannelGroups, seen: Mapping[ir.Value, Seen], *, levels: int, per_channel: bool
) -> list[WeightNoise | ActivationNoise]:
    """Return the noise of every layer and activation of which calibration has seen enough.

    An error of a channel costs its share of the variance of what the layers that read it make; it passes a Relu as
    often as that is open.

    Args:
        groups: of the model.
        seen: what the layers read and make.
        levels: of the weights' quantizer, on one side of zero.
        per_channel: each output channel has a scale of its own there.
    """
    known = [layer for layer in groups.layers if _ends(layer) <= seen.keys()]
    inverse = {layer: _inverse_variance(seen[_result(layer)]) for layer in known}
    costs = np.zeros(groups.count + 1)
    for layer in known:
        weight = _weight(layer)
        outputs = _spread(layer.outputs, weight.ndim)
        energy = (weight**2).sum(axis=_kernel_axes(layer, weight), keepdims=True) * inverse[layer][outputs]
        costs[:-1] += channel_sum(energy, _spread(layer.weight.channels, weight.ndim), groups.count)
    found: list[WeightNoise | ActivationNoise] = []
    for layer in known:
        one = _magnitudes(layer)
        size = _weight(layer).size / max(1, one.values.size)
        outputs, inputs = (_spread(ids, one.values.ndim) for ids in (layer.outputs, layer.inputs))
        passing = seen[_result(layer)].passing + _LEAST_PASSING
        cost = np.where(one.made < 0, inverse[layer][outputs], costs[one.made] * passing[outputs])
        square = seen[_read(layer)].square[inputs] * size
        made, read, cost, square = _aligned(one, outputs, inputs, cost, square)
        found.append(WeightNoise(one.values, made, read, cost, square, levels=levels, per_channel=per_channel))
    return found + _activations(groups, known, seen, costs)


def _ends(layer: Layer) -> set[ir.Value]:
    return {_read(layer), _result(layer)}


def _read(layer: Layer) -> ir.Value:
    value = layer.node.inputs[0]
    assert value is not None
    return value


def _result(layer: Layer) -> ir.Value:
    return layer.node.outputs[0]


def _aligned(
    one: Magnitudes, outputs: np.ndarray, inputs: np.ndarray, cost: np.ndarray, square: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Give ids and figures of one side the same shape."""
    made, cost = np.broadcast_arrays(one.made, cost, outputs)[:2]
    read, square = np.broadcast_arrays(one.read, square, inputs)[:2]
    return made, read, cost, square


def _inverse_variance(seen: Seen) -> np.ndarray:
    variance = np.maximum(seen.square - seen.mean**2, 0.0)
    mean, square = float(variance.mean()), float(seen.square.mean())
    least = _LEAST_VARIANCE * mean if mean > _ROUNDING * square else square
    return np.asarray(1.0 / (variance + (least or 1.0)) / len(variance))


def _bending(value: ir.Value) -> ir.Node | None:
    """Return the activation function that is all that reads a value."""
    reader = qgraph.ir.only_consumer(value)
    return reader if qgraph.ir.is_op(reader, *_BENDING) else None


def _open_between(value: ir.Value) -> tuple[float, float]:
    """Return the numbers between which the activation function after a value lets errors through."""
    node = _bending(value)
    if node is not None and node.op_type == "Clip":
        return clip_bounds(node) or (-np.inf, np.inf)
    return (0.0, np.inf) if node is not None and node.op_type == "Relu" else (-np.inf, np.inf)


def _activations(
    groups: ChannelGroups, layers: Sequence[Layer], seen: Mapping[ir.Value, Seen], costs: np.ndarray
) -> list[WeightNoise | ActivationNoise]:
    """Return the noise of what layers read, and of what they make where no activation function comes first."""
    axes = {_read(layer): layer.axis for layer in layers}
    axes |= {_result(layer): layer.axis for layer in layers if _bending(_result(layer)) is None}
    found: list[WeightNoise | ActivationNoise] = []
    for value, axis in axes.items():
        one = seen[value]
        ids = _channel_ids(groups.values.get(value), len(one.low), axis)
        if ids is not None:
            span = np.maximum(one.high, 0.0) - np.minimum(one.low, 0.0)
            cost = np.where(ids < 0, 0.0, costs[ids])
            found.append(ActivationNoise(span, ids, cost, levels=_ACTIVATION_LEVELS))
    return found
