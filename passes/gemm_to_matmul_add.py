"""Gemm as the operators that later passes know.

    y = Gemm<transB=1, alpha, beta>(a, W, c)    =>    y = Add(MatMul(a, alpha * Wᵀ), beta * c)    W constant

A constant weight is transposed and scaled when the file is written; then one form of linear layer is left, whatever
the exporter wrote. Does not fire, with the reason in the report, for a transposed first factor, for a second factor
that is computed and transposed or scaled, and for a computed addend that is scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["GemmToMatmulAdd"]


@dataclass(frozen=True)
class GemmToMatmulAdd(Pass):
    """Split Gemm into MatMul and Add, with the transposition and the factors folded into the constants."""

    name: ClassVar[str] = "gemm-to-matmul-add"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Split; `skipped` has every Gemm that stays."""
        del context
        skipped: list[Skipped] = []
        count = 0
        for node in qgraph.ir.walk(model):
            if not qgraph.ir.is_op(node, "Gemm"):
                continue
            reason = _obstacle(node)
            if reason is None:
                _split(node, model.graph)
                count += 1
            else:
                skipped.append(Skipped(qgraph.ir.node_label(node), f"Gemm stays: {reason}"))
        notes = [f"{count} Gemm split into MatMul and Add"] if count else []
        return Report(changed=count, notes=notes, skipped=skipped)


def _factors(node: ir.Node) -> tuple[float, float, bool]:
    """Return alpha, beta and whether the second factor is transposed."""
    alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    return alpha, beta, node.attributes.get_int("transB", 0) != 0


def _addend(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer that no caller can override."""
    return value.const_value if value is not None and value.is_initializer() and not value.is_graph_input() else None


def _obstacle(node: ir.Node) -> str | None:
    alpha, beta, transposed = _factors(node)
    if node.attributes.get_int("transA", 0) != 0:
        return "its first factor is transposed"
    if node.inputs[0] is None or node.inputs[1] is None:
        return "a factor is missing"
    weight = _tensor(node.inputs[1])
    if (transposed or alpha != 1) and weight is None:
        return "its second factor is computed, and transposed or scaled"
    if weight is not None and alpha != 1 and not weight.dtype.is_floating_point():
        return "it scales integers"
    addend = _addend(node)
    if addend is not None and beta != 1 and _tensor(addend) is None:
        return "its addend is computed and scaled"
    return None


def _split(node: ir.Node, main: ir.Graph) -> None:
    alpha, beta, transposed = _factors(node)
    first, weight, addend = node.inputs[0], node.inputs[1], _addend(node)
    if transposed or alpha != 1:
        weight = _changed(weight, main, lambda array: _scaled(array.T if transposed else array, alpha), transposed)
    if addend is not None and beta != 1:
        addend = _changed(addend, main, lambda array: _scaled(array, beta), transposed=False)
    name, output = node.name or node.outputs[0].name, node.outputs[0]
    product = ir.node("MatMul", [first, weight], name=f"{name}_matmul" if addend is not None else node.name)
    if addend is None:
        qgraph.ir.replace_node(node, product)
        return
    product.outputs[0].name = qgraph.ir.fresh_name(main, f"{output.name}_product")
    product.outputs[0].type, product.outputs[0].shape = output.type, output.shape
    qgraph.ir.replace_node(node, [product, ir.node("Add", [product.outputs[0], addend], name=node.name)])


def _changed(
    value: ir.Value | None, main: ir.Graph, change: Callable[[np.ndarray], np.ndarray], transposed: bool
) -> ir.Value:
    """Return an initializer computed from another; the other goes if nobody else than one Gemm reads it."""
    tensor = _tensor(value)
    if value is None or tensor is None:
        raise ValueError("the value is not constant")
    shape = [int(dim) for dim in tensor.shape.numpy()]
    computed = qgraph.ir.lazy(
        lambda: change(np.asarray(tensor.numpy())), tensor.dtype, shape[::-1] if transposed else shape
    )
    return qgraph.ir.initializer(main, f"{value.name}_folded", computed)


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    return array if factor == 1 else np.asarray(array * np.float64(np.float32(factor))).astype(array.dtype)
