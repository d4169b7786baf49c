"""`grid-sample-to-gather` against a loop over places, against ONNX Runtime, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.pipeline import Pipeline
from qgraph.runtime.session import open_session

IMAGE, GRID = (2, 3, 4, 5), (2, 3, 6, 2)


def model_of(image: tuple[Any, ...] = IMAGE, grid: tuple[Any, ...] = GRID, **attributes: Any) -> ir.Model:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("GridSample", ["x", "g"], ["y"], **attributes)],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, image), onnx.helper.make_tensor_value_info("g", 1, grid)],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
    )
    imports = [onnx.helper.make_opsetid("", 21)]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def sampled(x: np.ndarray, grid: np.ndarray, mode: str, padding: str, corners: int) -> np.ndarray:
    """Return what GridSample's definition says, place by place, in float64."""
    batch, channels, height, width = x.shape
    result = np.zeros((batch, channels, *grid.shape[1:3]))
    for image, row, column in np.ndindex(batch, *grid.shape[1:3]):
        places = []
        for coordinate, size in zip(grid[image, row, column].astype(np.float64), (width, height), strict=True):
            place = (coordinate + 1) / 2 * (size - 1) if corners else ((coordinate + 1) * size - 1) / 2
            places.append(np.clip(place, 0, size - 1) if padding == "border" else place)
        u, v = places
        for i in range(int(np.floor(v)) - 1, int(np.floor(v)) + 3):
            for j in range(int(np.floor(u)) - 1, int(np.floor(u)) + 3):
                if mode == "nearest":
                    weight = float(i == np.rint(v) and j == np.rint(u))
                else:
                    weight = max(1 - abs(v - i), 0) * max(1 - abs(u - j), 0)
                if 0 <= i < height and 0 <= j < width:
                    result[image, :, row, column] += weight * x[image, :, i, j]
    return result


@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_every_kind(mode: str, padding: str, corners: int):
    random = np.random.default_rng(3)
    feeds = {
        "x": random.normal(size=IMAGE).astype(np.float32),
        "g": random.uniform(-1.6, 1.6, GRID).astype(np.float32),
    }
    feeds["g"][0, 0] = [[-1, -1], [1, 1], [-1, 1], [0, 0], [9, -9], [-9, 9]]
    model = model_of(mode=mode, padding_mode=padding, align_corners=corners)
    outputs = []
    for _ in range(2):
        session = open_session(ir.to_proto(model).SerializeToString(), threads=1, optimise=False)
        outputs.append(session.run(None, feeds)[0])
        Pipeline.parse("grid-sample-to-gather").run(model)
    assert "GridSample" not in {node.op_type for node in model.graph}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    expected = sampled(feeds["x"], feeds["g"], mode, padding, corners)
    for found in outputs:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (model_of(mode="cubic"), "mode is cubic"),
        (model_of(padding_mode="reflection"), "padding_mode is reflection"),
        (model_of((2, 3, "h", 5)), "size of its images is not known"),
        (model_of(grid=(2, "h", 6, 2)), "size of its grid is not known"),
        (model_of((2, 3, 4, 5, 6), (2, 3, 4, 5, 3)), "images in float32"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_stays(model: ir.Model, reason: str):
    before = ir.to_onnx_text(model)
    (part,) = Pipeline.parse("grid-sample-to-gather").run(model).parts
    assert part.changed == 0
    assert reason in part.skipped[0].reason
    assert ir.to_onnx_text(model) == before
