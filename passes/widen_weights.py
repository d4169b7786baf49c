"""Weights of 4 bits for kernels that multiply 8: small in the file, fast when loaded.

    DequantizeLinear(x8) -> Conv(DequantizeLinear(W4, s))
    =>
    DequantizeLinear(x8) -> Conv(DequantizeLinear(Cast(W4, to=int8), s))              Gemm and MatMul likewise

The integer kernels of ONNX Runtime take 8-bit weights only: before a weight of 4 bits it computes in float. The Cast of
a constant is folded when the model is loaded, before the runtime looks for integers to multiply, so that the file keeps
4 bits and the kernel gets 8. A zero point of zeros is left out, and others are cast likewise.

Left alone are weights with a scale for every group of inputs, and those whose activations are not quantized: no integer
kernel takes them. Where the table of ONNX Runtime's CPU provider has no such Cast, the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.passes._kernels import lacking
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["WidenWeights"]

_TABLE = "onnxruntime-cpu"
"""Whose kernels these are."""
_WIDE = {
    ir.DataType.INT2: ir.DataType.INT8,
    ir.DataType.INT4: ir.DataType.INT8,
    ir.DataType.UINT2: ir.DataType.UINT8,
    ir.DataType.UINT4: ir.DataType.UINT8,
}


@dataclass(frozen=True)
class WidenWeights(Pass):
    """Let 8-bit kernels read weights that are stored in 4 bits."""

    name: ClassVar[str] = "widen-weights"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Put a Cast behind the integers of every narrow weight that an integer kernel could take."""
        del context
        opset = model.graph.opset_imports.get("", 0)
        narrow = [node for node in qgraph.ir.walk(model) if _is_narrow(node) and all(map(_reads_integers, _uses(node)))]
        refused = {dtype: reason for dtype in _WIDE if (reason := lacking("Cast", [dtype], _TABLE, version=opset))}
        without = [node for node in narrow if _type(node) in refused]
        skipped = [Skipped(qgraph.ir.node_label(node), refused[_type(node)]) for node in without]
        narrow = [node for node in narrow if node not in without]
        for node in narrow:
            for index in (0, 2):
                if index < len(node.inputs):
                    _widen(model, node, index)
        notes = [f"{len(narrow)} weights of 4 bits for kernels of 8"] if narrow else []
        return Report(len(narrow), skipped, notes)


def _is_narrow(node: ir.Node) -> bool:
    if not qgraph.ir.is_op(node, "DequantizeLinear") or node.attributes.get_int("block_size", 0) != 0:
        return False
    integers = node.inputs[0]
    return integers is not None and integers.is_initializer() and integers.dtype in _WIDE and bool(_uses(node))


def _type(node: ir.Node) -> ir.DataType:
    integers = node.inputs[0]
    assert integers is not None
    assert integers.dtype is not None
    return integers.dtype


def _uses(node: ir.Node) -> list[tuple[ir.Node, int]]:
    return [(use.node, use.idx) for use in node.outputs[0].uses()]


def _reads_integers(use: tuple[ir.Node, int]) -> bool:
    reader, index = use
    if not qgraph.ir.is_op(reader, "Conv", "Gemm", "MatMul") or index != 1:
        return False
    data = reader.inputs[0]
    return data is not None and qgraph.ir.is_op(data.producer(), "DequantizeLinear")


def _widen(model: ir.Model, node: ir.Node, index: int) -> None:
    narrow = node.inputs[index]
    if narrow is None or narrow.dtype is None:
        return
    if index and not np.any(qgraph.ir.constant(narrow)):
        node.replace_input_with(index, None)
        node.resize_inputs(index)
        return
    wide = _WIDE[narrow.dtype]
    cast = ir.node("Cast", [narrow], {"to": int(wide)}, name=qgraph.ir.fresh_name(model.graph, f"{narrow.name}_wide"))
    cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = cast.name, wide, narrow.shape
    qgraph.ir.insert_before(node, cast)
    node.replace_input_with(index, cast.outputs[0])
