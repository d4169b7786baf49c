"""Weights as products of two thin matrices: W [N, K] = B [N, r] A [r, K].

They take r (N + K) multiplications in place of N K. With the second moment H of the inputs, the best A and B for the
output, and not for the weight, are found by principal components of the output: with W H W^T = U diag(s) U^T,
B A = U_r U_r^T W leaves the error s_r+1 + ... That is the truncated singular value decomposition of W H^1/2 (Wang et
al. 2024, "SVD-LLM", theorem 3.1; Yuan et al. 2023, "ASVD"). H = I gives the plain decomposition. No inverse of H is
needed, so that it may be singular.

Where errors of some outputs count more, by a matrix G, W is replaced by G^1/2 W and B by G^-1/2 B: the best for
tr(G dW H dW^T).

Where several layers share a budget, each gets the rank at which one more multiplication gains the same everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qgraph.numerics.products import product, steady

__all__ = ["Factors", "Spectrum", "allocate_ranks", "factors", "rank_for_energy", "spectrum", "tucker"]

_DAMPING = 1e-6
_OUTER_DAMPING = 1e-2
_WIDEST = 4096
"""Outputs up to which the components of the output are looked for on its side."""


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """How much of a layer's output every rank adds.

    Attributes:
        gains: float64 [min(N, K)], falling: what each further rank takes off the error, of a total of 1.
        outputs: N.
        inputs: K.
        weight: how much the layer's error counts against that of others.
    """

    gains: np.ndarray
    outputs: int
    inputs: int
    weight: float = 1.0

    @property
    def step(self) -> int:
        """Multiplications that one rank costs."""
        return self.outputs + self.inputs

    @property
    def whole(self) -> int:
        """Multiplications of the layer as it is."""
        return self.outputs * self.inputs

    @property
    def most(self) -> int:
        """The largest rank that saves multiplications; 0 where none does."""
        return (self.whole - 1) // self.step


@dataclasses.dataclass(frozen=True)
class Factors:
    """W = second @ first: float32 [N, r] and [r, K]."""

    first: np.ndarray
    second: np.ndarray


def _components(weight: np.ndarray, moment: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return eigenvalues, falling, and eigenvectors of the output's moment, or of the inputs' side, and which it is."""
    wide = weight.astype(np.float64)
    outputs, inputs = wide.shape
    with steady():
        if outputs <= inputs or (moment is not None and outputs <= _WIDEST):
            square = product(wide if moment is None else product(wide, moment), wide.T)
            values, vectors = np.linalg.eigh((square + square.T) / 2)
            return np.maximum(values[::-1], 0.0), vectors[:, ::-1], True
        root = np.eye(inputs) if moment is None else _root(moment)[0]
        square = product(root, product(product(wide.T, wide), root))
        values, vectors = np.linalg.eigh((square + square.T) / 2)
        return np.maximum(values[::-1], 0.0), vectors[:, ::-1], False


def _root(moment: np.ndarray, damping: float = _DAMPING) -> tuple[np.ndarray, np.ndarray]:
    """Return the square root of a moment and its inverse, slightly damped."""
    values, vectors = np.linalg.eigh(moment)
    values = np.sqrt(np.maximum(values, damping * max(float(values.mean()), np.finfo(float).tiny)))
    return np.asarray((vectors * values) @ vectors.T), np.asarray((vectors / values) @ vectors.T)


def spectrum(weight: np.ndarray, moment: np.ndarray | None, counts: np.ndarray | None = None) -> Spectrum:
    """Return what every rank of a layer is worth.

    Args:
        weight: float [N, K].
        moment: E[x^T x], [K, K]; None counts all inputs alike.
        counts: G, [N, N]: how much errors of the outputs count, comparable between layers; None counts the layer's
            relative error.
    """
    wide = weight if counts is None else _root(counts, _OUTER_DAMPING)[0] @ weight
    values, _, _ = _components(wide, moment)
    values = values[: min(weight.shape)]
    total = max(float(values.sum()), 1e-300)
    return Spectrum(values / total, weight.shape[0], weight.shape[1], 1.0 if counts is None else total)


