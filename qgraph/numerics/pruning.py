"""Which units of layers to cut, and what the layers that read them do without them.

A layer y = x W^T reads units: sets S of its inputs. Without the inputs outside of a set `kept`, its output changes by

    nothing else changed    W_S x_S                      energy tr(W_S H_SS W_S^T) with H = E[x^T x]
    the others make up      least squares over x_kept    W' = W C[:, kept] (G[kept, kept])^-1

with G = E[z^T z] of the inputs z that the pruned network gives, and C = E[x^T z] of those x it gave before: what the
layer gave before is regressed on what it gets now. The least error, tr(W_S ((H^-1)_SS)^-1 W_S^T), is the block form of
the saliency of Optimal Brain Surgeon (Hassibi and Stork 1993; Frantar and Alistarh 2022, "Optimal Brain Compression").
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qgraph.numerics.products import gram, product, steady

__all__ = ["Moments", "Reading", "compensate", "eliminations", "energies", "keep_each", "keep_together"]

_DAMPING = 1e-3
_ROUNDS = 32
"""In which the units of a layer go, at most."""


class Moments:
    """Second moments of what a layer reads, summed while samples stream by.

    Attributes:
        inputs: of the layer, K.
        rows: samples seen.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.rows = 0
        self._gram = np.zeros((inputs + 1, inputs + 1))
        self._cross = np.zeros((inputs + 1, inputs + 1))

    def add(self, now: np.ndarray, before: np.ndarray) -> None:
        """Count rows in: float [n, K] that the layer gets now, and those that it got in the whole network."""
        one = _with_one(now)
        with steady():
            lower = gram(one)
            square = np.tril(lower) + np.tril(lower, -1).T
            self._gram += square
            self._cross += square if before is now else product(_with_one(before).T, one)
        self.rows += len(one)

    @property
    def gram(self) -> np.ndarray:
        """E[z^T z], float64 [K + 1, K + 1]; the last input is a constant 1."""
        return np.asarray(self._gram / max(self.rows, 1))

    @property
    def cross(self) -> np.ndarray:
        """E[x^T z], float64 [K + 1, K + 1]."""
        return np.asarray(self._cross / max(self.rows, 1))


def _with_one(rows: np.ndarray) -> np.ndarray:
    return np.column_stack([rows, np.ones(len(rows), np.float32)]).astype(np.float32)


