"""What runs where, as ONNX Runtime's optimised graph tells it, as its profile does, and as was expected before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph import capabilities
from qgraph.analysis.expected_placement import Expected, combined, expected_placement
from qgraph.analysis.kernel_arithmetic import arithmetic, family
from qgraph.analysis.shapes import Shapes
from qgraph.analysis.value_types import value_types
from qgraph.runtime import placement_check
from qgraph.runtime.fusion_probes import FORMS, Form
from qgraph.runtime.placement import DEQUANTIZED, PlacedNode, Placement
from qgraph.runtime.placement_check import check_placement
from qgraph.runtime.placement_reading import CPU_TABLE, executed_nodes, read_placement
from qgraph.runtime.session import input_signature, open_session, random_feeds
from qgraph.targets.base import Kernels

RESIDUAL = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[1,16,8,8] x, float[16,16,3,3] w, float[16,16,3,3] v, float[16] b) => (float[1,16,8,8] y) {
        [first] a = Conv <pads = [1,1,1,1]> (x, w, b)
        [active] r = Relu(a)
        [second] c = Conv <pads = [1,1,1,1]> (r, v, b)
        [sum] s = Add(c, r)
        [last] t = Relu(s)
        z = Sigmoid(t)
        y = Transpose <perm = [0,1,3,2]> (z)
    }
"""


def written(model: ir.Model, folder: Path) -> Path:
    path = folder / "model.onnx"
    qgraph.ir.save(model, path)
    return path


def with_weights(text: str) -> ir.Model:
    """Return a model whose inputs behind the first are weights."""
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        array = random.integers(1, 3, value.shape.numpy()).astype(value.dtype.numpy())
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return model


def residual() -> ir.Model:
    return with_weights(RESIDUAL)


def feeds(path: Path) -> dict[str, np.ndarray]:
    return dict(random_feeds(input_signature(open_session(path, threads=1)), 0)[0])


def form(pattern: str, *when: str) -> Form:
    (found,) = [one for one in FORMS if (one.pattern, one.when) == (pattern, when)]
    return found


def test_a_fused_convolution_stands_for_what_it_took_in(tmp_path: Path):
    placement = read_placement(written(residual(), tmp_path))
    assert placement.counted("provider") == {"CPUExecutionProvider": len(placement.nodes)}
    assert placement.copies == 0
    layers = [one for one in placement.nodes if family(one.kernel) == "Conv"]
    assert [one.sources for one in layers] == [("first", "active"), ("second", "sum", "last")]
    assert all(one.precision == "float32 -> float32" and one.arithmetic == "float" for one in layers)
    assert all(one.remark == "its weight is stored in float" for one in layers)
    others = {one.kernel: one for one in placement.nodes}
    assert others["Transpose"].arithmetic == "none"
    assert others["Sigmoid"].sources == ("Sigmoid->z",)


def test_the_profile_has_the_nodes_of_the_placement(tmp_path: Path):
    path = written(residual(), tmp_path)
    events = executed_nodes(path, feeds(path))
    placement = read_placement(path)
    assert sorted(one.op_type for one in events) == sorted(one.kernel.rpartition(".")[2] for one in placement.nodes)
    assert {one.provider for one in events} == {"CPUExecutionProvider"}
    assert {word for one in events for word in one.types} == {"float32"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_summary_repeats(tmp_path: Path):
    path = written(residual(), tmp_path)
    one, other = read_placement(path), read_placement(path)
    assert one.summary() == other.summary()
    assert one.summary()["nodes"] == len(one.nodes) == len(one.to_json()["placed"])
    assert list(one.summary()["kernels"]) == ["float", "none"]


@pytest.mark.parametrize("one", FORMS, ids=lambda one: f"{one.pattern} {'; '.join(one.when)}")
def test_every_fused_form_runs_as_expected(one: Form, tmp_path: Path):
    path = written(one.build(), tmp_path)
    check = check_placement(path, feeds(path))
    assert check.differences == ()
    assert check.told
    assert check.not_run == 0


def test_what_is_otherwise_than_expected_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(
        form("DequantizeLinear -> MatMul -> QuantizeLinear", "uint8 activations, int8 weight").build(), tmp_path
    )
    table = capabilities.table(CPU_TABLE)
    without = dataclasses.replace(table, fusions=())
    monkeypatch.setattr(placement_check.capabilities, "table", lambda name: without)
    (told,) = check_placement(path, feeds(path)).differences
    assert told.endswith("(QLinearMatMul): computed in integers, in float was expected")


def test_another_provider_and_another_kernel_are_told():
    nodes = (PlacedNode("a", "Conv", "CPUExecutionProvider", "float", sources=("a",)),)
    event = placement_check.Executed("a", "Conv", "XnnpackExecutionProvider", ("float32",))
    check = placement_check._compared(Placement(nodes), [(nodes[0], event)], {"a": Expected("MatMul", "float")})
    assert check.differences == (
        "a (Conv): XnnpackExecutionProvider ran it, CPUExecutionProvider was expected",
        "a: Conv ran, MatMul was expected",
    )
    stray = placement_check._compared(Placement(nodes), [(None, event)], {})
    assert stray.differences[1] == "a (Conv): ran, but is not in the placement"
    assert stray.not_run == 1


def test_layers_that_were_quantized_in_vain_are_named(tmp_path: Path):
    built = form("DequantizeLinear -> Conv -> Relu -> QuantizeLinear", "int8 activations", "zero point 0").build()
    placement = read_placement(written(built, tmp_path))
    (undone,) = placement.undone
    assert (undone.kernel, undone.arithmetic, undone.remark) == ("com.microsoft.FusedConv", "float", DEQUANTIZED)
    assert placement.summary()["undone"] == ["n3 + n4"]
    kernels = Kernels.of(placement, {})
    assert kernels.floating == {"FusedConv": 1}
    assert kernels.left_in_float[0].reason == DEQUANTIZED
    fine = form("DequantizeLinear -> Conv -> Relu -> QuantizeLinear", "uint8 activations", "zero point 0").build()
    assert read_placement(written(fine, tmp_path)).undone == ()


def test_kernels_are_a_view_of_the_placement():
    nodes = (
        PlacedNode("a_nchwc", "com.microsoft.nchwc.Conv", "P", "float", remark="its weight is stored in float"),
        PlacedNode("b", "com.microsoft.QLinearConv", "P", "integer"),
        PlacedNode("c", "com.microsoft.MatMulNBits", "P", "low-bit"),
        PlacedNode("d", "Softmax", "P", "float"),
        PlacedNode("e", "Gemm", "P", "float", sources=("x", "e"), remark="its weight is stored in float"),
    )
    kernels = Kernels.of(Placement(nodes), {"e": "float is faster here"})
    assert (kernels.integer, kernels.floating) == ({"QLinearConv": 1}, {"Conv": 1, "Gemm": 1})
    assert (kernels.low_bit, kernels.other) == ({"MatMulNBits": 1}, {"Softmax": 1})
    assert list(kernels.left_in_float) == [("a", "its weight is stored in float"), ("e", "float is faster here")]


def test_nodes_without_names_get_some_to_be_told_by(tmp_path: Path):
    path = written(ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2,3] x) => (float[2,3] y) { h = Exp(x) y = Abs(h) }'
    ), tmp_path)  # fmt: skip
    before = path.read_bytes()
    assert [one.sources for one in read_placement(path).nodes] == [("Exp->h",), ("Abs->y",)]
    assert path.read_bytes() == before


