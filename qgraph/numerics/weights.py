"""Weight matrices in few bits: groups of neighbouring inputs share a scale, and integers also a zero point.

    integers     weight = (code - zero_point) * scale          code = clip(rint(weight / scale) + zero_point)
    code books   weight = levels[code] * scale                 code = the nearest level's index

A weight matrix is [N, K]: N outputs, K inputs. Groups run along K; the last one may be shorter. Results do not depend
on how the matrix lies in memory: one that was stored as [K, N] is passed as its transposed view and is not copied.

What is defined for unusual groups: zeros get scale 1 and are exact; a constant is met by the scale alone; a range so
small that its scale would be denormal gets the least normal one. NaN and infinite weights are refused.

A symmetric integer of up to 4 bits has one level more below zero than above it, which at 2 bits is half of the
range. The scale is therefore negative where the largest magnitude of a group is positive. That is legal wherever a
scale is a plain factor (MatMulNBits, DequantizeLinear), and ONNX Runtime's own quantizer does the same.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from qgraph.numerics.formats import CODE_BOOKS, code_book_scale, nearest_level, nvfp4_tensor_scale
from qgraph.numerics.weight_tiles import Tile, tiles

__all__ = [
    "Method",
    "QuantizedWeight",
    "WeightScheme",
    "encode",
    "group_parameters",
    "levels",
    "quantize_weight",
]

Method = Literal["minmax", "mse"]

_BITS = (2, 3, 4, 5, 6, 8)
_TINY = np.float32(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class WeightScheme:
    """How a weight matrix [N, K] is stored.

    Attributes:
        format: "int", or a code book: "nf4", "fp8e4m3", "fp8e5m2", "mxfp4", "nvfp4", "ternary".
        bits: 2, 3, 4, 5, 6 or 8 of an integer; a code book fixes it.
        group: inputs that share a scale, 0 for the whole row; mxfp4 (32) and nvfp4 (16) fix it.
        symmetric: the zero point of an integer is 2^(bits-1), rather than free; always true of a code book.
    """

    format: str = "int"
    bits: int = 4
    group: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.group < 0:
            raise ValueError(f"a group has at least one input (or 0 for the whole row), not {self.group}")
        if self.format == "int":
            if self.bits not in _BITS:
                raise ValueError(f"weights have 2, 3, 4, 5, 6 or 8 bits, not {self.bits}")
            return
        if self.format not in CODE_BOOKS:
            raise ValueError(f"there is no weight format {self.format!r}; there are int, {', '.join(CODE_BOOKS)}")
        book = CODE_BOOKS[self.format]
        object.__setattr__(self, "bits", book.bits)
        object.__setattr__(self, "symmetric", True)
        if book.group is not None:
            object.__setattr__(self, "group", book.group)

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers with a zero point, rather than indices into `levels`."""
        return self.format == "int"

    @property
    def centre(self) -> int:
        """The zero point of a symmetric integer."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1 if self.is_integer else len(CODE_BOOKS[self.format].levels) - 1

    def groups(self, inputs: int) -> int:
        """Return how many scales a row of `inputs` weights has."""
        return -(-inputs // self.group) if self.group else 1

    def bits_per_weight(self, inputs: int, scale_bits: int = 32) -> float:
        """Return the bits of information per weight: codes, scales and, where they are free, zero points.

        Args:
            inputs: of a row, K.
            scale_bits: of a stored scale; mxfp4 and nvfp4 have 8.
        """
        element, extra = float(self.bits), float(scale_bits)
        if self.is_integer:
            extra += 0 if self.symmetric else self.bits
        else:
            book = CODE_BOOKS[self.format]
            element = book.information
            extra = book.scale_bits if book.group else extra
        return element + extra * self.groups(inputs) / inputs


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix in codes.

    Attributes:
        codes: uint8 [N, K], 0 to `scheme.top`.
        scale: float32 [N, G]; what a level or an integer is multiplied with.
        zero_point: uint8 [N, G]; None for code books.
        scheme: how to read them.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    scheme: WeightScheme

    def dequantize(self) -> np.ndarray:
        """Return the weights that the codes stand for, float32 [N, K]."""
        inputs = self.codes.shape[1]
        if self.zero_point is None:
            work = levels(self.scheme)[self.codes]
        else:
            work = self.codes.astype(np.float32)
            work -= spread_groups(self.zero_point.astype(np.float32), self.scheme, inputs)
        work *= spread_groups(self.scale, self.scheme, inputs)
        return np.asarray(work)


def levels(scheme: WeightScheme) -> np.ndarray:
    """Return the code book of a format that is not an integer: float32, ascending; `codes` are indices into it.

    Raises:
        ValueError: the scheme is one of integers.
    """
    if scheme.is_integer:
        raise ValueError("integers have a zero point instead of a code book")
    return np.asarray(CODE_BOOKS[scheme.format].levels, np.float32)


def spread_groups(entries: np.ndarray, scheme: WeightScheme, inputs: int) -> np.ndarray:
    """Return [N, K] (or [N, 1], which broadcasts) from [N, G]: each input's entry of its group."""
    if entries.shape[1] == 1:
        return entries
    return np.repeat(entries, scheme.group, axis=1)[:, :inputs]


