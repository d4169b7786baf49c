"""Low-rank factors against numpy's own decomposition, and ranks against trying all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qgraph.numerics.low_rank import Factors, Spectrum, allocate_ranks, factors, rank_for_energy, spectrum, tucker

RNG = np.random.default_rng(0)


def moment(inputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(300, inputs)) * np.geomspace(1, 30, inputs) @ rng.normal(size=(inputs, inputs))
    return rows, rows.T @ rows / len(rows)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_without_a_moment_it_is_the_singular_value_decomposition(shape: tuple[int, int]):
    weight = RNG.normal(size=shape)
    left, values, right = np.linalg.svd(weight, full_matrices=False)

    for rank in range(1, min(shape) + 1):
        found = factors(weight, None, rank)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        np.testing.assert_allclose(found.second @ found.first, best, atol=1e-4)
    np.testing.assert_allclose(spectrum(weight, None).gains, values**2 / np.sum(values**2), rtol=1e-8)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_with_a_moment_no_product_of_that_rank_gives_a_better_output(shape: tuple[int, int]):
    weight = RNG.normal(size=shape)
    rows, second_moment = moment(shape[1])
    values = np.linalg.svd(rows @ weight.T, compute_uv=False)[: min(shape)]

    for rank in (1, 3):
        found = factors(weight, second_moment, rank)
        error = np.square(rows @ (found.second @ found.first).T - rows @ weight.T).sum()
        assert error == pytest.approx(np.sum(values[rank:] ** 2), rel=1e-3)
        plain = factors(weight, None, rank)
        assert error <= np.square(rows @ (plain.second @ plain.first).T - rows @ weight.T).sum()
    np.testing.assert_allclose(spectrum(weight, second_moment).gains, values**2 / np.sum(values**2), atol=1e-6)


def test_where_outputs_count_differently_no_product_of_that_rank_is_better():
    weight = RNG.normal(size=(6, 9))
    _, second_moment = moment(9)
    _, counts = moment(6, seed=1)
    left, right = (np.linalg.cholesky(one).T for one in (counts, second_moment))
    values = np.linalg.svd(left @ weight @ right.T, compute_uv=False)

    def error(found: Factors) -> float:
        change = found.second @ found.first - weight
        return float(np.trace(counts @ change @ second_moment @ change.T))

    best = error(factors(weight, second_moment, 3, counts))
    assert best == pytest.approx(np.sum(values[3:] ** 2), rel=0.05)  # G is damped
    assert best < error(factors(weight, second_moment, 3))
    found = spectrum(weight, second_moment, counts)
    np.testing.assert_allclose(found.gains * found.weight, values**2, rtol=0.05, atol=1e-2 * values[0] ** 2)


def test_more_outputs_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch):
    weight = RNG.normal(size=(9, 5))
    _, second_moment = moment(5)
    expected = factors(weight, second_moment, 2)
    monkeypatch.setattr("qgraph.numerics.low_rank._WIDEST", 4)

    found = factors(weight, second_moment, 2)

    np.testing.assert_allclose(found.second @ found.first, expected.second @ expected.first, atol=2e-2)


def test_inputs_that_are_never_seen_do_no_harm():
    weight = RNG.normal(size=(4, 6))

    found = factors(weight, np.diag([1.0, 1, 1, 0, 0, 0]), 3)

    assert np.isfinite(found.first).all()
    np.testing.assert_allclose((found.second @ found.first)[:, :3], weight[:, :3], atol=1e-4)


def test_the_energy_decides_the_rank():
    found = Spectrum(np.array([0.6, 0.3, 0.08, 0.02]), 4, 4)

    assert [rank_for_energy(found, energy) for energy in (0.5, 0.6, 0.9, 0.95, 1.0)] == [1, 1, 2, 3, 4]


def test_ranks_are_those_of_the_least_error_within_the_budget():
    some = [spectrum(np.diag(np.geomspace(1, last, 12)) @ RNG.normal(size=(12, 12)), None) for last in (0.9, 0.1, 0.01)]

    for share in (0.3, 0.5, 0.7):
        ranks = allocate_ranks(some, share)
        cost, error = measured(some, ranks)
        assert cost <= share * 3 * 144
        # Convex in the rank, so that no other choice which costs as little is better.
        others = [measured(some, other) for other in itertools.product(range(6), repeat=3)]
        assert error <= min(one for price, one in others if price <= cost) + 1e-9


def measured(some: list[Spectrum], ranks: tuple[int, ...] | list[int]) -> tuple[int, float]:
    costs = [one.whole if rank == 0 else rank * one.step for one, rank in zip(some, ranks, strict=True)]
    errors = [0.0 if rank == 0 else 1 - one.gains[:rank].sum() for one, rank in zip(some, ranks, strict=True)]
    return sum(costs), sum(errors)


def test_a_layer_that_gains_nothing_stays_whole():
    thin = Spectrum(np.ones(2) / 2, 2, 2)

    assert thin.most == 0
    assert allocate_ranks([thin], 0.5) == [0]


def test_a_rank_out_of_range_is_refused():
    with pytest.raises(ValueError, match="has ranks 1 to 3, not 4"):
        factors(np.ones((3, 5)), None, 4)


def test_tucker_of_full_rank_is_exact_and_of_less_is_near_the_best():
    kernel = np.einsum(
        "nr,rsij,sc->ncij", RNG.normal(size=(8, 3)), RNG.normal(size=(3, 2, 3, 3)), RNG.normal(size=(2, 6))
    )

    first, core, last = tucker(kernel, (2, 3))

    assert (first.shape, core.shape, last.shape) == ((2, 6), (3, 2, 3, 3), (8, 3))
    np.testing.assert_allclose(np.einsum("nr,rsij,sc->ncij", last, core, first), kernel, atol=1e-4)
