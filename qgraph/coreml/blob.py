"""The weight file of an ML Program: typed blobs at 64-byte boundaries.

    file      count u32, version u32 (2), 56 bytes of zeros; then for each blob, each at a multiple of 64 bytes:
    metadata  0xDEADBEEF u32, type u32, bytes u64, offset of the data u64, unused bits of the last byte u64, 32 zeros
    data      numbers of less than 8 bits one behind the other, the first in the lowest bits

Layout: mlmodel/src/MILBlob/Blob in github.com/apple/coremltools. A program's values name the offset of the metadata.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping

import numpy as np

from qgraph.coreml.data_types import MilType
from qgraph.errors import UserError

__all__ = ["Blob", "read_blob", "stored_bytes"]

_ALIGNMENT = 64
_HEADER = struct.Struct("<II")
_METADATA = struct.Struct("<IIQQQ")
_SENTINEL = 0xDEADBEEF
_VERSION = 2
_TYPES: Mapping[int, MilType] = {
    1: MilType.FLOAT16,
    2: MilType.FLOAT32,
    3: MilType.UINT8,
    4: MilType.INT8,
    6: MilType.INT16,
    7: MilType.UINT16,
    8: MilType.INT4,
    9: MilType.UINT1,
    10: MilType.UINT2,
    11: MilType.UINT4,
    12: MilType.UINT3,
    13: MilType.UINT6,
    14: MilType.INT32,
    15: MilType.UINT32,
}


@dataclasses.dataclass(frozen=True)
class Blob:
    """A blob of a weight file: its type, its bytes as they are stored, and where these start."""

    type: MilType
    data: memoryview
    start: int = 0

    def array(self, count: int) -> np.ndarray:
        """Return `count` numbers, in the smallest numpy type that holds them.

        Raises:
            UserError: the blob holds another number of them.
        """
        if len(self.data) != stored_bytes(self.type, count):
            raise UserError(
                f"the weight file is damaged: {len(self.data)} bytes do not hold {count} numbers of {self.type.value}"
            )
        if self.type.bits >= 8:
            return np.frombuffer(self.data, self.type.numpy.newbyteorder("<"))
        bits = np.unpackbits(np.frombuffer(self.data, np.uint8), bitorder="little")[: count * self.type.bits]
        digits = bits.reshape(count, self.type.bits) << np.arange(self.type.bits, dtype=np.uint8)
        codes = np.asarray(digits.sum(axis=1, dtype=np.uint8))
        if self.type is MilType.INT4:
            return np.asarray((codes ^ 8).astype(np.int8) - np.int8(8))
        return codes


def stored_bytes(kind: MilType, count: int) -> int:
    """Return the bytes that `count` numbers take in a weight file, without the blob's metadata."""
    return -(-count * kind.bits // 8)


def read_blob(file: memoryview, offset: int) -> Blob:
    """Return the blob whose metadata stand at `offset`.

    Raises:
        UserError: there is none, or it reaches beyond the file.
    """
    if len(file) < _ALIGNMENT or _HEADER.unpack_from(file)[1] != _VERSION:
        raise UserError("the weight file is damaged: it has no header of version 2")
    if offset % _ALIGNMENT or offset + _ALIGNMENT > len(file):
        raise UserError(f"the weight file is damaged: there can be no weight at {offset} of {len(file)} bytes")
    sentinel, kind, size, start, unused = _METADATA.unpack_from(file, offset)
    if sentinel != _SENTINEL or kind not in _TYPES:
        raise UserError(f"the weight file is damaged: there is no weight at {offset}")
    if start % _ALIGNMENT or start + size > len(file) or unused > 7:
        raise UserError(f"the weight file is damaged: the weight at {offset} reaches beyond {len(file)} bytes")
    return Blob(_TYPES[kind], file[start : start + size], start)
