"""What an attention block is made of: the words that finding and rewriting it share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from qgraph.analysis.shapes import Shapes
from qgraph.analysis.symbols import Dim

__all__ = [
    "SPLIT",
    "SPLIT_PACKED",
    "SPLIT_TRANSPOSED",
    "Block",
    "Cache",
    "Dims",
    "Heads",
    "NoMatchError",
    "known_dims",
    "splits",
]

SPLIT = (0, 2, 1, 3)
"""[batch, rows, heads, size] to [batch, heads, rows, size], and back."""
SPLIT_TRANSPOSED = (0, 2, 3, 1)
SPLIT_PACKED = (2, 0, 3, 1, 4)
"""[batch, rows, 3, heads, size] to [3, batch, heads, rows, size]."""

Dims: TypeAlias = tuple[Dim, ...]


class NoMatchError(Exception):
    """The reason why a Softmax is not the heart of an attention that can be fused."""


@dataclass(frozen=True)
class Cache:
    """Keys or values of earlier rows, which a Concat puts before those of a block."""

    past: ir.Value
    """[batch, heads, past rows, size]"""
    concat: ir.Node
    rows: Dim
    """Of all, earlier and new."""


@dataclass(frozen=True)
class Heads:
    """A tensor [batch, heads, ...] and the Reshape that split it from [batch, rows, heads * size]."""

    reshape: ir.Node
    dims: Dims
    """batch, rows, heads, size"""
    order: tuple[int, ...]
    """Which of `dims` each axis of the tensor is."""
    scale: float
    rotation: ir.Node | None = None
    part: int | None = None
    """Which of the three tensors that are split from one it is."""
    cache: Cache | None = None

    @property
    def rows(self) -> Dim:
        """The number of rows with those of the cache."""
        return self.dims[1] if self.cache is None else self.cache.rows

    @property
    def source(self) -> ir.Value:
        """What is split, as the graph stands: another block's result may have been replaced."""
        value = self.reshape.inputs[0]
        assert value is not None
        return value


@dataclass(frozen=True)
class Block:
    softmax: ir.Node
    q: Heads
    k: Heads
    v: Heads
    scale: float
    masks: Sequence[ir.Value]
    guarded: bool
    last: ir.Node
    """The Reshape that joins the heads."""
    stacked: int = 1
    """Query heads that share keys and lie below one another in the products."""


def known_dims(shapes: Shapes, value: ir.Value | None) -> Dims:
    """Return the shape of a value.

    Raises:
        NoMatchError: it is not known.
    """
    dims = shapes.dims(value) if value is not None else None
    if dims is None:
        raise NoMatchError(f"the shape of '{value.name if value else ''}' is not known")
    return tuple(dims)


def splits(joined: Dims, split: Dims) -> bool:
    """Tell whether [batch, rows, heads * size] and [batch, rows, heads, size] are these."""
    if len(joined) != 3 or len(split) != 4 or joined[:2] != split[:2]:
        return False
    heads, size = split[2:]
    return isinstance(heads, int) and isinstance(size, int) and joined[2] == heads * size
