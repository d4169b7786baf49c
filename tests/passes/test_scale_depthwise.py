"""scale-depthwise: golden graphs, values kept, what it gains in 8 bits, and what must stay as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import models
from qgraph.models import digits_mobilenet
from qgraph.passes import ScaleDepthwise
from qgraph.pipeline import Context, Pipeline, Report

sys.path.insert(0, str(Path(__file__).parent))
from golden_rewrites import as_written
from half_precision import model_of, normal, run, sqnr_db

FILE = Path(__file__).parent.parent / "golden" / "scale-depthwise" / "behind-functions.onnxtxt"


def scale(model: ir.Model, feeds: list[dict[str, np.ndarray]], **options: float) -> Report:
    return Pipeline([ScaleDepthwise(**options)]).run(model, context=Context(calibration=feeds, threads=1)).parts[0]


def test_golden():
    """The factors go into the convolution before a Relu, and into a Mul behind what bends otherwise."""
    feeds = [{"x": np.array([[[[3.0]], [[0.125]]]], np.float32)}]
    model, report = as_written(FILE, lambda model: scale(model, feeds, bits=1.0, room=1.0))

    assert list(report.notes) == ["channels of 2 depthwise convolutions made alike in range, 1 behind a Mul"]
    before = ir.from_onnx_text(FILE.read_text().partition("\n---\n")[0])
    np.testing.assert_allclose(run(model, feeds[0])[0], run(before, feeds[0])[0], rtol=1e-6)


TEXT = (
    """g (float[1,32,4,4] x) => (float[1,32,2,2] y) <float[32,1,3,3] w = {0}> { [deep] y = Conv<group = 32>(x, w) }"""
)


def uneven(scales: np.ndarray) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    feeds = [{"x": normal(1, 32, 4, 4, seed=seed) * scales[:, None, None]} for seed in range(4)]
    return model_of(TEXT, w=normal(32, 1, 3, 3) / scales[:, None, None, None]), feeds


def test_small_channels_keep_their_bits_in_integers():
    model, feeds = uneven((2.0 ** (-np.arange(32) / 4)).astype(np.float32))
    exact = run(model, feeds[0])[0]
    noises = []
    for passes in ("", "scale-depthwise,"):
        quantized = model.clone()
        text = f"{passes}qdq{{activations=int8,symmetric=true,placement=tensorrt}}"
        Pipeline.parse(text).run(quantized, context=Context(calibration=feeds, threads=1))
        noises.append(sqnr_db(exact, run(quantized, feeds[0])[0]))
    assert noises[1] > noises[0] + 3.0


def test_a_small_channel_has_room_and_a_large_one_is_not_made_larger():
    model, feeds = uneven(np.float32([1.0] * 4 + [2.0**-6] * 28))
    scale(model, feeds)
    (factors,) = [value for name, value in model.graph.initializers.items() if name.endswith("alike_factors")]
    scaled = np.concatenate([feed["x"] for feed in feeds]) * factors.const_value.numpy()
    largest = np.abs(scaled).max(axis=(0, 2, 3))
    assert largest[:4].max() == pytest.approx(largest.max())
    assert largest[4:].max() == pytest.approx(largest.max() / 2)


@pytest.mark.parametrize("scales", [np.ones(32, np.float32), np.zeros(32, np.float32) + np.float32(1e-30)])
def test_channels_of_one_range_stay_as_they_are(scales: np.ndarray):
    model, feeds = uneven(scales)
    text = ir.to_onnx_text(model)
    assert scale(model, feeds).changed == 0
    assert ir.to_onnx_text(model) == text


def test_a_weight_with_two_readers_is_left_alone_with_the_reason():
    text = TEXT.replace("[deep] y = Conv<group = 32>(x, w)", "y = Add(a, b)").replace(
        "y = Add(a, b)", "[one] a = Conv<group = 32>(x, w) [two] b = Conv<group = 32>(x, w) y = Add(a, b)"
    )
    model, feeds = uneven((2.0 ** -np.arange(32.0)).astype(np.float32))
    model = model_of(text, w=normal(32, 1, 3, 3))
    report = scale(model, feeds)
    assert report.changed == 0
    assert {reason for _, reason in report.skipped} == {"its weight is computed, not float32, or read by others too"}


def test_room_of_less_than_one_is_refused():
    with pytest.raises(ValueError, match=r"room is 0\.5: give 1 or more"):
        ScaleDepthwise(room=0.5)


def test_a_network_of_uneven_channels_keeps_its_answers_in_symmetric_integers(tmp_path: Path):
    """Without the pass, tensorrt-int8 gave 55 % of the answers of the float model."""
    data = models.dataset("digits_mobilenet")
    feeds = [{"image": data.calibration["image"][start : start + 8]} for start in range(0, 64, 8)]
    artifact = qgraph.compile(digits_mobilenet.build(), "tensorrt-int8", calibration=feeds, output=tmp_path / "out")

    assert artifact.manifest["pipeline"]["compress"].startswith("scale-depthwise,qdq{")
    assert artifact.manifest["kernels"]["integer"] == {"Conv": 32, "Gemm": 2}
    (logits,) = artifact.session().run(None, {"image": data.evaluation["image"]})
    (exact,) = run(digits_mobilenet.build(), {"image": data.evaluation["image"]})
    assert (logits.argmax(1) == exact.argmax(1)).mean() > 0.98
