"""Measure what cpu-fp32 and cpu-fp16 make of a sentence encoder, against ONNX Runtime's own optimisers.

    python benchmarks/fusions.py [--only dynamo_eager,...] [--feeds 25] [--work DIR] [--transformers-python PYTHON]
                                 [-o FUSIONS.json]

For each of the four forms in which exporters write MiniLM: the original, which ONNX Runtime optimises fully when it
opens it; the original through its offline optimiser for transformers (`onnxruntime.transformers`); ours. All sessions
of a form run in turn in one process, 2 threads, spinning off; a ratio is the median over feeds of the ratios of the
least of three runs. Equal means: within 1e-4 of the original. To be run when nothing else uses the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import data
import numpy as np
import timing

import qgraph.compiler

__all__: list[str] = []

HERE = Path(__file__).resolve().parent
FORMS = ("dynamo_eager", "dynamo_sdpa", "legacy_eager", "legacy_sdpa")
SHAPES = ((32, 16), (8, 32))
ORIGINAL, TRANSFORMERS = "ONNX Runtime", "its transformers optimiser"
OURS = ("cpu-fp32", "cpu-fp16")
WANTED, EQUAL = 1.10, 1e-4
VOCABULARY = 20000
BERT = ("--model_type", "bert", "--num_heads", "12", "--hidden_size", "384")

Feed = dict[str, np.ndarray]


def feeds_of(shape: tuple[int, int], count: int) -> list[Feed]:
    """Return random tokens; the last of every other sentence are masked."""
    random = np.random.default_rng(0)
    mask = np.ones(shape, np.int64)
    mask[1::2, -3:] = 0
    return [{"input_ids": random.integers(5, VOCABULARY, shape), "attention_mask": mask} for _ in range(count)]


def models_of(form: str, work: Path, python: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the model files of a form, and why a tool has none."""
    source = data.TASKS[f"minilm_{form}"].model()
    models, failures = {ORIGINAL: source}, {}
    peer = work / f"{form}.transformers.onnx"
    if peer.is_file() and all((work / f"{form}.{target}" / "model.onnx").is_file() for target in OURS):
        return models | {TRANSFORMERS: peer} | {one: work / f"{form}.{one}" / "model.onnx" for one in OURS}, failures
    command = [python, "-m", "onnxruntime.transformers.optimizer", "--input", str(source), "--output", str(peer)]
    done = timing.run_process([*command, *BERT], work / "log.txt")
    if done.status == 0:
        models[TRANSFORMERS] = peer
    else:
        failures[TRANSFORMERS] = done.errors.splitlines()[-1][:160] if done.errors else f"status {done.status}"
    for target in OURS:
        folder = work / f"{form}.{target}"
        qgraph.compiler.compile(source, target=target, output=folder, force=True)
        models[target] = folder / "model.onnx"
    return models, failures


def measured(models: Mapping[str, Path], shape: tuple[int, int], count: int) -> dict[str, Any]:
    """Return for each tool what it takes and how far its output is from the original's."""
    feeds = feeds_of(shape, count)
    sessions = {name: timing.session(path) for name, path in models.items()}
    outputs = {name: session.run(None, feeds[0])[0] for name, session in sessions.items()}
    seconds = timing.in_turn(sessions, feeds)
    return {
        name: {
            "median_ms": 1e3 * float(np.median(seconds[name])),
            "ratio": float(np.median(np.divide(seconds[ORIGINAL], seconds[name]))),
            "difference": float(np.abs(outputs[name] - outputs[ORIGINAL]).max()),
        }
        for name in models
    }


def render(results: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    machine = results["machine"]
    about = (
        f"Made by `python benchmarks/fusions.py`. {machine['processor']}, {machine['cores']} cores, onnxruntime "
        f"{machine['onnxruntime']}. MiniLM in float32 as four exporters write it, random tokens; {ORIGINAL} is the "
        "original with full optimisation. How many times as fast: median over feeds, 2 threads, all in turn."
    )
    lines = [
        "# Fusions on the CPU",
        "",
        about,
        "",
        f"| form | batch | {' | '.join((TRANSFORMERS, *OURS))} | difference | >= {WANTED:.2f} |",
        f"|---|---|{'---|' * (len(OURS) + 3)}",
    ]
    for form, shapes in results["forms"].items():
        for shape, tools in shapes.items():
            cells = [_cell(tools.get(name)) for name in (TRANSFORMERS, *OURS)]
            fp32 = tools["cpu-fp32"]
            reached = fp32["ratio"] >= WANTED and fp32["difference"] <= EQUAL
            verdict = "reached" if reached else "**not reached**"
            lines.append(f"| {form} | {shape} | {' | '.join(cells)} | {fp32['difference']:.1e} | {verdict} |")
    return "\n".join([*lines, "", "The verdict is on cpu-fp32.", ""])


def _cell(figures: Mapping[str, float] | None) -> str:
    return "fails" if figures is None else f"{figures['ratio']:.2f}x"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--only", default=",".join(FORMS), help="forms, separated by commas; others stay as they are on file"
    )
    parser.add_argument("--feeds", type=int, default=25)
    parser.add_argument(
        "--work", type=Path, help="folder for the models made, or made before (default: a temporary one)"
    )
    parser.add_argument(
        "--transformers-python", default=sys.executable, help="one with torch, which its optimiser needs"
    )
    parser.add_argument("-o", "--output", type=Path, default=HERE / "FUSIONS.json")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"machine": timing.machine(), "forms": {}, "failures": {}}
    if options.only != ",".join(FORMS) and options.output.is_file():
        results |= json.loads(options.output.read_text())
    with tempfile.TemporaryDirectory(prefix="qgraph-fusions-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for form in options.only.split(","):
            models, results["failures"][form] = models_of(form, work, options.transformers_python)
            results["forms"][form] = {
                f"{batch} x {rows}": measured(models, (batch, rows), options.feeds) for batch, rows in SHAPES
            }
            print(json.dumps(results["forms"][form], indent=1), file=sys.stderr, flush=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(render(results))
    print(render(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
