"""Sparse weights stored as what is not zero, and unpacked by standard operators when the model is loaded.

    y = MatMul(x, W)    =>    bit = Reshape(Mod(BitShift(mask, 0..7), 2))                  mask: one bit an element
                              W = Gather(values, Reshape(bit * CumSum(bit), shape))        values: zero, then the rest
                              y = MatMul(x, W)                                             Gemm and Conv likewise

ONNX Runtime computes all of it once, while it loads the model (constant folding, on unless a session turns graph
optimizations off), then runs the same operators on the same floats, as fast as before. Loading takes 0.05 to 0.07 s
longer for a million weights on one core; without graph optimizations every run unpacks, thirty times slower. Of float32
it leaves 53 % where half of the weights are zero (2:4 too), 23 % at 80 %, 13 % at 90 %; of float16 56, 26 and 16 %.

ONNX's own sparse initializers are no alternative: their indices are 64 bits wide by the specification, so that half of
the weights zero makes a file half as large again, 80 % leaves 60 %, and few tools but ONNX Runtime read them.

It does not fire on weights that no pass has marked as sparse, that are computed, quantized (of 4 bits, mask and numbers
would still be 3), read inside subgraphs, or get no smaller, and where the table lacks a kernel of what unpacks them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.sparse_weights import mark_packed, pattern_of
from qgraph.numerics.sparse_packing import mask_and_values, packed_bytes
from qgraph.passes._kernels import TABLE_HELP, lacking
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["PackSparse"]

_NODES_BYTES = 1024
"""Of the operators that unpack one weight, about."""
_NEEDED_OPSET = 11
_MOST = 1 << 31
_BYTES, _WORDS = ir.DataType.UINT8, ir.DataType.INT32
_UNPACKING = (
    ("BitShift", (_BYTES, _BYTES)),
    ("Mod", (_BYTES, _BYTES)),
    ("Reshape", (_BYTES, ir.DataType.INT64)),
    ("Cast", (_BYTES,)),
    ("CumSum", (_WORDS, ir.DataType.INT64)),
    ("Mul", (_WORDS, _WORDS)),
    ("Reshape", (_WORDS, ir.DataType.INT64)),
)
"""What unpacks a weight before it is looked up, and the types that it reads."""
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class PackSparse(Pass):
    """Store sparse weights as a mask and the numbers that are not zero, where that is smaller."""

    name: ClassVar[str] = "pack-sparse"
    table: str = field(default="onnxruntime-cpu", metadata={"help": TABLE_HELP})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Pack; `figures` has the bytes before and after."""
        del context
        skipped: list[Skipped] = []
        weights: dict[ir.Value, ir.Node] = {}
        before, after = 0, 0
        for node in qgraph.ir.walk(model):
            value = node.inputs[1] if pattern_of(node) is not None and len(node.inputs) > 1 else None
            if value is None or value.const_value is None or value in weights:
                continue
            reason = _unfit(model, node, value) or self._without_kernels(model, value)
            if reason is None:
                weights[value] = node
            else:
                skipped.append(Skipped(qgraph.ir.node_label(node), reason))
        unpacking = _Unpacking(model.graph)
        for value in weights:
            array = np.asarray(qgraph.ir.constant(value))
            before, after = before + array.nbytes, after + packed_bytes(array)
            unpacking.put(value, array)
        if not weights:
            return Report(skipped=skipped)
        notes = [f"{len(weights)} sparse weights in {100 * after / before:.0f} % of their bytes, unpacked at load"]
        return Report(len(weights), skipped, notes, {"bytes_before": before, "bytes_after": after})

    def _without_kernels(self, model: ir.Model, value: ir.Value) -> str | None:
        """Return the first of the operators that unpack a weight of which the runtime has no kernel."""
        opset = model.graph.opset_imports.get("", 1)
        written = [*_UNPACKING, ("Gather", (value.dtype, ir.DataType.INT32))]
        reasons = (lacking(name, types, self.table, version=opset) for name, types in written)
        return next((reason for reason in reasons if reason is not None), None)


def _unfit(model: ir.Model, node: ir.Node, value: ir.Value) -> str | None:
    opset = model.graph.opset_imports.get("", 1)
    if opset < _NEEDED_OPSET:
        return f"unpacking needs opset {_NEEDED_OPSET}, and the model has {opset}: put convert-opset before"
    if node.graph is not model.graph or value.name not in model.graph.initializers:
        return "its weight is read inside a subgraph"
    if value.is_graph_input() or value.is_graph_output():
        return "its weight is an input or output of the model"
    if value.dtype not in _FLOATS:
        return f"its weight is {value.dtype}"
    array = np.asarray(qgraph.ir.constant(value))
    if array.size % 8 or array.size >= _MOST:
        return f"its {array.size} weights fill no whole bytes of a mask, or are too many"
    if packed_bytes(array) + _NODES_BYTES >= array.nbytes:
        return f"packing would not make it smaller: {100 * np.mean(array == 0):.0f} % of its weights are zero"
    return None


class _Unpacking:
    """Writes the operators that unpack weights; small constants are shared."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._shared: dict[str, ir.Value] = {}

    def put(self, weight: ir.Value, array: np.ndarray) -> None:
        """Let what is unpacked take the place of a weight."""
        name = weight.name or "weight"
        mask, values = mask_and_values(array)
        bytes_, numbers = (
            qgraph.ir.initializer(self._graph, f"{name}_{part}", data)
            for part, data in (("mask", mask), ("values", values))
        )
        dims = qgraph.ir.initializer(self._graph, f"{name}_shape", np.array(array.shape, np.int64))
        shifted = ir.node("BitShift", [bytes_, self._constant("bits", np.arange(8, dtype=np.uint8))],
                          {"direction": "RIGHT"})  # fmt: skip
        single = ir.node("Mod", [shifted.outputs[0], self._constant("two", np.array(2, np.uint8))])
        flat = ir.node("Reshape", [single.outputs[0], self._constant("flat", np.array([-1], np.int64))])
        bit = ir.node("Cast", [flat.outputs[0]], {"to": int(ir.DataType.INT32)})
        count = ir.node("CumSum", [bit.outputs[0], self._constant("axis", np.array(0, np.int64))])
        place = ir.node("Mul", [bit.outputs[0], count.outputs[0]])
        shaped = ir.node("Reshape", [place.outputs[0], dims])
        gather = ir.node("Gather", [numbers, shaped.outputs[0]])
        nodes = [shifted, single, flat, bit, count, place, shaped, gather]
        first = self._graph[0]
        for node in nodes:
            node.name = qgraph.ir.fresh_name(self._graph, f"{name}_unpack_{node.op_type}")
            node.outputs[0].name = qgraph.ir.fresh_name(self._graph, f"{name}_{node.op_type}")
        qgraph.ir.insert_before(first, *nodes)
        mark_packed(gather)
        unpacked = gather.outputs[0]
        unpacked.type, unpacked.shape = weight.type, weight.shape
        weight.replace_all_uses_with(unpacked)
        del self._graph.initializers[name]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self._shared:
            self._shared[name] = qgraph.ir.initializer(self._graph, f"unpack_{name}", array)
        return self._shared[name]
