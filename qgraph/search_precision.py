"""Sets of nodes to keep in float, ever larger, from one look at what rounding does to the outputs.

Which nodes belong together, because one is fused with the other or gains nothing in integers without it, is what
`mixed-precision` knows; here it is asked for the sets for a row of goals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from qgraph import spec
from qgraph.errors import UserError
from qgraph.passes.mixed_precision import MixedPrecision
from qgraph.pipeline import Context, Pipeline

__all__ = ["float_sets", "wanted_sqnr"]

_LEAST, _MOST, _STEP = 6.0, 60.0, 3.0
"""Goals for the SQNR of the outputs, in dB."""
_MARGIN = 1.0
"""dB by which what is measured usually lies below what is predicted."""


def float_sets(model: ir.Model, context: Context, compress: Pipeline) -> list[tuple[float, list[str]]]:
    """Return pairs of a predicted SQNR and the nodes that have to stay in float for it, rising; each set once.

    Args:
        model: as it comes before the first quantizer; is not changed.
        context: that it was made with.
        compress: the whole compress part; how its `qdq` finds ranges, and what it leaves alone, counts.
    """
    static = next((one for one in compress if one.name == "qdq"), None)
    options: dict[str, spec.Value] = {"sqnr": _MOST}
    if static is not None:
        given = spec.to_spec(static).options
        options |= {name: given[name] for name in ("method", "exclude") if name in given}
    (search,) = Pipeline.from_specs([spec.Spec(MixedPrecision.name, options)])
    assert isinstance(search, MixedPrecision)
    goals = [_LEAST + _STEP * number for number in range(int((_MOST - _LEAST) / _STEP) + 1)]
    try:
        found = search.choices(model, context, goals)
    except UserError:
        return []
    sets: list[tuple[float, list[str]]] = []
    for goal, nodes in zip(goals, found, strict=True):
        if nodes and (not sets or len(nodes) > len(sets[-1][1])):
            sets.append((goal, nodes))
        elif sets and nodes == sets[-1][1]:
            sets[-1] = goal, nodes
    return sets


def wanted_sqnr(seen: Sequence[tuple[float, float]], bound: float) -> float:
    """Return the predicted SQNR in dB to begin with, for a loss within a bound.

    Losses fall exponentially with the SQNR, in dB, as far as two candidates tell; of fewer, twenty-fold in 20 dB.

    Args:
        seen: SQNR in dB and loss of candidates, rising.
        bound: on the loss.
    """
    usable = [(sqnr, math.log(loss)) for sqnr, loss in seen if loss > 0 and math.isfinite(sqnr)]
    if not usable or bound <= 0:
        return 0.0
    x2, y2 = usable[-1]
    slope = -math.log(20.0) / 20.0
    if len(usable) > 1 and usable[-2][0] < x2 and usable[-2][1] > y2:
        x1, y1 = usable[-2]
        slope = (y2 - y1) / (x2 - x1)
    return x2 + max(0.0, (math.log(bound) - y2) / slope) + _MARGIN
