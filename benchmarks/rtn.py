"""Measure rounding to 4 bits, from one model file to another, against ONNX Runtime's MatMulNBitsQuantizer.

    python benchmarks/rtn.py [--repeats 3] [--large] [-o rtn.json]

The model is a chain of 16 MatMuls of 4096 x 4096 (268 M parameters, 1.07 GB), made from a seed in a temporary folder;
`--large` adds 64 of them (4.3 GB) for qgraph alone. Each tool loads the file, rounds to 4 bits in groups of 32 with
zero points for MatMulNBits, and saves, in a process of its own. Time is the wall clock of the whole process, the
least of the repeats, memory its largest resident set. The error is that of the weights that each has written.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timing

__all__: list[str] = []

HERE = Path(__file__).resolve()
SIZE = 4096
GROUP = 32
PEER = "ort-rtn"


def generate(path: Path, layers: int) -> None:
    """Write a chain of MatMuls with random weights beside `path`."""
    import onnx
    from onnx import TensorProto, helper

    random = np.random.default_rng(0)
    data = path.with_suffix(".data")
    initializers, nodes = [], []
    with data.open("wb") as file:
        for number in range(layers):
            tensor = TensorProto(name=f"w{number}", data_type=TensorProto.FLOAT, dims=[SIZE, SIZE])
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": data.name, "offset": file.tell(), "length": SIZE * SIZE * 4}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(random.standard_normal((SIZE, SIZE), dtype=np.float32) * np.float32(SIZE**-0.5))
            initializers.append(tensor)
            nodes.append(
                helper.make_node("MatMul", [f"h{number}", f"w{number}"], [f"h{number + 1}"], name=f"m{number}")
            )
    ends = [helper.make_tensor_value_info(f"h{end}", TensorProto.FLOAT, ["s", SIZE]) for end in (0, layers)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))


def ort_rtn(source: Path, output: Path) -> None:
    """Round as the peer's documentation says."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=False, accuracy_level=4)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output), use_external_data_format=True)


def pipeline(method: str) -> Callable[[Path, Path], None]:
    """Return what rounds with qgraph's Python interface."""

    def run(source: Path, output: Path) -> None:
        import qgraph.ir
        from qgraph.passes import MatmulNbits, Rtn
        from qgraph.pipeline import Pipeline

        model = qgraph.ir.load(source)
        Pipeline([Rtn(group=GROUP, method=method), MatmulNbits()]).run(model)
        qgraph.ir.save(model, output)

    return run


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    PEER: ort_rtn,
    "qgraph-minmax": pipeline("minmax"),
    "qgraph-mse": pipeline("mse"),
}
COMMANDS = {"qgraph-compile-minmax": "rtn{method=minmax}", "qgraph-compile": "rtn"}
"""The same from the command line, which also verifies and hashes what it has written."""


def command(tool: str, source: Path, output: Path) -> list[str]:
    """Return the command line that runs a tool."""
    if tool in COMMANDS:
        options = ["--target", "cpu-int4", "--passes", COMMANDS[tool], "-o", str(output), "--force"]
        return [sys.executable, "-m", "qgraph", "compile", str(source), *options]
    return [sys.executable, str(HERE), "--tool", tool, str(source), str(output)]


def products(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and weight [K, N] of every MatMulNBits of a written model."""
    import onnx
    from onnx import numpy_helper

    from qgraph.numerics.packing import from_matmul_nbits

    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        arrays = [numpy_helper.to_array(tensors[name]) for name in node.input[1:4] if name]
        sizes = {one.name: one.i for one in node.attribute}
        arrays += [None] * (3 - len(arrays))
        weight = from_matmul_nbits(*arrays, inputs=sizes["K"], bits=sizes["bits"], block=sizes["block_size"])
        yield node.name, weight.dequantize().T


def relative_error(output: Path, layers: int) -> float:
    """Return the squared error of the first two weights over their squares."""
    random = np.random.default_rng(0)
    error = size = 0.0
    for _, (_, held) in zip(range(min(layers, 2)), products(output), strict=False):
        weight = random.standard_normal((SIZE, SIZE), dtype=np.float32) * np.float32(SIZE**-0.5)
        error += float(np.square(held - weight, dtype=np.float64).sum())
        size += float(np.square(weight, dtype=np.float64).sum())
    return error / size


def measure(tools: list[str], source: Path, layers: int, work: Path, repeats: int) -> list[dict[str, Any]]:
    """Run the tools by turns, `repeats` times each, and return what each took."""
    runs: dict[str, list[timing.Process]] = {tool: [] for tool in tools}
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        for tool in tools:
            output = work / tool
            output.mkdir()
            written = output / "artifact/model.onnx" if tool in COMMANDS else output / "model.onnx"
            target = written.parent if tool in COMMANDS else written
            run = timing.run_process(command(tool, source, target), work / f"{tool}.log")
            runs[tool].append(run)
            row: dict[str, Any] = {"tool": tool, "layers": layers}
            if run.status != 0:
                row["failed"] = run.errors.splitlines()[-1:] or run.status
            elif tool not in rows:
                row["bytes"] = sum(path.stat().st_size for path in written.parent.glob("model.onnx*"))
                row["relative_error"] = relative_error(written, layers)
            rows[tool] = {**row, **rows.get(tool, {})}
            shutil.rmtree(output)
    for tool, row in rows.items():
        row["seconds"] = round(min(run.seconds for run in runs[tool]), 2)
        row["peak_mib"] = round(max(run.peak_mib for run in runs[tool]))
        if PEER in rows and "failed" not in row:
            row["times_faster"] = round(min(run.seconds for run in runs[PEER]) / row["seconds"], 2)
    return list(rows.values())


def main() -> int:
    """Measure, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="also 64 layers, 4.3 GB, with qgraph alone")
    parser.add_argument("-o", dest="output", type=Path, default=None)
    parser.add_argument("--only", default=",".join([*TOOLS, *COMMANDS]))
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tool:
        TOOLS[options.tool](*options.paths)
        return 0
    results: dict[str, Any] = {"machine": platform.processor(), "threads": timing.THREADS, "rows": []}
    results["versions"] = {name: version(name) for name in ("onnxruntime", "onnx", "numpy", "qgraph-compiler")}
    names = options.only.split(",")
    plans = [(16, names)] + ([(64, [name for name in names if name != PEER])] if options.large else [])
    for layers, tools in plans:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            source = work / "chain.onnx"
            generate(source, layers)
            print(f"{layers} layers, {layers * SIZE * SIZE / 1e6:.0f} M parameters", flush=True)
            for row in measure(tools, source, layers, work, options.repeats):
                results["rows"].append(row)
                print(f"  {json.dumps(row)}", flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
