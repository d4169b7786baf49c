"""mixed-bits: the widths that cost least within the budget, handed on to the pass that rounds."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import qgraph.ir
from qgraph.analysis.linear_layers import linear_layers
from qgraph.analysis.sensitivity import sensitivities
from qgraph.errors import UserError
from qgraph.numerics.weights import WeightScheme, quantize_weight
from qgraph.passes._weight_options import BITS, GROUP, chosen_bits, chosen_group, forget_bits, set_bits
from qgraph.passes.mixed_bits import MixedBits
from qgraph.pipeline import Context, Pipeline, Report

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
GRAPH = """g (int64[n] ids, float[20, 64] table, float[64, 64] a, float[64, 64] b, float[64, 20] c) => (float[n, 20] y)
{
    x = Gather (table, ids)
    h = MatMul (x, a)
    r = Relu (h)
    i = MatMul (r, b)
    s = Sigmoid (i)
    y = MatMul (s, c)
}"""


def network(text: str = GRAPH) -> ir.Model:
    rng = np.random.default_rng(0)
    model = ir.from_onnx_text(f"{HEAD}\n{text}")
    for value in list(model.graph.inputs)[1:]:
        array = (rng.normal(size=value.shape.numpy()) / 8).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def feeds(count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"ids": rng.integers(0, 20, 12)} for _ in range(count)]


def choose(model: ir.Model, **options) -> Report:
    return Pipeline([MixedBits(**options)]).run(model, calibration=feeds()).parts[0]


def noted(model: ir.Model) -> dict[str, tuple[str, str]]:
    return {
        str(node.outputs[0].name): (node.metadata_props[BITS], node.metadata_props[GROUP])
        for node in model.graph
        if BITS in node.metadata_props
    }


def bits_taken(model: ir.Model, scale_bits: int = 32) -> float:
    """Return the average of what is noted, counted by hand."""
    taken = elements = 0
    for layer in linear_layers(model).layers:
        bits, group = int(layer.node.metadata_props[BITS]), int(layer.node.metadata_props[GROUP])
        width = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}[bits]
        groups = -(-layer.inputs // group)
        taken += layer.outputs * (layer.inputs * width + groups * (scale_bits + width))
        elements += layer.outputs * layer.inputs
    return taken / elements


@pytest.mark.parametrize("metric", ["kl", "hessian"])
@pytest.mark.parametrize("budget", [4.3, 5.5, 7.0])
def test_the_budget_is_kept_and_used(metric: str, budget: float):
    model = network()
    report = choose(model, metric=metric, budget=budget)
    assert report.changed == 4
    assert set(noted(model)) == {"x", "h", "i", "y"}
    taken = bits_taken(model)
    assert budget - 1.0 < taken <= budget
    assert report.notes[0].startswith(f"{taken:.2f} bits per weight of {budget:g}: ")


def test_a_uniform_scheme_is_the_bound():
    model = network()
    report = choose(model, metric="hessian", like="4g32")
    assert report.notes[0].partition(": ")[0].endswith("of 5.125")
    assert 5.0 < bits_taken(model) <= 5.125
    with pytest.raises(UserError, match=r"like='int4' is not bits and group, as in 4g32"):
        choose(network(), like="int4")


def test_at_no_more_bytes_than_a_uniform_scheme_less_is_lost():
    """One layer's output hardly counts here: its bits are better spent elsewhere."""

    def built() -> ir.Model:
        model = network()
        quiet = model.graph.initializers["b"].const_value.numpy() / 50
        model.graph.initializers["b"].const_value = ir.tensor(quiet, name="b")
        return model

    ids = np.arange(20)

    def logits(model: ir.Model) -> np.ndarray:
        proto = ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
        values = session.run(None, {"ids": ids})[0].astype(np.float64)
        return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))

    exact, uniform, mixed = logits(built()), built(), built()
    Pipeline.parse("rtn{min_elements=1}").run(uniform)
    choose(mixed, like="4g32")
    Pipeline.parse("rtn{min_elements=1}").run(mixed)
    lost = [float((np.exp(exact) * (exact - logits(model))).sum()) for model in (uniform, mixed)]
    assert lost[1] < 0.5 * lost[0]
    assert qgraph.ir.weight_bytes(mixed) <= qgraph.ir.weight_bytes(uniform)


def test_the_choice_costs_least_of_all():
    model = network()
    figures = choose(model, metric="hessian", budget=5.5, groups=(32,)).figures["sensitivity"]
    layers = linear_layers(model).layers
    sizes = [[layer.outputs * (layer.inputs * b + 2 * (32 + b)) for b in (2, 4, 8)] for layer in layers]
    errors = [list(figures[layer.name]["errors"].values()) for layer in layers]
    budget = 5.5 * sum(layer.outputs * layer.inputs for layer in layers)
    fits = [
        (sum(e[i] for e, i in zip(errors, pick, strict=True)), pick)
        for pick in itertools.product(range(3), repeat=4)
        if sum(s[i] for s, i in zip(sizes, pick, strict=True)) <= budget
    ]
    best = min(fits)[0]
    widths = [figures[layer.name]["bits"] for layer in layers]
    cost = sum(e[(2, 4, 8).index(w)] for e, w in zip(errors, widths, strict=True))
    assert cost <= 1.02 * best


