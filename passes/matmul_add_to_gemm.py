"""A matrix product and what is added to it, as the one operator that does both.

    y = Add(MatMul(a, W), c)    a, W matrices; c fits the rows or the whole    =>    y = Gemm(a, W, c)

Does not fire when a factor is no matrix (Gemm takes two dimensions only) or its rank is not known, when the product
has another reader or is an output of the graph, and when c would enlarge the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["MatmulAddToGemm"]

_TYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class MatmulAddToGemm(Pass):
    """Join MatMul and Add of matrices to Gemm."""

    name: ClassVar[str] = "matmul-add-to-gemm"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Join; `skipped` has the products of matrices whose sum Gemm cannot do."""
        shapes = context.analyse(shapes_of, model)
        skipped: list[Skipped] = []
        found: list[tuple[ir.Node, int]] = []
        for node in qgraph.ir.walk(model):
            place = _product_input(node)
            if place is None:
                continue
            reason = _obstacle(node, place, shapes)
            if reason is None:
                found.append((node, place))
            else:
                skipped.append(Skipped(qgraph.ir.node_label(node), f"no Gemm: {reason}"))
        for node, place in found:  # not before: what a Gemm makes has no known shape for the product that reads it
            _join(node, place)
        notes = [f"{len(found)} MatMul and Add joined to Gemm"] if found else []
        return Report(changed=len(found), notes=notes, skipped=skipped)


def _product_input(node: ir.Node) -> int | None:
    """Return which input of an Add comes from a MatMul that only it reads."""
    if not qgraph.ir.is_op(node, "Add"):
        return None
    for place in (0, 1):
        value = node.inputs[place]
        product = value.producer() if value is not None else None
        inside = product is not None and product.graph is node.graph
        if inside and qgraph.ir.is_op(product, "MatMul") and value and qgraph.ir.only_consumer(value) is node:
            return place
    return None


def _obstacle(node: ir.Node, place: int, shapes: Shapes) -> str | None:
    product, addend = node.inputs[place], node.inputs[1 - place]
    matmul = product.producer() if product is not None else None
    if product is None or addend is None or matmul is None:
        return "an operand is missing"
    ranks = [len(shapes.dims(value) or ()) if value is not None else 0 for value in matmul.inputs]
    if ranks != [2, 2]:
        return "its factors are not both matrices"
    if shapes.dtype(product) not in _TYPES:
        return "Gemm is for floats here"
    dims, added = shapes.dims(product), shapes.dims(addend)
    if dims is None or added is None or len(added) > 2:
        return "the addend is not known to fit"
    fits = all(size in (1, whole) for size, whole in zip(added[::-1], dims[::-1], strict=False))
    return None if fits else "the addend is not known to fit"


def _join(node: ir.Node, place: int) -> None:
    product, addend = node.inputs[place], node.inputs[1 - place]
    matmul = product.producer() if product is not None else None
    if matmul is None:
        raise ValueError(f"{qgraph.ir.node_label(node)} adds to no product")
    gemm = ir.node("Gemm", [*matmul.inputs, addend], name=node.name)
    gemm.metadata_props.update(matmul.metadata_props)
    qgraph.ir.replace_node(node, gemm)
    qgraph.ir.discard(matmul)
