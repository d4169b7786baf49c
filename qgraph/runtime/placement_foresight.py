"""What would run where on a device that is not here, as capability tables foresee it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_arithmetic import Arithmetic, arithmetic
from qgraph.analysis.kernel_constraints import type_name
from qgraph.analysis.provider_split import Split
from qgraph.capabilities import operator_name
from qgraph.runtime.placement import PlacedNode, Placement

__all__ = ["foreseen_placement"]


def foreseen_placement(split: Split, runtime: str, computes: Callable[[ir.Node], Arithmetic | None]) -> Placement:
    """Return the placement of a model as it is written: what the device fuses is known on the device alone.

    Args:
        split: of the model.
        runtime: what is asked, and that it is foreseen.
        computes: what a node computes in, or None where its operator and types say it.
    """
    reasons = {one.node: one.reason for one in split.left}

    def types(values: Iterable[ir.Value | None]) -> tuple[str, ...]:
        found = (None if value is None else split.values.dtype(value) for value in values)
        return tuple("" if dtype is None else type_name(ir.TensorType(dtype)) or "" for dtype in found)

    nodes = []
    for node, provider in split.providers.items():
        kernel, label = operator_name(node.domain, node.op_type), qgraph.ir.node_label(node)
        inputs, outputs = types(node.inputs), types(node.outputs)
        kind = computes(node) or arithmetic(kernel, (*inputs, *outputs))
        remark = reasons.get(label, "")
        nodes.append(PlacedNode(node.name or label, kernel, provider, kind, inputs, outputs, (label,), remark))
    return Placement(tuple(nodes), runtime, split.copies)
