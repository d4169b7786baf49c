"""mixed-precision: what is noted of which nodes, and what the quantizer behind it makes of that."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qgraph.models import digits_cnn
from qgraph.passes import mixed_precision, qdq
from qgraph.passes._weight_options import BITS
from qgraph.pipeline import Context, Pipeline, Report

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 4, 8, 8] x, float[4, 4, 3, 3] a, float[4, 4, 3, 3] b, float[4, 4, 3, 3] c) => (float[n, 4, 8, 8] y)
{
    [first] h = Conv <pads = [1, 1, 1, 1]> (x, a)
    [relu] r = Relu (h)
    [second] i = Conv <pads = [1, 1, 1, 1]> (r, b)
    [sum] s = Add (i, r)
    [third] j = Conv <pads = [1, 1, 1, 1]> (s, c)
    [last] y = Sin (j)
}
"""


def network() -> ir.Model:
    rng = np.random.default_rng(0)
    model = ir.from_onnx_text(TEXT)
    for value in list(model.graph.inputs)[1:]:
        value.const_value = ir.tensor((rng.normal(size=(4, 4, 3, 3)) / 6).astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(2, 4, 8, 8)).astype(np.float32)} for _ in range(4)]


def run(model: ir.Model, text: str) -> Report:
    return Pipeline.parse(text).run(model, calibration=feeds())


def noted(model: ir.Model) -> dict[str, tuple[str | None, str | None]]:
    marks = {str(node.name): node.metadata_props for node in model.graph}
    return {name: (one.get(qdq.FLOAT_KEY), one.get(BITS)) for name, one in marks.items() if one}


def test_listed_nodes_are_marked():
    model = network()
    report = run(model, "mixed-precision{nodes=[fi*,sum]}").parts[0]
    reason = "it is listed in mixed-precision"
    assert noted(model) == {"first": (reason, "16"), "sum": (reason, "16")}
    assert report.changed == 2
    assert report.notes == ["2 nodes marked: float"]
    assert mixed_precision.FLOAT_KEY == qdq.FLOAT_KEY


def test_nothing_to_do_is_told():
    report = mixed_precision.MixedPrecision().apply(network(), Context())
    assert report.notes == ["no nodes are listed, and no sqnr or count to search for"]


def test_weights_are_kept_at_8_bits():
    model = network()
    report = run(model, "mixed-precision{nodes=[second,sum,last],to=int8}").parts[0]
    assert noted(model) == {"second": (None, "8")}
    assert [one.node for one in report.skipped] == ["sum", "last"]


def test_what_is_marked_as_float_is_not_lowered_to_8_bits():
    model = network()
    run(model, "mixed-precision{nodes=[second]},mixed-precision{nodes=[*],to=int8}")
    assert noted(model)["second"][1] == "16"
    assert noted(model)["third"] == (None, "8")


def test_unknown_and_pointless_names_are_told():
    report = run(network(), "mixed-precision{nodes=[nobody,last]}").parts[0]
    assert report.changed == 0
    assert [tuple(one) for one in report.skipped] == [("last", "it runs in float anyway")]
    assert report.notes == ["nodes: no node is called 'nobody'"]


@pytest.mark.parametrize("to", ["float", "int8"])
def test_a_second_run_changes_nothing(to: str):
    model = network()
    report = run(model, ",".join([f"mixed-precision{{nodes=[first],to={to}}}"] * 2))
    assert [one.changed for one in report.parts] == [1, 0]


def test_qdq_leaves_what_is_marked_in_float():
    model = network()
    report = run(model, "mixed-precision{nodes=[second]},qdq").parts[1]
    assert ("second", "it is listed in mixed-precision") in [tuple(one) for one in report.skipped]
    second = next(node for node in model.graph if node.name == "second")
    assert second.inputs[1] is model.graph.initializers["b"]


# --- searching --------------------------------------------------------------------------------------------------------


def sqnr(model: ir.Model, text: str, data: list[dict[str, np.ndarray]]) -> tuple[float, Report]:
    """Return the SQNR of the output in dB after passes, and their report; the model is not changed."""
    changed = model.clone()
    report = Pipeline.parse(text).run(changed, context=Context(threads=1, opset=21, calibration=data))
    signal = noise = 0.0
    sessions = [session(one) for one in (model, changed)]
    for feed in data:
        exact, other = (one.run(None, feed)[0].astype(np.float64) for one in sessions)
        signal, noise = signal + np.sum(exact**2), noise + np.sum((exact - other) ** 2)
    return float(10 * np.log10(signal / noise)), report


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.fixture(scope="module")
def digits() -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    model = digits_cnn.build()
    Pipeline.parse("lift-constants,convert-opset{version=21},fold-batch-norm,infer-shapes").run(model)
    images = digits_cnn.dataset().calibration["image"]
    return model, [{"image": images[:8]}]


@pytest.mark.parametrize(
    ("search", "quantizer", "least"),
    [("sqnr=44", "qdq", 44), ("sqnr=25,weights=int4", "qdq{weights=int4}", 25)],
    ids=["8 bits", "4 bits"],
)
def test_a_search_reaches_what_is_asked_for(digits, search: str, quantizer: str, least: float):
    model, data = digits
    before, _ = sqnr(model, quantizer, data)
    after, report = sqnr(model, f"mixed-precision{{{search}}},{quantizer}", data)
    found = report.parts[0]
    assert before < least - 2
    assert after > least - 1.5
    assert found.figures["sqnr_before"] == pytest.approx(before, abs=2)
    assert found.figures["sqnr_after"] >= least
    assert 0 < found.changed < 17
    assert "predicted SQNR" in found.notes[0]
    assert bool(found.figures["float"]) == (quantizer == "qdq")
    chosen = set(found.figures["float"])
    assert chosen <= {one.node for one in report.parts[1].skipped}


def test_the_worst_nodes_are_better_than_others(digits):
    model, data = digits
    chosen, report = sqnr(model, "mixed-precision{count=2},qdq", data)
    figures = report.parts[0].figures
    assert len(figures["float"]) == 2
    others = [node.name for node in model.graph if node.op_type == "Conv" and node.name not in figures["float"]][-2:]
    other, _ = sqnr(model, f"mixed-precision{{nodes=[{','.join(others)}]}},qdq", data)
    assert chosen > other + 0.5


def test_a_search_that_has_enough_changes_nothing():
    report = run(network(), "mixed-precision{sqnr=41},mixed-precision{sqnr=41}")
    assert [bool(one.changed) for one in report.parts] == [True, False]
    assert report.parts[1].notes[0].startswith("nothing ")


def test_what_cannot_be_reached_is_told():
    report = run(network(), "mixed-precision{sqnr=500}").parts[0]
    layers = [node for node in ("first", "second", "third") if node in report.figures["float"]]
    assert layers == ["first", "second", "third"]
    assert report.figures["sqnr_after"] is None


def test_nothing_to_quantize():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4, 8, 8] x) => (float[n, 4, 8, 8] y) { y = Sin (x) }'
    )
    assert run(model, "mixed-precision{sqnr=30}").parts[0].notes == ["nothing would be quantized"]


def test_a_search_repeats():
    found = []
    for _ in range(2):
        model = network()
        run(model, "mixed-precision{count=2,weights=int4}")
        found.append(noted(model))
    assert found[0] == found[1]
    assert len(found[0]) == 2
