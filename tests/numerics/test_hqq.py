"""Half-quadratic quantization against the paper's iteration and plain rounding."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.numerics.hqq import hqq, lp_error
from qgraph.numerics.weights import WeightScheme, quantize_weight


def _paper(weight: np.ndarray, bits: int, group: int, *, p: float = 0.7, iterations: int = 20) -> np.ndarray:
    """The iteration of the paper's section 2, its zero points rounded at the end; returns the approximation."""
    top, beta = 2**bits - 1, 10.0
    blocks = weight.astype(np.float64).reshape(-1, group)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    scale = (high - low) / top
    zero = -low / scale
    best, least = zero, np.inf
    for _ in range(iterations):
        codes = np.clip(np.rint(blocks / scale + zero), 0, top)
        error = blocks - (codes - zero) * scale
        if np.abs(error).mean() >= least:
            break
        least, best = np.abs(error).mean(), zero
        magnitude = np.abs(error) + 1e-12
        shrunk = np.sign(error) * np.maximum(magnitude - magnitude ** (p - 1) / beta, 0)
        zero = (codes - (blocks - shrunk) / scale).mean(axis=1, keepdims=True)
        beta *= 1.01
    zero = np.clip(np.rint(best), 0, top)
    return ((np.clip(np.rint(blocks / scale + zero), 0, top) - zero) * scale).reshape(weight.shape)


def _heavy_tailed(*shape: int) -> np.ndarray:
    return (np.random.default_rng(0).standard_t(5, shape) * 0.03).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_lower_errors_than_rounding_and_than_the_paper(bits: int, group: int) -> None:
    weight = _heavy_tailed(48, 256)
    inputs = np.random.default_rng(1).standard_normal((64, 256))
    for symmetric in (False, True):
        scheme = WeightScheme(bits=bits, group=group, symmetric=symmetric)
        plain = quantize_weight(weight, scheme, method="minmax").dequantize()
        found = hqq(weight, scheme).dequantize()
        assert lp_error(weight, found) < 0.99 * lp_error(weight, plain)
        assert np.square(inputs @ (weight - found).T).sum() < np.square(inputs @ (weight - plain).T).sum()
        if not symmetric:
            assert lp_error(weight, found) < lp_error(weight, _paper(weight, bits, group))


def test_no_group_ends_above_rounding() -> None:
    weight = _heavy_tailed(32, 128)
    scheme = WeightScheme(bits=3, group=32)
    plain = quantize_weight(weight, scheme, method="minmax").dequantize() - weight
    found = hqq(weight, scheme).dequantize() - weight
    for power in (0.7, 2.0):
        before, after = ((np.abs(error) ** power).reshape(-1, 32).sum(axis=1) for error in (plain, found))
        assert (after <= before * 1.0001).all()


def test_it_does_not_depend_on_the_unit_or_the_layout() -> None:
    weight = _heavy_tailed(20, 200)
    scheme = WeightScheme(bits=4, group=64)
    expected = hqq(weight, scheme)
    scaled = hqq(weight * np.float32(2.0**20), scheme)
    np.testing.assert_array_equal(scaled.codes, expected.codes)
    np.testing.assert_array_equal(scaled.scale, expected.scale * np.float32(2.0**20))
    np.testing.assert_array_equal(hqq(np.asfortranarray(weight), scheme).codes, expected.codes)


def test_unusual_groups_and_bad_arguments() -> None:
    weight = np.zeros((3, 64), np.float32)
    weight[1] = 0.3
    weight[2] = 1e-42
    found = hqq(weight, WeightScheme())
    np.testing.assert_array_equal(found.dequantize()[0], 0)
    np.testing.assert_allclose(found.dequantize()[1], 0.3, rtol=1e-5)
    assert np.isfinite(found.scale).all()
    with pytest.raises(ValueError, match="nf4"):
        hqq(weight, WeightScheme("nf4"))
    with pytest.raises(ValueError, match="out of range"):
        hqq(weight, WeightScheme(), p=0)
    weight[2, 5] = np.nan
    with pytest.raises(ValueError, match=r"weight \(2, 5\)"):
        hqq(weight, WeightScheme())
