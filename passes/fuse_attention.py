"""Multi-head attention as one operator.

    q, k, v [batch, queries or keys, heads * size], each split into heads by Reshape and Transpose
    scores = MatMul(q, k transposed) * scale + mask          the scale may lie on q, on k, or on both
    y = Reshape(Transpose(MatMul(Softmax(scores), v)))
    =>
    y = Attention<q_num_heads, kv_num_heads, scale>(q, k, v, mask)

    Softmax -> IsNaN -> Where(, 0, )              goes
    mask with the lowest float in it     =>       Max(mask, lowest / 2)

This is how both torch exporters write eager and scaled-dot-product attention once identities are removed and shapes
are known. Attention is of opset 23; a model of an earlier one is raised where there is something to fuse, and only
there. From 21 on that changes no other operator.

ONNX Runtime's Attention takes minus infinity and the lowest float both as masked, and gives zeros for a query that has
no other keys. That is what a guard against NaN does for minus infinity; where the lowest float marks what is masked,
such a query attends to all keys evenly, so the mask is raised a little to keep that.

It does not fire where the probabilities are read elsewhere too, heads are repeated (grouped queries), the queries or
keys are rotated after the split, or shapes are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.analysis.symbols import Dim
from qgraph.passes import _opsets
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["FuseAttention"]

_COMPATIBLE_SINCE = 21
_ATTENTION_SINCE = 23
_SPLIT = (0, 2, 1, 3)
"""[batch, rows, heads, size] to [batch, heads, rows, size], and back."""
_SPLIT_TRANSPOSED = (0, 2, 3, 1)

Dims: TypeAlias = tuple[Dim, ...]


class _NoMatchError(Exception):
    """The reason why a Softmax is not the heart of an attention that can be fused."""


@dataclass(frozen=True)
class _Heads:
    """A tensor [batch, heads, ...] and the Reshape that split it from [batch, rows, heads * size]."""

    reshape: ir.Node
    dims: Dims
    """batch, rows, heads, size"""
    order: tuple[int, ...]
    """Which of `dims` each axis of the tensor is."""
    scale: float

    @property
    def source(self) -> ir.Value:
        """What is split, as the graph stands: another block's result may have been replaced."""
        value = self.reshape.inputs[0]
        assert value is not None
        return value


@dataclass(frozen=True)
class _Block:
    softmax: ir.Node
    q: _Heads
    k: _Heads
    v: _Heads
    scale: float
    masks: Sequence[ir.Value]
    guarded: bool
    last: ir.Node
    """The Reshape that joins the heads."""


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuse scaled dot-product attention over several heads into one operator."""

    name: ClassVar[str] = "fuse-attention"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Fuse what matches; `skipped` has every Softmax whose result is multiplied with something, and why not."""
        shapes = context.analyse(shapes_of, model)
        opset = model.graph.opset_imports.get("", 0)
        blocks: list[_Block] = []
        skipped: list[Skipped] = []
        for softmax in [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "Softmax")]:
            try:
                block = _Matcher(shapes).block(softmax)
                if block is None:
                    continue
            except _NoMatchError as reason:
                skipped.append(Skipped(qgraph.ir.node_label(softmax), str(reason)))
                continue
            blocks.append(block)
        if not blocks:
            return Report(skipped=skipped)
        if opset < _COMPATIBLE_SINCE:
            _opsets.convert(model, _COMPATIBLE_SINCE)
            context.forget()
            return self.apply(model, context)
        rewriter = _Rewriter(model, shapes)
        for block in blocks:
            rewriter.fuse(block)
        model.graph.opset_imports[""] = max(opset, _ATTENTION_SINCE)
        return Report(changed=len(blocks), skipped=skipped, notes=[f"{len(blocks)} attention blocks fused"])


