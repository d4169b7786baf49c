"""The principal directions of a covariance, the same to the bit on any number of threads.

LAPACK's eigenvectors differ in their last digits with the number of threads. They are therefore rounded to a grid far
coarser than that, and made orthogonal again by products alone, whose sums do not depend on threads.
"""

from __future__ import annotations

import numpy as np

__all__ = ["eigenbasis"]

_GRID = 1 << 18
_ROUNDS = 4


def eigenbasis(covariance: np.ndarray) -> np.ndarray:
    """Return an orthogonal matrix whose columns are the principal directions, the largest first.

    Args:
        covariance: float64 [n, n], symmetric, positive semidefinite but for rounding, finite.

    Returns:
        float64 [n, n], orthogonal to machine precision; directions within 1e-4 of the eigenvectors'. In each column
        the element of the largest magnitude is positive.

    Raises:
        ValueError: an element is not finite.
    """
    if not np.isfinite(covariance).all():
        raise ValueError("the covariance has an element that is not finite")
    _, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    basis = vectors[:, ::-1]
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=0)[None], axis=0)
    basis = np.rint(basis * np.sign(largest) * _GRID) / _GRID
    # Newton's iteration for the nearest orthogonal matrix (Higham 1986); the rounding error squares in each round.
    for _ in range(_ROUNDS):
        basis = basis @ (1.5 * np.eye(len(basis)) - 0.5 * (basis.T @ basis))
    return np.asarray(basis)
