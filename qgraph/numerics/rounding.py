"""Rounding one input of a weight matrix at a time: every output has its own scale and zero point.

The matrix lies as [K, N] here: what belongs to one input is one contiguous row, and a group's parameters are one row.
"""

from __future__ import annotations

import numpy as np

from qgraph.numerics.column_loop import transposed
from qgraph.numerics.formats import nearest_level
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, levels

__all__ = ["Grid", "Rounder"]


class Grid:
    """The representable numbers of some groups: `number * scale`, where a number is an integer or a level.

    Attributes:
        scheme: the format.
        scale: float [G, M].
        zero_point: float [G, M]; None for code books.
    """

    def __init__(self, scheme: WeightScheme, scale: np.ndarray, zero_point: np.ndarray | None) -> None:
        self.scheme = scheme
        self.scale = scale
        self.zero_point = zero_point
        self._reciprocal = 1 / scale
        if zero_point is None:
            self._levels = levels(scheme).astype(scale.dtype)
        else:
            self._lowest = -zero_point
            self._highest = scheme.top - zero_point

    def put(self, groups: slice, outputs: slice | np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None) -> None:
        """Set the parameters of some groups and outputs (a slice, or bool [M]): [groups, outputs]."""
        where = groups, outputs
        self.scale[where] = scale
        self._reciprocal[where] = 1 / self.scale[where]
        if self.zero_point is not None:
            self.zero_point[where] = zero_point
            self._lowest[where] = -self.zero_point[where]
            self._highest[where] = self.scheme.top - self.zero_point[where]

    def round(self, group: int, target: np.ndarray, number: np.ndarray) -> None:
        """Put the numbers nearest to `target` [M] into `number` [M]."""
        np.multiply(target, self._reciprocal[group], out=number)
        if self.zero_point is None:
            number[...] = self._levels[nearest_level(number, self.scheme.format)]
            return
        np.rint(number, out=number)
        np.maximum(number, self._lowest[group], out=number)
        np.minimum(number, self._highest[group], out=number)

    def codes(self, group: int, numbers: np.ndarray) -> np.ndarray:
        """Return the codes, uint8, of numbers of one group, [..., M]."""
        if self.zero_point is None:
            return np.searchsorted(self._levels, numbers).astype(np.uint8)
        return np.asarray((numbers + self.zero_point[group]).astype(np.uint8))

    def numbers(self, group: int, codes: np.ndarray) -> np.ndarray:
        """Return the numbers, float, that codes of one group stand for before they are scaled, [..., M]."""
        if self.zero_point is None:
            return np.asarray(self._levels[codes])
        return np.asarray(codes - self.zero_point[group])


class Rounder:
    """A weight matrix that is being rounded.

    Attributes:
        grid: the parameters of all groups.
        codes: uint8 [K, N].
        group: inputs that share parameters.
    """

    def __init__(self, scheme: WeightScheme, shape: tuple[int, int], dtype: type[np.floating]) -> None:
        """Start with codes of zero; `shape` is [K, N]."""
        inputs, outputs = shape
        parameters = (scheme.groups(inputs), outputs)
        self.grid = Grid(scheme, np.ones(parameters, dtype), np.zeros(parameters, dtype) if scheme.is_integer else None)
        self.codes = np.zeros(shape, np.uint8)
        self.group = min(scheme.group or inputs, inputs)
        self._number = np.empty(outputs, dtype)

    def put(self, groups: slice, scale: np.ndarray, zero_point: np.ndarray | None) -> None:
        """Set parameters, as `weights.group_parameters` returns them: [N, groups]."""
        self.grid.put(groups, slice(None), scale.T, None if zero_point is None else zero_point.T)

    def round(self, index: int, target: np.ndarray) -> np.ndarray:
        """Round input `index` to its codes; return what they stand for, [N], until the next call."""
        group, number = index // self.group, self._number
        self.grid.round(group, target, number)
        if self.grid.zero_point is None:
            self.codes[index] = self.grid.codes(group, number)
        else:
            np.add(number, self.grid.zero_point[group], out=self.codes[index], casting="unsafe")
        number *= self.grid.scale[group]
        return number

    def put_error(self, rows: np.ndarray, error: np.ndarray) -> None:
        """Put the weights `rows` [K, N] less what their codes stand for into `error`."""
        for index, codes in enumerate(self.codes):
            group = index // self.group
            np.multiply(self.grid.numbers(group, codes), self.grid.scale[group], out=error[index])
            np.subtract(rows[index], error[index], out=error[index])

    def keep(self, other: Rounder, outputs: np.ndarray) -> None:
        """Take over another rounding of the same matrix for some outputs: bool [N]."""
        np.copyto(self.codes, other.codes, where=outputs)
        zero_point = other.grid.zero_point
        self.grid.put(
            slice(None),
            outputs,
            other.grid.scale[:, outputs],
            None if zero_point is None else zero_point[:, outputs],
        )

    def result(self) -> QuantizedWeight:
        """Return what has been rounded, [N, K]."""
        zero_point = self.grid.zero_point
        return QuantizedWeight(
            transposed(self.codes, np.uint8),
            np.ascontiguousarray(self.grid.scale.T, np.float32),
            None if zero_point is None else np.ascontiguousarray(zero_point.T.astype(np.uint8)),
            self.grid.scheme,
        )
