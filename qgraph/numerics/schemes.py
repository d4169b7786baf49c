"""Quantization schemes as data: how integers or small floats stand for real numbers, and which elements share a scale.

    real = (integer - zero_point) * scale        integers
    real = float8 * scale                        float8_e4m3fn, the finite values of which end at 448

A block is the set of neighbouring elements that share one scale and one zero point. `Scheme.block_shape` has one
entry for each dimension of the array: n > 0 means n consecutive elements (the last block may be ragged), -1 means the
whole dimension. The empty tuple stands for per tensor at any rank.

    weight [64, 32, 3, 3]     per tensor                     ()  or  (-1, -1, -1, -1)
                              per output channel             (1, -1, -1, -1)
    weight [4096, 1024]       per column                     (-1, 1)
                              groups of 32 along axis 0      (32, 1)
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import ml_dtypes
import numpy as np

__all__ = ["FLOAT8", "INT8", "INT8_ACTIVATION", "INT8_WEIGHT", "UINT8", "UINT8_WEIGHT", "Scheme"]

_FLOAT8: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
_FLOAT8_BITS = 8
_FLOAT8_LARGEST = 448
"""Of float8_e4m3fn (Micikevicius et al. 2022, FP8 Formats for Deep Learning, table 1)."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """An integer or float format and the blocks that share a scale.

    Attributes:
        bits: 2 to 8; 8 of a float.
        signed: two's complement integers rather than unsigned ones.
        symmetric: zero stands for the integer 0 (signed) or 2^(bits-1) (unsigned); otherwise the zero point is free.
        narrow: leave out the lowest integer, so that signed ones are -127..127.
        block_shape: see the module's docstring.
        format: "int", or "float8e4m3fn", which is signed and symmetric: there is no zero point but zero.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    narrow: bool = False
    block_shape: tuple[int, ...] = ()
    format: Literal["int", "float8e4m3fn"] = "int"

    def __post_init__(self) -> None:
        if self.is_float and (self.bits, self.signed, self.symmetric, self.narrow) != (_FLOAT8_BITS, True, True, False):
            raise ValueError("float8 has 8 bits, and is signed, symmetric and not narrow")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"a scheme has 2 to 8 bits, not {self.bits}")
        if any(entry != -1 and entry < 1 for entry in self.block_shape):
            raise ValueError(
                f"block shape {self.block_shape}: every entry must be positive, or -1 for the whole dimension"
            )

    @property
    def is_float(self) -> bool:
        """Whether elements are small floats rather than integers."""
        return self.format != "int"

    @property
    def qmin(self) -> int:
        """The lowest integer (or finite float) in use."""
        if self.is_float:
            return -_FLOAT8_LARGEST
        return (-(1 << (self.bits - 1)) if self.signed else 0) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The highest integer (or finite float) in use."""
        if self.is_float:
            return _FLOAT8_LARGEST
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def centre(self) -> int:
        """The zero point of the symmetric form."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array type that holds the integers or floats, one to an element, before any packing."""
        if self.is_float:
            return _FLOAT8
        return np.dtype(np.int8) if self.signed else np.dtype(np.uint8)

    @property
    def axis(self) -> int | None:
        """The `axis` of an ONNX QuantizeLinear: that of the channels, or the one that is cut into groups.

        None per tensor, and for blocks that ONNX cannot express.
        """
        split = [axis for axis, entry in enumerate(self.block_shape) if entry != -1]
        if len(split) == 1 and self.block_shape[split[0]] == 1:
            return split[0]
        groups = [axis for axis in split if self.block_shape[axis] > 1]
        return groups[0] if len(groups) == 1 and len(split) == len(self.block_shape) else None

    @property
    def block_size(self) -> int:
        """The `block_size` of an ONNX QuantizeLinear: elements of a group along `axis`, 0 unless per group."""
        return 0 if self.axis is None or self.block_shape[self.axis] == 1 else self.block_shape[self.axis]

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """Return numbers that are divided by their scale, rounded half to even as the format does.

        Integers are not saturated, since a zero point may follow; floats are, at their last finite value.
        """
        if not self.is_float:
            return np.asarray(np.rint(values))
        return np.asarray(np.clip(values, self.qmin, self.qmax)).astype(self.dtype).astype(values.dtype)

    def per_tensor(self) -> Scheme:
        """Return the scheme with one scale for everything."""
        return dataclasses.replace(self, block_shape=())

    def per_channel(self, rank: int, axis: int) -> Scheme:
        """Return the scheme with one scale for each index along `axis` (negative: from the end) of a rank-`rank` array.

        Raises:
            ValueError: the array has no such axis.
        """
        axis = _positive(axis, rank)
        return dataclasses.replace(self, block_shape=tuple(1 if index == axis else -1 for index in range(rank)))

    def per_group(self, rank: int, axis: int, size: int) -> Scheme:
        """Return the scheme with one scale for each run of `size` elements along `axis` of a rank-`rank` array.

        Raises:
            ValueError: the array has no such axis, or `size` is not positive.
        """
        axis = _positive(axis, rank)
        return dataclasses.replace(self, block_shape=tuple(size if index == axis else 1 for index in range(rank)))

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many blocks there are along each dimension of an array of `shape`.

        Raises:
            ValueError: the block shape is of another rank.
        """
        blocks = self.block_shape or (-1,) * len(shape)
        if len(blocks) != len(shape):
            raise ValueError(f"block shape {blocks} does not fit an array of shape {shape}")
        return tuple(1 if entry == -1 else -(-size // entry) for size, entry in zip(shape, blocks, strict=True))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of scales and zero points for an array of `shape`, laid out as ONNX wants them.

        () per tensor, (channels,) per channel, otherwise one entry a block at the array's rank.

        Raises:
            ValueError: the block shape is of another rank.
        """
        grid = self.grid(shape)
        if all(entry == -1 for entry in self.block_shape):
            return ()
        return grid if self.axis is None or self.block_size else (grid[self.axis],)


def _positive(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError(f"an array of {rank} dimensions has no axis {axis}")
    return axis % rank


INT8 = Scheme()
"""Symmetric -128..127."""
INT8_WEIGHT = Scheme(narrow=True)
"""Symmetric -127..127: no product of two int8 overflows in a kernel that adds pairs in 16 bits."""
INT8_ACTIVATION = Scheme(symmetric=False)
"""Asymmetric -128..127."""
UINT8 = Scheme(signed=False, symmetric=False)
"""Asymmetric 0..255: the activations of the CPU's integer kernels."""
UINT8_WEIGHT = Scheme(signed=False)
"""Symmetric around 128."""
FLOAT8 = Scheme(format="float8e4m3fn")
"""float8_e4m3fn: four bits of exponent, three of mantissa."""
