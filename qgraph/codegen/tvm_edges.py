"""The integer tensors at the edges of a compiled graph, and how floats become these and come back.

x (float) -> QuantizeLinear -> xq ... yq -> DequantizeLinear -> y (float)    =>    xq is an input, yq an output
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qgraph.errors import UserError

__all__ = ["Edge", "Signature"]


@dataclasses.dataclass(frozen=True)
class Edge:
    """An integer tensor that the compiled code takes or gives.

    Attributes:
        name: of the graph's input or output.
        tensor: of the integer tensor: the same where the edge is in integers itself.
        shape: its sizes.
        dtype: its type, numpy's name.
        scale: of one step, float32; None where the edge is in integers itself.
        zero_point: the integer that stands for 0.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int = 0

    def quantize(self, array: np.ndarray) -> np.ndarray:
        """Return what QuantizeLinear makes of a float32 array: divided, rounded half to even, saturated."""
        if self.scale is None:
            return array
        steps = np.rint(array.astype(np.float32) / np.float32(self.scale)).astype(np.float64) + self.zero_point
        limits = np.iinfo(self.dtype)
        return np.asarray(np.clip(steps, limits.min, limits.max).astype(self.dtype))

    def dequantize(self, array: np.ndarray) -> np.ndarray:
        """Return what DequantizeLinear makes of the integers: float32."""
        if self.scale is None:
            return array
        return (array.astype(np.int64) - self.zero_point).astype(np.float32) * np.float32(self.scale)

    def checked(self, array: np.ndarray, dtype: str) -> np.ndarray:
        """Return an array that is fed, in one piece.

        Raises:
            UserError: it has another shape or type than the code was made for.
        """
        found = np.asarray(array)
        if found.shape != self.shape or str(found.dtype) != dtype:
            raise UserError(
                f"input '{self.name}' is {found.dtype}{list(found.shape)}, but the library was compiled for "
                f"{dtype}{list(self.shape)}"
            )
        return np.asarray(found, order="C")


@dataclasses.dataclass(frozen=True)
class Signature:
    """What the compiled function takes and gives, in its order."""

    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]

    def write(self, path: Path, **more: str) -> None:
        """Write it as JSON, with more facts beside it."""
        text = json.dumps({**more, **dataclasses.asdict(self)}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Signature:
        """Read what `write` wrote.

        Raises:
            UserError: the file is missing or holds something else.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(_edges(data["inputs"]), _edges(data["outputs"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no signature of a compiled model: {error}") from error


def _edges(entries: Sequence[Mapping[str, Any]]) -> tuple[Edge, ...]:
    return tuple(Edge(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries)
