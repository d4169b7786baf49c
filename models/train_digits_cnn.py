"""Train ``digits_cnn``: ``python -m qgraph.models.train_digits_cnn``. Needs torch; some minutes on two cores."""

from __future__ import annotations

import torch
from torch import nn

from qgraph.models import train_digits
from qgraph.models.digits_cnn import EPSILON, NAME

SEED = 3
STEPS = 500
PEAK_RATE = 2e-3


class ConvNorm(nn.Module):
    """Convolution, batch norm and, unless ``relu6`` is false, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, relu6: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=EPSILON)
        self._activation: nn.Module = nn.ReLU6() if relu6 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._activation(self.norm(self.conv(x)))


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels, channels, 3)
        self.second = ConvNorm(channels, channels, 3, relu6=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu6(x + self.second(self.first(x)))


class InvertedResidual(nn.Module):
    """Widen, depthwise, narrow, around a shortcut with no activation at its end."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand = ConvNorm(channels, wide, 1)
        self.depthwise = ConvNorm(wide, wide, 3, groups=wide)
        self.project = ConvNorm(wide, channels, 1, relu6=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class Down(nn.Module):
    """A depthwise-separable convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depthwise = ConvNorm(inputs, inputs, 3, stride=2, groups=inputs)
        self.pointwise = ConvNorm(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise(self.depthwise(x))


class DigitsCnn(nn.Module):
    """The torch counterpart of :func:`qgraph.models.digits_cnn.build`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 64, 3)
        self.res64 = Residual(64)
        self.widen = ConvNorm(64, 128, 3)
        self.res128a = Residual(128)
        self.res128b = Residual(128)
        self.down = Down(128, 256)
        self.inv256a = InvertedResidual(256, 512)
        self.inv256b = InvertedResidual(256, 512)
        self.head = nn.Linear(256, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.res128b(self.res128a(self.widen(self.res64(self.stem(image)))))
        x = self.inv256b(self.inv256a(self.down(x)))
        return self.head(x.mean((2, 3)))


if __name__ == "__main__":
    train_digits.train(NAME, DigitsCnn, STEPS, SEED, PEAK_RATE)
