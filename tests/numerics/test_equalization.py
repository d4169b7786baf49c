"""Factors for channels against slow references: ranges by the paper's formula, noise by loops and differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qgraph.numerics.equalization import Magnitudes, channel_range, channel_sum, equalize
from qgraph.numerics.noise_balance import ActivationNoise, WeightNoise, noise_of, quietest


def uneven(shape: tuple[int, ...], seed: int, axis: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = np.exp(1.5 * rng.normal(size=[shape[axis] if place == axis else 1 for place in range(len(shape))]))
    return np.abs(rng.normal(size=shape) * spread)


def free(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, 2.0**-20), np.full(count, 2.0**20)


def fixed(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, -1)


def pair(seed: int = 0, channels: int = 6) -> list[Magnitudes]:
    """Two dense layers with `channels` between them."""
    one, two = uneven((channels, 5), seed), uneven((4, channels), seed + 1, axis=1)
    ids = np.arange(channels)
    return [Magnitudes(one, ids[:, None], fixed((1, 5))), Magnitudes(two, fixed((4, 1)), ids[None])]


def test_two_layers_meet_at_the_papers_formula():
    one, two = pair()
    scales = equalize([one, two], *free(6))
    for i, j in itertools.combinations(range(6), 2):
        expected = [np.sqrt(max(one.values[c, :]) / max(two.values[:, c])) for c in (i, j)]
        assert scales[i] / scales[j] == pytest.approx(expected[0] / expected[1], rel=1e-6)
    assert np.prod(scales) == pytest.approx(1.0)


def test_a_depthwise_layer_between_two_is_equalized_with_both():
    """Three layers, as in the paper's equation for them: every channel uses the same of all three at the end."""
    first, middle, last = uneven((5, 3), 1), uneven((5, 1), 2), uneven((4, 5), 3, axis=1)
    a, b = np.arange(5), np.arange(5, 10)
    weights = [
        Magnitudes(first, a[:, None], fixed((1, 3))),
        Magnitudes(middle, b[:, None], a[:, None]),
        Magnitudes(last, fixed((4, 1)), b[None]),
    ]
    scales = equalize(weights, *free(10), tolerance=1e-9, sweeps=1000)
    s, t = scales[:5], scales[5:]
    ranges = [(first / s[:, None]).max(1), middle[:, 0] * s / t, (last * t).max(0)]
    uses = [one / one.max() for one in ranges]
    np.testing.assert_allclose(uses[0], uses[1], rtol=1e-6)
    np.testing.assert_allclose(uses[1], uses[2], rtol=1e-6)
    # The product of the three ranges of a channel is what no factor changes: their cube root is where they meet.
    product = first.max(1) * middle[:, 0] * last.max(0)
    np.testing.assert_allclose(uses[0], np.cbrt(product / product.max()), rtol=1e-6)


def test_a_second_time_changes_nothing():
    one, two = pair(7)
    scales = equalize([one, two], *free(6))
    again = equalize(
        [
            Magnitudes(one.values / scales[:, None], one.made, one.read),
            Magnitudes(two.values * scales, two.made, two.read),
        ],
        *free(6),
    )
    np.testing.assert_allclose(again, 1.0, atol=1e-6)


def test_long_chains_settle():
    """Twenty depthwise layers in a row, which hand on what the ends want one by one."""
    ids = [np.arange(4 * place, 4 * place + 4)[:, None] for place in range(21)]
    values = [uneven((4, 1), place) for place in range(20)]
    first, last = uneven((4, 3), 31), uneven((2, 4), 32, axis=1)

    def weights(scales: np.ndarray) -> list[Magnitudes]:
        inner = [
            Magnitudes(one * scales[read] / scales[made], made, read)
            for one, read, made in zip(values, ids, ids[1:], strict=False)
        ]
        ends = [
            Magnitudes(first / scales[ids[0]], ids[0], fixed((1, 3))),
            Magnitudes(last * scales[ids[-1].T], fixed((2, 1)), ids[-1].T),
        ]
        return [ends[0], *inner, ends[1]]

    scales = equalize(weights(np.ones(84)), *free(84))
    assert np.abs(np.log(scales)).max() > 1.0
    assert np.abs(np.log(equalize(weights(scales), *free(84)))).max() < 0.02


def test_dead_fixed_and_bounded_channels():
    one, two = pair(2)
    one.values[0] = 0.0
    two.values[:, 1] = 0.0
    lower, upper = free(6)
    lower[2] = upper[2] = 1.0
    lower[3], upper[4] = 1.5, 0.5
    scales = equalize([one, two], lower, upper)
    assert np.isfinite(scales).all()
    assert scales[2] == 1.0
    assert scales[3] >= 1.5 - 1e-12
    assert scales[4] <= 0.5 + 1e-12
    alone = equalize([Magnitudes(np.zeros((2, 3)), np.arange(2)[:, None], fixed((1, 3)))], *free(2))
    assert (alone == 1.0).all()


@pytest.mark.parametrize("shape", [(4, 1), (1, 5), (4, 5)])
def test_figures_by_class(shape: tuple[int, int]):
    rng = np.random.default_rng(5)
    values, ids = rng.random((4, 5)), rng.integers(-1, 3, shape)
    largest, total = np.zeros(3), np.zeros(3)
    for place in np.ndindex(values.shape):
        one = np.broadcast_to(ids, values.shape)[place]
        if one >= 0:
            largest[one] = max(largest[one], values[place])
            total[one] += values[place]
    np.testing.assert_array_equal(channel_range(values, ids, 3), largest)
    np.testing.assert_allclose(channel_sum(values, ids, 3), total)


