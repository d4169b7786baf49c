"""Measure qgraph against its peers on real models, side by side, in one run.

    python benchmarks/run.py [--only minilm,resnet20] [--quick] [-o RESULTS.json]

writes the JSON and, beside it, RESULTS.md. Needs the real models and data (QGRAPH_ASSETS); onnxsim gets an
environment of its own in the cache folder (QGRAPH_CACHE), and counts as failing where it cannot be installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import data
import numpy as np
import report
import timing

__all__: list[str] = []

HERE = Path(__file__).resolve().parent
OURS = "qgraph"
STATIC = ("ort-static-minmax", "ort-static-entropy", "ort-static-percentile")
SENTENCE_TOOLS = (
    "ort-static-minmax",
    "ort-dynamic",
    "onnxsim-static",
    "onnxsim-dynamic",
    "onnxsim-simplify-static",
    "onnxsim-simplify-dynamic",
)
ONNXSIM = "onnxsim==0.8.1"
QUICK_MODELS = "minilm_dynamo_sdpa,resnet20,mobilenet_v2,mnist"


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        work: folder for models and samples; its content is only needed while running.
        quick: fewer tools and feeds.
        tools: names of the tools to run, or None for all that suit.
        onnxsim_python: the python that has onnxsim.
    """

    work: Path
    quick: bool
    tools: frozenset[str] | None
    onnxsim_python: str

    def chosen(self, task: data.Task) -> list[str]:
        if isinstance(task, data.Sentences):
            tools: tuple[str, ...] = SENTENCE_TOOLS
        elif isinstance(task, data.Signals):
            tools = ("ort-static-minmax", "ort-dynamic", "onnxsim-simplify-static")
        else:
            tools = (*(STATIC[:1] if self.quick else STATIC), "onnxsim-simplify-static")
        return [tool for tool in (*tools, OURS) if self.tools is None or tool in self.tools]


@dataclass(frozen=True)
class Made:
    """A model file that a tool has made, or why it has not, and what making it took."""

    path: Path | None
    seconds: float
    peak_mib: float
    failure: str | None = None
    remarks: tuple[str, ...] = ()


class Bench:
    """All measurements of one model."""

    def __init__(self, task: data.Task, settings: Settings) -> None:
        self.task = task
        self.settings = settings
        self.folder = settings.work / task.name
        self.calibration = self.folder / "calibration"
        self.calibration.mkdir(parents=True)
        for index, feeds in enumerate(task.calibration()):
            np.savez(self.calibration / f"{index:04d}.npz", **feeds)  # type: ignore[arg-type]  # names are the inputs'

    def run(self) -> dict[str, Any]:
        """Return the figures of every tool, by tool."""
        source = self.task.model()
        figures: dict[str, dict[str, Any]] = {"fp32": self._judged("fp32", source, None)}
        models = {"fp32": source}
        for tool in self.settings.chosen(self.task):
            _say(f"{self.task.name}: {tool}")
            figures[tool], path = self._tool(tool)
            if path is not None:
                models[tool] = path
        _say(f"{self.task.name}: latency of {len(models)} models in turn")
        for tool, median in self._latency(models).items():
            figures[tool]["median_ms"] = 1e3 * median
        for one in figures.values():
            if "median_ms" in one:
                one["speedup"] = figures["fp32"]["median_ms"] / one["median_ms"]
        return {"metric": self.task.metric, "kind": type(self.task).__name__, "tools": figures}

    def _tool(self, tool: str) -> tuple[dict[str, Any], Path | None]:
        """Make a model with `tool` and judge it; where a peer fails, do what a user would try next."""
        attempts = [self._ours] if tool == OURS else self._attempts(tool)
        failures: list[str] = []
        figures: dict[str, Any] = {}
        for attempt in attempts:
            made = attempt()
            figures = self._figures(tool, made)
            figures["remarks"] = failures + figures["remarks"]
            if not figures["failure"]:
                return figures, made.path
            failures.append(f"fails at first: {figures['failure']}")
        return figures, None

    def _attempts(self, tool: str) -> list[Callable[[], Made]]:
        source = self.task.model()
        attempts = [lambda: self._peer(tool, source, raised=False), lambda: self._peer(tool, source, raised=True)]
        if tool in STATIC:
            attempts.append(lambda: self._peer(f"{tool}-per-tensor", source, raised=True))
        return attempts

    def _figures(self, tool: str, made: Made) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "failure": made.failure,
            "remarks": list(made.remarks),
            "seconds": made.seconds,
            "peak_mib": made.peak_mib,
        }
        if made.path is not None:
            figures |= self._judged(tool, made.path, self.folder / "fp32.features.npz")
        return figures

    def _judged(self, tool: str, model: Path, reference: Path | None) -> dict[str, Any]:
        features = self.folder / f"{tool}.features.npz"
        command = [sys.executable, str(HERE / "worker.py"), "accuracy", self.task.name, str(model), str(features)]
        done = timing.run_process(command + ([str(reference)] if reference else []), self.folder / "log.txt")
        if done.status != 0:
            return {"failure": f"the model does not run: {_last_line(done)}"}
        judged: dict[str, Any] = json.loads(features.with_suffix(".json").read_text())
        return judged | {"failure": None, "size_mb": _size_mb(model)}

    def _ours(self) -> Made:
        folder = self.folder / "qgraph"
        command = [str(Path(sys.executable).with_name("qgraph")), "compile", str(self.task.model())]
        command += ["--target", "cpu-int8", "--calib", str(self.calibration), "-o", str(folder), "--force"]
        done = timing.run_process(command, self.folder / "log.txt")
        model = folder / "model.onnx"
        failure = None if done.status == 0 and model.is_file() else _last_line(done)
        return Made(None if failure else model, done.seconds, done.peak_mib, failure)

    def _peer(self, tool: str, source: Path, *, raised: bool) -> Made:
        """Run a peer on `source`, after what its documentation asks for; only the tool itself is timed."""
        remarks: list[str] = []
        steps = ["raise-opset"] * raised + ["ort-preprocess"] * tool.startswith("ort-static")
        for step in steps:
            prepared = self.folder / f"{'raised-' * raised}{step}.onnx"
            if not prepared.is_file():
                failure = self._peer_step(step, source, prepared)[1]
                if failure:
                    remarks.append(f"{step}: {failure}")
                    continue
            remarks += json.loads(prepared.with_suffix(".json").read_text())["remarks"]
            source = prepared
        output = self.folder / f"{tool}{'-raised' * raised}.onnx"
        done, failure = self._peer_step(tool, source, output)
        if raised:
            remarks.append("opset raised to 17")
        if tool.endswith("-per-tensor"):
            remarks.append("per tensor")
        return Made(None if failure else output, done.seconds, done.peak_mib, failure, tuple(remarks))

    def _peer_step(self, tool: str, source: Path, output: Path) -> tuple[timing.Process, str | None]:
        python = self.settings.onnxsim_python if tool.startswith("onnxsim") else sys.executable
        command = [python, str(HERE / "peers.py"), tool, str(source), str(self.calibration), str(output)]
        done = timing.run_process(command, self.folder / "log.txt")
        verdict = output.with_suffix(".json")
        if not verdict.is_file():
            return done, f"ended with status {done.status}: {_last_line(done)}"
        failure: str | None = json.loads(verdict.read_text())["failure"]
        return done, failure

    def _latency(self, models: dict[str, Path]) -> dict[str, float]:
        result = self.folder / "latency.json"
        count = "8" if self.settings.quick else "20"
        pairs = [f"{tool}={path}" for tool, path in models.items()]
        command = [sys.executable, str(HERE / "worker.py"), "latency", self.task.name, str(result), count, *pairs]
        done = timing.run_process(command, self.folder / "log.txt")
        if done.status != 0:
            raise RuntimeError(f"timing {self.task.name} failed: {_last_line(done)}")
        return {tool: float(np.median(seconds)) for tool, seconds in json.loads(result.read_text()).items()}


