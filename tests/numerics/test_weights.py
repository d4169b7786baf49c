"""Weights in few bits against slow loops, the formats' definitions and exhaustive search."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from qgraph.numerics.formats import CODE_BOOKS, nearest_level, nvfp4_tensor_scale
from qgraph.numerics.weights import (
    QuantizedWeight,
    WeightScheme,
    encode,
    group_parameters,
    levels,
    quantize_weight,
)

_ALL = [WeightScheme(bits=b, group=g, symmetric=s) for b in (2, 3, 4, 5, 6, 8) for g in (32, 0) for s in (False, True)]
_ALL += [WeightScheme(name) for name in CODE_BOOKS]


def _weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _error(quantized: QuantizedWeight, weight: np.ndarray) -> float:
    return float(np.square(quantized.dequantize().astype(np.float64) - weight).sum())


def _slow_minmax(values: np.ndarray, bits: int, *, symmetric: bool) -> tuple[float, int]:
    """The definition, one group at a time, in float64."""
    low, high, top = min(0.0, float(values.min())), max(0.0, float(values.max())), 2**bits - 1
    if not symmetric:
        scale = (high - low) / top
        return scale, round(-low / scale)
    half = 2 ** (bits - 1)
    plain = max(-low / half, high / (half - 1))
    turned = max(high / half, -low / (half - 1))
    return (-turned if bits <= 4 and turned < plain else plain), half


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, 64, 0])
def test_minmax_against_a_slow_loop(bits: int, symmetric: bool, group: int) -> None:
    weight = _weight(5, 150)
    quantized = quantize_weight(weight, WeightScheme(bits=bits, group=group, symmetric=symmetric), method="minmax")
    size = group or 150
    for row, (index, start) in itertools.product(range(5), enumerate(range(0, 150, size))):
        values = weight[row, start : start + size]
        scale, zero = _slow_minmax(values, bits, symmetric=symmetric)
        assert quantized.scale[row, index] == pytest.approx(scale, rel=1e-6)
        assert quantized.zero_point[row, index] == zero
        exact = np.clip(np.rint(values / quantized.scale[row, index]) + zero, 0, 2**bits - 1)
        np.testing.assert_array_equal(quantized.codes[row, start : start + size], exact)


@pytest.mark.parametrize("scheme", _ALL, ids=str)
def test_no_weight_is_further_from_its_level_than_from_its_neighbours(scheme: WeightScheme) -> None:
    weight = _weight(4, 96)
    quantized = quantize_weight(weight, scheme)
    error = np.abs(quantized.dequantize() - weight)
    for step in (-1, 1):
        codes = np.clip(quantized.codes.astype(int) + step, 0, scheme.top).astype(np.uint8)
        other = QuantizedWeight(codes, quantized.scale, quantized.zero_point, scheme).dequantize()
        assert (error <= np.abs(other - weight) + 1e-6).all()


@pytest.mark.parametrize("scheme", _ALL, ids=str)
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_results_do_not_depend_on_the_layout(scheme: WeightScheme, method: str) -> None:
    weight = _weight(70, 1000) * np.float32(0.02)
    expected = quantize_weight(weight, scheme, method=method)
    wide = np.zeros((140, 1100), np.float32)
    wide[::2, :1000] = weight
    for other in (np.asfortranarray(weight), wide[::2, :1000], weight.astype(np.float64)):
        actual = quantize_weight(other, scheme, method=method)
        np.testing.assert_array_equal(actual.codes, expected.codes)
        np.testing.assert_array_equal(actual.scale, expected.scale)
    scale, zero_point = group_parameters(weight, scheme, method=method)
    np.testing.assert_array_equal(scale, expected.scale)
    np.testing.assert_array_equal(encode(weight, scale, zero_point, scheme), expected.codes)


@pytest.mark.parametrize("scheme", _ALL, ids=str)
def test_the_search_is_never_worse_than_the_definition(scheme: WeightScheme) -> None:
    for seed, power in ((1, 1), (2, 3)):
        weight = _weight(16, 256, seed=seed) ** power
        plain = quantize_weight(weight, scheme, method="minmax")
        found = quantize_weight(weight, scheme)
        assert _error(found, weight) <= _error(plain, weight) * 1.0001


@pytest.mark.parametrize("scheme", [one for one in _ALL if one.is_integer], ids=str)
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_weights_that_lie_on_a_grid_stay_there(scheme: WeightScheme, method: str) -> None:
    random = np.random.default_rng(5)
    codes = random.integers(0, scheme.top + 1, (12, 1536)).astype(np.float32)
    codes[:, ::32], codes[:, 1::32] = 0, scheme.top
    weight = (codes - np.float32(scheme.centre)) * random.uniform(0.01, 0.02, (12, 1)).astype(np.float32)
    found = quantize_weight(weight, scheme, method=method)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.dequantize(), weight, rtol=1e-5, atol=1e-8)


def _exhaustive(values: np.ndarray, bits: int, *, symmetric: bool) -> float:
    """The least squared error over a fine grid of scales and all zero points."""
    top, best = 2**bits - 1, np.inf
    span = float(values.max() - values.min())
    zeros = [2 ** (bits - 1)] if symmetric else range(top + 1)
    steps = np.linspace(0.3, 2.2, 400) * span / top
    for zero, sign in itertools.product(zeros, (1, -1) if symmetric else (1,)):
        scale = sign * steps[:, None]
        codes = np.clip(np.rint(values / scale) + zero, 0, top) - zero
        best = min(best, float(np.square(codes * scale - values).sum(axis=1).min()))
    return best


@pytest.mark.parametrize(("bits", "allowed"), [(2, 1.003), (3, 1.003), (4, 1.015)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_comes_near_the_exhaustive_one(bits: int, allowed: float, symmetric: bool) -> None:
    weight = _weight(24, 64)
    found = quantize_weight(weight, WeightScheme(bits=bits, group=32, symmetric=symmetric))
    exhaustive = sum(
        _exhaustive(weight[row, start : start + 32], bits, symmetric=symmetric)
        for row in range(24)
        for start in (0, 32)
    )
    assert _error(found, weight) <= exhaustive * allowed


@pytest.mark.parametrize(
    "scheme", [WeightScheme(bits=3), WeightScheme(bits=3, symmetric=True), WeightScheme("nf4")], ids=str
)
def test_importance_moves_the_error_to_where_it_counts_less(scheme: WeightScheme) -> None:
    weight = _weight(64, 96)
    importance = np.random.default_rng(3).exponential(size=96) ** 3
    equal = quantize_weight(weight, scheme).dequantize() - weight
    found = quantize_weight(weight, scheme, importance=importance).dequantize() - weight
    assert (np.square(found) * importance).sum() < 0.97 * (np.square(equal) * importance).sum()
    nothing = quantize_weight(weight, scheme, importance=np.zeros(96))
    np.testing.assert_array_equal(nothing.dequantize() - weight, equal)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_unusual_groups(method: str) -> None:
    least = np.finfo(np.float32).tiny
    weight = np.zeros((4, 32), np.float32)
    weight[1], weight[2], weight[3] = 0.7, -0.7, 1e-41
    huge = np.array([[-1e38, 1e38] * 16, [1e38, 0.0] * 16], np.float32)
    for scheme in _ALL:
        quantized = quantize_weight(weight, scheme, method=method)
        real = quantized.dequantize()
        assert (np.abs(quantized.scale) >= least).all()
        assert quantized.scale[0, 0] == 1
        np.testing.assert_array_equal(real[0], 0)
        np.testing.assert_allclose(np.abs(real[1:3]), 0.7, rtol=0.34 if scheme.format == "mxfp4" else 0.07)
        assert np.abs(real[3]).max() <= least
        held = quantize_weight(huge, scheme, method=method)
        assert np.isfinite(held.scale).all()
        assert _error(held, huge) <= 0.6 * np.square(huge.astype(np.float64)).sum()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", [WeightScheme(), WeightScheme("nvfp4")], ids=str)
def test_weights_that_are_no_numbers_are_refused_by_index(bad: float, scheme: WeightScheme) -> None:
    weight = _weight(8, 64)
    weight[5, 43] = bad
    for method in ("minmax", "mse"):
        with pytest.raises(ValueError, match=r"weight \(5, 43\) is"):
            quantize_weight(weight, scheme, method=method)


def test_bad_arguments() -> None:
    for bad in ({"bits": 7}, {"format": "int5"}, {"group": -1}):
        with pytest.raises(ValueError, match=r"weights have|no weight format|at least one"):
            WeightScheme(**bad)
    with pytest.raises(ValueError, match="outputs, inputs"):
        quantize_weight(np.zeros(4, np.float32), WeightScheme())
    with pytest.raises(ValueError, match="importance"):
        quantize_weight(np.ones((2, 4), np.float32), WeightScheme(), importance=np.array([1.0, -1, 0, 0]))
    with pytest.raises(ValueError, match="do not fit"):
        encode(np.ones((2, 64), np.float32), np.ones((2, 1), np.float32), None, WeightScheme("nf4"))
    with pytest.raises(ValueError, match="zero point"):
        levels(WeightScheme())


def test_bits_per_weight() -> None:
    assert WeightScheme(bits=4, group=32).bits_per_weight(4096, 16) == 4 + 20 / 32
    assert WeightScheme(bits=3, group=128, symmetric=True).bits_per_weight(4096) == 3 + 32 / 128
    assert WeightScheme(bits=8, group=0).bits_per_weight(1000) == 8 + 40 / 1000
    assert WeightScheme("mxfp4").bits_per_weight(4096) == 4.25
    assert WeightScheme("nvfp4").bits_per_weight(4096) == 4.5
    assert WeightScheme("ternary", group=0).bits_per_weight(4096) == pytest.approx(np.log2(3) + 32 / 4096)


def test_mxfp4_is_the_cast_of_the_format_at_a_power_of_two() -> None:
    weight = _weight(16, 128) * np.exp(_weight(16, 1, seed=1) * 5)
    quantized = quantize_weight(weight, WeightScheme("mxfp4"), method="minmax")
    largest = np.abs(weight.reshape(16, 4, 32)).max(axis=2)
    expected = 2.0 ** (np.floor(np.log2(largest)) - 2)
    np.testing.assert_array_equal(quantized.scale, expected)
    scale = np.repeat(quantized.scale, 32, axis=1)
    cast = np.clip(weight / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    np.testing.assert_array_equal(quantized.dequantize(), cast)
    searched = quantize_weight(weight, WeightScheme("mxfp4")).scale
    np.testing.assert_array_equal(searched, searched.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32))


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_nvfp4_has_float8_scales_below_one_float32(method: str) -> None:
    weight = _weight(16, 128) * np.exp(_weight(16, 1, seed=1))
    quantized = quantize_weight(weight, WeightScheme("nvfp4"), method=method)
    tensor = np.float32(nvfp4_tensor_scale(weight))
    assert tensor == np.float32(np.abs(weight).max() / (448 * 6))
    block = (quantized.scale / tensor).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(block * tensor, quantized.scale)
    if method == "minmax":
        largest = np.abs(weight.reshape(16, 8, 16)).max(axis=2)
        expected = (largest / 6 / tensor).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(block, expected)
        scale = np.repeat(quantized.scale, 16, axis=1)
        cast = np.clip(weight / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
        np.testing.assert_allclose(quantized.dequantize(), cast, rtol=1e-6)


@pytest.mark.parametrize(("name", "largest"), [("fp8e4m3", 448), ("fp8e5m2", 57344)])
def test_fp8_is_the_cast_of_the_format(name: str, largest: float) -> None:
    dtype = {"fp8e4m3": ml_dtypes.float8_e4m3fn, "fp8e5m2": ml_dtypes.float8_e5m2}[name]
    weight = _weight(16, 128) ** 3
    quantized = quantize_weight(weight, WeightScheme(name, group=0), method="minmax")
    np.testing.assert_allclose(quantized.scale[:, 0], np.abs(weight).max(axis=1) / largest, rtol=1e-6)
    # The reciprocal of the scale is what is multiplied with: the cast of the very same numbers is exact.
    expected = (weight * (np.float32(1) / quantized.scale)).astype(dtype).astype(np.float32) * quantized.scale
    np.testing.assert_array_equal(quantized.dequantize(), expected)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mxfp4", ml_dtypes.float4_e2m1fn),
        ("fp8e4m3", ml_dtypes.float8_e4m3fn),
        ("fp8e5m2", ml_dtypes.float8_e5m2),
    ],
)
def test_halfway_cases_round_as_the_cast_does(name: str, dtype: type) -> None:
    table = np.asarray(CODE_BOOKS[name].levels, np.float32)
    halves = (table[:-1] + table[1:]) / 2
    values = np.concatenate([halves, np.nextafter(halves, -np.inf), np.nextafter(halves, np.inf), table])
    np.testing.assert_array_equal(table[nearest_level(values, name)], values.astype(dtype).astype(np.float32))


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    from scipy.stats import norm

    # QLoRA, appendix E: 8 quantiles up to 0.9677 on the positive side, 7 on the negative one, and zero.
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
    np.testing.assert_allclose(levels(WeightScheme("nf4")), expected, atol=1e-6)


def test_nf4_takes_the_nearest_level_of_the_largest_magnitude() -> None:
    weight = _weight(6, 64)
    quantized = quantize_weight(weight, WeightScheme("nf4", group=64), method="minmax")
    np.testing.assert_allclose(quantized.scale[:, 0], np.abs(weight).max(axis=1))
    for row, column in np.ndindex(weight.shape):
        distances = np.abs(levels(WeightScheme("nf4")) * quantized.scale[row, 0] - weight[row, column])
        assert quantized.codes[row, column] == np.argmin(distances)


def test_ternary_is_the_rounded_share_of_the_mean_magnitude() -> None:
    weight = _weight(6, 64)
    quantized = quantize_weight(weight, WeightScheme("ternary", group=0), method="minmax")
    mean = np.abs(weight).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(quantized.scale, mean, rtol=1e-6)
    np.testing.assert_array_equal(quantized.codes, np.clip(np.rint(weight / mean), -1, 1) + 1)
