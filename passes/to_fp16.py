"""float32 to float16, but for what would overflow.

    y = MatMul(x, W)                         =>    y = MatMul(x16, W16)            W16 rounded once, when written
    y = x / Sqrt(ReduceMean(x * x) + eps)    =>    y16 = Cast(x32 / Sqrt(ReduceMean(x32 * x32) + eps)), x32 = Cast(x)
    s = Where(mask, s, -3.4e38)              =>    s16 = Where(mask, s16, -16384)
    x (input)                                =>    x16 = Cast(x)                   unless keep_io=false

float16 ends at 65504 and holds whole numbers exactly up to 2048. What stays in float32, each with its reason: sums and
powers and what normalizes with them; angles computed from positions (rotary embeddings); nodes with constants beyond
65504 and what reads them, with single ones below 6e-5, or with arrays of numbers so small that they would be rounded
away; what came within half of 65504 on the calibration samples, where there are some; operators that have no float16;
subgraphs, and what they read; what `exclude` names. A mask's large negative constants become -16384. Casts stand where
float16 and float32 meet, one for each value. Compressed weights keep their integers and get float16 scales; those that
overflow, or vanish, are an error when they are computed, which names the node to exclude. What quantizes activations
stays in float32, unless `quantizers` says otherwise: a strongly typed network of TensorRT takes the type of a
dequantized tensor from its scale, and float8's own scales are held by float16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from qgraph.passes._half import narrow
from qgraph.passes._half_safety import keep
from qgraph.passes._half_types import FLOAT16, Kept, Ranges
from qgraph.pipeline import Context, Pass, Report

__all__ = ["ToFp16"]


@dataclass(frozen=True)
class ToFp16(Pass):
    """Compute and store in float16 what float16 can hold."""

    name: ClassVar[str] = "to-fp16"
    keep_io: bool = field(default=True, metadata={"help": "inputs and outputs of the model stay float32"})
    measure: bool = field(default=True, metadata={"help": "look at the calibration samples, where there are some"})
    quantizers: bool = field(
        default=False, metadata={"help": "what quantizes and dequantizes activations too, from opset 19 on"}
    )
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Convert; `skipped` has the nodes that stay in float32."""
        opsets = model.graph.opset_imports

        def decide(graph: ir.Graph, kept: Kept, ranges: Ranges) -> None:
            keep(graph, opsets, ranges, FLOAT16, kept, quantizers=self.quantizers)

        return narrow(model, context, FLOAT16, decide, keep_io=self.keep_io, measure=self.measure, exclude=self.exclude)
