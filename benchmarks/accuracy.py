"""Measure what quantization costs in accuracy: ours against the peers' best, on real models, in one run.

    python benchmarks/accuracy.py [--part int8,w4a8] [--only resnet20] [--tools qgraph] [--fresh] [-o accuracy.json]

writes the JSON and, beside it, ACCURACY.md. Needs the real models and data (QGRAPH_ASSETS). Each peer runs in an
environment of its own in the cache folder (QGRAPH_CACHE), made on first use; where that fails, the reason is in the
table. What a peer makes of a model, and the score of it, is always the same, so both are kept in the cache folder,
by the versions of the tool and the contents of model and calibration data; `--fresh` makes them anew. Ours is always
made anew, and latencies are always taken anew, all of a model in turn. Tools calibrate on the calibration splits.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accuracy_peers
import data
import numpy as np
import onnx
import report_accuracy
import timing

__all__ = ["PARTS", "Part"]

HERE = Path(__file__).resolve().parent
VISION = ("resnet20", "resnet32", "mobilenet_v2", "squeezenet", "mnist", "fastestdet", "face_rfb320")
SIGNALS = ("silero_vad", "basic_pitch")
CALIBRATIONS = ("minmax", "entropy", "percentile")
ORT = tuple(f"ort-static-{one}" for one in CALIBRATIONS)
GPTQ = "gptq{bits=4,group=0,symmetric=true,min_elements=0,drift=0.5,ops=[Conv,Gemm,MatMul]}"
LIMIT = 900
"""Seconds that a tool may take for a model; what takes longer counts as failing."""
CRASH = "ended with status"


@dataclass(frozen=True)
class Part:
    """One row of what must be reached.

    Attributes:
        models: names of tasks.
        ours: name -> further arguments of `qgraph compile MODEL --target cpu-int8 --calib DATA`.
        peers: names of tools.
        timed: whether latencies are compared.
        labels: whether our calibration data come with their labels.
    """

    models: tuple[str, ...]
    ours: Mapping[str, tuple[str, ...]]
    peers: tuple[str, ...]
    timed: bool = True
    labels: bool = False


PARTS = {
    "int8": Part(
        VISION,
        {"qgraph": ()},
        (*ORT, "nncf", "nncf-full", "aimet", "aimet-cle", "aimet-cle-enhanced", "onnxsim-full-qdq"),
    ),
    "per-tensor": Part(
        VISION,
        {"qgraph": ("--passes", "equalize,qdq{per_channel=false},bias-correction{method=full}")},
        (
            *(f"{one}-per-tensor" for one in ORT),
            "nncf-per-tensor",
            "nncf-full-per-tensor",
            "aimet-per-tensor",
            "aimet-cle-per-tensor",
            "aimet-cle-enhanced-per-tensor",
            "onnxsim-full-qdq-per-tensor",
            "onnxsim-cle-per-tensor",
            "onnxsim-cle-bias-per-tensor",
        ),
    ),
    "w4a8": Part(
        ("resnet20", "resnet32", "mobilenet_v2"),
        {
            "qgraph-rtn": ("--passes", "qdq{weights=int4}"),
            "qgraph-gptq": ("--passes", f"{GPTQ},qdq"),
            "qgraph": ("--passes", "adaround{bits=4},qdq"),
        },
        ("aimet-int4", "aimet-int4-adaround", "onnxsim-int4-gptq", "onnxsim-int4-adaround"),
        timed=False,
    ),
    "minilm-static": Part(
        ("minilm_dynamo_sdpa",), {"qgraph": ("--passes", "smooth-quant,qdq")}, ("ort-static-minmax",), timed=False
    ),
    "signals": Part(SIGNALS, {"qgraph": ()}, ("ort-static-minmax", "ort-dynamic", "nncf", "aimet"), timed=False),
    "search": Part(
        ("mobilenet_v2",),
        {
            "qgraph-plain": ("--set", "qdq.weights=int4"),
            "qgraph": ("--set", "qdq.weights=int4", "--tolerance", "top1=0.5%"),
        },
        (),
        labels=True,
    ),
}
"""By name; in each, the one called "qgraph" is what counts."""


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        work: folder for what is only needed while running.
        tools: names of the tools to run, or None for all that suit.
        fresh: whether peers' models are made anew.
    """

    work: Path
    tools: frozenset[str] | None
    fresh: bool

    def chosen(self, tools: tuple[str, ...]) -> list[str]:
        return [tool for tool in tools if self.tools is None or tool in self.tools]


