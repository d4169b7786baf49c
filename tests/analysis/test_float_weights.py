"""Weights in float for runs that only watch: what ONNX Runtime dequantizes, computed once, and where it is left be."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.analysis.float_weights import in_float
from qgraph.analysis.probes import Probe, raw_outputs
from qgraph.lazy_tensors import joint_tensors
from qgraph.pipeline import Context, Pipeline

ROOM = 1 << 20


def network(passes: str, *, transposed: bool = False, wide: int = 1) -> ir.Model:
    """Return x [n, 32] -> y [n, 12], two products, behind some passes; `wide` times as wide."""
    random = np.random.default_rng(3)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 32]))
    weights = [random.standard_normal(shape).astype(np.float32) for shape in ((32, 64 * wide), (64 * wide, 12 * wide))]
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g")
    value = x
    for number, weight in enumerate(weights):
        stored = qgraph.ir.initializer(graph, f"w{number}", weight.T.copy() if transposed else weight)
        attributes = {"transB": 1} if transposed else {}
        node = ir.node("Gemm" if transposed else "MatMul", [value, stored], attributes, name=f"product{number}")
        graph.append(node)
        value = node.outputs[0]
        value.name, value.type = f"h{number}", ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape(["n", 12 * wide])
    graph.outputs.append(value)
    model = ir.Model(graph, ir_version=10)
    Pipeline.parse(passes).run(model, context=Context())
    return model


def weights_of(model: ir.Model, names: list[str]) -> list[np.ndarray]:
    feed = {"x": np.zeros((1, 32), np.float32)}
    return Probe(model, raw_outputs(names), frozenset(feed), threads=1, optimise=False).run(feed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "passes",
    [
        "rtn{bits=8,group=0,min_elements=1}",
        "rtn{bits=8,group=16,min_elements=1}",
        "rtn{bits=4,group=16,min_elements=1}",
        "rtn{bits=4,group=16,min_elements=1,symmetric=false}",
    ],
)
def test_the_floats_are_those_that_the_runtime_computes(passes: str, transposed: bool) -> None:
    model = network(passes, transposed=transposed)
    names = [str(node.outputs[0].name) for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(names) == 2
    plain = in_float(model, ROOM)
    assert not any(node.op_type == "DequantizeLinear" for node in plain.model.graph)
    for name, before, after in zip(names, weights_of(model, names), weights_of(plain.model, names), strict=True):
        np.testing.assert_array_equal(before, after)
        assert plain.ranges[name] == (before.min(), before.max())


def test_the_model_itself_stays_as_it_is() -> None:
    model = network("rtn{bits=4,group=16,min_elements=1}")
    text = ir.to_onnx_text(model)
    assert in_float(model, ROOM).model is not model
    assert ir.to_onnx_text(model) == text


@pytest.mark.parametrize(
    ("passes", "room"),
    [("remove-unused", ROOM), ("rtn{bits=4,group=16,min_elements=1}", 4 * (32 * 64 + 64 * 12) - 1)],
    ids=["nothing compressed", "no room"],
)
def test_a_model_is_left_be(passes: str, room: int) -> None:
    model = network(passes)
    assert in_float(model, room) == (model, {})


def test_integer_kernels_are_left_be() -> None:
    model = network("rtn{bits=8,group=0,min_elements=1}")
    scale = qgraph.ir.initializer(model.graph, "s", np.array(0.1, np.float32))
    quantize = ir.node("QuantizeLinear", [model.graph.inputs[0], scale])
    model.graph.insert_before(model.graph.node(0), quantize)
    assert in_float(model, ROOM).model is model


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_computed_together_is_computed_once(bits: int) -> None:
    model = network(f"rtn{{bits={bits},group=16,min_elements=1,symmetric=false}}", wide=16)
    calls: list[str] = []
    for node in model.graph:
        if node.op_type != "DequantizeLinear":
            continue
        values = [value for value in node.inputs if value is not None]
        stored = [ir.tensor(value.const_value.numpy(), dtype=value.dtype) for value in values]  # type: ignore[union-attr]
        name = str(node.outputs[0].name)
        specs = [(one.dtype, one.shape.numpy()) for one in stored]
        joint = joint_tensors(lambda stored=stored, name=name: calls.append(name) or stored, specs)  # type: ignore[misc]
        for value, tensor in zip(values, joint, strict=True):
            tensor.name = value.name
            value.const_value = tensor
    in_float(model, ROOM)
    assert len(calls) == len(set(calls)) == 2
    calls.clear()
    Probe(model, raw_outputs(["h1"]), frozenset(["x"]), threads=1)
    assert len(calls) == len(set(calls)) == 2
