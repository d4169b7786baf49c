"""Train ``digits_mobilenet``: ``python -m qgraph.models.train_digits_mobilenet``. Needs torch; a minute on one core."""

from __future__ import annotations

import torch
from torch import nn

from qgraph.models import train_digits
from qgraph.models.digits_mobilenet import BLOCKS, EPSILON, HIDDEN, LAST, NAME, STEM, Block

SEED = 5
STEPS = 500
PEAK_RATE = 6e-3
SPREAD = 1.15
"""Of the logarithms of the gains that batch norms before an activation start with. Channels of networks that were
trained for long differ by as much in size, which is what makes them hard to quantize."""


class ConvNorm(nn.Module):
    """Convolution, batch norm and an activation."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, activation: nn.Module, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=EPSILON)
        self._activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._activation(self.norm(self.conv(x)))


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * nn.functional.hardsigmoid(self.excite(gate))


class InvertedResidual(nn.Module):
    """Widen, depthwise, gate, narrow."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        activation: nn.Module = nn.Hardswish() if block.smooth else nn.ReLU()
        self._block = block
        if block.wide > block.inputs:
            self.expand = ConvNorm(block.inputs, block.wide, 1, activation)
        self.depthwise = ConvNorm(
            block.wide, block.wide, block.kernel, activation, stride=block.stride, groups=block.wide
        )
        if block.squeezed:
            self.gate = Gate(block.wide, block.squeezed)
        self.project = ConvNorm(block.wide, block.outputs, 1, nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.expand(x) if self._block.wide > self._block.inputs else x
        branch = self.depthwise(branch)
        branch = self.project(self.gate(branch) if self._block.squeezed else branch)
        return x + branch if self._block.is_residual else branch


class DigitsMobilenet(nn.Module):
    """The torch counterpart of :func:`qgraph.models.digits_mobilenet.build`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, STEM, 3, nn.Hardswish())
        for number, block in enumerate(BLOCKS):
            self.add_module(f"block{number}", InvertedResidual(block))
        self.last = ConvNorm(BLOCKS[-1].outputs, LAST, 1, nn.Hardswish())
        self.hidden = nn.Linear(LAST, HIDDEN)
        self.head = nn.Linear(HIDDEN, 10)
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d) and "project" not in name:
                module.weight.data.normal_(std=SPREAD).exp_()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        for number in range(len(BLOCKS)):
            x = self.get_submodule(f"block{number}")(x)
        x = self.last(x).mean((2, 3))
        return self.head(nn.functional.hardswish(self.hidden(x)))


if __name__ == "__main__":
    train_digits.train(NAME, DigitsMobilenet, STEPS, SEED, PEAK_RATE)
