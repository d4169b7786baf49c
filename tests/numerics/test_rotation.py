"""Rotations are orthogonal, seeded, and the same however they are applied."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.numerics.rotation import hadamard, rotation

HADAMARD = (1, 2, 4, 8, 12, 20, 28, 36, 40, 64, 76, 256, 384, 768, 1536)
OTHERS = (3, 5, 7, 10, 86, 172)


@pytest.mark.parametrize("size", [*HADAMARD, *OTHERS])
def test_it_is_orthogonal(size: int):
    matrix = hadamard(size, seed=3)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("size", HADAMARD)
def test_all_elements_are_equally_large_where_a_hadamard_matrix_is_known(size: int):
    assert rotation(size, 0).is_hadamard
    np.testing.assert_allclose(np.abs(hadamard(size, seed=1)), size**-0.5, rtol=1e-12)


@pytest.mark.parametrize("size", OTHERS)
def test_other_sizes_still_spread_an_outlier(size: int):
    assert not rotation(size, 0).is_hadamard
    assert np.abs(hadamard(size, seed=1)).max() < 0.995


@pytest.mark.parametrize("size", [8, 12, 40, 172, 768])
def test_applying_is_multiplying(size: int):
    rng = np.random.default_rng(0)
    one, matrix = rotation(size, 5), hadamard(size, 5)
    x, weight = rng.standard_normal((3, 4, size)), rng.standard_normal((6, size))
    np.testing.assert_allclose(one.apply(x), x @ matrix, atol=1e-12)
    np.testing.assert_allclose(one.undo(x), x @ matrix.T, atol=1e-12)
    np.testing.assert_allclose(one.apply(weight.T, axis=0), matrix.T @ weight.T, atol=1e-12)
    np.testing.assert_allclose(one.undo(one.apply(x, axis=-1)), x, atol=1e-12)
    np.testing.assert_allclose(one.apply(x) @ one.apply(weight).T, x @ weight.T, atol=1e-10)
    assert one.apply(x.astype(np.float32)).dtype == np.float32


def test_the_seed_decides():
    np.testing.assert_array_equal(hadamard(172, 1), hadamard(172, 1))
    assert not np.array_equal(hadamard(172, 1), hadamard(172, 2))
    assert not np.array_equal(hadamard(64, 1), hadamard(64, 2))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"a rotation of 8 does not fit axis 1 of an array of shape \(8, 9\)"):
        rotation(8, 0).apply(np.ones((8, 9)), axis=1)
    with pytest.raises(ValueError, match="at least one dimension"):
        rotation(0, 0)
