"""What errors of layers count for at the outputs, against networks whose derivatives are plain."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.analysis.convolutions import weighted_layers
from qgraph.analysis.output_gradients import output_gradients
from qgraph.pipeline import Context

RNG = np.random.default_rng(0)


def network(text: str, **arrays: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> {text}')
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def test_of_two_layers_the_second_is_what_the_first_counts_by():
    second = RNG.normal(size=(5, 1))
    model = network(
        "g (float[n,s,4] x) => (float[n,s,1] y) { h = MatMul (x, a) y = MatMul (h, b) }",
        a=RNG.normal(size=(4, 5)),
        b=second,
    )
    feeds = [{"x": RNG.normal(size=(2, 3, 4)).astype(np.float32)} for _ in range(2)]
    layers = weighted_layers(model).layers

    found, missing = output_gradients(model, Context(calibration=feeds), layers, "test")

    # Of one output, every direction is +-1: 2 samples of 6 rows in 2 directions.
    assert missing == ""
    np.testing.assert_allclose(found[layers[0]], 24 * second @ second.T, rtol=1e-4)
    np.testing.assert_allclose(found[layers[1]], [[24.0]], rtol=1e-4)


def test_a_convolution_has_a_row_for_each_place():
    model = network(
        "g (float[n,2,4,4] x) => (float[n,1,4,4] y) { y = Conv <pads = [1,1,1,1]> (x, w) }", w=np.ones((1, 2, 3, 3))
    )
    layers = weighted_layers(model, None, ("Conv",)).layers
    feeds = [{"x": RNG.normal(size=(3, 2, 4, 4)).astype(np.float32)}]

    found, _ = output_gradients(model, Context(calibration=feeds), layers, "test")

    np.testing.assert_allclose(found[layers[0]], [[2 * 3 * 16]])


@pytest.mark.parametrize(
    ("limit", "reason"), [(0, "too large for a backward pass"), (1 << 30, "there is no gradient of .*Einsum")]
)
def test_what_there_is_no_gradient_for_is_told(limit: int, reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qgraph.analysis.output_gradients._MOST_BYTES", limit)
    model = network(
        'g (float[n,4] x) => (float[n,4] y) { h = MatMul (x, a) y = Einsum <equation = "ni->ni"> (h) }',
        a=np.ones((4, 4)),
    )

    found, missing = output_gradients(model, Context(), weighted_layers(model).layers, "test")

    assert found == {}
    assert re.search(reason, missing)
