"""Coupled dimensions of attention operators and recurrent layers."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.coupling import Coupling, at
from qgraph.analysis.coupling_tools import Rule, edit_attribute, freeze_all, input_of
from qgraph.analysis.dimensions import Axis
from qgraph.pipeline import Skipped

__all__ = ["ATTENTION"]


def _lose(node: ir.Node, found: Coupling) -> None:
    reason = f"the heads of {at(node)} are not certain"
    freeze_all(node, found, reason)
    found.lost.append(Skipped(qgraph.ir.node_label(node), reason))


def _heads(node: ir.Node, found: Coupling, value: ir.Value | None, heads: int) -> tuple[Axis, Axis] | None:
    """Split the last axis of [batch, rows, heads * size] into heads and size."""
    axes = found.of(value)
    last = axes[-1] if axes is not None and len(axes) == 3 else None
    if last is None or heads < 1 or last.size % heads:
        return None
    factors = found.dimensions.split(last, [heads, last.size // heads], at(node))
    return None if factors is None else (factors[0], factors[1])


def _multi_head_attention(node: ir.Node, found: Coupling) -> None:
    """Of com.microsoft: query, key, value and result [batch, rows, heads * size]."""
    heads = node.attributes.get_int("num_heads", 0)
    values = [*(input_of(node, index) for index in range(3)), node.outputs[0]]
    split = [_heads(node, found, value, heads) for value in values]
    others = [input_of(node, index) for index in range(3, len(node.inputs))]
    if any(one is None for one in split) or any(value is not None for value in others[3:]):
        _lose(node, found)
        return
    query, key, value, result = (one for one in split if one is not None)
    for one in (key, value, result):
        found.join(query[0], one[0], node)
    found.join(query[1], key[1], node)
    found.join(value[1], result[1], node)
    found.freeze(query[1], f"{at(node)} scales by its size")
    bias = found.of(others[0]) if others else None
    if bias is not None:
        widths = [found.dimensions.product(list(one)) for one in (query, key, value)]
        if None in widths:
            _lose(node, found)
            return
        found.join(Axis(tuple(term for one in widths if one is not None for term in one.terms)), bias[-1], node)
    for other in (*others[1:], *node.outputs[1:]):
        found.freeze_value(other, f"{at(node)} reads or gives it beside its heads")
    found.note_heads([query[0]], [query[1], value[1]])
    edit_attribute(node, found, "num_heads", query[0])


def _attention(node: ir.Node, found: Coupling) -> None:
    """Of the standard: [batch, rows, heads * size] with the heads in attributes, or [batch, heads, rows, size]."""
    axes = found.of(node.inputs[0])
    others = [input_of(node, index) for index in range(4, len(node.inputs))]
    if axes is None or any(value is not None for value in (*others, *node.outputs[1:])):
        _lose(node, found)
        return
    for value in (input_of(node, 3),):
        found.freeze_value(value, f"it is the mask of {at(node)}")
    if len(axes) == 3:
        _attention_merged(node, found, "q_num_heads", "kv_num_heads")
    else:
        _attention_by_heads(node, found)


def _attention_merged(node: ir.Node, found: Coupling, wide_name: str, narrow_name: str) -> Axis | None:
    """Query and result [batch, rows, heads * size], key and value with fewer heads; return the axis of the latter."""
    wide, narrow = (node.attributes.get_int(name, 0) for name in (wide_name, narrow_name))
    counts = (wide, narrow, narrow, wide)
    values = [*(input_of(node, index) for index in range(3)), node.outputs[0]]
    split = [_heads(node, found, value, count) for value, count in zip(values, counts, strict=True)]
    if any(one is None for one in split) or not narrow or wide % narrow:
        _lose(node, found)
        return None
    query, key, value, result = (one for one in split if one is not None)
    found.join(query[0], result[0], node)
    found.join(key[0], value[0], node)
    found.join(query[1], key[1], node)
    found.join(value[1], result[1], node)
    found.freeze(query[1], f"{at(node)} scales by its size")
    _join_grouped(node, found, query[0], key[0])
    found.note_heads([key[0]], [query[1], value[1]])
    edit_attribute(node, found, wide_name, query[0])
    edit_attribute(node, found, narrow_name, key[0])
    return key[0]


def _group_query_attention(node: ir.Node, found: Coupling) -> None:
    """Of com.microsoft, with query, key and value apart: caches [batch, heads of keys, rows, size] go with these.

    All heads are of one size.
    """
    others = [input_of(node, index) for index in range(3, len(node.inputs))]
    caches = [*others[:2], *node.outputs[1:3]]
    if any(value is not None for value in (*others[7:], *node.outputs[3:])):
        _lose(node, found)
        return
    heads = _attention_merged(node, found, "num_heads", "kv_num_heads")
    split = _heads(node, found, node.outputs[0], node.attributes.get_int("num_heads", 0))
    if split is not None:
        found.freeze(split[1], f"{at(node)} scales by its size")
    for cache in caches:
        axes = found.of(cache)
        for index, axis in enumerate(axes or ()):
            if index == 1 and heads is not None:
                found.join(heads, axis, node)
            else:
                found.freeze(axis, f"it is a cache of {at(node)}")
        if cache is not None and (cache.name or "") and axes is None and heads is not None:
            found.freeze(heads, f"the shape of the cache '{cache.name}' is not known")
    for other in others[2:]:
        found.freeze_value(other, f"{at(node)} reads it beside its heads")


def _join_grouped(node: ir.Node, found: Coupling, query: Axis, key: Axis) -> None:
    """Query head i reads key head i // (query heads / key heads)."""
    if query.size == key.size:
        found.join(query, key, node)
        return
    factors = found.dimensions.split(query, [key.size, query.size // key.size], at(node))
    if factors is None:
        found.freeze(query, f"the groups of {at(node)} cannot be followed")
        found.freeze(key, f"the groups of {at(node)} cannot be followed")
        return
    found.join(factors[0], key, node)


def _attention_by_heads(node: ir.Node, found: Coupling) -> None:
    parts = [found.of(input_of(node, index)) for index in range(3)]
    result = found.of(node.outputs[0])
    if result is None or any(part is None or len(part) != 4 for part in (*parts, result)):
        _lose(node, found)
        return
    query, key, value = (part for part in parts if part is not None)
    found.join(query[1], result[1], node)
    found.join(key[1], value[1], node)
    found.join(query[3], key[3], node)
    found.join(value[3], result[3], node)
    found.freeze(query[3], f"{at(node)} scales by its size")
    if query[1] is not None and key[1] is not None:
        _join_grouped(node, found, query[1], key[1])
    found.note_heads([key[1]], [query[3], value[3]])
    for axis in (*(part[2] for part in (query, key, value, result)), *(part[0] for part in (query, key, value))):
        found.freeze(axis, f"{at(node)} works along it")


def _recurrent(gates: int) -> Rule:
    """Weights [directions, gates * hidden, inputs] and [directions, gates * hidden, hidden]."""

    def rule(node: ir.Node, found: Coupling) -> None:
        data, weight, recurrence = (found.of(input_of(node, index)) for index in range(3))
        if data is None or weight is None or recurrence is None or input_of(node, 7) is not None:
            freeze_all(node, found, f"the layout of {at(node)} is not certain")
            return
        hidden = recurrence[2]
        if hidden is None or node.attributes.get_int("layout", 0) != 0:
            freeze_all(node, found, f"the layout of {at(node)} is not certain")
            return
        found.join(data[-1], weight[2], node)
        for axis, count in ((weight[1], gates), (recurrence[1], gates), (_last(found, input_of(node, 3)), 2 * gates)):
            if axis is None:
                continue
            factors = found.dimensions.split(axis, [count, axis.size // count], at(node))
            if factors is None:
                freeze_all(node, found, f"the gates of {at(node)} cannot be followed")
                return
            found.freeze(factors[0], f"they are the gates of {at(node)}")
            found.join(factors[1], hidden, node)
        for value in (input_of(node, 5), input_of(node, 6), *node.outputs):
            if value is not None and (value.uses() or value.is_graph_output() or value in node.inputs):
                found.join(_last(found, value), hidden, node)
        for value in (*(input_of(node, index) for index in (1, 2, 3, 5, 6)), *node.outputs[1:]):
            directions = found.of(value)
            if directions:
                found.freeze(directions[0], f"they are the directions of {at(node)}")
        every = found.of(node.outputs[0])
        if every:
            found.freeze(every[1], f"they are the directions of {at(node)}")
        found.freeze_value(input_of(node, 4), f"they are the lengths of {at(node)}")
        edit_attribute(node, found, "hidden_size", hidden)

    return rule


def _last(found: Coupling, value: ir.Value | None) -> Axis | None:
    axes = found.of(value)
    return axes[-1] if axes else None


ATTENTION: Mapping[tuple[str, str], Rule] = {
    ("", "Attention"): _attention,
    ("", "GRU"): _recurrent(3),
    ("", "LSTM"): _recurrent(4),
    ("", "RNN"): _recurrent(1),
    ("com.microsoft", "GroupQueryAttention"): _group_query_attention,
    ("com.microsoft", "MultiHeadAttention"): _multi_head_attention,
}
"""Domain and operator -> rule."""
