"""Small float graphs as text, made integer, and the ways in which what comes out is run and compared."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from golden_rewrites import is_after, structure, what_to_do

from qgraph.pipeline import Context, Pipeline, Report
from qgraph.runtime.reference import ReferenceSession

Feeds = dict[str, np.ndarray]
PREPARE = "lift-constants,fold-constants,infer-shapes"


def graph(text: str, opset: int = 21, seed: int = 0) -> ir.Model:
    """Read a model, or a graph `(inputs) => (outputs) { nodes }`, whose constants are its inputs not named x, i or c.

    w: a weight, normal, its rows of length 1; b: normal; p: between 0.5 and 2; k: one number between -2 and 2.
    """
    head = "" if text.startswith("<") else f'<ir_version: 10, opset_import: ["" : {opset}]>\ng '
    proto = onnx.parser.parse_model(head + text)
    random = np.random.default_rng(seed)
    for value in list(proto.graph.input):
        if value.name[0] in "xic":
            continue
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = {
            "w": lambda shape=shape: random.normal(size=shape) / np.sqrt(max(np.prod(shape[1:]), 1)),
            "b": lambda shape=shape: random.normal(size=shape),
            "p": lambda shape=shape: random.uniform(0.5, 2.0, shape),
            "k": lambda shape=shape: random.uniform(-2.0, 2.0, shape),
        }[value.name[0]]()
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, np.float32), value.name))
        proto.graph.input.remove(value)
    model = ir.from_proto(proto)
    Pipeline.parse(PREPARE).run(model)
    return model


def feeds(model: ir.Model, seed: int, batch: int = 2) -> Feeds:
    """Return random inputs: normal, positive where the name begins with xp, integers up to 2, truth values.

    A size named N is `batch`, another that is not known 5.
    """
    random = np.random.default_rng(seed)

    def array(value: ir.Value) -> np.ndarray:
        assert value.shape is not None
        shape = [dim if isinstance(dim, int) else batch if dim.value == "N" else 5 for dim in value.shape]
        if value.dtype is ir.DataType.BOOL:
            truth = random.integers(0, 2, shape).astype(bool)
            truth[..., 0] = True  # no row is masked as a whole
            return truth
        if value.dtype in (ir.DataType.INT32, ir.DataType.INT64):
            return random.integers(0, 3, shape).astype(value.dtype.numpy())
        numbers = random.normal(size=shape)
        return (np.abs(numbers) + 0.1 if str(value.name).startswith("xp") else numbers).astype(np.float32)

    return {str(value.name): array(value) for value in model.graph.inputs}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A graph in three forms, and the reports of the passes that made the second and the third."""

    floating: ir.Model
    quantized: ir.Model
    integer: ir.Model
    reports: Sequence[Report]

    @property
    def notes(self) -> list[str]:
        return [note for report in self.reports for part in report.parts for note in part.notes]


def compiled(model: ir.Model, options: str = "", rounding: str = "half-up", count: int = 4) -> Compiled:
    """Quantize a graph with `full-qdq{options}` on random samples, and write it in integers."""
    samples = [feeds(model, seed) for seed in range(count)]
    quantized = model.clone()
    one = Pipeline.parse(f"full-qdq{{{options}}}").run(quantized, calibration=samples, context=Context(threads=1))
    integer = quantized.clone()
    other = Pipeline.parse(f"integer-requantize{{rounding={rounding}}}").run(integer)
    return Compiled(model, quantized, integer, (one, other))


def in_onnxruntime(model: ir.Model, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a model as it stands, without the runtime's own rewriting."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))


def assert_reference_agrees(model: ir.Model, inputs: Mapping[str, np.ndarray], label: str = "") -> list[np.ndarray]:
    """Run a model in ONNX Runtime and by the definitions, compare to the bit, and return the outputs."""
    found = in_onnxruntime(model, inputs)
    for value, one, other in zip(model.graph.outputs, found, ReferenceSession(model).run(None, inputs), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), f"{label} {value.name}"
        np.testing.assert_array_equal(one, other, err_msg=f"{label} {value.name}")
    return found


def output_scale(value: ir.Value) -> float:
    """Return the scale of the integers behind an output, or 1 where it is of integers."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return 1.0
    scale = node.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    return float(scale.const_value.numpy().item())


def steps_apart(one: Compiled, inputs: Mapping[str, np.ndarray]) -> float:
    """Return by how many steps of an output's scale the integer graph is off the quantized one, at most."""
    expected = in_onnxruntime(one.quantized, inputs)
    found = assert_reference_agrees(one.integer, inputs)
    steps = [0.0]
    for value, a, b in zip(one.integer.graph.outputs, found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), value.name
        if a.size:
            off = np.abs(a.astype(np.float64) - b.astype(np.float64))
            steps.append(float(off.max()) / output_scale(value))
    return max(steps)


def check_golden(path: Path, default: str) -> tuple[ir.Model, Report]:
    """Compare with a golden file: the model before, `---`, its text after, without constants and function bodies.

    A first line `# ...` gives the pipeline. QGRAPH_UPDATE_GOLDEN=1 writes the second part anew. A second run of the
    pipeline must change nothing.
    """
    pipeline, source = what_to_do(path, default)
    model = graph(source)
    samples = [feeds(model, seed) for seed in range(4)]
    report = Pipeline.parse(pipeline).run(model, calibration=samples, context=Context(threads=1))
    bare = model.clone()
    bare.functions.clear()
    # The last digits follow the processor's floats.
    is_after(path, re.sub(r'"\d{6,}_(int\d+)"', r'"number_\1"', structure(bare)))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    again = Pipeline.parse(pipeline).run(model, calibration=samples, context=Context(threads=1))
    assert all(part.changed == 0 for part in again.parts)
    assert ir.to_proto(model) == proto
    return model, report
