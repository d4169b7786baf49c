"""The facade: names, constants, splicing, the structural check, and shapes that a user fixes."""

from __future__ import annotations

import time

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.errors import UserError


def model_of(text: str, head: str = '<ir_version: 8, opset_import: ["" : 17]>') -> ir.Model:
    return ir.from_onnx_text(f"{head}\n{text}")


BRANCHES = """g (float[batch,seq] x, float[batch,4] z, bool c) => (float[batch,seq] y) <float[1] w = {2.0}> {
    h = Mul (x, w)
    y = If (c) <then_branch = t () => (float[batch,seq] o) { k = Neg (h) o = Add (k, x) },
                else_branch = e () => (float[batch,seq] o) { o = Identity (h) }>
}"""


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in qgraph.ir.walk(model) if node.op_type == op_type)


# --- looking ---------------------------------------------------------------------------------------------------------


def test_walking_reaches_subgraphs_and_functions_count():
    model = model_of(BRANCHES)
    assert [node.op_type for node in qgraph.ir.walk(model)] == ["Mul", "If", "Neg", "Add", "Identity"]
    assert qgraph.ir.count_nodes(model) == 5
    assert [graph.name for graph in qgraph.ir.all_graphs(model)] == ["g", "t", "e"]
    assert [graph.name for graph in qgraph.ir.inner_graphs(node_of(model, "If"))] == ["t", "e"]
    assert qgraph.ir.weight_bytes(model) == 4


def test_constants_are_told_from_what_callers_may_override():
    model = model_of(
        "g (float[2] x, float[2] v) => (float[2] y) <float[2] v = {1.0,2.0}, float[2] w = {3.0,4.0}> {"
        " c = Constant <value_floats = [5.0, 6.0]> () a = Add (x, v) b = Add (a, w) y = Add (b, c) }"
    )
    initializers = model.graph.initializers
    assert qgraph.ir.constant(initializers["v"]) is None
    assert qgraph.ir.constant(None) is None
    np.testing.assert_array_equal(qgraph.ir.constant(initializers["w"]), [3, 4])
    np.testing.assert_array_equal(qgraph.ir.constant(node_of(model, "Constant").outputs[0]), [5, 6])


def test_only_consumer():
    model = model_of("g (float[2] x) => (float[2] y, float[2] b) { a = Abs(x) b = Neg(a) c = Neg(b) y = Add(c, c) }")
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert qgraph.ir.only_consumer(values["a"]) is values["b"].producer()
    assert qgraph.ir.only_consumer(values["b"]) is None, "a graph output"
    assert qgraph.ir.only_consumer(values["c"]) is None, "read twice"


# --- changing --------------------------------------------------------------------------------------------------------


def test_fresh_names_are_free_in_every_graph():
    model = model_of(BRANCHES)
    assert qgraph.ir.fresh_name(model.graph, "new") == "new"
    assert qgraph.ir.fresh_name(model.graph, "new") == "new_1"
    assert qgraph.ir.fresh_name(model.graph, "k") == "k_1", "k is a name of a subgraph"
    qgraph.ir.forget_names(model)
    assert qgraph.ir.fresh_name(model.graph, "new") == "new"


def test_fresh_names_are_not_those_of_nodes():
    model = model_of("g (float[n] x) => (float[n] y) { [taken] y = Neg(x) }")
    assert qgraph.ir.fresh_name(model.graph, "taken") == "taken_1", "ONNX Runtime refuses two nodes of one name"


def test_an_initializer_never_replaces_another():
    model = model_of(BRANCHES)
    value = qgraph.ir.initializer(model.graph, "w", np.ones(3, np.float32))
    assert value.name == "w_1"
    assert sorted(model.graph.initializers) == ["w", "w_1"]


def test_replacing_the_node_of_a_graph_output_keeps_its_name_and_type():
    model = model_of("g (float[n] x) => (float[n] y) { a = Abs(x) y = Neg(a) }")
    old = node_of(model, "Neg")
    first = ir.node("Relu", [old.inputs[0]])
    qgraph.ir.replace_node(old, [first, ir.node("Exp", first.outputs)])
    assert [node.op_type for node in model.graph] == ["Abs", "Relu", "Exp"]
    assert (model.graph.outputs[0].name, str(model.graph.outputs[0].shape)) == ("y", "[n]")
    assert qgraph.ir.check(model) is None


def test_bypass_renames_what_takes_the_place_of_a_graph_output():
    model = model_of("g (float[n] x) => (float[n] y) { a = Abs(x) y = Identity(a) }")
    identity = node_of(model, "Identity")
    assert qgraph.ir.bypass(identity, identity.inputs[0])
    assert (len(model.graph), model.graph.outputs[0].name) == (1, "y")
    assert qgraph.ir.check(model) is None


@pytest.mark.parametrize(
    "text",
    [
        "g (float[n] x) => (float[n] y) { y = Identity(x) }",
        "g () => (float[1] y) <float[1] w = {1.0}> { y = Identity(w) }",
        "g (float[n] x) => (float[n] y, float[n] a) { a = Abs(x) y = Identity(a) }",
    ],
)
def test_bypass_leaves_what_must_be_two_values(text: str):
    model = model_of(text)
    before = ir.to_onnx_text(model)
    identity = node_of(model, "Identity")
    assert not qgraph.ir.bypass(identity, identity.inputs[0])
    assert ir.to_onnx_text(model) == before


def test_discarding_a_node_releases_what_its_subgraphs_read():
    model = model_of(BRANCHES.replace("=> (float[batch,seq] y)", "=> (float[batch,seq] h)"))
    qgraph.ir.discard(node_of(model, "If"))
    assert not model.graph[0].outputs[0].uses()


