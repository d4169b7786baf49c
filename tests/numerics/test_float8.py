"""float8_e4m3fn as a quantization scheme: exact to the bit against ml_dtypes and against the code book's levels."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from qgraph.numerics.formats import CODE_BOOKS, nearest_level
from qgraph.numerics.histograms import mse_range
from qgraph.numerics.quantize import Parameters, dequantize, minmax_parameters, mse_parameters, quantize
from qgraph.numerics.schemes import FLOAT8, INT8, Scheme

LEVELS = np.asarray(CODE_BOOKS["fp8e4m3"].levels, np.float32)
ONE = Parameters(np.float32(1), np.zeros((), ml_dtypes.float8_e4m3fn))


def test_every_level_and_every_half_between_two():
    halves = ((LEVELS[1:] + LEVELS[:-1]) / 2).astype(np.float32)
    beside = np.concatenate([np.nextafter(halves, np.float32(sign * np.inf)) for sign in (-1, 1)])
    values = np.concatenate([LEVELS, halves, beside])

    quantized = quantize(values, FLOAT8, ONE).values

    assert quantized.dtype == ml_dtypes.float8_e4m3fn
    assert np.array_equal(quantized.astype(np.float32), values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.array_equal(quantized.astype(np.float32), LEVELS[nearest_level(values, "fp8e4m3")])


@given(st.lists(st.floats(-1024.0, 1024.0, width=32), min_size=1, max_size=30))
def test_any_numbers_go_to_the_nearest_level_or_saturate(values: list[float]):
    array = np.array(values, np.float32)

    quantized = quantize(array, FLOAT8, ONE).values.astype(np.float32)

    assert np.array_equal(quantized, LEVELS[nearest_level(array, "fp8e4m3")])
    assert np.abs(quantized).max() <= 448


@pytest.mark.parametrize("parameters", [minmax_parameters, mse_parameters])
def test_the_largest_magnitude_of_each_channel_is_held(parameters):
    array = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) * np.float32([[1], [1e-4], [30], [0]])
    scheme = FLOAT8.per_channel(2, 0)

    scale, zero_point = parameters(array, scheme)
    back = dequantize(quantize(array, scheme, Parameters(scale, zero_point)))

    assert zero_point.dtype == ml_dtypes.float8_e4m3fn
    assert not zero_point.astype(np.float32).any()
    share = 16 if parameters is minmax_parameters else 1  # the search may let the largest saturate
    assert (np.abs(back - array) <= np.abs(array) / share + scale[:, None] * 2.0**-10).all()
    assert np.array_equal(scale.astype(np.float16).astype(np.float32), scale)
    assert scale[3] == 1.0


def test_tiny_tensors_are_not_rounded_away():
    """Scales are numbers of float16, but not where that would leave nothing of a tensor."""
    array = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) * np.float32(1e-9)
    scheme = FLOAT8.per_channel(2, 0)

    back = dequantize(quantize(array, scheme))

    assert np.linalg.norm(back - array) < 0.04 * np.linalg.norm(array)


def test_it_is_what_the_onnx_reference_computes():
    values = (np.random.default_rng(1).standard_cauchy(200) * 20).astype(np.float32)
    scale = np.float32(0.37)
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    read = onnx.helper.make_node("DequantizeLinear", ["y", "s"], ["r"])
    graph = onnx.helper.make_graph(
        [node, read],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [200])],
        [onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [200])],
        [
            onnx.numpy_helper.from_array(np.asarray(scale), "s"),
            onnx.helper.make_tensor("z", onnx.TensorProto.FLOAT8E4M3FN, [], [0]),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])

    (expected,) = ReferenceEvaluator(model).run(None, {"x": values})

    ours = dequantize(quantize(values, FLOAT8, Parameters(scale, ONE.zero_point)))
    np.testing.assert_array_equal(ours, expected)


def test_a_range_is_clipped_less_than_for_integers():
    values, counts = np.linspace(-8, 8, 400), np.ones(400)
    wide = np.append(values, 100.0)
    many = np.append(counts * 1000, 1.0)

    low, high = mse_range(wide, many, -8.0, 100.0, FLOAT8)

    assert high > mse_range(wide, many, -8.0, 100.0, INT8)[1]
    assert low < 0


def test_a_float_has_no_free_zero_point():
    with pytest.raises(ValueError, match="float8 has 8 bits"):
        Scheme(symmetric=False, format="float8e4m3fn")
    with pytest.raises(ValueError, match="float8 has 8 bits"):
        Scheme(bits=4, format="float8e4m3fn")