# --- noise ------------------------------------------------------------------------------------------------------------


def layer(kind: str, *, per_channel: bool) -> tuple[WeightNoise, dict[str, np.ndarray]]:
    shape = {"dense": (4, 5), "transposed": (5, 4), "depthwise": (4, 1), "grouped": (4, 2)}[kind]
    rng = np.random.default_rng(len(kind))
    values = uneven(shape, 4)
    if kind == "transposed":
        made, read = np.array([[0, 1, 2, -1]]), np.array([3, 4, 5, 6, -1])[:, None]
    else:
        made = np.array([0, 1, 2, -1])[:, None]
        read = {
            "dense": np.array([[3, 4, 5, 6, -1]]),
            "depthwise": np.array([3, 4, 5, 6])[:, None],
            "grouped": np.array([[3, 4], [3, 4], [5, 6], [5, 6]]),
        }[kind]
    cost, energy = rng.random(made.shape) + 0.1, rng.random(read.shape) + 0.1
    noise = WeightNoise(values, made, read, cost, energy, levels=127, per_channel=per_channel)
    return noise, {"values": values, "made": made, "read": read, "cost": cost, "energy": energy}


def slow_noise(scales: np.ndarray, parts: dict[str, np.ndarray], *, per_channel: bool) -> float:
    """Add up the error of each element, with the largest of a row or the whole as it is."""
    full = {name: np.broadcast_to(one, parts["values"].shape) for name, one in parts.items()}
    padded = np.append(scales, 1.0)
    ranges: dict[int, float] = {}
    outputs = np.broadcast_to(np.arange(parts["made"].size).reshape(parts["made"].shape), parts["values"].shape)
    for place in np.ndindex(parts["values"].shape):
        row = int(outputs[place]) if per_channel else 0
        reach = full["values"][place] * padded[full["read"][place]] / padded[full["made"][place]]
        ranges[row] = max(ranges.get(row, 0.0), reach)
    total = 0.0
    for place in np.ndindex(parts["values"].shape):
        step = ranges[int(outputs[place]) if per_channel else 0] / 127
        own, behind = padded[full["read"][place]], padded[full["made"][place]]
        total += step**2 / 12 * full["energy"][place] / own**2 * full["cost"][place] * behind**2
    return total


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["dense", "transposed", "depthwise", "grouped"])
def test_weight_noise_and_its_gradient(kind: str, per_channel: bool):
    noise, parts = layer(kind, per_channel=per_channel)
    rng = np.random.default_rng(8)
    for _ in range(3):
        logs = rng.normal(size=7)
        gradient = np.zeros(8)
        error = noise.add(np.append(np.exp(logs), 1.0), gradient)
        exact = slow_noise(np.exp(logs), parts, per_channel=per_channel)
        # A p-norm of n elements lies between the largest and n^(1/p) times that.
        assert exact <= error * (1 + 1e-6)
        assert error <= exact * parts["values"].size ** (2 / 12)
        for one in range(7):
            step = np.zeros(7)
            step[one] = 1e-5
            difference = noise_of([noise], np.exp(logs + step)) - noise_of([noise], np.exp(logs - step))
            assert gradient[one] == pytest.approx(difference / 2e-5, rel=1e-4, abs=1e-6 * error)


def test_activation_noise_and_its_gradient():
    rng = np.random.default_rng(9)
    spans, cost = rng.random(6) * 10, rng.random(6)
    ids = np.array([0, 1, 2, 3, -1, 1])
    noise = ActivationNoise(spans, ids, cost, levels=255)
    logs = rng.normal(size=4)
    padded = np.append(np.exp(logs), 1.0)
    gradient = np.zeros(5)
    error = noise.add(padded, gradient)
    exact = (max(spans / padded[ids]) / 255) ** 2 / 12 * sum(cost * padded[ids] ** 2)
    assert exact <= error <= exact * 6 ** (2 / 12)
    for one in range(4):
        step = np.zeros(4)
        step[one] = 1e-5
        difference = noise_of([noise], np.exp(logs + step)) - noise_of([noise], np.exp(logs - step))
        assert gradient[one] == pytest.approx(difference / 2e-5, rel=1e-4, abs=1e-6 * error)


def test_the_quietest_factors_beat_what_chance_finds_and_keep_their_bounds():
    noise, _ = layer("dense", per_channel=False)
    other = ActivationNoise(np.array([1.0, 9.0, 2.0, 0.1]), np.arange(3, 7), np.ones(4) * 1e-3, levels=255)
    terms, (lower, upper) = [noise, other], free(7)
    upper[0] = 1.2
    lower[5] = upper[5] = 1.0
    scales = quietest(terms, lower, upper, steps=300)
    assert (scales >= lower * (1 - 1e-12)).all()
    assert (scales <= upper * (1 + 1e-12)).all()
    best, rng = noise_of(terms, scales), np.random.default_rng(10)
    assert best < 0.5 * noise_of(terms, np.ones(7))
    for _ in range(300):
        logs = np.log(scales) + 0.3 * rng.normal(size=7)
        assert noise_of(terms, np.exp(np.clip(logs, np.log(lower), np.log(upper)))) > best * (1 - 1e-3)


def test_nothing_comes_of_nothing():
    empty = WeightNoise(
        np.zeros((2, 2)), np.arange(2)[:, None], fixed((1, 2)), np.ones((2, 1)), np.ones((1, 2)), levels=7
    )
    silent = ActivationNoise(np.zeros(2), np.arange(2), np.ones(2), levels=7)
    assert (quietest([empty, silent], *free(2)) == 1.0).all()
