"""What `qdq` and `full-qdq` ask the table of the runtime that they write for: has it the kernels of what they write?"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import onnx_ir as ir

from qgraph.analysis.integer_rules import CONSTANT_FORMS, Kind, kind_of
from qgraph.passes._kernels import fused_kernel, lacking

__all__ = ["TABLES", "Asked", "without_quantizers"]

TABLES = {"onnxruntime": "onnxruntime-cpu", "tensorrt": "tensorrt"}
"""Placement -> whose kernels these are."""
_WIDENED = {"int4": "int8"}
"""What `widen-weights` gives to kernels."""


def without_quantizers(dtype: ir.DataType, table: str, opset: int) -> str | None:
    """Return why a runtime cannot quantize float32 to a type, or have it back, in one line; None where it can."""
    back = lacking("DequantizeLinear", [dtype, ir.DataType.FLOAT, dtype], table, version=opset)
    return back or lacking("QuantizeLinear", [ir.DataType.FLOAT, ir.DataType.FLOAT, dtype], table, version=opset)


@dataclass(frozen=True)
class Asked:
    """A question to a table.

    Attributes:
        table: its name.
        activations: type of quantized activations, as tables call it.
        weights: likewise.
        opset: of the model.
    """

    table: str
    activations: str
    weights: str
    opset: int

    def against(self, node: ir.Node) -> str | None:
        """Return why a node must stay in float: the runtime lacks the kernels of its quantized form."""
        kind = kind_of(node)
        return None if kind is None else _against(self, node.op_type, kind)


@functools.lru_cache(maxsize=1024)
def _against(asked: Asked, op_type: str, kind: Kind) -> str | None:
    activations, weights = (ir.DataType[word.upper()] for word in (asked.activations, asked.weights))
    reason = without_quantizers(activations, asked.table, asked.opset)
    if kind in (Kind.CONVOLUTION, Kind.PRODUCT):
        reason = reason or _without_weights(weights, asked)
        form = f"{asked.activations} activations, {_WIDENED.get(asked.weights, asked.weights)} weight"
    else:
        form = f"{asked.activations} activations"
    if reason is not None or asked.table != TABLES["onnxruntime"]:
        return reason
    if kind in (Kind.MOVER, Kind.CLAMP, Kind.TABLE):
        if asked.activations.startswith("int"):
            return None  # they are moved as floats, of which the runtime makes integers
        moved = "Clip" if kind is Kind.CLAMP else op_type
        return lacking(moved, [activations], asked.table, version=asked.opset)
    written = CONSTANT_FORMS.get(op_type, (op_type,))[0]
    return fused_kernel(f"DequantizeLinear -> {written} -> QuantizeLinear", form, asked.table)


def _without_weights(dtype: ir.DataType, asked: Asked) -> str | None:
    return lacking("DequantizeLinear", [dtype, ir.DataType.FLOAT, dtype], asked.table, version=asked.opset)
