"""Quantization of everything, and the integer graph behind it, on models at the edge of what ONNX allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnx.helper import make_node, make_tensor_value_info

import qgraph.ir
from qgraph.passes._requantize_writer import Writer
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.reference import ReferenceSession
from qgraph.runtime.session import open_session

FLOAT, INT64, BOOL, DOUBLE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.DOUBLE
FULL = "infer-shapes,full-qdq"
Feeds = list[dict[str, np.ndarray]]


def make(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    outputs: Sequence[tuple[str, int]],
    constants: Mapping[str, Any] | None = None,
    opset: int = 21,
) -> ir.Model:
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [make_tensor_value_info(name, kind, None) for name, kind in outputs],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10))


def normal(*shape: int, seed: int = 0, count: int = 8, name: str = "x") -> Feeds:
    random = np.random.default_rng(seed)
    return [{name: random.normal(size=shape).astype(np.float32)} for _ in range(count)]


def run(model: ir.Model, feeds: Feeds) -> list[list[np.ndarray]]:
    session = open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1)
    return [session.run(None, feed) for feed in feeds]


def sqnr(exact: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    power, noise = (
        sum(float(np.sum(np.square(one, dtype=np.float64))) for one in arrays)
        for arrays in (exact, [a - b for a, b in zip(exact, other, strict=True)])
    )
    return 10 * float(np.log10(power / noise)) if noise else np.inf


def integers(model: ir.Model, feeds: Feeds, quantize: str = FULL) -> tuple[ir.Model, Report]:
    """Return the integer graph, which keeps the interface and computes in ONNX Runtime what the reference computes."""
    names = [[value.name for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    whole = model.clone()
    Pipeline.parse(quantize).run(whole, calibration=feeds)
    report = Pipeline.parse("integer-requantize,merge-duplicates,remove-unused").run(whole, calibration=feeds)
    assert [[value.name for value in values] for values in (whole.graph.inputs, whole.graph.outputs)] == names
    onnx.checker.check_model(ir.to_proto(whole), full_check=True)
    if not report.skipped:
        reference = ReferenceSession(whole)
        for feed, arrays in zip(feeds, run(whole, feeds), strict=True):
            for one, other in zip(reference.run(None, feed), arrays, strict=True):
                np.testing.assert_array_equal(one, other)
    return whole, report


def assert_near(model: ir.Model, feeds: Feeds, least: float, quantize: str = FULL) -> None:
    whole, report = integers(model, feeds, quantize)
    assert not report.skipped
    exact, found = run(model, feeds), run(whole, feeds)
    for index in range(len(exact[0])):
        assert sqnr([one[index] for one in exact], [one[index] for one in found]) > least


# --- interface --------------------------------------------------------------------------------------------------------


def test_outputs_of_integers_keep_name_and_shape():
    nodes = [make_node("MatMul", ["x", "w"], ["s"]), make_node("ArgMax", ["s"], ["class"], axis=1)]
    weight = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    model = make(nodes, {"x": (FLOAT, [2, 3])}, [("class", INT64)], {"w": weight})
    whole, _ = integers(model, normal(2, 3))
    assert list(whole.graph.outputs[0].shape) == [2, 1]


def test_a_truth_value_is_output_and_inside_functions():
    nodes = [
        make_node("Greater", ["x", "limit"], ["test"]),
        make_node("Where", ["test", "x", "other"], ["y"]),
        make_node("Where", ["test", "u", "x"], ["z"]),
    ]
    model = make(
        nodes,
        {"x": (FLOAT, [4]), "u": (FLOAT, [4])},
        [("test", BOOL), ("y", FLOAT), ("z", FLOAT)],
        {"limit": np.float32(0.3), "other": np.float32(-2)},
    )
    feeds = [{**one, **other} for one, other in zip(normal(4), normal(4, seed=1, name="u"), strict=True)]
    whole, report = integers(model, feeds)
    assert not report.skipped
    assert sqnr([one[2] for one in run(model, feeds)], [one[2] for one in run(whole, feeds)]) > 30


def test_an_input_that_is_an_output_too():
    model = make([make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [2, 3])}, [("y", FLOAT), ("x", FLOAT)])
    model.graph.inputs[0].shape = ir.Shape([2, 3])
    assert_near(model, normal(2, 3), 40)


def test_an_output_listed_twice():
    model = make([make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [2, 3])}, [("y", FLOAT)])
    model.graph.outputs.append(model.graph.outputs[0])
    Pipeline.parse(FULL + ",integer-requantize").run(model, calibration=normal(2, 3))
    assert [value.name for value in model.graph.outputs] == ["y", "y"]


def test_functions_are_written_in_the_opset_of_the_model():
    model = make([make_node("Softmax", ["x"], ["y"])], {"x": (FLOAT, [2, 3])}, [("y", FLOAT)], opset=23)
    assert_near(model, normal(2, 3), 40)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [-np.inf, -3.4e38, -1e9, -65504.0, -1e4])
@pytest.mark.parametrize("kind", ["Where", "Add"])
def test_masks_before_a_softmax(mask: float, kind: str):
    seen = np.tril(np.ones((4, 4), bool))
    constants: dict[str, Any] = {"w": np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)}
    if kind == "Where":
        constants |= {"seen": seen, "mask": np.float32(mask)}
        masked = make_node("Where", ["seen", "scores", "mask"], ["masked"])
    else:
        constants |= {"mask": np.where(seen, 0, mask).astype(np.float32)}
        masked = make_node("Add", ["scores", "mask"], ["masked"])
    nodes = [make_node("MatMul", ["x", "w"], ["scores"]), masked, make_node("Softmax", ["masked"], ["y"])]
    assert_near(make(nodes, {"x": (FLOAT, [4, 4])}, [("y", FLOAT)], constants), normal(4, 4), 32)


def test_the_bias_of_a_channel_without_weights():
    weight = np.random.default_rng(1).normal(size=(3, 2, 3, 3)).astype(np.float32) / 100
    weight[1] = 0
    nodes = [make_node("Conv", ["x", "w", "b"], ["h"]), make_node("Conv", ["h", "v"], ["y"])]
    constants = {
        "w": weight,
        "b": np.array([0.001, 0.011, -0.001], np.float32),
        "v": np.array([0.01, 1, 0.01], np.float32).reshape(1, 3, 1, 1),
    }
    assert_near(make(nodes, {"x": (FLOAT, [1, 2, 5, 5])}, [("y", FLOAT)], constants), normal(1, 2, 5, 5), 30)


def test_what_is_zero_in_calibration_does_not_drown_what_it_is_added_to():
    model = make([make_node("Add", ["x", "u"], ["y"])], {"x": (FLOAT, [3]), "u": (FLOAT, [3])}, [("y", FLOAT)])
    feeds = [{"x": np.zeros(3, np.float32), "u": one["u"] / np.float32(100)} for one in normal(3, name="u")]
    assert_near(model, feeds, 60)


def test_sums_of_scales_far_apart_are_cut_off_where_the_result_is():
    """x reaches far beyond what the result holds: its integers saturate there, and those of u still count."""
    nodes = [
        make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
        make_node("DequantizeLinear", ["xq", "one", "zero"], ["xr"]),
        make_node("QuantizeLinear", ["u", "fine", "zero"], ["uq"]),
        make_node("DequantizeLinear", ["uq", "fine", "zero"], ["ur"]),
        make_node("Add", ["xr", "ur"], ["s"]),
        make_node("QuantizeLinear", ["s", "fine", "zero"], ["sq"]),
        make_node("DequantizeLinear", ["sq", "fine", "zero"], ["y"]),
    ]
    constants = {"one": np.float32(1), "fine": np.float32(1e-6), "zero": np.int16(0)}
    model = make(nodes, {"x": (FLOAT, [4]), "u": (FLOAT, [4])}, [("y", FLOAT)], constants)
    x = np.array([0, 1, -3, 20000], np.float32)
    feeds = [{"x": x, "u": one["u"] / np.float32(100)} for one in normal(4, name="u")]
    assert_near(model, feeds, 60, "infer-shapes")


def test_bounds_that_are_no_numbers_bound_nothing():
    nodes = [make_node("MatMul", ["x", "w"], ["h"]), make_node("Clip", ["h", "", "most"], ["y"])]
    weight = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    constants = {"w": weight, "most": np.float32(np.nan)}
    model = make(nodes, {"x": (FLOAT, [2, 3])}, [("y", FLOAT)], constants)
    assert_near(model, normal(2, 3), 30)


# --- what comes quantized ---------------------------------------------------------------------------------------------


def test_the_graph_of_qdq_with_a_bias_of_scales_of_its_own():
    random = np.random.default_rng(1)
    nodes = [
        make_node("Conv", ["x", "w", "b"], ["h"]),
        make_node("Relu", ["h"], ["r"]),
        make_node("Conv", ["r", "w2", "b2"], ["y"]),
    ]
    constants = {
        name: random.normal(size=shape).astype(np.float32)
        for name, shape in {"w": (3, 2, 3, 3), "b": (3,), "w2": (4, 3, 1, 1), "b2": (4,)}.items()
    }
    model = make(nodes, {"x": (FLOAT, [1, 2, 5, 5])}, [("y", FLOAT)], constants)
    whole, _ = integers(model, normal(1, 2, 5, 5), "infer-shapes,qdq{per_channel=true}")
    assert sum(node.op_type == "ConvInteger" for node in whole.graph) == 2


def test_stored_numbers_with_a_scale_for_each_channel():
    nodes = [
        make_node("DequantizeLinear", ["codes", "scale", "zero"], ["real"], axis=1),
        make_node("Add", ["x", "real"], ["y"]),
    ]
    codes = np.arange(6, dtype=np.int8).reshape(2, 3)
    constants = {"codes": codes, "scale": np.array([1, 2, 4], np.float32), "zero": np.array([0, 1, 2], np.int8)}
    model = make(nodes, {"x": (FLOAT, [2, 3])}, [("y", FLOAT)], constants)
    real = next(value for node in model.graph for value in node.outputs if value.name == "real")
    np.testing.assert_array_equal(Writer(model, "half-up").real(real), [[0, 0, 0], [3, 6, 12]])


def test_wide_integers_with_a_zero_point_stay_in_float():
    nodes = [
        make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        make_node("DequantizeLinear", ["q", "s", "z"], ["r"]),
        make_node("Tanh", ["r"], ["t"]),
        make_node("QuantizeLinear", ["t", "s", "z"], ["tq"]),
        make_node("DequantizeLinear", ["tq", "s", "z"], ["y"]),
    ]
    constants = {"s": np.float32(1e-4), "z": np.int16(-3000)}
    model = make(nodes, {"x": (FLOAT, [4])}, [("y", FLOAT)], constants)
    _, report = integers(model, normal(4), "infer-shapes")
    assert "'t' is quantized to int16 with a zero point" in report.skipped[0].reason


def test_other_floats_stay_as_they_are():
    nodes = [
        make_node("Cast", ["x"], ["d"], to=DOUBLE),
        make_node("MatMul", ["d", "w"], ["e"]),
        make_node("Cast", ["e"], ["c"], to=FLOAT),
        make_node("Relu", ["c"], ["y"]),
    ]
    model = make(nodes, {"x": (FLOAT, [2, 3])}, [("y", FLOAT)], {"w": np.ones((3, 4))})
    whole, report = integers(model, normal(2, 3))
    assert {one.reason for one in report.skipped} == {"it computes in double: only float32 has an integer form"}
    assert sqnr([one[0] for one in run(model, normal(2, 3))], [one[0] for one in run(whole, normal(2, 3))]) > 30


def test_products_with_a_vector_and_something_behind_them():
    nodes = [make_node("MatMul", ["x", "w"], ["h"]), make_node("Add", ["h", "b"], ["y"])]
    constants = {"w": np.ones(3, np.float32), "b": np.arange(2, dtype=np.float32)}
    model = make(nodes, {"x": (FLOAT, [2, 3])}, [("y", FLOAT)], constants)
    _, report = integers(model, normal(2, 3))
    assert {one.reason for one in report.skipped} == {"its weight is a vector: write it as a matrix"}


def test_the_reference_convolves_an_empty_batch():
    nodes = [make_node("Conv", ["x", "w"], ["y"])]
    model = make(nodes, {"x": (FLOAT, ["batch", 2, 5, 5])}, [("y", FLOAT)], {"w": np.ones((3, 2, 3, 3), np.float32)})
    whole, _ = integers(model, normal(1, 2, 5, 5))
    empty = ReferenceSession(whole).run(None, {"x": np.zeros((0, 2, 5, 5), np.float32)})
    assert empty[0].shape == (0, 3, 3, 3)
    assert all(qgraph.ir.node_label(node) for node in whole.graph)
