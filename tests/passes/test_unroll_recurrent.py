"""`unroll-recurrent` against ONNX Runtime's LSTM, GRU and RNN, and what it leaves alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.session import open_session

STEPS, BATCH, INPUTS, HIDDEN = 3, 2, 4, 5
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ACTIVATIONS = {"LSTM": 3, "GRU": 2, "RNN": 1}
FLOAT = onnx.TensorProto.FLOAT


def layer(
    op_type: str,
    *,
    direction: str = "forward",
    steps: int = STEPS,
    with_bias: bool = True,
    initial: str = "",
    more: dict[int, np.ndarray] | None = None,
    **attributes: Any,
) -> ir.Model:
    """Return a model of one layer with all its outputs; `initial` is "input", "constant" or empty."""
    random = np.random.default_rng(1)
    count, gates = 2 if direction == "bidirectional" else 1, GATES[op_type]
    constants = {
        1: random.normal(size=(count, gates * HIDDEN, INPUTS)),
        2: random.normal(size=(count, gates * HIDDEN, HIDDEN)),
        **({3: random.normal(size=(count, 2 * gates * HIDDEN))} if with_bias else {}),
    }
    states = (5, 6) if op_type == "LSTM" else (5,)
    by_layout = (BATCH, count, HIDDEN) if attributes.get("layout") else (count, BATCH, HIDDEN)
    inputs = [("x", (BATCH, steps, INPUTS) if attributes.get("layout") else (steps, BATCH, INPUTS))]
    if initial == "input":
        inputs += [(f"i{place}", by_layout) for place in states]
    elif initial == "constant":
        constants |= {place: random.normal(size=by_layout) for place in states}
    constants |= more or {}
    named = {f"i{place}" for place in constants} | {name for name, _ in inputs}
    names = ["x", *(f"i{place}" if f"i{place}" in named else "" for place in range(1, 8))]
    outputs = ["y", "h", "c"][: len(states) + 1]
    while not names[-1]:
        names.pop()
    node = onnx.helper.make_node(op_type, names, outputs, hidden_size=HIDDEN, direction=direction, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs],
        [onnx.helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [
            onnx.numpy_helper.from_array(array.astype(np.float32) if array.dtype.kind == "f" else array, f"i{place}")
            for place, array in constants.items()
        ],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def run(model: ir.Model, feeds: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
    random = np.random.default_rng(2)
    feeds = feeds or {
        value.name: random.normal(size=value.shape.numpy()).astype(np.float32) for value in model.graph.inputs
    }
    return open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1).run(None, feeds)


def unrolled(model: ir.Model, text: str = "unroll-recurrent") -> Report:
    report = Pipeline.parse(text).run(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return report


def assert_same(before: list[np.ndarray], after: list[np.ndarray]) -> None:
    for one, other in zip(before, after, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(other, one, rtol=0, atol=5e-6 * max(1.0, np.abs(one).max()))


VARIANTS = [("LSTM", {}), ("RNN", {}), ("GRU", {"linear_before_reset": 0}), ("GRU", {"linear_before_reset": 1})]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op_type", "attributes"), VARIANTS)
def test_every_layer_in_every_direction(op_type: str, attributes: dict[str, int], direction: str):
    for initial, with_bias, steps in itertools.product(("", "constant", "input"), (False, True), (1, STEPS)):
        model = layer(op_type, direction=direction, initial=initial, with_bias=with_bias, steps=steps, **attributes)
        before = run(model)
        assert unrolled(model).changed == 1
        assert not {node.op_type for node in model.graph} & set(GATES)
        assert_same(before, run(model))
        assert unrolled(model).changed == 0


@pytest.mark.parametrize("name", ["Relu", "Softplus", "Softsign", "Elu", "HardSigmoid", "LeakyRelu"])
@pytest.mark.parametrize("op_type", list(GATES))
def test_activations_that_are_operators(op_type: str, name: str):
    count = ACTIVATIONS[op_type]
    names = [name, "Tanh", name][:count] + ["Tanh", name, "Sigmoid"][:count]
    model = layer(op_type, direction="bidirectional", initial="input", activations=names)
    before = run(model)
    assert unrolled(model).changed == 1
    assert_same(before, run(model))


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op_type", "attributes"), VARIANTS)
def test_batch_first(op_type: str, attributes: dict[str, int], direction: str):
    """ONNX Runtime runs the other layout only, so that its axes are swapped for the comparison."""
    options = {"direction": direction, "initial": "input", **attributes}
    steps_first, batch_first = layer(op_type, **options), layer(op_type, layout=1, **options)
    random = np.random.default_rng(2)
    shapes = {value.name: value.shape.numpy() for value in steps_first.graph.inputs}
    feeds = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    y, *states = run(steps_first, feeds)
    assert unrolled(batch_first).changed == 1
    after = run(batch_first, {name: np.swapaxes(array, 0, 1) for name, array in feeds.items()})
    assert_same([np.transpose(y, (2, 0, 1, 3)), *(np.swapaxes(state, 0, 1) for state in states)], after)


def test_equal_lengths_and_absent_peepholes_change_nothing():
    more = {4: np.full(BATCH, STEPS, np.int32), 7: np.zeros((1, 3 * HIDDEN), np.float32)}
    model = layer("LSTM", initial="constant", more=more)
    before = run(model)
    assert unrolled(model).changed == 1
    assert_same(before, run(model))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"more": {4: np.array([3, 2], np.int32)}}, "several lengths"),
        ({"more": {7: np.ones((1, 3 * HIDDEN), np.float32)}}, "peepholes"),
        ({"clip": 1.0}, "clips"),
        ({"input_forget": 1}, "coupled"),
        ({"activations": ["Sigmoid", "Affine", "Tanh"]}, "Affine"),
        ({"activations": ["HardSigmoid", "Tanh", "Tanh"], "activation_alpha": [0.3]}, "HardSigmoid"),
        ({"steps": 65}, "65 steps"),
    ],
)
def test_what_stays(options: dict[str, Any], reason: str):
    model = layer("LSTM", **options)
    report = unrolled(model)
    assert (report.changed, len(report.parts[0].skipped)) == (0, 1)
    assert reason in report.parts[0].skipped[0].reason


def test_the_option_allows_more_steps():
    assert unrolled(layer("RNN", steps=65), "unroll-recurrent{steps=65}").changed == 1


def test_computed_weights_and_an_old_opset_stay():
    model = layer("RNN")
    model.graph.initializers["i1"].const_value = None
    model.graph.inputs.append(model.graph.initializers.pop("i1"))
    assert "weights are computed" in Pipeline.parse("unroll-recurrent").run(model).parts[0].skipped[0].reason
    model = layer("RNN")
    model.graph.opset_imports[""] = 17
    assert "convert-opset" in Pipeline.parse("unroll-recurrent").run(model).parts[0].skipped[0].reason


def test_a_voice_detector_of_fixed_size(assets: Path):
    """Its layer goes on from a state that the caller keeps; a frame is one step."""
    path = assets / "silero_vad" / "silero_vad_16k_op15.onnx"
    model = qgraph.ir.load(path)
    random = np.random.default_rng(0)
    feeds = {
        "input": random.normal(size=(1, 576)).astype(np.float32),
        "state": random.normal(size=(2, 1, 128)).astype(np.float32),
        "sr": np.asarray(16000, np.int64),
    }
    for name in ("input", "state"):
        qgraph.ir.set_input_shape(model, name, feeds[name].shape)
    prepared = "inline-functions,lift-constants,convert-opset,fold-constants,infer-shapes"
    report = Pipeline.parse(f"{prepared},unroll-recurrent").run(model)
    assert report.parts[-1].changed == 1
    before = open_session(path.read_bytes(), optimise=False, threads=1).run(None, feeds)
    assert_same(before, run(model, feeds))
