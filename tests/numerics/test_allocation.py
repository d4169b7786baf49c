"""Allocation against trying everything."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from qgraph.numerics.allocation import allocate_bits


def exhaustive(errors: np.ndarray, sizes: np.ndarray, budget: float) -> float:
    """Return the least error within the budget."""
    layers = range(len(errors))
    sums = [
        sum(errors[layer, pick] for layer, pick in zip(layers, picks, strict=True))
        for picks in itertools.product(range(errors.shape[1]), repeat=len(errors))
        if sum(sizes[layer, pick] for layer, pick in zip(layers, picks, strict=True)) <= budget
    ]
    return float(min(sums))


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed: int):
    rng = np.random.default_rng(seed)
    layers, choices = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    sizes = rng.integers(0, 20, (layers, choices)).astype(float)
    errors = rng.random((layers, choices)) * (rng.random((layers, choices)) < 0.9)
    budget = sizes.min(axis=1).sum() + float(rng.integers(0, 40))
    picks = allocate_bits(errors, sizes, budget)
    rows = np.arange(layers)
    assert sizes[rows, picks].sum() <= budget
    assert errors[rows, picks].sum() == pytest.approx(exhaustive(errors, sizes, budget))


def test_layers_of_a_model_are_allocated_in_no_time():
    rng = np.random.default_rng(0)
    weights = rng.choice([4096 * 4096, 4096 * 1024, 4096 * 11008], 300).astype(float)
    bits = np.array([2, 3, 4, 5, 6, 8])
    sizes = weights[:, None] * (bits + 0.5)
    errors = rng.lognormal(0, 2, (300, 1)) * 4.0**-bits * weights[:, None] * rng.uniform(0.9, 1.1, (300, 6))
    budget = float(4.75 * weights.sum())
    start = time.perf_counter()
    picks = allocate_bits(errors, sizes, budget)
    assert time.perf_counter() - start < 10
    rows = np.arange(300)
    assert 0.999 * budget < sizes[rows, picks].sum() <= budget
    assert errors[rows, picks].sum() < 0.6 * errors[:, 2].sum()


def test_a_choice_that_a_layer_lacks_is_not_taken():
    errors = np.array([[5.0, np.inf], [3.0, 1.0]])
    sizes = np.array([[2.0, 1.0], [2.0, 3.0]])
    assert allocate_bits(errors, sizes, 10) == [0, 1]


def test_the_whole_budget_may_be_used_whatever_the_rounding_of_sums():
    sizes = np.array([[0.1, 0.3], [0.2, 0.6], [0.3, 0.4]])
    assert allocate_bits(np.array([[1.0, 0.0]] * 3), sizes, 0.3 + 0.6 + 0.4) == [1, 1, 1]
    assert allocate_bits(np.array([[1.0, 0.0]] * 3), sizes, 0.6) == [0, 0, 0]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="the budget is 3, but the smallest choices already take 4"):
        allocate_bits(np.ones((2, 2)), np.full((2, 2), 2.0), 3)
    with pytest.raises(ValueError, match="layer 1 has no choice"):
        allocate_bits(np.array([[1.0], [np.inf]]), np.ones((2, 1)), 3)
    with pytest.raises(ValueError, match="do not go with"):
        allocate_bits(np.ones((2, 2)), np.ones((2, 3)), 3)
    with pytest.raises(ValueError, match="must be numbers"):
        allocate_bits(np.full((1, 1), np.nan), np.ones((1, 1)), 3)
    assert allocate_bits(np.ones((0, 3)), np.ones((0, 3)), 0) == []
