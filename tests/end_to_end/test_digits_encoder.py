"""The trained encoder on held-back digits: fused, smoothed, in 8 bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qgraph.models import digits_encoder
from qgraph.pipeline import Pipeline, Report

pytest.importorskip("sklearn")


def compressed(passes: str) -> tuple[ir.Model, Report]:
    model = digits_encoder.build()
    images = digits_encoder.dataset().calibration["image"]
    feeds = [{"image": part} for part in np.array_split(images, 8)]
    return model, Pipeline.parse(f"lift-constants,convert-opset,fold-constants,{passes}").run(model, calibration=feeds)


def logits(model: ir.Model, optimised: Path | None = None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(digits_encoder.dataset().evaluation))[0]


def test_fused_attention_computes_the_same():
    model, report = compressed("fuse-attention")
    assert report.parts[-1].changed == 3
    assert not report.parts[-1].skipped
    np.testing.assert_allclose(logits(model), logits(digits_encoder.build()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("passes", ["fuse-attention,dynamic-int8", "fuse-attention,smooth-quant,dynamic-int8"])
def test_eight_bits_keep_the_answers(passes: str, tmp_path: Path):
    model, report = compressed(passes)
    assert report.parts[-1].changed == 18
    exact, found = logits(digits_encoder.build()), logits(model, tmp_path / "optimised.onnx")
    assert (found.argmax(1) == exact.argmax(1)).mean() >= 0.99
    assert 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum()) > 25
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert (kinds["MatMulIntegerToFloat"], kinds["DynamicQuantizeMatMul"]) == (9, 9)
    assert (kinds["Attention"], kinds["MatMul"], kinds["SkipLayerNormalization"]) == (3, 0, 0)
