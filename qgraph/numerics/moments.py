"""What is summed of a layer's inputs while they stream by: their second moments, and how they have drifted.

A layer may be in groups, each with inputs of its own (a grouped or depthwise convolution): then all is a stack, with
the groups as first axis.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from qgraph.numerics.hessian import Hessian
from qgraph.numerics.products import steady
from qgraph.numerics.retarget import Drift, retarget

__all__ = ["LayerMoments"]

_CHUNK = 1 << 22
"""Elements of a stack of rows that are multiplied at a time."""


class LayerMoments:
    """Sums over the rows that go into a layer.

    Attributes:
        rows: samples seen.
        drifts: whether anything has moved.

    Args:
        inputs: of the layer, K.
        groups: G; sums have a first axis of groups if there is more than one.
    """

    def __init__(self, inputs: int, groups: int = 1) -> None:
        self._inputs = inputs
        self._groups = groups
        self._square: Hessian | _StackSum = Hessian(inputs) if groups == 1 else _StackSum(groups, inputs, inputs)
        self._drift: Drift | _StackSum | None = None
        self._added: dict[Hashable, Drift | _StackSum] = {}

    @property
    def rows(self) -> int:
        """Samples seen."""
        return self._square.rows

    @property
    def drifts(self) -> bool:
        """Whether the original rows were given too."""
        return self._drift is not None

    @property
    def hessian(self) -> np.ndarray:
        """(2/n) sum x^T x, float64 [K, K] or [G, K, K]."""
        return self._square.matrix if isinstance(self._square, Hessian) else self._square.mean()

    def add(self, changed: np.ndarray, original: np.ndarray | None = None) -> None:
        """Count rows in: float32 [n, K], or [G, n, K] in groups; `original` as they were before anything changed."""
        if isinstance(self._square, Hessian):
            self._square.add(changed)
        else:
            self._square.add(changed, changed)
        if original is not None:
            self._drift = self._drift or self._sum(self._inputs)
            self._drift.add(original - changed, changed)

    def add_moved(self, key: Hashable, moved: np.ndarray, changed: np.ndarray) -> None:
        """Count in how that has moved which is added to the outputs of the layer `key`: [n, M], or [G, n, M]."""
        if key not in self._added:
            self._added[key] = self._sum(moved.shape[-1])
        self._added[key].add(moved, changed)

    def pull(self, weight: np.ndarray, key: Hashable = None) -> np.ndarray:
        """Return what the weights [.., M, K] of a layer shall make up for: (W D + S), float64; see `retarget`."""
        if self._drift is None:
            return np.zeros(weight.shape)
        with steady():
            found = np.asarray(weight, np.float64) @ self._drift.mean()
        return np.asarray(found + self._added[key].mean() if key in self._added else found)

    def wanted(self, weight: np.ndarray, pull: np.ndarray, damping: float) -> np.ndarray:
        """Return the weights to come near to, float32 [.., M, K]."""
        hessian = self.hessian
        if self._groups == 1:
            return retarget(weight, pull, hessian, damping)
        diagonal = np.einsum("gkk->gk", hessian)
        mean = diagonal.mean(axis=1, keepdims=True)
        diagonal += np.where(mean > 0, damping * mean, 1.0)
        with steady():
            moved = np.linalg.solve(hessian, pull.swapaxes(1, 2)).swapaxes(1, 2)
        return np.asarray(weight + moved, np.float32)

    def _sum(self, width: int) -> Drift | _StackSum:
        if self._groups == 1:
            return Drift(self._inputs, width)
        return _StackSum(self._groups, width, self._inputs)


class _StackSum:
    """(2/n) sum left^T right for stacks of rows [G, n, M] and [G, n, K]. Products are float32, their sum is float64."""

    def __init__(self, groups: int, width: int, inputs: int) -> None:
        self.rows = 0
        self._total = np.zeros((groups, width, inputs))

    def add(self, left: np.ndarray, right: np.ndarray) -> None:
        step = max(1, _CHUNK // max(right.shape[1] * right.shape[2], 1))
        with steady():
            for first in range(0, len(right), step):
                part = slice(first, first + step)
                self._total[part] += left[part].swapaxes(1, 2) @ right[part]
        self.rows += right.shape[1]

    def mean(self) -> np.ndarray:
        return np.asarray(self._total * (2.0 / max(self.rows, 1)))
