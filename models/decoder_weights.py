"""Weights on their way from a checkpoint into a graph: converted and transposed while they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from qgraph.errors import UserError
from qgraph.onnx_file import MappedTensor, StreamedTensor

__all__ = ["CheckpointTensor"]

_PIECE = 1 << 22
_COLUMNS = 64
"""Columns that are transposed at once: as many as keep both sides in the caches, five times faster than 512."""


class CheckpointTensor(StreamedTensor):
    """A weight of a checkpoint in another type or layout, never whole in memory while it is written.

    Args:
        source: the weight as it is stored.
        dtype: float32 or float16.
        transpose: store a matrix [N, K] as [K, N].
        written: called with the number of bytes whenever some have been written.
    """

    def __init__(
        self, source: MappedTensor, dtype: ir.DataType, *, transpose: bool, written: Callable[[int], None]
    ) -> None:
        self.name = source.name
        self.dtype = dtype
        shape = source.shape.numpy()
        self.shape: ir.Shape = ir.Shape(shape[::-1] if transpose else shape)
        self.doc_string = None
        self.metadata_props: MutableMapping[str, str] = {}
        self.meta: MutableMapping[str, Any] = {}
        self._source = source
        self._transpose = transpose
        self._written = written

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape.numpy())

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.bitwidth // 8

    @property
    def raw(self) -> np.ndarray:
        """The whole weight, as `numpy` gives it."""
        return self.numpy()

    def numpy(self) -> np.ndarray:
        """Return the whole weight.

        Raises:
            UserError: a value is beyond float16.
        """
        return np.concatenate([piece.reshape(-1) for piece in self._pieces()]).reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.numpy(), dtype=dtype)

    def __dlpack__(self, *, stream: Any = ...) -> Any:
        del stream
        return self.numpy().__dlpack__()

    def __dlpack_device__(self) -> Any:
        return np.empty(0).__dlpack_device__()

    def tobytes(self) -> bytes:
        """Return the bytes, little endian."""
        return self.numpy().tobytes()

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes to a binary file, some megabytes at a time.

        Raises:
            UserError: a value is beyond float16.
        """
        for piece in self._pieces():
            file.write(piece.data)
            self._written(piece.nbytes)

    def _pieces(self) -> Iterator[np.ndarray]:
        """Yield consecutive parts along the first axis, contiguous."""
        stored = self._source.numpy()
        if not stored.size:
            return
        if not self._transpose:
            flat = stored.reshape(-1)
            for begin in range(0, flat.size, _PIECE):
                yield self._converted(flat[begin : begin + _PIECE])
            return
        for begin in range(0, stored.shape[1], _COLUMNS):
            yield np.ascontiguousarray(self._converted(stored[:, begin : begin + _COLUMNS]).T)

    def _converted(self, stored: np.ndarray) -> np.ndarray:
        if self._source.dtype == ir.DataType.BFLOAT16:
            # bfloat16 is the upper half of float32.
            wide = stored.view(np.uint16).astype(np.uint32)
            stored = np.left_shift(wide, 16, out=wide).view(np.float32)
        with np.errstate(over="ignore"):
            result = np.ascontiguousarray(stored, dtype=self.dtype.numpy())
        if self.dtype == ir.DataType.FLOAT16 and np.isinf(result).any() and np.isfinite(stored).all():
            raise UserError(f"{self._source.path}: tensor '{self.name}' overflows float16: export with --dtype float32")
        return result

    def __repr__(self) -> str:
        return f"CheckpointTensor<{self.dtype},{self.shape}>(name={self.name!r})"
