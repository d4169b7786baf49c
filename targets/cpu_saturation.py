"""Integer layers whose sums saturate on processors without VNNI.

    DynamicQuantizeMatMul(x, W8)        MatMulIntegerToFloat(x8, W8, ...)        QLinearConv(x8, ..., W8, ...)
    Conv(DequantizeLinear(x8), DequantizeLinear(W8))                             and the like

ONNX Runtime's kernels for AVX2 and AVX-512 multiply such layers by vpmaddubsw (`numerics.dot_products`), which adds two
neighbouring products in 16 bits. What neighbours what is the kernels' business, so any two weights of a layer count.
Signed activations are no way out: the kernels make bytes of them by adding 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.numerics.dot_products import LARGEST_PAIR, largest_pair
from qgraph.pipeline import Skipped

__all__ = ["saturating"]

_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "DynamicQuantizeLSTM": (1, 2),
    "DynamicQuantizeMatMul": (1,),
    "MatMulInteger": (1,),
    "MatMulIntegerToFloat": (1,),
    "ConvInteger": (1,),
    "QAttention": (1,),
    "QGemm": (3,),
    "QLinearConv": (3,),
    "QLinearMatMul": (3,),
}
"""Which inputs of an operator on integers are weights."""


def saturating(model: ir.Model) -> list[Skipped]:
    """Return the integer layers of a lowered model with weights so large that a sum of two products may saturate."""
    found = []
    for node in qgraph.ir.walk(model):
        reached = max((largest_pair(weights) for weights in _weights(node)), default=0)
        if reached > LARGEST_PAIR:
            reason = (
                f"two of its products may sum up to {reached}, and processors without VNNI saturate at {LARGEST_PAIR}: "
                "use weights of 7 bits (reduce_range=true), or --cpu vnni"
            )
            found.append(Skipped(qgraph.ir.node_label(node), reason))
    return found


def _weights(node: ir.Node) -> Iterator[np.ndarray]:
    if node.op_type in _WEIGHTS:
        values = [node.inputs[index] for index in _WEIGHTS[node.op_type] if index < len(node.inputs)]
    elif qgraph.ir.is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        data, weight = (_integers(value) for value in node.inputs[:2])
        values = [weight] if data is not None else []
    else:
        return
    for value in values:
        if value is not None and value.dtype == ir.DataType.INT8 and (array := qgraph.ir.constant(value)) is not None:
            yield array


def _integers(value: ir.Value | None) -> ir.Value | None:
    """Return the integers behind a DequantizeLinear, looking through a Transpose; None where there are none."""
    node = value.producer() if value is not None else None
    if node is not None and qgraph.ir.is_op(node, "Transpose") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node.inputs[0] if node is not None and qgraph.ir.is_op(node, "DequantizeLinear") else None
