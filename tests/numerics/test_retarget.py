"""Weights that make up for a changed input are those of least squares."""

from __future__ import annotations

import numpy as np

from qgraph.numerics.hessian import Hessian, factorize
from qgraph.numerics.retarget import Drift, solve


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_weights_are_those_of_least_squares() -> None:
    weight, x = normal(9, 70), normal(500, 70, seed=1)
    changed = x + 0.2 * normal(500, 70, seed=2) + 0.1 * x[:, ::-1]
    hessian, drift = Hessian(70), Drift(70)
    for part in np.array_split(np.arange(500), 4):
        hessian.add(changed[part])
        drift.add(x[part], changed[part])
    found = drift.retarget(weight, hessian.matrix, damping=0.0)
    expected = np.linalg.lstsq(changed.astype(np.float64), x @ weight.T.astype(np.float64), rcond=None)[0].T
    np.testing.assert_allclose(found, expected, atol=1e-4)
    half = drift.retarget(weight, hessian.matrix, damping=0.0, share=0.5)
    np.testing.assert_allclose(half, (found + weight) / 2, atol=1e-5)
    assert found.dtype == np.float32


def test_without_drift_and_where_there_are_no_samples_weights_stay() -> None:
    weight, x = normal(9, 70), normal(40, 70, seed=1)
    x[:, 5] = 0.0
    hessian, drift = Hessian(70), Drift(70)
    hessian.add(x)
    drift.add(x, x)
    np.testing.assert_array_equal(drift.retarget(weight, hessian.matrix, damping=0.01), weight)
    drift.add(x * np.float32(1.1), x)
    found = drift.retarget(weight, hessian.matrix, damping=0.01)
    np.testing.assert_array_equal(found[:, 5], weight[:, 5])
    assert np.isfinite(found).all()


def test_solving_by_blocks_agrees_with_lapack() -> None:
    for size in (1, 64, 150):
        matrix = normal(size, 2 * size + 3).astype(np.float64)
        hessian = matrix @ matrix.T
        right = normal(5, size, seed=3)
        damped = hessian + 0.01 * np.mean(hessian.diagonal()) * np.eye(size)
        found = solve(factorize(hessian, 0.01, np.float64), right)
        np.testing.assert_allclose(found, np.linalg.solve(damped, right.T).T, rtol=1e-7)
