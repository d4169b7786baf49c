"""Model caches are full of symbolic links: the file that the user names is not where the bytes lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

import qgraph


def test_a_model_behind_a_symbolic_link_compiles(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((8, 3, 5, 5)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"])],
        "linked",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 16, 16])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 8, 12, 12])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    blob, link = tmp_path / "blobs" / "0f1e2d", tmp_path / "snapshot" / "model.onnx"
    blob.parent.mkdir()
    link.parent.mkdir()
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), blob)
    link.symlink_to(Path("..") / "blobs" / blob.name)
    feeds = [{"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(4)]

    artifact = qgraph.compile(link, target="cpu-int8", passes="qdq", calibration=feeds, output=tmp_path / "out")

    assert artifact.verified
    assert artifact.manifest["source"]["name"] == "model.onnx"
