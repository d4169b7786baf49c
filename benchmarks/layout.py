"""What channels last would gain if it were written into int8 models for the CPU, rather than left to ONNX Runtime.

    python benchmarks/layout.py [--models resnet20,mobilenet_v2] [-o LAYOUT.md]

The runtime puts integer convolutions channels last itself when it opens a model, and moves Transposes to where they
cost least. Who writes that layout first saves at most the Transposes that are left: their share of all kernel times,
each the median of its runs by the runtime's own profile, one thread. Where most of them stand around a channel shuffle,
the shuffle is timed in both layouts too, in processor seconds. Needs the real models and data (QGRAPH_ASSETS).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import integer_subjects
import numpy as np
import onnx
import onnx_ir as ir

import qgraph
from qgraph.runtime.session import open_session

__all__ = ["main", "measure", "render", "shuffle"]

HERE = Path(__file__).resolve().parent
MODELS = ("resnet20", "mobilenet_v2", "squeezenet", "fastestdet", "face_rfb320")
SAMPLES, RUNS = 5, 60
SHUFFLES = ((24, 44), (48, 22), (96, 11))
"""Channels of each half, and size of the image: the three stages of FastestDet."""


def measure(name: str) -> dict[str, Any]:
    """Return the kernel times of a model for cpu-int8, in microseconds, and what Transposes take of them."""
    subject = integer_subjects.SUBJECTS[name]
    feeds = subject.calibration()[:SAMPLES]
    with tempfile.TemporaryDirectory(prefix="qgraph-layout-") as scratch:
        folder = Path(scratch)
        artifact = qgraph.compile(subject.task.model(), "cpu-int8", calibration=feeds, output=folder / "artifact")
        session = open_session(
            artifact.path / "model.onnx", threads=1, optimised_path=folder / "opened.onnx", profile=folder / "profile"
        )
        for _ in range(RUNS):
            session.run(None, dict(feeds[0]))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        opened = onnx.load(folder / "opened.onnx", load_external_data=False)
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"], event["name"]].append(event["dur"])
    by_kernel: Counter[str] = Counter()
    for (kernel, _), taken in times.items():
        by_kernel[kernel] += round(statistics.median(taken))
    kinds = Counter(node.op_type for node in opened.graph.node)
    total = sum(by_kernel.values())
    return {"model": name, "convolutions": kinds["QLinearConv"], "transposes": kinds["Transpose"], "total": total,
            "transposing": by_kernel["Transpose"], "share": by_kernel["Transpose"] / max(1, total)}  # fmt: skip


def shuffle(channels: int, size: int) -> tuple[float, float]:
    """Return what a concatenation and a shuffle of two halves take, in microseconds of one processor.

    First as ONNX Runtime does it: to channels first and back. Then channels last all along.
    """
    shape, square = f"uint8[1,{size},{size},{channels}]", f"{size},{size}"
    head = f'<ir_version: 9, opset_import: ["" : 18]> g ({shape} a, {shape} b) => ({shape} y, {shape} z)'
    first = f"""{head} <int64[5] s = {{1,{channels},2,{square}}}, int64[1] x = {{2}}> {{
        at = Transpose <perm = [0,3,1,2]> (a)  bt = Transpose <perm = [0,3,1,2]> (b)
        c = Concat <axis = 1> (at, bt)  r = Reshape (c, s)  p, q = Split <axis = 2, num_outputs = 2> (r)
        ps = Squeeze (p, x)  qs = Squeeze (q, x)
        y = Transpose <perm = [0,2,3,1]> (ps)  z = Transpose <perm = [0,2,3,1]> (qs) }}"""
    last = f"""{head} <int64[5] s = {{1,{square},{channels},2}}, int64[1] x = {{4}}> {{
        c = Concat <axis = 3> (a, b)  r = Reshape (c, s)  p, q = Split <axis = 4, num_outputs = 2> (r)
        y = Squeeze (p, x)  z = Squeeze (q, x) }}"""
    random = np.random.default_rng(0)
    feeds = {name: random.integers(0, 255, (1, size, size, channels)).astype(np.uint8) for name in "ab"}
    found, outputs = [], []
    for text in (first, last):
        model = ir.to_proto(ir.from_onnx_text(text)).SerializeToString()
        session = open_session(model, threads=1, optimise=False)
        outputs.append(session.run(None, feeds))
        rounds = []
        for _ in range(5):
            start = time.process_time()
            for _ in range(200):
                session.run(None, feeds)
            rounds.append((time.process_time() - start) / 200 * 1e6)
        found.append(min(rounds))
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)
    return found[0], found[1]


def render(rows: list[dict[str, Any]], shuffles: list[tuple[int, int, float, float]]) -> str:
    """Return the page."""
    lines = [
        "# Channels last on the CPU",
        "",
        "Made by `python benchmarks/layout.py`: kernel times of `cpu-int8`, one thread, one sample.",
        "What the Transposes take is the most that writing channels last ourselves could save; those at inputs and",
        "outputs would stay.",
        "",
        "| model | integer convolutions | Transposes left | kernels, us | Transposes, us | share |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['model']} | {row['convolutions']} | {row['transposes']} | {row['total']} | {row['transposing']} | "
        f"{row['share']:.1%} |"
        for row in rows
    ]
    lines += [
        "",
        "FastestDet's stand around its channel shuffles, which are faster channels first, Transposes included:",
        "",
        "| channels | image | channels first, with Transposes, us | channels last, us |",
        "|---:|---:|---:|---:|",
    ]
    lines += [f"| 2 x {channels} | {size} x {size} | {a:.0f} | {b:.0f} |" for channels, size, a, b in shuffles]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("-o", "--output", type=Path, default=HERE / "LAYOUT.md")
    arguments = parser.parse_args()
    rows = [measure(name) for name in arguments.models.split(",")]
    shuffles = [(channels, size, *shuffle(channels, size)) for channels, size in SHUFFLES]
    arguments.output.write_text(render(rows, shuffles), encoding="utf-8")
    print(arguments.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
