"""Text for the byte-level decoder: the help topics that ship with every Python as ``pydoc_data.topics``.

The text is divided by content, not by position. A paragraph whose checksum is a multiple of
:data:`CHUNK_PARAGRAPHS` opens a chunk, and the checksum of that opening paragraph decides whether the whole chunk is
held out. Sections that the topics repeat therefore fall on the same side of the split, and so do the sections that
another Python version keeps unchanged. A paragraph that still occurs on both sides is dropped from the training side.
"""

from __future__ import annotations

import functools
import zlib
from typing import TYPE_CHECKING

import numpy as np

from qgraph.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CHUNK_PARAGRAPHS", "held_out_text", "next_byte_windows", "text", "training_text", "windows"]

CHUNK_PARAGRAPHS = 12
"""Mean length of a chunk, in paragraphs (about 2 kB)."""

_HELD_OUT_ONE_IN = 10
_SEPARATOR = b"\n\n"


def text() -> bytes:
    """Return all topics as UTF-8, sorted by key and joined by a newline (about 460 kB).

    Raises:
        UserError: this Python was built without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "this Python has no module 'pydoc_data' (the text of the decoder): install the full standard library"
        ) from error
    return "\n".join(topics[key] for key in sorted(topics)).encode()


def training_text() -> bytes:
    """Return the part of :func:`text` that the decoder was trained on (about nine tenths)."""
    return _split()[0]


def held_out_text() -> bytes:
    """Return the part of :func:`text` that training never saw; no paragraph of it occurs in the training part."""
    return _split()[1]


def windows(data: bytes, length: int = 256, count: int | None = None) -> NDArray[np.int64]:
    """Cut ``data`` into windows that do not overlap: int64 ``[n, length]``, one byte per token.

    With ``count``, at most that many windows, spread evenly over the whole of ``data``.

    Raises:
        UserError: ``data`` is shorter than one window.
    """
    return next_byte_windows(data, length, count)[0]


def next_byte_windows(
    data: bytes, length: int = 256, count: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return :func:`windows` and, of the same shape, the byte that follows each of their bytes."""
    total = (len(data) - 1) // length
    if total < 1:
        raise UserError(f"text of {len(data)} bytes is too short for a window of {length} and its next byte: give more")
    tokens = np.frombuffer(data, dtype=np.uint8).astype(np.int64)
    chosen = np.arange(total) if count is None else np.unique(np.linspace(0, total - 1, count).astype(np.int64))
    positions = chosen[:, None] * length + np.arange(length)
    return tokens[positions], tokens[positions + 1]


@functools.cache
def _split() -> tuple[bytes, bytes]:
    training: list[bytes] = []
    held_out: list[bytes] = []
    side = training
    for paragraph in text().split(_SEPARATOR):
        checksum = zlib.crc32(paragraph)
        if checksum % CHUNK_PARAGRAPHS == 0:
            side = held_out if checksum // CHUNK_PARAGRAPHS % _HELD_OUT_ONE_IN == 0 else training
        side.append(paragraph)
    seen = set(held_out)
    return _SEPARATOR.join(p for p in training if p not in seen), _SEPARATOR.join(held_out)
