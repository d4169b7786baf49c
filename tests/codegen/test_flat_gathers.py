"""GatherND at known places as Gather."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.codegen.flat_gathers import flatten_gathers
from qgraph.runtime.session import open_session


@pytest.mark.parametrize(
    "places",
    [
        np.array([[0, 1], [2, -1], [-3, 0]]),
        np.array([[[1, 2, 3]], [[0, -3, -4]]]),
        np.array([2]),
    ],
)
def test_the_same_elements(places: np.ndarray):
    x = np.arange(36, dtype=np.int32).reshape(3, 3, 4)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("GatherND", ["x", "i"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.INT32, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, None)],
        [onnx.numpy_helper.from_array(places.astype(np.int64), "i")],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    model = ir.from_proto(proto)
    flatten_gathers(model)
    assert [node.op_type for node in model.graph] == ["Reshape", "Gather"]
    (found,) = open_session(ir.to_proto(model).SerializeToString(), threads=1).run(None, {"x": x})
    depth = places.shape[-1]
    expected = np.array([x[tuple(place)] for place in places.reshape(-1, depth)])
    np.testing.assert_array_equal(found, expected.reshape(*places.shape[:-1], *x.shape[depth:]))
