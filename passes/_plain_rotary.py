"""Rotary position embedding in plain operators.

    x1, x2 = Split(x)                             halves of the rotated part of each head, or every other element
    y = Concat(x1 * cos - x2 * sin, x1 * sin + x2 * cos, what is not rotated)

RotaryEmbedding of opset 23 (https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html) and ONNX Runtime's, which differ
in the order of their inputs. Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qgraph.passes._plain_operators import Emitter, Rewriting, UnfitError, static_sizes

__all__ = ["MICROSOFT", "STANDARD", "rotate"]

_RANK = 4


def rotate(
    emit: Emitter, value: ir.Value, cosine: ir.Value, sine: ir.Value, width: int, half: int, *, interleaved: bool
) -> ir.Value:  # fmt: skip
    """Emit the rotation of a tensor of 4 axes.

    Args:
        emit: of the node in whose place this is.
        value: with heads of `width` as its last axis.
        cosine: broadcasts to the value, with `half` as its last axis.
        sine: likewise.
        width: of a head.
        half: of the elements that are rotated.
        interleaved: whether pairs are neighbours, or one is from each half.
    """
    parts = emit.split(value, [2 * half, width - 2 * half] if width > 2 * half else [width], -1)
    if interleaved:
        pairs = emit("Reshape", parts[0], emit.integers("pairs", [0, 0, 0, half, 2]))
        last = emit.integers("last", [-1])
        first, second = (emit("Squeeze", one, last) for one in emit.split(pairs, [1, 1], -1))
    else:
        first, second = emit.split(parts[0], [half, half], -1)
    turned = [
        emit("Sub", emit("Mul", first, cosine), emit("Mul", second, sine)),
        emit("Add", emit("Mul", first, sine), emit("Mul", second, cosine)),
    ]
    if not interleaved:
        return emit.join([*turned, *parts[1:]], -1)
    together = emit.join([emit("Unsqueeze", one, last) for one in turned], -1)
    return emit.join([emit("Reshape", together, emit.integers("flat", [0, 0, 0, 2 * half])), *parts[1:]], -1)


def _standard(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    value, cosine, sine, *ids = node.inputs
    return [_embedded(node, emit, value, cosine, sine, ids[0] if ids else None)]


def _microsoft(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    value, ids, cosine, sine = node.inputs
    if node.attributes.get_int("is_packed_batching", 0):
        raise UnfitError("its batch is packed")
    return [_embedded(node, emit, value, cosine, sine, ids)]


def _embedded(
    node: ir.Node, emit: Emitter, value: ir.Value | None, cosine: ir.Value | None, sine: ir.Value | None,
    ids: ir.Value | None,
) -> ir.Value:  # fmt: skip
    """Emit the rotation of [batch, tokens, heads * width] or [batch, heads, tokens, width]."""
    if value is None or value.shape is None or cosine is None or sine is None:
        raise UnfitError("the rank of its input is not known")
    (half,) = static_sizes(cosine, [-1], "the width of its tables is")
    (hidden,) = static_sizes(value, [-1], "its width is")
    if ids is not None and ids.shape is None:
        raise UnfitError("the rank of its positions is not known")
    flat = len(value.shape) != _RANK
    tokens = static_sizes(value, [1 if flat else 2], "its length is")[0] if _is_first(ids) else 0
    width = hidden
    if flat:
        heads = node.attributes.get_int("num_heads", 0) or hidden // (2 * half)
        width = hidden // heads
        value = emit("Reshape", value, emit.integers("heads", [0, 0, heads, width]))
    if tokens:
        ids = emit("Add", emit("Unsqueeze", ids, emit.integers("axis", [0])), emit.integers("tokens", range(tokens)))
    axis = emit.integers("head", [2 if flat else 1])
    tables = (cosine, sine) if ids is None else (emit("Gather", table, ids, axis=0) for table in (cosine, sine))
    cosines, sines = (emit("Unsqueeze", table, axis) for table in tables)
    interleaved = bool(node.attributes.get_int("interleaved", 0))
    turned = rotate(emit, value, cosines, sines, width, half, interleaved=interleaved)
    return emit("Reshape", turned, emit.integers("joined", [0, 0, hidden])) if flat else turned


def _is_first(ids: ir.Value | None) -> bool:
    """Tell whether positions are those of the first tokens alone."""
    return ids is not None and len(ids.shape or ()) == 1


STANDARD: Mapping[str, Rewriting] = {"RotaryEmbedding": _standard}
MICROSOFT: Mapping[str, Rewriting] = {"RotaryEmbedding": _microsoft}
