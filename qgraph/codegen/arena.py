"""Where in one block of memory each tensor lies: two that live at the same time never overlap.

Greedy by size: the largest buffer first, each into the smallest gap that it fits between those placed already that
live at the same time (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020, section 5).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

__all__ = ["ALIGNMENT", "Buffer", "Plan", "peak", "plan"]

ALIGNMENT = 16
"""Bytes that every offset is a multiple of: enough for every type and for vectors of 128 bits."""


@dataclass(frozen=True)
class Buffer:
    """Memory that is needed for a while.

    Attributes:
        key: what it is for.
        size: bytes.
        first: the step that writes it.
        last: the last step that reads it.
    """

    key: Hashable
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Offsets in bytes of each buffer, by its key, and the bytes needed in all."""

    offsets: dict[Hashable, int]
    size: int


def plan(buffers: Sequence[Buffer]) -> Plan:
    """Place buffers; the same buffers give the same plan whatever their keys are."""
    placed: list[tuple[Buffer, int]] = []
    order = sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, buffers[i].first, i))
    for position in order:
        buffer = buffers[position]
        alive = [(at, at + _padded(other.size)) for other, at in placed if _overlap(buffer, other)]
        placed.append((buffer, _best_gap(sorted(alive), _padded(buffer.size))))
    size = max((at + _padded(buffer.size) for buffer, at in placed), default=0)
    return Plan({buffer.key: at for buffer, at in placed}, size)


def peak(buffers: Sequence[Buffer]) -> int:
    """Return the most bytes that live at one step: no plan needs less."""
    steps = {buffer.first for buffer in buffers}
    return max((sum(_padded(b.size) for b in buffers if b.first <= step <= b.last) for step in steps), default=0)


def _overlap(one: Buffer, other: Buffer) -> bool:
    return one.first <= other.last and other.first <= one.last


def _best_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Return the offset of the smallest gap of at least `size` between intervals in order; the end if there is none."""
    best, best_size, end = None, 0, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best is None or gap < best_size):
            best, best_size = end, gap
        end = max(end, stop)
    return end if best is None else best


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
