"""Learned rounding, ours against onnxsim's, on layers of a real network: parameters per second, and the error left.

    python benchmarks/rounding.py [--task resnet20] [--bits 4] [--rows 512] [--python PEER] [-o rounding.json]

The layers' weights, and the patches that calibration images send into them, are taken once; half of the patches
calibrate, the other half judge. Then one process runs round-to-nearest, `gptq` and `adaround` of qgraph and the
AdaRound of onnxsim on one layer after the other. PEER is a Python that has onnxsim (pip install onnxsim==0.8.1);
qgraph's numerics need nothing but numpy, and are imported there from here. Without PEER only ours run.

onnxsim rounds in blocks of 32 inputs, each with a scale of its own, which is half a bit more for every weight in
float16 and should leave less error. Its loop is therefore also run with one scale for each output, the scales that ours
starts from (`onnxsim, rows`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__: list[str] = []

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 32
OURS = ("nearest", "gptq", "adaround, paper", "adaround")


def layers_of(task_name: str, rows: int) -> dict[str, np.ndarray]:
    """Return weights [N, K] and patches [2 * rows, K] of one layer of each shape, of float32."""
    import data
    import onnx_ir as ir

    import qgraph
    from qgraph.analysis.convolutions import Convolution, convolutions
    from qgraph.analysis.probes import Probe, raw_outputs
    from qgraph.pipeline import Pipeline

    task = data.TASKS[task_name]
    model = qgraph.load(str(task.model()))
    Pipeline.parse("inline-functions,lift-constants,fold-constants,fold-batch-norm").run(model)
    found: dict[tuple[int, int], Convolution] = {}
    for layer in convolutions(model).layers:
        if isinstance(layer, Convolution) and layer.groups == 1:
            found.setdefault((layer.outputs, layer.inputs), layer)
    feed = {key: np.array(value) for key, value in next(iter(task.calibration())).items()}
    names = [str(layer.x.name) for layer in found.values()]
    inner = [name for name in names if name not in feed]
    probe = Probe(ir.Model(model.graph.clone(), ir_version=model.ir_version), raw_outputs(inner), frozenset(feed))
    values = dict(zip(inner, probe.run(feed), strict=True)) | feed
    arrays: dict[str, np.ndarray] = {}
    for layer in found.values():
        x = np.asarray(values[str(layer.x.name)])
        patches = layer.window.rows(x, layer.window.positions(x.shape, 2 * rows, 0))[0]
        order = np.random.default_rng(0).permutation(len(patches))
        arrays[f"weight {layer.name}"] = layer.matrix()
        arrays[f"patches {layer.name}"] = patches[order]
    return arrays


def ours(weight: np.ndarray, patches: np.ndarray, bits: int) -> dict[str, Callable[[], np.ndarray]]:
    """Return what rounds a layer and gives the weights back, float32 [N, K]."""
    from qgraph.numerics.adaround import adaround
    from qgraph.numerics.channel_rounding import channel_scales, nearest, round_channels
    from qgraph.numerics.hessian import Hessian
    from qgraph.numerics.weights import WeightScheme

    scheme = WeightScheme(bits=bits, group=0, symmetric=True)

    def moments() -> np.ndarray:
        hessian = Hessian(weight.shape[1])
        hessian.add(patches)
        return hessian.matrix

    def to_nearest() -> np.ndarray:
        scale = channel_scales(weight, bits)[:, None]
        return nearest(weight, scale, bits) * scale

    return {
        "nearest": to_nearest,
        "gptq": lambda: round_channels(weight, moments(), scheme).dequantize(),
        "adaround, paper": lambda: adaround(weight, moments(), scheme, refine=0).dequantize(),
        "adaround": lambda: adaround(weight, moments(), scheme).dequantize(),
    }


def theirs(weight: np.ndarray, patches: np.ndarray, bits: int) -> dict[str, Callable[[], np.ndarray]]:
    """Return the same of onnxsim, as far as it is installed and takes the layer."""
    try:
        import onnx
        import onnxsim
        from onnx import helper, numpy_helper
        from onnxsim.adaround import _optimize_rounding
    except ImportError:
        return {}
    from qgraph.numerics.channel_rounding import channel_scales

    def rows() -> np.ndarray:
        half = 1 << (bits - 1)
        scale = np.broadcast_to(channel_scales(weight, bits)[:, None], weight.shape).astype(np.float64)
        x = patches.astype(np.float64)
        codes = _optimize_rounding(
            weight.astype(np.float64), scale, x, -half, half - 1, 300, 0.1, 0.01, 0.2, (20.0, 2.0)
        )
        return (codes * scale).astype(np.float32)

    def blocks() -> np.ndarray:
        outputs, inputs = weight.shape
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "layer",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, inputs])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, outputs])],
            [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        made = onnxsim.apply_adaround(model, onnxsim.quantize_weight_only_int4(model), [{"x": patches}])
        stored = {one.name: numpy_helper.to_array(one) for one in made.graph.initializer}
        (node,) = (one for one in made.graph.node if one.op_type == "DequantizeLinear")
        codes, scale = (stored[name].astype(np.float32) for name in node.input[:2])
        return (codes * np.repeat(scale, BLOCK, axis=0)).T

    found = {"onnxsim, rows": rows}
    if bits == 4 and weight.shape[1] % BLOCK == 0:
        found["onnxsim"] = blocks
    return found


def measured(path: Path, bits: int) -> dict[str, Any]:
    """Run every method on every layer; return seconds and the share of the held-back outputs' energy that is lost."""
    arrays = np.load(path)
    names = [name.removeprefix("weight ") for name in arrays if name.startswith("weight ")]
    results: dict[str, Any] = {}
    for name in names:
        weight, patches = arrays[f"weight {name}"], arrays[f"patches {name}"]
        seen, held = patches[: len(patches) // 2], patches[len(patches) // 2 :].astype(np.float64)
        wanted = held @ weight.T.astype(np.float64)
        entry: dict[str, Any] = {"shape": list(weight.shape)}
        for method, rounded in (ours(weight, seen, bits) | theirs(weight, seen, bits)).items():
            start = time.perf_counter()
            made = rounded()
            seconds = time.perf_counter() - start
            if method in OURS:  # short enough to be taken again, past what is done at the first call
                start = time.perf_counter()
                made = rounded()
                seconds = min(seconds, time.perf_counter() - start)
            lost = float(np.square(wanted - held @ made.T).sum() / np.square(wanted).sum())
            entry[method] = {"seconds": seconds, "lost": lost}
        results[name] = entry
    return results


def summary(layers: dict[str, Any]) -> dict[str, Any]:
    """Return for each method, over the layers that it took: parameters per second, and its loss against rounding."""
    methods = dict.fromkeys(method for one in layers.values() for method in one if method != "shape")
    found: dict[str, Any] = {}
    for method in methods:
        taken = [one for one in layers.values() if method in one]
        parameters = sum(one["shape"][0] * one["shape"][1] for one in taken)
        found[method] = {
            "layers": len(taken),
            "parameters_per_second": parameters / sum(one[method]["seconds"] for one in taken),
            "loss_against_nearest": statistics.geometric_mean(
                one[method]["lost"] / one["nearest"]["lost"] for one in taken
            ),
            "adaround_loss_against_it": statistics.geometric_mean(
                one["adaround"]["lost"] / one[method]["lost"] for one in taken
            ),
        }
    return found


def main() -> int:
    """Measure, print a line for each method, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="resnet20")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rows", type=int, default=512, help="patches to calibrate on, and as many to judge on")
    parser.add_argument("--python", default=sys.executable, help="a Python that has onnxsim")
    parser.add_argument("--layers", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.layers:
        print(json.dumps(measured(options.layers, options.bits)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.npz"
        np.savez(path, **layers_of(options.task, options.rows))  # type: ignore[arg-type]
        command = [options.python, __file__, "--layers", str(path), "--bits", str(options.bits)]
        starter = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {command[1:]!r}"
        run = subprocess.run(
            [options.python, "-c", f"{starter}; runpy.run_path({__file__!r}, run_name='__main__')"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    layers = json.loads(run.stdout.splitlines()[-1])
    methods = summary(layers)
    print(f"{'method':18}{'layers':>8}{'M parameters/s':>16}{'loss / nearest':>16}{'adaround / it':>16}")
    for method, one in methods.items():
        rate, loss, against = (
            one[key] for key in ("parameters_per_second", "loss_against_nearest", "adaround_loss_against_it")
        )
        print(f"{method:18}{one['layers']:8}{rate / 1e6:16.4f}{loss:16.3f}{against:16.3f}")
    if options.output:
        options.output.write_text(json.dumps({"methods": methods, "layers": layers}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
