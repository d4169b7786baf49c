"""Some nodes at a higher precision than the others.

    Conv(x, W)    =>    Conv(x, W), noted: stays in float, because it is listed in mixed-precision

Nothing is quantized here: what shall stay in float, or have weights of 8 bits among weights of 4, is noted in the
metadata of the nodes, and the quantizers behind this pass (`adaround`, `gptq`, `rtn`, `qdq`) keep to it:

    mixed-precision{nodes=[/stem/*],to=float},qdq
    mixed-precision{nodes=[/head/*],to=int8},adaround{bits=4},qdq

It does not fire on nodes of operators that have no integer kernel and no weights: these run in float anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import is_constant, kind_of
from qgraph.analysis.linear_layers import matches
from qgraph.passes._weight_options import BITS, set_bits
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["FLOAT_KEY", "MixedPrecision"]

FLOAT_KEY = "qgraph.float"
"""Key in a node's metadata: why it stays in float."""
_WIDTHS = {"float": 16, "int8": 8}
_LISTED = "it is listed in mixed-precision"


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Keep listed nodes in float, or their weights at 8 bits."""

    name: ClassVar[str] = "mixed-precision"
    nodes: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes"})
    to: Literal["float", "int8"] = field(
        default="float", metadata={"help": "what these nodes shall be: in float, or with weights of 8 bits"}
    )

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Note what the nodes shall be; `skipped` has those that were named although it makes no difference."""
        del context
        changed, skipped = 0, []
        labels = []
        for node in qgraph.ir.walk(model):
            label = qgraph.ir.node_label(node)
            labels.append(label)
            if not matches(label, self.nodes):
                continue
            reason = _unfit(node, self.to)
            if reason is None:
                changed += mark(node, self.to, _LISTED)
            else:
                skipped.append(Skipped(label, reason))
        unknown = [pattern for pattern in self.nodes if not any(matches(label, (pattern,)) for label in labels)]
        notes = [f"nodes: no node is called '{pattern}'" for pattern in unknown]
        if changed:
            notes.insert(0, f"{changed} node{'s' * (changed > 1)} marked: {self.to}")
        return Report(changed=changed, skipped=skipped, notes=notes)


def mark(node: ir.Node, to: str, reason: str) -> bool:
    """Note what a node shall be, with the reason where that is float; tell whether that is new."""
    before = dict(node.metadata_props)
    if to == "float":
        node.metadata_props.setdefault(FLOAT_KEY, reason)
    if _has_weight(node):
        set_bits(node, max(_WIDTHS[to], int(before.get(BITS, "0"))))
    return before != node.metadata_props


def _unfit(node: ir.Node, to: str) -> str | None:
    """Return why a mark on a node would make no difference, or None."""
    if to == "int8":
        return None if _has_weight(node) else "it has no weight whose width could be chosen"
    return None if _has_weight(node) or kind_of(node) is not None else "it runs in float anyway"


def _has_weight(node: ir.Node) -> bool:
    """Tell whether a node reads a constant that weight quantizers may take: floats of two dimensions or more."""
    return any(
        value is not None
        and is_constant(value)
        and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        and value.shape is not None
        and len(value.shape) > 1
        for value in node.inputs
    )
