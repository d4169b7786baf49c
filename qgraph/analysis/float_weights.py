"""Weights in float, for runs that only watch what a model computes.

    y = MatMul(x, DequantizeLinear(Wq, s, z))    =>    y = MatMul(x, W)    W = (Wq - z) s, computed once

A runtime dequantizes in every run, and whoever puts the tensors of such weights into a session computes them one by
one. A model that quantizes activations is left as it is: there the runtime takes the dequantizers into its integer
kernels, which round otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.quantized_tensors import dequantized
from qgraph.lazy_tensors import evaluated

__all__ = ["InFloat", "in_float"]

_QUANTIZES = ("DynamicQuantizeLinear", "QuantizeLinear")
_MOST_BITS = 8


class InFloat(NamedTuple):
    """A model to run in the place of another.

    Attributes:
        model: a copy, or the model itself where there was nothing to do.
        ranges: least and greatest element of the tensors that have become constants, where all is finite, by name.
    """

    model: ir.Model
    ranges: dict[str, tuple[float, float]]


def in_float(model: ir.Model, room: int) -> InFloat:
    """Return a copy of a model in which constants behind dequantizers of the main graph stand in float32.

    Args:
        model: is not changed.
        room: bytes; where the weights need more in float32, the model is left as it is.
    """
    found = [node for node in model.graph if _is_weight(node)]
    needed = sum(4 * _elements(node.inputs[0]) for node in found)
    if not found or needed > room or any(qgraph.ir.is_op(node, *_QUANTIZES) for node in qgraph.ir.walk(model)):
        return InFloat(model, {})
    copy = model.clone()
    ranges = {}
    for node, array in _arrays([node for node in copy.graph if _is_weight(node)]):
        weight = qgraph.ir.initializer(copy.graph, f"{node.outputs[0].name}_float", array)
        if np.isfinite(array).all():
            ranges[str(node.outputs[0].name)] = (float(array.min()), float(array.max()))
        qgraph.ir.replace_node(node, ir.node("Identity", [weight]))
    return InFloat(copy, ranges)


def _elements(value: ir.Value | None) -> int:
    return value.const_value.size if value is not None and value.const_value is not None else 0


def _is_weight(node: ir.Node) -> bool:
    """Tell whether a node dequantizes constant integers to float32, and its output is read by nodes only."""
    if not qgraph.ir.is_op(node, "DequantizeLinear") or node.outputs[0].is_graph_output():
        return False
    constants = [value for value in node.inputs if value is not None]
    if not all(value.const_value is not None and not value.is_graph_input() for value in constants):
        return False
    kind = constants[0].dtype
    return kind is not None and kind.is_integer() and kind.bitwidth <= _MOST_BITS and _is_float(constants[1])


def _is_float(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT


def _arrays(nodes: list[ir.Node]) -> Iterator[tuple[ir.Node, np.ndarray]]:
    """Yield what the nodes make: what is computed together for the inputs of one is computed once."""
    inputs = [[value for value in node.inputs if value is not None] for node in nodes]
    tensors = evaluated([one.const_value for values in inputs for one in values if one.const_value is not None])
    for node, values in zip(nodes, inputs, strict=True):
        for value in values:
            value.const_value = next(tensors)
        array = dequantized(node, values[0])
        assert array is not None
        if array.size:
            yield node, array
