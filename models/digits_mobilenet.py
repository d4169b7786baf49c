"""``digits_mobilenet``: the blocks of MobileNetV3-small on 8 x 8 handwritten digits.

::

    image [n, 1, 8, 8]
      stem      Conv 3x3 1->16, BN, HardSwish                                  at 8 x 8
      block0    depthwise 3x3, SE, to 16                                       ReLU
      block1    expand 72, depthwise 3x3 stride 2, to 24                       ReLU       at 4 x 4
      block2    x + expand 88, depthwise 3x3, to 24                            ReLU
      block3    expand 96, depthwise 5x5, SE, to 40                            HardSwish
      block4    x + expand 120, depthwise 5x5, SE, to 40                       HardSwish
      block5    expand 144, depthwise 5x5 stride 2, SE, to 48                  HardSwish  at 2 x 2
      block6    x + expand 192, depthwise 5x5, SE, to 48                       HardSwish
      last      Conv 1x1 48->192, BN, HardSwish
      GlobalAveragePool, Flatten, Gemm 192->128, HardSwish, Gemm 128->10
    logits [n, 10]

A block is Conv 1x1, BN, activation; depthwise Conv, BN, activation; SE; Conv 1x1, BN. SE multiplies with the
HardSigmoid of Conv 1x1, Relu, Conv 1x1 of the channels' means (Howard et al., "Searching for MobileNetV3", 2019).
151,938 parameters, 0.90 million multiply-adds an image. Batch norm stays a node of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from qgraph.models import checkpoint, data
from qgraph.models.graph import GraphWriter

__all__ = ["BLOCKS", "EPSILON", "HIDDEN", "LAST", "NAME", "STEM", "Block", "build", "dataset"]

NAME = "digits_mobilenet"
EPSILON = 1e-5
"""Of every batch norm."""
STEM = 16
LAST = 192
HIDDEN = 128


class Block(NamedTuple):
    """An inverted residual.

    Attributes:
        inputs: channels.
        wide: channels of the depthwise convolution; as many as `inputs` if nothing expands.
        outputs: channels.
        kernel: of the depthwise convolution.
        stride: of the depthwise convolution.
        squeezed: channels inside the squeeze-and-excite, 0 for none.
        smooth: HardSwish rather than Relu.
    """

    inputs: int
    wide: int
    outputs: int
    kernel: int
    stride: int
    squeezed: int
    smooth: bool

    @property
    def is_residual(self) -> bool:
        """Whether its input is added to its output."""
        return self.stride == 1 and self.inputs == self.outputs and self.wide > self.inputs


BLOCKS = (
    Block(16, 16, 16, 3, 1, 8, smooth=False),
    Block(16, 72, 24, 3, 2, 0, smooth=False),
    Block(24, 88, 24, 3, 1, 0, smooth=False),
    Block(24, 96, 40, 5, 1, 24, smooth=True),
    Block(40, 120, 40, 5, 1, 32, smooth=True),
    Block(40, 144, 48, 5, 2, 40, smooth=True),
    Block(48, 192, 48, 5, 1, 48, smooth=True),
)


def build() -> ir.Model:
    """Return the trained network: ``image`` float32 ``[batch, 1, 8, 8]`` -> ``logits`` float32 ``[batch, 10]``.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    parameters = checkpoint.load(NAME).parameters
    writer = GraphWriter(NAME, parameters)
    x = writer.input("image", ir.DataType.FLOAT, ["batch", 1, 8, 8])
    x = _conv(writer, "stem", x, kernel=3, activation="HardSwish")
    for number, block in enumerate(BLOCKS):
        x = _block(writer, f"block{number}", x, block)
    x = _conv(writer, "last", x, activation="HardSwish")
    x = writer.op("Flatten", writer.op("GlobalAveragePool", x), attributes={"axis": 1})
    x = writer.op("HardSwish", _linear(writer, "hidden", x))
    return writer.model(_linear(writer, "head", x), "logits", ["batch", 10])


def dataset() -> data.Dataset:
    """Return the digits: 200 training images to calibrate with, 600 held-out images and their labels."""
    return data.digits_dataset()


def _block(writer: GraphWriter, name: str, x: ir.Value, block: Block) -> ir.Value:
    activation = "HardSwish" if block.smooth else "Relu"
    with writer.scope(name):
        branch = x
        if block.wide > block.inputs:
            branch = _conv(writer, "expand", branch, activation=activation)
        branch = _conv(
            writer,
            "depthwise",
            branch,
            kernel=block.kernel,
            stride=block.stride,
            groups=block.wide,
            activation=activation,
        )
        if block.squeezed:
            branch = _squeeze_and_excite(writer, branch)
        branch = _conv(writer, "project", branch)
        return writer.op("Add", x, branch) if block.is_residual else branch


def _squeeze_and_excite(writer: GraphWriter, x: ir.Value) -> ir.Value:
    """Multiply each channel with a gate between 0 and 1 that all channels' means decide on."""
    with writer.scope("gate"):
        gate = writer.op("GlobalAveragePool", x)
        for name, activation in (("squeeze", "Relu"), ("excite", "HardSigmoid")):
            with writer.scope(name):
                gate = writer.op("Conv", gate, writer.parameter("weight"), writer.parameter("bias"))
            attributes = {"alpha": 1 / 6, "beta": 0.5} if activation == "HardSigmoid" else None
            gate = writer.op(activation, gate, attributes=attributes)
        return writer.op("Mul", x, gate)


def _conv(
    writer: GraphWriter,
    name: str,
    x: ir.Value,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: str | None = None,
) -> ir.Value:
    """Write Conv (padded to keep the size), BatchNormalization and, if there is one, the activation."""
    with writer.scope(name):
        x = writer.normed_conv(x, kernel=kernel, stride=stride, groups=groups, epsilon=EPSILON)
        return x if activation is None else writer.op(activation, x)


def _linear(writer: GraphWriter, name: str, x: ir.Value) -> ir.Value:
    with writer.scope(name):
        return writer.op("Gemm", x, writer.parameter("weight"), writer.parameter("bias"), attributes={"transB": 1})
