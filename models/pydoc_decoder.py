"""``pydoc_decoder``: a Llama-style decoder over bytes, trained on the Python help topics.

::

    input_ids [n, s] int64, s <= 512
      embedding 256 x 256, also the output layer (tied)
      4 layers   x + attention(RMSNorm(x))    q 256x512, k and v 256x256, o 512x256; 8 heads of 64 on 4 key/value heads
                 x + SwiGLU(RMSNorm(x))       gate and up 256x768, down 768x256
      RMSNorm, product with the embedding
    logits [n, s, 256]

Every matrix dimension is a multiple of 256, as k-quants and large groups need. 4.0 million parameters. Everything is
decomposed into primitive operators, as torch's exporter writes a Llama: RMSNorm as Pow, ReduceMean, Sqrt, Div, Mul;
rotary embedding (Su et al., 2021, halves split) from computed positions; grouped-query attention (Ainslie et al.,
2023) by Unsqueeze, Expand, Reshape; SwiGLU (Shazeer, 2020) as Sigmoid and Mul; the causal mask compared from positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.models import checkpoint, corpus, data
from qgraph.models.graph import GraphWriter

__all__ = ["NAME", "REFERENCE_PROMPT", "SHAPE", "WINDOW", "Shape", "build", "dataset"]

NAME = "pydoc_decoder"
REFERENCE_PROMPT = b'The "while" statement is used for repeated execution as long as '
"""Input of the answer recorded in the checkpoint."""
WINDOW = 256
"""Bytes in one sample; also the length of the training windows."""

_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Shape:
    """Dimensions of the decoder."""

    vocabulary: int = 256
    hidden: int = 256
    feed_forward: int = 768
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    max_positions: int = 512
    rope_base: float = 10000.0
    epsilon: float = 1e-5


SHAPE = Shape()


def build() -> ir.Model:
    """Return the trained decoder: ``input_ids`` int64 ``[batch, seq]`` -> ``logits`` float32 ``[batch, seq, 256]``.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    writer = GraphWriter(NAME, checkpoint.load(NAME).parameters)
    ids = writer.input("input_ids", ir.DataType.INT64, ["batch", "seq"])
    with writer.scope("embed_tokens"):
        embedding = writer.parameter("weight")
        x = writer.op("Gather", embedding, ids)
    positions = _positions(writer, ids)
    mask = _causal_mask(writer, positions)
    rotary = _rotary_tables(writer, positions)
    for index in range(SHAPE.layers):
        with writer.scope(f"layers.{index}"):
            x = writer.op("Add", x, _attention(writer, _rms_norm(writer, "input_layernorm", x), rotary, mask))
            x = writer.op("Add", x, _feed_forward(writer, _rms_norm(writer, "post_attention_layernorm", x)))
    x = _rms_norm(writer, "norm", x)
    with writer.scope("lm_head"):
        logits = writer.op("MatMul", x, writer.op("Transpose", embedding, attributes={"perm": [1, 0]}))
    return writer.model(logits, "logits", ["batch", "seq", SHAPE.vocabulary])


def dataset() -> data.Dataset:
    """Return windows of 256 bytes: 200 of the training text, all of the held-out text, and its next bytes as labels.

    Raises:
        UserError: this Python was built without ``pydoc_data``.
    """
    inputs, labels = corpus.next_byte_windows(corpus.held_out_text(), WINDOW)
    calibration = corpus.windows(corpus.training_text(), WINDOW, data.CALIBRATION_SAMPLES)
    return data.Dataset(calibration={"input_ids": calibration}, evaluation={"input_ids": inputs}, labels=labels)


def _positions(writer: GraphWriter, ids: ir.Value) -> ir.Value:
    """Write int64 ``[seq]``: 0, 1, 2 ..."""
    length = writer.op("Gather", writer.op("Shape", ids), writer.integer(1))
    return writer.op("Range", writer.integer(0), length, writer.integer(1))


def _causal_mask(writer: GraphWriter, positions: ir.Value) -> ir.Value:
    """Write float32 ``[seq, seq]``: 0 where a row may look, the lowest float elsewhere."""
    with writer.scope("causal_mask"):
        rows = writer.op("Unsqueeze", positions, writer.integers(1))
        visible = writer.op("LessOrEqual", writer.op("Unsqueeze", positions, writer.integers(0)), rows)
        return writer.op("Where", visible, writer.scalar(0.0), writer.scalar(float(np.finfo(np.float32).min)))


