"""AdaRound: the paper's formulas in a slow loop, all roundings of tiny layers, and never worse than to the nearest."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from qgraph.numerics.adaround import adaround, learned, rectified, regularizer
from qgraph.numerics.channel_rounding import channel_scales, nearest
from qgraph.numerics.weights import WeightScheme


def hessian_of(inputs: int, seed: int, rows: int = 300) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs)) + 0.5
    return 2 / rows * x.T @ x


def weight_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scheme(bits: int = 4) -> WeightScheme:
    return WeightScheme(bits=bits, group=0, symmetric=True)


def row_errors(weight: np.ndarray, rows: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    miss = weight.astype(np.float64) - rows
    return np.einsum("nj,jk,nk->n", miss, hessian, miss)


def to_nearest(weight: np.ndarray, bits: int) -> np.ndarray:
    scale = channel_scales(weight, bits)[..., None]
    return nearest(weight, scale, bits) * scale


def slow(weight: np.ndarray, scale: np.ndarray, hessian: np.ndarray, bits: int, steps: int, strength: float) -> list:
    """Learn by the paper's definitions, one number at a time, with the optimizer's constants of the module."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    count, unit = len(weight), np.trace(hessian) / len(hessian)
    floor = [min(max(math.floor(one / scale), low), high - 1) for one in weight]
    v = [-math.log(1.2 / (min(max(w / scale - f, 0.01), 0.99) + 0.1) - 1) for w, f in zip(weight, floor, strict=True)]
    first, second = [0.0] * count, [0.0] * count
    for step in range(steps):
        sigmoid = [1 / (1 + math.exp(-one)) for one in v]
        h = [min(max(1.2 * one - 0.1, 0.0), 1.0) for one in sigmoid]
        miss = [weight[i] / scale - floor[i] - h[i] for i in range(count)]
        for i in range(count):
            error = -2 * sum(miss[j] * hessian[j, i] for j in range(count)) / unit
            pull = 0.0
            if step >= int(0.2 * steps):
                share = (step - int(0.2 * steps)) / (steps - int(0.2 * steps))
                beta = 2 + 18 * 0.5 * (1 + math.cos(math.pi * share))
                pull = -strength * beta * 2 * math.copysign(abs(2 * h[i] - 1) ** (beta - 1), 2 * h[i] - 1)
            inside = 0 < 1.2 * sigmoid[i] - 0.1 < 1
            gradient = (error + pull) * (1.2 * sigmoid[i] * (1 - sigmoid[i]) if inside else 0.0)
            first[i] += 0.1 * (gradient - first[i])
            second[i] += 0.01 * (gradient**2 - second[i])
            corrected = second[i] / (1 - 0.99 ** (step + 1))
            v[i] -= 0.5 * first[i] / (1 - 0.9 ** (step + 1)) / (math.sqrt(corrected) + 1e-8)
    return [f + (one >= 0) for f, one in zip(floor, v, strict=True)]


def test_what_is_learned_is_the_definition_in_a_slow_loop() -> None:
    weight, hessian = weight_of(6, 7), hessian_of(7, 1)
    scale = channel_scales(weight, 3)
    fast = learned(weight[None], scale[None], hessian[None], 3, 40, 2.0)[0]
    expected = [slow(row, float(one), hessian, 3, 40, 2.0) for row, one in zip(weight, scale, strict=True)]
    assert np.mean(fast == expected) > 0.95  # single precision may tip a number


def test_gradients_are_those_of_central_differences() -> None:
    v = np.linspace(-4, 4, 33).astype(np.float64)
    h, slope = rectified(v)
    ahead, behind = rectified(v + 1e-5)[0], rectified(v - 1e-5)[0]
    kinks = np.abs(np.abs(v) - math.log(11)) > 1e-3
    np.testing.assert_allclose(slope[kinks], ((ahead - behind) / 2e-5)[kinks], atol=1e-5)
    assert (h[0], h[-1], h[16]) == (0, 1, pytest.approx(0.5))
    for beta in (2.0, 7.5, 20.0):
        value, gradient = regularizer(h, beta)
        moved = (regularizer(h + 1e-6, beta)[0] - regularizer(h - 1e-6, beta)[0]) / 2e-6
        np.testing.assert_allclose(gradient, moved, atol=1e-3)
        np.testing.assert_allclose(value[[0, -1, 16]], [0, 0, 1], atol=1e-9)


