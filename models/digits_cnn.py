"""``digits_cnn``: residual and depthwise-separable blocks on 8 x 8 handwritten digits.

::

    image [n, 1, 8, 8]
      stem      Conv 3x3 1->64, BN, ReLU6
      res64     x + (Conv 3x3, BN, ReLU6, Conv 3x3, BN), ReLU6                 at 8 x 8   (He et al., 2016)
      widen     Conv 3x3 64->128, BN, ReLU6
      res128a, res128b                                                         at 8 x 8
      down      depthwise 3x3 stride 2, BN, ReLU6, Conv 1x1 128->256, BN, ReLU6           (Howard et al., 2017)
      inv256a, inv256b    x + (Conv 1x1 to 512, BN, ReLU6, depthwise 3x3, BN, ReLU6,
                               Conv 1x1 to 256, BN)                            at 4 x 4   (Sandler et al., 2018)
      GlobalAveragePool, Flatten, Gemm 256->10
    logits [n, 10]

1.3 million parameters, 63 million multiply-adds an image. Batch norm stays a node of its own; ReLU6 is a Clip.
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph.models import checkpoint, data
from qgraph.models.graph import GraphWriter

__all__ = ["EPSILON", "NAME", "build", "dataset"]

NAME = "digits_cnn"
EPSILON = 1e-5
"""Of every batch norm."""


def build() -> ir.Model:
    """Return the trained network: ``image`` float32 ``[batch, 1, 8, 8]`` -> ``logits`` float32 ``[batch, 10]``.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    parameters = checkpoint.load(NAME).parameters
    writer = GraphWriter(NAME, parameters)
    x = writer.input("image", ir.DataType.FLOAT, ["batch", 1, 8, 8])
    x = _conv(writer, "stem", x)
    x = _residual(writer, "res64", x)
    x = _conv(writer, "widen", x)
    x = _residual(writer, "res128a", x)
    x = _residual(writer, "res128b", x)
    with writer.scope("down"):
        x = _conv(writer, "depthwise", x, stride=2, groups=128)
        x = _conv(writer, "pointwise", x, kernel=1)
    x = _inverted_residual(writer, "inv256a", x)
    x = _inverted_residual(writer, "inv256b", x)
    x = writer.op("Flatten", writer.op("GlobalAveragePool", x), attributes={"axis": 1})
    with writer.scope("head"):
        x = writer.op("Gemm", x, writer.parameter("weight"), writer.parameter("bias"), attributes={"transB": 1})
    return writer.model(x, "logits", ["batch", 10])


def dataset() -> data.Dataset:
    """Return the digits: 200 training images to calibrate with, 600 held-out images and their labels."""
    return data.digits_dataset()


def _conv(
    writer: GraphWriter,
    name: str,
    x: ir.Value,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    relu6: bool = True,
) -> ir.Value:
    """Write Conv (padded to keep the size), BatchNormalization and, unless told not to, ReLU6."""
    with writer.scope(name):
        x = writer.normed_conv(x, kernel=kernel, stride=stride, groups=groups, epsilon=EPSILON)
        return _relu6(writer, x) if relu6 else x


def _residual(writer: GraphWriter, name: str, x: ir.Value) -> ir.Value:
    with writer.scope(name):
        branch = _conv(writer, "first", x)
        branch = _conv(writer, "second", branch, relu6=False)
        return _relu6(writer, writer.op("Add", x, branch))


def _inverted_residual(writer: GraphWriter, name: str, x: ir.Value) -> ir.Value:
    with writer.scope(name):
        branch = _conv(writer, "expand", x, kernel=1)
        branch = _conv(writer, "depthwise", branch, groups=512)
        branch = _conv(writer, "project", branch, kernel=1, relu6=False)
        return writer.op("Add", x, branch)


def _relu6(writer: GraphWriter, x: ir.Value) -> ir.Value:
    return writer.op("Clip", x, writer.scalar(0.0), writer.scalar(6.0))
