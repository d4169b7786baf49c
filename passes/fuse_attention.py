"""Multi-head attention as one operator.

    q, k, v [batch, queries or keys, heads * size], each split into heads by Reshape and Transpose
    scores = MatMul(q, k transposed) * scale + mask          the scale may lie on q, on k, or on both
    y = Reshape(Transpose(MatMul(Softmax(scores), v)))
    =>
    y = Attention<q_num_heads, kv_num_heads, scale>(q, k, v, mask)

    RotaryEmbedding(q split)                      =>    RotaryEmbedding<num_heads>(q), before Attention; k likewise
    k, v repeated for groups of query heads       =>    kv_num_heads < q_num_heads
    q heads of a group laid below one another     =>    the same
    Concat(past, k split), a graph output maybe   =>    past_key of Attention, and present_key; v likewise
    q, k, v split from one [batch, rows, 3 * hidden] tensor    =>    Split of it
    Softmax -> IsNaN -> Where(, 0, )              goes
    mask with the lowest float in it     =>       Max(mask, lowest / 2)

This is how both torch exporters write eager and scaled-dot-product attention once identities are removed and shapes
are known. Attention is of opset 23; a model of an earlier one is raised where there is something to fuse, and only
there. From 21 on that changes no other operator.

ONNX Runtime's Attention takes minus infinity and the lowest float both as masked, and gives zeros for a query that has
no other keys. That is what a guard against NaN does for minus infinity; where the lowest float marks what is masked,
such a query attends to all keys evenly, so the mask is raised a little to keep that.

Its kernel refuses batches and sequences of no rows, which plain operators let through; an empty cache it takes.

Rotations are found as `fuse-rotary` writes them; those of keys stand before the cache. It does not fire where the
probabilities are read elsewhere too, where a cache is laid out otherwise, or where shapes are not known.

What is left alone was measured with ONNX Runtime 1.31.1 on the CPU, if nothing else is said:

    stacked_heads    four or more query heads on one key of a cache of 512 rows or more, below one another, take 0.5 to
                     0.85 times as long for one row as the operator does, which is a tenth faster for a prompt
    grouped          the CUDA provider's Attention, by its source of 1.25, fails where heads share keys under a mask
    is_causal        is never set, and a causal mask stays: it takes 0.94 to 1.06 times as long, for 1 to 512 rows
    GroupQueryAttention of com.microsoft is not written: it takes 1.1 to 2.1 times as long, refuses several rows of
                     several samples on a cache, and gives other values to a query whose every key is masked
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
    grouped: bool = field(default=True, metadata={"help": "fuse where several query heads share keys and values"})
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
            reason = self._better_left(block)
            if reason is not None:
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

    def _better_left(self, block: Block) -> str | None:
        """Return why a block that could be fused is left, by the options."""
        if not self.grouped and block.q.dims[2] != block.k.dims[2]:
            return f"its {block.q.dims[2]} query heads share {block.k.dims[2]} of keys, which is left alone as asked"
        if block.k.cache is not None and block.stacked > self.stacked_heads > 0:
            return f"its {block.stacked} heads on one key of the cache multiply faster below one another"
        return None
