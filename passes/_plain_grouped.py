"""ONNX Runtime's GroupQueryAttention in plain operators.

    GroupQueryAttention(q, k, v, past, lengths, total)    =>    q, k rotated where asked for
                                                                keys = those of the past, and k behind them
                                                                MatMul(Softmax(MatMul(q, keysᵀ) * scale + mask), values)

A cache is a buffer of a known size, in which each sample has a length of its own: keys go behind it, a query sees what
stands before it, and zeros follow. A call with as many queries as tokens in total is a prompt, which starts an empty
one. Left alone: caches of a size that is not known before, or of integers, sinks, norms of queries and keys, and scores
that are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.passes._plain_attention import attend, heads_apart, heads_joined, repeated
from qgraph.passes._plain_operators import Emitter, Rewriting, UnfitError, static_sizes
from qgraph.passes._plain_rotary import rotate
from qgraph.passes._plain_windows import number

__all__ = ["MICROSOFT", "STANDARD"]

_REFUSED = {11: "a sink", 12: "a cache of integers", 13: "a cache of integers", 14: "a norm of queries", 15: "a norm"}
"""Inputs that this does not take."""
_DEFAULTS = {"causal": 1, "qk_output": 0, "sliding_window_cache": 0, "smooth_softmax": 0}
"""Attributes of which this takes only these values."""


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is known of a node before it runs.

    Attributes:
        heads: of queries.
        groups: heads of keys and values.
        width: of a head.
        rows: queries of a sample.
        total: tokens of the longest sample.
        buffer: size of the cache that comes in.
    """

    heads: int
    groups: int
    width: int
    rows: int
    total: int
    buffer: int

    @property
    def is_prompt(self) -> bool:
        return self.rows == self.total

    @property
    def cache(self) -> int:
        """Size of the cache that comes out."""
        return max(self.buffer, self.total)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where things stand in a cache, int64.

    Attributes:
        starts: how long the pasts are, [batch, 1]; None in a prompt.
        rows: of the queries, [batch or 1, rows].
        seen: the last place that each query sees, [batch, rows]: its own, or the last of a sample that ends before.
    """

    starts: ir.Value | None
    rows: ir.Value
    seen: ir.Value


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _grouped(node: ir.Node, emit: Emitter) -> Sequence[ir.Value | None]:
    form = _form(node)
    places = _places(node, emit, form)
    q, k, v = _heads(node, emit, form)
    if node.attributes.get_int("do_rotary", 0):
        q, k = _rotated(node, emit, form, q, k, places.rows)
    keys, values = (
        _cached(emit.within(name), form, past, new, places.starts)
        for name, past, new in (("keys", _input(node, 3), k), ("values", _input(node, 4), v))
    )
    seen_keys, seen_values = (
        repeated(emit, _shortened(emit, form, one), form.groups, form.heads) for one in (keys, values)
    )
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(form.width)
    cap = node.attributes.get_float("softcap", 0.0)
    result = attend(
        emit, q, seen_keys, seen_values, number(emit, "scale", node.inputs[0], scale), _mask(node, emit, form, places),
        number(emit, "cap", node.inputs[0], cap) if cap else None,
    )  # fmt: skip
    return [heads_joined(emit, result, form.heads * form.width), keys, values][: len(node.outputs)]


def _form(node: ir.Node) -> _Form:
    refused = [what for index, what in _REFUSED.items() if _input(node, index) is not None]
    other = [name for name, value in _DEFAULTS.items() if node.attributes.get_int(name, value) != value]
    if refused or other:
        raise UnfitError(f"it has {refused[0] if refused else f'{other[0]}={node.attributes.get_int(other[0])}'}")
    if node.attributes.get_int("do_rotary", 0):
        static_sizes(_input(node, 7), [1], "the width of its tables is")
    heads, groups = node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
    rows, hidden = static_sizes(node.inputs[0], [1, 2], "a size of its queries is")
    past, total = _input(node, 3), qgraph.ir.constant(_input(node, 6))
    buffer = 0 if past is None else static_sizes(past, [2], "the size of its cache is")[0]
    if total is None and not buffer:
        total = np.asarray(rows)
    if total is None:
        raise UnfitError("the number of its tokens is computed: fix the shape that it is taken from")
    width = hidden // (heads if _input(node, 1) is not None else heads + 2 * groups)
    return _Form(heads, groups, width, rows, int(total.reshape(-1)[0]), buffer)


def _places(node: ir.Node, emit: Emitter, form: _Form) -> _Places:
    rows = emit.constant("rows", np.arange(form.rows, dtype=np.int64)[None])
    last = emit("Reshape", emit("Cast", node.inputs[5], to=int(ir.DataType.INT64)), emit.integers("samples", [-1, 1]))
    if form.is_prompt:
        return _Places(None, rows, emit("Min", rows, last))
    starts = emit("Sub", last, emit.constant("before", np.asarray(form.rows - 1, np.int64)))
    places = emit("Add", starts, rows)
    return _Places(starts, places, places)


def _heads(node: ir.Node, emit: Emitter, form: _Form) -> list[ir.Value]:
    parts = list(node.inputs[:3])
    counts = (form.heads, form.groups, form.groups)
    if parts[1] is None and parts[0] is not None:
        parts = list(emit.split(parts[0], [count * form.width for count in counts], -1))
    return [
        heads_apart(emit, part, count, form.width, name) for part, count, name in zip(parts, counts, "qkv", strict=True)
    ]


def _rotated(
    node: ir.Node, emit: Emitter, form: _Form, q: ir.Value, k: ir.Value, places: ir.Value
) -> list[ir.Value]:  # fmt: skip
    told = _input(node, 9)
    axis = emit.integers("head", [1])
    tables = [emit("Gather", node.inputs[index], places if told is None else told, axis=0) for index in (7, 8)]
    cosine, sine = (emit("Unsqueeze", table, axis) for table in tables)
    (half,) = static_sizes(node.inputs[7], [1], "the width of its tables is")
    interleaved = bool(node.attributes.get_int("rotary_interleaved", 0))
    return [rotate(emit.within(f"{name}_turned"), one, cosine, sine, form.width, half, interleaved=interleaved)
            for name, one in (("q", q), ("k", k))]  # fmt: skip


def _cached(emit: Emitter, form: _Form, past: ir.Value | None, new: ir.Value, starts: ir.Value | None) -> ir.Value:
    """Emit the cache that comes out, [batch, groups, cache, width]."""
    if starts is None or past is None:
        behind = form.cache - form.rows
        return emit("Pad", new, emit.integers("pads", [0, 0, 0, 0, 0, 0, behind, 0])) if behind else new
    slots = emit.constant("slots", np.arange(form.cache, dtype=np.int64)[None])
    beyond = emit("Sub", slots, starts)  # slot 0 is that of the first new key
    first, last, buffer, count = (
        emit.constant(name, np.asarray(value, np.int64))
        for name, value in (("first", 0), ("last", form.rows - 1), ("buffer", form.buffer), ("count", form.rows))
    )
    moved = emit("Add", emit("Clip", beyond, first, last), buffer)
    source = emit("Where", emit("Less", slots, starts), slots, moved)
    axes = emit.integers("axes", [1, 3])
    shape = emit.integers("shape", [1, form.groups, form.cache, form.width])
    spread = emit("Expand", emit("Unsqueeze", source, axes), shape)
    found = emit("GatherElements", emit.join([past, new], 2), spread, axis=2)
    filled = emit("Less", beyond, count)
    return emit("Where", emit("Unsqueeze", filled, axes), found, number(emit, "nothing", past, 0.0))


def _shortened(emit: Emitter, form: _Form, value: ir.Value) -> ir.Value:
    """Emit the part of a cache that may be filled."""
    if form.cache == form.total:
        return value
    return emit.split(value, [form.total, form.cache - form.total], 2)[0]


def _mask(node: ir.Node, emit: Emitter, form: _Form, places: _Places) -> ir.Value:
    """Emit what is added to the scores, [batch or 1, heads or 1, rows, total]."""
    window, added = node.attributes.get_int("local_window_size", -1), _input(node, 10)
    axes = emit.integers("query", [1, 3])
    slots = emit.constant("seen", np.arange(form.total, dtype=np.int64))
    visible = emit("LessOrEqual", slots, emit("Unsqueeze", places.seen, axes))
    if window > 0:
        first = emit("Sub", emit("Unsqueeze", places.rows, axes), emit.constant("window", np.asarray(window, np.int64)))
        visible = emit("And", visible, emit("Greater", slots, first))
    near, far = (number(emit, name, node.inputs[0], value) for name, value in (("near", 0.0), ("far", -math.inf)))
    mask = emit("Where", visible, near, far)
    return mask if added is None else emit("Add", mask, added)


STANDARD: Mapping[str, Rewriting] = {}
MICROSOFT: Mapping[str, Rewriting] = {"GroupQueryAttention": _grouped}
