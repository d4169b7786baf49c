"""Rotary position embedding as one operator.

    h = [-x[..., d/2:], x[..., :d/2]]         x [batch, heads, rows, d]
    y = x * cos + h * sin                     cos, sin: both halves the same, [rows, d], or more axes
    =>
    y = RotaryEmbedding(x, cos[..., :d/2], sin[..., :d/2])

This is how exporters write models of the Llama kind ("rotate_half"). RotaryEmbedding is of opset 23; a model of opset
21 or 22 is raised, which changes no other operator. It wants cosines for every sample, [batch, rows, d/2]: they are cut
and repeated once for all layers. Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding"
(2021).

It does not fire where the two halves of cosines or sines are not known to be the same (a constant table, or
Cos(Concat(f, f))), where only a part of d is rotated, and where shapes are not known; with `table`, where the runtime
has no RotaryEmbedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.analysis.symbols import Dim
from qgraph.passes import _opsets
from qgraph.passes._kernels import TABLE_HELP, unraisable
from qgraph.passes._rules import Rule, rewrite
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["FuseRotary"]

_ROTARY_SINCE = 23


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Fuse the rotation of queries and keys by their positions into one operator."""

    name: ClassVar[str] = "fuse-rotary"
    table: str = field(default="", metadata={"help": TABLE_HELP})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Fuse what matches; `skipped` has a model whose opset is too old, or whose runtime has no such operator."""
        rotations = [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "Neg")]
        if not rotations:
            return Report()
        skipped = _opsets.too_old(model, "RotaryEmbedding", _ROTARY_SINCE, rotations, least=_opsets.COMPATIBLE)
        if skipped:
            return Report(skipped=skipped)
        reason = unraisable(model, _ROTARY_SINCE, "RotaryEmbedding", self.table)
        if reason is not None:
            return Report(skipped=[Skipped(qgraph.ir.node_label(node), reason) for node in rotations])
        writer = _Writer(model, context.analyse(shapes_of, model))
        count = rewrite(model, [Rule(_rotated, partial(_written, writer))], forwards=True)
        if not count:
            return Report()
        _opsets.raise_to(model, _ROTARY_SINCE)
        return Report(changed=count, notes=[f"{count} rotary embeddings fused"])


def _rotated(op: Any, x: Any, cos: Any, sin: Any, start: Any, half: Any) -> Any:
    low = op.Slice(x, start, half, _allow_other_inputs=True, _outputs=["low"])
    high = op.Slice(x, half, _allow_other_inputs=True, _outputs=["high"])
    turned = op.Concat(op.Neg(high), low, _outputs=["turned"])
    return op.Add(op.Mul(x, cos), op.Mul(turned, sin))


def _written(
    writer: _Writer,
    x: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    low: ir.Value,
    high: ir.Value,
    turned: ir.Value,
    **_: Any,
) -> ir.Node | None:
    dims = writer.shapes.dims(x)
    if dims is None or len(dims) != 4 or not isinstance(dims[3], int) or dims[3] % 2:
        return None
    concat = turned.producer()
    assert concat is not None
    whole = dims[3]
    halves = _cut(low, writer.shapes) == (0, whole // 2) and _cut(high, writer.shapes) == (whole // 2, whole)
    if not halves or concat.attributes.get_int("axis") not in (-1, 3):
        return None
    if not (_repeats(cos, writer.shapes) and _repeats(sin, writer.shapes)):
        return None
    before = next(use.node for use in x.uses() if use.node.outputs[0] is low)
    tables = [writer.table(one, x, before) for one in (cos, sin)]
    return ir.node("RotaryEmbedding", [x, *tables]) if all(tables) else None


def _cut(value: ir.Value, shapes: Shapes) -> tuple[int, int] | None:
    """Return where a Slice along the last axis starts and ends, or None for another."""
    node = value.producer()
    dims = shapes.dims(node.inputs[0]) if node is not None and node.inputs[0] is not None else None
    if node is None or dims is None:
        return None
    arrays = [shapes.array(one) for one in node.inputs[1:]]
    if len(arrays) < 3 or any(array is None or array.size != 1 for array in arrays):
        return None
    start, end, axis, step = (int(array.reshape(-1)[0]) for array in [*arrays, np.array([1])][:4] if array is not None)
    size = dims[-1]
    if axis not in (-1, len(dims) - 1) or step != 1 or not isinstance(size, int) or start < 0 or end < 0:
        return None
    return min(start, size), min(end, size)


def _repeats(value: ir.Value | None, shapes: Shapes) -> bool:
    """Tell whether the two halves of the last axis are known to be the same."""
    while value is not None:
        array = qgraph.ir.constant(value)
        if array is not None:
            size = array.shape[-1] if array.ndim else 0
            return size % 2 == 0 and bool(np.array_equal(array[..., : size // 2], array[..., size // 2 :]))
        node = value.producer()
        if node is None:
            return False
        if qgraph.ir.is_op(node, "Concat"):
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and _is_last(node, shapes)
        if not _keeps_last_axis(node, shapes):
            return False
        value = node.inputs[0]
    return False


def _is_last(concat: ir.Node, shapes: Shapes) -> bool:
    axis, dims = concat.attributes.get_int("axis"), shapes.dims(concat.outputs[0])
    return axis == -1 or (dims is not None and axis == len(dims) - 1)


def _keeps_last_axis(node: ir.Node, shapes: Shapes) -> bool:
    """Tell whether what is the same in both halves of the input is so in those of the output."""
    if qgraph.ir.is_op(node, "Cos", "Sin", "Cast"):
        return True
    if qgraph.ir.is_op(node, "Unsqueeze", "Slice"):
        unsqueezes = node.op_type == "Unsqueeze"
        dims = shapes.dims(node.outputs[0])
        axes = shapes.array(node.inputs[1 if unsqueezes else 3]) if unsqueezes or len(node.inputs) > 3 else None
        return axes is not None and dims is not None and bool(((axes >= 0) & (axes < len(dims) - 1)).all())
    if qgraph.ir.is_op(node, "Mul"):
        array = shapes.array(node.inputs[1])
        return array is not None and array.size == 1
    return qgraph.ir.is_op(node, "Gather") and node.attributes.get_int("axis", 0) == 0


def _fits(size: Dim, rows: Dim) -> bool:
    """Tell whether a table has as many rows as there are, or as there may be at most: `min(512,seq)` for `seq`."""
    return size == rows or (not isinstance(size, int) and not isinstance(rows, int) and f",{rows})" in str(size))


@dataclass
class _Writer:
    """Makes tables of cosines and sines as RotaryEmbedding wants them, each once."""

    model: ir.Model
    shapes: Shapes
    _tables: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def table(self, value: ir.Value, x: ir.Value, before: ir.Node) -> ir.Value | None:
        """Return the first half of `value` as [batch, rows, d / 2], computed before a node; None if it does not fit."""
        dims, wanted = self.shapes.dims(value), self.shapes.dims(x)
        if dims is None or wanted is None or len(dims) < 2 or dims[-1] != wanted[-1] or not _fits(dims[-2], wanted[-2]):
            return None
        leading = dims[:-2]
        if len(leading) > 2 or any(one != 1 for one in leading[1:]) or (leading and leading[0] not in (1, wanted[0])):
            return None
        if len(leading) == 1 and leading[0] != 1:
            return None
        key = (value, wanted[0], before.graph)
        if key not in self._tables:
            self._tables[key] = self._cut(value, x, before, len(dims))
        return self._tables[key]

    def _cut(self, value: ir.Value, x: ir.Value, before: ir.Node, rank: int) -> ir.Value:
        dims = self.shapes.dims(value)
        assert dims is not None
        size = dims[-1]
        assert isinstance(size, int)
        ends = [self._number(one) for one in (0, size // 2, rank - 1)]
        half = self._insert("Slice", [value, *ends], before)
        if rank == 4:
            half = self._insert("Squeeze", [half, self._number(1)], before)
        elif rank == 2:
            half = self._insert("Unsqueeze", [half, self._number(0)], before)
        if rank == 4 and dims[0] != 1:
            return half
        batch = self._insert("Shape", [x], before, start=0, end=1)
        shape = self._insert("Concat", [batch, self._number(1), self._number(1)], before, axis=0)
        return self._insert("Expand", [half, shape], before)

    def _number(self, number: int) -> ir.Value:
        key = ("number", number)
        if key not in self._tables:
            self._tables[key] = qgraph.ir.initializer(
                self.model.graph, f"rotary_{number}", np.array([number], np.int64)
            )
        return self._tables[key]

    def _insert(self, op_type: str, inputs: list[ir.Value], before: ir.Node, **attributes: int) -> ir.Value:
        name = qgraph.ir.fresh_name(self.model.graph, f"{inputs[0].name}_{op_type.lower()}")
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        qgraph.ir.insert_before(before, node)
        return node.outputs[0]
