"""Train ``digits_encoder``: ``python -m qgraph.models.train_digits_encoder``. Needs torch; minutes on two cores."""

from __future__ import annotations

import math

import torch
from torch import nn

from qgraph.models import train_digits
from qgraph.models.digits_encoder import NAME, SHAPE, Shape

SEED = 5
STEPS = 1500
PEAK_RATE = 1.5e-3
DROPOUT = 0.1
PATCH_DROPOUT = 0.15


class Attention(nn.Module):
    """Multi-head self-attention, spelt out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._heads = shape.heads
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.width, shape.width)
        self.value = nn.Linear(shape.width, shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers around GELU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.feed_forward)
        self.down = nn.Linear(shape.feed_forward, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Layer(nn.Module):
    """One pre-norm encoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.epsilon)
        self.attention = Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.epsilon)
        self.feed_forward = FeedForward(shape)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class DigitsEncoder(nn.Module):
    """The torch counterpart of :func:`qgraph.models.digits_encoder.build`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.stem1 = nn.Conv2d(1, shape.stem, 3, padding=1)
        self.stem2 = nn.Conv2d(shape.stem, shape.stem, 3, padding=1)
        self.patch = nn.Conv2d(shape.stem, shape.width, shape.patch, shape.patch)
        self.drop_patches = nn.Dropout1d(PATCH_DROPOUT)
        self.positions = nn.Parameter(0.3 * torch.randn(1, shape.patches, shape.width))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, eps=shape.epsilon)
        self.head = nn.Linear(shape.width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.stem2(nn.functional.gelu(self.stem1(image))))
        x = self.drop_patches(self.patch(x).flatten(2).transpose(1, 2)) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


if __name__ == "__main__":
    train_digits.train(NAME, lambda: DigitsEncoder(SHAPE), STEPS, SEED, PEAK_RATE)
