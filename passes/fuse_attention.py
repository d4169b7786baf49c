"""Multi-head attention as one operator.

    q, k, v [batch, queries or keys, heads * size], each split into heads by Reshape and Transpose
    scores = MatMul(q, k transposed) * scale + mask          the scale may lie on q, on k, or on both
    y = Reshape(Transpose(MatMul(Softmax(scores), v)))
    =>
    y = Attention<q_num_heads, kv_num_heads, scale>(q, k, v, mask)

    RotaryEmbedding(q split)                      =>    RotaryEmbedding<num_heads>(q), before Attention; k likewise
    k, v repeated for groups of query heads       =>    kv_num_heads < q_num_heads
    query heads of a group laid below one another =>    the same
    Concat(past, k split), a graph output perhaps =>    past_key of Attention, and present_key; v likewise
    q, k, v split from one [batch, rows, 3 * hidden] tensor    =>    Split of it
    Softmax -> IsNaN -> Where(, 0, )              goes
    mask with the lowest float in it     =>       Max(mask, lowest / 2)

This is how both torch exporters write eager and scaled-dot-product attention once identities are removed and shapes
are known. Attention is of opset 23; a model of an earlier one is raised where there is something to fuse, and only
there. From 21 on that changes no other operator.

ONNX Runtime's Attention takes minus infinity and the lowest float both as masked, and gives zeros for a query that has
no other keys. That is what a guard against NaN does for minus infinity; where the lowest float marks what is masked,
such a query attends to all keys evenly, so the mask is raised a little to keep that.

Rotations are found as `fuse-rotary` writes them; those of keys stand before the cache. It does not fire where the
probabilities are read elsewhere too, where a cache is laid out otherwise, or where shapes are not known.

One kernel for all of a block saves more than it costs, with one exception, on the CPU, measured with ONNX Runtime
1.31.1: four or more query heads on one key of a cache, laid below one another, take 0.5 to 0.9 times as long for one
row as the operator. `stacked_heads` leaves them. com.microsoft.GroupQueryAttention is not written: on the CPU it takes
1.1 to 1.8 times as long as Attention, it refuses several rows of several samples on a cache, and a query without any
key of its own gets other values from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import shapes_of
from qgraph.passes import _opsets
from qgraph.passes._attention_block import Block, NoMatchError
from qgraph.passes._attention_match import Matcher
from qgraph.passes._attention_write import Rewriter
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["FuseAttention"]

_COMPATIBLE_SINCE = 21
_ATTENTION_SINCE = 23


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuse scaled dot-product attention over several heads into one operator."""

    name: ClassVar[str] = "fuse-attention"
    stacked_heads: int = field(
        default=0,
        metadata={"help": "most heads on one key of a cache, below one another, that are fused; 0: any number"},
    )

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Fuse what matches; `skipped` has every Softmax whose result is multiplied with something, and why not."""
        shapes = context.analyse(shapes_of, model)
        opset = model.graph.opset_imports.get("", 0)
        blocks: list[Block] = []
        skipped: list[Skipped] = []
        for softmax in [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "Softmax")]:
            try:
                block = Matcher(shapes).block(softmax)
                if block is None:
                    continue
            except NoMatchError as error:
                skipped.append(Skipped(qgraph.ir.node_label(softmax), str(error)))
                continue
            if block.k.cache is not None and block.stacked > self.stacked_heads > 0:
                reason = f"its {block.stacked} heads on one key of the cache multiply faster below one another"
                skipped.append(Skipped(qgraph.ir.node_label(softmax), reason))
                continue
            blocks.append(block)
        if not blocks:
            return Report(skipped=skipped)
        if opset < _COMPATIBLE_SINCE:
            _opsets.convert(model, _COMPATIBLE_SINCE)
            context.forget()
            return self.apply(model, context)
        rewriter = Rewriter(model, shapes)
        for block in blocks:
            rewriter.fuse(block)
        model.graph.opset_imports[""] = max(opset, _ATTENTION_SINCE)
        return Report(changed=len(blocks), skipped=skipped, notes=[f"{len(blocks)} attention blocks fused"])