class _Matcher:
    """Recognizes one attention block around a Softmax."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    def block(self, softmax: ir.Node) -> _Block | None:
        """Return the block, or None for a Softmax that does not weigh anything.

        Raises:
            _NoMatchError: it does, but the block cannot be fused; the text says why.
        """
        probabilities, guarded = self._guard(softmax)
        weigh = next((use.node for use in probabilities.uses() if _is_product(use.node, probabilities)), None)
        if weigh is None:
            return None
        if qgraph.ir.only_consumer(probabilities) is None:
            raise _NoMatchError("its probabilities are used elsewhere too")
        rank = len(self._dims(softmax.inputs[0]))
        if rank != 4 or softmax.attributes.get_int("axis", -1) not in (-1, 3):
            raise _NoMatchError("its input is not [batch, heads, queries, keys], normalized over the keys")
        masks, scores, scale = self._scores(softmax.inputs[0])
        q, k = self._heads(scores.inputs[0], "queries"), self._heads(scores.inputs[1], "keys")
        v = self._heads(weigh.inputs[1], "values")
        if q.order != _SPLIT or k.order != _SPLIT_TRANSPOSED or v.order != _SPLIT:
            raise _NoMatchError("queries, keys and values are not laid out [batch, heads, rows, size] for the products")
        if not q.dims[2] == k.dims[2] == v.dims[2] or not q.dims[0] == k.dims[0] == v.dims[0]:
            raise _NoMatchError("queries, keys and values differ in batch or number of heads")
        if q.dims[3] != k.dims[3] or k.dims[1] != v.dims[1]:
            raise _NoMatchError("queries, keys and values do not fit together")
        if v.scale != 1.0:
            raise _NoMatchError("its values are scaled")
        for mask in masks:
            self._check_mask(mask, q, k)
        last = self._join(weigh.outputs[0], (q.dims[0], q.dims[1], v.dims[2], v.dims[3]))
        return _Block(softmax, q, k, v, scale * q.scale * k.scale, masks, guarded, last)

    def _dims(self, value: ir.Value | None) -> Dims:
        dims = self._shapes.dims(value) if value is not None else None
        if dims is None:
            raise _NoMatchError(f"the shape of '{value.name if value else ''}' is not known")
        return tuple(dims)

    def _guard(self, softmax: ir.Node) -> tuple[ir.Value, bool]:
        """Return the probabilities, behind the Where that replaces NaN by zero if there is one."""
        plain = softmax.outputs[0]
        readers = [use.node for use in plain.uses()]
        where = next((node for node in readers if qgraph.ir.is_op(node, "Where")), None)
        test = next((node for node in readers if qgraph.ir.is_op(node, "IsNaN")), None)
        if where is None or test is None or len(readers) != 2 or plain.is_graph_output():
            return plain, False
        zero = _scalar(where.inputs[1])
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
            scaled = _scaled(node)
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
        raise _NoMatchError("what it normalizes is not a product of queries and keys, scaled and masked by addition")

    def _leads_to_product(self, value: ir.Value) -> bool:
        node = value.producer()
        while node is not None:
            if qgraph.ir.is_op(node, "MatMul"):
                return True
            scaled = _scaled(node)
            above = scaled[0] if scaled is not None else node.inputs[0] if qgraph.ir.is_op(node, "Add") else None
            node = above.producer() if above is not None else None
        return False

    def _heads(self, value: ir.Value | None, what: str) -> _Heads:
        """Follow a factor of a product up to the Reshape that splits the heads."""
        order: tuple[int, ...] = (0, 1, 2, 3)
        scale = 1.0
        while value is not None and (node := value.producer()) is not None:
            scaled = _scaled(node)
            if scaled is not None:
                value, factor = scaled
                scale *= factor
            elif qgraph.ir.is_op(node, "Transpose") and len(node.attributes.get_ints("perm", ())) == 4:
                perm = node.attributes.get_ints("perm")
                order = tuple(perm[axis] for axis in order)
                value = node.inputs[0]
            elif qgraph.ir.is_op(node, "Reshape"):
                source, split = node.inputs[0], self._dims(value)
                if source is None or not _splits(self._dims(source), split):
                    break
                return _Heads(node, split, order, scale)
            else:
                break
        raise _NoMatchError(f"its {what} are not split into heads from one [batch, rows, hidden] tensor")

    def _check_mask(self, mask: ir.Value, q: _Heads, k: _Heads) -> None:
        dims = self._dims(mask)
        wanted: Dims = (q.dims[0], q.dims[2], q.dims[1], k.dims[1])
        fits = len(dims) <= 4 and all(d in (1, w) for d, w in zip(dims[::-1], wanted[::-1], strict=False))
        if not fits or not dims or dims[-1] != wanted[-1]:
            raise _NoMatchError(f"its mask '{mask.name}' is not [batch, heads, queries, keys]")

    def _join(self, context: ir.Value, dims: Dims) -> ir.Node:
        transpose = qgraph.ir.only_consumer(context)
        if transpose is not None and qgraph.ir.is_op(transpose, "Transpose"):
            reshape = qgraph.ir.only_consumer(transpose.outputs[0])
            if (
                tuple(transpose.attributes.get_ints("perm", ())) == _SPLIT
                and reshape is not None
                and qgraph.ir.is_op(reshape, "Reshape")
                and _splits(self._dims(reshape.outputs[0]), dims)
            ):
                return reshape
        raise _NoMatchError("its heads are not joined again to [batch, queries, hidden]")


def _is_product(node: ir.Node, left: ir.Value) -> bool:
    return qgraph.ir.is_op(node, "MatMul") and node.inputs[0] is left


def _scalar(value: ir.Value | None) -> float | None:
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.size != 1:
        return None
    array = qgraph.ir.constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.dtype.kind == "f" else None


def _scaled(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Return x and c for c * x, x * c or x / c with a constant c that is one number."""
    if not qgraph.ir.is_op(node, "Mul", "Div"):
        return None
    left, right = node.inputs
    factor = _scalar(right)
    if factor is not None and left is not None and factor != 0.0:
        return left, factor if node.op_type == "Mul" else 1.0 / factor
    factor = _scalar(left)
    if factor is not None and right is not None and node.op_type == "Mul":
        return right, factor
    return None


