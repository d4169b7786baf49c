"""What the tests of the passes to 16 bits share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from golden_rewrites import as_written

from qgraph.pipeline import Pass, Pipeline, Report
from qgraph.runtime.session import open_session

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
Feeds = dict[str, np.ndarray]


def model_of(text: str, *, opset: int = 21, **weights: np.ndarray) -> ir.Model:
    """Return the model of a graph in text form; `weights` fill its initializers."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for name, array in weights.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
    return model


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convert(one: Pass, model: ir.Model, feeds: list[Feeds] | None = None) -> Report:
    """Run a pass once, and again to see that it changes nothing more."""
    report = Pipeline([one]).run(model, calibration=feeds).parts[0]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    text = ir.to_onnx_text(model)
    assert Pipeline([one]).run(model, calibration=feeds).changed == 0
    assert ir.to_onnx_text(model) == text
    return report


def check_golden(one: Pass, case: str) -> None:
    as_written(GOLDEN / one.name / f"{case}.onnxtxt", lambda model: convert(one, model))


def run(model: ir.Model, feeds: Feeds) -> list[np.ndarray]:
    # As it is written: ONNX Runtime's own optimisation would widen what a CPU has no kernels for.
    return open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1).run(None, feeds)


def left(report: Report) -> dict[str, str]:
    return {one.node: one.reason for one in report.skipped}


def emulated(model: ir.Model) -> ir.Model:
    """Return a model in float32 that rounds to bfloat16 whatever `model` makes in bfloat16.

    A CPU has Casts of bfloat16, and hardly anything else.
    """
    model = model.clone()
    float32, bfloat16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16
    for value in model.graph.initializers.values():
        if value.dtype == bfloat16:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(float32)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == bfloat16:
            value.type = ir.TensorType(float32)
    for node in list(model.graph):
        if node.op_type == "Cast" and node.attributes.get_int("to") == bfloat16:
            node.attributes["to"] = ir.AttrInt64("to", int(float32))
        if node.op_type == "ConstantOfShape" and node.outputs[0].dtype == bfloat16:
            array = node.attributes["value"].as_tensor().numpy().astype(np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
        for value in node.outputs:
            if value.dtype == bfloat16:
                _round_after(model.graph, node, value)
    return model


def _round_after(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    narrow = ir.node("Cast", [value], {"to": int(ir.DataType.BFLOAT16)})
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    value.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(node, [narrow, wide])
    value.replace_all_uses_with(wide.outputs[0], replace_graph_outputs=True)
    narrow.replace_input_with(0, value)
    if wide.outputs[0].is_graph_output():
        wide.outputs[0].name, value.name = value.name, f"{value.name}_exact"
        wide.outputs[0].type, wide.outputs[0].shape = value.type, value.shape


def sqnr_db(exact: np.ndarray, found: np.ndarray) -> float:
    exact, found = exact.astype(np.float64), found.astype(np.float64)
    return float(10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum()))
