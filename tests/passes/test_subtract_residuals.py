"""`subtract-residuals`: golden graphs, the same to the last bit, and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden_rewrites import as_written, what_to_do

from qgraph.models import digits_encoder
from qgraph.pipeline import Pipeline
from qgraph.runtime.session import open_session

FILES = sorted((Path(__file__).parent.parent / "golden" / "subtract-residuals").glob("*.onnxtxt"))


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1).run(None, feeds)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    before = ir.from_onnx_text(what_to_do(path)[1])
    random = np.random.default_rng(0)
    feeds = {value.name: random.normal(size=(3, value.shape[1])).astype(np.float32) for value in before.graph.inputs}
    exact = run(before, feeds)

    model, report = as_written(path, Pipeline.parse("subtract-residuals").run)

    assert (report.changed > 0) == (not path.stem.startswith("not-"))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for one, other in zip(exact, run(model, feeds), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_encoder_keeps_its_sums_and_norms_apart(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    dataset = digits_encoder.dataset()
    feeds = {"image": dataset.evaluation["image"][:16]}
    model = digits_encoder.build()
    Pipeline.parse("lift-constants,convert-opset,fold-constants,fuse-attention,qdq").run(
        model, calibration=[{"image": dataset.calibration["image"][:64]}]
    )
    exact = run(model, feeds)[0]
    changed = Pipeline.parse("subtract-residuals").run(model).changed
    assert changed >= 5
    np.testing.assert_array_equal(run(model, feeds)[0], exact)
    open_session(ir.to_proto(model).SerializeToString(), optimised_path=tmp_path / "optimised.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["SkipLayerNormalization"] == 0
    assert kinds["MatMulIntegerToFloat"] == 18
