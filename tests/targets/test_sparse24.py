"""`cuda-sparse24`: what it compiles to, and that `check` proves the pattern."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
import qgraph.ir
from qgraph.analysis.sparse_weights import mark_sparse, sparse_weights
from qgraph.errors import UserError
from qgraph.models import digits_encoder
from qgraph.numerics.sparsity import follows, parse_pattern
from qgraph.targets.cuda_sparse24 import CudaSparse24

TWO_OF_FOUR = parse_pattern("2:4", 0.5)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> qgraph.Artifact:
    images = digits_encoder.dataset().calibration["image"][:40]
    feeds = [{"image": part} for part in np.array_split(images, 5)]
    folder = tmp_path_factory.mktemp("sparse") / "encoder"
    return qgraph.compile(digits_encoder.build(), "cuda-sparse24", output=folder, calibration=feeds)


def test_the_stored_weights_are_sparse_and_in_float16(artifact: qgraph.Artifact):
    model = qgraph.ir.load(artifact.path / "model.onnx")

    found = list(sparse_weights(model))

    assert len(found) >= 8
    for one in found:
        assert one.matrix is not None
        assert follows(one.matrix, TWO_OF_FOUR)
        assert one.matrix.dtype == np.float16
    assert not CudaSparse24().check(model)


def test_the_manifest_says_what_runs_and_where(artifact: qgraph.Artifact):
    manifest = artifact.manifest

    assert manifest["kernels"]["float"]["MatMul 2:4"] + manifest["kernels"]["float"].get("Gemm 2:4", 0) >= 8
    assert "not run on TensorRT here" in manifest["stand_in"] or not manifest["stand_in"]
    assert manifest["verification"]["outputs"][0]["sqnr_db"] > 8


def test_the_session_runs(artifact: qgraph.Artifact):
    image = digits_encoder.dataset().evaluation["image"][:3]

    (logits,) = artifact.session().run(None, {"image": image})

    assert logits.shape == (3, 10)


def claimed(weight: np.ndarray, op: str, attributes: str = "") -> ir.Model:
    shape = ",".join(map(str, weight.shape))
    data = "float[1,8,4,4] x" if op == "Conv" else "float[2,8] x"
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({data}) => (y) <float[{shape}] w = {{0}}> '
    model = ir.from_onnx_text(text + f"{{ [layer] y = {op} {attributes} (x, w) }}")
    model.graph.initializers["w"].const_value = ir.tensor(weight.astype(np.float32), name="w")
    mark_sparse(model.graph[0], TWO_OF_FOUR, 0.5)
    return model


PATTERN = np.tile([1.0, 0.0, 2.0, 0.0], 2)
"""Two of four along an axis of eight."""


@pytest.mark.parametrize(
    ("weight", "op", "attributes"),
    [
        (np.repeat(PATTERN[:, None], 8, 1), "MatMul", ""),
        (np.repeat(PATTERN[None], 8, 0), "Gemm", "<transB: int = 1>"),
        (np.broadcast_to(PATTERN[None, :, None, None], (8, 8, 3, 3)), "Conv", ""),
    ],
    ids=["MatMul", "Gemm", "Conv"],
)
def test_the_right_axis_passes_and_the_wrong_one_is_refused(weight: np.ndarray, op: str, attributes: str):
    assert not CudaSparse24().check(claimed(weight, op, attributes))

    refused = CudaSparse24().check(claimed(weight.swapaxes(0, 1), op, attributes))

    assert [tuple(one) for one in refused] == [("layer", "its weight has more than two of four neighbouring inputs")]


def test_another_pattern_is_refused(tmp_path: Path):
    images = digits_encoder.dataset().calibration["image"][:16]
    with pytest.raises(UserError, match="sparse tensor cores want 2:4"):
        qgraph.compile(
            digits_encoder.build(),
            "cuda-sparse24",
            output=tmp_path / "out",
            calibration=[{"image": images}, {"image": images}],
            passes="sparsify{pattern=1:4,method=magnitude}",
        )