def quantize_weight(
    weight: np.ndarray, scheme: WeightScheme, *, method: Method = "mse", importance: np.ndarray | None = None
) -> QuantizedWeight:
    """Round a weight matrix to the nearest codes.

    Args:
        weight: real numbers [N, K].
        scheme: format, bits and groups.
        method: "minmax" lets no weight saturate; "mse" searches the scale (and zero point) of least squared error.
        importance: [K], not negative: what an input's squared error counts in the search. Equal when None.

    Raises:
        ValueError: a weight is NaN or infinite (the message gives its index), or a shape does not fit.
    """
    search = _Search.of(weight, scheme, method, importance)
    result = _empty(weight.shape, scheme)
    for tile in tiles(weight, scheme.group):
        scale, zero_point = search.parameters(tile)
        tile.put_groups(result.scale, scale)
        if result.zero_point is not None and zero_point is not None:
            tile.put_groups(result.zero_point, zero_point)
        tile.put_elements(result.codes, _tile_codes(tile.values, scale, zero_point, scheme))
    return result


def group_parameters(
    weight: np.ndarray, scheme: WeightScheme, *, method: Method = "mse", importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return scale (float32 [N, G]) and zero point (uint8 [N, G], None for code books) as `quantize_weight` does.

    Raises:
        ValueError: as `quantize_weight`.
    """
    search = _Search.of(weight, scheme, method, importance)
    result = _empty(weight.shape, scheme, codes=False)
    for tile in tiles(weight, scheme.group):
        scale, zero_point = search.parameters(tile)
        tile.put_groups(result.scale, scale)
        if result.zero_point is not None and zero_point is not None:
            tile.put_groups(result.zero_point, zero_point)
    return result.scale, result.zero_point


def encode(weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, scheme: WeightScheme) -> np.ndarray:
    """Return the codes (uint8 [N, K]) nearest to a weight matrix at given parameters.

    Args:
        weight: real numbers [N, K].
        scale: float32 [N, G], not zero.
        zero_point: integers [N, G]; None for code books.
        scheme: format, bits and groups.

    Raises:
        ValueError: a shape does not fit.
    """
    require_matrix(weight)
    shape = (weight.shape[0], scheme.groups(weight.shape[1]))
    if scale.shape != shape or (zero_point is not None and zero_point.shape != shape):
        raise ValueError(f"scales of shape {scale.shape} do not fit a weight of shape {weight.shape}: {shape}")
    codes = np.empty(weight.shape, np.uint8)
    for tile in tiles(weight, scheme.group):
        zeros = None if zero_point is None else tile.take_groups(zero_point)
        tile.put_elements(codes, _tile_codes(tile.values, tile.take_groups(scale), zeros, scheme))
    return codes


def require_matrix(weight: np.ndarray) -> None:
    """Raise ValueError unless the array is a matrix with elements."""
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"a weight matrix is [outputs, inputs], not {weight.shape}")


def _empty(shape: tuple[int, ...], scheme: WeightScheme, *, codes: bool = True) -> QuantizedWeight:
    grid = (shape[0], scheme.groups(shape[1]))
    return QuantizedWeight(
        np.empty(shape if codes else (0, 0), np.uint8),
        np.empty(grid, np.float32),
        np.empty(grid, np.uint8) if scheme.is_integer else None,
        scheme,
    )


@dataclasses.dataclass(frozen=True)
class _Search:
    """What the parameters of a group depend on besides its weights."""

    weight: np.ndarray
    scheme: WeightScheme
    method: Method
    importance: np.ndarray | None
    tensor_scale: float

    @classmethod
    def of(cls, weight: np.ndarray, scheme: WeightScheme, method: Method, importance: np.ndarray | None) -> _Search:
        require_matrix(weight)
        if importance is not None:
            importance = np.asarray(importance, np.float32)
            if importance.shape != weight.shape[1:] or not (np.isfinite(importance).all() and importance.min() >= 0):
                raise ValueError(f"importance must be {weight.shape[1]} finite numbers that are not negative")
            largest = importance.max()
            importance = importance / largest if largest > 0 else None
        tensor_scale = nvfp4_tensor_scale(weight) if scheme.format == "nvfp4" else 1.0
        return cls(weight, scheme, method, importance, tensor_scale)

    def parameters(self, tile: Tile) -> tuple[np.ndarray, np.ndarray | None]:
        """Return scale (float32 [1, columns]) and zero point (uint8, None for code books) of a tile."""
        low, high = tile_ranges(tile, self.weight)
        weights = None if self.importance is None else tile.spread(self.importance)
        searched = self.method == "mse"
        if not self.scheme.is_integer:
            largest = np.maximum(-low, high)
            name = self.scheme.format
            return code_book_scale(tile.values, largest, name, self.tensor_scale, weights, search=searched), None
        if searched:
            return search_integer(tile.values, low, high, self.scheme, weights)
        return integer_parameters(low, high, self.scheme)


def tile_ranges(tile: Tile, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest weight of each column, [1, columns], widened to hold zero.

    Raises:
        ValueError: a weight is NaN or infinite in float32 (the message gives its index in `weight`).
    """
    low = np.minimum.reduce(tile.values, axis=0, keepdims=True)
    high = np.maximum.reduce(tile.values, axis=0, keepdims=True)
    # Not a number and infinity pass through minimum and maximum: no other look at the weights is needed.
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        _refuse(weight)
    return np.minimum(low, 0, out=low), np.maximum(high, 0, out=high)


def _refuse(weight: np.ndarray) -> None:
    index = tuple(int(entry) for entry in np.argwhere(~np.isfinite(weight.astype(np.float32)))[0])
    raise ValueError(f"weight {index} is {weight[index]}, which no code can stand for")


def integer_parameters(low: np.ndarray, high: np.ndarray, scheme: WeightScheme) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point at which neither end saturates, [1, columns] each; low <= 0 <= high."""
    if not scheme.symmetric:
        top = np.float32(scheme.top)
        scale = _usable(high / top - low / top)
        zero_point = np.clip(np.rint(-low / scale), 0, top).astype(np.uint8)
        return scale, zero_point
    below, above = np.float32(scheme.centre), np.float32(scheme.centre - 1)
    scale = _usable(np.maximum(-low / below, high / above))
    if scheme.bits <= 4:
        turned = _usable(np.maximum(high / below, -low / above))
        scale = np.where(turned < scale, -turned, scale)
    return scale, np.full(scale.shape, scheme.centre, np.uint8)


def _usable(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), np.maximum(scale, _TINY)).astype(np.float32)


def _tile_codes(
    values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, scheme: WeightScheme
) -> np.ndarray:
    """Return uint8 [group, columns]."""
    work: np.ndarray = np.multiply(values, _reciprocal(scale))
    if zero_point is None:
        return nearest_level(work, scheme.format)
    np.rint(work, out=work)
    work += zero_point.astype(np.float32)
    np.clip(work, 0, np.float32(scheme.top), out=work)
    return work.astype(np.uint8)


def _reciprocal(scale: np.ndarray) -> np.ndarray:
    return np.asarray(np.float32(1) / scale)


_SPANS = {
    2: ((0.65, 1.14), (0.48, 0.95), (0.3, 0.68), (0.15, 0.55)),
    3: ((0.88, 1.14), (0.76, 1.03), (0.56, 0.86), (0.3, 0.75)),
    4: ((0.96, 1.14), (0.9, 1.09), (0.79, 0.97), (0.5, 0.92)),
    5: ((0.98, 1.14), (0.96, 1.12), (0.92, 1.04), (0.7, 1.02)),
    6: ((1.0, 1.14), (0.98, 1.12), (0.96, 1.05), (0.85, 1.02)),
    8: ((1.0, 1.14), (1.0, 1.11), (1.0, 1.06), (0.98, 1.03)),
}
"""Shares of the full range, by bits, between which the best one lies for groups of 16, 64, 256 and 1024: in 96 of 100
groups of normal and of heavy-tailed (Student's t, 4 degrees) weights, by exhaustive search."""
_NOTHING_SATURATES = 1.001
_SYMMETRIC_ROOM = {2: 0.15, 3: 0.08, 4: 0.04, 5: -0.02, 6: -0.06, 8: -0.08}


@functools.cache
def _factors(bits: int, size: int, *, symmetric: bool) -> tuple[float, ...]:
    """Return the shares of the full range that the search tries; the fewer bits and the longer, the more clipping."""
    low, high = (float(np.interp(np.log2(size), (4, 6, 8, 10), ends)) for ends in zip(*_SPANS[bits], strict=True))
    if symmetric:
        low -= 0.04 if bits <= 4 else 0.0
        high += _SYMMETRIC_ROOM[bits] if size <= 512 else 0.04
    few = 8 if symmetric else 6
    return tuple(np.linspace(high, low, few if bits <= 4 and size <= 512 else 12).tolist())


def search_integer(
    values: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    scheme: WeightScheme,
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and zero point of least squared error of each column, [1, columns] each.

    Codes q = clip(rint(x / s)) of a tried scale s have their least squared error at the scale <x, q> / <q, q>, where
    it is <x, x> - <x, q>^2 / <q, q>: the largest quotient wins, and neither error nor scale of a candidate is computed.
    Tried are shares of the full range (of both signs where levels are few and not the same below and above zero),
    then the fitted scale itself, with the zero points beside where they are free. At 4 bits that comes within 0.3 %
    of an exhaustive search, in 8 looks at the weights.

    Args:
        values: float32 [group, columns].
        low: the least of each column, at most 0.
        high: the largest, at least 0.
        scheme: integers.
        weights: what each squared error counts, broadcasting against `values`; equal when None.
    """
    full, zero_point = integer_parameters(low, high, scheme)
    start = _signed_range(low, high, scheme) if scheme.symmetric else full
    best = _BestFit(values * _reciprocal(start), weights, zero_point.astype(np.float32)[0], scheme.top)
    factors = _factors(scheme.bits, len(values), symmetric=scheme.symmetric)
    for factor in factors:
        # Above the full range nothing saturates, where that range touches both ends.
        best.consider(factor, best.start, clip=scheme.symmetric or factor < _NOTHING_SATURATES)
    if factors[0] < (scheme.centre / (scheme.centre - 1) if scheme.symmetric else 1.0):
        # Weights that lie on a grid already keep it, even where cutting the range is best for most.
        best.consider((full / start)[0], best.start)
    if scheme.symmetric and scheme.bits <= 3:
        for factor in factors[::2]:
            best.consider(-factor, best.start)
    if scheme.symmetric:
        best.consider(best.ratio.copy(), best.zero)
    else:
        chosen, zero = best.ratio.copy(), best.zero.copy()
        for step in (-1, 1):
            best.consider(chosen, np.clip(zero + np.float32(step), 0, np.float32(scheme.top)))
    fitted = best.ratio * start
    scale = np.copysign(np.maximum(np.abs(fitted), _TINY), fitted)
    nothing = (low == high) | (best.gain <= 0)
    return np.where(nothing, full, scale), np.where(nothing, zero_point, best.zero.astype(np.uint8))


def _signed_range(low: np.ndarray, high: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    """Return the scale that brings the largest magnitude to the lowest level; its sign where that is positive."""
    signed = np.where(high > -low, -high, -low) / np.float32(scheme.centre)
    magnitude = _usable(np.abs(signed))
    return np.copysign(magnitude, signed) if scheme.bits <= 4 else magnitude


class _BestFit:
    """The scales, as shares of a first one, and zero points that fit columns best among those considered."""

    def __init__(self, unit: np.ndarray, weights: np.ndarray | None, zero: np.ndarray, top: int) -> None:
        columns = unit.shape[1]
        self.start = zero
        self.gain = np.zeros(columns, np.float32)
        self.ratio = np.ones(columns, np.float32)
        self.zero = zero.copy()
        self._unit = unit
        self._weights = weights
        self._weighted = unit if weights is None else unit * weights
        self._top = np.float32(top)
        self._codes = np.empty_like(unit)
        self._scratch = self._codes if weights is None else np.empty_like(unit)

    def consider(self, ratio: float | np.ndarray, zero: np.ndarray, *, clip: bool = True) -> None:
        """Try codes at a share of the scale and a zero point, and keep them where they fit better."""
        codes = self._codes
        np.multiply(self._unit, np.float32(1) / np.asarray(ratio, np.float32), out=codes)
        np.rint(codes, out=codes)
        if clip:
            np.maximum(codes, -zero, out=codes)
            np.minimum(codes, self._top - zero, out=codes)
        product = np.einsum("ij,ij->j", self._weighted, codes)
        if self._weights is not None:
            np.multiply(codes, self._weights, out=self._scratch)
        fitted = product / np.maximum(np.einsum("ij,ij->j", self._scratch, codes), np.float32(1e-30))
        gain = product * fitted
        better = gain > self.gain
        np.copyto(self.gain, gain, where=better)
        np.copyto(self.ratio, fitted, where=better)
        np.copyto(self.zero, zero, where=better)
