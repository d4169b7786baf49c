"""How factors for channels go up through products: the columns of weights, and the values that attention mixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_tracer import (
    NONE,
    Found,
    Key,
    NoSourceError,
    Rule,
    Source,
    Tracer,
    at,
    constant_tensor,
    tie,
    vector,
)
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.symbols import Dim

__all__ = ["PRODUCT_RULES"]

_MICROSOFT = "com.microsoft"


def product(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """The columns of a weight, or the values that attention mixes."""
    del value
    layer = tracer.layers.get(node)
    if layer is not None:
        return _columns(layer, ids)
    if (
        node.op_type == "Gemm"
        or constant_tensor(node.inputs[0]) is not None
        or constant_tensor(node.inputs[1]) is not None
    ):
        raise NoSourceError(f"{at(node)} has a weight that cannot be rewritten")
    if ids.ndim > 1 and ids.shape[-2] != 1:
        raise NoSourceError(f"the rows of {at(node)} are channels")
    mixed = ids.reshape(-1, ids.shape[-1])
    values, ties = tracer.narrowed(node.inputs[1], ids)
    return Found(ties=ties, heads=_heads(mixed)) + tracer.up(node.inputs[1], values, [node])


def _columns(layer: LinearLayer, ids: np.ndarray) -> Found:
    if ids.size != ids.shape[-1]:
        raise NoSourceError(f"the rows of '{layer.name}' ({layer.node.op_type}) are channels")
    columns = np.broadcast_to(ids.reshape(-1), (layer.outputs,))
    if not _is_own(layer):
        raise NoSourceError(f"the weight of '{layer.name}' is used elsewhere too")
    flipped = _behind(layer)
    sources = [Source(flipped or layer.node, 0 if flipped else 1, columns, layer)]
    sources[0] = dataclasses.replace(sources[0], channels=columns[:, None] if layer.transposed else columns)
    addend = layer.node.inputs[2] if layer.node.op_type == "Gemm" and len(layer.node.inputs) > 2 else None
    if addend is not None:
        if constant_tensor(addend) is None:
            raise NoSourceError(f"the bias of '{layer.name}' is computed")
        sources.append(Source(layer.node, 2, columns, layer))
    return Found(tuple(sources))


def _behind(layer: LinearLayer) -> ir.Node | None:
    """Return the Transpose that now stands between the weight and the node."""
    right = layer.node.inputs[1]
    return right.producer() if right is not None and right.const_value is None else None


def _is_own(layer: LinearLayer) -> bool:
    """Tell whether nobody else reads the weight, or the Transpose behind it."""
    values = [layer.node.inputs[1]]
    behind = _behind(layer)
    if behind is not None:
        values.append(behind.inputs[0])
    return all(value is not None and qgraph.ir.only_consumer(value) is not None for value in values)


def attention(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """Attention of the standard: values are input 2, [batch, rows, heads * size] or [batch, heads, rows, size]."""
    _require_no_cache(node, value, 5, 2)
    values = tracer.dims(node.inputs[2])
    if len(values) == 4:
        if ids.ndim < 3 or ids.shape[-2] != 1:
            raise NoSourceError(f"{at(node)} is not laid out by heads")
        return _repeated(tracer, node, ids[..., 0, :], values[-3], split=True)
    return _merged(tracer, node, ids, node.attributes.get_int("kv_num_heads", 0))


def multi_head_attention(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """As `attention`, with a bias for the values."""
    _require_no_cache(node, value, 7, 2)
    if len(node.inputs) < 3 or node.inputs[2] is None or len(tracer.dims(node.inputs[2])) != 3:
        raise NoSourceError(f"{at(node)} takes packed values")
    found = _merged(tracer, node, ids, node.attributes.get_int("num_heads", 0))
    bias = node.inputs[3] if len(node.inputs) > 3 else None
    if bias is None:
        return found
    size = tracer.dims(bias)[-1]
    if constant_tensor(bias) is None or not isinstance(size, int) or size < ids.size:
        raise NoSourceError(f"the bias of {at(node)} is computed")
    places = np.full(size, NONE)
    places[size - ids.size :] = ids.reshape(-1)
    return dataclasses.replace(found + Found((vector(node, 3, places),)), linear=False)


def group_query_attention(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """As `attention`, of fewer heads of values than of queries."""
    _require_no_cache(node, value, 4, 2)
    if node.inputs[2] is None:
        raise NoSourceError(f"{at(node)} takes packed values")
    return _merged(tracer, node, ids, node.attributes.get_int("kv_num_heads", 0))


def _require_no_cache(node: ir.Node, value: ir.Value, past: int, present: int) -> None:
    """Values that are kept for the next call, or come from the last, are seen outside."""
    name = at(node)
    if value is not node.outputs[0]:
        raise NoSourceError(f"it is a side output of {name}")
    kept = node.outputs[present] if len(node.outputs) > present else None
    if kept is not None and (kept.uses() or kept.is_graph_output()):
        raise NoSourceError(f"{name} hands its values out, as '{kept.name}'")
    if any(one is not None for one in node.inputs[past : past + 1]):
        raise NoSourceError(f"{name} takes values of an earlier call")


def _merged(tracer: Tracer, node: ir.Node, ids: np.ndarray, kv_heads: int) -> Found:
    """Values [batch, rows, kv_heads * size]; ids is over query heads * size."""
    width = tracer.dims(node.inputs[2])[-1]
    if not isinstance(width, int) or kv_heads < 1 or width % kv_heads or ids.size != ids.shape[-1]:
        raise NoSourceError(f"the heads of {at(node)} are not certain")
    return _repeated(tracer, node, ids.reshape(-1, width // kv_heads), kv_heads, split=False)


def _repeated(tracer: Tracer, node: ir.Node, ids: np.ndarray, kv_heads: Dim, *, split: bool) -> Found:
    """Query head i reads the values of head i // (query heads / kv_heads); ids is [query heads, size]."""
    ids = ids.reshape(-1, ids.shape[-1])
    if not isinstance(kv_heads, int) or len(ids) % kv_heads:
        raise NoSourceError(f"the heads of {at(node)} are not certain")
    grouped = ids.reshape(kv_heads, -1, ids.shape[-1])
    first, rest = grouped[:, :1], grouped[:, 1:]
    ties = (tie(np.broadcast_to(first, rest.shape), rest),)
    values = first if split else first.reshape(-1)
    return Found(ties=ties, heads=_heads(ids)) + tracer.up(node.inputs[2], values, [node])


def _heads(mixed: np.ndarray) -> tuple[np.ndarray, ...]:
    used = mixed[(mixed != NONE).all(axis=1)]
    return (used,) if len(used) else ()


PRODUCT_RULES: Mapping[Key, Rule] = {
    ("", "MatMul"): product,
    ("", "Gemm"): product,
    ("", "Attention"): attention,
    (_MICROSOFT, "MultiHeadAttention"): multi_head_attention,
    (_MICROSOFT, "GroupQueryAttention"): group_query_attention,
}
