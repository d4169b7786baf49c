"""Range and least element of tensors on the calibration samples, in one run over them."""

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


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What was seen of a tensor.

    Attributes:
        low: the range to quantize it with, as the method has chosen it.
        high: see `low`.
        least: the least element of all.
    """

    low: float
    high: float
    least: float


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
    least: dict[str, float] = {}
    watch = Watch(model, context, [Request(name, None, one.sample) for name, one in observers.items()])
    for name, seen in watch:
        least[name] = min(least.get(name, np.inf), float(seen.low))
        observers[name].add(seen.low, seen.high, seen.sample)
    found = {}
    for name in least:
        if name not in watch.unavailable:
            bounds = observers[name].range(scheme)
            found[name] = Statistics(float(bounds[0]), float(bounds[1]), least[name])
    empty = {name: "it was empty in every sample" for name in tensors if name not in least}
    return found, empty | watch.unavailable
