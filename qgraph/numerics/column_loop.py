"""Visit the inputs of a layer one by one and carry the error of each over to those that are still to come.

    target_k = weight_k + sum over j of coupling[k, j] * error_j

The matrix lies as [K, N] here, so that what belongs to one input is one contiguous row. A block first takes in all
earlier errors in one matrix product; inside it smaller blocks do the same, down to single inputs ("lazy batch
updates", Frantar et al. 2022, section 3.3). What is done with an input is the caller's: rounding it, or dropping it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from qgraph.numerics.products import product

__all__ = ["BLOCK", "Begin", "Choose", "transposed", "visit"]

BLOCK = 128
"""Inputs that take in the errors of all earlier ones in one product."""

Choose = Callable[[int, np.ndarray, np.ndarray], None]
Begin = Callable[[int, int, np.ndarray], None]

_SPANS = (32, 8, 1)
_STRIPE = 64
_SOLVED = 64


def transposed(array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """Return a contiguous copy of a matrix's transpose; in stripes, which is three times as fast as in one go."""
    if array.strides[0] < array.strides[1]:
        return np.array(array.T, dtype, order="C")
    result = np.empty(array.shape[::-1], dtype)
    for start in range(0, len(array), _STRIPE):
        result[:, start : start + _STRIPE] = array[start : start + _STRIPE].T
    return result


def visit(
    target: np.ndarray,
    coupling: np.ndarray,
    error: np.ndarray,
    choose: Choose,
    *,
    block: int = BLOCK,
    begin: Begin | None = None,
    span: int = 0,
) -> None:
    """Visit inputs in order; inside `products.steady`.

    Args:
        target: [n, N]; holds the weights (plus what came in from elsewhere), and is brought up to date on the way.
        coupling: [n, n]; only what lies below the diagonal is read.
        error: [n, N]; filled row by row.
        choose: called as choose(index, target row, error row): decides about one input, and writes the error that it
            makes, or by how much its error changes.
        block: inputs in the widest product.
        begin: called as begin(start, stop, weights) before the first of every `span` inputs; what it gets, [span, N],
            are the weights that would make up best for all errors so far: what the targets become while no further
            error is made.
        span: see `begin`; `block` is then trimmed to a multiple of it, or widened to it.
    """
    sizes = {1, *(size for size in _SPANS if size < block), block}
    if begin is not None:
        sizes = {size for size in sizes if size < span} | {1, span, block // span * span or span}
    walk = _Walk(target, target.copy() if begin is not None else target, coupling, error, choose, begin, span)
    walk.visit(0, len(target), sorted(sizes, reverse=True))


@dataclasses.dataclass(frozen=True)
class _Walk:
    target: np.ndarray
    weights: np.ndarray
    coupling: np.ndarray
    error: np.ndarray
    choose: Choose
    begin: Begin | None
    span: int

    def visit(self, start: int, stop: int, sizes: list[int]) -> None:
        for first in range(start, stop, sizes[0]):
            last = min(first + sizes[0], stop)
            if first > start:
                self.target[first:last] += product(self.coupling[first:last, start:first], self.error[start:first])
            if self.begin is not None and sizes[0] == self.span:
                self.begin(first, last, self._without_further_error(first, last))
            if sizes[0] > 1:
                self.visit(first, last, sizes[1:])
            else:
                self.choose(first, self.target[first], self.error[first])

    def _without_further_error(self, start: int, stop: int) -> np.ndarray:
        """Return the targets [stop - start, N] at which inputs would be met exactly, one after the other.

        Meeting target t_j exactly leaves an error w_j - t_j, which moves the targets after it: with what has come in
        so far, c, and the coupling L among the inputs themselves, (I + L) (t - w) = c.
        """
        moved = self.target[start:stop] - self.weights[start:stop]
        coupling = np.tril(self.coupling[start:stop, start:stop], -1)
        for first in range(0, stop - start, _SOLVED):
            rows = slice(first, first + _SOLVED)
            square = coupling[rows, rows].astype(np.float64)
            inverse = np.linalg.inv(square + np.eye(len(square))).astype(coupling.dtype)
            moved[rows] = product(inverse, moved[rows] - product(coupling[rows, :first], moved[:first]))
        moved += self.weights[start:stop]
        return np.asarray(moved)
