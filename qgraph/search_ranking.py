"""What hurts the outputs of a candidate most, and how much of it to mend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir as ir

from qgraph.analysis.quantization_sensitivity import Sensitivities, tensor_sensitivities
from qgraph.errors import UserError
from qgraph.pipeline import Context, Samples
from qgraph.targets.base import Step

__all__ = ["first_count", "harm", "predicted", "relevant", "worst_nodes"]

_NO_HARM = 0.05
"""Share of the noise at the outputs below which mending it is not tried."""


def harm(model: ir.Model, context: Context, samples: Samples) -> Sensitivities | None:
    """Return what the rounding of each tensor of a candidate does to the outputs; None where that cannot be told.

    Args:
        model: the compressed model, before it is lowered.
        context: that it was compressed with; its reference tells the nodes.
        samples: to run it on.
    """
    if context.reference is None:
        return None
    try:
        return tensor_sensitivities(context.reference, model, dataclasses.replace(context, calibration=samples))
    except UserError:
        return None


def worst_nodes(found: Sensitivities | None, to: str) -> list[str]:
    """Return the nodes that a higher precision may help, the worst first: by their weights alone for `int8`."""
    nodes = [] if found is None else found.nodes()
    figures = [(one.weight_db if to == "int8" else one.output_db, one.node) for one in nodes]
    return [name for figure, name in sorted((figure, name) for figure, name in figures if figure is not None)]


def relevant(ladder: Sequence[Step], found: Sensitivities | None) -> list[Step]:
    """Return the steps that mend what does harm."""
    if found is None:
        return list(ladder)
    shares = {"weights": 0.0, "activations": 0.0}
    for one in found.tensors:
        shares["weights" if one.kind == "weight" else "activations"] += one.share
    return [step for step in ladder if not step.mends or shares[step.mends] >= _NO_HARM * sum(shares.values())]


def predicted(found: Sensitivities, nodes: Sequence[str], to: str) -> float:
    """Return the SQNR of the outputs in dB if the tensors that these nodes read were exact."""
    chosen = set(nodes)
    without = [
        one.tensor
        for one in found.tensors
        if (to == "float" or one.kind == "weight") and one.readers and chosen.issuperset(one.readers)
    ]
    sqnr = found.predicted(without)
    return math.inf if sqnr is None else sqnr


def first_count(
    found: Sensitivities | None, nodes: Sequence[str], to: str, seen: Sequence[tuple[float, float]], bound: float
) -> int:
    """Return how many of the worst nodes are worth a first try: as many as are predicted to meet a bound.

    Losses fall exponentially with the SQNR, in dB, as far as two candidates tell; of fewer nothing is predicted.

    Args:
        found: what their rounding does.
        nodes: the worst first.
        to: the precision.
        seen: SQNR in dB and loss of the candidates so far; the last two that differ count.
        bound: on the loss, above zero.
    """
    usable = [(sqnr, math.log(loss)) for sqnr, loss in seen if loss > 0 and math.isfinite(sqnr)]
    if found is None or found.output_sqnr_db is None or len(usable) < 2 or bound <= 0:
        return 1
    (x1, y1), (x2, y2) = usable[-2:]
    if x2 <= x1 or y2 >= y1:
        return 1
    gain = (y2 - math.log(bound)) * (x2 - x1) / (y1 - y2)  # dB that are missing
    wanted = found.output_sqnr_db + gain
    low, high = 1, len(nodes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if predicted(found, nodes[:middle], to) >= wanted else (middle + 1, high)
    return max(1, low)
