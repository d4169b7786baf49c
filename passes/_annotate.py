"""Writing what shape inference found into a model."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes

__all__ = ["annotate"]


def annotate(model: ir.Model, shapes: Shapes) -> int:
    """Write what `shapes` found into the values of `model`; return the number of nodes with a changed output."""
    outputs = {value for graph in qgraph.ir.all_graphs(model) for value in graph.outputs}
    return sum([_annotate(node, shapes, outputs) for node in qgraph.ir.walk(model)])


def _annotate(node: ir.Node, shapes: Shapes, graph_outputs: set[ir.Value]) -> bool:
    changed = False
    for value in node.outputs:
        dtype, dims = shapes.dtype(value), shapes.dims(value)
        if dtype is not None and value.dtype != dtype and (value.type is None or isinstance(value.type, ir.TensorType)):
            value.type = ir.TensorType(dtype)
            changed = True
        if dims is None:
            continue
        found: list[int | str] = [dim if isinstance(dim, int) else str(dim) for dim in dims]
        declared = value.shape
        if declared is not None and len(declared) == len(found):
            found = list(_merged(value, found, declared, keeps_symbols=value in graph_outputs))
        if declared is None or [_plain(dim) for dim in declared] != found:
            value.shape = ir.Shape(found)
            changed = True
    return changed


def _plain(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _merged(value: ir.Value, found: list[int | str], declared: ir.Shape, *, keeps_symbols: bool) -> Iterator[int | str]:
    """Yield sizes: a number that was found, else what is declared where nothing is known or names must stay."""
    for axis, (size, dim) in enumerate(zip(found, declared, strict=True)):
        said = _plain(dim)
        unknown = size == f"{value.name}.{axis}"
        if isinstance(size, int) or not said or not (unknown or (keeps_symbols and isinstance(said, str))):
            yield size
        else:
            yield said
