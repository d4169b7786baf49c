"""ONNX Runtime's MultiHeadAttention in plain operators.

    MultiHeadAttention(q, k, v, bias, padding, added, past)    =>    MatMul(Softmax(MatMul(q, kᵀ) * scale + masks), v)

with the bias added to q, k and v, and the past put before k and v. Left alone: queries, keys and values packed in one
tensor, padding that is told by lengths, a cache that is shared or searched by beams, and scores that are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qgraph.passes._plain_attention import attend, heads_apart, heads_joined, padded
from qgraph.passes._plain_operators import Emitter, Rewriting, UnfitError, static_sizes
from qgraph.passes._plain_windows import number

__all__ = ["MICROSOFT", "STANDARD"]

_APART = 4
"""Axes of [batch, heads, tokens, width]; [batch, tokens, heads * width] has one less."""


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _multi_head(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    q, k, v = _unpacked(node)
    heads, apart = node.attributes.get_int("num_heads"), len(k.shape or ()) == _APART
    hidden = static_sizes(q, [2], "its width is")[0]
    value_hidden = static_sizes(v, [-1], "the width of its values is")[0] * (heads if apart else 1)
    pasts = _input(node, 6), _input(node, 7)
    causal = _triangle(q, k, pasts[0]) if node.attributes.get_int("unidirectional", 0) else None
    bias = _input(node, 3)
    if bias is not None:
        if apart:
            raise UnfitError("its keys come with their heads apart, and a bias")
        added = emit.split(bias, [hidden, hidden, value_hidden], 0)
        q, k, v = (emit("Add", one, other) for one, other in zip((q, k, v), added, strict=True))
    q = heads_apart(emit, q, heads, hidden // heads, "q")
    if not apart:
        k = heads_apart(emit, k, heads, hidden // heads, "k")
        v = heads_apart(emit, v, heads, value_hidden // heads, "v")
    k, v = (one if past is None else emit.join([past, one], 2) for past, one in zip(pasts, (k, v), strict=True))
    scale = number(emit, "scale", node.inputs[0], node.attributes.get_float("scale", 0.0) or math.sqrt(heads / hidden))
    result = attend(emit, q, k, v, scale, _masks(node, emit, causal))
    return [heads_joined(emit, result, value_hidden), k, v][: len(node.outputs)]


def _unpacked(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return queries, keys and values, where all else is as this takes it."""
    q, k, v = (_input(node, index) for index in range(3))
    if q is None or k is None or v is None:
        raise UnfitError("its queries, keys and values are packed")
    if q.shape is None or k.shape is None or len(q.shape) != _APART - 1 or len(k.shape) not in (_APART - 1, _APART):
        raise UnfitError("its queries, keys and values are packed, or their ranks are not known")
    if _input(node, 8) is not None or _input(node, 9) is not None:
        raise UnfitError("its cache is shared")
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        raise UnfitError("its scores are read")
    padding = _input(node, 4)
    if padding is not None and (padding.shape is None or len(padding.shape) not in (2, 3)):
        raise UnfitError("its padding is told by lengths")
    return q, k, v


def _triangle(q: ir.Value, k: ir.Value, past: ir.Value | None) -> np.ndarray:
    """Return what hides the keys behind each query, [rows, columns]."""
    (rows,) = static_sizes(q, [1], "the number of its queries is")
    (columns,) = static_sizes(k, [-2], "the number of its keys is")
    before = 0 if past is None else static_sizes(past, [2], "the length of its past is")[0]
    return np.where(np.tri(rows, before + columns, before, dtype=bool), 0.0, -math.inf)


def _masks(node: ir.Node, emit: Emitter, causal: np.ndarray | None) -> ir.Value | None:
    """Emit the sum of what is added to the scores."""
    q, padding, added = node.inputs[0], _input(node, 4), _input(node, 5)
    dtype = ir.DataType.FLOAT if q is None or q.dtype is None else q.dtype
    parts = [] if added is None else [added]
    if padding is not None:
        parts.append(padded(node, emit, padding, dtype))
    if causal is not None:
        parts.append(emit.constant("causal", causal.astype(dtype.numpy())))
    total = None
    for part in parts:
        total = part if total is None else emit("Add", total, part)
    return total


STANDARD: Mapping[str, Rewriting] = {}
MICROSOFT: Mapping[str, Rewriting] = {"MultiHeadAttention": _multi_head}
