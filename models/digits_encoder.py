"""``digits_encoder``: a small vision transformer (Dosovitskiy et al., 2021) on 8 x 8 handwritten digits.

::

    image [n, 1, 8, 8]
      Conv 3x3 1->48, GELU, Conv 3x3 48->48, GELU
      Conv 2x2 stride 2, Reshape, Transpose      16 patches of 192 values, + learned positions
      3 layers   x + attention(LayerNorm(x))     6 heads of 32; Q, K and V are three products
                 x + feed_forward(LayerNorm(x))  192 -> 576 -> 192, GELU written out with Erf
      LayerNorm, mean over the patches, Gemm 192->10
    logits [n, 10]

1.2 million parameters. Attention is decomposed into MatMul, Div, Softmax, Reshape and Transpose, as torch's exporter
writes a module that spells it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from qgraph.models import checkpoint, data
from qgraph.models.graph import Attribute, GraphWriter

__all__ = ["NAME", "SHAPE", "Shape", "build", "dataset"]

NAME = "digits_encoder"


@dataclass(frozen=True)
class Shape:
    """Dimensions of the encoder."""

    stem: int = 48
    patch: int = 2
    patches: int = 16
    width: int = 192
    feed_forward: int = 576
    layers: int = 3
    heads: int = 6
    epsilon: float = 1e-5


SHAPE = Shape()


def build() -> ir.Model:
    """Return the trained encoder: ``image`` float32 ``[batch, 1, 8, 8]`` -> ``logits`` float32 ``[batch, 10]``.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    writer = GraphWriter(NAME, checkpoint.load(NAME).parameters)
    image = writer.input("image", ir.DataType.FLOAT, ["batch", 1, 8, 8])
    x = _embed(writer, image)
    for index in range(SHAPE.layers):
        with writer.scope(f"layers.{index}"):
            x = writer.op("Add", x, _attention(writer, _layer_norm(writer, "norm1", x)))
            x = writer.op("Add", x, _feed_forward(writer, _layer_norm(writer, "norm2", x)))
    x = _layer_norm(writer, "norm", x)
    x = writer.op("ReduceMean", x, writer.integers(1), attributes={"keepdims": 0})
    with writer.scope("head"):
        x = writer.op("Gemm", x, writer.parameter("weight"), writer.parameter("bias"), attributes={"transB": 1})
    return writer.model(x, "logits", ["batch", 10])


def dataset() -> data.Dataset:
    """Return the digits: 200 training images to calibrate with, 600 held-out images and their labels."""
    return data.digits_dataset()


def _embed(writer: GraphWriter, image: ir.Value) -> ir.Value:
    x = _gelu(writer, _conv(writer, "stem1", image, kernel=3, stride=1, pad=1))
    x = _gelu(writer, _conv(writer, "stem2", x, kernel=3, stride=1, pad=1))
    x = _conv(writer, "patch", x, kernel=SHAPE.patch, stride=SHAPE.patch, pad=0)
    x = writer.op("Reshape", x, writer.integers(0, SHAPE.width, SHAPE.patches))
    x = writer.op("Transpose", x, attributes={"perm": [0, 2, 1]})
    return writer.op("Add", x, writer.parameter("positions"))


def _conv(writer: GraphWriter, name: str, x: ir.Value, *, kernel: int, stride: int, pad: int) -> ir.Value:
    attributes: dict[str, Attribute] = {
        "dilations": [1, 1],
        "group": 1,
        "kernel_shape": [kernel, kernel],
        "pads": [pad] * 4,
        "strides": [stride, stride],
    }
    with writer.scope(name):
        return writer.op("Conv", x, writer.parameter("weight"), writer.parameter("bias"), attributes=attributes)


def _layer_norm(writer: GraphWriter, name: str, x: ir.Value) -> ir.Value:
    with writer.scope(name):
        return writer.op(
            "LayerNormalization",
            x,
            writer.parameter("weight"),
            writer.parameter("bias"),
            attributes={"axis": -1, "epsilon": SHAPE.epsilon},
        )


def _attention(writer: GraphWriter, x: ir.Value) -> ir.Value:
    head = SHAPE.width // SHAPE.heads
    with writer.scope("attention"):
        q = _heads(writer, "query", x, [0, 2, 1, 3])
        k = _heads(writer, "key", x, [0, 2, 3, 1])
        v = _heads(writer, "value", x, [0, 2, 1, 3])
        scores = writer.op("Div", writer.op("MatMul", q, k), writer.scalar(math.sqrt(head)))
        weights = writer.op("Softmax", scores, attributes={"axis": -1})
        mixed = writer.op("Transpose", writer.op("MatMul", weights, v), attributes={"perm": [0, 2, 1, 3]})
        merged = writer.op("Reshape", mixed, writer.integers(0, SHAPE.patches, SHAPE.width))
        with writer.scope("out"):
            return writer.linear(merged)


def _heads(writer: GraphWriter, name: str, x: ir.Value, perm: list[int]) -> ir.Value:
    """Project, split into heads and put the axes into the order that the next product needs."""
    with writer.scope(name):
        projected = writer.linear(x)
    split = writer.op("Reshape", projected, writer.integers(0, SHAPE.patches, SHAPE.heads, SHAPE.width // SHAPE.heads))
    return writer.op("Transpose", split, attributes={"perm": perm})


def _feed_forward(writer: GraphWriter, x: ir.Value) -> ir.Value:
    with writer.scope("feed_forward"):
        with writer.scope("up"):
            x = writer.linear(x)
        x = _gelu(writer, x)
        with writer.scope("down"):
            return writer.linear(x)


def _gelu(writer: GraphWriter, x: ir.Value) -> ir.Value:
    with writer.scope("gelu"):
        erf = writer.op("Erf", writer.op("Div", x, writer.scalar(math.sqrt(2))))
        gated = writer.op("Mul", x, writer.op("Add", erf, writer.scalar(1.0)))
        return writer.op("Mul", gated, writer.scalar(0.5))
