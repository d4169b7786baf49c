"""Choose one of several sizes for each layer so that a budget holds and the sum of errors is least.

This is the multiple-choice knapsack problem. Its relaxation, in which a layer may lie between two choices, is solved by
walking along each layer's convex hull in order of what a byte is worth (Sinha and Zoltners 1979). That gives a choice
that is at most one step away from the optimum, and a bound on what any layers can still reach. The optimum itself comes
from dynamic programming over the layers: of all partial choices only those are kept that no other one beats in both
size and error, and that may still beat the best known by that bound.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

__all__ = ["allocate_bits"]

_MOST_STATES = 200_000
"""Partial choices that are kept at most; beyond them the result is as near to the optimum as the best of those."""


def allocate_bits(errors: np.ndarray, sizes: np.ndarray, budget: float) -> list[int]:
    """Return the choice for each layer that gives the least sum of errors within a budget of sizes.

    Args:
        errors: [layers, choices], what each choice costs; infinite where a layer does not have that choice.
        sizes: [layers, choices], in any unit, not negative.
        budget: the most that the sizes may sum to, in the same unit.

    Returns:
        The index of a choice for each layer. Exact, unless more than 200,000 partial choices are worth keeping at a
        time, which takes hundreds of layers with sizes that hardly differ; then near the optimum.

    Raises:
        ValueError: shapes differ, an element is NaN or a size negative or infinite, a layer has no choice, or even
            the smallest choices exceed the budget (the message gives their sum).
    """
    errors, sizes = np.asarray(errors, np.float64), np.asarray(sizes, np.float64)
    if errors.ndim != 2 or errors.shape != sizes.shape:
        raise ValueError(f"errors of shape {errors.shape} do not go with sizes of shape {sizes.shape}")
    if np.isnan(errors).any() or not np.isfinite(sizes).all() or (sizes < 0).any():
        raise ValueError("errors must be numbers, and sizes finite and not negative")
    layers = [_Choices.of(error, size) for error, size in zip(errors, sizes, strict=True)]
    for index, layer in enumerate(layers):
        if not len(layer.index):
            raise ValueError(f"layer {index} has no choice of finite error")
    least = sum(layer.size[0] for layer in layers)
    # Sums in another order may differ in their last digits.
    slack = 1e-12 * (abs(budget) + least)
    if least > budget + slack:
        raise ValueError(f"the budget is {budget:g}, but the smallest choices already take {least:g}")
    # The layers with the most to gain are decided first: what remains is then bounded tightly.
    order = sorted(range(len(layers)), key=lambda one: (-float(layers[one].error[0] - layers[one].error[-1]), one))
    picked = _search([layers[one] for one in order], budget + slack)
    result = [0] * len(layers)
    for one, pick in zip(order, picked, strict=True):
        result[one] = int(layers[one].index[pick])
    return result


@dataclasses.dataclass(frozen=True)
class _Choices:
    """A layer's choices that no other beats in both size and error: sizes ascending, errors descending."""

    index: np.ndarray
    size: np.ndarray
    error: np.ndarray

    @classmethod
    def of(cls, error: np.ndarray, size: np.ndarray) -> _Choices:
        order = np.lexsort((error, size))
        best = np.minimum.accumulate(error[order])
        kept = order[np.isfinite(error[order]) & (error[order] < np.concatenate([[np.inf], best[:-1]]))]
        return cls(kept, size[kept], error[kept])

    def steps(self) -> list[tuple[float, float, int]]:
        """Return the steps along the lower convex hull: error that it saves, size that it takes, where it ends."""
        hull = [0]
        for point in range(1, len(self.size)):
            while len(hull) > 1 and self._worth(hull[-2], hull[-1]) <= self._worth(hull[-1], point):
                hull.pop()
            hull.append(point)
        return [
            (float(self.error[a] - self.error[b]), float(self.size[b] - self.size[a]), b)
            for a, b in itertools.pairwise(hull)
        ]

    def _worth(self, here: int, there: int) -> float:
        return float((self.error[here] - self.error[there]) / (self.size[there] - self.size[here]))


class _Relaxation:
    """The least error that some layers can reach within a size, if they may lie between two choices."""

    def __init__(self, layers: list[_Choices]) -> None:
        steps = [(saved, taken, which, end) for which, one in enumerate(layers) for saved, taken, end in one.steps()]
        steps.sort(key=lambda step: (-step[0] / step[1], step[2], step[3]))
        self.steps = steps
        self.least = float(sum(one.size[0] for one in layers))
        self._size = np.cumsum([self.least] + [step[1] for step in steps])
        self._error = np.cumsum([float(sum(one.error[0] for one in layers))] + [-step[0] for step in steps])

    def bound(self, size: np.ndarray) -> np.ndarray:
        """Return the least errors at given sizes, which must not be below `least`."""
        return np.asarray(np.interp(size, self._size, self._error))

    def greedy(self, count: int, budget: float) -> list[int]:
        """Return a choice for each of `count` layers: every step that still fits, the most worth first."""
        left = budget - self.least
        picked, stopped = [0] * count, [False] * count
        for _, taken, which, end in self.steps:
            if stopped[which]:
                continue
            if taken <= left:
                picked[which] = end
                left -= taken
            else:
                stopped[which] = True
        return picked


def _search(layers: list[_Choices], budget: float) -> list[int]:
    """Return the place among its choices for each layer."""
    best = _Relaxation(layers).greedy(len(layers), budget)
    ceiling = float(sum(layer.error[pick] for layer, pick in zip(layers, best, strict=True)))
    size, error = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for number, layer in enumerate(layers):
        rest = _Relaxation(layers[number + 1 :])
        all_sizes = (size[:, None] + layer.size).reshape(-1)
        all_errors = (error[:, None] + layer.error).reshape(-1)
        left = budget - all_sizes
        hopeful = left >= rest.least
        hopeful[hopeful] = all_errors[hopeful] + rest.bound(left[hopeful]) <= ceiling * (1 + 1e-12)
        places = np.flatnonzero(hopeful)
        places = places[np.lexsort((all_errors[places], all_sizes[places]))]
        lowest = np.minimum.accumulate(all_errors[places])
        places = places[all_errors[places] < np.concatenate([[np.inf], lowest[:-1]])]
        if len(places) > _MOST_STATES:
            promise = all_errors[places] + rest.bound(budget - all_sizes[places])
            places = places[np.sort(np.argsort(promise, kind="stable")[:_MOST_STATES])]
        if not len(places):
            return best
        size, error = all_sizes[places], all_errors[places]
        trail.append((places // len(layer.size), places % len(layer.size)))
    state = int(np.argmin(error))
    if error[state] > ceiling:
        return best
    picked = []
    for parents, choices in reversed(trail):
        picked.append(int(choices[state]))
        state = int(parents[state])
    return picked[::-1]
