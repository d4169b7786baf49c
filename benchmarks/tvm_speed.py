"""How fast the code of tvm-cpu is, untuned and tuned, beside ONNX Runtime: two threads each, all in turn.

    python benchmarks/tvm_speed.py [--models resnet20,squeezenet] [--trials N] [-o TVM.json]

writes the JSON and the table beside it as a page. A log of tuning is kept in the cache folder (QGRAPH_CACHE) and taken
from there when it is there: delete it to measure anew. Needs the real models (QGRAPH_ASSETS).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import data
import numpy as np
import timing

import qgraph
from qgraph.targets.tvm import TvmCpu

__all__ = ["MODELS", "main", "measure", "render"]

Figures = dict[str, Any]
UNTUNED, TUNED, ORT = "tvm-cpu", "tvm-cpu, tuned", "ONNX Runtime"
_FEEDS = 8
_BOUNDS = {UNTUNED: 8.0, TUNED: 2.0}
"""How many times as long as ONNX Runtime each may take."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of one shape.

    Attributes:
        file: relative to the assets folder.
        input: its name.
        shape: its sizes.
    """

    file: str
    input: str
    shape: tuple[int, ...]


MODELS = {
    "resnet20": Model("cifar10/resnet20_cifar10.onnx", "input", (1, 3, 32, 32)),
    "squeezenet": Model("squeezenet1.0/squeezenet1.0_fp32.onnx", "data_0", (1, 3, 224, 224)),
}


def measure(name: str, *, trials: int) -> list[Figures]:
    """Return milliseconds, the ratio to ONNX Runtime and whether the bound is kept, for all that runs the model."""
    model = MODELS[name]
    random = np.random.default_rng(0)
    feeds = [{model.input: random.normal(size=model.shape).astype(np.float32)} for _ in range(_FEEDS)]
    with tempfile.TemporaryDirectory(prefix="qgraph-tvm-") as scratch:
        sessions = {UNTUNED: _compiled(model, TvmCpu(), Path(scratch) / "untuned")}
        sessions[TUNED] = _compiled(model, _tuning(name, trials), Path(scratch) / "tuned", keep=_log(name))
        sessions[ORT] = timing.session(data.assets() / model.file)
        _refuse_wrong(sessions, feeds[0])
        seconds = timing.in_turn(sessions, feeds)
    medians = {runs: float(np.median(one)) for runs, one in seconds.items()}
    ratios = {runs: one / medians[ORT] for runs, one in medians.items()}
    return [
        {"name": name, "runs": runs, "ms": 1e3 * medians[runs], "times ONNX Runtime": ratios[runs],
         "bound": _BOUNDS.get(runs), "reached": runs not in _BOUNDS or ratios[runs] <= _BOUNDS[runs]}
        for runs in medians
    ]  # fmt: skip


def _log(name: str) -> Path:
    return data.cache_folder() / "tvm" / name


def _tuning(name: str, trials: int) -> TvmCpu:
    return TvmCpu(log=str(_log(name))) if _log(name).is_dir() else TvmCpu(trials=trials)


def _compiled(model: Model, target: TvmCpu, folder: Path, keep: Path | None = None) -> Any:
    artifact = qgraph.compile(data.assets() / model.file, target, output=folder, shapes={model.input: model.shape})
    if keep is not None and not keep.is_dir():
        keep.mkdir(parents=True)
        for path in (artifact.path / "tuning").iterdir():
            (keep / path.name).write_bytes(path.read_bytes())
    return artifact.session(threads=timing.THREADS)


def _refuse_wrong(sessions: Mapping[str, Any], feed: Mapping[str, np.ndarray]) -> None:
    """Refuse to time what computes something else.

    Raises:
        RuntimeError: the results are not near.
    """
    results = {runs: one.run(None, feed)[0] for runs, one in sessions.items()}
    for runs, found in results.items():
        if not np.allclose(found, results[ORT], rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"{runs} computes something else than {ORT}")


def render(figures: Mapping[str, Any]) -> str:
    """Return the figures as a page."""
    machine = figures["machine"]
    lines = [
        "# TVM beside ONNX Runtime",
        "",
        f"One sample, {timing.THREADS} threads each, in turn, on {machine['processor']} ({machine['cores']} cores);",
        f"tuning by {figures['trials']} measured schedules. Made by benchmarks/tvm_speed.py.",
        "",
        "| model | runs | ms | times ONNX Runtime | bound | |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        bound = "" if row["bound"] is None else f"{row['bound']:g}"
        state = "" if row["bound"] is None else ("reached" if row["reached"] else "**missed**")
        ratio = row["times ONNX Runtime"]
        lines.append(f"| {row['name']} | {row['runs']} | {row['ms']:.2f} | {ratio:.2f} | {bound} | {state} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--trials", type=int, default=128)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "TVM.json")
    chosen = parser.parse_args(arguments)
    rows = [row for name in chosen.models.split(",") for row in measure(name, trials=chosen.trials)]
    figures = {"machine": timing.machine(), "trials": chosen.trials, "rows": rows}
    chosen.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    chosen.output.with_suffix(".md").write_text(render(figures), encoding="utf-8")
    print(render(figures))
    return 0 if all(row["reached"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
