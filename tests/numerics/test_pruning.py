"""Structured pruning: importances and the fit, each against its definition computed the slow way."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.numerics.pruning import (
    Limits,
    Moments,
    Reading,
    compensate,
    eliminations,
    energies,
    keep_each,
    keep_together,
)

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(200, 6)) @ (np.eye(6) + 0.4 * RNG.normal(size=(6, 6))) + 0.5
WEIGHT = RNG.normal(size=(3, 6))
UNIT = np.array([0, 1, 2, 0, 1, -1])
HESSIAN = ROWS.T @ ROWS / len(ROWS)


def test_the_energy_of_a_unit_is_that_of_its_part_of_the_output():
    parts = [ROWS[:, index == UNIT] @ WEIGHT[:, index == UNIT].T for index in range(3)]

    found = energies(WEIGHT, UNIT, 3, HESSIAN)

    np.testing.assert_allclose(found, [np.square(part).sum() / len(ROWS) for part in parts], rtol=1e-9)


def least_error(gone: set[int], weight: np.ndarray) -> float:
    """Return the error of a layer whose inputs make up for units that are gone, relative to its power."""
    others, target = ROWS[:, ~np.isin(UNIT, list(gone))], ROWS @ weight.T
    best, *_ = np.linalg.lstsq(others, target, rcond=None)
    return float(np.square(others @ best - target).sum() / np.square(target).sum())


def test_units_go_one_after_the_other_where_the_error_is_least():
    weights = [WEIGHT, RNG.normal(size=(4, 6)) * 100.0]
    expected, gone, before = np.zeros(3), set(), 0.0
    while len(gone) < 3:
        errors = {unit: sum(least_error({*gone, unit}, one) for one in weights) for unit in {0, 1, 2} - gone}
        best = min(errors, key=lambda unit: errors[unit])
        gone.add(best)
        expected[best], before = errors[best] - before, errors[best]

    found = eliminations([Reading(one, UNIT, HESSIAN) for one in weights], 3)

    assert np.argsort(found).tolist() == sorted(range(3), key=lambda unit: expected[unit])
    np.testing.assert_allclose(found, expected, rtol=0.03)


def test_of_two_that_say_the_same_one_stays():
    """Alone, each of the first two could go at no loss; the third cannot be told from the others."""
    rows = RNG.normal(size=(300, 3))
    rows[:, 1] = rows[:, 0] + 1e-3 * rows[:, 1]
    weight = np.array([[3.0, 3.0, 1.0]])

    found = eliminations([Reading(weight, np.arange(3), rows.T @ rows / 300)], 3)

    assert sorted(np.argsort(found)[[0, 2]].tolist()) == [0, 1]


def test_errors_count_as_they_are_said_to():
    counts = np.diag([0.0, 0.0, 4.0])

    counted = eliminations([Reading(WEIGHT, UNIT, HESSIAN, counts)], 3)
    alone = eliminations([Reading(2.0 * WEIGHT[2:], UNIT, HESSIAN, np.eye(1))], 3)

    np.testing.assert_allclose(counted, alone, rtol=1e-9)


def test_many_units_go_some_at_a_time():
    rows = RNG.normal(size=(400, 100))
    weight = np.linspace(1.0, 2.0, 100)[None, :]

    found = eliminations([Reading(weight, RNG.permutation(100), rows.T @ rows / 400)], 100)

    assert len(set(found.tolist())) == 100
    assert np.isfinite(found).all()


def test_units_that_nobody_reads_go_in_their_order():
    assert np.argsort(eliminations([], 4), kind="stable").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("with_bias", [False, True])
def test_what_stays_makes_up_for_what_goes_by_least_squares(with_bias: bool):
    now = ROWS + 0.1 * RNG.normal(size=ROWS.shape)
    kept = np.array([True, True, False, True, False, True])
    moments = Moments(6)
    for start in range(0, 200, 50):
        moments.add(now[start : start + 50], ROWS[start : start + 50])
    bias = RNG.normal(size=3) if with_bias else None
    target = ROWS @ WEIGHT.T + (0 if bias is None else bias)
    design = now[:, kept] if bias is None else np.column_stack([now[:, kept], np.ones(len(now))])
    best, *_ = np.linalg.lstsq(design, target, rcond=None)

    weight, shifted = compensate(WEIGHT, bias, kept, moments)

    assert (weight[:, ~kept] == 0).all()
    assert (shifted is None) == (bias is None)
    error = np.square(now @ weight.T + (0 if shifted is None else shifted) - target).sum()
    assert error <= 1.01 * np.square(design @ best - target).sum()
    dropped = np.square(now * kept @ WEIGHT.T + (0 if bias is None else bias) - target).sum()
    assert error < 0.8 * dropped


def test_an_input_that_says_nothing_leaves_the_others_alone():
    moments = Moments(6)
    moments.add(np.zeros((10, 6)), np.zeros((10, 6)))

    weight, _ = compensate(WEIGHT, None, np.array([True] * 5 + [False]), moments)

    assert np.isfinite(weight).all()


def test_the_same_share_of_every_group():
    scores = [np.array([3.0, 1.0, 2.0, 4.0]), np.arange(8.0)]

    kept = keep_each(scores, 0.5, [Limits(), Limits()])

    assert [one.tolist() for one in kept] == [[0, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("share", "limits", "left"),
    [
        (0.9, Limits(least=3), 3),
        (0.4, Limits(multiple=4), 4),
        (0.9, Limits(multiple=16), 1),
        (0.1, Limits(multiple=8), 8),
    ],
)
def test_limits_are_kept(share: float, limits: Limits, left: int):
    assert len(keep_each([np.arange(8.0)], share, [limits])[0]) == left


def test_ranked_together_the_cheapest_loss_goes_first():
    scores = [np.array([1.0, 8.0]), np.array([3.0, 2.0, 9.0])]

    kept = keep_together(scores, [1.0, 1.0], 0.4, [Limits(), Limits()])
    dear = keep_together(scores, [1.0, 4.0], 0.25, [Limits(), Limits()])

    assert [one.tolist() for one in kept] == [[1], [0, 2]]
    assert [one.tolist() for one in dear] == [[0, 1], [0, 2]]


def test_the_last_unit_of_a_group_stays():
    kept = keep_together([np.array([0.0, 0.0])], [1.0], 0.99, [Limits()])

    assert [one.tolist() for one in kept] == [[0]]