def test_sensitivity_is_the_share_of_the_output_that_moves():
    model, scheme = network(), WeightScheme(bits=3, group=32)
    found = linear_layers(model)
    context = Context(calibration=feeds(), threads=1)
    measured = {
        one.name: one.errors[0]
        for one in sensitivities(model, context, found.by_weight, [scheme], metric="hessian", who="test")
    }
    table, first = (found.layers[index] for index in (0, 1))
    ids = np.concatenate([feed["ids"] for feed in feeds()])
    rows = {layer: (layer.matrix(), quantize_weight(layer.matrix(), scheme).dequantize()) for layer in (table, first)}
    exact, rounded = rows[table]
    wanted = ((exact - rounded)[ids] ** 2).sum() / (exact[ids] ** 2).sum()
    assert measured[table.name] == pytest.approx(wanted, rel=1e-5)
    weight, rounded = rows[first]
    x = exact[ids]
    wanted = ((x @ (weight - rounded).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    assert measured[first.name] == pytest.approx(wanted, rel=1e-4)


def test_the_divergence_sees_what_the_output_does_not_depend_on():
    """Rounding before a layer of zeros is free, however much it moves that layer's input."""
    model = network()
    model.graph.initializers["b"].const_value = ir.tensor(np.zeros((64, 64), np.float32), name="b")
    found = linear_layers(model)
    context, schemes = Context(calibration=feeds(), threads=1), [WeightScheme(bits=2, group=32), WeightScheme(group=32)]
    measured = {
        metric: {
            one.name: one.errors
            for one in sensitivities(model, context, found.by_weight, schemes, metric=metric, who="test")
        }
        for metric in ("hessian", "kl")
    }
    first, last = found.layers[1].name, found.layers[3].name
    assert measured["kl"][first][0] < 1e-6 < 1e-4 < measured["kl"][last][0]
    assert measured["hessian"][first][0] > 0.01
    assert measured["kl"][last][0] > 4 * measured["kl"][last][1]


def test_a_tied_table_is_one_weight():
    model = network(
        GRAPH.replace(", float[64, 20] c", "").replace(
            "y = MatMul (s, c)", "t = Transpose <perm = [1, 0]> (table)\n    y = MatMul (s, t)"
        )
    )
    choose(model, metric="hessian", budget=5.0)
    assert noted(model)["x"] == noted(model)["y"]


def test_what_is_excluded_is_not_counted():
    model = network()
    report = choose(model, metric="hessian", exclude=("Gather*", "*->y"), budget=5.0)
    assert set(noted(model)) == {"h", "i"}
    assert [one.node for one in report.skipped] == ["Gather->x", "MatMul->y"]


def test_bad_options_say_what_to_do():
    with pytest.raises(UserError, match=r"mixed-bits: 2 bits per weight are too few: the smallest choices take 2\.5"):
        choose(network(), metric="hessian", budget=2.0)
    with pytest.raises(UserError, match=r"mixed-bits: .*7"):
        choose(network(), choices=(4, 7))
    broken = network()
    weight = np.full((64, 64), np.nan, np.float32)
    broken.graph.initializers["b"].const_value = ir.tensor(weight, name="b")
    with pytest.raises(UserError, match=r"NaN|nan"):
        choose(broken, metric="hessian")
    with pytest.raises(UserError, match="calibration"):
        Pipeline([MixedBits()]).run(network())


def test_notes_are_read_and_dropped():
    nodes = list(network().graph)[:2]
    assert (chosen_bits(nodes, 4), chosen_group(nodes, 32)) == (4, 32)
    set_bits(nodes[0], 3, 128)
    set_bits(nodes[1], 8, 128)
    assert (chosen_bits(nodes, 4), chosen_group(nodes, 32)) == (8, 128)
    set_bits(nodes[1], 16)
    assert chosen_bits(nodes, 4) is None
    forget_bits(nodes)
    assert (chosen_bits(nodes, 4), chosen_group(nodes, 32)) == (4, 32)
    nodes[0].metadata_props[BITS] = "few"
    with pytest.raises(UserError, match=r"qgraph\.bits='few'"):
        chosen_bits(nodes, 4)


def test_the_quantizer_takes_the_widths():
    model = network()
    choose(model, metric="hessian", budget=5.0)
    wanted = noted(model)
    Pipeline.parse("rtn{min_elements=1}").run(model)
    schemes = {
        str(reader.outputs[0].name): node.metadata_props["qgraph.weight"]
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        for reader in (use.node for use in node.outputs[0].uses())
    }
    assert schemes == {name: f"int{bits}g{group}a" for name, (bits, group) in wanted.items()}
    assert noted(model) == {}
