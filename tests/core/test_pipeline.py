"""Pipelines: their three forms, what may stand in them, and what they check."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules.common import _cast_constant_of_shape

import qgraph
from qgraph.errors import UserError
from qgraph.pipeline import Context, IrPass, Pass, PassError, Pipeline, Report, Rewrite, Skipped

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y)
{
    dead = Neg (x)
    a = Identity (x)
    b = Relu (a)
    y = Relu (b)
}
"""


def model() -> ir.Model:
    return ir.from_onnx_text(MODEL)


def ops(of: ir.Model) -> list[str]:
    return [node.op_type for node in of.graph]


@dataclasses.dataclass(frozen=True)
class DropRelu(Pass):
    """Replace every Relu whose input is a Relu's output."""

    name: ClassVar[str] = "drop-relu"
    keep: int = 0

    def apply(self, model: ir.Model, context: Context) -> Report:
        changed, skipped = 0, []
        for node in list(model.graph):
            above = node.inputs[0].producer() if node.inputs[0] is not None else None
            if node.op_type != "Relu":
                continue
            if above is None or above.op_type != "Relu":
                skipped.append(Skipped(node.name or "", "its input is no Relu"))
                continue
            node.inputs[0].name, node.outputs[0].name = node.outputs[0].name, "gone"
            node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            changed += 1
        return Report(changed=changed, skipped=skipped, notes=[f"{changed} Relu dropped"])


@dataclasses.dataclass(frozen=True)
class Breaks(Pass):
    """Go wrong in a given way."""

    name: ClassVar[str] = "breaks"
    how: str = "raise"

    def apply(self, model: ir.Model, context: Context) -> Report:
        if self.how == "raise":
            raise KeyError("lost")
        if self.how == "user":
            raise UserError("your fault")
        if self.how == "invalid":
            model.graph.outputs[0] = ir.Value(name="from nowhere")
        return None if self.how == "nothing" else Report(changed=1)


def relu_pair(op: pattern.OpsetPatternBuilder, x: ir.Value) -> ir.Value:
    return op.Relu(op.Relu(x))


def relu_once(op: pattern.OpsetPatternBuilder, x: ir.Value) -> ir.Value:
    return op.Relu(x)


RULE = pattern.RewriteRule(relu_pair, relu_once)

PASSES = st.one_of(
    st.just(RemoveUnusedNodesPass()),
    st.builds(IrPass, of=st.text(min_size=1, max_size=8).filter(str.isprintable)),
    st.builds(Rewrite, rules=st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
)


@given(st.lists(PASSES, max_size=4))
def test_the_three_forms_round_trip(passes: list):
    pipeline = Pipeline(passes)
    assert Pipeline.parse(pipeline.to_text()) == pipeline
    assert Pipeline.from_toml(pipeline.to_toml()) == pipeline
    assert Pipeline.parse(pipeline.to_text()).to_text() == pipeline.to_text()
    assert hash(Pipeline.parse(pipeline.to_text())) == hash(pipeline)


def test_onnx_ir_passes_have_a_text_form():
    pipeline = Pipeline([RemoveUnusedNodesPass()])
    assert pipeline.to_text() == "onnx-ir{of=onnx_ir.passes.common.unused_removal:RemoveUnusedNodesPass}"
    assert pipeline == Pipeline([IrPass("onnx_ir.passes.common.unused_removal:RemoveUnusedNodesPass")])


def test_onnx_ir_passes_with_arguments_stay_objects():
    special = CommonSubexpressionEliminationPass(size_limit=1)
    pipeline = Pipeline([special])
    assert pipeline.describe() == "<CommonSubexpressionEliminationPass>"
    with pytest.raises(UserError, match=r"^CommonSubexpressionEliminationPass was given as an object and has no text"):
        pipeline.to_text()


def test_classes_that_cannot_be_imported_stay_objects():
    class Local(ir.passes.InPlacePass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            return ir.passes.PassResult(model, modified=False)

    assert Pipeline([Local()]).describe() == "<Local>"


def test_a_pipeline_runs_foreign_passes_in_order():
    before = model()
    pipeline = Pipeline(
        [
            RemoveUnusedNodesPass(),
            _cast_constant_of_shape.rules,
            RULE,
            IrPass("onnx_ir.passes.common:IdentityEliminationPass"),
        ]
    )
    told: list[str] = []
    report = pipeline.run(before, after_pass=lambda one: told.append(one.name))
    assert ops(before) == ["Relu"]
    assert told == ["onnx-ir", "RewriteRuleSet", "RewriteRule", "onnx-ir"]
    assert [one.changed for one in report.parts] == [1, 0, 1, 1]
    assert [(one.nodes_before, one.nodes_after) for one in report.parts] == [(4, 3), (3, 3), (3, 2), (2, 1)]
    assert (report.nodes_before, report.nodes_after, report.changed) == (4, 1, 3)


def test_rules_are_found_by_name():
    before = model()
    path = "onnxscript.rewriter.rules.common._cast_constant_of_shape:rules"
    assert Pipeline.parse(f"rewrite{{rules={path}}}").run(before).changed == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rewrite{rules=onnxscript}",
            "the option 'rules' of 'rewrite' is 'onnxscript', but must be written module:attr",
        ),
        ("rewrite{rules=no.such:thing}", "the option 'rules' of 'rewrite': no.such:thing cannot be loaded: No module"),
        ("rewrite{rules=onnx_ir:Model}", "is not an onnxscript rewrite rule or rule set"),
        ("onnx-ir{of=onnx_ir:Model}", "'onnx-ir': onnx_ir:Model is not an onnx_ir pass"),
        ("onnx-ir", "'onnx-ir' needs the option 'of' (text)"),
        ("onnx-irr{of=a:b}", "there is no pass 'onnx-irr'. Did you mean 'onnx-ir'? `qgraph passes` lists them."),
    ],
)
def test_what_cannot_be_run_is_told(text: str, message: str):
    with pytest.raises(UserError) as error:
        Pipeline.parse(text).run(model())
    assert message in str(error.value)


