"""Sums that ONNX Runtime would fuse to something slower, written so that it leaves them alone.

    n = LayerNormalization(Add(r, Add(MatMul(x, W), b)))    =>    n = LayerNormalization(Sum(MatMul(x, W), b, r))
    y = Gelu(Add(MatMul(x, W), b))                          =>    y = Gelu(Sum(MatMul(x, W), b))

The same to the last bit, in one operator less. On a CPU the runtime's SkipLayerNormalization takes five times as long
as a sum and a LayerNormalization, and BiasGelu a quarter longer than a sum and a Gelu; it knows them by their Add.

A sum that is read elsewhere too, as in networks that normalize first, becomes one all the same. The inner sum is joined
only where nobody else reads it. It does not fire for sums that are quantized, which the runtime computes in integers,
and for sums of other types than float32, or not known to be of them: the
runtime fuses none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.pipeline import Context, Pass, Report

__all__ = ["KeepSums"]

_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class KeepSums(Pass):
    """Keep ONNX Runtime from fusing sums to operators that are slower on a CPU."""

    name: ClassVar[str] = "keep-sums"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Write Sum for every Add that a normalization or Gelu reads."""
        shapes = context.analyse(shapes_of, model)
        adds = [node for node in qgraph.ir.walk(model) if _is_fused(node) and _is_float(node, shapes)]
        for add in adds:
            _write_sum(add, shapes)
        return Report(len(adds), notes=[f"{len(adds)} sums kept from being fused"] if adds else [])


def _is_fused(node: ir.Node) -> bool:
    """Tell whether a node is an Add that the runtime would fuse with one that reads it."""
    if not qgraph.ir.is_op(node, "Add"):
        return False
    if any(qgraph.ir.is_op(use.node, "QuantizeLinear") for use in node.outputs[0].uses()):
        return False
    readers = [use.node for use in node.outputs[0].uses() if use.idx == 0]
    return any(qgraph.ir.is_op(reader, *_NORMS) for reader in readers) or (
        qgraph.ir.only_consumer(node.outputs[0]) is not None
        and qgraph.ir.is_op(readers[0] if readers else None, "Gelu")
    )


def _is_float(node: ir.Node, shapes: Shapes) -> bool:
    return shapes.dtype(node.outputs[0]) == ir.DataType.FLOAT


def _write_sum(add: ir.Node, shapes: Shapes) -> None:
    inner = _inner(add, shapes)
    if inner is None:
        qgraph.ir.replace_node(add, ir.node("Sum", add.inputs, name=add.name))
        return
    rest = add.inputs[1] if add.inputs[0] is inner.outputs[0] else add.inputs[0]
    qgraph.ir.replace_node(add, ir.node("Sum", [*inner.inputs, rest], name=add.name))
    qgraph.ir.discard(inner)


def _inner(add: ir.Node, shapes: Shapes) -> ir.Node | None:
    """Return a sum that only this one reads and that is as large, so that joining them saves a pass over memory."""
    for value in add.inputs:
        node = value.producer() if value is not None else None
        if value is None or node is None or node.graph is not add.graph or qgraph.ir.only_consumer(value) is not add:
            continue
        if qgraph.ir.is_op(node, "Add") and shapes.dims(value) == shapes.dims(add.outputs[0]) is not None:
            return node
    return None