def test_tiny_layers_come_near_to_the_best_of_all_roundings() -> None:
    """All 2^n ways up and down of the learned scale, for layers whose rounding to the nearest is far from the best."""
    bits, inputs = 3, 8
    learned_errors, best_errors, plain_errors = [], [], []
    for seed in range(12):
        weight, hessian = weight_of(1, inputs, seed=seed), hessian_of(inputs, seed + 50)
        scale = channel_scales(weight, bits)
        floor = np.clip(np.floor(weight / scale[:, None]), -4, 2)
        ways = floor + np.array(list(itertools.product((0, 1), repeat=inputs)))
        errors = row_errors(weight, ways * scale[:, None], hessian)
        numbers = learned(weight[None], scale[None], hessian[None], bits, 50, 2.0)[0]
        learned_errors.append(row_errors(weight, numbers * scale[:, None], hessian)[0])
        plain_errors.append(row_errors(weight, nearest(weight, scale[:, None], bits) * scale[:, None], hessian)[0])
        best_errors.append(errors.min())
        assert ((numbers == floor) | (numbers == floor + 1)).all()
        free = adaround(weight, hessian, scheme(bits)).dequantize()
        assert row_errors(weight, free, hessian)[0] <= 1.2 * errors.min()
    assert sum(best_errors) <= sum(learned_errors) < 0.9 * sum(plain_errors)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("shape", [(24, 40), (3, 500), (1, 1), (30, 1, 9), (4, 6, 18)], ids=str)
def test_no_row_is_worse_than_by_rounding_to_the_nearest(shape: tuple[int, ...], refine: int, bits: int) -> None:
    weight = weight_of(*shape)
    weight.reshape(-1, shape[-1])[0] = 0
    groups = weight.reshape(-1, *shape[-2:])
    hessian = np.stack([hessian_of(shape[-1], group) for group in range(len(groups))])
    found = adaround(weight, hessian if weight.ndim == 3 else hessian[0], scheme(bits), refine=refine)
    rows = found.dequantize().reshape(groups.shape)
    ours, plain = (
        np.concatenate([row_errors(*one) for one in zip(groups, made, hessian, strict=True)])
        for made in (rows, to_nearest(groups, bits))
    )
    assert (ours <= plain * (1 + 1e-6) + 1e-12).all()
    assert (found.scale > 0).all()
    if bits < 8 and shape[-1] > 1:
        assert ours.sum() < (0.75 if refine else 0.95) * plain.sum()


def test_refining_helps_and_repeats() -> None:
    weight, hessian = weight_of(40, 60), hessian_of(60, 3)
    paper, free, again = (adaround(weight, hessian, scheme(), refine=refine) for refine in (0, 3, 3))
    totals = [row_errors(weight, one.dequantize(), hessian).sum() for one in (paper, free)]
    assert totals[1] < totals[0]
    np.testing.assert_array_equal(free.codes, again.codes)
    np.testing.assert_array_equal(free.scale, again.scale)


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    weight, hessian = weight_of(5, 6), hessian_of(6, 0)
    hessian[2] = hessian[:, 2] = 0
    found = adaround(weight, hessian, scheme())
    assert np.isfinite(found.dequantize()).all()
    assert (row_errors(weight, found.dequantize(), hessian) <= row_errors(weight, to_nearest(weight, 4), hessian)).all()
    assert np.isfinite(adaround(weight, np.zeros((6, 6)), scheme()).dequantize()).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        adaround(weight_of(2, 3), np.eye(4), scheme())
    with pytest.raises(ValueError, match="not finite"):
        adaround(weight_of(2, 3), np.full((3, 3), np.inf), scheme())