def test_a_qgraph_pass_stands_in_an_onnx_ir_pipeline():
    before = model()
    result = ir.passes.PassManager([RemoveUnusedNodesPass(), DropRelu(), RemoveUnusedNodesPass()])(before)
    assert result.modified
    assert ops(before) == ["Identity", "Relu"]
    assert before.graph.outputs[0].name == "y"


def test_a_report_counts_and_gives_reasons():
    report = Pipeline([DropRelu()]).run(model())
    assert (report.changed, len(report.skipped), report.notes) == (1, 1, ("1 Relu dropped",))
    assert report.skipped[0].reason == "its input is no Relu"
    assert report.parts[0].name == "drop-relu"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "pass 'breaks' failed (after drop-relu): KeyError: 'lost'"),
        ("nothing", "pass 'breaks' returned NoneType, not a Report (after drop-relu)"),
        ("invalid", "pass 'breaks' left an invalid model (after drop-relu): "),
    ],
)
def test_a_pass_at_fault_is_named_with_its_predecessors(how: str, message: str):
    with pytest.raises(PassError) as error:
        Pipeline([DropRelu(), Breaks(how)]).run(model())
    assert message in str(error.value)


def test_a_user_error_passes_through():
    with pytest.raises(UserError, match=r"^your fault$"):
        Pipeline([Breaks("user")]).run(model())


def test_an_invalid_model_is_the_users():
    broken = model()
    broken.graph.outputs[0] = ir.Value(name="from nowhere")
    with pytest.raises(UserError, match=r"^the model as given is invalid: "):
        Pipeline([DropRelu()]).run(broken)


@pytest.mark.parametrize("thing", [DropRelu, 3, "drop-relu", None])
def test_a_pipeline_takes_passes_only(thing: object):
    with pytest.raises(UserError):
        Pipeline([thing])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[pass]\n", "the recipe is not valid TOML"),
        ("[pass]\nname='x'\n", "the recipe must write [[pass]], in double brackets, for every pass"),
        ("[[passes]]\nname='x'\n", "the recipe has an unknown key 'passes'"),
        ("[[pass]]\nnam='x'\n", 'the recipe\'s [[pass]] number 1 has no name = "..."'),
        ("[[pass]]\nname='rewrite'\nrules={a=1}\n", "the recipe's option 'rules' of 'rewrite' must be text, a number"),
        ("[[pass]]\nname='rewrite'\nrules=2026-11-21\n", "the recipe's option 'rules' of 'rewrite' must be text, a"),
        ("[[pass]]\nname='rewrite'\na-b=1\na_b=1\n", "the recipe gives option 'a_b' of 'rewrite' twice"),
        ("[[pass]]\nname='rewrite'\nrule='a:b'\n", "'rewrite' has no option 'rule'. Did you mean 'rules'?"),
    ],
)
def test_a_recipe_at_fault_is_told(text: str, message: str):
    with pytest.raises(UserError) as error:
        Pipeline.from_toml(text)
    assert message in str(error.value)


def test_analyses_are_kept_until_a_pass_changes_the_model():
    calls: list[str] = []

    def count(model: ir.Model, context: Context, kind: str) -> int:
        calls.append(kind)
        return sum(node.op_type == kind for node in model.graph)

    context, before = Context(), model()
    assert context.analyse(count, before, "Relu") == context.analyse(count, before, "Relu") == 2
    Pipeline([_cast_constant_of_shape.rules]).run(before, context=context)
    assert context.analyse(count, before, "Relu") == 2
    Pipeline([DropRelu()]).run(before, context=context)
    assert context.analyse(count, before, "Relu") == 1
    assert calls == ["Relu", "Relu"]


def test_calibration_may_come_from_an_iterator():
    @dataclasses.dataclass(frozen=True)
    class Twice(Pass):
        name: ClassVar[str] = "twice"

        def apply(self, model: ir.Model, context: Context) -> Report:
            data = context.samples("'twice'")
            return Report(changed=len(list(data)) + len(list(data)))

    feeds = ({"x": np.zeros((1, 4), np.float32)} for _ in range(3))
    assert Pipeline([Twice()]).run(model(), calibration=feeds).changed == 6
    with pytest.raises(UserError, match="'twice' needs calibration data"):
        Pipeline([Twice()]).run(model())


def test_the_reference_is_the_model_before_the_first_loss():
    context, changing = Context(), model()
    context.keep_reference(changing)
    Pipeline([DropRelu()]).run(changing, context=context)
    context.keep_reference(changing)
    assert context.reference is not None
    assert ops(context.reference) == ops(model())
    assert ops(changing) != ops(model())


def test_the_public_names():
    assert qgraph.Pipeline is Pipeline
    assert set(qgraph.__all__) <= set(dir(qgraph))
    with pytest.raises(AttributeError):
        _ = qgraph.no_such_name
