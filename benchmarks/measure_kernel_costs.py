"""Measure what ONNX Runtime's kernels cost on this machine, and write the table that the `cpu-int8` target carries.

    python benchmarks/measure_kernel_costs.py [targets/cpu_costs.toml]

Small models of one kernel each are run on one thread under ONNX Runtime's profiler; the least time of several rounds
counts, so that what else the machine does matters little. A kernel's time is modelled as a sum of costs for each
start, output element, multiply-add and so on, fitted by least squares of relative errors with non-negative costs.
Takes half a minute.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import nnls

RUNS = 20
ROUNDS = 4
Features = dict[str, float]
Sample = tuple[float, Features]


class Writer:
    """Writes a small graph; every method returns the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def input(self, shape: Sequence[int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(f"x{len(self.inputs)}", TensorProto.FLOAT, shape))
        return self.inputs[-1].name

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, *shape: int) -> str:
        return self.constant(self.random.normal(size=shape).astype(np.float32))

    def op(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def quantized(self, x: str, zero_point: int = 128) -> str:
        ends = [self.constant(np.float32(0.05)), self.constant(np.uint8(zero_point))]
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *ends), *ends)

    def weight(self, *shape: int, axis: int) -> str:
        integers = self.constant(self.random.integers(-127, 128, shape).astype(np.int8))
        scale = self.constant(np.full(shape[axis], 0.01, np.float32))
        return self.op("DequantizeLinear", integers, scale, self.constant(np.zeros(shape[axis], np.int8)), axis=axis)

    def bias(self, size: int) -> str:
        scale = self.constant(np.full(size, 0.0005, np.float32))
        return self.op("DequantizeLinear", self.constant(np.arange(size, dtype=np.int32)), scale, axis=0)

    def profile(self, output: str, kernels: Sequence[str]) -> float:
        """Run the graph and return the least microseconds that the kernels of these operators took together."""
        graph = helper.make_graph(
            self.nodes, "g", self.inputs, [helper.make_empty_tensor_value_info(output)], self.constants
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        with tempfile.TemporaryDirectory() as folder:
            options = ort.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level, options.enable_profiling = 1, 4, True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = ort.InferenceSession(
                onnx.shape_inference.infer_shapes(model).SerializeToString(), options, ["CPUExecutionProvider"]
            )
            feeds = {
                value.name: self.random.normal(size=value.shape).astype(np.float32) for value in session.get_inputs()
            }
            for _ in range(RUNS):
                session.run(None, feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        times: dict[str, list[float]] = {}
        for event in events:
            timed = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
            if timed and event["args"]["op_name"] in kernels:
                times.setdefault(event["name"], []).append(event["dur"])
        if not times:
            raise SystemExit(f"{output}: ONNX Runtime ran none of {', '.join(kernels)}")
        return sum(min(one) for one in times.values())


def convolution(
    channels: int, filters: int, size: int, kernel: int = 3, stride: int = 1, group: int = 1, *, integer: bool
) -> Sample:
    """Measure a convolution with its activation, on an image of `size` x `size`."""
    writer = Writer()
    x = writer.input([1, channels, size, size])
    shape = (filters, channels // group, kernel, kernel)
    operands = [writer.quantized(x), writer.weight(*shape, axis=0), writer.bias(filters)] if integer else []
    operands = operands or [x, writer.normal(*shape), writer.normal(filters)]
    y = writer.op("Conv", *operands, pads=[kernel // 2] * 4, strides=[stride, stride], group=group)
    y = writer.op("Relu", y)
    if integer:
        y = writer.quantized(y, 0)
    pixels = -((-size // stride) ** 2)
    pixels = (-(-size // stride)) ** 2
    features = {
        "start": 1.0,
        "tap": pixels * kernel * kernel,
        "multiply_add": pixels * kernel * kernel * channels * filters / group,
        "output": pixels * filters,
    }
    return writer.profile(y, ["QLinearConv"] if integer else ["Conv", "FusedConv"]), features


def product(rows: int, inner: int, columns: int, how: str) -> Sample:
    """Measure a matrix product with a constant right operand, `how` being float, int8 or dynamic."""
    writer = Writer()
    x = writer.input([1, rows, inner])
    if how == "int8":
        y = writer.op("MatMul", writer.quantized(x), writer.weight(inner, columns, axis=1))
        kernels = ["MatMulIntegerToFloat"]
    elif how == "dynamic":
        integers = writer.op("DynamicQuantizeLinear", x)
        writer.nodes[-1].output.extend([f"{integers}_scale", f"{integers}_zero"])
        weight = writer.constant(writer.random.integers(-127, 128, (inner, columns)).astype(np.int8))
        y = writer.op("MatMulInteger", integers, weight, f"{integers}_zero")
        y = writer.op("Cast", y, to=TensorProto.FLOAT)
        factor = writer.op("Mul", f"{integers}_scale", writer.normal(columns))
        y = writer.op("Mul", y, factor)
        kernels = ["DynamicQuantizeMatMul"]
    else:
        y = writer.op("MatMul", x, writer.normal(inner, columns))
        kernels = ["MatMul"]
    features = {
        "start": 1.0,
        "multiply_add": rows * inner * columns,
        "weight": inner * columns,
        "input": rows * inner,
        "output": rows * columns,
    }
    return writer.profile(y, kernels), features


def element_wise(kernels: Sequence[str], size: int, build: Callable[[Writer, str], str], channels: int = 64) -> Sample:
    """Measure an operator on an activation of [1, channels, size, size]."""
    writer = Writer()
    x = writer.input([1, channels, size, size])
    return writer.profile(build(writer, x), kernels), {"start": 1.0, "element": channels * size * size}


def unary(op_type: str, *, integer: bool, **attributes: object) -> Callable[[Writer, str], str]:
    def build(writer: Writer, x: str) -> str:
        y = writer.op(op_type, writer.quantized(x) if integer else x, **attributes)
        return writer.quantized(y) if integer else y

    return build


def binary(op_type: str, *, integer: bool) -> Callable[[Writer, str], str]:
    def build(writer: Writer, x: str) -> str:
        other = writer.op("Neg", x)
        operands = [writer.quantized(one) if integer else one for one in (x, other)]
        y = writer.op(op_type, *operands)
        return writer.quantized(y) if integer else y

    return build


def max_pool(channels: int, size: int, kernel: int, *, integer: bool) -> Sample:
    """Measure a MaxPool of stride 2; in integers, one whose input does not come from an integer convolution."""
    writer = Writer()
    x = writer.input([1, channels, size, size])
    window = {"kernel_shape": [kernel, kernel], "strides": [2, 2], "pads": [0, 0, kernel - 2, kernel - 2]}
    y = writer.op("MaxPool", writer.quantized(x) if integer else x, **window)
    y = writer.quantized(y) if integer else y
    features = {"start": 1.0, "tap": channels * (size // 2) ** 2 * kernel**2}
    return writer.profile(y, ["MaxPool"]), features


def reordered(writer: Writer, x: str) -> str:
    return writer.op("Conv", x, writer.normal(64, 64, 1, 1))


ALIGNED = [(16, 16, 56), (32, 32, 56), (64, 64, 56), (128, 128, 28), (256, 256, 14), (24, 96, 28), (96, 24, 28)]
FIRST = [(3, 32, 112), (3, 16, 32), (1, 16, 28), (3, 64, 112), (3, 24, 160), (8, 16, 14)]
PLAIN = [(22, 32, 28), (30, 64, 28), (58, 58, 28), (34, 30, 14), (50, 100, 14)]
CHANNELS = [(16, 56), (32, 56), (64, 28), (128, 28), (256, 14), (512, 7)]
ODD_CHANNELS = [(24, 56), (40, 28), (56, 28), (72, 28), (116, 14), (200, 7)]
SIZES = (8, 28, 56, 112)


def _convolutions(name: str, shapes: Sequence[tuple[int, int, int]], *, integer: bool) -> Iterator[tuple[str, Sample]]:
    for channels, filters, size in shapes:
        for kernel in (1, 3, 5):
            yield name, convolution(channels, filters, size, kernel, integer=integer)
        yield name, convolution(channels, filters, size, 3, 2, integer=integer)


def _groups(name: str, shapes: Sequence[tuple[int, int]], *, integer: bool) -> Iterator[tuple[str, Sample]]:
    for channels, size in shapes:
        for kernel in (3, 5):
            yield name, convolution(channels, channels, size, kernel, group=channels, integer=integer)


def samples() -> Iterator[tuple[str, Sample]]:
    """Yield the kernel's name in the table and a measurement."""
    for integer, suffix in ((False, "float"), (True, "int8")):
        yield from _convolutions(f"convolution-{suffix}", ALIGNED, integer=integer)
        yield from _convolutions(f"first-convolution-{suffix}", FIRST, integer=integer)
        yield from _convolutions(f"odd-convolution-{suffix}", PLAIN, integer=integer)
        yield from _groups(f"depthwise-{suffix}", CHANNELS, integer=integer)
        yield from _groups(f"odd-depthwise-{suffix}", ODD_CHANNELS, integer=integer)
        for channels, group, size in ((64, 4, 28), (128, 32, 14), (64, 2, 28), (96, 3, 14)):
            shape = (channels, channels, size, 3, 1, group)
            yield f"grouped-{suffix}", convolution(*shape, integer=integer)
        for channels, size, kernel in ((64, 56, 3), (24, 112, 3), (64, 28, 2), (256, 14, 3)):
            yield f"max-pool-{suffix}", max_pool(channels, size, kernel, integer=integer)
    for how in ("float", "int8", "dynamic"):
        for rows, inner, columns in ((1, 256, 256), (1, 1024, 1024), (16, 384, 384), (128, 384, 1536), (64, 768, 768)):
            yield f"product-{how}", product(rows, inner, columns, how)
    for size in SIZES:
        yield from _element_wise(size)


def _element_wise(size: int) -> Iterator[tuple[str, Sample]]:
    pool = {"kernel_shape": [2, 2], "strides": [1, 1], "pads": [0, 0, 1, 1]}
    yield "quantize", element_wise(["QuantizeLinear"], size, lambda writer, x: writer.quantized(x))
    yield "dequantize", element_wise(["DequantizeLinear"], size, lambda writer, x: writer.quantized(x))
    yield "arithmetic-int8", element_wise(["QLinearAdd"], size, binary("Add", integer=True))
    yield "arithmetic-float", element_wise(["Add"], size, binary("Add", integer=False))
    yield "lookup-int8", element_wise(["QLinearSigmoid"], size, unary("Sigmoid", integer=True))
    yield "lookup-float", element_wise(["Sigmoid"], size, unary("Sigmoid", integer=False))
    yield "pool-int8", element_wise(["QLinearAveragePool"], size, unary("AveragePool", integer=True, **pool))
    yield "pool-float", element_wise(["AveragePool"], size, unary("AveragePool", integer=False, **pool))
    yield "transpose-int8", element_wise(["Transpose"], size, unary("Transpose", integer=True, perm=[0, 2, 3, 1]))
    yield "transpose-float", element_wise(["Transpose"], size, unary("Transpose", integer=False, perm=[0, 2, 3, 1]))
    yield "reorder", element_wise(["ReorderOutput"], size, reordered)


def fit(measured: Sequence[Sample]) -> tuple[dict[str, float], float]:
    """Return nanoseconds for each feature, and the median relative error of the model."""
    names = list(measured[0][1])
    times = np.array([1e3 * time for time, _ in measured])
    matrix = np.array([[features[name] for name in names] for _, features in measured]) / times[:, None]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    costs = nnls(matrix / scale, np.ones(len(times)))[0] / scale
    error = float(np.median(np.abs(matrix @ costs - 1)))
    return {name: float(f"{cost:.4g}") for name, cost in zip(names, costs, strict=True)}, error


def to_toml(costs: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        "# Nanoseconds of ONNX Runtime's kernels on one thread, by what they are made of.",
        "# Written by benchmarks/measure_kernel_costs.py; see there what is measured.",
        f'machine = "{_processor()}"',
        f'onnxruntime = "{ort.__version__}"',
    ]
    for kernel, parts in costs.items():
        lines += ["", f"[{kernel}]", *(f"{name} = {value!r}" for name, value in parts.items())]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    default = Path(__file__).resolve().parent.parent / "targets" / "cpu_costs.toml"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=default)
    output: Path = parser.parse_args().output
    rounds = [list(samples()) for _ in range(ROUNDS)]
    measured: dict[str, list[Sample]] = {}
    for same in zip(*rounds, strict=True):
        kernel, (_, features) = same[0]
        measured.setdefault(kernel, []).append((min(time for _, (time, _) in same), features))
    costs = {}
    for kernel, found in measured.items():
        costs[kernel], error = fit(found)
        print(f"{kernel:26} {len(found):3} measurements, median error {error:4.0%}  {costs[kernel]}")
    output.write_text(to_toml(costs), encoding="utf-8")


if __name__ == "__main__":
    main()
