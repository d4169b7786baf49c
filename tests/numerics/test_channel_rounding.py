"""Rounding with one scale for each output: near the best of all roundings, never worse than to the nearest."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from qgraph.numerics.channel_rounding import channel_scales, damped, nearest, round_channels, round_stack
from qgraph.numerics.weights import QuantizedWeight, WeightScheme


def hessian_of(inputs: int, seed: int, rows: int = 200) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs)) + 1.0
    return 2 / rows * x.T @ x


def errors(weight: np.ndarray, found: QuantizedWeight, hessian: np.ndarray) -> np.ndarray:
    miss = weight - found.dequantize().astype(np.float64)
    return np.einsum("nj,jk,nk->n", miss, hessian, miss)


def to_nearest(weight: np.ndarray, bits: int, hessian: np.ndarray) -> np.ndarray:
    scale = channel_scales(weight, bits)
    miss = weight - (nearest(weight, scale[:, None], bits) * scale[:, None]).astype(np.float64)
    return np.einsum("nj,jk,nk->n", miss, hessian, miss)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("inputs", [1, 9, 70, 300])
def test_no_row_is_worse_than_by_rounding_to_the_nearest(bits: int, inputs: int) -> None:
    weight = np.random.default_rng(bits).normal(size=(20, inputs)).astype(np.float32)
    weight[3] = 0
    weight[4] = 0.25
    hessian = hessian_of(inputs, 5, rows=max(50, inputs // 2))
    scheme = WeightScheme(bits=bits, group=0, symmetric=True)
    found = round_channels(weight, hessian, scheme)
    plain = to_nearest(weight, bits, hessian)
    assert (errors(weight, found, hessian) <= plain * (1 + 1e-6) + 1e-9).all()
    assert (found.scale > 0).all()
    if inputs > 1 and bits < 8:
        assert errors(weight, found, hessian).sum() < 0.6 * plain.sum()


def test_short_rows_come_near_to_the_best_of_all_roundings() -> None:
    bits, inputs = 3, 4
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 2, inputs)).astype(np.float32)
    hessian = np.stack([hessian_of(inputs, seed) for seed in range(6)])
    found = round_stack(weight, hessian, WeightScheme(bits=bits, group=0, symmetric=True))
    rows = found.dequantize().reshape(weight.shape)
    every = np.array(list(itertools.product(range(-4, 4), repeat=inputs)), np.float64)
    ours, best = 0.0, 0.0
    for group in range(6):
        for row in range(2):
            target = weight[group, row].astype(np.float64)
            # Of each rounding the best scale, in closed form.
            along, square = every @ hessian[group] @ target, np.einsum("nj,jk,nk->n", every, hessian[group], every)
            usable = (square > 0) & (along > 0)
            gain = np.where(usable, along**2 / np.where(square > 0, square, 1), 0).max()
            best += target @ hessian[group] @ target - gain
            miss = target - rows[group, row]
            ours += miss @ hessian[group] @ miss
    assert best <= ours < 1.6 * best


def test_a_stack_is_its_groups_and_no_row_is_worse() -> None:
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(40, 1, 9)).astype(np.float32)
    weight[7] = 0
    hessian = np.stack([hessian_of(9, seed) for seed in range(40)])
    scheme = WeightScheme(bits=4, group=0, symmetric=True)
    found = round_stack(weight, hessian, scheme)
    rows = found.dequantize().reshape(weight.shape)
    ours, alone, plain = (np.zeros(40) for _ in range(3))
    for group in range(40):
        miss = weight[group].astype(np.float64) - rows[group]
        ours[group] = np.einsum("nj,jk,nk->", miss, hessian[group], miss)
        one = round_stack(weight[[group]], hessian[[group]], scheme)
        alone[group] = errors(weight[group], one, hessian[group]).sum()
        plain[group] = to_nearest(weight[group], 4, hessian[group]).sum()
    assert (ours <= plain * (1 + 1e-6) + 1e-12).all()
    assert ours.sum() == pytest.approx(alone.sum(), rel=0.15)  # alone, the order of the inputs is the group's own
    assert ours.sum() < 0.5 * plain.sum()


def test_numbers_that_lie_on_a_grid_stay_there() -> None:
    numbers = np.random.default_rng(3).integers(-8, 8, (5, 12))
    numbers[:, 0] = -8
    weight = (numbers * np.array([0.5, 0.01, 3.0, 1e-6, 100.0])[:, None]).astype(np.float32)
    found = round_channels(weight, hessian_of(12, 3), WeightScheme(bits=4, group=0, symmetric=True))
    np.testing.assert_allclose(found.dequantize(), weight, rtol=1e-5)


def few_rows(seed: int, inputs: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights, the Hessian of fewer samples than inputs, and that of many."""
    rng = np.random.default_rng(seed)
    weight, mix = rng.normal(size=(16, inputs)).astype(np.float32), rng.normal(size=(inputs, inputs))
    few, many = (rng.normal(size=(count, inputs)) @ mix for count in (20, 2000))
    return weight, few.T @ few / 10, many.T @ many / 1000


def in_one_stack(weight: np.ndarray, hessian: np.ndarray, scheme: WeightScheme, **options: float) -> QuantizedWeight:
    return round_stack(weight[None], hessian[None], scheme, **options)


@pytest.mark.parametrize("rounding", [round_channels, in_one_stack])
def test_damping_keeps_to_what_few_samples_show(rounding: Callable[..., QuantizedWeight]) -> None:
    scheme = WeightScheme(bits=3, group=0, symmetric=True)
    lost = dict.fromkeys((0.0, None, 1.0), 0.0)
    for seed in range(3):
        weight, few, many = few_rows(seed)
        for damping in lost:
            found = rounding(weight, few, scheme, **({} if damping is None else {"damping": damping}))
            lost[damping] += errors(weight, found, many).sum()
    assert lost[1.0] < 0.75 * lost[None]
    assert lost[None] < 0.95 * lost[0.0]


@pytest.mark.parametrize("rounding", [round_channels, in_one_stack])
def test_with_no_end_of_damping_nearly_all_numbers_are_the_nearest(rounding: Callable[..., QuantizedWeight]) -> None:
    weight, few, _ = few_rows(0)
    found = rounding(weight, few, WeightScheme(bits=4, group=0, symmetric=True), damping=1e6)
    # Scales are fitted once more, to numbers that stay.
    assert np.mean(found.codes - 8.0 == nearest(weight, found.scale, 4)) > 0.95


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    hessian = np.array([[[2.0, 1.0], [1.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    np.testing.assert_allclose(damped(hessian, 0.1), [[[2.3, 1.0], [1.0, 4.3]], np.eye(2)])
    np.testing.assert_allclose(damped(hessian, 0.0)[0], hessian[0] + 3e-6 * np.eye(2), rtol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    scheme = WeightScheme(bits=4, group=0, symmetric=True)
    with pytest.raises(ValueError, match="does not fit"):
        round_channels(np.ones((2, 3)), np.eye(4), scheme)
    with pytest.raises(ValueError, match="not finite"):
        round_channels(np.full((2, 3), np.nan), np.eye(3), scheme)
    with pytest.raises(ValueError, match="symmetric integers"):
        round_channels(np.ones((2, 3)), np.eye(3), WeightScheme())
