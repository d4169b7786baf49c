"""AWQ: scale up the inputs that matter before rounding, and clip each group where its outputs lose least.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", section 3.2: the weights W [N, K] are rounded as
W diag(s), and the inputs arrive divided by s. Scales follow the mean magnitude of the inputs, s = m^alpha; alpha is
searched. As in the authors' program, also s = m^alpha / v^(1 - alpha) is tried, where v is the mean magnitude of an
input's weights relative to their group's largest. The error is that of the outputs, tr(E H E^T), with the second
moments H of the inputs in place of samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qgraph.numerics.products import product, steady
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, encode, group_parameters, quantize_weight

__all__ = ["AwqScales", "search_awq_scales", "search_clip"]

_ROWS = 512
"""Rows of all weights together on which scales are judged."""
_LEAST_SCALE = 1e-4
_FREE_SCALES = ("int", "nf4", "fp8e4m3", "fp8e5m2")


@dataclasses.dataclass(frozen=True)
class AwqScales:
    """What the search has found.

    Attributes:
        scales: float32 [K]; multiply the weights' inputs by them, and divide what feeds them. Ones if nothing helps.
        alpha: the exponent of the inputs' magnitude.
        by_weight: whether the weights' magnitude counts, too.
        before: tr(E H E^T) of the weights rounded as they are, estimated from some of their rows.
        after: the same with the scales.
    """

    scales: np.ndarray
    alpha: float
    by_weight: bool
    before: float
    after: float


@steady()
def search_awq_scales(
    weights: Sequence[np.ndarray],
    mean_abs: np.ndarray,
    hessian: np.ndarray,
    scheme: WeightScheme,
    grid: int = 20,
    *,
    by_weight: bool = True,
) -> AwqScales:
    """Return scales for the inputs that some layers share.

    Args:
        weights: float [N, K], one for each layer that reads these inputs.
        mean_abs: mean magnitude of every input, [K], as `Hessian.mean_abs`.
        hessian: [K, K].
        scheme: how the weights will be rounded; the search rounds them to the nearest, without clipping.
        grid: number of exponents from 0 to 1 (excluded).
        by_weight: try the scales that count the weights' magnitude too. They lower the layer's own error further, and
            yet made a small decoder worse as a whole.

    Raises:
        ValueError: shapes do not fit, or a magnitude is negative or not finite.
    """
    inputs = len(mean_abs)
    if not weights or any(one.ndim != 2 or one.shape[1] != inputs for one in weights):
        raise ValueError(f"weights of shapes {[one.shape for one in weights]} do not share {inputs} inputs")
    if hessian.shape != (inputs, inputs):
        raise ValueError(f"a Hessian of shape {hessian.shape} does not fit {inputs} inputs")
    if not np.isfinite(mean_abs).all() or (mean_abs < 0).any():
        raise ValueError("magnitudes must be finite and not negative")
    total = sum(len(one) for one in weights)
    rows = np.concatenate([_some_rows(one, total) for one in weights]).astype(np.float32)
    share = total / len(rows)
    moments = hessian.astype(np.float32)
    before = share * _scaled_error(rows, np.ones(inputs, np.float32), moments, scheme)
    best = AwqScales(np.ones(inputs, np.float32), alpha=0.0, by_weight=False, before=before, after=before)
    relative = _relative_magnitude(rows, scheme)
    for weighed in (False, True) if by_weight else (False,):
        for step in range(grid):
            alpha = step / grid
            scales = _scales(np.asarray(mean_abs, np.float64), relative if weighed else None, alpha)
            error = share * _scaled_error(rows, scales, moments, scheme)
            if error < best.after:
                best = AwqScales(scales, alpha, weighed, before, error)
    return best


@steady()
def search_clip(weight: np.ndarray, hessian: np.ndarray, scheme: WeightScheme, grid: int = 10) -> QuantizedWeight:
    """Round a weight matrix to the nearest codes, with each group's range shrunk to where its outputs lose least.

    Ranges shrink to half in `grid` steps (Lin et al. 2023, the clipping of the authors' program); the range of least
    squared error is tried, too. A group is judged by its own block of the Hessian. Formats whose scales are not free
    have no range to search.

    Args:
        weight: float [N, K].
        hessian: [K, K].
        scheme: format, bits and groups.
        grid: steps.

    Raises:
        ValueError: shapes do not fit, or a weight is not finite.
    """
    if weight.ndim != 2 or hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(f"a Hessian of shape {hessian.shape} does not fit a weight of shape {weight.shape}")
    weight = np.asarray(weight, np.float32)
    if scheme.format not in _FREE_SCALES:
        return quantize_weight(weight, scheme)
    diagonal = np.maximum(hessian.diagonal(), 0)
    scale, zero_point = group_parameters(weight, scheme, method="minmax")
    searched = group_parameters(weight, scheme, method="mse", importance=diagonal)
    tried = [(scale * np.float32(1 - 0.5 * step / grid), zero_point) for step in range(grid + 1)] + [searched]
    best_scale, best_zero = scale.copy(), None if zero_point is None else zero_point.copy()
    least = np.full(scale.shape, np.inf, np.float32)
    size = min(scheme.group or weight.shape[1], weight.shape[1])
    for scales, zeros in tried:
        missed = weight - QuantizedWeight(encode(weight, scales, zeros, scheme), scales, zeros, scheme).dequantize()
        for group in range(scale.shape[1]):
            part = slice(group * size, (group + 1) * size)
            error = missed[:, part]
            cost = np.einsum("ij,ij->i", product(error, hessian[part, part].astype(np.float32)), error)
            better = cost < least[:, group]
            np.copyto(least[:, group], cost, where=better)
            np.copyto(best_scale[:, group], scales[:, group], where=better)
            if best_zero is not None and zeros is not None:
                np.copyto(best_zero[:, group], zeros[:, group], where=better)
    return QuantizedWeight(encode(weight, best_scale, best_zero, scheme), best_scale, best_zero, scheme)


def _some_rows(weight: np.ndarray, total: int) -> np.ndarray:
    """Return rows at equal distances, as many as are this weight's share."""
    count = len(weight) if total <= _ROWS else max(1, round(_ROWS * len(weight) / total))
    return weight[np.linspace(0, len(weight) - 1, count).round().astype(np.int64)]


def _relative_magnitude(rows: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    """Return the mean over rows of an input's magnitude relative to the largest of its group, float64 [K]."""
    magnitude = np.abs(rows)
    inputs = rows.shape[1]
    size = min(scheme.group or inputs, inputs)
    largest = np.maximum.reduceat(magnitude, np.arange(0, inputs, size), axis=1)
    spread = np.repeat(largest, size, axis=1)[:, :inputs]
    return np.asarray(
        np.divide(magnitude, spread, out=np.zeros_like(magnitude), where=spread > 0).mean(axis=0, dtype=np.float64)
    )


def _scales(mean_abs: np.ndarray, relative: np.ndarray | None, alpha: float) -> np.ndarray:
    """Return scales of geometric centre 1; 1 for inputs that are always zero."""
    scales = np.maximum(mean_abs, 0) ** alpha
    if relative is not None:
        scales = scales / (relative ** (1 - alpha) + _LEAST_SCALE)
    scales = np.maximum(scales, _LEAST_SCALE)
    alive = mean_abs > 0
    if alive.any():
        scales = scales / np.sqrt(scales[alive].max() * scales[alive].min())
    return np.where(alive, scales, 1.0).astype(np.float32)


def _scaled_error(rows: np.ndarray, scales: np.ndarray, hessian: np.ndarray, scheme: WeightScheme) -> float:
    error = rows - quantize_weight(rows * scales, scheme, method="minmax").dequantize() / scales
    return float(np.einsum("ij,ij->", product(error, hessian), error, dtype=np.float64))
