"""Attention in plain operators.

    Attention(q, k, v, mask)    =>    MatMul(Softmax(MatMul(q, kᵀ) * scale + mask), v)

of opset 23 (https://onnx.ai/onnx/operators/onnx__Attention.html), and ONNX Runtime's Attention and QAttention, which
make q, k and v of one product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qgraph.passes._plain_operators import Emitter, Rewriting, UnfitError, static_sizes
from qgraph.passes._plain_quantized import integer_product

__all__ = ["FAR", "MICROSOFT", "STANDARD", "attend", "heads_apart", "heads_joined", "padded", "repeated"]

FAR = -10000.0
"""What ONNX Runtime adds to scores of padding, where a node does not say."""
_RANK = 4


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _number(emit: Emitter, name: str, value: float, dtype: ir.DataType) -> ir.Value:
    return emit.constant(name, np.asarray(value, dtype.numpy()))


def heads_apart(emit: Emitter, value: ir.Value | None, heads: int, width: int, name: str) -> ir.Value:
    """Emit [batch, tokens, heads * width] as [batch, heads, tokens, width]."""
    inner = emit.within(name)
    apart = inner("Reshape", value, inner.integers("shape", [0, 0, heads, width]))
    return inner("Transpose", apart, perm=[0, 2, 1, 3])


def heads_joined(emit: Emitter, value: ir.Value, width: int) -> ir.Value:
    """Emit [batch, heads, tokens, any] as [batch, tokens, width]."""
    together = emit("Transpose", value, perm=[0, 2, 1, 3])
    return emit("Reshape", together, emit.integers("tokens", [0, 0, width]))


def attend(
    emit: Emitter, q: ir.Value, k: ir.Value, v: ir.Value, scale: ir.Value, mask: ir.Value | None,
    cap: ir.Value | None = None,
) -> ir.Value:  # fmt: skip
    """Emit attention of [batch, heads, tokens, width].

    Args:
        emit: of the node in whose place this is.
        q: queries.
        k: keys, of as many heads.
        v: values.
        scale: of the scores.
        mask: is added to the scores, behind the cap.
        cap: that the scores do not pass: cap * tanh(scores / cap).
    """
    scores = emit("Mul", emit("MatMul", q, emit("Transpose", k, perm=[0, 1, 3, 2])), scale)
    if cap is not None:
        scores = emit("Mul", emit("Tanh", emit("Div", scores, cap)), cap)
    if mask is not None:
        scores = emit("Add", scores, mask)
    return emit("MatMul", emit("Softmax", scores, axis=-1), v)


# --- of the standard -------------------------------------------------------------------------------------------------


def _standard(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    _require_plain(node)
    q, k, v = node.inputs[:3]
    if q is None or k is None or v is None or q.shape is None:
        raise UnfitError("the rank of its input is not known")
    flat = len(q.shape) != _RANK
    if flat:
        q_heads, heads = node.attributes.get_int("q_num_heads"), node.attributes.get_int("kv_num_heads")
        width = static_sizes(q, [2], "its width is")[0] // q_heads
        value_width = static_sizes(v, [2], "its width is")[0] // heads
    else:
        q_heads, width = static_sizes(q, [1, 3], "the size of its heads is")
        heads, value_width = static_sizes(v, [1, 3], "the size of its heads is")
    dtype = q.dtype or ir.DataType.FLOAT
    mask = _mask(node, emit, q, k, dtype)
    if flat:
        q = heads_apart(emit, q, q_heads, width, "q")
        k, v = heads_apart(emit, k, heads, width, "k"), heads_apart(emit, v, heads, value_width, "v")
    if q_heads != heads:
        k, v = (repeated(emit, one, heads, q_heads) for one in (k, v))
    scale = _number(emit, "scale", node.attributes.get_float("scale", 1 / math.sqrt(width)), dtype)
    result = attend(emit, q, k, v, scale, mask)
    found = heads_joined(emit, result, q_heads * value_width) if flat else result
    return [found, *(None for _ in node.outputs[1:])]


def _require_plain(node: ir.Node) -> None:
    """Refuse what a cache, a cap or an inner result asks for."""
    if any(_input(node, index) is not None for index in (4, 5, 6)):
        raise UnfitError("it has a past")
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise UnfitError("an output behind its first is read")
    if node.attributes.get_float("softcap", 0.0):
        raise UnfitError("it has a soft cap")


def _mask(node: ir.Node, emit: Emitter, q: ir.Value, k: ir.Value, dtype: ir.DataType) -> ir.Value | None:
    mask = _input(node, 3)
    parts = []
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        far, near = (_number(emit, name, value, dtype) for name, value in (("far", -math.inf), ("near", 0.0)))
        parts.append(emit("Where", mask, near, far))
    elif mask is not None:
        parts.append(mask)
    if node.attributes.get_int("is_causal", 0):
        (rows,), (columns,) = (
            static_sizes(one, [-2 if len(one.shape or ()) == _RANK else 1], "its length is") for one in (q, k)
        )
        triangle = np.where(np.tri(rows, columns, dtype=bool), 0.0, -math.inf).astype(dtype.numpy())
        parts.append(emit.constant("causal", triangle))
    return emit("Add", *parts) if len(parts) > 1 else next(iter(parts), None)


def repeated(emit: Emitter, value: ir.Value, heads: int, wanted: int) -> ir.Value:
    """Emit each head as often as queries share it."""
    places = np.repeat(np.arange(heads), wanted // heads)
    return emit("Gather", value, emit.constant("shared", places), axis=1)


# --- of ONNX Runtime -------------------------------------------------------------------------------------------------


def _attention(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    _refuse(node, past=4, extra=5)
    product = emit("MatMul", node.inputs[0], node.inputs[1])
    bias = _input(node, 2)
    return _together(node, emit, product if bias is None else emit("Add", product, bias), _input(node, 3))


def _quantized(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    _refuse(node, past=8, extra=9)
    inputs = [_input(node, index) for index in range(8)]
    product = integer_product(emit, inputs[0], inputs[1], inputs[6:8], inputs[3:5], inputs[2])
    return _together(node, emit, product, inputs[5])


def _refuse(node: ir.Node, *, past: int, extra: int) -> None:
    if _input(node, past) is not None or any(output.uses() for output in node.outputs[1:]):
        raise UnfitError("it has a past")
    if any(_input(node, index) is not None for index in range(extra, len(node.inputs))):
        raise UnfitError("it has a bias of attention")
    told = [name for name in ("do_rotary", "unidirectional", "qkv_hidden_sizes") if name in node.attributes]
    used = [name for name in told if node.attributes[name].value not in (0, [0])]
    if used:
        raise UnfitError(f"it has {used[0]}")
    mask = _input(node, 3 if past == _RANK else 5)
    if mask is not None and (mask.shape is None or len(mask.shape) != 2):
        raise UnfitError("its mask is not [batch, tokens]")
    static_sizes(node.inputs[1], [1], "the width of its weight is")


def _together(node: ir.Node, emit: Emitter, product: ir.Value, mask: ir.Value | None) -> Sequence[ir.Value | None]:
    heads = node.attributes.get_int("num_heads")
    hidden = static_sizes(node.inputs[1], [1], "the width of its weight is")[0] // 3
    width = hidden // heads
    parts = emit.split(product, [hidden] * 3, -1)
    q, k, v = (heads_apart(emit, part, heads, width, name) for part, name in zip(parts, "qkv", strict=True))
    dtype = node.outputs[0].dtype or ir.DataType.FLOAT
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(width)
    added = None if mask is None else padded(node, emit, mask, dtype)
    result = attend(emit, q, k, v, _number(emit, "scale", scale, dtype), added)
    return [heads_joined(emit, result, hidden), *(None for _ in node.outputs[1:])]


def padded(node: ir.Node, emit: Emitter, mask: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Emit what is added to scores [batch, heads, rows, columns] for a mask, 0 for padding.

    Args:
        node: says how much.
        emit: of the same node.
        mask: [batch, columns] or [batch, rows, columns], integers.
        dtype: of the scores.
    """
    far = _number(emit, "far", node.attributes.get_float("mask_filter_value", FAR), dtype)
    hidden = emit("Sub", _number(emit, "one", 1.0, dtype), emit("Cast", mask, to=int(dtype)))
    axes = [1, 2] if len(mask.shape or ()) == 2 else [1]
    return emit("Unsqueeze", emit("Mul", hidden, far), emit.integers("axes", axes))


STANDARD: Mapping[str, Rewriting] = {"Attention": _standard}
MICROSOFT: Mapping[str, Rewriting] = {"Attention": _attention, "QAttention": _quantized}
