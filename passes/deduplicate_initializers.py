"""Equal weights are stored once.

    initializers a, b with the same type, shape and bytes    =>    initializer a, read where b was

Compared are bytes, so that 0.0 and -0.0 differ and NaNs are equal to themselves. Lazy tensors, which would have to be
computed, are left alone, and so are initializers that are inputs or outputs of a graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pass, Report

__all__ = ["DeduplicateInitializers"]

_SAMPLE = 4096
"""Bytes at the start that decide whether two tensors are compared in full."""


@dataclass(frozen=True)
class DeduplicateInitializers(Pass):
    """Merge initializers with the same contents."""

    name: ClassVar[str] = "deduplicate-initializers"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Merge within each graph; `changed` counts the initializers that are gone."""
        del context
        saved = [merged for graph in qgraph.ir.all_graphs(model) for merged in _deduplicate(graph)]
        qgraph.ir.forget_pages()
        notes = [f"{len(saved)} duplicate initializers merged"] if saved else []
        return Report(changed=len(saved), notes=notes, figures={"bytes": sum(saved)})


def _deduplicate(graph: ir.Graph) -> list[int]:
    """Merge equal initializers of one graph and return the sizes of those that are gone."""
    alike: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.LazyTensor) or value.is_graph_input() or value.is_graph_output():
            continue
        alike[tensor.dtype, tuple(tensor.shape.numpy())].append(value)
    gone: list[int] = []
    for values in alike.values():
        if len(values) > 1:
            gone += _merge_equal(graph, values)
    return gone


def _merge_equal(graph: ir.Graph, values: list[ir.Value]) -> list[int]:
    kept: dict[bytes, list[ir.Value]] = defaultdict(list)
    gone: list[int] = []
    for value in values:
        content = _content(value)
        same = kept[content[:_SAMPLE].tobytes()]
        twin = next((other for other in same if np.array_equal(_content(other), content)), None)
        if twin is None:
            same.append(value)
            continue
        gone.append(content.nbytes)
        value.replace_all_uses_with(twin)
        graph.initializers.pop(value.name or "")
    return gone


def _content(value: ir.Value) -> np.ndarray:
    """Return the bytes of a tensor, or its texts, as an array of one dimension."""
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"initializer '{value.name}' has no data")
    if tensor.dtype == ir.DataType.STRING:
        return np.asarray(tensor.numpy(), dtype=np.bytes_).reshape(-1)
    array = np.ascontiguousarray(tensor.numpy())
    return array.reshape(-1).view(np.uint8)
