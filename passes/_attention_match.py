"""Recognizing attention around a Softmax."""

from __future__ import annotations

import math
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
from qgraph.passes._attention_heads import HeadFinder
from qgraph.passes._attention_products import ProductFinder

__all__ = ["Matcher"]


class Matcher:
    """Recognizes one attention block around a Softmax."""

    def __init__(self, shapes: Shapes) -> None:
        self._dims = partial(known_dims, shapes)
        self._products = ProductFinder(shapes)
        self._heads = HeadFinder(shapes)

    def block(self, softmax: ir.Node) -> Block | None:
        """Return the block, or None for a Softmax that does not weigh anything.

        Raises:
            NoMatchError: it does, but the block cannot be fused; the text says why.
        """
        products = self._products.find(softmax)
        if products is None:
            return None
        q = self._heads.find(products.queries, "queries")
        k, v = self._heads.find(products.keys, "keys"), self._heads.find(products.values, "values")
        if q.order != SPLIT or k.order != SPLIT_TRANSPOSED or v.order != SPLIT:
            raise NoMatchError("queries, keys and values are not laid out [batch, heads, rows, size] for the products")
        if k.dims[2] != v.dims[2] or _remainder(q.dims[2], k.dims[2]) or not q.dims[0] == k.dims[0] == v.dims[0]:
            raise NoMatchError("queries, keys and values differ in batch or number of heads")
        if products.groups not in (None, k.dims[2]):
            raise NoMatchError("heads that share keys lie below one another, and keys are repeated for them as well")
        if q.dims[3] != k.dims[3] or k.dims[1] != v.dims[1]:
            raise NoMatchError("queries, keys and values do not fit together")
        if q.cache is not None or (k.cache is None) != (v.cache is None):
            raise NoMatchError("only its keys, or only its values, come from a cache")
        if v.scale != 1.0 or v.rotation is not None:
            raise NoMatchError("its values are scaled or rotated")
        for mask in products.masks:
            self._check_mask(mask, q, (k.rows, v.rows))
        last = self._join(products.context, (*q.dims[:3], v.dims[3]))
        if any(heads.cache is not None and heads.cache.concat.graph is not last.graph for heads in (k, v)):
            raise NoMatchError("it is in a subgraph, and its cache is extended outside")
        scale = _positive(products.scale * q.scale * k.scale)
        stacked = 1 if products.groups is None else _shared(q, products.groups)
        return Block(softmax, q, k, v, scale, products.masks, products.guarded, last, stacked)

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


def _positive(scale: float) -> float:
    if not 0.0 < scale < math.inf:
        raise NoMatchError(f"its scores are multiplied by {scale:g}, and the operator takes positive numbers")
    return scale


def _remainder(heads: Dim, groups: Dim) -> int:
    return heads % groups if isinstance(heads, int) and isinstance(groups, int) and groups else 1


def _shared(q: Heads, groups: int) -> int:
    heads = q.dims[2]
    assert isinstance(heads, int)
    return heads // groups
