"""GPTQ against a slow loop written from the paper, against rounding to nearest, and through what can go wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from qgraph.numerics.gptq import Hessian, gptq, output_error
from qgraph.numerics.hessian import factorize
from qgraph.numerics.weights import WeightScheme, encode, group_parameters, levels, quantize_weight


def inputs(count: int, rows: int = 400, seed: int = 0) -> np.ndarray:
    """Return correlated inputs of unequal magnitude, float32 [rows, count]."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((count, count)) * np.exp(-0.1 * np.arange(count))[:, None]
    magnitude = np.exp(rng.standard_normal(count))
    return ((rng.standard_normal((rows, count)) @ mixing + 0.1) * magnitude).astype(np.float32)


def problem(outputs: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a float64 weight and a Hessian."""
    hessian = Hessian(count)
    hessian.add(inputs(count, seed=seed))
    return np.random.default_rng(seed + 1).standard_normal((outputs, count)), hessian.matrix


def rounded(
    column: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, scheme: WeightScheme
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes of one column and what they stand for."""
    whole = WeightScheme(scheme.format, scheme.bits, 0, scheme.symmetric)
    if scheme.format in ("mxfp4", "nvfp4"):
        whole = scheme
    zeros = None if zero_point is None else zero_point[:, None]
    codes = encode(column[:, None], scale[:, None], zeros, whole)[:, 0]
    numbers = levels(scheme)[codes] if zero_point is None else codes.astype(np.float64) - zero_point
    return codes, numbers * scale.astype(np.float64)


def published(weight: np.ndarray, hessian: np.ndarray, scheme: WeightScheme, damping: float, order: str) -> np.ndarray:
    """Round by the paper's algorithm as it is first derived: after each weight, its row leaves the inverse Hessian."""
    weight = weight.copy()
    count = len(hessian)
    size = scheme.group or count
    inverse = np.linalg.inv(hessian + damping * np.mean(np.diag(hessian)) * np.eye(count))
    codes = np.empty(weight.shape, np.uint8)
    scale, zero_point = group_parameters(weight, scheme, method="minmax")
    sequence = np.argsort(-np.diag(hessian), kind="stable") if order == "activation" else np.arange(count)
    for index in sequence:
        group = index // size
        if order == "none" and index % size == 0:
            fresh = group_parameters(weight[:, index : index + size], scheme, method="minmax")
            scale[:, group] = fresh[0][:, 0]
            if zero_point is not None and fresh[1] is not None:
                zero_point[:, group] = fresh[1][:, 0]
        zeros = None if zero_point is None else zero_point[:, group]
        codes[:, index], value = rounded(weight[:, index], scale[:, group], zeros, scheme)
        error = (weight[:, index] - value) / inverse[index, index]
        weight -= np.outer(error, inverse[index])
        inverse = inverse - np.outer(inverse[:, index], inverse[index]) / inverse[index, index]
        weight[:, index] = value
        inverse[index, index] = 1.0
    return codes


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize(
    "scheme",
    [
        WeightScheme(bits=4, group=32),
        WeightScheme(bits=3, group=16, symmetric=True),
        WeightScheme(bits=2, group=0),
        WeightScheme(bits=8, group=48),
        WeightScheme(bits=5, group=64),
        WeightScheme(bits=6, group=128, symmetric=True),
        WeightScheme("nf4", group=32),
        WeightScheme("fp8e4m3", group=0),
        WeightScheme("fp8e5m2", group=0),
        WeightScheme("ternary", group=64),
        WeightScheme("mxfp4"),
    ],
    ids=str,
)
def test_codes_are_those_of_the_published_algorithm(scheme: WeightScheme, order: str):
    weight, hessian = problem(24, 150)
    ours = gptq(weight, hessian, scheme, order=order, clip="minmax", refine=0)
    np.testing.assert_array_equal(ours.quantized.codes, published(weight, hessian, scheme, 0.01, order))


@pytest.mark.parametrize("block", [8, 40, 128, 1000])
def test_blocks_do_not_matter(block: int):
    weight, hessian = problem(16, 150)
    scheme = WeightScheme(bits=3, group=40)
    for order in ("none", "activation"):
        one = gptq(weight, hessian, scheme, order=order, block=block).quantized
        other = gptq(weight, hessian, scheme, order=order).quantized
        np.testing.assert_array_equal(one.codes, other.codes)


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int4s", "int5", "int6", "int8", "nf4", "fp8e4m3", "nvfp4"])
def test_each_refinement_lowers_the_error_and_all_beat_rounding_to_nearest(name: str):
    scheme = (
        WeightScheme(bits=int(name[3]), group=32, symmetric=name.endswith("s"))
        if name.startswith("int")
        else WeightScheme(name, group=32)
    )
    weight, hessian = problem(32, 100)
    weight = weight.astype(np.float32)
    nearest = output_error(weight, quantize_weight(weight, scheme).dequantize(), hessian)
    errors = [gptq(weight, hessian, scheme, refine=rounds).error for rounds in (0, 1, 3)]
    assert errors[0] < 0.5 * nearest
    assert errors[2] <= errors[1] <= errors[0]
    assert gptq(weight, hessian, scheme, order="none").error < 0.6 * nearest


def test_the_defaults_are_worth_a_sixth_of_the_published_error():
    weight, hessian = problem(64, 256)
    scheme = WeightScheme(bits=3, group=32)
    plain = gptq(weight.astype(np.float32), hessian, scheme, clip="minmax", refine=0).error
    assert gptq(weight.astype(np.float32), hessian, scheme).error < 0.84 * plain


def test_no_output_gets_worse_by_refinement():
    weight, hessian = problem(60, 128)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(128)
    for scheme in (WeightScheme(bits=3, group=32), WeightScheme(bits=2, group=0), WeightScheme("mxfp4")):
        results = [gptq(weight, hessian, scheme, clip="minmax", refine=rounds).quantized for rounds in range(8)]
        missed = [weight - one.dequantize() for one in results]
        costs = np.array([((one @ damped) * one).sum(axis=1) for one in missed])
        assert (np.diff(costs, axis=0) <= 1e-6 * costs[:-1]).all()


@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("group", [0, 32, 300])
def test_the_error_is_that_of_the_result(group: int, refine: int):
    weight, hessian = problem(40, 333)
    weight = weight.astype(np.float32)
    for order in ("none", "activation"):
        result = gptq(weight, hessian, WeightScheme(bits=4, group=group), order=order, refine=refine)
        expected = output_error(weight, result.quantized.dequantize(), hessian)
        assert result.error == pytest.approx(expected, rel=1e-3)


def test_rows_are_independent():
    weight, hessian = problem(50, 96)
    scheme = WeightScheme(bits=4, group=32)
    shuffled = np.random.default_rng(5).permutation(50)
    one = gptq(weight, hessian, scheme).quantized
    other = gptq(weight[shuffled], hessian, scheme).quantized
    np.testing.assert_array_equal(one.codes[shuffled], other.codes)
    np.testing.assert_array_equal(one.scale[shuffled], other.scale)


def test_activation_order_does_not_depend_on_where_inputs_stand():
    weight, hessian = problem(20, 96)
    moved = np.random.default_rng(5).permutation(96)
    scheme = WeightScheme(bits=4, group=0)
    one = gptq(weight, hessian, scheme, refine=0).quantized.codes
    other = gptq(weight[:, moved], hessian[np.ix_(moved, moved)], scheme, refine=0).quantized.codes
    np.testing.assert_array_equal(one[:, moved], other)


def test_the_same_input_gives_the_same_bytes():
    weight, hessian = problem(64, 300)
    results = [gptq(weight.astype(np.float32), hessian, WeightScheme(group=128)).quantized for _ in range(2)]
    assert results[0].codes.tobytes() == results[1].codes.tobytes()
    assert results[0].scale.tobytes() == results[1].scale.tobytes()


def test_dead_inputs_are_rounded_to_nearest_and_cost_nothing():
    x = inputs(64)
    x[:, [3, 40]] = 0
    hessian = Hessian(64)
    hessian.add(x)
    weight = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    result = gptq(weight, hessian.matrix, WeightScheme(bits=8, group=32))
    assert result.dead == 2
    assert result.retries == 0
    restored = result.quantized.dequantize()
    np.testing.assert_allclose(restored[:, [3, 40]], weight[:, [3, 40]], atol=0.02)
    assert result.error == pytest.approx(output_error(weight, restored, hessian.matrix), rel=1e-2)


def test_without_samples_all_is_rounded_to_nearest():
    weight = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    scheme = WeightScheme(bits=4, group=32)
    result = gptq(weight, Hessian(64).matrix, scheme, damping=0.0, clip="minmax", refine=0)
    np.testing.assert_array_equal(result.quantized.codes, quantize_weight(weight, scheme, method="minmax").codes)
    assert result.error == pytest.approx(0.0, abs=1e-5)
    assert result.dead == 64


def test_a_hessian_without_full_rank_is_damped_and_reported():
    x = inputs(80, rows=10)
    hessian = Hessian(80)
    hessian.add(x)
    weight = np.random.default_rng(1).standard_normal((8, 80)).astype(np.float32)
    result = gptq(weight, hessian.matrix, WeightScheme(group=16), damping=0.0)
    assert result.retries > 0
    assert 0 < result.damping <= 1e-2
    nearest = quantize_weight(weight, WeightScheme(group=16)).dequantize()
    assert result.error < output_error(weight, nearest, hessian.matrix)


def test_what_does_not_fit_is_refused():
    weight, hessian = problem(4, 32)
    with pytest.raises(ValueError, match="does not fit a weight"):
        gptq(weight[:, :30], hessian, WeightScheme())
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, hessian * np.nan, WeightScheme())
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(weight, hessian + 1e9 * np.trace(hessian) * (1 - np.eye(32)), WeightScheme())
    with pytest.raises(ValueError, match="negative diagonal"):
        gptq(weight, -hessian, WeightScheme())
    with pytest.raises(ValueError, match="which no code can stand for"):
        gptq(np.full((4, 32), np.nan), hessian, WeightScheme())
    with pytest.raises(ValueError, match="the order is"):
        gptq(weight, hessian, WeightScheme(), order="reversed")


