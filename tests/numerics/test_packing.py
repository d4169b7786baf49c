"""Layouts against what ONNX Runtime computes from them, and against slow loops."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qgraph.numerics.packing import (
    DequantizeInputs,
    block_size,
    container,
    from_matmul_nbits,
    gather_block_quantized,
    matmul_bnb4,
    matmul_nbits,
    onnx_float8,
    onnx_int,
    pack_bits,
    to_container,
    unpack_bits,
)
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, quantize_weight

_CODE_BOOKS = ("nf4", "fp8e4m3", "fp8e5m2", "mxfp4", "nvfp4", "ternary")


def _weight(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


def _run(node: onnx.NodeProto, initializers: list[onnx.TensorProto], x: np.ndarray | None = None) -> np.ndarray:
    import onnxruntime

    kind = TensorProto.INT64 if x is not None and x.dtype == np.int64 else TensorProto.FLOAT
    inputs = [] if x is None else [helper.make_tensor_value_info("x", kind, None)]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, [output], initializers),
        opset_imports=[helper.make_opsetid("", 25), helper.make_opsetid("com.microsoft", 1)],
        ir_version=11,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {} if x is None else {"x": x})[0]


def _run_matmul_nbits(weight: QuantizedWeight, x: np.ndarray) -> np.ndarray:
    packed = matmul_nbits(weight)
    outputs, inputs = weight.codes.shape
    arrays = {"B": packed.codes, "s": packed.scales, "z": packed.zero_points}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *(name for name, array in arrays.items() if array is not None)],
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=container(weight.scheme).bits,
        block_size=packed.block,
    )
    return _run(node, [numpy_helper.from_array(a, name) for name, a in arrays.items() if a is not None], x)


def _run_dequantize(inputs: DequantizeInputs) -> np.ndarray:
    arrays = {"q": inputs.values, "s": inputs.scale, "z": inputs.zero_point}
    node = helper.make_node(
        "DequantizeLinear",
        [name for name, array in arrays.items() if array is not None],
        ["y"],
        axis=inputs.axis,
        block_size=inputs.block_size,
    )
    return _run(node, [numpy_helper.from_array(a, name) for name, a in arrays.items() if a is not None])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 7, 32, 333])
def test_pack_bits_against_a_slow_loop(bits: int, size: int) -> None:
    codes = np.random.default_rng(size).integers(0, 1 << bits, (3, 2, size), dtype=np.uint8)
    packed = pack_bits(codes, bits)
    expected = np.zeros((3, 2, -(-size * bits // 8)), np.uint8)
    for (i, j, k), code in np.ndenumerate(codes):
        expected[i, j, k * bits // 8] |= code << (k * bits % 8)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(unpack_bits(packed, bits, size), codes)


def test_pack_bits_of_rows_that_are_not_contiguous() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (64, 48), dtype=np.uint8)
    np.testing.assert_array_equal(pack_bits(codes.T, 4), pack_bits(np.ascontiguousarray(codes.T), 4))


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="2, 4 or 8"):
        pack_bits(np.zeros((1, 8), np.uint8), 3)
    with pytest.raises(ValueError, match="do not hold"):
        unpack_bits(np.zeros((1, 3), np.uint8), 4, 7)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [16, 32, 128, 256, 0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_matmul_nbits_multiplies_with_the_dequantized_weight(bits: int, group: int, symmetric: bool) -> None:
    for inputs in (256, 330):
        scheme = WeightScheme(bits=bits, group=group, symmetric=symmetric)
        weight = quantize_weight(_weight(24, inputs), scheme)
        x = _weight(2, inputs, seed=1)
        expected = x.astype(np.float64) @ weight.dequantize().T.astype(np.float64)
        np.testing.assert_allclose(_run_matmul_nbits(weight, x), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "inputs"), [(2, 128), (4, 128), (4, 75), (8, 130)])
def test_matmul_nbits_there_and_back(symmetric: bool, bits: int, inputs: int) -> None:
    weight = quantize_weight(_weight(9, inputs), WeightScheme(bits=bits, group=32, symmetric=symmetric))
    codes, scales, zero_points, block = matmul_nbits(weight)
    back = from_matmul_nbits(codes, scales, zero_points, inputs=inputs, bits=bits, block=block)
    assert back.scheme == weight.scheme
    np.testing.assert_array_equal(back.codes, weight.codes)
    np.testing.assert_array_equal(back.dequantize(), weight.dequantize())


def test_filled_up_elements_of_a_ragged_block_stand_for_zero() -> None:
    weight = quantize_weight(_weight(4, 40), WeightScheme(group=32))
    packed = matmul_nbits(weight)
    codes = unpack_bits(packed.codes.reshape(4, -1), 4, 64)
    np.testing.assert_array_equal(codes[:, 40:], np.repeat(weight.zero_point[:, 1:], 24, axis=1))


@pytest.mark.parametrize("group", [8, 24, 512])
def test_blocks_without_a_kernel_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match="blocks of 16"):
        block_size(WeightScheme(group=group))


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("inputs", [128, 104])
def test_gather_block_quantized_looks_up_the_dequantized_rows(bits: int, symmetric: bool, inputs: int) -> None:
    scheme = WeightScheme(bits=bits, group=32, symmetric=symmetric)
    weight = quantize_weight(_weight(20, inputs), scheme)
    packed = gather_block_quantized(weight)
    ids = np.array([[3, 0], [19, 7]], np.int64)
    arrays = {"q": packed.codes, "s": packed.scales, "z": packed.zero_points}
    node = helper.make_node(
        "GatherBlockQuantized",
        ["q", "x", *(name for name in ("s", "z") if arrays[name] is not None)],
        ["y"],
        domain="com.microsoft",
        bits=container(scheme).bits,
        block_size=packed.block,
        gather_axis=0,
        quantize_axis=1,
    )
    initializers = [numpy_helper.from_array(a, name) for name, a in arrays.items() if a is not None]
    np.testing.assert_array_equal(_run(node, initializers, ids), weight.dequantize()[ids])


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_dequantize_linear_gives_the_dequantized_weight(bits: int, symmetric: bool, transposed: bool) -> None:
    for group, inputs in ((32, 96), (32, 88), (0, 40)):
        weight = quantize_weight(_weight(12, inputs), WeightScheme(bits=bits, group=group, symmetric=symmetric))
        expected = weight.dequantize() if transposed else weight.dequantize().T
        np.testing.assert_array_equal(_run_dequantize(onnx_int(weight, transposed=transposed)), expected)


@pytest.mark.parametrize("name", ["fp8e4m3", "fp8e5m2"])
@pytest.mark.parametrize("transposed", [False, True])
def test_dequantize_linear_of_float8(name: str, transposed: bool) -> None:
    for group in (32, 0):
        weight = quantize_weight(_weight(12, 96), WeightScheme(name, group=group))
        expected = weight.dequantize() if transposed else weight.dequantize().T
        np.testing.assert_array_equal(_run_dequantize(onnx_float8(weight, transposed=transposed)), expected)


@pytest.mark.parametrize("group", [16, 64])
def test_matmul_bnb4_multiplies_with_the_dequantized_weight(group: int) -> None:
    weight = quantize_weight(_weight(24, 256), WeightScheme("nf4", group=group))
    packed = matmul_bnb4(weight)
    x = _weight(2, 256, seed=1)
    node = helper.make_node(
        "MatMulBnb4", ["x", "B", "s"], ["y"], domain="com.microsoft", K=256, N=24, block_size=packed.block, quant_type=1
    )
    actual = _run(node, [numpy_helper.from_array(packed.codes, "B"), numpy_helper.from_array(packed.scales, "s")], x)
    np.testing.assert_allclose(actual, x @ weight.dequantize().T, rtol=0, atol=2e-5)


def test_matmul_bnb4_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        matmul_bnb4(quantize_weight(_weight(2, 32), WeightScheme()))
    with pytest.raises(ValueError, match="blocks of 32"):
        matmul_bnb4(quantize_weight(_weight(2, 40), WeightScheme("nf4")))


@pytest.mark.parametrize("scheme", [WeightScheme(bits=b, symmetric=s) for b in (2, 3, 4, 5, 6, 8) for s in (0, 1)])
def test_containers_hold_integers_exactly(scheme: WeightScheme) -> None:
    weight = quantize_weight(_weight(16, 80), scheme)
    held = to_container(weight)
    assert held.scheme.bits in (2, 4, 8)
    np.testing.assert_array_equal(held.dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", _CODE_BOOKS)
def test_containers_hold_code_books(name: str) -> None:
    weight = quantize_weight(_weight(16, 96), WeightScheme(name))
    held, wanted = to_container(weight).dequantize(), weight.dequantize()
    if name == "nf4":
        assert np.abs(held - wanted).max() <= weight.scale.max() / 254 * 1.0001
    else:
        np.testing.assert_array_equal(held, wanted)
