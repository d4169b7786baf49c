"""Which nodes of a candidate hurt its outputs most."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qgraph.analysis.quantization_sensitivity import tensor_sensitivities
from qgraph.errors import UserError
from qgraph.pipeline import Context, Samples

__all__ = ["worst_nodes"]


def worst_nodes(model: ir.Model, context: Context, samples: Samples, *, weights: bool) -> list[str]:
    """Return the nodes of a candidate whose rounding does something to the outputs, the worst first.

    Args:
        model: the compressed model, before it is lowered.
        context: that it was compressed with; its reference tells the nodes.
        samples: to run it on.
        weights: by what rounding their weights does, instead of their weights and inputs together.
    """
    if context.reference is None:
        return []
    try:
        found = tensor_sensitivities(context.reference, model, dataclasses.replace(context, calibration=samples))
    except UserError:
        return []
    nodes = [(one.weight_db if weights else one.output_db, one.node) for one in found.nodes()]
    return [name for figure, name in sorted((figure, name) for figure, name in nodes if figure is not None)]