def test_the_hessian_streams():
    x = inputs(20, rows=5000).reshape(10, 500, 20)
    whole, parts = Hessian(20), Hessian(20)
    whole.add(x)
    for part in x:
        parts.add(part)
    flat = x.reshape(-1, 20).astype(np.float64)
    np.testing.assert_allclose(whole.matrix, 2 / 5000 * flat.T @ flat, rtol=1e-5, atol=1e-5 * np.abs(flat).max() ** 2)
    np.testing.assert_allclose(whole.matrix, parts.matrix, rtol=1e-5, atol=1e-5 * np.abs(flat).max() ** 2)
    np.testing.assert_allclose(whole.mean_abs, np.abs(flat).mean(axis=0))
    assert whole.rows == parts.rows == 5000
    with pytest.raises(ValueError, match="do not feed a layer of 20 inputs"):
        whole.add(x[..., :19])
    with pytest.raises(ValueError, match="samples of input 7 are not finite"):
        x[3, 4, 7] = np.inf
        whole.add(x)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 300, 513])
def test_the_triangle_is_the_factor_of_the_damped_hessian(size: int):
    hessian = problem(1, size)[1]
    triangle = factorize(hessian, 0.01, np.float64)
    lower = np.tril(triangle.lower, -1) + np.eye(size)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(size)
    np.testing.assert_allclose((lower.T * triangle.pivots) @ lower, damped, rtol=1e-10, atol=1e-10 * damped.max())
    np.testing.assert_allclose(triangle.inverse() @ damped, np.eye(size), atol=1e-8)


def test_the_number_of_threads_does_not_matter():
    program = """
import hashlib, numpy as np
from qgraph.numerics.gptq import Hessian, gptq
from qgraph.numerics.weights import WeightScheme
rng = np.random.default_rng(0)
hessian = Hessian(700)
hessian.add(rng.standard_normal((1500, 700), dtype=np.float32).cumsum(axis=1))
weight = rng.standard_normal((600, 700), dtype=np.float32)
for order in ("none", "activation"):
    found = gptq(weight, hessian.matrix, WeightScheme(group=128), order=order)
    print(hashlib.sha256(found.quantized.codes.tobytes() + found.quantized.scale.tobytes()).hexdigest(), found.error)
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": threads},
        ).stdout
        for threads in ("1", "2")
    }
    assert len(outputs) == 1
