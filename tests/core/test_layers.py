"""What the page shows of the inside: histograms against the tensors, ranges against the artifact's scales."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph
import qgraph.ir
from qgraph import stages
from qgraph.report import layers, stored_weights
from qgraph.report.layers import LayerFacts, Picture, adds_error, few, look_inside, worst_first
from qgraph.report.stored_weights import layer_of, stored_weight
from qgraph.runtime.difference import TensorError
from qgraph.runtime.session import open_session

RANDOM = np.random.default_rng(0)
W1 = RANDOM.normal(0, 0.2, (64, 96)).astype(np.float32)
W2 = RANDOM.normal(0, 0.2, (96, 64)).astype(np.float32)
FEEDS = [{"x": RANDOM.normal(size=(32, 64)).astype(np.float32)} for _ in range(12)]


def two_layers() -> ir.Model:
    """x [N, 64] -> MatMul, bias, Relu -> MatMul -> y."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 64]))
    bias = RANDOM.normal(0, 0.1, 96).astype(np.float32)
    arrays = (("w1", W1), ("b1", bias), ("w2", W2))
    weights = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays]
    first = ir.node("MatMul", [x, weights[0]], name="first")
    shifted = ir.node("Add", [first.outputs[0], weights[1]], name="shift")
    active = ir.node("Relu", [shifted.outputs[0]], name="relu")
    second = ir.node("MatMul", [active.outputs[0], weights[2]], name="second")
    for node, name in ((first, "f"), (shifted, "s"), (active, "h"), (second, "y")):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
    second.outputs[0].shape = ir.Shape(["N", 64])
    graph = ir.Graph(
        [x], [second.outputs[0]], nodes=[first, shifted, active, second], initializers=weights,
        opset_imports={"": 21}, name="two",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layers") / "two.onnx"
    ir.save(two_layers(), path)
    return path


def compiled(source: Path, target: str, passes: str, tmp_path: Path) -> Path:
    return qgraph.compile(
        source, target, passes=passes, calibration=FEEDS, output=tmp_path / target
    ).path  # fmt: skip


def values_of(path: Path, name: str, feeds) -> np.ndarray:
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = open_session(model.SerializeToString(), threads=1)
    return np.concatenate([session.run(None, feed)[0].ravel() for feed in feeds])


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


def test_activations_in_their_range(source: Path, tmp_path: Path):
    artifact = compiled(source, "cpu-int8", "qdq", tmp_path)
    # Reaches farther than what was calibrated on.
    feeds = [{"x": feed["x"] * np.float32(1.5)} for feed in FEEDS[:3]]
    facts = look_inside(source, artifact, feeds, threads=1)
    assert facts.samples == 3
    (picture,) = (one for one in facts.pictures if one.tensor == "h" and one.kind == "activation")
    stored = initializers(artifact / "model.onnx")
    (scale,) = (float(array) for name, array in stored.items() if re.fullmatch("h_scale", name))
    (zero,) = (int(array) for name, array in stored.items() if re.fullmatch("h_zero_point", name))
    assert picture.dtype == "uint8"
    assert picture.scale == pytest.approx(scale)
    assert (picture.range_low, picture.range_high) == pytest.approx(((0 - zero) * scale, (255 - zero) * scale))
    values = values_of(source, "h", feeds)
    counts, _ = np.histogram(values, layers.BINS, (picture.low, picture.high))
    assert picture.counts == tuple(counts)
    assert sum(picture.counts) == values.size
    assert picture.high == pytest.approx(values.max())
    beyond = np.mean((values < picture.range_low - scale / 2) | (values > picture.range_high + scale / 2))
    assert picture.beyond == pytest.approx(beyond)
    assert picture.beyond > 0
    # What integers cannot reach is what the round trip changes by more than half a step.
    trip = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
    assert np.mean(np.abs(trip - values) > scale * 0.5001) == pytest.approx(beyond, abs=1e-4)


def test_what_rounds_to_an_end_of_the_range_is_not_cut_off():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[n] x) => (uint8[n] q) <float scale = {0.5}, uint8 zero = {100}> { q = QuantizeLinear(x, scale, zero) }
    """)
    values = np.array([-50.3, -50.2, 0.0, 77.7, 77.8], np.float32)  # the range is -50 to 77.5
    picture = layers._activation("x", model.graph.inputs[0], values)
    assert (picture.range_low, picture.range_high) == (-50, 77.5)
    assert picture.beyond == pytest.approx(2 / 5)
    assert picture.beyond == np.mean(np.abs((np.clip(np.rint(values / 0.5) + 100, 0, 255) - 100) * 0.5 - values) > 0.25)


def test_weights_in_steps_of_their_channels(source: Path, tmp_path: Path):
    artifact = compiled(source, "cpu-int8", "qdq", tmp_path)
    facts = look_inside(qgraph.load(source), artifact, FEEDS[:1], threads=1)
    (picture,) = (one for one in facts.pictures if one.tensor == "y" and one.kind == "weight")
    assert (picture.name, picture.dtype, picture.channels, picture.scale) == ("w2", "int8", 64, None)
    scales = np.abs(W2).max(axis=0) / 127
    counts, _ = np.histogram(W2 / scales, layers.BINS, (picture.low, picture.high))
    assert np.abs(np.array(picture.counts) - counts).sum() <= 4  # of the scales' own rounding
    assert (picture.range_low, picture.range_high) == (-128, 127)
    assert picture.beyond == 0


def test_weights_without_the_float_model_are_shown_as_stored(source: Path, tmp_path: Path):
    artifact = compiled(source, "cpu-int8", "qdq", tmp_path)
    facts = look_inside(source, artifact, FEEDS[:1], threads=1)
    (picture,) = (one for one in facts.pictures if one.tensor == "y" and one.kind == "weight")
    assert picture.remark == "as stored, after rounding"
    assert picture.beyond is None
    assert sum(picture.counts) == W2.size


def test_ranges_that_are_chosen_while_running(source: Path, tmp_path: Path):
    artifact = compiled(source, "cpu-int8", "dynamic-int8", tmp_path)
    facts = look_inside(qgraph.load(source), artifact, FEEDS[:1], threads=1)
    told = {(one.tensor, one.kind): one for one in facts.pictures}
    weight = told["y", "weight"]
    assert (weight.name, weight.channels, weight.beyond) == ("w2", 64, 0)
    activation = told["y", "activation"]
    assert (activation.remark, activation.range_low) == ("stays in float", None)
    assert "h" not in {one.tensor for one in facts.pictures} or told["h", "activation"].remark.startswith(
        "range chosen"
    )


@pytest.mark.parametrize(
    ("target", "passes", "bits", "scales"),
    [
        ("cpu-int4", "rtn{bits=4,group=32}", 4, 64 * 3),
        ("cpu-int4", "rtn{bits=8,group=32,symmetric=true}", 8, 64 * 3),
        ("cpu-fp32", "rtn{bits=4,group=32,symmetric=true}", 4, 64 * 3),
        ("cpu-int8", "qdq{weights=int4}", 4, 64),
        ("cpu-int8", "qdq{per_channel=false}", 8, 1),
    ],
)
def test_every_form_of_a_stored_weight_is_read(
    source: Path, tmp_path: Path, target: str, passes: str, bits: int, scales: int
):
    artifact = compiled(source, target, passes, tmp_path)
    model = qgraph.load(artifact / "model.onnx")
    stored = stored_weight(layer_of(model.graph.outputs[0]))
    assert stored is not None
    assert stored.scales == scales
    assert stored.highest - stored.lowest + 1 == 1 << bits
    real = (stored.codes - stored.zero) * stored.scale
    assert real.shape == W2.shape
    steps = np.abs(real - W2) / stored.scale
    assert np.mean(steps > 0.51) < 0.05  # but for what is clipped on purpose
    assert steps.max() > 0.25


@pytest.mark.parametrize("target", ["cpu-int4", "cpu-fp32"])
def test_very_large_weights_are_not_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str):
    model = qgraph.load(compiled(source, target, "rtn{group=32}", tmp_path) / "model.onnx")
    layer = layer_of(model.graph.outputs[0])
    assert stored_weight(layer) is not None
    monkeypatch.setattr(stored_weights, "_MOST_ELEMENTS", 1000)
    assert stored_weight(layer) is None


def test_a_weight_of_unknown_form_has_no_picture():
    model = two_layers()
    assert stored_weight(layer_of(model.graph.outputs[0])) is None
    assert layer_of(model.graph.inputs[0]) is None
    assert layer_of(None) is None


def test_large_tensors_are_sampled_with_both_ends(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    artifact = compiled(source, "cpu-int8", "qdq", tmp_path)
    monkeypatch.setattr(layers, "_WHOLE", 100)
    monkeypatch.setattr(layers, "_SAMPLED", 64)
    (picture, *_) = (
        one for one in look_inside(source, artifact, FEEDS[:1], threads=1).pictures if one.kind == "activation"
    )
    values = values_of(source, picture.tensor, FEEDS[:1])
    assert 64 < sum(picture.counts) <= 130
    assert picture.high >= values.max()
    assert picture.low <= values.min()
    monkeypatch.setattr(layers, "_KEPT", 10)
    assert not [one for one in look_inside(source, artifact, FEEDS[:1]).pictures if one.kind == "activation"]


def test_what_cannot_be_compared_says_why(source: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    facts = look_inside(source, tmp_path / "empty", FEEDS[:1])
    assert facts.tensors == ()
    assert facts.remark.endswith("model.onnx does not exist")


def test_a_fault_of_ours_costs_the_drawings_and_not_the_artifact(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(layers, "_pictures", lambda *_: 1 / 0)
    page = (compiled(source, "cpu-int8", "qdq", tmp_path) / "report.html").read_text(encoding="utf-8")
    assert "by a fault of qgraph: ZeroDivisionError" in page


def test_a_compilation_tells_the_worst_layer_and_draws_it(source: Path, tmp_path: Path):
    told = []
    artifact = qgraph.compile(
        source, "cpu-int8", passes="qdq", calibration=FEEDS, output=tmp_path / "a", observer=told.append
    )
    (event,) = (one for one in told if one.stage == "layers")
    assert re.fullmatch(r"\d tensors on [1-4] samples?   worst: '\w+' \(\w+\) \d\d\.\d dB", event.text)
    page = (artifact.path / "report.html").read_text(encoding="utf-8")
    assert "Where the error arises" in page
    assert 'class="histogram"' in page


def test_models_compared_in_slices_say_how_to_get_the_layers(source: Path, tmp_path: Path):
    context = qgraph.Context(calibration_memory=8000)
    artifact = qgraph.compile(
        source, "cpu-int8", passes="qdq", calibration=FEEDS, output=tmp_path / "a", context=context
    )  # fmt: skip
    page = (artifact.path / "report.html").read_text(encoding="utf-8")
    assert "in slices, for its size" in page
    assert "qgraph diff MODEL ARTIFACT" in page


def test_graphs_of_very_many_nodes_say_how_to_get_the_layers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stages, "_MOST_NODES", 3)
    page = (compiled(source, "cpu-int8", "qdq", tmp_path) / "report.html").read_text(encoding="utf-8")
    assert re.search(r"Not taken: \d+ nodes take long. <code>qgraph diff", page)


def test_few_samples_of_what_takes_long():
    feeds = [{"x": np.zeros(1)}] * 10
    assert len(few(feeds, None)) == 1
    assert len(few(feeds, 1.0)) == 1
    assert len(few(feeds, 1e-5)) == 4
    assert len(few(feeds[:2], 1e-5)) == 2


def test_only_what_adds_to_the_error_is_among_the_worst():
    tensors = [
        TensorError("passes-on", "n", "Reshape", 20.0, loss_db=0.01),
        TensorError("mends", "n", "Add", 21.0, loss_db=-3.0),
        TensorError("adds", "n", "Conv", 22.0, loss_db=3.0),
        TensorError("first", "n", "Conv", 19.0),
        TensorError("exact", "n", "Add", None, exact=True),
    ]
    assert [one.name for one in worst_first(tensors)] == ["first", "adds"]
    assert not adds_error(tensors[4])


def test_one_line_about_all():
    good = TensorError("a", "node", "Conv", None, exact=True)
    assert LayerFacts((good,), samples=1).told() == "1 tensors on 1 sample   all equal"
    broken = TensorError("a", "node", "Exp", 3.0, broken=7)
    assert LayerFacts((good, broken), samples=2).told().endswith("NaN or infinite from 'node' (Exp) on")
    assert LayerFacts.from_json({"tensors": [], "pictures": [], "samples": 0, "remark": "why"}).remark == "why"
    assert Picture("a", "a", "weight", (1,), 0.0, 1.0).channels == 1