def test_lazy_tensors_are_computed_anew():
    calls = []
    tensor = qgraph.ir.lazy(lambda: calls.append(1) or np.ones((2, 3), np.float32).T, ir.DataType.FLOAT, [3, 2])
    assert not calls
    assert tensor.numpy().shape == (3, 2)
    assert len(tensor.tobytes()) == 24
    assert len(calls) == 2


# --- the check -------------------------------------------------------------------------------------------------------


def test_a_sound_model_has_no_problem():
    assert qgraph.ir.check(model_of(BRANCHES)) is None


def test_problems_are_named():
    model = model_of(BRANCHES)
    neg = node_of(model, "Neg")
    neg.replace_input_with(0, ir.Value(name="ghost"))
    assert qgraph.ir.check(model) == "node 'Neg->k' (Neg) reads 'ghost', which nothing before it defines"

    model = model_of(BRANCHES)
    node_of(model, "Neg").outputs[0].name = "h"
    assert "defined twice" not in (qgraph.ir.check(model) or ""), "a subgraph may hide a name that it does not read"
    node_of(model, "Add").replace_input_with(1, model.graph[0].outputs[0])
    assert "reads 'h', which here means another value" in (qgraph.ir.check(model) or "")

    model = model_of(BRANCHES)
    model.graph[0].outputs[0].name = "x"
    assert "'x' is defined twice" in (qgraph.ir.check(model) or "")

    model = model_of(BRANCHES)
    node_of(model, "Neg").domain = "my"
    assert "domain 'my', which the model does not import" in (qgraph.ir.check(model) or "")

    model = model_of(BRANCHES)
    model.graph.initializers["w"].const_value = None
    assert qgraph.ir.check(model) == "the initializer 'w' has no data"

    model = model_of(BRANCHES)
    model.graph.outputs[0] = ir.Value(name="z2")
    assert qgraph.ir.check(model) == "graph output 'z2' is not produced by any node"

    head = '<ir_version: 8, opset_import: ["" : 17, "my" : 1]>'
    function = '<domain: "my", opset_import: ["" : 17]> f (a) => (b) { b = Abs(a) }'
    model = model_of(f"g (float[n] x) => (float[n] y) {{ y = my.f(x) }} {function}", head)
    next(iter(model.functions.values()))[0].replace_input_with(0, ir.Value(name="ghost"))
    assert "reads 'ghost'" in (qgraph.ir.check(model) or "")


def test_a_value_of_one_branch_is_not_seen_in_the_other():
    model = model_of(BRANCHES)
    node_of(model, "Identity").replace_input_with(0, node_of(model, "Neg").outputs[0])
    assert "reads 'k', which nothing before it defines" in (qgraph.ir.check(model) or "")


def test_the_check_is_linear_in_subgraphs():
    """Every subgraph sees all names outside; they must not be copied for each."""

    def seconds(count: int) -> float:
        lines = [f"h{i} = If (c) <then_branch = t () => (float[1] o) {{ o = Neg (x) }}, "
                 f"else_branch = e () => (float[1] o) {{ o = Abs (x) }}>" for i in range(count)]  # fmt: skip
        model = model_of(f"g (float[1] x, bool c) => (float[1] y) {{ {' '.join(lines)} y = Neg (x) }}")
        start = time.process_time()
        for _ in range(3):
            assert qgraph.ir.check(model) is None
        return time.process_time() - start

    seconds(20)
    assert seconds(2000) < 40 * max(seconds(200), 0.005)


# --- fixing shapes ---------------------------------------------------------------------------------------------------


def test_a_shape_is_fixed_wherever_its_symbols_stand():
    model = model_of(BRANCHES)
    hidden = model.graph[0].outputs[0]
    hidden.shape = ir.Shape(["batch", "2*seq"])
    qgraph.ir.set_input_shape(model, "x", [2, 7])
    shapes = {value.name: str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs, hidden)}
    assert shapes == {"x": "[2,7]", "z": "[2,4]", "c": "[]", "y": "[2,7]", "h": "[2,None]"}
    assert str(node_of(model, "Add").outputs[0].shape) == "[2,7]"


@pytest.mark.parametrize(
    ("name", "dims", "words"),
    [
        ("X", [1, 2], "has no input 'X'. It has: x, z, c."),
        ("w", [1], "has no input 'w'"),
        ("x", [1, 2, 3], "has 2 dimensions"),
        ("x", [1, -2], "negative"),
        ("z", [1, 5], "which [1,5] contradicts"),
    ],
)
def test_impossible_shapes_are_refused(name: str, dims: list[int], words: str):
    with pytest.raises(UserError) as caught:
        qgraph.ir.set_input_shape(model_of(BRANCHES), name, dims)
    assert words in str(caught.value)


def test_one_symbol_cannot_have_two_sizes():
    model = model_of("g (float[n,n] x, float[n] z) => (float[n,n] y) { y = Add(x, z) }")
    with pytest.raises(UserError, match="contradicts"):
        qgraph.ir.set_input_shape(model, "x", [2, 3])
    qgraph.ir.set_input_shape(model, "x", [2, 2])
    with pytest.raises(UserError, match="contradicts"):
        qgraph.ir.set_input_shape(model, "z", [3])


def test_inputs_without_a_shape_and_without_tensors():
    model = model_of("g (float x, seq(float[2]) s) => (float y) { y = Abs(x) }")
    model.graph.inputs[0].shape = None
    qgraph.ir.set_input_shape(model, "x", [3])
    assert str(model.graph.inputs[0].shape) == "[3]"
    with pytest.raises(UserError, match="is not a tensor"):
        qgraph.ir.set_input_shape(model, "s", [2])
