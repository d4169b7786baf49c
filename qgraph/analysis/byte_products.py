"""Which products of bytes a processor adds exactly, by a capability table: of kernels, and of layers that become some.

    QGemm(x8, s, z, W8, ...)                                     the table's entry of QGemm
    Conv(DequantizeLinear(x8), DequantizeLinear(W8))             that of DequantizeLinear -> Conv -> QuantizeLinear

The two differ: before it fuses such a layer, ONNX Runtime makes unsigned activations of signed ones. A layer of which
the table says nothing multiplies floats. Types that are not known may be any.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_constraints import type_name
from qgraph.capabilities import ByteProduct, Table, operator_name

__all__ = ["saturating_weights"]

_LAYERS = ("Conv", "Gemm", "MatMul")
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")


def saturating_weights(node: ir.Node, table: Table, processors: Collection[str]) -> list[ir.Value]:
    """Return the weights of a node whose products some of the processors cut to 16 bits, two by two.

    Args:
        node: of a lowered model.
        table: of the runtime.
        processors: some of `qgraph.capabilities.PROCESSORS`.
    """
    entries = [one for one in table.products if not set(one.saturates).isdisjoint(processors)]
    if qgraph.ir.is_op(node, *_LAYERS):
        data, weight = (_stored(value) for value in node.inputs[:2])
        if data is None or weight is None:
            return []
        pattern = f"DequantizeLinear -> {node.op_type} -> QuantizeLinear"
        cut = any(one.kernel == pattern and _fits(one, node, data, weight) for one in entries)
        return [weight] if cut else []
    name = operator_name(node.domain, node.op_type)
    found: dict[ir.Value, None] = {}
    for one in entries:
        weights = (
            [node.inputs[index] for index in one.weights if index < len(node.inputs)] if one.kernel == name else []
        )
        for weight in weights:
            if weight is not None and _fits(one, node, node.inputs[0], weight):
                found[weight] = None
    return list(found)


def _fits(one: ByteProduct, node: ir.Node, data: ir.Value | None, weight: ir.Value) -> bool:
    """Tell whether an entry is about these types; its other conditions are those of the form that a node has."""
    for value, allowed in ((data, one.activations), (weight, one.stored)):
        known = type_name(value.type) if value is not None else None
        if known is not None and known != allowed:
            return False
    return node.op_type not in _CONVOLUTIONS or ("depthwise" in one.when) == _is_depthwise(node, weight)


def _is_depthwise(node: ir.Node, weight: ir.Value) -> bool:
    """Tell whether every channel has one filter and nothing else to do with any other."""
    dims: Sequence[int | ir.SymbolicDim] = () if weight.shape is None else tuple(weight.shape)
    group = node.attributes.get_int("group", 1)
    return group > 1 and len(dims) > 1 and dims[0] == group and dims[1] == 1


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Return the integers behind a DequantizeLinear, looking through a Transpose; None where there are none."""
    node = value.producer() if value is not None else None
    if node is not None and qgraph.ir.is_op(node, "Transpose") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node.inputs[0] if node is not None and qgraph.ir.is_op(node, "DequantizeLinear") else None
