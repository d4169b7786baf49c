"""Measure the integer dialect: the same bits everywhere, what it costs in accuracy, and how fast code from it is.

    python benchmarks/integer.py [--only bits,accuracy,speed,operators] [--models resnet,digits] [--quick]
                                 [-o INTEGER.json]

writes the JSON, with the parts and models that did not run as they were there, and the tables beside it as a page.
Needs the real models and data (QGRAPH_ASSETS), gcc, and for the libraries Apache TVM. Calibration and evaluation share
no sample, except in `bits`, where it does not matter: there, samples of the calibration fill up what is evaluated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import integer_accuracy
import integer_operators
import integer_speed
import integer_subjects
import pruning
import timing

__all__ = ["PARTS", "bits", "render"]

HERE = Path(__file__).resolve().parent
Figures = dict[str, Any]
SAMPLES = 100
LIMIT = 900
"""Seconds that a model may take in `bits`, compilers included."""
RUNNERS = ("c", "reference", "tvm")


def bits(quick: bool, models: Sequence[str]) -> Figures:
    """Elements of outputs that differ from ONNX Runtime's, over so many real samples"""
    rows = [_bits_of(name, 10 if quick else SAMPLES) for name in integer_subjects.SUBJECTS if name.startswith(models)]
    return {"rows": rows, "claims": bits_claims(rows)}


def _bits_of(name: str, samples: int) -> Figures:
    with tempfile.TemporaryDirectory(prefix="qgraph-integer-") as scratch:
        folder, result = Path(scratch) / "work", Path(scratch) / "result.json"
        folder.mkdir()
        command = [sys.executable, str(HERE / "integer_bits.py"), name, str(folder), str(result), str(samples)]
        done = timing.run_process(command, Path(scratch) / "log.txt", threads=1, limit=LIMIT)
        figures: Figures = json.loads(result.read_text()) if result.is_file() else {"failures": {}}
    if done.status:
        why = f"not finished after {LIMIT} s" if done.seconds >= LIMIT else (done.errors.splitlines() or ["?"])[-1]
        figures["failures"]["process"] = why[:300]
    row = {"name": name, "nodes": figures.get("nodes"), "boundaries": len(figures.get("boundaries", ()))}
    for runner in ("onnxruntime", *RUNNERS):
        row[f"{runner} samples"] = figures.get(f"{runner}_samples")
    for runner in RUNNERS:
        row[f"{runner} differ"] = figures.get(f"{runner}_differ")
    row |= {"elements": figures.get("elements"), "flash": figures.get("flash"), "ram": figures.get("ram")}
    for key in ("compile_seconds", "gcc_seconds", "tvm_seconds"):
        row[key.replace("_", " ")] = figures.get(key)
    row["failures"] = "; ".join(f"{step}: {why}" for step, why in figures["failures"].items())
    row["left in float"] = "; ".join(f"{node}: {reason}" for node, reason in figures.get("boundaries", ()))
    _say(f"  {name:<20} " + "  ".join(f"{key} {row[key]}" for key in row if row[key] not in (None, "", "name"))[:600])
    return row


def bits_claims(rows: Sequence[Figures]) -> list[Figures]:
    """Return for each runner whether no element differed, and whether every model became integers."""
    claims = []
    for runner in RUNNERS:
        ran = [row for row in rows if row[f"{runner} differ"] is not None]
        wrong = [row["name"] for row in ran if row[f"{runner} differ"]]
        missing = [row["name"] for row in rows if row[f"{runner} differ"] is None]
        found = f"{sum(row[f'{runner} samples'] for row in ran)} samples of {len(ran)} models"
        found += f"; differs: {', '.join(wrong)}" if wrong else ""
        found += f"; did not run: {', '.join(missing)}" if missing else ""
        reached = not wrong and not missing
        claims.append(pruning.claim(f"{runner} against ONNX Runtime", "no differing element", found, reached))
    floats = [row["name"] for row in rows if row["boundaries"] or row["nodes"] is None]
    must = "no float operator between the edges"
    claims.append(pruning.claim(f"{len(rows)} models", must, ", ".join(floats) or "none", not floats))
    return claims