def _rotary_tables(writer: GraphWriter, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Write the cosines and sines of the rotation, each float32 ``[seq, head_dim]``."""
    half = SHAPE.head_dim // 2
    exponents = np.arange(half, dtype=np.float64) / half
    with writer.scope("rotary_emb"):
        frequencies = writer.constant("rotary_emb.inv_freq", (SHAPE.rope_base**-exponents).astype(np.float32))
        column = writer.op("Unsqueeze", positions, writer.integers(1))
        column = writer.op("Cast", column, attributes={"to": ir.DataType.FLOAT.value})
        angles = writer.op("Mul", column, frequencies)
        angles = writer.op("Concat", angles, angles, attributes={"axis": -1})
        return writer.op("Cos", angles), writer.op("Sin", angles)


def _rms_norm(writer: GraphWriter, name: str, x: ir.Value) -> ir.Value:
    with writer.scope(name):
        square = writer.op("Pow", x, writer.scalar(2.0))
        mean = writer.op("ReduceMean", square, writer.integers(-1), attributes={"keepdims": 1})
        root = writer.op("Sqrt", writer.op("Add", mean, writer.scalar(SHAPE.epsilon)))
        normalised = writer.op("Mul", x, writer.op("Div", writer.scalar(1.0), root))
        return writer.op("Mul", writer.parameter("weight"), normalised)


def _attention(writer: GraphWriter, x: ir.Value, rotary: tuple[ir.Value, ir.Value], mask: ir.Value) -> ir.Value:
    with writer.scope("self_attn"):
        q = _rotate(writer, _heads(writer, "q_proj", x, SHAPE.heads), rotary)
        k = _repeat(writer, _rotate(writer, _heads(writer, "k_proj", x, SHAPE.kv_heads), rotary))
        v = _repeat(writer, _heads(writer, "v_proj", x, SHAPE.kv_heads))
        scores = writer.op("MatMul", q, writer.op("Transpose", k, attributes={"perm": [0, 1, 3, 2]}))
        scaled = writer.op("Mul", scores, writer.scalar(1 / math.sqrt(SHAPE.head_dim)))
        weights = writer.op("Softmax", writer.op("Add", scaled, mask), attributes={"axis": -1})
        mixed = writer.op("Transpose", writer.op("MatMul", weights, v), attributes={"perm": [0, 2, 1, 3]})
        merged = writer.op("Reshape", mixed, writer.integers(0, 0, SHAPE.heads * SHAPE.head_dim))
        return _project(writer, "o_proj", merged)


def _heads(writer: GraphWriter, name: str, x: ir.Value, heads: int) -> ir.Value:
    """Project ``[n, s, hidden]`` to ``[n, heads, s, head_dim]``."""
    split = writer.op("Reshape", _project(writer, name, x), writer.integers(0, 0, heads, SHAPE.head_dim))
    return writer.op("Transpose", split, attributes={"perm": [0, 2, 1, 3]})


def _project(writer: GraphWriter, name: str, x: ir.Value) -> ir.Value:
    with writer.scope(name):
        return writer.linear(x, bias=False)


def _rotate(writer: GraphWriter, x: ir.Value, rotary: tuple[ir.Value, ir.Value]) -> ir.Value:
    cosine, sine = rotary
    half = SHAPE.head_dim // 2
    last, step = writer.integers(-1), writer.integers(1)
    low = writer.op("Slice", x, writer.integers(0), writer.integers(half), last, step)
    high = writer.op("Slice", x, writer.integers(half), writer.integers(_INT64_MAX), last, step)
    turned = writer.op("Concat", writer.op("Neg", high), low, attributes={"axis": -1})
    return writer.op("Add", writer.op("Mul", x, cosine), writer.op("Mul", turned, sine))


def _repeat(writer: GraphWriter, x: ir.Value) -> ir.Value:
    """Give every query head its key or value head: ``[n, kv_heads, s, d]`` to ``[n, heads, s, d]``."""
    groups = SHAPE.heads // SHAPE.kv_heads
    stacked = writer.op("Unsqueeze", x, writer.integers(2))
    stacked = writer.op("Expand", stacked, writer.integers(1, 1, groups, 1, 1))
    return writer.op("Reshape", stacked, writer.integers(0, SHAPE.heads, -1, SHAPE.head_dim))


def _feed_forward(writer: GraphWriter, x: ir.Value) -> ir.Value:
    with writer.scope("mlp"):
        gate = _project(writer, "gate_proj", x)
        gate = writer.op("Mul", gate, writer.op("Sigmoid", gate))
        return _project(writer, "down_proj", writer.op("Mul", gate, _project(writer, "up_proj", x)))
