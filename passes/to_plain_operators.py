"""Operators of few bits, of quantized tensors and of ONNX Runtime in plain ones, for runtimes that know no others.

    DequantizeLinear<block>(Wq, s, z)       =>    (Cast(unpack(bytes)) - z) * s       bytes hold 2 or 4 bits as before
    MatMulNBits(x, B, s, z, , b)            =>    MatMul(x, Transpose((Cast(unpack(B)) - z) * s)) + b
    GatherBlockQuantized(B, ids, s, z)      =>    (Cast(unpack(Gather(B, ids))) - Gather(z, ids)) * Gather(s, ids)
    QLinearConv(x, w, b), QLinearMatMul     =>    QuantizeLinear(Conv(DequantizeLinear(x), DequantizeLinear(w), b))
    ConvInteger(x, w)                       =>    Cast(Conv(Cast(x) - zx, Cast(w) - zw))
    DynamicQuantizeMatMul(x, W, s)          =>    Cast(MatMulInteger(DynamicQuantizeLinear(x), W)) * (sx * s)
    Attention, QAttention, MultiHeadAttention, GroupQueryAttention
                                            =>    MatMul(Softmax(MatMul(q, kᵀ) * scale + mask), v)
    RotaryEmbedding(x, cos, sin)            =>    Concat(x1 * cos - x2 * sin, x1 * sin + x2 * cos)
    MatMulBnb4(x, B, a)                     =>    MatMul(x, Transpose(Gather(levels, unpack(B)) * a))
    SkipLayerNormalization, FusedConv ...   =>    what they are fused of
    Slice(x, [0, 5], [2147483647, 9])       =>    Slice(x, [5], [9], axis 1)       only the axes that it cuts

The values stay what they are; where quantized tensors are computed in float, one in the middle between two integers can
go to the other. ConvInteger sums in float32, where that is not exact high and low halves of the data apart.

Left alone, with the reason in the report: caches whose size is not known, computed scales of packed weights, forms of
attention with sinks or norms, and operators that are not named above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qgraph.passes import (
    _plain_attention,
    _plain_fused,
    _plain_grouped,
    _plain_heads,
    _plain_low_bit,
    _plain_quantized,
    _plain_rotary,
    _plain_slices,
)
from qgraph.passes._plain_operators import rewrite
from qgraph.pipeline import Context, Pass, Report

__all__ = ["ToPlainOperators"]

_MICROSOFT = "com.microsoft"
_PARTS = (
    _plain_attention, _plain_fused, _plain_grouped, _plain_heads, _plain_low_bit, _plain_quantized, _plain_rotary,
    _plain_slices,
)  # fmt: skip


@dataclass(frozen=True)
class ToPlainOperators(Pass):
    """Write operators of few bits, of quantized tensors and of ONNX Runtime as plain ones."""

    name: ClassVar[str] = "to-plain-operators"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; `skipped` has every such node that stays."""
        del context
        own, foreign = {}, {}
        for part in _PARTS:
            own.update(part.STANDARD)
            foreign.update(part.MICROSOFT)
        reports = [
            rewrite(model, foreign, "written plainly", domain=_MICROSOFT),
            rewrite(model, own, "written plainly"),
        ]
        return Report(
            changed=sum(one.changed for one in reports),
            notes=[note for one in reports for note in one.notes],
            skipped=[skip for one in reports for skip in one.skipped],
        )
