"""AWQ's searches against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.numerics.awq import search_awq_scales, search_clip
from qgraph.numerics.hessian import Hessian, output_error
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, encode, group_parameters, quantize_weight


def problem(count: int = 96, outputs: int = 40) -> tuple[np.ndarray, Hessian]:
    """Return a weight, and the Hessian of inputs of which a few are large."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, count)) @ (np.eye(count) + 0.1 * rng.standard_normal((count, count)))
    x[:, [5, 40, 77]] *= 30
    hessian = Hessian(count)
    hessian.add(x.astype(np.float32))
    return rng.standard_normal((outputs, count)).astype(np.float32), hessian


def test_large_inputs_are_scaled_up_and_the_error_falls():
    weight, hessian = problem()
    scheme = WeightScheme(bits=3, group=32)
    found = search_awq_scales([weight], hessian.mean_abs, hessian.matrix, scheme)
    assert found.scales[[5, 40, 77]].min() > 1.5 * np.median(found.scales)
    assert found.after < 0.6 * found.before
    rounded = quantize_weight(weight, scheme, method="minmax").dequantize()
    scaled = quantize_weight(weight * found.scales, scheme, method="minmax").dequantize() / found.scales
    assert found.before == pytest.approx(output_error(weight, rounded, hessian.matrix), rel=1e-3)
    assert found.after == pytest.approx(output_error(weight, scaled, hessian.matrix), rel=1e-3)


def test_the_best_of_the_grid_is_taken():
    weight, hessian = problem()
    scheme = WeightScheme(bits=4, group=32)
    errors = []
    for alpha in np.arange(10) / 10:
        scales = hessian.mean_abs**alpha
        scales /= np.sqrt(scales.max() * scales.min())
        scaled = quantize_weight((weight * scales).astype(np.float32), scheme, method="minmax").dequantize() / scales
        errors.append(output_error(weight, scaled, hessian.matrix))
    found = search_awq_scales([weight], hessian.mean_abs, hessian.matrix, scheme, grid=10)
    assert found.after <= min(errors) * 1.001
    if not found.by_weight:
        assert found.alpha == pytest.approx(np.argmin(errors) / 10)


def test_layers_that_share_inputs_are_judged_together():
    weight, hessian = problem()
    scheme = WeightScheme(bits=3, group=32)
    one = search_awq_scales([weight], hessian.mean_abs, hessian.matrix, scheme)
    split = search_awq_scales([weight[:11], weight[11:]], hessian.mean_abs, hessian.matrix, scheme)
    np.testing.assert_array_equal(one.scales, split.scales)
    assert one.after == pytest.approx(split.after)


def test_a_part_of_the_rows_stands_for_all():
    weight, hessian = problem(96, 3000)
    scheme = WeightScheme(bits=3, group=32)
    found = search_awq_scales([weight], hessian.mean_abs, hessian.matrix, scheme)
    scaled = quantize_weight(weight * found.scales, scheme, method="minmax").dequantize() / found.scales
    assert found.after == pytest.approx(output_error(weight, scaled, hessian.matrix), rel=0.05)


def test_where_nothing_helps_scales_are_ones():
    weight = np.zeros((4, 32), np.float32)
    found = search_awq_scales([weight], np.ones(32), np.eye(32), WeightScheme())
    np.testing.assert_array_equal(found.scales, np.ones(32, np.float32))
    assert found.before == found.after == 0


def test_dead_inputs_are_left_alone():
    weight, hessian = problem()
    mean_abs, matrix = hessian.mean_abs, hessian.matrix.copy()
    mean_abs[7] = matrix[7] = matrix[:, 7] = 0
    found = search_awq_scales([weight], mean_abs, matrix, WeightScheme(bits=3))
    assert found.scales[7] == 1
    assert np.isfinite(found.scales).all()
    assert (found.scales > 0).all()


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "nf4"])
@pytest.mark.parametrize("group", [0, 32, 40])
def test_clipping_loses_least_by_the_blocks_of_the_hessian(name: str, group: int):
    weight, hessian = problem()
    scheme = WeightScheme(bits=int(name[3]), group=group) if name[:3] == "int" else WeightScheme(name, group=group)
    clipped = search_clip(weight, hessian.matrix, scheme)
    size = group or 96

    def by_blocks(quantized: QuantizedWeight) -> np.ndarray:
        missed = weight.astype(np.float64) - quantized.dequantize()
        parts = [slice(start, start + size) for start in range(0, 96, size)]
        costs = [((missed[:, part] @ hessian.matrix[part, part]) * missed[:, part]).sum(axis=1) for part in parts]
        return np.array(costs)

    scale, zero_point = group_parameters(weight, scheme, method="minmax")
    tried = []
    for shrunk in 1 - 0.05 * np.arange(11):
        scales = scale * np.float32(shrunk)
        tried.append(by_blocks(QuantizedWeight(encode(weight, scales, zero_point, scheme), scales, zero_point, scheme)))
    tried.append(by_blocks(quantize_weight(weight, scheme, importance=np.diag(hessian.matrix))))
    np.testing.assert_allclose(by_blocks(clipped), np.min(tried, axis=0), rtol=1e-3)


def test_formats_without_free_scales_are_not_clipped():
    weight, hessian = problem()
    scheme = WeightScheme("mxfp4")
    clipped = search_clip(weight, hessian.matrix, scheme)
    np.testing.assert_array_equal(clipped.codes, quantize_weight(weight, scheme).codes)


def test_what_does_not_fit_is_refused():
    weight, hessian = problem()
    with pytest.raises(ValueError, match="do not share 95 inputs"):
        search_awq_scales([weight], np.ones(95), hessian.matrix, WeightScheme())
    with pytest.raises(ValueError, match=r"Hessian of shape \(95, 95\) does not fit"):
        search_awq_scales([weight], np.ones(96), np.eye(95), WeightScheme())
    with pytest.raises(ValueError, match="finite and not negative"):
        search_awq_scales([weight], -np.ones(96), hessian.matrix, WeightScheme())
    with pytest.raises(ValueError, match="does not fit a weight"):
        search_clip(weight, np.eye(95), WeightScheme())