def _splits(joined: Dims, split: Dims) -> bool:
    """Tell whether [batch, rows, heads * size] and [batch, rows, heads, size] are these."""
    if len(joined) != 3 or len(split) != 4 or joined[:2] != split[:2]:
        return False
    heads, size = split[2:]
    return isinstance(heads, int) and isinstance(size, int) and joined[2] == heads * size


@dataclass
class _Rewriter:
    """Puts Attention in the place of blocks.

    What is computed of a mask that several blocks share stands before the first of them, once.
    """

    model: ir.Model
    shapes: Shapes
    _masks: dict[tuple[ir.Value, ir.Graph, bool], ir.Value] = field(default_factory=dict)

    def fuse(self, block: _Block) -> None:
        softmax = block.softmax
        inputs: list[ir.Value] = [block.q.source, block.k.source, block.v.source]
        masks = [self._mask(mask, block) for mask in block.masks]
        if masks:
            inputs.append(self._sum(masks, block.last))
        heads = block.q.dims[2]
        assert isinstance(heads, int)
        attributes: dict[str, int | float] = {
            "q_num_heads": heads,
            "kv_num_heads": heads,
            "scale": float(np.float32(block.scale)),
        }
        name = softmax.name.replace("Softmax", "Attention").replace("softmax", "attention") if softmax.name else None
        attention = ir.node("Attention", inputs, attributes, name=name)
        before = block.last.inputs[0]
        qgraph.ir.replace_node(block.last, attention)
        _discard_unread(before)

    def _sum(self, masks: Sequence[ir.Value], before: ir.Node) -> ir.Value:
        total = masks[0]
        for mask in masks[1:]:
            total = self._insert(before, "Add", [total, mask], mask)
        return total

    def _mask(self, mask: ir.Value, block: _Block) -> ir.Value:
        """Return the mask as the operator wants it: above the lowest float, with one row for each query."""
        softmax = block.softmax
        graph = softmax.graph
        assert graph is not None
        key = (mask, graph, block.guarded)
        if key in self._masks:
            return self._masks[key]
        result = mask
        dtype = mask.dtype if mask.dtype is not None else ir.DataType.FLOAT
        if _may_be_lowest(mask, dtype, guarded=block.guarded):
            limit = np.array(np.finfo(dtype.numpy()).min / 2, dtype.numpy())
            least = qgraph.ir.initializer(self.model.graph, f"{mask.name}_least", limit)
            result = self._insert(softmax, "Max", [result, least], mask)
        dims = self.shapes.dims(mask)
        if dims is not None and tuple(dims[-2:-1]) != (block.q.dims[1],):
            result = self._expanded(result, block)
        self._masks[key] = result
        return result

    def _expanded(self, mask: ir.Value, block: _Block) -> ir.Value:
        """Repeat the one row of a mask for every query."""
        one = qgraph.ir.initializer(self.model.graph, f"{mask.name}_one", np.array([1], np.int64))
        queries = self._insert(block.softmax, "Shape", [block.q.source], mask, start=1, end=2)
        shape = self._insert(block.softmax, "Concat", [one, one, queries, one], mask, axis=0)
        return self._insert(block.softmax, "Expand", [mask, shape], mask)

    def _insert(
        self, before: ir.Node, op_type: str, inputs: list[ir.Value], like: ir.Value, **attributes: int
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.name = qgraph.ir.fresh_name(self.model.graph, f"{like.name}_{op_type.lower()}")
        node.outputs[0].name = node.name
        if op_type in ("Max", "Expand", "Add"):
            node.outputs[0].type = like.type
        qgraph.ir.insert_before(before, node)
        return node.outputs[0]


def _may_be_lowest(mask: ir.Value, dtype: ir.DataType, *, guarded: bool) -> bool:
    """Tell whether the lowest float may be in a mask; behind a guard, an unknown mask has minus infinity instead."""
    node = mask.producer()
    branches = node.inputs[1:] if node is not None and qgraph.ir.is_op(node, "Where") else [mask]
    constants = [array for value in branches if (array := qgraph.ir.constant(value)) is not None]
    if len(constants) < len(branches):
        return not guarded
    return any(bool((array == np.finfo(dtype.numpy()).min).any()) for array in constants)


def _discard_unread(value: ir.Value | None) -> None:
    """Remove the node that makes a value nobody reads, and so on upwards."""
    pending = [value]
    while pending:
        one = pending.pop()
        node = one.producer() if one is not None else None
        if node is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
            continue
        above = list(node.inputs)
        qgraph.ir.discard(node)
        pending += above
