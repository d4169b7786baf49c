"""What a layer's inputs say about its weights: the second moment of the inputs, and its triangular factor.

The output of a linear layer moves by x (W - Q)^T when its weight W becomes Q. Over all inputs x that is
tr((W - Q) H (W - Q)^T) with H = (2/n) sum x^T x, the Hessian of the squared error (Frantar et al. 2022, section 3.1).

The factorization is made of products, whose sums do not depend on the number of threads. LAPACK's own do.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qgraph.numerics.products import gram, mirror, product, steady

__all__ = ["Hessian", "Triangle", "factorize", "output_error"]

_ROWS = 4096
_BLOCK = 256
_DIAGONAL_BLOCK = 64
_ATTEMPTS = 8


class Hessian:
    """The Hessian of a layer's squared output error, summed while its inputs stream by.

    Attributes:
        inputs: of the layer, K.
        rows: samples seen.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.rows = 0
        self._sum = np.zeros((inputs, inputs))
        self._magnitudes = np.zeros(inputs)

    def add(self, x: np.ndarray) -> None:
        """Count samples in: float [..., K], one sample a row. Products are float32, their sum is float64.

        Raises:
            ValueError: the last axis is not K, or a product is not finite.
        """
        if x.ndim == 0 or x.shape[-1] != self.inputs:
            raise ValueError(f"samples of shape {x.shape} do not feed a layer of {self.inputs} inputs")
        rows = np.ascontiguousarray(x.reshape(-1, self.inputs), np.float32)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            with steady():
                squares = gram(part)
            finite = np.isfinite(squares.diagonal())
            if not finite.all():
                column = int(np.argmin(finite))
                raise ValueError(f"samples of input {column} are not finite, or too large for float32 when squared")
            self._sum += squares
            self._magnitudes += np.abs(part).sum(axis=0, dtype=np.float64)
        self.rows += len(rows)

    @property
    def matrix(self) -> np.ndarray:
        """(2/n) sum x^T x, float64 [K, K]; zeros before the first sample."""
        result = self._sum * (2.0 / max(self.rows, 1))
        mirror(result)
        return result

    @property
    def mean_abs(self) -> np.ndarray:
        """Mean magnitude of every input, float64 [K]."""
        return np.asarray(self._magnitudes / max(self.rows, 1))


def output_error(weight: np.ndarray, approximation: np.ndarray, hessian: np.ndarray) -> float:
    """Return tr(E H E^T) of E = weight - approximation [N, K]: the layer's squared output error for H [K, K]."""
    error = np.asarray(weight, np.float64) - approximation
    with steady():
        return float(np.einsum("ij,ij->", product(error, np.asarray(hessian, np.float64)), error))


@dataclasses.dataclass(frozen=True)
class Triangle:
    """H + damping * mean(diagonal) * I = U diag(pivots) U^T with U unit upper triangular; `lower` is U^T.

    With the errors e_j = w_j - q_j of the inputs before k, the target that input k is best rounded to is
    w_k + sum_j<k lower[k, j] e_j, and whatever it misses then costs pivots[k] times its square: the error feedback of
    GPTQ, without the inverse of H (Chee et al. 2023, QuIP, theorem 6, shows the two to be equal).

    Attributes:
        lower: float [K, K], below the diagonal; the diagonal is zero instead of one, and what lies above is undefined.
        pivots: float64 [K].
        damping: that was needed, as a share of the mean diagonal.
        retries: how often the damping was raised tenfold before the factorization went through.
    """

    lower: np.ndarray
    pivots: np.ndarray
    damping: float
    retries: int

    def inverse(self) -> np.ndarray:
        """Return the inverse of the damped Hessian, float64 [K, K]; meant for small ones."""
        size = len(self.pivots)
        result = np.eye(size)
        lower = np.tril(self.lower.astype(np.float64), -1)
        starts = range(0, size, _DIAGONAL_BLOCK)
        squares = {
            start: np.linalg.inv(np.eye(len(part)) + part[:, start : start + len(part)])
            for start in starts
            for part in (lower[start : start + _DIAGONAL_BLOCK],)
        }
        for start in reversed(starts):
            part = slice(start, start + _DIAGONAL_BLOCK)
            later = slice(start + _DIAGONAL_BLOCK, None)
            result[part] = squares[start].T @ (result[part] - lower[later, part].T @ result[later])
        result /= self.pivots[:, None]
        for start in starts:
            part = slice(start, start + _DIAGONAL_BLOCK)
            result[part] = squares[start] @ (result[part] - lower[part, :start] @ result[:start])
        return result


def factorize(hessian: np.ndarray, damping: float, dtype: type[np.floating] = np.float32) -> Triangle:
    """Factorize a damped Hessian from its last input to its first.

    Args:
        hessian: [K, K], finite, symmetric, positive semidefinite but for rounding; its diagonal has no zeros.
        damping: share of the mean diagonal that is added; raised tenfold (at least to 1e-6) while it is too little.
        dtype: of the factor. A factor in single precision passes for a damped Hessian of any realistic spectrum.

    Raises:
        ValueError: no damping helps: the matrix is far from positive.
    """
    mean = float(np.mean(hessian.diagonal(), dtype=np.float64))
    for attempt in range(_ATTEMPTS):
        share = damping if attempt == 0 else max(damping, 1e-7) * 10.0**attempt
        work = np.array(hessian, dtype)
        work[np.diag_indices(len(work))] += dtype(share * mean)
        with steady():
            sound = _eliminate(work)
        if sound:
            root = work.diagonal().astype(np.float64)
            work /= work.diagonal()[:, None].copy()
            np.fill_diagonal(work, 0)
            return Triangle(work, root * root, share, attempt)
    raise ValueError(f"the Hessian is not positive definite even with {share:g} of its mean diagonal added")


def _eliminate(work: np.ndarray) -> bool:
    """Put T, lower triangular, with H = T^T T in the place of H; return False where a pivot is not positive."""
    for stop in range(len(work), 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        if stop < len(work):
            work[start:stop, :stop] -= product(work[stop:, start:stop].T, work[stop:, :stop])
        for last in range(stop, start, -_DIAGONAL_BLOCK):
            first = max(start, last - _DIAGONAL_BLOCK)
            if last < stop:
                work[first:last, :last] -= product(work[last:stop, first:last].T, work[last:stop, :last])
            square = work[first:last, first:last].astype(np.float64)
            try:
                upper = np.linalg.cholesky(square[::-1, ::-1])[::-1, ::-1]
            except np.linalg.LinAlgError:
                return False
            work[first:last, first:last] = upper.T
            if first:
                inverse = np.linalg.inv(upper).astype(work.dtype)
                work[first:last, :first] = product(inverse, work[first:last, :first])
    return bool((work.diagonal() > 0).all() and np.isfinite(work.diagonal()).all())
