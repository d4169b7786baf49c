"""What does not depend on the inputs is computed now.

    c = Add(a, b)               a, b constant                       =>    initializer c
    s = Shape(x)                x: [1,3,224,224]                    =>    initializer s
    y = Reshape(x, s)           s computed as [batch, seq, 12, 32]  =>    y = Reshape(x, [0, 0, 12, 32])
    y = If(c){...}{...}         c constant                          =>    the nodes of the branch that is taken

Symbolic sizes are followed through the graph (`qgraph.analysis.shapes`), so that the arithmetic that exporters write
around Shape goes although its result is not a number. A size that is copied from the input becomes 0, one other
unknown size -1.

Not folded: what would make the file larger (results over `max_bytes` that are larger than the constants they replace,
or whose constants are read elsewhere too), random and quantizing operators, ConstantOfShape, other domains than
onnx's, graph inputs with a default, and what numpy computes differently (`qgraph.numerics.operators`). A large
result is computed when the file is written. The nodes that become unused are removed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shape_facts import Dims
from qgraph.analysis.shapes import Shapes
from qgraph.passes._annotate import annotate
from qgraph.passes._constant_regions import ConstantRegions
from qgraph.pipeline import Context, Pass, Report

__all__ = ["FoldConstants"]


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute what is constant, shape arithmetic included, and take the branches that are known."""

    name: ClassVar[str] = "fold-constants"
    max_bytes: int = field(default=65536, metadata={"help": "largest result that may be larger than its inputs"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Fold in one walk; also sets types and shapes, as `infer-shapes` does."""
        del context
        folder = _Folder(model, self.max_bytes)
        shapes = folder.shapes.run()
        folder.fold_regions()
        removed = folder.sweep()
        annotate(model, shapes)
        counts = {
            "nodes folded": folder.folded,
            "Reshape targets made constant": folder.reshaped,
            "branches taken": folder.taken,
        }
        notes = [f"{count} {what}" for what, count in counts.items() if count]
        return Report(changed=sum(counts.values()), notes=notes, figures={"unused nodes removed": removed})


class _Folder:
    """Rewrites each node once what it computes is known."""

    def __init__(self, model: ir.Model, max_bytes: int) -> None:
        self.main = model.graph
        self.max_bytes = max_bytes
        self.shapes = Shapes(model, self.visit)
        self.folded = self.reshaped = self.taken = self.growth = 0
        self._loose: list[ir.Value] = []
        self._regions = ConstantRegions(self.shapes, max_bytes)

    def visit(self, node: ir.Node) -> None:
        if node.domain not in ("", "ai.onnx") or not node.outputs or node.op_type in _KEPT:
            return
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return
        if node.op_type == "If":
            self._take_branch(node)
            return
        if self._store_result(node):
            return
        if node.op_type == "Reshape":
            self._settle_reshape(node)
        self._regions.offer(node)

    def sweep(self) -> int:
        """Remove the nodes that only folded ones read."""
        count = 0
        while self._loose:
            value = self._loose.pop()
            node = value.producer()
            if node is None or node.graph is None:
                self._drop_initializer(value)
            elif not any(output.uses() or output.is_graph_output() for output in node.outputs):
                self._loose += [value for value in node.inputs if value is not None]
                qgraph.ir.discard(node)
                count += 1
        return count

    def _drop_initializer(self, value: ir.Value) -> None:
        needed = value.uses() or value.is_graph_output() or value.is_graph_input()
        if value.is_initializer() and value.graph is not None and not needed:
            value.graph.initializers.pop(value.name or "", None)

    # --- constants ---------------------------------------------------------------------------------------------------

    def _store_result(self, node: ir.Node) -> bool:
        """Replace a node whose outputs are small and known by initializers."""
        arrays = [self.shapes.array(output) for output in node.outputs]
        known = [array for array in arrays if array is not None]
        nbytes = sum(array.nbytes for array in known)
        fits = nbytes <= min(self.max_bytes, _MOST_GROWTH * self.max_bytes - self.growth)
        if len(known) < len(arrays) or not fits or any(output.is_graph_output() for output in node.outputs):
            return False
        self.growth += nbytes
        for output, array in zip(node.outputs, known, strict=True):
            self._store(output, ir.tensor(array))
        self._loose += [value for value in node.inputs if value is not None]
        qgraph.ir.discard(node)
        self.folded += 1
        return True

    def fold_regions(self) -> None:
        """Replace the nodes that read large constants, as far as the model does not grow."""
        for nodes, tensors in self._regions.chosen(_MOST_GROWTH * self.max_bytes - self.growth):
            for value, tensor in tensors.items():
                self._store(value, tensor)
            self._loose += [node.outputs[0] for node in nodes]
            self.folded += len(nodes)

    def _store(self, output: ir.Value, tensor: ir.TensorProtocol) -> None:
        node = output.producer()
        name = output.name or "folded"
        if node is not None and node.graph is self.main:
            output.name = None
            tensor.name = name
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.main.register_initializer(value)
        else:
            value = qgraph.ir.initializer(self.main, name, tensor)
        output.replace_all_uses_with(value)

    # --- reshapes and branches ---------------------------------------------------------------------------------------

    def _settle_reshape(self, node: ir.Node) -> None:
        """Write the target of a Reshape as a constant, with 0 for copied sizes and -1 for one that is left over."""
        target = node.inputs[1] if len(node.inputs) > 1 else None
        if target is None or self.shapes.array(target) is not None:
            return
        source = self.shapes.dims(node.inputs[0]) if node.inputs[0] is not None else None
        wanted = self.shapes.dims(node.outputs[0])
        if source is None or wanted is None:
            return
        sizes = _target(source, wanted)
        if sizes is None:
            return
        node.attributes.pop("allowzero", None)
        name = f"{target.name}_folded"
        node.replace_input_with(1, qgraph.ir.initializer(self.main, name, np.array(sizes, dtype=np.int64)))
        self._loose.append(target)
        self.reshaped += 1

    def _take_branch(self, node: ir.Node) -> None:
        """Move the nodes of the branch that is always taken before the If, and remove it."""
        condition = self.shapes.array(node.inputs[0])
        graph = node.graph
        if condition is None or condition.size != 1 or graph is None:
            return
        attribute = node.attributes.get("then_branch" if condition.item() else "else_branch")
        if attribute is None or attribute.type != ir.AttributeType.GRAPH:
            return
        branch = attribute.as_graph()
        results = list(branch.outputs)
        made_inside = all(getattr(value.producer(), "graph", None) is branch for value in results)
        if not made_inside or len(set(results)) < len(results) or len(results) != len(node.outputs):
            return
        self._move_out(branch, node, graph)
        for output, result in zip(node.outputs, results, strict=True):
            if output.is_graph_output():
                name, output.name = output.name, None
                result.name, result.type, result.shape = name, output.type or result.type, output.shape or result.shape
            output.replace_all_uses_with(result, replace_graph_outputs=True)
        self._loose += [value for value in node.inputs if value is not None]
        qgraph.ir.discard(node)
        self.taken += 1

    def _move_out(self, branch: ir.Graph, before: ir.Node, graph: ir.Graph) -> None:
        """Move what a branch holds before a node of an enclosing graph, under names that are free everywhere."""
        for name, value in list(branch.initializers.items()):
            branch.initializers.pop(name)
            value.name = qgraph.ir.fresh_name(self.main, name)
            graph.register_initializer(value)
        branch.outputs.clear()
        nodes = list(branch)
        branch.remove(nodes)
        for value in (output for inner in nodes for output in inner.outputs if output.name):
            value.name = qgraph.ir.fresh_name(self.main, value.name or "")
        graph.insert_before(before, nodes)


_KEPT = {"Constant", "ConstantOfShape", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "Loop", "Scan"}

_MOST_GROWTH = 16
"""All results together may make the model larger by this many times `max_bytes`."""


def _target(source: Dims, wanted: Dims) -> list[int] | None:
    """Return the target of a Reshape from `source` to `wanted`, or None if numbers, 0 and one -1 cannot say it.

    0 and -1 do not go together: they would fail for empty tensors.
    """
    sizes: list[int] = []
    for axis, dim in enumerate(wanted):
        if isinstance(dim, int):
            sizes.append(dim)
        else:
            sizes.append(0 if axis < len(source) and source[axis] == dim else -1)
    is_empty = any(dim == 0 for dim in wanted if isinstance(dim, int))
    copies, unknown = sizes.count(0), sizes.count(-1)
    return None if is_empty or unknown > 1 or (unknown and copies) else sizes