def test_nodes_of_branches_that_are_not_taken_are_counted(tmp_path: Path):
    branches = "then_branch = t () => (o) { o = Exp(x) }, else_branch = e () => (p) { p = Abs(x) }"
    text = f"g (bool b, float[2] x) => (float[2] y) {{ y = If <{branches}> (b) }}"
    path = written(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}'), tmp_path)
    check = check_placement(path, {"b": np.array(False), "x": np.ones(2, np.float32)})
    assert (check.executed, check.not_run, check.differences) == (2, 1, ())


@pytest.mark.parametrize(
    ("kernel", "types", "kind"),
    [
        ("com.microsoft.QLinearAdd", ["uint8", "float32"], "integer"),
        ("Add", ["float32"], "float"),
        ("Add", ["int64"], "none"),
        ("Reshape", ["float32", "int64"], "none"),
        ("Resize", ["uint8", "float32"], "integer"),
        ("Resize", ["float32", "float32"], "float"),
        ("com.microsoft.GatherBlockQuantized", ["uint8", "float32"], "low-bit"),
    ],
)
def test_what_kernels_compute_in(kernel: str, types: list[str], kind: str):
    assert arithmetic(kernel, types) == kind


def test_a_clamp_matters_if_the_quantized_type_holds_what_it_cuts_off(tmp_path: Path):
    def kind(clamp: str, zero: int) -> str:
        text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (uint8[1,4,8,8] q, int8[4,4,1,1] w) => (uint8[1,4,8,8] y)
        <float s = {{0.1}}, uint8 z = {{{zero}}}, float low = {{-1.0}}, float high = {{6.0}}> {{
            x = DequantizeLinear(q, s, z)
            v = DequantizeLinear(w, s)
            [layer] a = Conv(x, v)
            c = {clamp}
            y = QuantizeLinear(c, s, z)
        }}"""
        model = with_weights(text)
        found = expected_placement(model, capabilities.table(CPU_TABLE), Shapes(model).run())
        path = written(model, tmp_path)
        assert check_placement(path, {"q": np.ones((1, 4, 8, 8), np.uint8)}).differences == ()
        return next(one.arithmetic for node, one in found.items() if node.name == "layer")

    assert kind("Relu(a)", 0) == "integer"
    assert kind("Relu(a)", 1) == "float"
    assert kind("Clip(a, low)", 10) == "integer"
    assert kind("Clip(a, low)", 11) == "float"
    assert kind("Clip(a, low, high)", 10) == "float"


def test_a_kernel_is_named_after_its_layer():
    parts = [Expected("Add", "float"), Expected("Conv", "float"), Expected("", "none")]
    assert combined(parts) == Expected("Conv", "float")
    assert combined([*parts, Expected("QLinearAdd", "integer")]) == Expected("QLinearAdd", "integer")
    assert combined([Expected("", "none")]) == Expected("", "none")


def test_types_that_no_rule_tells_are_told_by_the_schema():
    text = """<ir_version: 10, opset_import: ["" : 21, "other" : 1]>
        g (float[2] x) => (y) {
            a = other.Any(x) b = Cast <to = 1> (a) c = Relu(b) d = IsNaN(c) e = Not(d) y = Shape(a)
        }"""
    model = ir.from_onnx_text(text)
    types = {value.name: word for value, word in value_types(model, Shapes(model).run()).items()}
    assert types == {
        "x": "float32", "a": "", "b": "float32", "c": "float32", "d": "bool", "e": "bool", "y": "int64"
    }  # fmt: skip
