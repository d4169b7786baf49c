"""What hurts the outputs of a candidate most, and how much of it to mend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.quantization_sensitivity import Sensitivities, tensor_sensitivities
from qgraph.errors import UserError
from qgraph.pipeline import Context, Samples
from qgraph.targets.base import Step

__all__ = [
    "between",
    "elements_of",
    "first_count",
    "harm",
    "is_far",
    "is_luck",
    "near_enough",
    "predicted",
    "relevant",
    "saves_little",
    "worst_nodes",
]

_NO_HARM = 0.05
"""Share of the noise at the outputs below which mending it is not tried."""
_ROUNDING_GAIN = 15.0
"""dB that all steps of a ladder bring weights of 4 bits, mostly: 12 on MobileNetV2, which has much to mend."""
_HEADROOM = 5.0
"""dB below what weights of 8 bits give that a bound on something other than the SQNR is taken to need."""
_LITTLE = 0.25
"""Share of all weights' elements; with fewer than these in 4 bits, other ways are tried as well."""
_TRIM = 16
"""Nodes at 8 bits among weights of 4 are trimmed to within this part of all weights' elements."""


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


def elements_of(model: ir.Model, found: Sensitivities | None) -> dict[str, int]:
    """Return node -> number of elements of its quantized weights.

    Args:
        model: the float model that the sensitivities are of.
        found: them.
    """
    elements: dict[str, int] = {}
    if found is None:
        return elements
    stored = {name: value for graph in qgraph.ir.all_graphs(model) for name, value in graph.initializers.items()}
    for one in found.tensors:
        value = stored.get(one.tensor)
        if one.kind == "weight" and value is not None and value.const_value is not None:
            for node in one.readers:
                elements[node] = elements.get(node, 0) + int(value.const_value.size)
    return elements


def worst_nodes(found: Sensitivities | None, to: str, elements: Mapping[str, int] | None = None) -> list[str]:
    """Return the nodes that a higher precision may help, the worst first.

    For `int8` that is by their weights alone, and by what each of their elements does, since 8 bits instead of 4 cost
    size and nothing else.

    Args:
        found: what their rounding does.
        to: the precision.
        elements: node -> elements of its weights; without it, or for a node that it lacks, all count alike.
    """
    nodes = [] if found is None else found.nodes()
    figures = [(one.weight_db if to == "int8" else one.output_db, one.node) for one in nodes]
    costs = elements if elements and to == "int8" else {}
    ranked = [
        (figure + 10 * math.log10(max(1, costs.get(name, 1))), name) for figure, name in figures if figure is not None
    ]
    return [name for _, name in sorted(ranked)]


def is_far(wanted: float | None, reached: float, with_8_bits: float) -> bool:
    """Tell whether weights of 4 bits are further from a bound than mending their rounding brings them.

    Args:
        wanted: SQNR in dB; None where the bound is on something else.
        reached: by rounding all weights to 4 bits, in dB.
        with_8_bits: by rounding all to 8, which meets the bound.
    """
    needed = with_8_bits - _HEADROOM if wanted is None else wanted
    return needed - reached > _ROUNDING_GAIN


def is_luck(bounds: Mapping[str, float], samples: int, reached: float, with_8_bits: float) -> bool:
    """Tell whether a bound on top1 may be met only because the samples are too few to tell so small a loss.

    Then the nearness to the source's outputs, which few samples do tell, has to be like that of 8 bits.

    Args:
        bounds: metric -> bound.
        samples: on which it is met.
        reached: SQNR in dB.
        with_8_bits: of weights of 8 bits, in dB.
    """
    return samples * bounds.get("top1", math.inf) < 1 and reached < with_8_bits - _HEADROOM


def between(nodes: Sequence[str], elements: Mapping[str, int], failing: int, holding: int) -> int:
    """Return the number of nodes, between two others, that parts the elements between them evenly.

    Args:
        nodes: the worst first.
        elements: node -> elements of its weights.
        failing: number of nodes that are too few.
        holding: number of nodes that suffice; more than one more.
    """
    sizes = [elements.get(name, 1) for name in nodes]
    half = sum(sizes[failing:holding]) / 2
    return min(range(failing + 1, holding), key=lambda count: abs(sum(sizes[failing:count]) - half))


def near_enough(nodes: Sequence[str], elements: Mapping[str, int], failing: int, holding: int) -> bool:
    """Tell whether trying a number of nodes between two others could make next to no difference in size."""
    sizes = [elements.get(name, 1) for name in nodes]
    return holding - failing <= 1 or _TRIM * sum(sizes[failing:holding]) <= sum(sizes)


def relevant(ladder: Sequence[Step], found: Sensitivities | None) -> list[Step]:
    """Return the steps that mend what does harm."""
    if found is None:
        return list(ladder)
    shares = {"weights": 0.0, "activations": 0.0}
    for one in found.tensors:
        shares["weights" if one.kind == "weight" else "activations"] += one.share
    return [step for step in ladder if not step.mends or shares[step.mends] >= _NO_HARM * sum(shares.values())]


def saves_little(nodes: Sequence[str], elements: Mapping[str, int], count: int) -> bool:
    """Tell whether few weights are left in 4 bits where the first `count` nodes have 8."""
    sizes = [elements.get(name, 1) for name in nodes]
    return sum(sizes[count:]) < _LITTLE * sum(sizes)


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
