"""Weight matrices in pieces that fit the cache, with the groups as columns.

    weight [N, K]        rows and groups of them          tile [group, rows * groups]

The scales of a tile's columns lie beside one another, so that every operation on it runs along contiguous memory with
its parameters broadcast over the first axis. A matrix that is stored as [K, N] has that layout already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

__all__ = ["Tile", "tiles"]

_TILE = 1 << 16
"""Elements of a tile: they and two work arrays fit into the second-level cache."""
_LEAST_COLUMNS = 64
"""Long groups have larger tiles, so that the loops along a row of a tile stay worth their start."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Some rows and some groups of a weight matrix, as columns: `values` [group, rows * groups] in float32."""

    values: np.ndarray
    rows: slice
    groups: slice
    inputs: slice

    def put_groups(self, target: np.ndarray, entries: np.ndarray) -> None:
        """Store [1, columns] into an array [N, G]."""
        part = target[self.rows, self.groups]
        part[...] = entries.reshape(part.shape)

    def take_groups(self, source: np.ndarray) -> np.ndarray:
        """Return [1, columns] of an array [N, G]."""
        return np.ascontiguousarray(source[self.rows, self.groups]).reshape(1, -1)

    def put_elements(self, target: np.ndarray, entries: np.ndarray) -> None:
        """Store [group, columns] into an array [N, K]."""
        part = target[self.rows, self.inputs]
        size = len(entries)
        part.reshape(part.shape[0], -1, size)[...] = entries.T.reshape(part.shape[0], -1, size)

    def spread(self, per_input: np.ndarray) -> np.ndarray:
        """Return [group, columns] (or [group, 1]) of an array [K]."""
        size, columns = self.values.shape
        part = per_input[self.inputs].reshape(-1, size).T
        return part if part.shape[1] == 1 else np.tile(part, (1, columns // part.shape[1]))


def tiles(weight: np.ndarray, group: int) -> Iterator[Tile]:
    """Cut a weight matrix into tiles that fit the cache; a shorter last group comes in tiles of its own."""
    rows, inputs = weight.shape
    size = min(group, inputs) if group else inputs
    whole = inputs // size
    elements = max(_TILE, size * _LEAST_COLUMNS)
    stored_by_inputs = weight.strides[0] < weight.strides[1]
    spans = [(index, 1) for index in range(whole)] if stored_by_inputs or whole == 0 else [(0, whole)]
    if inputs % size:
        spans.append((whole, 1))
    for first, count in spans:
        start, stop = first * size, min((first + count) * size, inputs)
        if not stored_by_inputs and count > 1 and count * size > elements:
            yield from _row_tiles(weight, size, first, count, elements)
            continue
        height = max(1, elements // (stop - start))
        for top in range(0, rows, height):
            part = weight[top : top + height, start:stop]
            values = part.reshape(part.shape[0] * count, -1).T
            if values.dtype != np.float32 or (values.strides[0] < values.strides[1]):
                values = np.ascontiguousarray(values, np.float32)
            yield Tile(values, slice(top, top + height), slice(first, first + count), slice(start, stop))


def _row_tiles(weight: np.ndarray, size: int, first: int, count: int, elements: int) -> Iterator[Tile]:
    """Cut rows that are longer than a tile."""
    step = elements // size
    for row in range(weight.shape[0]):
        for group in range(first, first + count, step):
            last = min(group + step, first + count)
            part = weight[row : row + 1, group * size : last * size]
            values = np.ascontiguousarray(part.reshape(-1, size).T, np.float32)
            yield Tile(values, slice(row, row + 1), slice(group, last), slice(group * size, last * size))
