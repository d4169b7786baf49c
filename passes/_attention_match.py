"""Recognizing attention around a Softmax."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes
from qgraph.analysis.symbols import Dim
from qgraph.passes._attention_block import (
    SPLIT,
    SPLIT_TRANSPOSED,
    Block,
    Dims,
    Heads,
    NoMatchError,
    known_dims,
    splits,
)
from qgraph.passes._attention_heads import HeadFinder, constant_factor
from qgraph.passes._rules import number

__all__ = ["Matcher"]


class Matcher:
    """Recognizes one attention block around a Softmax."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._dims = partial(known_dims, shapes)
        self._finder = HeadFinder(shapes)

    def block(self, softmax: ir.Node) -> Block | None:
        """Return the block, or None for a Softmax that does not weigh anything.

        Raises:
            NoMatchError: it does, but the block cannot be fused; the text says why.
        """
        probabilities, guarded = self._guard(softmax)
        weigh = next((use.node for use in probabilities.uses() if _is_product(use.node, probabilities)), None)
        if weigh is None:
            return None
        if qgraph.ir.only_consumer(probabilities) is None:
            raise NoMatchError("its probabilities are used elsewhere too")
        rank = len(self._dims(softmax.inputs[0]))
        if rank != 4 or softmax.attributes.get_int("axis", -1) not in (-1, 3):
            raise NoMatchError("its input is not [batch, heads, queries, keys], normalized over the keys")
        masks, scores, scale = self._scores(softmax.inputs[0])
        q, k = self._finder.find(scores.inputs[0], "queries"), self._finder.find(scores.inputs[1], "keys")
        v = self._finder.find(weigh.inputs[1], "values")
        if q.order != SPLIT or k.order != SPLIT_TRANSPOSED or v.order != SPLIT:
            raise NoMatchError("queries, keys and values are not laid out [batch, heads, rows, size] for the products")
        if k.dims[2] != v.dims[2] or _remainder(q.dims[2], k.dims[2]) or not q.dims[0] == k.dims[0] == v.dims[0]:
            raise NoMatchError("queries, keys and values differ in batch or number of heads")
        if q.dims[3] != k.dims[3] or k.dims[1] != v.dims[1]:
            raise NoMatchError("queries, keys and values do not fit together")
        if q.cache is not None or (k.cache is None) != (v.cache is None):
            raise NoMatchError("only its keys, or only its values, come from a cache")
        if v.scale != 1.0 or v.rotation is not None:
            raise NoMatchError("its values are scaled or rotated")
        for mask in masks:
            self._check_mask(mask, q, (k.rows, v.rows))
        last = self._join(weigh.outputs[0], (*q.dims[:3], v.dims[3]))
        return Block(softmax, q, k, v, scale * q.scale * k.scale, masks, guarded, last)

    def _guard(self, softmax: ir.Node) -> tuple[ir.Value, bool]:
        """Return the probabilities, behind the Where that replaces NaN by zero if there is one."""
        plain = softmax.outputs[0]
        readers = [use.node for use in plain.uses()]
        where = next((node for node in readers if qgraph.ir.is_op(node, "Where")), None)
        test = next((node for node in readers if qgraph.ir.is_op(node, "IsNaN")), None)
        if where is None or test is None or len(readers) != 2 or plain.is_graph_output():
            return plain, False
        zero = number(where.inputs[1])
        if where.inputs[0] is not test.outputs[0] or where.inputs[2] is not plain or zero != 0.0:
            return plain, False
        if qgraph.ir.only_consumer(test.outputs[0]) is not where:
            return plain, False
        return where.outputs[0], True

    def _scores(self, value: ir.Value | None) -> tuple[list[ir.Value], ir.Node, float]:
        """Follow the Softmax's input up to the product of queries and keys; return masks, product and scale."""
        masks: list[ir.Value] = []
        scale = 1.0
        while value is not None:
            node = value.producer()
            if node is None or qgraph.ir.only_consumer(value) is None:
                break
            if qgraph.ir.is_op(node, "MatMul"):
                return masks, node, scale
            scaled = constant_factor(node)
            if scaled is not None:
                value, factor = scaled
                scale *= factor
            elif qgraph.ir.is_op(node, "Add") and scale == 1.0:
                scores = next((one for one in node.inputs if one is not None and self._leads_to_product(one)), None)
                if scores is None:
                    break
                masks += [one for one in node.inputs if one is not None and one is not scores]
                value = scores
            else:
                break
        raise NoMatchError("what it normalizes is not a product of queries and keys, scaled and masked by addition")

    def _leads_to_product(self, value: ir.Value) -> bool:
        node = value.producer()
        while node is not None:
            if qgraph.ir.is_op(node, "MatMul"):
                return True
            scaled = constant_factor(node)
            above = scaled[0] if scaled is not None else node.inputs[0] if qgraph.ir.is_op(node, "Add") else None
            node = above.producer() if above is not None else None
        return False

    def _check_mask(self, mask: ir.Value, q: Heads, keys: tuple[Dim, Dim]) -> None:
        """Hold a mask against the scores.

        Args:
            mask: that is added to them.
            q: the queries.
            keys: the number of keys, and that of values: the same, though two caches may name it differently.
        """
        dims = self._dims(mask)
        wanted: Dims = (q.dims[0], q.dims[2], q.dims[1])
        fits = 0 < len(dims) <= 4 and all(d in (1, w) for d, w in zip(dims[-2::-1], wanted[::-1], strict=False))
        if not fits or dims[-1] not in keys:
            raise NoMatchError(f"its mask '{mask.name}' is not [batch, heads, queries, keys]")

    def _join(self, context: ir.Value, dims: Dims) -> ir.Node:
        transpose = qgraph.ir.only_consumer(context)
        if transpose is not None and qgraph.ir.is_op(transpose, "Transpose"):
            reshape = qgraph.ir.only_consumer(transpose.outputs[0])
            if (
                tuple(transpose.attributes.get_ints("perm", ())) == SPLIT
                and reshape is not None
                and qgraph.ir.is_op(reshape, "Reshape")
                and splits(self._dims(reshape.outputs[0]), dims)
            ):
                return reshape
        raise NoMatchError("its heads are not joined again to [batch, queries, hidden]")


def _is_product(node: ir.Node, left: ir.Value) -> bool:
    return qgraph.ir.is_op(node, "MatMul") and node.inputs[0] is left


def _remainder(heads: Dim, groups: Dim) -> int:
    return heads % groups if isinstance(heads, int) and isinstance(groups, int) and groups else 1