def _imports_mib(modules: str, work: Path) -> float:
    """Return the peak memory of a process that only imports `modules`."""
    return timing.run_process([sys.executable, "-c", f"import {modules}"], work / "log.txt").peak_mib


def _size_mb(model: Path) -> float:
    weights = model.with_name(model.name + ".data")
    return (model.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)) / 1e6


def _last_line(done: timing.Process) -> str:
    lines = done.errors.splitlines()
    return lines[-1][:300] if lines else f"status {done.status}"


def _onnxsim_python() -> str:
    """Return the python of an environment that has onnxsim and our version of ONNX Runtime, made on first use."""
    folder = data.cache_folder() / ONNXSIM.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        _say(f"making an environment for {ONNXSIM} in {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        wanted = [ONNXSIM, *(f"{package}=={version(package)}" for package in ("onnx", "onnxruntime", "numpy"))]
        if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=False).returncode == 0:
            (folder / "complete").touch()
    return str(python)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _start(output: Path, *, keep_others: bool, quick: bool, work: Path) -> dict[str, Any]:
    """Return results without models; with those of `output` if these are to be kept and were measured likewise."""
    results: dict[str, Any] = {
        "machine": timing.machine(),
        "quick": quick,
        "imports_mib": {
            "ort-static": _imports_mib("onnxruntime.quantization", work),
            OURS: _imports_mib("qgraph.compiler, onnxruntime", work),
        },
        "models": {},
    }
    if keep_others and output.is_file():
        before: dict[str, Any] = json.loads(output.read_text())
        if (before["machine"], before["quick"]) == (results["machine"], quick):
            results["models"] = before["models"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure qgraph against its peers on real models.")
    parser.add_argument(
        "--only", help="models, by the beginnings of their names, separated by commas; others stay as they are on file"
    )
    parser.add_argument("--tools", help="tools, separated by commas (default: all that suit the model)")
    parser.add_argument("--quick", action="store_true", help="four models, fewer feeds, min-max calibration only")
    parser.add_argument("--keep", type=Path, help="an empty folder for the models made (default: a temporary one)")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "RESULTS.json")
    options = parser.parse_args()
    if not data.assets().is_dir():
        parser.error(f"{data.assets()} does not exist; name the folder of real models with QGRAPH_ASSETS")
    try:
        tasks = data.select(options.only or (QUICK_MODELS if options.quick else ",".join(data.TASKS)))
    except ValueError as error:
        parser.error(str(error))
    work = (options.keep or Path(tempfile.mkdtemp(prefix="qgraph-bench-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        work,
        options.quick,
        frozenset(options.tools.split(",")) if options.tools else None,
        _onnxsim_python(),
    )
    results = _start(options.output, keep_others=options.only is not None, quick=options.quick, work=work)
    try:
        for task in tasks:
            results["models"][task.name] = Bench(task, settings).run()
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        if options.keep is None:
            shutil.rmtree(work)
    text = report.render(results)
    options.output.with_name("RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
