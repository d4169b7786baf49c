"""float32 to bfloat16, but for what needs more than its 8 bits of precision.

    y = MatMul(x, W)                         =>    y = MatMul(x16, W16)            W16 rounded once, when written
    p = Softmax(s)                           =>    p16 = Cast(Softmax(Cast(s16)))
    y = x / Sqrt(ReduceMean(x * x) + eps)    =>    y16 = Cast(x32 / Sqrt(ReduceMean(x32 * x32) + eps)), x32 = Cast(x)
    y = LayerNormalization(x, g, b)          =>    y = LayerNormalization(x16, g16, b16)      float32 inside, by ONNX
    s = Where(mask, s, -3.4e38)              =>    s16 = Where(mask, s16, -3.39e38)
    x (input)                                =>    x16 = Cast(x)                   unless keep_io=false

bfloat16 reaches as far as float32, so nothing overflows, but for a mask's -3.4e38, which would be rounded to minus
infinity and is cut off at the least finite number. What stays in float32, each with its reason: sums, powers and what
normalizes with them, softmax and pooling by averages (LayerNormalization, RMSNormalization and GroupNormalization sum
in float32 by definition; an Attention is told to compute its softmax so); numbers made of integers, unless the samples
show that they stay below 256, up to which they are exact; angles computed from positions; with `keep_logits` what makes
the outputs, from the last product or sum of two activations on; operators that have no bfloat16 in the model's opset
(Conv has from 22 on); subgraphs, and what they read; what `exclude` names. Compressed weights keep their integers and
get bfloat16 scales.

ONNX Runtime's CPU provider has hardly any kernels for bfloat16; its CUDA provider and TensorRT have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from qgraph.passes._half import narrow
from qgraph.passes._half_safety import keep
from qgraph.passes._half_types import BFLOAT16, Kept, Ranges, is_float
from qgraph.pipeline import Context, Pass, Report

__all__ = ["ToBf16"]

_LAST = ("Conv", "Gemm", "MatMul", "MatMulNBits")


@dataclass(frozen=True)
class ToBf16(Pass):
    """Compute and store in bfloat16 what 8 bits of precision are enough for."""

    name: ClassVar[str] = "to-bf16"
    keep_io: bool = field(default=True, metadata={"help": "inputs and outputs of the model stay float32"})
    keep_logits: bool = field(default=False, metadata={"help": "what makes the outputs stays, from the last product"})
    measure: bool = field(default=True, metadata={"help": "look at the calibration samples, where there are some"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Convert; `skipped` has the nodes that stay in float32.

        Raises:
            UserError: the model's opset knows no bfloat16.
        """
        opsets = model.graph.opset_imports

        def decide(graph: ir.Graph, kept: Kept, ranges: Ranges) -> None:
            if self.keep_logits:
                _keep_logits(graph, kept)
            keep(graph, opsets, ranges, BFLOAT16, kept)

        return narrow(
            model, context, BFLOAT16, decide, keep_io=self.keep_io, measure=self.measure, exclude=self.exclude
        )


def _keep_logits(graph: ir.Graph, kept: Kept) -> None:
    """Keep what makes the outputs, back to the last product or to where two activations meet, and with that."""
    for output in graph.outputs:
        value: ir.Value | None = output
        while value is not None:
            node = value.producer()
            if node is None:
                break
            kept.add(node, f"it makes the output '{output.name}'")
            floats = [one for one in node.inputs if one is not None and is_float(one) and one.const_value is None]
            value = floats[0] if len(floats) == 1 and node.op_type not in _LAST else None
