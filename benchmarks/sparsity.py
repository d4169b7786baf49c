"""Measure sparse weights: against the published loop, onnxsim's speed, what language models lose, and bytes on disk.

    python benchmarks/sparsity.py [--only loop,speed,storage,language] [--quick] [--peer PYTHON] [-o SPARSITY.json]

writes the JSON, with the parts that did not run as they were there, and the tables beside it as a page. `--peer` is a
Python that has onnxsim (0.8.1 was compared). `language` is calibrated on text that it does not judge by.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pruning
import timing
from pruning import Figures, claim

import qgraph.ir
from qgraph.numerics.hessian import output_error
from qgraph.numerics.sparsity import Pattern, follows, sparse_gptq
from qgraph.pipeline import Pipeline

__all__ = ["published"]

HERE = Path(__file__).resolve().parent
SHAPES = ((256, 256), (256, 1024), (1024, 256), (1024, 1024))
"""Outputs and inputs."""
ROWS = 4096


def problem(outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights [N, K] and correlated samples [ROWS, K] with outlier channels."""
    random = np.random.default_rng(outputs + inputs)
    mix = np.eye(inputs) + random.normal(size=(inputs, inputs)) / np.sqrt(inputs)
    x = random.normal(size=(ROWS, inputs)) @ mix * np.exp(random.normal(size=inputs) / 2)
    weight = random.normal(size=(outputs, inputs)) / np.sqrt(inputs)
    return weight.astype(np.float32), x.astype(np.float32)


def published(weight: np.ndarray, hessian: np.ndarray, damping: float = 0.01, block: int = 128) -> np.ndarray:
    """Return 2:4 weights by algorithm 1 of the SparseGPT paper (Frantar and Alistarh 2023), in float64."""
    work = weight.astype(np.float64)
    inputs = work.shape[1]
    damped = hessian + damping * np.mean(hessian.diagonal()) * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = np.zeros((len(work), stop - start))
        for column in range(start, stop):
            if column % 4 == 0:
                saliency = work[:, column : column + 4] ** 2 / upper.diagonal()[column : column + 4] ** 2
                goes = np.argsort(np.argsort(saliency, axis=1, kind="stable"), axis=1) < 2
            kept = np.where(goes[:, column % 4], 0, work[:, column])
            errors[:, column - start] = (work[:, column] - kept) / upper[column, column]
            work[:, column:stop] -= np.outer(errors[:, column - start], upper[column, column:stop])
            work[:, column] = kept
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return work


def loop(quick: bool, peer: str) -> Figures:
    """Squared output error of 2:4 weights on the same Hessian, ours against the published loop."""
    del peer
    rows: list[Figures] = []
    pattern = Pattern("neighbours")
    for outputs, inputs in SHAPES[: 2 if quick else None]:
        weight, x = problem(outputs, inputs)
        hessian = 2 / ROWS * (x.T.astype(np.float64) @ x)
        reference = published(weight, hessian)
        assert follows(reference, pattern)
        theirs = output_error(weight, reference, hessian)
        plain = output_error(weight, sparse_gptq(weight, hessian, pattern, fits=0).weight, hessian)
        ours = output_error(weight, sparse_gptq(weight, hessian, pattern).weight, hessian)
        shape = f"{outputs} x {inputs}"
        rows.append({"shape": shape, "published": theirs, "ours, no fit": plain, "ours": ours, "ratio": ours / theirs})
        print(f"  {shape:<12} {theirs:.4f} published, {plain:.4f} without the fit, {ours:.4f} ours", flush=True)
    found = f"{max(row['ratio'] for row in rows):.3f} of it at most"
    reached = all(row["ratio"] <= 1 for row in rows)
    return {"rows": rows, "claims": [claim("SparseGPT, output error", "at most the published loop's", found, reached)]}


_PEER = """
import json, sys, time
import numpy as np, onnx, onnxsim
from onnxsim.pruning import _sparsegpt_prune_columns
model, data = onnx.load(sys.argv[1]), np.load(sys.argv[2])
feeds, seconds = [{"x": part} for part in data["x"]], {}
weight, hessian = data["weight"].astype(np.float64), data["hessian"]
for name in ("apply_sparsegpt_pruning", "apply_sparsegpt_pruning_cpp"):
    start = time.process_time()
    made = getattr(onnxsim, name)(model, feeds, n=2, m=4)
    seconds[name] = time.process_time() - start
    found = onnx.numpy_helper.to_array(made.graph.initializer[0])
    assert ((found.reshape(len(found) // 4, 4, -1) != 0).sum(axis=1) <= 2).all(), name
start = time.process_time()
_sparsegpt_prune_columns(weight, hessian, 0.5, 2, 4, 0.01, 128)
seconds["solver"] = time.process_time() - start
print(json.dumps(seconds))
"""


