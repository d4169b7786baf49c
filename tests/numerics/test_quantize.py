import itertools
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given
from onnx.reference import ReferenceEvaluator

from qgraph.numerics.quantize import (
    BIAS_LIMIT,
    Parameters,
    dequantize,
    minmax_parameters,
    mse_parameters,
    quantize,
    quantize_bias,
    scale_and_zero_point,
    weight_scale_for_bias,
)
from qgraph.numerics.schemes import INT8, INT8_ACTIVATION, INT8_WEIGHT, UINT8, UINT8_WEIGHT, Scheme

TINY = np.finfo(np.float32).tiny
SMALL, LARGE = 2.0**-100, 2.0**100
SCHEMES = [
    INT8,
    INT8_WEIGHT,
    INT8_ACTIVATION,
    UINT8,
    UINT8_WEIGHT,
    Scheme(bits=4),
    Scheme(bits=4, signed=False, symmetric=False),
    Scheme(bits=2, narrow=True),
    Scheme(bits=3, signed=False, symmetric=False),
]


def random_array(shape=(6, 10, 4), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3


def onnx_round_trip(array, parameters, scheme):
    """Return the integers of QuantizeLinear and the reals of DequantizeLinear, as the ONNX reference computes them."""
    types = {(8, True): "INT8", (8, False): "UINT8", (4, True): "INT4", (4, False): "UINT4"}
    dtype = getattr(onnx.TensorProto, types[scheme.bits, scheme.signed])
    attributes = {} if scheme.axis is None else {"axis": scheme.axis, "block_size": scheme.block_size}
    zero_point = onnx.helper.make_tensor(
        "z", dtype, parameters.zero_point.shape, parameters.zero_point.reshape(-1).tolist()
    )
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
            onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
        ],
        "round_trip",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, array.shape)],
        [
            onnx.helper.make_tensor_value_info("q", dtype, array.shape),
            onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, array.shape),
        ],
        [onnx.numpy_helper.from_array(parameters.scale, "s"), zero_point],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    integers, reals = ReferenceEvaluator(model).run(None, {"x": array})
    return integers.astype(np.int64), reals


@pytest.mark.parametrize("kind", ["tensor", "channel", "group"])
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.bits in (4, 8) and not scheme.narrow])
def test_integers_and_reals_are_those_of_the_onnx_reference(scheme, kind):
    array = random_array()
    scheme = {
        "tensor": scheme.per_tensor(),
        "channel": scheme.per_channel(3, 1),
        "group": scheme.per_group(3, 1, 5),
    }[kind]
    parameters = minmax_parameters(array, scheme)
    # Half the range, so that a good part of the elements saturates.
    parameters = Parameters((parameters.scale / 2).astype(np.float32), parameters.zero_point)
    quantized = quantize(array, scheme, parameters)
    integers, reals = onnx_round_trip(array, parameters, scheme)
    np.testing.assert_array_equal(quantized.values, integers)
    np.testing.assert_array_equal(dequantize(quantized), reals)


