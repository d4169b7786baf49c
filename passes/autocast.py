"""Half precision by classes of operators, as torch.autocast does.

    y = Softmax(MatMul(x, W) + b)    =>    y = Softmax(Cast(MatMul(x16, W16) + b16))

    half      what computes (products, convolutions, attention): 16 bits
    float32   what sums, normalizes, or raises to a power (softmax, norms, Exp, Log, Pow, the reductions ...)
    others    follow the widest of what they read: 16 bits if all of that is, else float32; what reads nothing but
              constants (DequantizeLinear of a weight) follows those who read it

A node whose operator is in `half` stays in float32 all the same, with its reason, when float16 cannot hold one of its
constants, when what it makes or reads was larger than `largest` on the calibration samples, where there are some, when
its operator has no such type in the model's opset, when it has subgraphs, or when `exclude` names it. Weights that
nobody reads in float32 are stored in 16 bits; a Cast stands wherever the two types meet, one for each value. A second
run changes nothing.

This is the cautious one: `to-fp16` and `to-bf16` convert all but what they know to be harmed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx.defs
import onnx_ir as ir

import qgraph.ir
from qgraph.errors import nearest
from qgraph.passes._half import narrow
from qgraph.passes._half_safety import keep_constants, keep_measured
from qgraph.passes._half_types import BFLOAT16, FLOAT16, Kept, Ranges, is_float, undefined
from qgraph.pipeline import Context, Pass, Report

__all__ = ["Autocast"]

_HALF = ("Attention", "Conv", "ConvTranspose", "Einsum", "FusedMatMul", "GRU", "Gemm", "GroupQueryAttention", "LSTM",
         "MatMul", "MatMulBnb4", "MatMulNBits", "MultiHeadAttention", "RNN")  # fmt: skip
_FLOAT32 = ("Acos", "Asin", "BatchNormalization", "BiasSoftmax", "Cos", "Cosh", "CumSum", "Exp", "GroupNormalization",
            "InstanceNormalization", "LRN", "LayerNormalization", "Log", "LogSoftmax", "LpNormalization",
            "MeanVarianceNormalization", "Pow", "RMSNormalization", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
            "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare",
            "SimplifiedLayerNormalization", "Sin", "Sinh", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
            "Softmax", "Softplus", "Sqrt", "Tan")  # fmt: skip
"""What torch.autocast runs in float32, by its ONNX names."""
_MARGIN = 2.0


@dataclass(frozen=True)
class Autocast(Pass):
    """Compute the listed operators in float16 or bfloat16, and what sums or normalizes in float32."""

    name: ClassVar[str] = "autocast"
    dtype: Literal["float16", "bfloat16"] = field(default="float16", metadata={"help": "the type of 16 bits"})
    half: tuple[str, ...] = field(default=_HALF, metadata={"help": "operators that compute in 16 bits"})
    largest: float | None = field(
        default=None,
        metadata={"help": "what is larger on the samples stays float32; none: half of what the type holds"},
    )
    keep_io: bool = field(default=True, metadata={"help": "inputs and outputs of the model stay float32"})
    measure: bool = field(default=True, metadata={"help": "look at the calibration samples, where there are some"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def __post_init__(self) -> None:
        if self.largest is not None and self.largest <= 0.0:
            raise ValueError(f"largest is {self.largest}: give a positive number, or none")
        for op_type in self.half:
            if op_type not in _HALF and not onnx.defs.has(op_type):
                raise ValueError(f"there is no operator {op_type}.{nearest(op_type, _HALF)}")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Convert; `skipped` has the nodes that stay in float32.

        Raises:
            UserError: the model's opset knows nothing of the type.
        """
        half = FLOAT16 if self.dtype == "float16" else BFLOAT16
        opsets = model.graph.opset_imports

        def decide(graph: ir.Graph, kept: Kept, ranges: Ranges) -> None:
            limit = half.largest / _MARGIN if self.largest is None else self.largest
            why = f"{half.name} ends at {half.largest:.6g}" if self.largest is None else f"'largest' is {limit:g}"
            for node in graph:
                reason = undefined(node, opsets, half) or keep_constants(node, half, kept) or self._listed(node)
                if reason is not None:
                    kept.add(node, reason)
            keep_measured(graph, ranges, kept, limit, why)
            _follow(graph, kept, self.half)

        return narrow(model, context, half, decide, keep_io=self.keep_io, measure=self.measure, exclude=self.exclude)

    def _listed(self, node: ir.Node) -> str | None:
        if node.op_type in self.half:
            return None
        if qgraph.ir.is_op(node, "Cast") and not is_float(node.inputs[0]) and is_float(node.outputs[0]):
            return "it makes numbers of integers, which is left to float32"
        if node.op_type in _FLOAT32:
            return f"{node.op_type} sums, normalizes or raises to a power, which is left to float32"
        return None


def _follow(graph: ir.Graph, kept: Kept, half: Collection[str]) -> None:
    """Keep the nodes of no class that read float32, or that read constants only and are read in float32."""
    narrowed: set[ir.Value] = set()
    neutral: dict[ir.Value, ir.Node] = {}
    for node in graph:
        if node in kept.reasons or not any(is_float(value) for value in (*node.inputs, *node.outputs)):
            continue
        floats = [value for value in node.inputs if value is not None and is_float(value) and value.const_value is None]
        if node.op_type in half or (
            any(value in narrowed for value in floats)
            and all(value in narrowed or value in neutral for value in floats)
        ):
            narrowed.update(node.outputs)
        elif all(value in neutral for value in floats):
            neutral.update((value, node) for value in node.outputs)
        else:
            kept.add(node, "what it reads is float32, and it is not among 'half'")
    for value, node in reversed(neutral.items()):
        if value.is_graph_output() or any(use.node in kept.reasons for use in value.uses()):
            kept.add(node, "who reads it computes in float32")
