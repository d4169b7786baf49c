"""Integer layers whose sums saturate on x86 processors without VNNI.

    DynamicQuantizeMatMul(x, W8)        MatMulIntegerToFloat(x8, W8, ...)        QLinearConv(x8, ..., W8, ...)
    Conv(DequantizeLinear(x8), DequantizeLinear(W8))                             and the like

ONNX Runtime's kernels for AVX2 and AVX-512 multiply unsigned activations with signed weights by vpmaddubsw
(`numerics.dot_products`), which adds two neighbouring products in 16 bits; which kernels do, of which types, is in its
table. Depthwise convolutions do not. Signed activations are no way out: the runtime makes unsigned ones of them where a
layer is quantized, and its kernels of int8 by int8, which are exact, take five to twenty times as long. What neighbours
what is the kernels' business, so any two weights of a layer count.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.byte_products import saturating_weights
from qgraph.capabilities import table
from qgraph.numerics.dot_products import LARGEST_PAIR, largest_pair
from qgraph.pipeline import Skipped

__all__ = ["saturating"]

_TABLE = "onnxruntime-cpu"
_WITHOUT_VNNI = ("avx2", "avx512")


def saturating(model: ir.Model, processors: Collection[str] = _WITHOUT_VNNI) -> list[Skipped]:
    """Return the integer layers of a lowered model with weights so large that a sum of two products may saturate.

    Args:
        model: is not changed.
        processors: on which; see `qgraph.capabilities.PROCESSORS`.
    """
    asked, found = table(_TABLE), []
    for node in qgraph.ir.walk(model):
        arrays = [qgraph.ir.constant(weight) for weight in saturating_weights(node, asked, processors)]
        reached = max((largest_pair(array) for array in arrays if array is not None), default=0)
        if reached > LARGEST_PAIR:
            reason = (
                f"two of its products may sum up to {reached}, and processors without VNNI saturate at {LARGEST_PAIR}: "
                "use weights of 7 bits (reduce_range=true), or --cpu vnni"
            )
            found.append(Skipped(qgraph.ir.node_label(node), reason))
    return found