def slow_quantize(array, scheme):
    """Return integers, scales by block and zero points by block, element by element from the definition."""
    blocks = scheme.block_shape or (-1,) * array.ndim
    integers = np.empty(array.shape, np.int64)
    scales, zero_points = {}, {}
    key_of = {
        index: tuple(0 if block == -1 else place // block for place, block in zip(index, blocks, strict=True))
        for index in np.ndindex(array.shape)
    }
    for key in sorted(set(key_of.values())):
        members = [index for index in key_of if key_of[index] == key]
        low = min(0.0, *(float(array[index]) for index in members))
        high = max(0.0, *(float(array[index]) for index in members))
        if scheme.symmetric:
            exact = max(low / (scheme.qmin - scheme.centre), high / (scheme.qmax - scheme.centre))
        else:
            exact = (high - low) / (scheme.qmax - scheme.qmin)
        scale = np.float32(exact) if exact else np.float32(1)
        zero_point = scheme.centre if scheme.symmetric else round(scheme.qmin - low / float(scale))
        zero_point = min(max(zero_point, scheme.qmin), scheme.qmax)
        scales[key], zero_points[key] = scale, zero_point
        for index in members:
            integer = round(float(np.float32(array[index]) / scale)) + zero_point  # round() goes to even
            integers[index] = min(max(integer, scheme.qmin), scheme.qmax)
    return integers, scales, zero_points


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("blocks", [(), (1, -1, -1), (-1, -1, 1), (4, 1, 1), (1, 3, 1), (4, 3, -1)])
def test_every_block_shape_against_a_loop_with_ragged_last_blocks(scheme, blocks):
    scheme = Scheme(scheme.bits, scheme.signed, scheme.symmetric, scheme.narrow, blocks)
    array = random_array((6, 10, 4), seed=1)
    quantized = quantize(array, scheme)
    integers, scales, zero_points = slow_quantize(array, scheme)
    np.testing.assert_array_equal(quantized.values, integers)
    assert quantized.scale.shape == scheme.scale_shape(array.shape)
    np.testing.assert_array_equal(quantized.scale.reshape(-1), list(scales.values()))
    np.testing.assert_array_equal(quantized.zero_point.reshape(-1), list(zero_points.values()))
    assert quantized.values.dtype == quantized.zero_point.dtype == scheme.dtype
    assert quantized.scale.dtype == np.float32


def test_halves_go_to_even_and_what_lies_outside_saturates():
    array = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1000.0, -1000.0, 3.4e38], np.float32)
    quantized = quantize(array, INT8, Parameters(np.array(1.0, np.float32), np.array(0, np.int8)))
    assert quantized.values.tolist() == [0, 2, 2, 0, -2, 127, -128, 127]
    small = quantize(array, INT8, Parameters(np.array(1e-30, np.float32), np.array(0, np.int8)))
    assert small.values.tolist() == [127, 127, 127, -128, -128, 127, -128, 127]


finite = st.floats(-LARGE, LARGE, width=32)


@given(finite, finite, st.sampled_from(SCHEMES))
def test_any_range_is_held_and_zero_is_exact(one, other, scheme):
    low, high = min(one, other), max(one, other)
    scale, zero_point = scale_and_zero_point(low, high, scheme)
    assert scale.dtype == np.float32
    assert zero_point.dtype == scheme.dtype
    assert scale >= TINY
    assert scheme.qmin <= zero_point <= scheme.qmax
    bounds = np.array([min(low, 0.0), 0.0, max(high, 0.0)], np.float32)
    back = dequantize(quantize(bounds, scheme, Parameters(scale, zero_point)))
    assert back[1] == 0.0
    # A rounded zero point moves the ends by half a step at most; a symmetric one moves nothing.
    slack = 0.5 if not scheme.symmetric else 1e-5
    assert np.abs(back - bounds).max() <= max(float(scale) * (0.5 + slack) * (1 + 1e-5), TINY)


@given(finite, st.sampled_from(SCHEMES))
def test_a_constant_keeps_its_value(value, scheme):
    array = np.full(5, value, np.float32)
    quantized = quantize(array, scheme)
    step = float(quantized.scale)
    assert np.abs(dequantize(quantized) - array).max() <= max(step * 0.5 * (1 + 1e-5), TINY)
    if abs(value) > 1e-30 and (not scheme.symmetric or value > 0):
        # A scheme that spends its integers on this side alone hits the constant itself.
        np.testing.assert_allclose(dequantize(quantized), array, rtol=3e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_get_scale_one_and_denormals_a_normal_scale(scheme):
    array = np.zeros((3, 4), np.float32)
    array[1] = 1e-42
    array[2] = 5.0
    quantized = quantize(array, scheme.per_channel(2, 0))
    assert quantized.scale[0] == 1.0
    assert quantized.scale[1] == TINY
    np.testing.assert_array_equal(dequantize(quantized)[:2], 0.0)
    assert np.abs(dequantize(quantized)[2] - 5.0).max() < 5.0 * 1e-5 + quantized.scale[2] / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad):
    array = np.ones((2, 3), np.float32)
    array[1, 2] = bad
    for function in (quantize, minmax_parameters, mse_parameters):
        with pytest.raises(ValueError, match=r"element \(1, 2\) is (nan|-?inf)"):
            function(array, INT8)
    with pytest.raises(ValueError, match="finite"):
        scale_and_zero_point(0.0, bad, INT8)


