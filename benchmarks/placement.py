"""What every model is expected to run as on ONNX Runtime's CPU provider, against the profile of a run.

    python benchmarks/placement.py [--models resnet,digits] [--targets cpu-int8] [-o PLACEMENT.json]

writes the JSON, with the pairs that did not run as they were there, and the table beside it as a page. Each model is
compiled for each target; `check_placement` then says of every node, from the model and the capability table alone, what
it will do, runs one sample, and compares. Needs the real models and data (QGRAPH_ASSETS).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import integer_subjects
import timing

import qgraph
from qgraph.runtime.placement_check import check_placement
from qgraph.runtime.placement_reading import read_placement

__all__ = ["TARGETS", "main", "measure", "render"]

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
TARGETS = ("cpu-fp32", "cpu-int8", "cpu-int4")
SAMPLES = 5
"""Of calibration; one of them is held back for the verification."""


def measure(name: str, target: str) -> Row:
    """Compile one model for one target, and hold its placement against what was expected."""
    start = time.perf_counter()
    subject = integer_subjects.SUBJECTS[name]
    feeds = subject.calibration()[:SAMPLES]
    with tempfile.TemporaryDirectory(prefix="qgraph-placement-") as scratch:
        samples = feeds if target == "cpu-int8" else None  # the others need none, and the kernels are the same
        artifact = qgraph.compile(
            subject.task.model(),
            target,
            calibration=samples,
            verify_data=None if samples else feeds[:1],
            output=Path(scratch) / "artifact",
        )
        model = artifact.path / "model.onnx"
        found = check_placement(model, feeds[0])
        kinds = read_placement(model).counted("arithmetic")
    row = {"model": name, "target": target, **found.to_json(), "arithmetic": kinds}
    row["inserted"] = sum(found.inserted.values())
    print(
        f"  {name:<22} {target:<9} {found.executed:>4} ran, {found.told:>4} told, {found.kernels:>3} layers, "
        f"{len(found.differences)} differ   {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return row


def render(results: Row) -> str:
    """Return the page, in Markdown."""
    rows = results["rows"]
    keys = ("executed", "told", "kernels", "inserted", "not_run")
    total = {key: sum(row[key] for row in rows) for key in keys}
    differ = sum(len(row["differences"]) for row in rows)
    machine = results["machine"]
    lines = [
        "# What was expected to run, and what ran",
        "",
        (
            f"Made by `python benchmarks/placement.py`: {machine['processor']}, onnxruntime {machine['onnxruntime']}. "
            f"{total['executed']:,} nodes ran; **{differ} were otherwise than expected**. Of all, the provider was "
            f"expected; of {total['told']:,} that stand for nodes of the model, whether they compute in integers, in "
            f"floats or nothing; of {total['kernels']:,} layers, the kernel. {total['inserted']:,} were put in by the "
            "runtime, or no name tells what they stand for. How a product with weights of few bits multiplies is not "
            "in the profile: it was measured on one of the same bits, block and level."
        ),
        "",
        "| model | target | ran | told | layers | put in | not reached | in integers | few bits | in float | differ |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        kinds = [row["arithmetic"].get(kind, 0) for kind in ("integer", "low-bit", "float")]
        cells = [*(row[key] for key in keys), *kinds, len(row["differences"])]
        lines.append(f"| {row['model']} | {row['target']} | " + " | ".join(map(str, cells)) + " |")
    told = [f"- {row['model']}, {row['target']}: {one}" for row in rows for one in row["differences"]]
    return "\n".join(lines + (["", "## Otherwise than expected", "", *told] if told else [])) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", default="", help="beginnings of names, separated by commas (default: all)")
    parser.add_argument("--targets", default="", help="beginnings of names, separated by commas (default: all)")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "PLACEMENT.json")
    options = parser.parse_args(arguments)
    models = [one for one in integer_subjects.SUBJECTS if one.startswith(tuple(options.models.split(",")))]
    targets = [one for one in TARGETS if one.startswith(tuple(options.targets.split(",")))]
    before = json.loads(options.output.read_text())["rows"] if options.output.is_file() else []
    order = {one: index for index, one in enumerate(integer_subjects.SUBJECTS)}
    rows = {(row["model"], row["target"]): row for row in before}
    for model in models:
        for target in targets:
            rows[model, target] = measure(model, target)
            ordered = sorted(rows.values(), key=lambda row: (order.get(row["model"], len(order)), row["target"]))
            results: Row = {"machine": timing.machine(), "rows": ordered}
            options.output.write_text(json.dumps(results, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(render(results))
    return int(any(row["differences"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
