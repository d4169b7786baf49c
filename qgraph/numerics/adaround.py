"""AdaRound: learn for every weight whether to round it up or down, so that a layer's outputs change least.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization". With the scales s fixed,

    W~ = s * clip(floor(W / s) + h(V), n, p),    h(V) = clip(1.2 * sigmoid(V) - 0.1, 0, 1)              (eq. 22, 23)
    minimize  tr((W - W~) H (W - W~)^T)  +  strength * sum(1 - |2 h(V) - 1|^beta)                       (eq. 21, 24)

by Adam; beta falls from 20 to 2, so that h first finds its place and is then driven to 0 or 1. The first term is the
squared error of the outputs over all samples at once, of which only the second moments H of the inputs are needed: its
gradient -2 (W - W~) H is exact, so that some dozens of steps do what thousands on small batches do.

All of it is in units of each row's scale and of the mean diagonal of H, so that one learning rate and one strength
serve all layers. Rows are independent; they are learned in blocks that stay in the cache.
"""

from __future__ import annotations

import numpy as np

from qgraph.numerics.channel_rounding import (
    better_rows,
    channel_scales,
    check_rows,
    damped,
    descend,
    no_worse,
    round_channels,
    round_stack,
)
from qgraph.numerics.products import each, steady
from qgraph.numerics.weights import QuantizedWeight, WeightScheme

__all__ = ["adaround", "learned", "rectified", "regularizer"]

_ZETA, _GAMMA = 1.1, -0.1
_BETA = (20.0, 2.0)
_WARM = 0.2
"""Share of the steps without the regularizer."""
_RATE = 0.5
_MOMENTS = (0.9, 0.99)
_SMALL = np.float32(1e-8)
_SURE = 0.01
"""How near to 0 or 1 the start of h may be: beyond, its gradient vanishes."""
_BLOCK = 1 << 15
"""Weights that are learned at a time."""


def adaround(
    weight: np.ndarray,
    hessian: np.ndarray,
    scheme: WeightScheme,
    *,
    damping: float = 0.01,
    steps: int = 50,
    strength: float = 2.0,
    refine: int = 3,
) -> QuantizedWeight:
    """Round the weights of a layer.

    Args:
        weight: [N, K], or [G, M, K] for a layer in groups.
        hessian: [K, K] or [G, K, K], as `Hessian.matrix`.
        scheme: symmetric integers, group 0.
        damping: share of the mean diagonal that is added to the Hessian's diagonal.
        steps: of Adam.
        strength: of the regularizer.
        refine: rounds in which numbers and scales are decided again one by one, free of up and down; rows that error
            feedback rounds better take its numbers then. 0 leaves what was learned.

    Returns:
        The rows; one that rounding to the nearest serves better after all is rounded so.

    Raises:
        ValueError: shapes do not fit, or something is not finite.
    """
    check_rows(weight, hessian, scheme)
    stack, moments = (weight, hessian) if weight.ndim == 3 else (weight[None], hessian[None])
    with steady():
        matrix = damped(moments, damping)
        scale = channel_scales(stack, scheme.bits, np.einsum("gkk->gk", matrix)[:, None])
        numbers = learned(stack, scale, matrix, scheme.bits, steps, strength)
        if refine and len(stack) == 1:
            rows, fitted = descend(stack[0], matrix[0], numbers[0], scale[0], scheme.bits, refine)
            numbers, scale = rows[None], fitted[None]
    made = no_worse(stack, moments, scheme, numbers, scale)
    if not refine:
        return made
    fed_back = round_channels if weight.ndim == 2 else round_stack
    return better_rows(stack, moments, made, fed_back(weight, hessian, scheme, damping=damping, rounds=refine))


def learned(
    weight: np.ndarray, scale: np.ndarray, matrix: np.ndarray, bits: int, steps: int, strength: float
) -> np.ndarray:
    """Return the whole numbers that are learned, float32 [G, M, K].

    Args:
        weight: [G, M, K].
        scale: positive, float32 [G, M].
        matrix: damped Hessians, [G, K, K].
        bits: of a number.
        steps: of Adam.
        strength: of the regularizer.
    """
    groups, outputs, inputs = weight.shape
    mean = np.einsum("gkk->gk", matrix).mean(axis=1)
    normed = (matrix / np.where(mean > 0, mean, 1)[:, None, None]).astype(np.float32)
    units = (weight / scale[..., None]).astype(np.float32)
    numbers: np.ndarray = np.empty_like(units)
    # Whole groups where they are small, else some rows of one.
    tall = max(1, _BLOCK // inputs)
    starts = [(group, row) for group in range(0, groups, max(1, tall // outputs)) for row in range(0, outputs, tall)]

    def compute(place: int) -> None:
        group, row = starts[place]
        part = slice(group, group + max(1, tall // outputs)), slice(row, row + tall)
        numbers[part] = _learn(units[part], normed[part[0]], bits, steps, strength)

    with steady():
        each(compute, range(len(starts)))
    return numbers


def rectified(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return h(V), the rectified sigmoid, and its derivative."""
    sigmoid = 1 / (1 + np.exp(-v))
    stretched = sigmoid * np.float32(_ZETA - _GAMMA) + np.float32(_GAMMA)
    inside = (stretched > 0) & (stretched < 1)
    slope = sigmoid * (1 - sigmoid) * np.float32(_ZETA - _GAMMA) * inside
    return np.clip(stretched, 0, 1), slope


def regularizer(h: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return 1 - |2 h - 1|^beta, which is zero where h is 0 or 1, and its derivative."""
    side = 2 * h - 1
    size = np.abs(side)
    power = size ** np.float32(beta - 1)
    return 1 - power * size, -2 * np.float32(beta) * np.sign(side) * power


def _learn(units: np.ndarray, matrix: np.ndarray, bits: int, steps: int, strength: float) -> np.ndarray:
    """Learn some rows: `units` are W / s, float32 [G, M, K]."""
    half = 1 << (bits - 1)
    # A weight beyond the range has both its neighbours at the end: it is rounded to the last number, or the one before.
    floor = np.clip(np.floor(units), -half, half - 2)
    start = np.clip(units - floor, _SURE, 1 - _SURE)
    v = -np.log((_ZETA - _GAMMA) / (start - _GAMMA) - 1).astype(np.float32)
    first, second = np.zeros_like(v), np.zeros_like(v)
    slow, slower = (np.float32(one) for one in _MOMENTS)
    warm = int(_WARM * steps)
    for step in range(steps):
        h, slope = rectified(v)
        gradient = (floor + h - units) @ matrix
        gradient *= 2
        if step >= warm:
            beta = _BETA[1] + (_BETA[0] - _BETA[1]) * 0.5 * (1 + np.cos(np.pi * (step - warm) / (steps - warm)))
            gradient += np.float32(strength) * regularizer(h, beta)[1]
        gradient *= slope
        first += (1 - slow) * (gradient - first)
        second += (1 - slower) * (gradient * gradient - second)
        rate = _RATE * np.sqrt(1 - slower ** (step + 1)) / (1 - slow ** (step + 1))
        v -= np.float32(rate) * first / (np.sqrt(second) + _SMALL)
    return np.asarray(floor + (v >= 0))
