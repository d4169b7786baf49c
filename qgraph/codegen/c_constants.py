"""The constant arrays of a program, each in the fewest bits that hold its elements."""

from __future__ import annotations

import numpy as np

from qgraph.codegen import c_text

__all__ = ["Constants"]


class Constants:
    """The constant arrays of a program; the same array is written once.

    Attributes:
        arrays: name -> elements, of the type in which they are stored.
    """

    def __init__(self, names: c_text.Names) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._names = names
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def name(self, base: str, array: np.ndarray, dtype: np.dtype | None = None) -> str:
        """Return the name of an array, stored as `dtype`, or in as few bits as hold its elements."""
        stored = np.ascontiguousarray(array, c_text.narrowest(array) if dtype is None else dtype)
        key = (stored.dtype.str, stored.shape, stored.tobytes())
        if key not in self._known:
            name = c_text.identifier(base)
            # Locals of kernels have no underscore, so that none of them hides a constant.
            self._known[key] = self._names.unique(name if "_" in name else f"{name}_data")
            self.arrays[self._known[key]] = stored
        return self._known[key]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())