@dataclass(frozen=True)
class Made:
    """A model that a tool has made, or why it has not; `figures` has what is known of making it."""

    path: Path | None
    figures: dict[str, Any]


class Bench:
    """All measurements of one model in one part."""

    def __init__(self, part: Part, task: data.Task, settings: Settings) -> None:
        self.part, self.task, self.settings = part, task, settings
        self.folder = Path(tempfile.mkdtemp(prefix=f"{task.name}-", dir=settings.work))
        self.calibration = self.folder / "calibration"
        _write(self.calibration, list(task.calibration()), {})
        self.content = _digest([task.model(), *sorted(self.calibration.iterdir())])

    def run(self) -> dict[str, Any]:
        """Return the figures of every tool, by tool."""
        source = self.task.model()
        kept = self._kept("fp32", accuracy_peers.REVISION)
        self.reference = kept / "model.features.npz"
        figures: dict[str, dict[str, Any]] = {"fp32": self._cached_score(source, kept / "model", None)}
        models = {"fp32": source}
        peers = self.settings.chosen(self.part.peers)
        for tool in [*peers, *self.settings.chosen(tuple(self.part.ours))]:
            _say(f"{self.task.name}: {tool}")
            figures[tool], path = self._peer(tool) if tool in peers else self._ours(tool)
            if path is not None and not figures[tool].get("failure"):
                models[tool] = path
        if self.part.timed and len(models) > 1:
            _say(f"{self.task.name}: latency of {len(models)} models in turn")
            for tool, median in self._latency(models).items():
                figures[tool]["median_ms"] = 1e3 * median
            for one in figures.values():
                if "median_ms" in one:
                    one["speedup"] = figures["fp32"]["median_ms"] / one["median_ms"]
        return {
            "metric": self.task.metric,
            "kind": type(self.task).__name__,
            "samples": self._samples(),
            "tools": figures,
        }

    def _samples(self) -> int:
        with np.load(self.reference) as stored:
            return len(stored["features"])

    # --- ours ---------------------------------------------------------------------------------------------------------

    def _ours(self, name: str) -> tuple[dict[str, Any], Path | None]:
        folder, result = self.folder / name, self.folder / f"{name}.json"
        calibration = self._labelled() if self.part.labels else self.calibration
        command = [sys.executable, str(HERE / "worker.py"), "compile", str(calibration), str(folder), str(result)]
        command += [str(self.task.model()), *self.part.ours[name]]
        done = timing.run_process(command, self.folder / "log.txt", limit=LIMIT)
        figures: dict[str, Any] = {"failure": None, "remarks": [], "pipeline": " ".join(self.part.ours[name])}
        figures |= {"seconds": done.seconds, "peak_mib": done.peak_mib}
        if not result.is_file():
            return figures | {"failure": _last_line(done)}, None
        figures |= json.loads(result.read_text())
        model = folder / "model.onnx"
        if not model.is_file():
            return figures | {"failure": figures["failure"] or "no model.onnx"}, None
        return figures | self._score(model, self.folder / f"{name}.features.npz", self.reference), model

    def _labelled(self) -> Path:
        """Return the calibration data with the labels, one sample in a feed."""
        assert isinstance(self.task, data.Classifier)
        folder = self.folder / "labelled"
        if not folder.is_dir():
            _write(folder, list(self.task.calibration()), {"labels": self.task.calibration_labels()})
        return folder

    # --- peers --------------------------------------------------------------------------------------------------------

    def _kept(self, tool: str, *inputs: object) -> Path:
        """Return the folder in the cache for what `tool` makes of this model, by all that it depends on."""
        versions = [f"{package}=={version(package)}" for package in ("onnxruntime", "onnx", "numpy")]
        known = [tool, self.content, timing.machine()["int8_dot_product"], *versions, *inputs]
        key = hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()[:16]
        folder = data.cache_folder() / "accuracy" / f"{self.task.name}-{tool}-{key}"
        if self.settings.fresh and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _peer(self, tool: str) -> tuple[dict[str, Any], Path | None]:
        if (tool, self.task.name) in accuracy_peers.TOO_SLOW:
            return {"failure": accuracy_peers.TOO_SLOW[tool, self.task.name], "remarks": []}, None
        package = accuracy_peers.package_of(tool)
        kept = self._kept(tool, accuracy_peers.PACKAGES.get(package or ""), accuracy_peers.REVISION)
        finished = kept / "made.json"
        if not finished.is_file():
            made = self._make(tool, kept)
            if str(made.figures["failure"]).startswith(CRASH):  # perhaps for want of time or memory: try again
                return made.figures, None
            finished.write_text(json.dumps({"name": made.path.name if made.path else None, "figures": made.figures}))
        document = json.loads(finished.read_text())
        if document["name"] is None:
            return document["figures"], None
        path = kept / document["name"]
        return document["figures"] | self._cached_score(path, path.with_suffix(""), self.reference), path

    def _make(self, tool: str, kept: Path) -> Made:
        """Make a model with `tool` and see that it runs; where it fails, do what a user would try next."""
        failures: list[str] = []
        made = Made(None, {"failure": "not tried", "remarks": []})
        for index, (words, attempt, source) in enumerate(self._attempts(tool)):
            output = kept / f"{index}.onnx"
            made = self._attempt(attempt, source, output)
            if made.path is not None:
                scored = self._score(made.path, output.with_suffix(".features.npz"), self.reference)
                if scored["failure"] is None:
                    return dataclasses.replace(
                        made, figures=made.figures | {"remarks": [*failures, *words, *made.figures["remarks"]]}
                    )
                made = Made(None, made.figures | scored)
            if str(made.figures["failure"]).startswith(CRASH):
                break  # out of time or memory, and it would be again
            failures.append(f"fails at first: {made.figures['failure']}")
        return Made(None, made.figures | {"remarks": [one for one in failures if made.figures["failure"] not in one]})

    def _attempts(self, tool: str) -> list[tuple[list[str], str, Path]]:
        """Return (remarks, tool, source): on the model as prepared for ONNX Runtime's tool, as it is, per tensor."""
        raised, ready = self._prepared("raise-opset"), self._prepared("ort-preprocess")
        attempts = [([], tool, ready)] if ready else []
        attempts.append(([] if attempts == [] else ["on the model as it was"], tool, raised or self.task.model()))
        if tool in ORT:
            attempts.append((["per tensor"], f"{tool}-per-tensor", ready or self.task.model()))
        return attempts

    def _prepared(self, step: str) -> Path | None:
        """Return the model after `step`, kept in the cache; None where that fails or, for the opset, is not needed."""
        source = self.task.model()
        if step == "raise-opset":
            opset = {one.domain: one.version for one in onnx.load(source, load_external_data=False).opset_import}
            if opset.get("", 1) >= 13:
                return None
        else:
            source = self._prepared("raise-opset") or source
        output = self._kept(step) / "model.onnx"
        if not output.with_suffix(".json").is_file():
            self._process(sys.executable, step, source, output)
        return output if output.is_file() else None

    def _attempt(self, tool: str, source: Path, output: Path) -> Made:
        try:
            python = _python(accuracy_peers.package_of(tool))
        except RuntimeError as error:
            return Made(None, {"failure": str(error), "remarks": []})
        done = self._process(python, tool, source, output)
        verdict = output.with_suffix(".json")
        figures: dict[str, Any] = {"remarks": [], "failure": f"{CRASH} {done.status}: {_last_line(done)}"}
        if verdict.is_file():
            figures |= json.loads(verdict.read_text())
        figures["peak_mib"] = done.peak_mib
        return Made(None if figures["failure"] else output, figures)

    def _process(self, python: str, tool: str, source: Path, output: Path) -> timing.Process:
        command = [python, str(HERE / "accuracy_peers.py"), tool, str(source), str(self.calibration), str(output)]
        return timing.run_process(command, self.folder / "log.txt", limit=LIMIT)

    # --- what a model is worth ----------------------------------------------------------------------------------------

    def _score(self, model: Path, features: Path, reference: Path | None) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "worker.py"), "accuracy", self.task.name, str(model), str(features)]
        done = timing.run_process(command + ([str(reference)] if reference else []), self.folder / "log.txt")
        if done.status != 0:
            return {"failure": f"the model does not run: {_last_line(done)}"}
        judged: dict[str, Any] = json.loads(features.with_suffix(".json").read_text())
        return judged | {"failure": None, "size_mb": _size_mb(model)}

    def _cached_score(self, model: Path, base: Path, reference: Path | None) -> dict[str, Any]:
        scored, features = base.with_suffix(".score.json"), base.with_suffix(".features.npz")
        if not scored.is_file():
            scored.write_text(json.dumps(self._score(model, features, reference)))
        found: dict[str, Any] = json.loads(scored.read_text())
        return found

    def _latency(self, models: dict[str, Path]) -> dict[str, float]:
        result = self.folder / "latency.json"
        pairs = [f"{tool}={path}" for tool, path in models.items()]
        command = [sys.executable, str(HERE / "worker.py"), "latency", self.task.name, str(result), "20", *pairs]
        done = timing.run_process(command, self.folder / "log.txt")
        if done.status != 0:
            raise RuntimeError(f"timing {self.task.name} failed: {_last_line(done)}")
        return {tool: float(np.median(seconds)) for tool, seconds in json.loads(result.read_text()).items()}


