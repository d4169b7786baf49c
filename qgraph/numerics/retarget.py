"""Weights that make up for what the layers before have done to a layer's input.

After the layers before were quantized, a layer gets xq in the place of x. What it should give is still x W^T. The
weights that come nearest to that, in least squares over the samples, are

    W' = W + (W D + S) H^-1        D = (2/n) sum (x - xq)^T xq,    H = (2/n) sum xq^T xq

and quantizing W' in the metric of H is then the same as quantizing W for the original outputs ("asymmetric
calibration", Li et al. 2025, GPTAQ, section 3.2, there folded into the error feedback). Where the outputs are added to
a residual stream r, which has changed to rq, S = (2/n) sum (r - rq)^T xq lets the sum come near to what it was; else it
is zero. H is damped, so that directions in which there are hardly any samples keep the weights as they are.
"""

from __future__ import annotations

import numpy as np

from qgraph.numerics.hessian import Triangle, factorize
from qgraph.numerics.products import product, steady

__all__ = ["Drift", "retarget", "solve"]

_BLOCK = 64


class Drift:
    """How something has moved, against a layer's changed inputs, summed while samples stream by.

    Args:
        inputs: of the layer, K.
        width: of what has moved, M: its inputs (the default) or what its outputs are added to.
    """

    def __init__(self, inputs: int, width: int | None = None) -> None:
        self.rows = 0
        self._sum = np.zeros((inputs if width is None else width, inputs))

    def add(self, moved: np.ndarray, inputs: np.ndarray) -> None:
        """Count samples in: float32 [n, M] and [n, K]. Products are float32, their sum is float64."""
        with steady():  # the last bits depend on the number of threads otherwise
            self._sum += product(moved.T, inputs)
        self.rows += len(inputs)

    def mean(self) -> np.ndarray:
        """Return (2/n) sum moved^T inputs, float64 [M, K]."""
        return np.asarray(self._sum * (2.0 / max(self.rows, 1)))

    def through(self, weight: np.ndarray) -> np.ndarray:
        """Return the same of what `weight` [N, M] makes of it: float64 [N, K]."""
        with steady():
            return product(np.asarray(weight, np.float64), self.mean())


def retarget(weight: np.ndarray, pull: np.ndarray, hessian: np.ndarray, damping: float) -> np.ndarray:
    """Return the weights to aim at, float32 [N, K].

    Args:
        weight: W [N, K].
        pull: W D + S [N, K], or a share of it.
        hessian: H [K, K] of the changed inputs.
        damping: share of its mean diagonal that is added.

    Raises:
        ValueError: the Hessian is not finite, or far from positive.
    """
    if not pull.any():
        return np.asarray(weight, np.float32)
    alive = np.array(hessian, np.float64)
    idle = alive.diagonal() <= 0
    alive[idle, idle] = alive.diagonal().mean()
    return np.asarray(weight + solve(factorize(alive, damping, np.float64), pull), np.float32)


@steady()
def solve(triangle: Triangle, right: np.ndarray) -> np.ndarray:
    """Return right H^-1, float64 [N, K], for the damped H that was factorized; `right` is [N, K].

    By blocks, since products of matrices do not depend on the number of threads, and LAPACK's solvers do.
    """
    lower = np.tril(np.asarray(triangle.lower, np.float64), -1)
    np.fill_diagonal(lower, 1.0)
    result = np.array(right, np.float64)
    starts = range(0, len(lower), _BLOCK)
    for start in reversed(starts):
        block = slice(start, start + _BLOCK)
        result[:, block] -= result[:, start + _BLOCK :] @ lower[start + _BLOCK :, block]
        result[:, block] = result[:, block] @ np.linalg.inv(lower[block, block])
    result /= triangle.pivots
    upper = lower.T
    for start in starts:
        block = slice(start, start + _BLOCK)
        result[:, block] -= result[:, :start] @ upper[:start, block]
        result[:, block] = result[:, block] @ np.linalg.inv(upper[block, block])
    return result