def factors(weight: np.ndarray, moment: np.ndarray | None, rank: int, counts: np.ndarray | None = None) -> Factors:
    """Return the factors of a rank that leave the least error in the output.

    What lies between them has entries of about the fourth root of their shares of the output's energy: between one
    scale for all and one each, so that both products can be quantized.

    Args:
        weight: float [N, K].
        moment: as for `spectrum`.
        rank: 1 to min(N, K).
        counts: as for `spectrum`.

    Raises:
        ValueError: the rank is out of range.
    """
    if counts is not None:
        root, inverse = _root(counts, _OUTER_DAMPING)
        found = factors(root @ weight, moment, rank)
        return Factors(found.first, (inverse @ found.second).astype(np.float32))
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"a matrix of shape {weight.shape} has ranks 1 to {min(weight.shape)}, not {rank}")
    values, vectors, by_outputs = _components(weight, moment)
    wide = weight.astype(np.float64)
    basis = vectors[:, :rank]
    with steady():
        if by_outputs:
            first, second = product(basis.T, wide), basis
        else:
            root, inverse = (np.eye(len(basis)),) * 2 if moment is None else _root(moment)
            first, second = product(basis.T, inverse), product(wide, product(root, basis))
    spread = np.sqrt(np.maximum(values[:rank], 1e-30 * max(float(values[0]), 1e-30)))
    if not by_outputs:
        first, second = first * spread[:, None], second / spread
    balance = np.sqrt(spread / max(float(spread.mean()), 1e-300))
    balance = np.where(balance > 0, balance, 1.0)
    return Factors((first / balance[:, None]).astype(np.float32), (second * balance).astype(np.float32))


def rank_for_energy(found: Spectrum, energy: float) -> int:
    """Return the least rank that keeps a share of the output's energy, at least 1."""
    return min(int(np.searchsorted(np.cumsum(found.gains), energy - 1e-12)) + 1, len(found.gains))


def allocate_ranks(found: Sequence[Spectrum], share: float) -> list[int]:
    """Return the ranks of the least total error with which all layers together keep `share` of their multiplications.

    A layer that is better left whole gets rank 0. The total never exceeds the budget, unless the least, rank 1
    everywhere, does.

    Args:
        found: of the layers.
        share: of all their multiplications that stay, 0 to 1.
    """
    budget = share * sum(one.whole for one in found)
    errors = [one.weight * (1.0 - np.cumsum(one.gains)[: max(one.most, 0)]) for one in found]
    low, high = 0.0, 1.0
    while _cost(found, _at_price(found, errors, high)) > budget and high < 1e12:
        high *= 4.0
    for _ in range(100):
        middle = (low + high) / 2
        fits = _cost(found, _at_price(found, errors, middle)) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return _at_price(found, errors, high)


def _at_price(found: Sequence[Spectrum], errors: Sequence[np.ndarray], price: float) -> list[int]:
    """Return the ranks at which error + price * multiplications (in units of all) is least, for each layer alone.

    `errors` are those of each layer with rank 1, 2, ...
    """
    total = sum(one.whole for one in found)
    ranks = []
    for one, error in zip(found, errors, strict=True):
        costs = error + price * (np.arange(1, len(error) + 1) * one.step) / total
        best = int(np.argmin(costs)) if len(costs) else 0
        ranks.append(best + 1 if len(costs) and costs[best] < price * one.whole / total else 0)
    return ranks


def _cost(found: Sequence[Spectrum], ranks: Sequence[int]) -> int:
    return sum(one.whole if rank == 0 else rank * one.step for one, rank in zip(found, ranks, strict=True))


def tucker(kernel: np.ndarray, ranks: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decompose a convolution's kernel along its channels (Tucker-2; Kim et al. 2016, section 3).

    Args:
        kernel: float [N, C, ...].
        ranks: of the inputs and of the outputs.

    Returns:
        float32 [r1, C], [r2, r1, ...] and [N, r2]: a convolution of one element, the core, and another of one element.
    """
    wide = kernel.astype(np.float64)
    by_outputs = wide.reshape(len(wide), -1)
    by_inputs = np.moveaxis(wide, 1, 0).reshape(wide.shape[1], -1)
    with steady():
        left = np.linalg.eigh(product(by_outputs, by_outputs.T))[1][:, ::-1][:, : ranks[1]]
        right = np.linalg.eigh(product(by_inputs, by_inputs.T))[1][:, ::-1][:, : ranks[0]]
    core = np.einsum("nc...,nr,cs->rs...", wide, left, right, optimize=True)
    return right.T.astype(np.float32), core.astype(np.float32), left.astype(np.float32)
