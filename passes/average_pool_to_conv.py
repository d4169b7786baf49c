"""Average pooling is a convolution of each channel with equal weights.

    y = AveragePool<kernel_shape = [k, k]>(x)    =>    y = Conv<group = channels>(x, 1 / k²)

In integers this is the faster form by far: ONNX Runtime's integer AveragePool takes forty times the time of its float
one, a convolution of each channel about as long as that. In float it is slower, so it belongs before `qdq` only.

Does not fire where the borders count less than the inside (padding without count_include_pad, ceil_mode), for dilated
pools, and where the number of channels is not known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["AveragePoolToConv"]


@dataclass(frozen=True)
class AveragePoolToConv(Pass):
    """Write AveragePool as a convolution of each channel."""

    name: ClassVar[str] = "average-pool-to-conv"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; `skipped` has every AveragePool that stays."""
        del context
        skipped: list[Skipped] = []
        count = 0
        for node in qgraph.ir.walk(model):
            if not qgraph.ir.is_op(node, "AveragePool"):
                continue
            reason = _obstacle(node)
            if reason is None:
                _rewrite(node, model.graph)
                count += 1
            else:
                skipped.append(Skipped(qgraph.ir.node_label(node), reason))
        notes = [f"{count} AveragePool as Conv"] if count else []
        return Report(changed=count, notes=notes, skipped=skipped)


def _channels(node: ir.Node) -> int | None:
    value = node.inputs[0]
    if value is None or value.shape is None or len(value.shape) < 3 or value.dtype != ir.DataType.FLOAT:
        return None
    channels = value.shape[1]
    return channels if isinstance(channels, int) else None


def _obstacle(node: ir.Node) -> str | None:
    if _channels(node) is None:
        return "its channels are not known, or it is not float32"
    if any(step != 1 for step in node.attributes.get_ints("dilations", [])):
        return "it is dilated"
    if node.attributes.get_int("ceil_mode", 0):
        return "it may reach beyond the border (ceil_mode)"
    padded = any(node.attributes.get_ints("pads", [])) or node.attributes.get_string("auto_pad", "NOTSET") not in (
        "NOTSET",
        "VALID",
    )
    if padded and not node.attributes.get_int("count_include_pad", 0):
        return "the border counts less than the inside (count_include_pad)"
    return None


def _rewrite(node: ir.Node, graph: ir.Graph) -> None:
    channels, kernel = _channels(node), node.attributes.get_ints("kernel_shape")
    assert channels is not None
    weight = np.full((channels, 1, *kernel), 1 / math.prod(kernel), np.float32)
    kept = ("auto_pad", "kernel_shape", "pads", "strides")
    new = ir.node("Conv", [node.inputs[0], qgraph.ir.initializer(graph, f"{node.outputs[0].name}_weight", weight)])
    new.name = node.name
    new.attributes.update({name: node.attributes[name] for name in kept if name in node.attributes})
    new.attributes["group"] = ir.AttrInt64("group", channels)
    qgraph.ir.replace_node(node, new)
