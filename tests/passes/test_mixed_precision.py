"""mixed-precision: what is noted of which nodes, and what the quantizer behind it makes of that."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.passes import mixed_precision, qdq
from qgraph.passes._weight_options import BITS
from qgraph.pipeline import Pipeline, Report

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
    assert noted(model) == {"first": (reason, "16"), "sum": (reason, None)}
    assert report.changed == 2
    assert report.notes == ["2 nodes marked: float"]
    assert mixed_precision.FLOAT_KEY == qdq.FLOAT_KEY


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
