"""Compressed weights written out, for runtimes that read none."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.coreml.weights import constant_weight
from qgraph.pipeline import Pipeline

__all__ = ["without_compression"]


def without_compression(model: ir.Model) -> ir.Model:
    """Return a copy of a model with float weights, computed when they are read, in the place of DequantizeLinear.

    Args:
        model: is not changed; must live as long as the copy.
    """
    plain = model.clone()
    for node, copy in zip(list(qgraph.ir.walk(model)), list(qgraph.ir.walk(plain)), strict=True):
        stored = node.inputs[0] if qgraph.ir.is_op(node, "DequantizeLinear") else None
        output, scale = copy.outputs[0], node.inputs[1] if stored is not None else None
        if stored is None or stored.const_value is None or scale is None or scale.dtype is None:
            continue
        tensor = qgraph.ir.lazy(functools.partial(_expanded, node), scale.dtype, stored.const_value.shape.numpy())
        output.replace_all_uses_with(qgraph.ir.initializer(plain.graph, f"{output.name}_expanded", tensor))
        qgraph.ir.discard(copy)
    Pipeline.parse("remove-unused").run(plain)
    return plain


def _expanded(node: ir.Node) -> np.ndarray:
    weight = constant_weight(node)
    assert weight is not None
    return weight.expanded()
