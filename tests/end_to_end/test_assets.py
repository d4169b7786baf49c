"""Real models, as exporters wrote them, through the whole compiler, against themselves in float."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import qgraph

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import data  # noqa: E402 - the benchmark's own modules, which are no package
import metrics  # noqa: E402
import timing  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Case:
    """What one model may lose, and what must run in integers.

    Attributes:
        opset: the source's, so that this file says what was imported.
        calibrate: number of calibration feeds.
        evaluate: number of evaluation feeds.
        sqnr_db: the least signal-to-noise ratio of the outputs against those of the source.
        loss: the most that the score may fall, in its own unit; None where there are no labels.
        integer: the least number of integer kernels after the runtime's own optimisation, by operator.
    """

    opset: int
    calibrate: int
    evaluate: int
    sqnr_db: float
    loss: float | None = None
    integer: dict[str, int] = dataclasses.field(default_factory=dict)


ENCODER = {"DynamicQuantizeMatMul": 18, "MatMulIntegerToFloat": 18}
CASES = {
    "minilm_dynamo_sdpa": Case(20, 2, 1000, 20, 0.5, ENCODER),
    "minilm_dynamo_eager": Case(20, 2, 1000, 20, 0.5, ENCODER),
    "minilm_legacy_sdpa": Case(17, 2, 1000, 20, 0.5, ENCODER),
    "minilm_legacy_eager": Case(17, 2, 1000, 20, 0.5, ENCODER),
    "resnet20": Case(18, 10, 20, 27, 1.0, {"QLinearConv": 18, "QLinearAdd": 8}),
    "resnet32": Case(18, 10, 10, 26, 1.0, {"QLinearConv": 30, "QLinearAdd": 14}),
    "mobilenet_v2": Case(18, 20, 60, 20.5, 2.0, {"QLinearConv": 51, "QLinearAdd": 10}),
    "squeezenet": Case(7, 15, 60, 22, 2.0, {"QLinearConv": 24, "QLinearConcat": 8}),
    "mnist": Case(7, 20, 500, 30, 0.5),
    "fastestdet": Case(11, 8, 16, 11.5, 3.0),
    "face_rfb320": Case(9, 8, 16, 45, None, {"QLinearConv": 44}),
    "silero_vad": Case(15, 40, 60, 24, None),
    "basic_pitch": Case(15, 4, 3, 32, None),
}


def test_every_model_is_covered() -> None:
    assert set(CASES) == set(data.TASKS)


@pytest.mark.parametrize("name", CASES)
def test_compiles_to_int8(name: str, assets: Path, tmp_path: Path) -> None:
    case, task = CASES[name], _task(name)
    assert _opset(task.model()) == case.opset
    calibration = list(itertools.islice(task.calibration(), case.calibrate))

    artifact = qgraph.compile(task.model(), target="cpu-int8", calibration=calibration, output=tmp_path / name)

    assert artifact.verified
    kernels = artifact.target.kernels(artifact.path)
    for operator, count in case.integer.items():
        assert kernels.integer.get(operator, 0) >= count, kernels.summary()
    exact, result = (
        _features(task, session, case.evaluate)
        for session in (timing.session(task.model()), qgraph.open(artifact.path).session(threads=timing.THREADS))
    )
    assert metrics.sqnr_db(exact, result) >= case.sqnr_db
    if case.loss is not None:
        assert task.score(result) >= task.score(exact) - case.loss


def _task(name: str) -> data.Task:
    task = data.TASKS[name]
    if not isinstance(task, data.Sentences):
        return task
    if not task.is_assembled():
        pytest.skip(f"{name} is not in {data.cache_folder()}; benchmarks/run.py --only minilm puts it there")
    return dataclasses.replace(task, calibration_sentences=64, pairs=150)


def _opset(model: Path) -> int:
    imports = onnx.load(model, load_external_data=False).opset_import
    return next(one.version for one in imports if one.domain in ("", "ai.onnx"))


def _features(task: data.Task, session: object, count: int) -> np.ndarray:
    feeds = itertools.islice(task.evaluation(), count)
    return np.concatenate([task.features(session.run(None, feed), feed) for feed in feeds])
