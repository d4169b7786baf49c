"""`resize-to-matmul` against ONNX Runtime's Resize, over its modes and attributes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.numerics.interpolation import COORDINATES, interpolation_matrix
from qgraph.pipeline import Pipeline
from qgraph.runtime.session import open_session

FLOAT = onnx.TensorProto.FLOAT


def resize(
    shape: list[int | str], scales: list[float] | None = None, sizes: list[int] | None = None, **attributes: Any
) -> ir.Model:
    constants = {"scales": np.array(scales, np.float32)} if scales else {"sizes": np.array(sizes, np.int64)}
    inputs = ["x", "", "scales"] if scales else ["x", "", "", "sizes"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Resize", inputs, ["y"], **attributes)],
        "g",
        [onnx.helper.make_tensor_value_info("x", FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def assert_kept(model: ir.Model) -> None:
    shape = [dim if isinstance(dim, int) else 2 for dim in model.graph.inputs[0].shape]
    feeds = {"x": np.random.default_rng(2).normal(size=shape).astype(np.float32)}

    def run() -> np.ndarray:
        return open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1).run(None, feeds)[0]

    before = run()
    assert Pipeline.parse("resize-to-matmul").run(model).changed == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert {node.op_type for node in model.graph} <= {"MatMul", "Transpose", "Identity"}
    after = run()
    assert before.shape == after.shape
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    assert Pipeline.parse("resize-to-matmul").run(model).changed == 0


SCALES = [[2, 2], [1.5, 3], [0.5, 0.6], [0.3, 1], [1, 2.7], [1.1, 2], [0.9, 1.1], [0.25, 0.2]]
SIZES = [[4, 5], [8, 15], [3, 1], [4, 9]]


@pytest.mark.parametrize("coordinates", list(COORDINATES))
@pytest.mark.parametrize(
    "options", [{"mode": "linear"}, {"mode": "cubic"}, {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5}]
)
def test_images(coordinates: str, options: dict[str, Any]):
    options = options | {"coordinate_transformation_mode": coordinates}
    for scales in SCALES:
        assert_kept(resize(["n", 3, 4, 5], scales=[1, 1, *scales], **options))
    for sizes in SIZES:
        assert_kept(resize([2, 3, 4, 5], sizes=[2, 3, *sizes], **options))
        assert_kept(resize(["n", 3, 4, 5], sizes=sizes, axes=[2, -1], **options))


@pytest.mark.parametrize("coordinates", list(COORDINATES))
@pytest.mark.parametrize("scales", [[1, 1, 2, 1.5, 3], [1, 1, 0.5, 2, 0.7]])
def test_volumes(coordinates: str, scales: list[float]):
    assert_kept(resize(["n", 2, 3, 4, 5], scales, mode="linear", coordinate_transformation_mode=coordinates))


@pytest.mark.parametrize("coordinates", list(COORDINATES))
def test_columns_sum_to_one(coordinates: str):
    for before, after, cubic, outside in [(1, 4, None, False), (5, 3, -0.75, True), (4, 9, -0.5, False)]:
        matrix = interpolation_matrix(
            before, after, after / before, coordinates, cubic_coefficient=cubic, exclude_outside=outside
        )
        np.testing.assert_allclose(matrix.sum(axis=0), 1, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (resize([1, 3, 4, 5], [1, 1, 2, 2], mode="nearest"), "nearest"),
        (resize([1, 3, 4, 5], [1, 1, 0.5, 0.5], mode="linear", antialias=1), "antialias"),
        (resize([1, 3, 4, 5], [1, 1, 1.1, 1.1], mode="linear"), "change no size"),
        (resize([1, 3, "h", 5], [1, 1, 2, 2], mode="linear"), "not known"),
        (resize(["n", 3, 4, 5], sizes=[1, 3, 8, 8], mode="linear"), "not known"),
        (
            resize([1, 3, 4, 5], sizes=[8, 9], axes=[2, 3], mode="linear", keep_aspect_ratio_policy="not_larger"),
            "depend on one another",
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_stays(model: ir.Model, reason: str):
    report = Pipeline.parse("resize-to-matmul").run(model)
    assert report.changed == 0
    assert reason in report.parts[0].skipped[0].reason