def speed(quick: bool, peer: str) -> Figures:
    """Seconds of one core (OMP_NUM_THREADS=1) of SparseGPT 2:4 for a layer; the solvers alone have the same Hessian."""
    rows: list[Figures] = []
    pattern, passes = Pattern("neighbours"), Pipeline.parse("sparsify{method=sparsegpt}")
    for outputs, inputs in SHAPES[: 2 if quick else None]:
        weight, x = problem(outputs, inputs)
        parts = np.split(x, 8)
        model = _product(weight)
        hessian = 2 / ROWS * (x.T.astype(np.float64) @ x)
        with tempfile.TemporaryDirectory() as folder:
            qgraph.ir.save(model, Path(folder) / "model.onnx")
            np.savez(Path(folder) / "data.npz", x=np.stack(parts), weight=weight, hessian=hessian)
            command = [peer, "-c", _PEER, f"{folder}/model.onnx", f"{folder}/data.npz"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        theirs = json.loads(ran.stdout.splitlines()[-1])
        feeds = [{"x": part} for part in parts]
        row = {"shape": f"{outputs} x {inputs}", **{f"onnxsim {name}": one for name, one in theirs.items()}}
        row["ours"] = _least(lambda model=model, feeds=feeds: passes.run(model.clone(), calibration=feeds))
        row["our solver"] = _least(functools.partial(sparse_gptq, weight, hessian, pattern))
        row["our solver, no fit"] = _least(functools.partial(sparse_gptq, weight, hessian, pattern, fits=0))
        row["faster"] = min(one for name, one in theirs.items() if name != "solver") / row["ours"]
        row["solver faster, no fit"] = theirs["solver"] / row["our solver, no fit"]
        rows.append(row)
        print("  " + ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else v for k, v in row.items()), flush=True)
    claims = []
    for what, name in (
        ("a model of one layer", "faster"),
        ("the same loop on the same Hessian", "solver faster, no fit"),
    ):
        least = min(row[name] for row in rows)
        claims.append(claim(f"SparseGPT against onnxsim, {what}", "20 times as fast", f"{least:.1f}", least >= 20))
    return {"rows": rows, "claims": claims}


def _least(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def _product(weight: np.ndarray, dtype: type[np.floating] = np.float32, layers: int = 1) -> ir.Model:
    """Return products one after the other, all with the weight [N, K]."""
    outputs, inputs = weight.shape
    kind = "float" if dtype == np.float32 else "float16"
    names = ["x", *(f"h{number}" for number in range(1, layers)), "y"]
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({kind}[n,{inputs}] x) => ({kind}[n,{outputs}] y) <'
    text += ", ".join(f"{kind}[{inputs},{outputs}] w{number} = {{0}}" for number in range(layers)) + "> { "
    text += " ".join(f"{names[number + 1]} = MatMul ({names[number]}, w{number})" for number in range(layers)) + " }"
    model = ir.from_onnx_text(text)
    for name, value in model.graph.initializers.items():
        value.const_value = ir.tensor(np.ascontiguousarray(weight.T, dtype), name=name)
    return model


def storage(quick: bool, peer: str) -> Figures:
    """Files, loads and runs of eight products of 1024 x 1024, as they are and with `pack-sparse`."""
    del peer
    rows: list[Figures] = []
    weight, _ = problem(1024, 1024)
    x = np.random.default_rng(0).normal(size=(16, 1024)).astype(np.float32)
    for options in ("pattern=2:4", "pattern=unstructured,ratio=0.8", "pattern=unstructured,ratio=0.9"):
        dense = _product(weight, layers=2 if quick else 8)
        Pipeline.parse(f"sparsify{{method=magnitude,{options}}}").run(dense)
        packed = dense.clone()
        Pipeline.parse("pack-sparse").run(packed)
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder) / f"{name}.onnx" for name in ("dense", "packed")}
            sessions, loads = {}, {}
            for name, model in (("dense", dense), ("packed", packed)):
                qgraph.ir.save(model, paths[name])
                start = time.perf_counter()
                sessions[name] = timing.session(paths[name])
                loads[name] = time.perf_counter() - start
            taken = timing.in_turn(sessions, [{"x": x}] * 20)
            size = {name: path.stat().st_size for name, path in paths.items()}
        run = {name: float(np.median(one)) for name, one in taken.items()}
        row = {"passes": f"sparsify{{{options}}}", "bytes": size["dense"], "packed": size["packed"]}
        row |= {"share": size["packed"] / size["dense"], "load": loads["dense"], "packed load": loads["packed"]}
        rows.append({**row, "time of a run": run["packed"] / run["dense"]})
        print(f"  {options:<32} {row['share']:.3f} of the bytes, a run {rows[-1]['time of a run']:.2f}", flush=True)
    claims = [
        claim("2:4 on disk", "fewer bytes", f"{rows[0]['share']:.1%}", rows[0]["share"] < 1),
        claim("2:4 packed, a run", "as fast (within 5 %)", f"{rows[0]['time of a run']:.2f} of the time",
              rows[0]["time of a run"] < 1.05),
    ]  # fmt: skip
    return {"rows": rows, "claims": claims}


def language(quick: bool, peer: str) -> Figures:
    """2 of 4 weights of language models zero."""
    del peer
    return pruning.sparsity(quick)


PARTS: dict[str, Callable[[bool, str], Figures]] = {
    "loop": loop,
    "speed": speed,
    "storage": storage,
    "language": language,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer samples to judge by, and fewer shapes")
    parser.add_argument("--peer", default=sys.executable, help="a Python that has onnxsim")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "SPARSITY.json")
    options = parser.parse_args(arguments)
    results: Figures = {"machine": {}, "parts": {}}
    if options.output.is_file():
        results = json.loads(options.output.read_text())
    for name in options.only.split(","):
        if name not in PARTS:
            parser.error(f"there is no part '{name}'; there are: {', '.join(PARTS)}")
        print(name, flush=True)
        results["machine"] = timing.machine()
        results["parts"][name] = {**PARTS[name](options.quick, options.peer), "quick": options.quick}
        results["parts"] = {part: results["parts"][part] for part in PARTS if part in results["parts"]}
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(render(results))
    claims: list[Any] = [one for part in results["parts"].values() for one in part["claims"]]
    print(f"{sum(one['reached'] for one in claims)} of {len(claims)} reached")
    return 0


def render(results: Figures) -> str:
    """Return the page, in Markdown."""
    return pruning.render(results, PARTS, "Sparse weights", "sparsity.py")


if __name__ == "__main__":
    sys.exit(main())
