"""Score one model, or time several by turns, in a process that may crash without taking the benchmark along.

python benchmarks/worker.py accuracy TASK MODEL FEATURES [REFERENCE_FEATURES]
python benchmarks/worker.py latency TASK RESULT FEEDS TOOL=MODEL...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import data
import metrics
import numpy as np
import timing

__all__: list[str] = []


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
    verb, task = sys.argv[1], data.TASKS[sys.argv[2]]
    if verb == "accuracy":
        accuracy(task, *map(Path, sys.argv[3:]))
    else:
        latency(task, Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])


if __name__ == "__main__":
    main()