def _write(folder: Path, feeds: list[data.Feeds], extra: Mapping[str, np.ndarray]) -> None:
    """Write one file for each feed; `extra` arrays are cut along their first axis as the feeds are."""
    folder.mkdir()
    start = 0
    for index, feed in enumerate(feeds):
        rows = len(next(iter(feed.values()))) if extra else 0
        labels = {name: array[start : start + rows] for name, array in extra.items()}
        np.savez(folder / f"{index:04d}.npz", **feed, **labels)  # type: ignore[arg-type]  # names are the inputs'
        start += rows


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix == ".npz":  # its bytes hold the time of writing
            with np.load(path) as arrays:
                for name in arrays:
                    digest.update(name.encode() + arrays[name].tobytes())
        else:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _python(package: str | None) -> str:
    """Return the python of an environment that has `package` and our ONNX Runtime, made on first use.

    Raises:
        RuntimeError: it could not be installed; the text says why.
    """
    if package is None:
        return sys.executable
    wanted = accuracy_peers.PACKAGES[package]
    folder = data.cache_folder() / wanted[0].replace("==", "-")
    python, why = folder / "bin" / "python", folder / "failure"
    if why.is_file():
        raise RuntimeError(why.read_text())
    if not (folder / "complete").is_file():
        _say(f"making an environment for {wanted[0]} in {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        same = [f"{one}=={version(one)}" for one in ("onnx", "onnxruntime", "numpy")]
        install = [str(python), "-m", "pip", "install", "--quiet", *wanted, *same]
        done = subprocess.run(install, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip failed"]
            why.write_text(f"{wanted[0]} does not install: {lines[-1][:200]}")
            raise RuntimeError(why.read_text())
        (folder / "complete").touch()
    return str(python)


def _size_mb(model: Path) -> float:
    weights = model.with_name(model.name + ".data")
    return (model.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)) / 1e6


def _last_line(done: timing.Process) -> str:
    lines = done.errors.splitlines()
    return lines[-1][:300] if lines else f"status {done.status}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _selected(part: Part, only: str | None) -> list[data.Task]:
    wanted = tuple(only.split(",")) if only else ("",)
    return [data.TASKS[name] for name in part.models if name.startswith(wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what quantization costs in accuracy, beside the peers.")
    parser.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--only", help="models, by the beginnings of their names; others stay as they are on file")
    parser.add_argument("--tools", help="tools, separated by commas (default: all); others stay as they are on file")
    parser.add_argument("--fresh", action="store_true", help="make the peers' models anew")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "accuracy.json")
    options = parser.parse_args()
    if not data.assets().is_dir():
        parser.error(f"{data.assets()} does not exist; name the folder of real models with QGRAPH_ASSETS")
    chosen = options.part.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"there is no part '{unknown[0]}'; there are: {', '.join(PARTS)}")
    results: dict[str, Any] = {"machine": timing.machine(), "packages": accuracy_peers.PACKAGES, "parts": {}}
    if options.output.is_file():
        results["parts"] = json.loads(options.output.read_text())["parts"]
    tools = frozenset(options.tools.split(",")) if options.tools else None
    with tempfile.TemporaryDirectory(prefix="qgraph-accuracy-") as work:
        settings = Settings(Path(work), tools, options.fresh)
        for name in chosen:
            for task in _selected(PARTS[name], options.only):
                _say(f"--- {name}, {task.name}")
                found = Bench(PARTS[name], task, settings).run()
                models = results["parts"].setdefault(name, {})
                if tools is not None and task.name in models:
                    found["tools"] = models[task.name]["tools"] | found["tools"]
                models[task.name] = found
                options.output.write_text(json.dumps(results, indent=1) + "\n")
    text = report_accuracy.render(results)
    options.output.with_name("ACCURACY.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
