"""Which provider runs which node, and what has to be copied between them, as far as capability tables tell.

    x -> Conv -> Pad -> Conv -> y        CUDA has no kernel for the Pad

is split into CUDA, CPU, CUDA, with a copy to the host and a copy back.

ONNX Runtime asks its providers in order, the most wanted first; each takes what it has kernels for, and the CPU takes
the rest. Memory is of two kinds, the GPU's and the host's, so that nothing is copied between TensorRT and CUDA, but
what leaves the CPU is. The computation of shapes stays on the CPU though CUDA has kernels: ONNX Runtime keeps it there
(GetCpuPreferredNodes), and operators read shapes from the host's memory; TensorRT has shapes of its own. Constants lie
where they are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_support import refusal
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.capabilities import Table
from qgraph.pipeline import Context, Skipped

__all__ = ["CPU", "Split", "split_by_provider"]

CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_SHAPES = ("Shape", "Size")
_HOST_INPUTS = {
    "ConstantOfShape": (0,), "CumSum": (1,), "Expand": (1,), "If": (0,), "Loop": (0, 1), "OneHot": (1,), "Pad": (1, 3),
    "Range": (0, 1, 2), "Reshape": (1,), "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,),
    "Tile": (1,), "TopK": (1,), "Trilu": (1,), "Unsqueeze": (1,), "ReduceSum": (1,), "ReduceMax": (1,),
    "ReduceMean": (1,), "ReduceMin": (1,), "ReduceProd": (1,),
}  # fmt: skip
"""Inputs that CUDA's kernels read from the host's memory."""
_DISCRETE = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


@dataclasses.dataclass(frozen=True)
class Split:
    """How a model is split.

    Attributes:
        providers: node -> name of the provider; nodes of subgraphs as well.
        copies: tensors that are copied between the GPU and the host at every run, the model's inputs and outputs aside.
        parts: runs of neighbouring nodes, in topological order, of one provider; nodes that compute shapes aside.
        left: nodes that do not run on the first provider, each with the reason; those that compute shapes aside.
        shapes: nodes that compute shapes, on the CPU.
        values: what is known of the model's values.
    """

    providers: Mapping[ir.Node, str]
    copies: int
    parts: int
    left: Sequence[Skipped]
    shapes: frozenset[ir.Node]
    values: Shapes


def split_by_provider(model: ir.Model, tables: Sequence[Table]) -> Split:
    """Split a model between providers.

    Args:
        model: is not changed.
        tables: of the providers, the most wanted first; what none of them has runs on the CPU.
    """
    shapes = shapes_of(model, Context())
    hosted = _shape_computation(model, shapes)
    providers: dict[ir.Node, str] = {}
    left = []
    for node in qgraph.ir.walk(model):
        if node.op_type == "Constant":
            continue
        provider, reason = _first(node, tables, model.graph.opset_imports, shapes)
        providers[node] = CPU if node in hosted and provider == _CUDA else provider
        if reason is not None and node not in hosted:
            left.append(Skipped(qgraph.ir.node_label(node), reason))
    on_host = frozenset(node for node in hosted if providers.get(node) == CPU)
    return Split(providers, _copies(providers), _parts(providers, hosted), left, on_host, shapes)


def _first(node: ir.Node, tables: Sequence[Table], opsets: Mapping[str, int], shapes: Shapes) -> tuple[str, str | None]:
    """Return the provider that takes a node, and why the first one does not."""
    first: str | None = None
    for table in tables:
        reason = refusal(node, table, opsets=opsets, shapes=shapes)
        if reason is None:
            return table.provider, first
        first = first or reason
    return CPU, first


def _shape_computation(model: ir.Model, shapes: Shapes) -> set[ir.Node]:
    """Return the nodes that compute nothing but whole numbers from shapes and constants."""
    found: set[ir.Node] = set()
    for node in qgraph.ir.walk(model):
        if qgraph.ir.is_op(node, *_SHAPES):
            found.add(node)
            continue
        computed = [value for value in node.inputs if value is not None and not _is_stored(value)]
        if not computed or any(value.producer() not in found for value in computed):
            continue
        types = [shapes.dtype(value) for value in node.outputs]
        if all(one in _DISCRETE for one in types) and not qgraph.ir.inner_graphs(node):
            found.add(node)
    return found


def _is_stored(value: ir.Value) -> bool:
    return value.const_value is not None or qgraph.ir.is_op(value.producer(), "Constant")


def _copies(providers: Mapping[ir.Node, str]) -> int:
    """Count tensors by the memory that they go to: two readers share a copy."""
    copied: set[tuple[ir.Value, bool]] = set()
    for node, provider in providers.items():
        if qgraph.ir.is_op(node, *_SHAPES):
            continue  # it looks at no element
        host_inputs = _HOST_INPUTS.get(node.op_type, ()) if provider == _CUDA else ()
        for index, value in enumerate(node.inputs):
            maker = None if value is None else value.producer()
            if value is None or maker is None or maker not in providers or _is_stored(value):
                continue
            made_on_host = providers[maker] == CPU
            read_on_host = provider == CPU or index in host_inputs
            if made_on_host != read_on_host:
                copied.add((value, read_on_host))
    return len(copied)


def _parts(providers: Mapping[ir.Node, str], hosted: set[ir.Node]) -> int:
    parts, last = 0, None
    for node, provider in providers.items():
        if node not in hosted and provider != last:
            parts, last = parts + 1, provider
    return parts
