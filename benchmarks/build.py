"""What one `qgraph build` for six targets takes, against six compilations of the same.

    python benchmarks/build.py [--only resnet20,mobilenet_v2] [--without processes] [-o BUILD.json]

For every model, each in a process of its own: six calls of `qgraph.compile`, six commands `qgraph compile`, one call of
`qgraph.build`, and the same with a cache that another build has filled. Wall-clock and processor seconds, imports
included; the artifacts of all ways must have the same bytes. Results of other models stay in the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import data
import numpy as np
import timing

__all__ = ["TARGETS", "markdown", "ratio"]

HERE = Path(__file__).resolve().parent
TARGETS: Mapping[str, Sequence[str]] = {
    "resnet20": ("cpu-fp32", "cpu-int8", "cpu-int4", "cuda-int4", "cuda-sparse24", "integer"),
    "minilm_dynamo_sdpa": ("cpu-fp16", "cpu-int8", "cpu-int4", "cuda-fp16", "cuda-int8", "cuda-int4"),
}
"""Model -> six targets: one of each kind, and those that deploy an encoder on CPUs and GPUs."""
MUST = 0.5
_TIMED = ("bench.json", "report.html", "index.html", "index.json")
_WAYS = {
    "calls": "six calls of `qgraph.compile`",
    "processes": "six commands `qgraph compile`",
    "build": "one `qgraph.build`",
    "again": "the same, cache filled by another build",
}
_CALLS = """
import sys
import qgraph
from qgraph.pipeline import Context
model, calibration, folder, threads, *targets = sys.argv[1:]
for target in targets:
    context = Context(threads=int(threads))
    qgraph.compile(model, target, calibration=calibration, output=f"{folder}/{target}", context=context)
"""
_BUILD = """
import sys
import qgraph
from qgraph.pipeline import Context
model, calibration, folder, threads, cache, *targets = sys.argv[1:]
recipe = {"model": model, "calibration": calibration, "targets": targets}
built = qgraph.build(recipe, output=folder, cache=cache or None, context=Context(threads=int(threads)))
assert not [one for one in built.entries if one.status != "built"], built.entries
"""


def main() -> None:
    """Measure and write the results as JSON and as a table beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TARGETS))
    parser.add_argument("--without", default="", help="ways to leave out")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "BUILD.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    models = found.get("models", {})
    for name in arguments.only.split(","):
        with tempfile.TemporaryDirectory(prefix="qgraph-build-") as folder:
            models[name] = measure(name, Path(folder), set(arguments.without.split(",")))
    targets = {name: list(TARGETS[name]) for name in models}
    found = {"machine": timing.machine(), "targets": targets, "threads": timing.THREADS, "models": models}
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(found))


def measure(name: str, folder: Path, without: set[str]) -> dict[str, Any]:
    """Return seconds of each way, and the load of the machine before it."""
    task = data.TASKS[name]
    calibration = folder / "samples"
    calibration.mkdir()
    for number, feed in enumerate(task.calibration()):
        np.savez(calibration / f"{number:05d}.npz", **feed)
    model = shutil.copyfile(task.model(), folder / f"{name}.onnx")
    given = [str(model), str(calibration)]
    threads, cache = str(timing.THREADS), str(folder / "cache")

    def calls(output: Path) -> None:
        _run([sys.executable, "-c", _CALLS, *given, str(output), threads, *TARGETS[name]])

    def processes(output: Path) -> None:
        for target in TARGETS[name]:
            command = [given[0], "--calib", given[1], "-o", str(output / target), "--jobs", threads, "--quiet"]
            _run([sys.executable, "-m", "qgraph", "compile", *command, "--target", target])

    def build(output: Path) -> None:
        _run([sys.executable, "-c", _BUILD, *given, str(output), threads, "", *TARGETS[name]])

    def again(output: Path) -> None:
        _run([sys.executable, "-c", _BUILD, *given, str(output), threads, cache, *TARGETS[name]])

    ways: dict[str, Callable[[Path], None]] = {"calls": calls, "processes": processes, "build": build, "again": again}
    figures: dict[str, Any] = {}
    contents: dict[str, dict[str, str]] = {}
    for way, make in ways.items():
        if way in without:
            continue
        if way == "again":
            make(folder / "filled")
        figures[way] = _timed(lambda make=make, way=way: make(folder / way))  # type: ignore[misc]
        contents[way] = _hashes(folder / way)
        print(f"{name} {way}: {figures[way]}", flush=True)
    figures["same_bytes"] = all(one == contents["build"] for one in contents.values())
    return figures


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _timed(run: Callable[[], None]) -> dict[str, float]:
    load, before, start = os.getloadavg()[0], _processor_seconds(), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "processor_seconds": _processor_seconds() - before, "load_before": load}


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _TIMED
    }


def ratio(figures: Mapping[str, Any], way: str, against: str, unit: str) -> float | None:
    """Return what a way takes as a share of another; None where one was not measured."""
    if way not in figures or against not in figures:
        return None
    return float(figures[way][unit] / figures[against][unit])


def markdown(found: Mapping[str, Any]) -> str:
    """Return the results as a page."""
    machine = found["machine"]
    here = f"{machine['processor']}, {machine['cores']} cores, {found['threads']} threads"
    lines = [
        "# One build for six targets",
        "",
        f"`python benchmarks/build.py` on {here}.",
        *(f"{name}: {', '.join(targets)}." for name, targets in found["targets"].items()),
        "Seconds on the clock, and of the processor (user and system) in brackets, which other work on the machine",
        "disturbs less. Imports are included.",
        "",
        f"| model | {' | '.join(_WAYS.values())} | same bytes |",
        f"|---|{'---|' * (len(_WAYS) + 1)}",
    ]
    for name, figures in found["models"].items():
        cells = [
            f"{figures[way]['seconds']:.1f} ({figures[way]['processor_seconds']:.1f})" if way in figures else "–"
            for way in _WAYS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {'yes' if figures['same_bytes'] else '**no**'} |")
    pairs = [("build", "calls"), ("build", "processes"), ("again", "calls"), ("again", "processes")]
    lines += [
        "",
        f"As shares, of processor seconds; a build must take at most {MUST} of six compilations.",
        "",
        f"| model | {' | '.join(f'{way} / {against}' for way, against in pairs)} |",
        f"|---|{'---|' * len(pairs)}",
    ]
    for name, figures in found["models"].items():
        shares = [ratio(figures, way, against, "processor_seconds") for way, against in pairs]
        cells = ["–" if one is None else f"{one:.2f}{'' if one <= MUST else ' **not reached**'}" for one in shares]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
