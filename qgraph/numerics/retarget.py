"""Weights that make up for what the layers before have done to a layer's input.

After the layers before were quantized, a layer gets xq in the place of x. What it should give is still x W^T. The
weights that come nearest to that, in least squares over the samples, are

    W' = W + W D H^-1        D = (2/n) sum (x - xq)^T xq,    H = (2/n) sum xq^T xq

and quantizing W' in the metric of H is then the same as quantizing W for the original outputs ("asymmetric
calibration", Li et al. 2025, GPTAQ, section 3.2, there folded into the error feedback). H is damped, so that directions
in which there are hardly any samples keep the weights as they are.
"""

from __future__ import annotations

import numpy as np

from qgraph.numerics.hessian import Triangle, factorize

__all__ = ["Drift", "solve"]

_BLOCK = 64


class Drift:
    """How a layer's inputs have moved, summed while they stream by.

    Args:
        inputs: of the layer, K.
    """

    def __init__(self, inputs: int) -> None:
        self.rows = 0
        self._sum = np.zeros((inputs, inputs))

    def add(self, original: np.ndarray, changed: np.ndarray) -> None:
        """Count samples in: float32 [n, K] each. Products are float32, their sum is float64."""
        self._sum += (original - changed).T @ changed
        self.rows += len(changed)

    def retarget(self, weight: np.ndarray, hessian: np.ndarray, *, damping: float, share: float = 1.0) -> np.ndarray:
        """Return W', float32 [N, K].

        Args:
            weight: W [N, K].
            hessian: H [K, K] of the changed inputs.
            damping: share of its mean diagonal that is added.
            share: of the drift that is made up for. All of it fits the samples, and less what other texts need.

        Raises:
            ValueError: the Hessian is not finite, or far from positive.
        """
        if not self._sum.any():
            return np.asarray(weight, np.float32)
        damped = np.array(hessian, np.float64)
        idle = damped.diagonal() <= 0
        damped[idle, idle] = damped.diagonal().mean()
        pull = np.asarray(weight, np.float64) @ (self._sum * (2.0 * share / self.rows))
        shift = solve(factorize(damped, damping, np.float64), pull)
        return np.asarray(weight + shift, np.float32)


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
