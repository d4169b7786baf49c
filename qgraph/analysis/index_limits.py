"""Which integers a model's inputs may hold: those that look up rows of a table must be below their number.

e = Gather(table [rows, width], Unsqueeze(ids))    =>    ids < rows
"""

from __future__ import annotations

import onnx_ir as ir

import qgraph.ir

__all__ = ["index_limits"]

_LOOKUPS = (("", "Gather"), ("com.microsoft", "GatherBlockQuantized"))
_MOVERS = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def index_limits(model: ir.Model) -> dict[str, int]:
    """Return input -> the rows of the smallest constant table that it looks up, for the inputs that look up one."""
    found = {}
    for value in model.graph.inputs:
        if value.name and (rows := _rows(value)):
            found[value.name] = min(rows)
    return found


def _rows(indices: ir.Value) -> list[int]:
    """Return the sizes of the axes that a value, handed on unchanged, picks from."""
    rows, queue, seen = [], [indices], set[ir.Node]()
    while queue:
        for use in queue.pop().uses():
            node = use.node
            if use.idx == 1 and (node.domain, node.op_type) in _LOOKUPS:
                size = _axis_size(node)
                rows += [size] if size else []
            elif use.idx == 0 and qgraph.ir.is_op(node, *_MOVERS) and node not in seen:
                seen.add(node)
                queue.append(node.outputs[0])
    return rows


def _axis_size(node: ir.Node) -> int:
    table = node.inputs[0]
    if table is None or table.shape is None or not len(table.shape):
        return 0
    size = table.shape[node.attributes.get_int("axis", node.attributes.get_int("gather_axis", 0))]
    return size if isinstance(size, int) and table.const_value is not None else 0
