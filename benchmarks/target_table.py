"""Every real and shipped model through every target: an artifact, or a refusal with its reason; never a crash.

    python benchmarks/target_table.py [--models resnet,digits] [--targets cpu,apple] [--jobs 2] [-o TARGETS.json]

writes the JSON, with the pairs that did not run as they were there, and the table beside it as a page. Needs the real
models and data (QGRAPH_ASSETS); targets whose packages are not installed refuse, saying so. A target that wants fixed
shapes is given those of one sample and asked again. Calibration is on few samples: this is about what runs, and
benchmarks/run.py about how well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import integer_subjects
import timing

import qgraph
from qgraph import registry
from qgraph.errors import ToleranceError, UserError

__all__ = ["main", "outcome", "render"]

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
LIMIT = 900
"""Seconds for a pair."""
SAMPLES = 5
"""Of calibration; one of them is held back for the verification."""


def outcome(model: Path, target: str, folder: Path, feeds: Sequence[Any], shapes: Mapping[str, Sequence[int]]) -> Row:
    """Compile `model` for `target` into `folder`, with fixed `shapes` where it asks for these, and tell what came out.

    Any other exception than a refusal passes: it is what this benchmark looks for.
    """
    try:
        return _built(qgraph.compile(model, target, calibration=feeds, output=folder))
    except ToleranceError as error:
        return {**_built(error.result), "outcome": "unverified", "reason": str(error)}
    except UserError as error:
        if "--shape" not in str(error) or not shapes:
            return {"outcome": "refused", "reason": str(error)}
    try:
        return {**_built(qgraph.compile(model, target, calibration=feeds, output=folder, shapes=shapes)), "fixed": True}
    except ToleranceError as error:
        return {**_built(error.result), "outcome": "unverified", "reason": str(error), "fixed": True}
    except UserError as error:
        return {"outcome": "refused", "reason": str(error), "fixed": True}


def _built(artifact: qgraph.Artifact) -> Row:
    manifest = artifact.manifest
    figures = [one["sqnr_db"] for one in manifest["verification"]["outputs"]]
    finite = [one for one in figures if isinstance(one, int | float)]
    return {
        "outcome": "built",
        "sqnr dB": min(finite, default=None),
        "bytes": sum(entry["bytes"] for name, entry in manifest["files"].items() if name != "recipe.toml"),
        "source bytes": manifest["source"]["bytes"],
        "ran on": manifest["stand_in"],
    }


def _one(name: str, target: str, folder: Path, result: Path) -> None:
    subject = integer_subjects.SUBJECTS[name]
    feeds = subject.calibration()[:SAMPLES]
    result.write_text(json.dumps(outcome(subject.task.model(), target, folder, feeds, subject.shapes)))


def _pair(name: str, target: str) -> Row:
    """Compile in a process of its own: runtimes may abort, or never end."""
    with tempfile.TemporaryDirectory(prefix="qgraph-targets-") as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--one", name, target, f"{scratch}/out", str(result)]
        done = timing.run_process(command, Path(scratch) / "log.txt", threads=1, limit=LIMIT)
        row = json.loads(result.read_text()) if result.is_file() else {}
    if not row:
        why = f"not finished after {LIMIT} s" if done.seconds >= LIMIT else (done.errors.splitlines() or ["?"])[-1]
        row = {"outcome": "late" if done.seconds >= LIMIT else "crash", "reason": why[:300]}
    row = {"model": name, "target": target, **row, "seconds": round(done.seconds, 1), "peak MiB": round(done.peak_mib)}
    print(f"  {name:<20} {target:<16} {row['outcome']:<10} {row.get('reason', '')[:120]}", flush=True)
    return row


def render(results: Row) -> str:
    """Return the page, in Markdown: what came out of every pair, then the reasons of what did not."""
    rows = results["rows"]
    targets, models = ([*dict.fromkeys(row[key] for row in rows)] for key in ("target", "model"))
    by = {(row["model"], row["target"]): row for row in rows}
    counts = Counter(row["outcome"] for row in rows)
    counted = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    legend = (
        f"Made by `python benchmarks/target_table.py`: {counted}. "
        "A figure is the least signal-to-quantization-noise ratio (dB) over the outputs, on one sample, against the "
        "source in ONNX Runtime (`=` where nothing differs); `*` says that shapes were fixed, `?` that the artifact is "
        "marked unverified; a letter is a reason below."
    )
    lines = [
        "# Every model through every target",
        "",
        legend,
        "",
        "| model | " + " | ".join(targets) + " |",
        "|---" * (len(targets) + 1) + "|",
    ]
    reasons: dict[str, str] = {}
    for model in models:
        cells = [_cell(by.get((model, target)), reasons) for target in targets]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    ran = {row["target"]: row["ran on"] for row in rows if row.get("ran on")}
    lines += ["", "## Not run on its own device", "", *(f"- {target}: {where}" for target, where in ran.items())]
    lines += ["", "## Reasons", "", *(f"- {letter}: {reason}" for reason, letter in reasons.items())]
    return "\n".join(lines) + "\n"


def _cell(row: Row | None, reasons: dict[str, str]) -> str:
    if row is None:
        return ""
    marks = ("*" if row.get("fixed") else "") + ("?" if row["outcome"] == "unverified" else "")
    if row["outcome"] in ("built", "unverified"):
        return ("=" if row["sqnr dB"] is None else f"{row['sqnr dB']:.0f}") + marks
    letter = reasons.setdefault(row["reason"], _letter(len(reasons)))
    return f"{'' if row['outcome'] == 'refused' else row['outcome'].upper() + ' '}{letter}{marks}"


def _letter(index: int) -> str:
    """Return a, b, ..., z, aa, ab, ..."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", default="", help="beginnings of names, separated by commas (default: all)")
    parser.add_argument("--targets", default="", help="beginnings of names, separated by commas (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="pairs at once")
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "TARGET", "FOLDER", "RESULT"), help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "TARGETS.json")
    options = parser.parse_args(arguments)
    if options.one:
        name, target, folder, result = options.one
        _one(name, target, Path(folder), Path(result))
        return 0
    models = [one for one in integer_subjects.SUBJECTS if one.startswith(tuple(options.models.split(",")))]
    targets = [one for one in registry.names("target") if one.startswith(tuple(options.targets.split(",")))]
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        now = list(pool.map(lambda pair: _pair(*pair), [(model, target) for model in models for target in targets]))
    before = json.loads(options.output.read_text())["rows"] if options.output.is_file() else []
    ran = {(row["model"], row["target"]) for row in now}
    order = {one: index for index, one in enumerate(integer_subjects.SUBJECTS)}
    rows = [row for row in before if (row["model"], row["target"]) not in ran] + now
    rows.sort(key=lambda row: (order.get(row["model"], len(order)), row["target"]))
    results: Row = {"machine": timing.machine(), "rows": rows}
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(render(results))
    return int(any(row["outcome"] == "crash" for row in now))


if __name__ == "__main__":
    sys.exit(main())
