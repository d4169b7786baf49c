"""Following queries, keys and values up from their products to the Reshape that splits the heads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes
from qgraph.passes._attention_block import SPLIT, SPLIT_PACKED, Cache, Dims, Heads, NoMatchError, known_dims, splits
from qgraph.passes._attention_products import constant_factor

__all__ = ["HeadFinder"]


class HeadFinder:
    """Finds what a factor of a product is split from."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._dims = partial(known_dims, shapes)

    def find(self, value: ir.Value | None, what: str) -> Heads:
        """Follow a factor of a product up to the Reshape that splits the heads.

        Raises:
            NoMatchError: it does not come from one.
        """
        order: tuple[int, ...] = (0, 1, 2, 3)
        scale = 1.0
        rotation: ir.Node | None = None
        while value is not None and (node := value.producer()) is not None:
            scaled = constant_factor(node)
            if scaled is not None:
                value, factor = scaled
                scale *= factor
            elif rotation is None and _is_rotation(node):
                rotation, value = node, node.inputs[0]
            elif (once := self._repeated(node)) is not None:
                value = once
            elif qgraph.ir.is_op(node, "Transpose") and len(node.attributes.get_ints("perm", ())) == 4:
                perm = node.attributes.get_ints("perm")
                order = tuple(perm[axis] for axis in order)
                value = node.inputs[0]
            else:
                heads = self._split(node) or (self._extended(node, what) if rotation is None else None)
                if heads is None:
                    break
                turned = tuple(heads.order[axis] for axis in order)
                return replace(heads, order=turned, scale=scale, rotation=rotation or heads.rotation)
        raise NoMatchError(f"its {what} are not split into heads from one [batch, rows, hidden] tensor")

    def _split(self, node: ir.Node) -> Heads | None:
        """Return the heads that `node` splits, alone or as one part of three."""
        packed = self._packed(node)
        if packed is not None:
            reshape, part, dims = packed
            return Heads(reshape, dims, SPLIT, 1.0, part=part)
        if not qgraph.ir.is_op(node, "Reshape") or node.inputs[0] is None:
            return None
        split = self._dims(node.outputs[0])
        return Heads(node, split, (0, 1, 2, 3), 1.0) if splits(self._dims(node.inputs[0]), split) else None

    def _extended(self, node: ir.Node, what: str) -> Heads | None:
        """Return the heads whose new rows `node` puts behind those of a cache, as they are stored there."""
        if not qgraph.ir.is_op(node, "Concat") or len(node.inputs) != 2 or node.inputs[0] is None:
            return None
        dims = self._dims(node.outputs[0])
        if len(dims) != 4 or node.attributes.get_int("axis") not in (2, -2):
            return None
        new = self.find(node.inputs[1], what)
        if new.order != SPLIT or new.scale != 1.0 or new.cache is not None or new.dims[2] != dims[1]:
            raise NoMatchError(f"the cache of its {what} is not [batch, heads, rows, size] as they are computed")
        return replace(new, cache=Cache(node.inputs[0], node, dims[2]))

    def _repeated(self, node: ir.Node) -> ir.Value | None:
        """Return [batch, heads, rows, size] of which `node` repeats every head for a group of others, or None."""
        expand = _producer(node.inputs[0], "Expand") if qgraph.ir.is_op(node, "Reshape") else None
        unsqueeze = _producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
        if expand is None or unsqueeze is None or unsqueeze.inputs[0] is None:
            return None
        once, groups = self._dims(unsqueeze.inputs[0]), self._dims(expand.outputs[0])
        if len(once) != 4 or len(groups) != 5 or groups != (*once[:2], groups[2], *once[2:]):
            return None
        if self._dims(unsqueeze.outputs[0]) != (*once[:2], 1, *once[2:]):
            return None
        heads, group = groups[1:3]
        if not isinstance(heads, int) or not isinstance(group, int):
            return None
        return unsqueeze.inputs[0] if self._dims(node.outputs[0]) == (once[0], heads * group, *once[2:]) else None

    def _packed(self, node: ir.Node) -> tuple[ir.Node, int, Dims] | None:
        """Return the Reshape of [batch, rows, 3 * hidden] of which `node` is one part by heads, which, and its dims."""
        found = self._part(node)
        transpose = _producer(found[0], "Transpose") if found is not None else None
        if found is None or transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != SPLIT_PACKED:
            return None
        reshape = _producer(transpose.inputs[0], "Reshape")
        if reshape is None or reshape.inputs[0] is None:
            return None
        source, split = self._dims(reshape.inputs[0]), self._dims(reshape.outputs[0])
        if len(source) != 3 or len(split) != 5 or split[:3] != (*source[:2], 3):
            return None
        heads, size = split[3:]
        if not isinstance(heads, int) or not isinstance(size, int) or source[2] != 3 * heads * size:
            return None
        return reshape, found[1], (*split[:2], heads, size)

    def _part(self, node: ir.Node) -> tuple[ir.Value | None, int] | None:
        """Return the tensor of whose first axis of three `node` takes one index, and which, or None."""
        if qgraph.ir.is_op(node, "Gather") and node.attributes.get_int("axis", 0) == 0:
            index = self._shapes.array(node.inputs[1])
            return None if index is None or index.ndim else (node.inputs[0], int(index) % 3)
        axes = self._shapes.array(node.inputs[1]) if qgraph.ir.is_op(node, "Squeeze") and len(node.inputs) > 1 else None
        one = node.inputs[0]
        before = one.producer() if one is not None else None
        if axes is None or axes.reshape(-1).tolist() != [0] or before is None or one is None or self._dims(one)[0] != 1:
            return None
        if qgraph.ir.is_op(before, "Split") and before.attributes.get_int("axis", 0) == 0 and len(before.outputs) == 3:
            return before.inputs[0], list(before.outputs).index(one)
        if not qgraph.ir.is_op(before, "Slice") or len(before.inputs) < 4:
            return None
        start, _, axis = (self._shapes.array(value) for value in before.inputs[1:4])
        if start is None or axis is None or axis.tolist() != [0] or not 0 <= int(start[0]) < 3:
            return None
        return before.inputs[0], int(start[0])


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if qgraph.ir.is_op(node, op_type) else None


def _is_rotation(node: ir.Node) -> bool:
    """Tell whether a node rotates [batch, heads, rows, size] by tables for every sample."""
    return qgraph.ir.is_op(node, "RotaryEmbedding") and len(node.inputs) == 3 and not node.attributes
