"""Compile or score one model, or time several by turns, in a process that may crash without taking others along.

python benchmarks/worker.py compile TASK CALIBRATION FOLDER RESULT ARGUMENTS
python benchmarks/worker.py accuracy TASK MODEL FEATURES [REFERENCE_FEATURES]
python benchmarks/worker.py latency TASK RESULT FEEDS TOOL=MODEL...
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import data
import metrics
import numpy as np
import timing

__all__: list[str] = []

ROUNDING = ("adaround", "gptq")
"""Passes whose time is told."""


def compile_(calibration: Path, folder: Path, result: Path, model: str, arguments: list[str]) -> None:
    """Run `qgraph compile` for cpu-int8 with the ARGUMENTs, and write how it ended and what rounding weights took."""
    from qgraph import cli, registry

    seconds: dict[str, float] = {}
    for name in (name for name in ROUNDING if any(name in argument for argument in arguments)):
        _time_pass(registry.find("pass", name), name, seconds)
    command = ["compile", model, "--target", "cpu-int8", "--calib", str(calibration), "-o", str(folder), "--force"]
    try:
        status = int(cli.main([*command, *arguments]) or 0)
    except SystemExit as ending:
        status = int(ending.code or 0)
    figures: dict[str, Any] = {"status": status}
    if (folder / "model.onnx").is_file():
        figures |= _facts(folder)
        if seconds:
            figures["rounding"] = {
                "parameters": _low_bit_weights(folder / "model.onnx"),
                "seconds": sum(seconds.values()),
            }
    result.write_text(json.dumps(figures))


def _time_pass(kind: Any, name: str, seconds: dict[str, float]) -> None:
    apply = kind.apply

    def timed(self: Any, model: Any, context: Any) -> Any:
        start = time.perf_counter()
        report = apply(self, model, context)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return report

    kind.apply = timed


def _facts(folder: Path) -> dict[str, Any]:
    """Return what stayed in float and why, and the ladder of a search."""
    manifest = json.loads((folder / "manifest.json").read_text())
    bench = json.loads((folder / "bench.json").read_text())
    facts: dict[str, Any] = {"float_nodes": [[one["node"], one["reason"]] for one in manifest["skipped"]]}
    if "search" in bench:
        facts["search"] = bench["search"]
    return facts


def _low_bit_weights(model: Path) -> int:
    import onnx

    kinds = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    tensors = onnx.load(model).graph.initializer
    return int(sum(np.prod(tensor.dims) for tensor in tensors if tensor.data_type in kinds))


def accuracy(task: data.Task, model: Path, features_path: Path, reference_path: Path | None = None) -> None:
    """Write what the outputs are worth to FEATURES with the suffix .json, and the features themselves."""
    one = timing.session(model)
    features = np.concatenate([task.features(one.run(None, feeds), feeds) for feeds in task.evaluation()])
    figures: dict[str, Any] = {"score": task.score(features)}
    if reference_path is not None:
        with np.load(reference_path) as stored:
            reference = stored["features"]
        figures["sqnr_db"] = metrics.sqnr_db(reference, features)
        if isinstance(task, data.Classifier):
            figures["agreement"] = metrics.agreement(reference, features)
    np.savez(features_path, features=features)
    features_path.with_suffix(".json").write_text(json.dumps(figures))


def latency(task: data.Task, result: Path, count: int, models: list[str]) -> None:
    """Write the seconds per feed of each TOOL=MODEL, on `count` evaluation feeds spread over all of them."""
    feeds = list(task.evaluation())
    chosen = [feeds[index] for index in np.unique(np.linspace(0, len(feeds) - 1, count).astype(int))]
    sessions = {}
    for pair in models:
        tool, _, path = pair.partition("=")
        sessions[tool] = timing.session(Path(path))
        sessions[tool].run(None, chosen[-1])
    result.write_text(json.dumps(timing.in_turn(sessions, chosen)))


def main() -> None:
    if sys.argv[1] == "compile":
        compile_(*map(Path, sys.argv[2:5]), sys.argv[5], sys.argv[6:])
        return
    verb, task = sys.argv[1], data.TASKS[sys.argv[2]]
    if verb == "accuracy":
        accuracy(task, *map(Path, sys.argv[3:]))
    else:
        latency(task, Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])


if __name__ == "__main__":
    main()
