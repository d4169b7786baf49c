"""Weights in float16 for kernels that compute in float32: half the file, the speed of float32.

    y = MatMul(x, W)    =>    y = MatMul(x, Cast(W16, to=float32))      and so for every reader of a large constant

ONNX Runtime computes the Cast of a constant once, while it loads the model, and then runs the same kernels on packed
float32 weights. On x86 that is as fast as float16 gets there: its CPU provider has next to no float16 kernels and puts
Casts around everything. Activations keep float32, so that nothing but a weight can overflow.

Left in float32, each with its reason: weights beyond 65504, and those that rounding would change by more than 1/256
(root mean square), because they are so small that float16 has few bits left. Constants of fewer than `min_elements`
elements are not worth an operator. A second run finds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.lazy_tensors import JointTensor
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["HalfWeights"]

_LARGEST = float(np.finfo(np.float16).max)
_MOST_LOST = 2.0**-8


@dataclass(frozen=True)
class HalfWeights(Pass):
    """Store float32 weights in float16, and widen them when the model is loaded."""

    name: ClassVar[str] = "half-weights"
    min_elements: int = field(default=1024, metadata={"help": "smaller constants stay as they are"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Store; `skipped` has the weights that float16 cannot hold."""
        skipped: list[Skipped] = []
        halved: list[ir.Value] = []
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or value.dtype != ir.DataType.FLOAT or tensor.size < self.min_elements:
                continue
            if value.is_graph_output() or value.is_graph_input() or not value.uses() or isinstance(tensor, JointTensor):
                continue
            reason = _unfit(tensor)
            if reason is not None:
                skipped.append(Skipped(value.name or "", reason))
            else:
                halved.append(value)
        if not halved:
            return Report(skipped=skipped)
        context.keep_reference(model)
        first = next(iter(model.graph))
        for value in halved:
            _store(model.graph, value, first)
        return Report(len(halved), skipped, [f"{len(halved)} weights in float16"])


def _unfit(tensor: ir.TensorProtocol) -> str | None:
    array = np.asarray(tensor.numpy())
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = array.astype(np.float16)
        lost = float(np.linalg.norm((narrow - array).astype(np.float64)))
    size = float(np.linalg.norm(array.astype(np.float64)))
    largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
    qgraph.ir.forget_pages()
    if largest > _LARGEST:
        return f"it reaches {largest:.3g}, and float16 ends at {_LARGEST:.0f}"
    if not np.isfinite(size):
        return "it holds NaN or infinity"
    return None if lost <= _MOST_LOST * size else f"it reaches only {largest:.2g}, where float16 has few bits left"


def _store(graph: ir.Graph, value: ir.Value, first: ir.Node) -> None:
    tensor, name = value.const_value, value.name or "weight"
    assert tensor is not None
    stored = qgraph.ir.lazy(
        lambda: np.asarray(tensor.numpy()).astype(np.float16), ir.DataType.FLOAT16, tensor.shape.numpy()
    )
    narrow = qgraph.ir.initializer(graph, f"{name}_float16", stored)
    cast = ir.node("Cast", [narrow], {"to": int(ir.DataType.FLOAT)}, name=qgraph.ir.fresh_name(graph, f"{name}_widen"))
    wide = cast.outputs[0]
    wide.name, wide.type, wide.shape = cast.name, value.type, value.shape
    value.replace_all_uses_with(wide)
    qgraph.ir.insert_before(first, cast)
    del graph.initializers[name]
