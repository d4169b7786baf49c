"""GatherND with constant indices as Gather, which every back end has.

GatherND(x[a,b,c], i[..., 2])    =>    Gather(Reshape(x, [a*b, c]), i0 * b + i1)
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

import qgraph.ir

__all__ = ["flatten_gathers"]


def flatten_gathers(model: ir.Model) -> None:
    """Rewrite every GatherND of a tensor of known shape at known places, in place; others stay."""
    for node in list(model.graph):
        if qgraph.ir.is_op(node, "GatherND") and not node.attributes.get_int("batch_dims", 0):
            _flatten(model.graph, node)


def _flatten(graph: ir.Graph, node: ir.Node) -> None:
    source, places = node.inputs[0], qgraph.ir.constant(node.inputs[1])
    if source is None or source.shape is None or not source.shape.is_static() or places is None:
        return
    sizes = source.shape.numpy()
    depth = places.shape[-1]
    looked_up, row = sizes[:depth], sizes[depth:]
    strides = [math.prod(looked_up[axis + 1 :]) for axis in range(depth)]
    wrapped = np.where(places < 0, places + np.asarray(looked_up), places)
    flat = (wrapped * np.asarray(strides, np.int64)).sum(axis=-1)
    name = qgraph.ir.node_label(node)
    target = qgraph.ir.initializer(graph, f"{name}/rows", np.asarray([math.prod(looked_up), *row], np.int64))
    rows = ir.node("Reshape", [source, target], name=qgraph.ir.fresh_name(graph, f"{name}/Reshape"))
    rows.outputs[0].name, rows.outputs[0].type = qgraph.ir.fresh_name(graph, f"{name}/Reshape_out"), source.type
    indices = qgraph.ir.initializer(graph, f"{name}/indices", np.asarray(flat, np.int64))
    gathered = ir.node("Gather", [rows.outputs[0], indices], {"axis": 0}, name=node.name)
    qgraph.ir.replace_node(node, [rows, gathered])
