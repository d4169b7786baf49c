"""Weights that make up for a changed input are those of least squares."""

from __future__ import annotations

import numpy as np

from qgraph.numerics.hessian import Hessian, factorize
from qgraph.numerics.retarget import Drift, retarget, solve


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_weights_are_those_of_least_squares() -> None:
    weight, x = normal(9, 70), normal(500, 70, seed=1)
    changed = x + 0.2 * normal(500, 70, seed=2) + 0.1 * x[:, ::-1]
    moved = normal(500, 9, seed=3) + changed[:, :9]
    hessian, drift, stream = Hessian(70), Drift(70), Drift(70, 9)
    for part in np.array_split(np.arange(500), 4):
        hessian.add(changed[part])
        drift.add(x[part] - changed[part], changed[part])
        stream.add(moved[part], changed[part])
    found = retarget(weight, drift.through(weight), hessian.matrix, 0.0)
    wanted = x @ weight.T.astype(np.float64)
    expected = np.linalg.lstsq(changed.astype(np.float64), wanted, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.dtype == np.float32
    found = retarget(weight, drift.through(weight) + stream.mean(), hessian.matrix, 0.0)
    expected = np.linalg.lstsq(changed.astype(np.float64), wanted + moved, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_without_drift_and_where_there_are_no_samples_weights_stay() -> None:
    weight, x = normal(9, 70), normal(40, 70, seed=1)
    x[:, 5] = 0.0
    hessian, drift = Hessian(70), Drift(70)
    hessian.add(x)
    drift.add(x - x, x)
    np.testing.assert_array_equal(retarget(weight, drift.through(weight), hessian.matrix, 0.01), weight)
    drift.add(x * np.float32(0.1), x)
    found = retarget(weight, drift.through(weight), hessian.matrix, 0.01)
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
