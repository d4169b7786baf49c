"""Seeded orthogonal matrices that spread outliers over all channels, applied without ever being written out.

    R = diag(signs) (F1 x F2 x ...) / sqrt(n)

is a randomised Hadamard matrix (QuIP#, Tseng et al. 2024; QuaRot, Ashkboos et al. 2024): the signs are random, and the
factors of the Kronecker product are Hadamard matrices, for which n is split into a power of two (Sylvester 1867) and
the order of a Paley construction (1933): q + 1 for a prime q = 3 mod 4, or 2 (q + 1) for a prime q = 1 mod 4. What is
left of n for which neither is known becomes a random orthogonal factor, the Q of a normal matrix.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from qgraph.numerics.products import product, steady

__all__ = ["Rotation", "hadamard", "rotation"]

_WIDEST = 64
"""Size of a factor that is a power of two: products with it run at full speed, and few of them are needed."""
_WIDEST_PALEY = 1024
"""Order up to which a Paley construction is used: a vector takes as many products per element."""


@dataclasses.dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R [n, n].

    Attributes:
        signs: float64 [n], each 1 or -1.
        factors: orthogonal matrices, float64, whose sizes multiply to n.
        is_hadamard: whether all elements of R have the magnitude 1/sqrt(n), so that no outlier survives it.
    """

    signs: np.ndarray
    factors: tuple[np.ndarray, ...]
    is_hadamard: bool

    @property
    def size(self) -> int:
        """n."""
        return len(self.signs)

    def apply(self, array: np.ndarray, axis: int = -1) -> np.ndarray:
        """Return the array with every vector v along `axis` replaced by v R.

        Args:
            array: float, n long along `axis`; computed in float64 and returned in its own type.
            axis: of the vectors. A weight [N, K] whose inputs arrive as x R becomes W R: its axis 1.
        """
        return self._along(array, axis, lambda rows: self._product(rows * self.signs, transposed=False))

    def undo(self, array: np.ndarray, axis: int = -1) -> np.ndarray:
        """Return the array with every vector v along `axis` replaced by v R^T: `apply` undone."""
        return self._along(array, axis, lambda rows: self._product(rows, transposed=True) * self.signs)

    def matrix(self) -> np.ndarray:
        """Return R, float64 [n, n]."""
        return self.apply(np.eye(self.size))

    def _along(self, array: np.ndarray, axis: int, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        if array.shape[axis] != self.size:
            raise ValueError(f"a rotation of {self.size} does not fit axis {axis} of an array of shape {array.shape}")
        moved = np.moveaxis(array, axis, -1)
        with steady():
            rows = function(moved.reshape(-1, self.size).astype(np.float64))
        return np.ascontiguousarray(np.moveaxis(rows.reshape(moved.shape), -1, axis), array.dtype)

    def _product(self, rows: np.ndarray, *, transposed: bool) -> np.ndarray:
        count, before, after = len(rows), 1, self.size
        for factor in self.factors:
            after //= len(factor)
            if after == 1:
                rows = product(rows.reshape(-1, len(factor)), factor.T if transposed else factor)
                break
            parts = rows.reshape(count * before, len(factor), after)
            rows = (factor if transposed else factor.T) @ parts
            before *= len(factor)
        return np.asarray(rows).reshape(count, self.size)


def rotation(size: int, seed: int) -> Rotation:
    """Return a random orthogonal matrix [size, size], the same for the same seed.

    It is a Hadamard matrix with random signs where one can be constructed, else the part for which none can be is the
    orthogonal factor of a random normal matrix. A size with a large part of that kind costs its cube.
    """
    if size < 1:
        raise ValueError(f"a rotation has at least one dimension, not {size}")
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size)
    for odd, power in _splits(size):
        special = _paley(odd)
        if special is not None:
            last = [special / np.sqrt(odd)] if odd > 1 else []
            return Rotation(signs, (*_sylvester(power), *last), is_hadamard=True)
    odd = size // (size & -size)
    with steady():
        q, r = np.linalg.qr(rng.standard_normal((odd, odd)))
    # The signs make the distribution uniform (Mezzadri 2007).
    return Rotation(signs, (*_sylvester(size // odd), q * np.sign(np.diagonal(r))), is_hadamard=False)


def hadamard(size: int, seed: int) -> np.ndarray:
    """Return `rotation(size, seed)` as a matrix, float64 [size, size]."""
    return rotation(size, seed).matrix()


def _splits(size: int) -> Iterator[tuple[int, int]]:
    """Yield (m, power of two) with m times the power equal to `size`, the smallest m first."""
    part = size // (size & -size)
    while part <= min(size, _WIDEST_PALEY):
        yield part, size // part
        part *= 2


def _sylvester(power: int) -> list[np.ndarray]:
    """Return orthogonal Hadamard factors, each of at most 64, whose sizes multiply to a power of two."""
    factors = []
    while power > 1:
        width = min(power, _WIDEST)
        matrix: np.ndarray = np.ones((1, 1))
        while len(matrix) < width:
            matrix = np.kron([[1.0, 1.0], [1.0, -1.0]], matrix)
        factors.append(matrix / np.sqrt(width))
        power //= width
    return factors


@functools.lru_cache(maxsize=16)
def _paley(order: int) -> np.ndarray | None:
    """Return a Hadamard matrix of this order by one of Paley's constructions (or of order 1), if there is one."""
    if order == 1:
        return np.ones((1, 1))
    if order % 4:
        return None
    prime = order - 1
    if _is_prime(prime):
        # Order 4k: the prime is 3 mod 4, and its Jacobsthal matrix is skew.
        result = np.ones((order, order))
        result[1:, 1:] = _jacobsthal(prime) + np.eye(prime)
        result[1:, 0] = -1
        return result
    prime = order // 2 - 1
    if prime % 4 == 1 and _is_prime(prime):
        conference = np.ones((prime + 1, prime + 1))
        conference[0, 0] = 0
        conference[1:, 1:] = _jacobsthal(prime)
        return np.kron(conference, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(prime + 1), [[1.0, -1.0], [-1.0, -1.0]])
    return None


def _jacobsthal(prime: int) -> np.ndarray:
    """Return [i, j] -> 1, -1 or 0 as i - j is a square modulo the prime, is none, or is zero."""
    character = np.full(prime, -1.0)
    character[np.arange(prime, dtype=np.int64) ** 2 % prime] = 1
    character[0] = 0
    index = np.arange(prime)
    return np.asarray(character[(index[:, None] - index) % prime])


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