def compensate(
    weight: np.ndarray, bias: np.ndarray | None, kept: np.ndarray, moments: Moments
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the weight, and the bias, with which a layer makes the least error from the inputs that are kept.

    A share of the mean diagonal of G pulls towards the weight that there was, so that inputs that hardly vary keep
    theirs.

    Args:
        weight: float [N, K].
        bias: float [N]; None where the layer has none, and then it gets none.
        kept: bool [K].
        moments: of the layer's inputs.

    Returns:
        float32 [N, K], zero where inputs are not kept, and float32 [N] or None.
    """
    columns = np.flatnonzero(np.append(kept, bias is not None))
    whole = np.column_stack([weight, np.zeros(len(weight)) if bias is None else bias]).astype(np.float64)
    gram = moments.gram[np.ix_(columns, columns)]
    ridge = _DAMPING * float(np.mean(gram.diagonal())) if len(columns) else 0.0
    with steady():
        target = whole @ moments.cross[:, columns] + ridge * whole[:, columns]
        gram[np.diag_indices(len(columns))] += max(ridge, np.finfo(np.float64).tiny)
        found = np.linalg.solve(gram, target.T).T
    result = np.zeros_like(whole)
    result[:, columns] = found
    changed = result[:, :-1].astype(np.float32)
    return changed, None if bias is None else result[:, -1].astype(np.float32)


def energies(weight: np.ndarray, unit: np.ndarray, count: int, hessian: np.ndarray) -> np.ndarray:
    """Return what each unit contributes to a layer's output: tr(W_S H_SS W_S^T), float64 [count].

    Args:
        weight: float [N, K].
        unit: int [K], the unit of each input; -1 for none.
        count: the number of units.
        hessian: E[x^T x], [K, K].
    """
    squares = _squares(weight)
    found = np.zeros(count)
    for index, inputs in enumerate(_members(unit, count)):
        place = np.ix_(inputs, inputs)
        found[index] = float((squares[place] * hessian[place]).sum())
    return found


def _squares(weight: np.ndarray) -> np.ndarray:
    """Return W^T W."""
    wide = weight.astype(np.float64)
    with steady():
        return product(wide.T, wide)


def _members(unit: np.ndarray, count: int) -> list[np.ndarray]:
    """Return the inputs of every unit."""
    order = np.argsort(unit, kind="stable")
    starts = np.searchsorted(unit[order], np.arange(count + 1))
    return [order[start:end] for start, end in itertools.pairwise(starts)]


class Reading(NamedTuple):
    """A layer that reads units.

    Attributes:
        weight: float [N, K].
        unit: int [K], the unit of each input; -1 for none.
        hessian: E[x^T x], [K, K].
        counts: G, [N, N]: how much errors of the outputs count; None counts them alike, relative to their power.
    """

    weight: np.ndarray
    unit: np.ndarray
    hessian: np.ndarray
    counts: np.ndarray | None = None


def eliminations(readings: Sequence[Reading], count: int) -> np.ndarray:
    """Return the error that each unit adds when it goes after all that matter less, float64 [count].

    The unit that leaves the least error goes, the inputs that stay make up for it as well as they can, in all layers
    that read it; then the next one (Kurtic et al. 2023, "ZipLM", section 3.1). Where there are many, some go at once.

    Args:
        readings: the layers that read the units.
        count: the number of units.
    """
    layers = [_Elimination(one, count) for one in readings]
    found, left, last = np.zeros(count), np.arange(count), 0.0
    at_once = max(1, count // _ROUNDS)
    while len(left):
        errors = np.sum([layer.errors(left) for layer in layers], axis=0) if layers else np.zeros(len(left))
        order = np.argsort(errors, kind="stable")[:at_once]
        for place in order:
            last = max(float(errors[place]), float(np.nextafter(last, np.inf)))
            found[left[place]] = last
        for layer in layers:
            layer.remove(left[order])
        left = np.delete(left, order)
    return found


class _Elimination:
    """A layer whose units go; those that stay make up for it (Optimal Brain Surgeon, block by block)."""

    def __init__(self, reading: Reading, count: int) -> None:
        weight, counts = reading.weight.astype(np.float64), reading.counts
        damped = reading.hessian.astype(np.float64)
        damped[np.diag_indices(len(damped))] += _DAMPING * max(float(np.mean(damped.diagonal())), 1e-30)
        self._members = _members(reading.unit, count)
        with steady():
            self._inverse = np.linalg.inv(damped)
            if counts is None:
                power = float((product(weight, damped) * weight).sum())
                self._weight = weight / math.sqrt(max(power, 1e-300))
            else:
                self._weight = product(_root(counts), weight)

    def errors(self, units: np.ndarray) -> np.ndarray:
        """Return the error that each of these units would add."""
        found = np.zeros(len(units))
        sizes = np.array([len(self._members[unit]) for unit in units])
        for size in sorted(set(sizes.tolist()) - {0}):
            alike = np.flatnonzero(sizes == size)
            inputs = np.stack([self._members[unit] for unit in units[alike]])
            parts = self._weight[:, inputs].transpose(1, 2, 0)
            inverse = np.linalg.inv(self._inverse[inputs[:, :, None], inputs[:, None, :]])
            with steady():
                found[alike] = (parts @ parts.transpose(0, 2, 1) * inverse).sum(axis=(1, 2))
        return found

    def remove(self, units: np.ndarray) -> None:
        """Let units go."""
        gone = np.concatenate([self._members[unit] for unit in units])
        if not len(gone):
            return
        with steady():
            share = np.linalg.solve(self._inverse[np.ix_(gone, gone)], self._inverse[gone])
            self._weight -= product(self._weight[:, gone], share)
            self._inverse -= product(np.ascontiguousarray(self._inverse[:, gone]), share)


def _root(square: np.ndarray) -> np.ndarray:
    """Return R with R^T R = square, a matrix that is symmetric and has no negative eigenvalues."""
    values, vectors = np.linalg.eigh(square)
    return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How few units may stay.

    Attributes:
        least: units.
        multiple: the number that stays is a multiple of it, where there are as many.
    """

    least: int = 1
    multiple: int = 1

    def rounded(self, wish: float, count: int) -> int:
        """Return the number of units that stay of `count` when `wish` are wanted: the nearest that is allowed."""
        step = self.multiple if self.multiple <= count else 1
        nearest = int(np.floor(wish / step + 0.5)) * step
        return min(max(nearest, self.least, step), count)


def keep_each(scores: Sequence[np.ndarray], share: float, limits: Sequence[Limits]) -> list[np.ndarray]:
    """Return which units stay, the best of each group: the same share is cut from every group.

    Args:
        scores: of the units of each group; the larger, the rather it stays. Of equal ones the first stays.
        share: that is cut, 0 to 1.
        limits: of each group.
    """
    return [
        _best(score, limit.rounded(len(score) * (1.0 - share), len(score)))
        for score, limit in zip(scores, limits, strict=True)
    ]


def keep_together(
    scores: Sequence[np.ndarray], costs: Sequence[float], share: float, limits: Sequence[Limits]
) -> list[np.ndarray]:
    """Return which units stay where all groups are ranked together, until `share` of the cost is cut.

    Args:
        scores: of the units of each group, comparable between groups.
        costs: of one unit of each group.
        share: of the total cost that is cut, 0 to 1; what the limits keep is not made up for elsewhere for ever.
        limits: of each group.
    """
    ranked = sorted(
        (float(score) / max(cost, 1e-30), group, unit)
        for group, (some, cost) in enumerate(zip(scores, costs, strict=True))
        for unit, score in enumerate(some)
    )
    left = [len(some) for some in scores]
    total = float(sum(cost * len(some) for some, cost in zip(scores, costs, strict=True)))
    cut = 0.0
    for _, group, _ in ranked:
        if cut >= share * total:
            break
        if left[group] > max(limits[group].least, 1):
            left[group] -= 1
            cut += costs[group]
    return [_best(some, limit.rounded(stay, len(some))) for some, stay, limit in zip(scores, left, limits, strict=True)]


def _best(score: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-np.asarray(score, np.float64), kind="stable")[:count])
