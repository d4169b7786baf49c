"""Range and energy of tensors on the calibration samples, in one run over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qgraph.analysis.activations import Watch
from qgraph.analysis.calibration import METHODS
from qgraph.analysis.reductions import Request
from qgraph.numerics.schemes import Scheme
from qgraph.pipeline import Context

__all__ = ["Statistics", "statistics"]

_SAMPLE = 1024


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What was seen of a tensor.

    Attributes:
        low: the range to quantize it with, as the method has chosen it.
        high: see `low`.
        least: the least element of all.
        largest: the largest one.
        mean_square: of a sample of its elements.
    """

    low: float
    high: float
    least: float
    largest: float
    mean_square: float


def statistics(
    model: ir.Model, context: Context, tensors: tuple[str, ...], method: str, scheme: Scheme
) -> tuple[Mapping[str, Statistics], Mapping[str, str]]:
    """Run `model` on the calibration samples; see `qgraph.analysis.calibration.calibrate`, which it resembles.

    Returns:
        what was seen of each tensor, and of those that could not be watched, the reason.

    Raises:
        UserError: as `calibrate`.
    """
    observers = {name: METHODS[method]() for name in tensors}
    extremes: dict[str, tuple[float, float]] = {}
    energy = {name: [0.0, 0.0] for name in tensors}
    watch = Watch(model, context, [Request(name, None, max(one.sample, _SAMPLE)) for name, one in observers.items()])
    for name, seen in watch:
        low, high = extremes.get(name, (np.inf, -np.inf))
        extremes[name] = (min(low, float(seen.low)), max(high, float(seen.high)))
        observers[name].add(seen.low, seen.high, seen.sample)
        energy[name][0] += float(np.square(seen.sample, dtype=np.float64).sum())
        energy[name][1] += seen.sample.size
    found = {}
    for name in extremes:
        if name not in watch.unavailable:
            bounds = observers[name].range(scheme)
            square, count = energy[name]
            found[name] = Statistics(float(bounds[0]), float(bounds[1]), *extremes[name], square / max(count, 1.0))
    empty = {name: "it was empty in every sample" for name in tensors if name not in extremes}
    return found, empty | watch.unavailable