def test_other_element_types_and_faults():
    assert quantize(np.array([1, -2], np.float16), INT8).values.tolist() == [64, -128]
    assert quantize(np.array([2.0, -2.0]), INT8_WEIGHT).values.tolist() == [127, -127]
    with pytest.raises(ValueError, match=r"element \(0,\) is 1e\+300"):
        quantize(np.array([1e300]), INT8)
    with pytest.raises(ValueError, match="no range"):
        quantize(np.empty((0, 3), np.float32), INT8)
    too_few = Parameters(np.ones(2, np.float32), np.zeros(2, np.int8))
    with pytest.raises(ValueError, match=r"needs \(3,\)"):
        quantize(np.ones((3, 2), np.float32), INT8.per_channel(2, 0), too_few)
    with pytest.raises(ValueError, match="empty"):
        scale_and_zero_point(1.0, 0.0, INT8)


def squared_error(array, scheme, parameters):
    difference = dequantize(quantize(array, scheme, parameters)).astype(np.float64) - array
    return (difference**2).sum()


@pytest.mark.parametrize("scheme", [INT8_WEIGHT, Scheme(bits=4), Scheme(bits=3, signed=False, symmetric=False)])
def test_the_search_finds_the_least_squared_error_of_its_candidates(scheme):
    array = np.random.default_rng(3).standard_t(3, (4, 500)).astype(np.float32)
    found = mse_parameters(array, scheme.per_channel(2, 0))
    for row, scale, zero_point in zip(array, *found, strict=True):
        found_error = squared_error(row, scheme, Parameters(scale, zero_point))
        errors = {}
        for factor in np.arange(10, 101) / 100:
            candidate = scale_and_zero_point(row.min() * factor, row.max() * factor, scheme)
            errors[factor] = squared_error(row, scheme, candidate)
        coarse = min((errors[factor], factor) for factor in np.arange(10, 101, 5) / 100)[1]
        near = [errors[factor] for factor in errors if abs(factor - coarse) < 0.045]
        assert found_error == pytest.approx(min(near), rel=1e-4)
        assert found_error <= errors[1.0] * (1 + 1e-6)


def test_the_search_pays_off_where_outliers_are():
    array = np.random.default_rng(0).standard_normal((8, 1024)).astype(np.float32)
    array[:, 0] = 12.0
    scheme = Scheme(bits=4, narrow=True).per_channel(2, 0)
    by_range = squared_error(array, scheme, minmax_parameters(array, scheme))
    assert squared_error(array, scheme, mse_parameters(array, scheme)) < 0.5 * by_range


@pytest.mark.parametrize("blocks", [(), (1, -1), (-1, 1), (7, 1), (1, 5)])
def test_the_search_treats_every_block_on_its_own(blocks):
    array = random_array((9, 11), seed=5)
    array[0] *= 100
    scheme = Scheme(bits=4, block_shape=blocks)
    found = mse_parameters(array, scheme)
    sizes = zip((9, 11), blocks or (-1, -1), strict=True)
    row_size, column_size = (size if block == -1 else block for size, block in sizes)
    scales = found.scale.reshape(scheme.grid(array.shape))
    for i, j in itertools.product(*map(range, scales.shape)):
        block = array[i * row_size : (i + 1) * row_size, j * column_size : (j + 1) * column_size]
        assert scales[i, j] == mse_parameters(block, Scheme(bits=4)).scale


