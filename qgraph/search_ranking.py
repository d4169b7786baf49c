"""Which nodes of a candidate hurt its outputs most."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

import qgraph.ir
from qgraph.errors import UserError
from qgraph.pipeline import Context, Samples
from qgraph.runtime.difference import difference

__all__ = ["worst_nodes"]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BEHIND = ("Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "Add")


def worst_nodes(context: Context, folder: Path, samples: Samples) -> list[str]:
    """Return the layers of a candidate, those first whose quantization costs most.

    Args:
        context: that the candidate was compressed with; its reference tells the nodes.
        folder: of its files.
        samples: to run it on.
    """
    reference = context.reference
    if reference is None:
        return []
    try:
        found = difference(reference, folder, samples, memory=context.calibration_memory, threads=context.threads)
    except UserError:
        return []
    nodes = {qgraph.ir.node_label(node): node for node in reference.graph}
    costs: dict[str, float] = {}
    for one in found.tensors:
        layer = _layer(nodes.get(one.node))
        if layer is None or one.exact or one.sqnr_db is None:
            continue
        noise = 10 ** (-one.sqnr_db / 10)
        before = 10 ** (-(one.sqnr_db + one.loss_db) / 10) if one.loss_db is not None else 0.0
        costs[layer] = max(costs.get(layer, 0.0), noise - before)
    return sorted(costs, key=lambda name: (-costs[name], name))


def _layer(node: ir.Node | None) -> str | None:
    """Return the layer with weights that makes what `node` puts out."""
    while node is not None and not qgraph.ir.is_op(node, *_LAYERS):
        value = node.inputs[0] if node.inputs else None
        node = value.producer() if value is not None and qgraph.ir.is_op(node, *_BEHIND) else None
    return None if node is None else qgraph.ir.node_label(node)
