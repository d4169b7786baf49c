"""Patches times weights are what the operator computes, whatever its strides, pads, dilations and groups."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qgraph.analysis.convolutions import Convolution, convolutions
from qgraph.numerics.moments import LayerMoments

CASES = {
    "plain": ("Conv", (3, 5, 9), (4, 5, 3), {}),
    "square": ("Conv", (2, 4, 8, 7), (6, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "uneven": ("Conv", (2, 3, 9, 8), (5, 3, 3, 2), {"pads": [0, 1, 2, 0], "strides": [2, 1]}),
    "dilated": ("Conv", (1, 2, 12, 12), (3, 2, 3, 3), {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    "groups": ("Conv", (2, 6, 6, 6), (9, 2, 3, 3), {"group": 3, "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    "depthwise": ("Conv", (2, 5, 7, 7), (5, 1, 3, 3), {"group": 5, "pads": [1, 1, 1, 1]}),
    "upper": ("Conv", (1, 3, 7, 10), (4, 3, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "lower": ("Conv", (1, 3, 7, 10), (4, 3, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    "valid": ("Conv", (1, 3, 7, 10), (4, 3, 4, 3), {"auto_pad": "VALID", "strides": [2, 3]}),
    "cube": ("Conv", (1, 2, 5, 6, 4), (3, 2, 3, 2, 2), {"pads": [1, 0, 0, 1, 1, 1]}),
    "transposed": ("ConvTranspose", (2, 3, 5, 4), (3, 4, 3, 2), {"strides": [2, 3]}),
    "transposed, cut": (
        "ConvTranspose",
        (1, 3, 5, 4),
        (3, 4, 3, 3),
        {"strides": [2, 1], "pads": [1, 2, 0, 2], "output_padding": [1, 0]},
    ),
    "transposed, dilated": ("ConvTranspose", (1, 2, 6), (2, 3, 3), {"dilations": [2], "strides": [2], "pads": [3, 5]}),
}


def layer_of(operator: str, x: np.ndarray, weight: np.ndarray, attributes: dict) -> tuple[Convolution, np.ndarray]:
    """Return the layer, and what the operator gives by onnx's own reference."""
    node = helper.make_node(operator, ["x", "w"], ["y"], name="layer", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (layer,) = convolutions(ir.from_proto(proto)).layers
    assert isinstance(layer, Convolution)
    return layer, ReferenceEvaluator(proto).run(None, {"x": x})[0]


@pytest.mark.parametrize("name", list(CASES))
def test_products_of_patches_are_the_operator(name: str) -> None:
    operator, shape, kernel, attributes = CASES[name]
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=shape).astype(np.float32), rng.normal(size=kernel).astype(np.float32)
    layer, expected = layer_of(operator, x, weight, attributes)
    positions = layer.window.positions(x.shape, 1 << 20, 0)
    patches = layer.window.rows(x, positions)
    matrix = layer.matrix().reshape(layer.groups, -1, layer.inputs)
    outputs = np.concatenate(list(patches @ matrix.swapaxes(1, 2)), axis=1)
    assert layer.window.outputs(x.shape[2:]) == expected.shape[2:]
    np.testing.assert_allclose(outputs, expected[positions[0], :, *positions[1:]], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(layer.stored(layer.matrix()), weight)


def test_fewer_positions_are_drawn_the_same_way_every_time() -> None:
    layer, _ = layer_of("Conv", np.zeros((2, 4, 8, 7), np.float32), np.ones((6, 4, 3, 3), np.float32), {})
    first, again = (np.stack(layer.window.positions((2, 4, 8, 7), 10, 3)) for _ in range(2))
    other = np.stack(layer.window.positions((2, 4, 8, 7), 10, 4))
    assert first.shape == (3, 10)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(np.unique(first, axis=1).T) == 10


@pytest.mark.parametrize("attributes", [{}, {"group": 2}])
def test_an_empty_batch_has_no_patches(attributes: dict[str, int]) -> None:
    weight = np.ones((6, 4 // attributes.get("group", 1), 3, 3), np.float32)
    layer, _ = layer_of("Conv", np.zeros((1, 4, 8, 7), np.float32), weight, attributes)
    x = np.zeros((0, 4, 8, 7), np.float32)
    patches = layer.window.rows(x, layer.window.positions(x.shape, 10, 0))
    assert patches.shape == (layer.groups, 0, layer.inputs)


def test_moments_in_groups_are_those_of_each_group() -> None:
    rng = np.random.default_rng(1)
    original = rng.normal(size=(3, 40, 5)).astype(np.float32)
    changed = (original + 0.1 * rng.normal(size=original.shape)).astype(np.float32)
    added = rng.normal(size=(3, 40, 2)).astype(np.float32)
    weight = rng.normal(size=(3, 2, 5)).astype(np.float32)
    together = LayerMoments(5, groups=3)
    together.add(changed, original)
    together.add_moved("layer", added, changed)
    wanted = together.wanted(weight, together.pull(weight, "layer"), 0.01)
    for group in range(3):
        alone = LayerMoments(5)
        alone.add(changed[group], original[group])
        alone.add_moved("layer", added[group], changed[group])
        np.testing.assert_allclose(together.hessian[group], alone.hessian, rtol=1e-5, atol=1e-6)
        pulled = alone.pull(weight[group], "layer")
        np.testing.assert_allclose(wanted[group], alone.wanted(weight[group], pulled, 0.01), rtol=1e-4, atol=1e-5)
