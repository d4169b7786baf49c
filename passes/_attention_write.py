"""Putting Attention in the place of what computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes
from qgraph.analysis.symbols import Dim
from qgraph.passes._attention_block import Block, Heads
from qgraph.passes._rules import discard_unread

__all__ = ["Rewriter"]


@dataclass
class Rewriter:
    """Puts Attention in the place of blocks.

    What is computed of a mask that several blocks with as many queries share stands before the first of them, once.
    """

    model: ir.Model
    shapes: Shapes
    _masks: dict[tuple[ir.Value, ir.Graph, bool, Dim], ir.Value] = field(default_factory=dict)
    _parts: dict[ir.Node, ir.Node] = field(default_factory=dict)

    def fuse(self, block: Block) -> None:
        """Put one operator in the place of a block."""
        softmax = block.softmax
        inputs: list[ir.Value | None] = [self._joined(heads, block) for heads in (block.q, block.k, block.v)]
        masks = [self._mask(mask, block) for mask in block.masks]
        caches = [heads.cache for heads in (block.k, block.v) if heads.cache is not None]
        if masks or caches:
            inputs.append(self._sum(masks, block.last) if masks else None)
        inputs += [cache.past for cache in caches]
        heads, groups = block.q.dims[2], block.k.dims[2]
        assert isinstance(heads, int)
        assert isinstance(groups, int)
        attributes: dict[str, int | float] = {
            "q_num_heads": heads,
            "kv_num_heads": groups,
            "scale": float(np.float32(block.scale)),
        }
        name = softmax.name.replace("Softmax", "Attention").replace("softmax", "attention") if softmax.name else None
        attention = ir.node("Attention", inputs, attributes, num_outputs=1 + len(caches), name=name)
        before = block.last.inputs[0]
        qgraph.ir.replace_node(block.last, attention)
        discard_unread(before)
        for cache, present in zip(caches, attention.outputs[1:], strict=True):
            self._hand_over(cache.concat, present)

    def _hand_over(self, concat: ir.Node, present: ir.Value) -> None:
        """Let `present` be the output of the graph that a Concat makes; it stays for others, which may stand before."""
        extended = concat.outputs[0]
        name = extended.name
        present.type, present.shape = extended.type, extended.shape
        extended.name = qgraph.ir.fresh_name(self.model.graph, f"{name}_extended")
        present.name = name
        if concat.graph is None:
            return  # nobody else has read it
        outputs = concat.graph.outputs
        for index, output in enumerate(outputs):
            if output is extended:
                outputs[index] = present
        discard_unread(extended)

    def _joined(self, heads: Heads, block: Block) -> ir.Value:
        """Return queries, keys or values as [batch, rows, hidden], rotated if they were."""
        value = heads.source
        if heads.part is not None:
            if heads.reshape not in self._parts:
                self._parts[heads.reshape] = self._split(value, heads.reshape)
            value = self._parts[heads.reshape].outputs[heads.part]
        if heads.rotation is None:
            return value
        count = heads.dims[2]
        assert isinstance(count, int)
        name = qgraph.ir.fresh_name(self.model.graph, f"{heads.rotation.outputs[0].name}_joined")
        tables = heads.rotation.inputs[1:]
        rotated = ir.node("RotaryEmbedding", [value, *tables], {"num_heads": count}, name=name)
        rotated.outputs[0].name, rotated.outputs[0].type, rotated.outputs[0].shape = name, value.type, value.shape
        qgraph.ir.insert_before(block.last, rotated)
        return rotated.outputs[0]

    def _split(self, value: ir.Value, before: ir.Node) -> ir.Node:
        name = qgraph.ir.fresh_name(self.model.graph, f"{value.name}_split")
        node = ir.node("Split", [value], {"axis": -1, "num_outputs": 3}, num_outputs=3, name=name)
        for output, part in zip(node.outputs, "qkv", strict=True):
            output.name, output.type = qgraph.ir.fresh_name(self.model.graph, f"{value.name}_{part}"), value.type
        qgraph.ir.insert_before(before, node)
        return node

    def _sum(self, masks: Sequence[ir.Value], before: ir.Node) -> ir.Value:
        total = masks[0]
        for mask in masks[1:]:
            total = self._insert(before, "Add", [total, mask], mask)
        return total

    def _mask(self, mask: ir.Value, block: Block) -> ir.Value:
        """Return the mask as the operator wants it: above the lowest float, with one row for each query."""
        softmax = block.softmax
        graph = softmax.graph
        assert graph is not None
        key = (mask, graph, block.guarded, block.q.dims[1])
        if key in self._masks:
            return self._masks[key]
        result = mask
        dtype = mask.dtype if mask.dtype is not None else ir.DataType.FLOAT
        if _may_be_lowest(mask, dtype, guarded=block.guarded):
            limit = np.array(np.finfo(dtype.numpy()).min / 2, dtype.numpy())
            least = qgraph.ir.initializer(self.model.graph, f"{mask.name}_least", limit)
            result = self._insert(softmax, "Max", [result, least], mask)
        dims = self.shapes.dims(mask)
        if dims is not None and tuple(dims[-2:-1]) != (block.q.dims[1],):
            result = self._expanded(result, block)
        self._masks[key] = result
        return result

    def _expanded(self, mask: ir.Value, block: Block) -> ir.Value:
        """Repeat the one row of a mask for every query."""
        one = qgraph.ir.initializer(self.model.graph, f"{mask.name}_one", np.array([1], np.int64))
        queries = self._insert(block.softmax, "Shape", [block.q.source], mask, start=1, end=2)
        shape = self._insert(block.softmax, "Concat", [one, one, queries, one], mask, axis=0)
        return self._insert(block.softmax, "Expand", [mask, shape], mask)

    def _insert(
        self, before: ir.Node, op_type: str, inputs: list[ir.Value], like: ir.Value, **attributes: int
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.name = qgraph.ir.fresh_name(self.model.graph, f"{like.name}_{op_type.lower()}")
        node.outputs[0].name = node.name
        if op_type in ("Max", "Expand", "Add"):
            node.outputs[0].type = like.type
        qgraph.ir.insert_before(before, node)
        return node.outputs[0]


def _may_be_lowest(mask: ir.Value, dtype: ir.DataType, *, guarded: bool) -> bool:
    """Tell whether the lowest float may be in a mask; behind a guard, an unknown mask has minus infinity instead."""
    node = mask.producer()
    branches = node.inputs[1:] if node is not None and qgraph.ir.is_op(node, "Where") else [mask]
    constants = [array for value in branches if (array := qgraph.ir.constant(value)) is not None]
    if len(constants) < len(branches):
        return not guarded
    return any(bool((array == np.finfo(dtype.numpy()).min).any()) for array in constants)
