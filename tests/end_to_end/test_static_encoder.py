"""Encoders with nothing but calibrated ranges: smoothed, and every layer with a weight in static 8 bits."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

import qgraph
from qgraph.models import digits_encoder
from qgraph.pipeline import Pipeline

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import data  # noqa: E402 - the benchmark's own modules, which are no package
import metrics  # noqa: E402
import timing  # noqa: E402

STATIC = "smooth-quant{activations=static},qdq"


def test_smoothing_helps_static_quantization_of_the_small_encoder(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    dataset = digits_encoder.dataset()
    feeds = [{"image": part} for part in np.array_split(dataset.calibration["image"], 8)]
    exact, noise = _run(tmp_path / "exact.onnx", "fuse-attention", feeds), {}
    for passes in ("qdq", STATIC):
        found = _run(tmp_path / "static.onnx", f"fuse-attention,{passes}", feeds)
        assert (found.argmax(1) == exact.argmax(1)).mean() >= 0.99
        noise[passes] = metrics.sqnr_db(exact, found)
    assert noise[STATIC] >= 25
    assert noise[STATIC] >= noise["qdq"]


def _run(path: Path, passes: str, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    model = digits_encoder.build()
    Pipeline.parse(f"lift-constants,convert-opset,fold-constants,{passes}").run(model, calibration=feeds)
    qgraph.save(model, path)
    logits: np.ndarray = timing.session(path).run(None, dict(digits_encoder.dataset().evaluation))[0]
    return logits


@pytest.mark.parametrize("name", ["minilm_dynamo_sdpa", "minilm_legacy_eager"])
def test_a_sentence_encoder_keeps_its_ranking(name: str, assets: Path, tmp_path: Path) -> None:
    del assets
    task = data.TASKS[name]
    assert isinstance(task, data.Sentences)
    if not task.is_assembled():
        pytest.skip(f"{name} is not in {data.cache_folder()}; benchmarks/run.py --only minilm puts it there")
    task = dataclasses.replace(task, calibration_sentences=128, pairs=150)
    artifact = qgraph.compile(
        task.model(), target="cpu-int8", passes=STATIC, calibration=list(task.calibration()), output=tmp_path / "static"
    )
    kernels = artifact.target.kernels(artifact.path)
    assert kernels.integer["MatMulIntegerToFloat"] >= 36
    assert not any("Dynamic" in operator for operator in kernels.integer)
    sessions = (timing.session(task.model()), artifact.session(threads=1))
    exact, found = (_features(task, session) for session in sessions)
    assert metrics.sqnr_db(exact, found) >= 22
    assert task.score(found) >= task.score(exact) - 0.3


def _features(task: data.Task, session: object) -> np.ndarray:
    feeds = itertools.islice(task.evaluation(), 1000)
    return np.concatenate([task.features(session.run(None, one), one) for one in feeds])  # type: ignore[attr-defined]