def accuracy(quick: bool, models: Sequence[str]) -> Figures:
    """Accuracy: integers beside QDQ and float"""
    rows: list[Figures] = []
    for name in integer_accuracy.MODELS:
        if name.startswith(models):
            for row in integer_accuracy.measure(name, quick=quick):
                rows.append(row)
                score = "" if row["score"] is None else f"{row['score']:.2f}"
                _say(f"  {name:<20} {row['form']:<22} {score:>6}  {row['sqnr dB']:.2f} dB  {row['seconds']:.0f} s")
    return {"rows": rows, "claims": integer_accuracy.claims(rows)}


def speed(quick: bool, models: Sequence[str]) -> Figures:
    """Milliseconds of one sample on one thread, all in turn"""
    rows: list[Figures] = []
    for name in integer_speed.MODELS:
        if name.startswith(models):
            rows += integer_speed.measure(name, samples=5 if quick else 40)
    for row in rows:
        _say(f"  {row['name']:<12} {row['runs']:<34} {row['ms']:.3f} ms  {row['times float']:.2f}")
    return {"rows": rows, "claims": integer_speed.claims(rows)}


def operators(quick: bool, models: Sequence[str]) -> Figures:
    """Operators that become integers"""
    del quick, models
    return integer_operators.measure()


def _say(text: str) -> None:
    print(text, flush=True)


PARTS: dict[str, Callable[[bool, tuple[str, ...]], Figures]] = {
    "bits": bits,
    "accuracy": accuracy,
    "speed": speed,
    "operators": operators,
}
_CLAIMS: dict[str, Callable[[Sequence[Figures]], list[Figures]]] = {
    "bits": bits_claims,
    "accuracy": integer_accuracy.claims,
    "speed": integer_speed.claims,
    "operators": integer_operators.claims,
}


def merged(name: str, before: Figures | None, now: Figures) -> Figures:
    """Return a part with the rows of models that did not run as they were, and the claims on all of them."""
    ran = {row["name"] for row in now["rows"]}
    kept = [row for row in (before or {}).get("rows", ()) if row["name"] not in ran]
    order = {one: index for index, one in enumerate(integer_subjects.SUBJECTS)}
    rows = sorted(kept + now["rows"], key=lambda row: order.get(row["name"], len(order)))
    return {**now, "rows": rows, "claims": _CLAIMS[name](rows)}


def render(results: Figures) -> str:
    """Return the page, in Markdown."""
    plain = {**results, "parts": {name: part for name, part in results["parts"].items() if name != "operators"}}
    page = pruning.render(plain, PARTS, "Integers only", "integer.py") if plain["parts"] else "# Integers only\n"
    if "operators" in results["parts"]:
        page += "\n" + integer_operators.render(results["parts"]["operators"])
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--models", default="", help="beginnings of names, separated by commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "INTEGER.json")
    options = parser.parse_args(arguments)
    results: Figures = {"machine": {}, "parts": {}}
    if options.output.is_file():
        results = json.loads(options.output.read_text())
    for name in options.only.split(","):
        if name not in PARTS:
            parser.error(f"there is no part '{name}'; there are: {', '.join(PARTS)}")
        _say(name)
        results["machine"] = timing.machine()
        now = {**PARTS[name](options.quick, tuple(options.models.split(","))), "quick": options.quick}
        parts = results["parts"]
        parts[name] = merged(name, parts.get(name), now)
        results["parts"] = {part: parts[part] for part in PARTS if part in parts}
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(render(results))
    claims = [one for part in results["parts"].values() for one in part["claims"]]
    _say(f"{sum(one['reached'] for one in claims)} of {len(claims)} reached")
    return 0


if __name__ == "__main__":
    sys.exit(main())
