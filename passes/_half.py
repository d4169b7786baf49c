"""Nodes, and the constants that they read, in 16 bits: what `to-fp16`, `to-bf16` and `autocast` share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.calibration import calibrate
from qgraph.analysis.float_weights import in_float
from qgraph.analysis.linear_layers import matches
from qgraph.analysis.shapes import Shapes
from qgraph.errors import UserError
from qgraph.passes._annotate import annotate
from qgraph.passes._half_rewriter import rewrite
from qgraph.passes._half_types import Half, Kept, Ranges, is_float
from qgraph.pipeline import Context, Report, Skipped

__all__ = ["Decide", "narrow"]

_PRODUCTS = ("Attention", "Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "GroupQueryAttention", "LSTM", "MatMul",
             "MatMulBnb4", "MatMulNBits", "MultiHeadAttention", "RNN")  # fmt: skip
"""A graph without one of these gains nothing."""
_WEIGHTS = 4
"""Compressed weights are spread out to floats in this part of the memory for calibration, if they fit."""
Decide = Callable[[ir.Graph, Kept, Ranges], None]
"""Adds the nodes that stay in float32, but for those that `exclude` names, which are there already."""


def narrow(
    model: ir.Model,
    context: Context,
    half: Half,
    decide: Decide,
    *,
    keep_io: bool,
    measure: bool,
    exclude: Sequence[str],
) -> Report:
    """Convert the main graph but for what `decide` keeps; `skipped` has the nodes that stay in float32.

    Args:
        model: is changed.
        context: calibration samples are measured, where there are some.
        half: the type.
        decide: what stays.
        keep_io: inputs and outputs of the model stay float32.
        measure: look at the samples, unless there is bfloat16 in the model already, for which a CPU has no kernels.
        exclude: patterns of names of nodes that stay.

    Raises:
        UserError: the model's opset knows nothing of the type.
    """
    graph = model.graph
    if not any(node.op_type in _PRODUCTS for node in graph):
        return Report()
    opset = graph.opset_imports.get("", 1)
    if opset < half.opset:
        raise UserError(f"{half.name} needs opset {half.opset}, and the model has {opset}: put convert-opset before it")
    annotate(model, Shapes(model).run())
    touching = [node for node in graph if any(is_float(value) for value in (*node.inputs, *node.outputs))]
    if not touching:
        return Report()
    kept = Kept()
    for node in touching:
        if matches(qgraph.ir.node_label(node), exclude):
            kept.add(node, "it is excluded")
    runs = not any(value.dtype == ir.DataType.BFLOAT16 for node in graph for value in node.outputs)
    decide(graph, kept, _measured(model, context) if measure and context.calibration is not None and runs else {})
    nodes = [node for node in touching if node not in kept.reasons]
    changed = rewrite(model, kept, nodes, half, keep_io=keep_io)
    skipped = [Skipped(qgraph.ir.node_label(node), kept.reasons[node]) for node in touching if node in kept.reasons]
    if not changed:
        return Report(skipped=skipped)
    notes = [f"{changed} nodes in {half.name}", *_left(skipped)]
    if kept.masks:
        notes.append(f"{len(kept.masks)} mask{'s' * (len(kept.masks) > 1)} cut off at {half.mask:.6g}")
    return Report(changed=changed, skipped=skipped, notes=notes)


def _measured(model: ir.Model, context: Context) -> Ranges:
    names = [value.name for node in model.graph for value in node.outputs if is_float(value) and value.name]
    plain = in_float(model, context.calibration_memory // _WEIGHTS)
    ranges = calibrate(plain.model, context, tuple(name for name in names if name not in plain.ranges))
    return {name: (float(one.low.min()), float(one.high.max())) for name, one in ranges.items()} | plain.ranges


def _left(skipped: Sequence[Skipped]) -> list[str]:
    if not skipped:
        return []
    reasons = Counter(_kind(one.reason) for one in skipped)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
    return [f"{len(skipped)} in float32 ({told})"]


def _kind(reason: str) -> str:
    kinds = {
        "sum": "with sums",
        "power": "with powers",
        "normalizes": "that normalize",
        "positions": "with angles",
        "integers": "with integers",
        "samples": "too large on the samples",
        "constant": "with constants out of range",
        "subgraphs": "with subgraphs",
        "excluded": "excluded",
        "what it reads": "behind those",
    }
    return next((kind for word, kind in kinds.items() if word in reason), "of other kinds")