def test_the_search_needs_few_copies_of_a_layer():
    array = random_array((512, 1024))
    tracemalloc.start()
    mse_parameters(array, INT8_WEIGHT.per_channel(2, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * array.nbytes


def test_a_bias_is_an_integer_at_the_scale_of_its_products():
    bias = np.array([0.5, -0.25, 1e-3, 0.0], np.float32)
    weight_scale = np.array([0.01, 0.02, 0.03, 0.04], np.float32)
    quantized = quantize_bias(bias, 0.05, weight_scale)
    assert quantized.values.dtype == quantized.zero_point.dtype == np.int32
    for index in range(4):
        scale = np.float32(np.float32(0.05) * weight_scale[index])
        assert quantized.scale[index] == scale
        assert quantized.values[index] == round(float(bias[index] / scale))
    assert np.abs(dequantize(quantized) - bias).max() <= quantized.scale.max() / 2
    assert quantize_bias(bias, 0.05, np.array(0.01, np.float32)).scale.shape == ()


def test_a_weight_scale_is_raised_just_as_far_as_the_bias_needs():
    # Channel 1 has next to no weights, as pruned or dead ones do: its bias would overflow 32 bits.
    weight_scale = np.array([0.01, 1e-12, 1.0], np.float32)
    bias = np.array([3.0, 3.0, 0.0], np.float32)
    with pytest.raises(ValueError, match=r"bias 1 .* does not fit"):
        quantize_bias(bias, 0.02, weight_scale)
    raised = weight_scale_for_bias(weight_scale, 0.02, bias)
    assert raised.dtype == np.float32
    assert raised[[0, 2]].tolist() == weight_scale[[0, 2]].tolist()
    quantized = quantize_bias(bias, 0.02, raised)
    assert BIAS_LIMIT * 0.999 < quantized.values[1] <= BIAS_LIMIT
    np.testing.assert_allclose(dequantize(quantized)[1], 3.0, rtol=1e-6)
    whole = weight_scale_for_bias(np.array(1e-12, np.float32), 0.02, bias)
    assert whole.shape == ()
    assert np.abs(quantize_bias(bias, 0.02, whole).values).max() <= BIAS_LIMIT


def test_the_bias_of_a_channel_without_weights_keeps_its_precision():
    weight = np.array([[1.0, -2.0], [0.0, 0.0], [0.0, 0.0]], np.float32)
    bias = np.array([0.1, 0.7, 0.0], np.float32)
    scale = minmax_parameters(weight, INT8_WEIGHT.per_channel(2, 0)).scale
    blunt = quantize_bias(bias, 0.5, scale)
    assert abs(dequantize(blunt)[1] - 0.7) > 0.1
    chosen = weight_scale_for_bias(scale, 0.5, bias, free=~weight.any(axis=1))
    assert chosen[[0, 2]].tolist() == scale[[0, 2]].tolist()
    assert abs(dequantize(quantize_bias(bias, 0.5, chosen))[1] - 0.7) < 1e-6


@given(st.floats(SMALL, LARGE, width=32), st.floats(SMALL, LARGE, width=32), st.floats(-LARGE, LARGE, width=32))
def test_any_bias_fits_or_is_refused(input_scale, weight_scale, value):
    bias = np.array([value], np.float32)
    try:
        raised = weight_scale_for_bias(np.array([weight_scale], np.float32), input_scale, bias)
        quantized = quantize_bias(bias, input_scale, raised)
    except ValueError:
        # The product of the scales leaves float32 at either end, or the raised one does.
        assert not 1e-37 < input_scale * weight_scale < 1e37 or abs(value) / BIAS_LIMIT / input_scale > 1e37
        return
    assert abs(int(quantized.values[0])) <= BIAS_LIMIT * (1 + 1e-6)
    assert abs(dequantize(quantized)[0] - bias[0]) <= float(quantized.scale[0]) * 0.5 + abs(value) * 1e-6


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_scales_of_a_bias_must_be_positive_numbers(bad):
    bias = np.ones(1, np.float32)
    for scales in ((bad, np.ones(1, np.float32)), (1.0, np.array([bad], np.float32))):
        with pytest.raises(ValueError, match="positive and finite"):
            quantize_bias(bias, *scales)
