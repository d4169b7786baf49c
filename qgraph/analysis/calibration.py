"""Ranges of the tensors inside a model, from running it on calibration samples.

ranges = context.analyse(calibrate, model, ("conv1_out", "relu1_out"), "mse", UINT8)
ranges["relu1_out"].high
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from qgraph.analysis.activations import Watch
from qgraph.analysis.reductions import Request
from qgraph.errors import UserError, nearest
from qgraph.numerics import observers
from qgraph.numerics.observers import Observer
from qgraph.numerics.schemes import UINT8, Scheme
from qgraph.pipeline import Context

__all__ = ["METHODS", "Calibration", "Range", "calibrate"]

METHODS: Mapping[str, type[Observer]] = {
    "minmax": observers.MinMax,
    "moving-average": observers.MovingAverage,
    "percentile": observers.Percentile,
    "entropy": observers.Entropy,
    "mse": observers.MeanSquaredError,
}
"""Observers by the names that options call them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Range:
    """The range of a tensor: float64, () or, per channel, (channels,)."""

    low: np.ndarray
    high: np.ndarray


class Calibration(Mapping[str, Range]):
    """Ranges by tensor name, and why the other tensors have none.

    Attributes:
        unavailable: tensor name -> reason, in words that continue "... is not calibrated because".
    """

    def __init__(self, ranges: Mapping[str, Range], unavailable: Mapping[str, str]) -> None:
        self._ranges = dict(ranges)
        self.unavailable = dict(unavailable)

    def __getitem__(self, tensor: str) -> Range:
        return self._ranges[tensor]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)


def calibrate(
    model: ir.Model,
    context: Context,
    tensors: tuple[str, ...],
    method: str = "minmax",
    scheme: Scheme = UINT8,
    per_channel: tuple[tuple[str, int], ...] = (),
) -> Calibration:
    """Run `model` on the calibration samples and return the range of each of `tensors`.

    Memory is bounded by `context.calibration_memory` for any number of samples (see `qgraph.analysis.activations`).

    Args:
        model: is not changed.
        context: its calibration samples, threads, memory bound and progress are used.
        tensors: names of values of the main graph: inputs, constants or outputs of nodes.
        method: one of `METHODS`.
        scheme: what the ranges are to be quantized with; its blocks do not matter. Some methods weigh its levels.
        per_channel: (tensor, axis) of those of `tensors` that get a range for each index along an axis.

    Returns:
        the ranges; tensors inside subgraphs, tensors that hold no real numbers, were empty in every sample, or hold
        NaN or infinity that does not reach the model's outputs are in `unavailable` instead.

    Raises:
        UserError: there are no samples, the model does not run on one, NaN or infinity reaches its outputs (the
            message names the node that made it first), or there is no such method.
        ValueError: the model has no such tensor.
    """
    if method not in METHODS:
        raise UserError(f"there is no calibration method '{method}'.{nearest(method, METHODS)} {_known()}")
    axes = dict(per_channel)
    found = {name: METHODS[method](axes.get(name)) for name in dict.fromkeys((*tensors, *axes))}
    watch = Watch(model, context, [Request(name, one.axis, one.sample) for name, one in found.items()])
    seen = set()
    for name, observation in watch:
        seen.add(name)
        found[name].add(observation.low, observation.high, observation.sample)
    ranges = {name: Range(*found[name].range(scheme)) for name in found if name in seen - set(watch.unavailable)}
    empty = {name: "it was empty in every sample" for name in found if name not in seen | set(watch.unavailable)}
    return Calibration(ranges, watch.unavailable | empty)


def _known() -> str:
    return f"There are: {', '.join(METHODS)}."
