"""Residual sums behind static integer products, written so that ONNX Runtime leaves them alone.

    n = LayerNormalization(Add(r, MatMul(x, DequantizeLinear(W8, s)) + b))
    =>
    n = LayerNormalization(Sub(r, MatMul(x, DequantizeLinear(-W8, s)) + -b))         Gemm likewise, with its own bias

The same to the last bit. Add and LayerNormalization ONNX Runtime fuses to SkipLayerNormalization, which takes several
times as long as the two on a CPU: a third of a sentence encoder's time. `dynamic-int8` does the same by itself.

It does not fire where the integers have a zero point or hold -128, whose negative there is not, where they are not
int8, where bias, weight or product are read by somebody else too, and in subgraphs. The products that are negative now
get new names, so that nobody compares them with what they were.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.lazy_tensors import JointTensor
from qgraph.pipeline import Context, Pass, Report

__all__ = ["SubtractResiduals"]

_LAZY_ABOVE = 1 << 20
"""Integers of more elements are negated when the file is written."""


@dataclasses.dataclass(frozen=True)
class SubtractResiduals(Pass):
    """Subtract the negative of an integer product where its addition would be fused to something slow."""

    name: ClassVar[str] = "subtract-residuals"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite one summand of every sum that a LayerNormalization reads, where there is one that can be negated."""
        del context
        changed = 0
        for add in list(model.graph):
            if not qgraph.ir.is_op(add, "Add") or not _is_normalized(add):
                continue
            for index in (1, 0):
                summand = _summand(add, index)
                if summand is not None:
                    summand.negate(model.graph)
                    qgraph.ir.replace_node(
                        add, ir.node("Sub", [add.inputs[1 - index], add.inputs[index]], name=add.name)
                    )
                    changed += 1
                    break
        return Report(changed=changed)


@dataclasses.dataclass(frozen=True)
class _Summand:
    """A product of integers whose sign can be changed.

    Attributes:
        product: MatMul or Gemm.
        constants: the initializers to negate, each with the node and the place that reads it.
        made: what becomes negative, from the product to the sum.
    """

    product: ir.Node
    constants: tuple[tuple[ir.Node, int], ...]
    made: tuple[ir.Value, ...]

    def negate(self, graph: ir.Graph) -> None:
        for node, index in self.constants:
            old = node.inputs[index]
            assert old is not None
            assert old.const_value is not None
            node.replace_input_with(
                index, qgraph.ir.initializer(graph, f"{old.name}_negative", _negative(old.const_value))
            )
            del graph.initializers[old.name or ""]
        for value in self.made:
            value.name = qgraph.ir.fresh_name(graph, f"{value.name}_negative")
            value.metadata_props.clear()


def _negative(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.size <= _LAZY_ABOVE:
        return ir.tensor(np.negative(tensor.numpy()))
    return qgraph.ir.lazy(lambda: np.negative(tensor.numpy()), tensor.dtype, tensor.shape.numpy())


def _is_normalized(add: ir.Node) -> bool:
    return any(qgraph.ir.is_op(use.node, "LayerNormalization") and use.idx == 0 for use in add.outputs[0].uses())


def _summand(add: ir.Node, index: int) -> _Summand | None:
    """Return an input of a sum as a product that can be negated, through the Add of a bias, or None."""
    value = add.inputs[index]
    if value is None or qgraph.ir.only_consumer(value) is not add:
        return None
    node = value.producer()
    constants: list[tuple[ir.Node, int]] = []
    made = [value]
    if node is not None and qgraph.ir.is_op(node, "Add"):
        place = next((i for i in (0, 1) if _is_own(node.inputs[i], ir.DataType.FLOAT)), None)
        inner = node.inputs[1 - place] if place is not None else None
        if place is None or inner is None or qgraph.ir.only_consumer(inner) is not node:
            return None
        constants.append((node, place))
        made.append(inner)
        node = inner.producer()
    if node is None or not qgraph.ir.is_op(node, "MatMul", "Gemm"):
        return None
    weight = _integers(node.inputs[1], ir.DataType.INT8)
    if weight is None:
        return None
    constants.append((weight, 0))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _integers(node.inputs[2], ir.DataType.INT32)
        if bias is None:
            return None
        constants.append((bias, 0))
    return _Summand(node, tuple(constants), tuple(made))


def _integers(value: ir.Value | None, dtype: ir.DataType) -> ir.Node | None:
    """Return the DequantizeLinear without zero point that makes `value` of integers with negatives, or None."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    node = value.producer()
    if node is None or not qgraph.ir.is_op(node, "DequantizeLinear") or not _is_own(node.inputs[0], dtype):
        return None
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None:
        array = qgraph.ir.constant(zero_point)
        if array is None or array.any():
            return None
    tensor = node.inputs[0].const_value if node.inputs[0] is not None else None
    if tensor is None or isinstance(tensor, JointTensor):
        return None  # computed with its scale: the writer wants the two together
    array = np.asarray(tensor.numpy())
    return node if array.size and array.min() > np.iinfo(array.dtype).min else None


def _is_own(value: ir.Value | None, dtype: ir.DataType) -> bool:
    """Tell whether a value is an initializer of `dtype` with a single reader."""
    if value is None or value.const_value is None or value.producer() is not None:
        return False
    return value.dtype == dtype and not value.is_graph_input() and qgraph.ir.only_consumer(value) is not None
