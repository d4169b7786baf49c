"""Structured pruning: importances and the fit, each against its definition computed the slow way."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.numerics.pruning import Limits, Moments, compensate, energies, keep_each, keep_together, saliencies

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(200, 6)) @ (np.eye(6) + 0.4 * RNG.normal(size=(6, 6))) + 0.5
WEIGHT = RNG.normal(size=(3, 6))
UNIT = np.array([0, 1, 2, 0, 1, -1])
HESSIAN = ROWS.T @ ROWS / len(ROWS)


def test_the_energy_of_a_unit_is_that_of_its_part_of_the_output():
    parts = [ROWS[:, index == UNIT] @ WEIGHT[:, index == UNIT].T for index in range(3)]

    found = energies(WEIGHT, UNIT, 3, HESSIAN)

    np.testing.assert_allclose(found, [np.square(part).sum() / len(ROWS) for part in parts], rtol=1e-9)


def test_the_saliency_of_a_unit_is_the_least_error_without_it():
    expected = []
    for index in range(3):
        others = ROWS[:, index != UNIT]
        best, *_ = np.linalg.lstsq(others, ROWS @ WEIGHT.T, rcond=None)
        expected.append(np.square(others @ best - ROWS @ WEIGHT.T).sum() / len(ROWS))

    np.testing.assert_allclose(saliencies(WEIGHT, UNIT, 3, HESSIAN), expected, rtol=0.03)


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
