"""Integers in the place of quantized floats: int32 accumulators, and fixed-point multipliers to come back to few bits.

    x -> Q -> D -> Conv(D(W8), b) -> Relu -> Q -> D -> Softmax -> Q -> D -> y
    =>
    x -> Q -> ConvInteger(W8) -> Add(b32) -> Requantize(m, s) -> Softmax(table) -> Cast -> D -> y

Between the QuantizeLinear that reads an input of the model and the DequantizeLinear that makes an output nothing is
floating point any more. What stands between D and Q becomes integers as a whole (`qgraph.analysis.integer_units`), each
part with one rounding at its end. The result is standard ONNX; what it needs beyond that are model-local functions of
the domain `qgraph`, whose bodies are standard integer operators: `Requantize`, `Softmax`, `LayerNormalize`,
`RMSNormalize`, `TableInterpolate`, `IntegerSqrt`, `RoundedDivide`. Any runtime executes them, and a hardware back end
matches their calls as one node each.

    rounding=half-up       once, ties upwards: TFLite's single-rounding build
    rounding=gemmlowp      twice: gemmlowp's doubling high multiplication, then a rounding shift
    rounding=half-even     once, ties to even: ONNX's own

No accumulator can overflow for any input: that is proven from weights and ranges for every node, and where a layer
could leave int32 its weights lose bits until it cannot, which the notes say.

form=qlinear writes ONNX Runtime's own operators (QLinearConv ...) where there are any, which are fast but round a float
product; how many integers that changes is counted on calibration samples.

What has no integer form, or is not quantized all around, stays as it is between a DequantizeLinear and a
QuantizeLinear: a boundary, marked in the node's metadata and told with its reason; with `strict=true` it is an error.
Reads any QDQ graph; `full-qdq` writes one in which everything can become integers. A second run changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_difference import differences
from qgraph.analysis.integer_meaning import note_meaning
from qgraph.analysis.integer_units import Form, Unit, computes_floats, integer_units, is_float
from qgraph.errors import UserError
from qgraph.passes import _requantize_elementwise as elementwise
from qgraph.passes import _requantize_functions as functions
from qgraph.passes import _requantize_layers as layers
from qgraph.passes import _requantize_moves as moves
from qgraph.passes import _requantize_pools as pools
from qgraph.passes import _requantize_qlinear as qlinear
from qgraph.passes._requantize_compare import compare
from qgraph.passes._requantize_writer import Codes, Target, UnfitError, Writer
from qgraph.passes._weight_options import FLOAT_KEY
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["BOUNDARY_KEY", "IntegerRequantize"]

BOUNDARY_KEY = "qgraph.boundary"
"""Key in a node's metadata: why it computes in float inside an integer graph."""
_FIRST_OPSET = 21
_COMPARED = 8
"""Calibration samples on which the fast form is compared with the exact one."""

_FORMS: Mapping[Form, Callable[[Writer, Unit, Target], ir.Value]] = {
    Form.LAYER: layers.layer,
    Form.MATMUL: layers.matmul,
    Form.POOL: pools.pool,
    Form.SUM: elementwise.add,
    Form.PRODUCT: elementwise.multiply,
    Form.QUOTIENT: elementwise.divide,
    Form.REDUCE: elementwise.reduce,
    Form.HYPOT: elementwise.hypot,
    Form.CAST: elementwise.numbers,
    Form.TABLE: functions.table,
    Form.SOFTMAX: functions.softmax,
    Form.NORM: functions.normalize,
    Form.JOIN: moves.join,
}


@dataclass(frozen=True)
class IntegerRequantize(Pass):
    """Compute in integers what is quantized, with fixed-point multipliers between scales."""

    name: ClassVar[str] = "integer-requantize"
    rounding: Literal["half-up", "gemmlowp", "half-even"] = field(
        default="half-up", metadata={"help": "how accumulators are rounded"}
    )
    form: Literal["exact", "qlinear"] = field(
        default="exact",
        metadata={"help": "qlinear: ONNX Runtime's fast operators where there are any, and what differs"},
    )
    strict: bool = field(default=False, metadata={"help": "refuse a model of which anything stays in float"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; `skipped` has every node that stays in float."""
        opset = model.graph.opset_imports.get("", 0)
        if opset < _FIRST_OPSET:
            raise UserError(
                f"integer-requantize needs opset {_FIRST_OPSET}, and the model has {opset}: put convert-opset before it"
            )
        exact = model.clone() if self.form == "qlinear" and context.calibration is not None else None
        rewriter = _Rewriter(model, self.rounding, fast=self.form == "qlinear")
        rewriter.run()
        if self.strict and rewriter.boundaries:
            node, reason = next(iter(rewriter.boundaries.items()))
            others = len(rewriter.boundaries) - 1
            more = f" ({others} more: see the report without strict)" if others else ""
            raise UserError(
                f"integer-requantize{{strict=true}}: '{qgraph.ir.node_label(node)}' stays in float: {reason}{more}"
            )
        skipped = [Skipped(qgraph.ir.node_label(node), reason) for node, reason in rewriter.boundaries.items()]
        report = Report(rewriter.changed, skipped, rewriter.notes())
        if exact is None or not rewriter.changed:
            return report
        _Rewriter(exact, self.rounding).run()
        return _compared(report, exact, model, context)


def _compared(report: Report, exact: ir.Model, fast: ir.Model, context: Context) -> Report:
    """Return the report with what the fast operators do otherwise than the exact functions, counted on some samples."""
    feeds = [feed for _, feed in zip(range(_COMPARED), context.samples("integer-requantize"), strict=False)]
    found = differences(exact, fast, context, feeds)
    differing, elements = sum(one.differing for one in found), sum(one.elements for one in found)
    largest = max((one.largest for one in found), default=0)
    note = f"{differing:,} of {elements:,} integers differ from the exact ones, by {largest} at most"
    figures = {"differences": [one.to_json() for one in found]}
    return dataclasses.replace(report, notes=[*report.notes, note], figures=figures)


class _Rewriter:
    def __init__(self, model: ir.Model, rounding: str, *, fast: bool = False) -> None:
        self._fast = fast
        self._graph = model.graph
        self._writer = Writer(model, rounding)
        self._written: Counter[Form] = Counter()
        self._reasons: dict[ir.Node, str] = {}
        self._functions: dict[ir.Node, set[ir.Node]] = {}
        self.boundaries: dict[ir.Node, str] = {}
        self.changed = 0

    def run(self) -> None:
        found = integer_units(self._graph)
        self._reasons = dict(found.refused)
        for unit in found.units:
            if unit.form is Form.TABLE:
                for node in unit.nodes:
                    self._functions.setdefault(node, set()).update(unit.nodes)
        for node in [node for node in self._graph if _is_rescale(node)]:
            self._rescale(node)
        for unit in found.units:
            kept = next((node for node in unit.nodes if FLOAT_KEY in node.metadata_props), None)
            if kept is not None:
                self._reasons.update(dict.fromkeys(unit.nodes, kept.metadata_props[FLOAT_KEY]))
                continue
            self._writer.at(unit.nodes[-1], unit.label)
            try:
                self._rewrite(unit)
            except UnfitError as unfit:
                self._reasons.update(dict.fromkeys(unit.nodes, str(unfit)))
            else:
                self.changed += len(unit.nodes)
                self._written[unit.form] += 1
        self._sweep()
        self._mark()

    def _rescale(self, node: ir.Node) -> None:
        self._writer.at(node, qgraph.ir.node_label(node))
        value = node.inputs[0]
        assert value is not None
        try:
            result = self._writer.rescale(self._writer.codes(value), self._writer.form(node, value))
        except UnfitError:
            return
        self._take_place(node, result)
        self.changed += 1

    def _rewrite(self, unit: Unit) -> None:
        """Write a unit once for each QuantizeLinear that reads it."""
        if unit.form is Form.MOVE:
            self._move(unit)
            return
        value = unit.outputs[0]
        if not is_float(value):
            write = compare if unit.form is Form.COMPARE else functions.choices
            self._stand_for(value, write(self._writer, unit), spared=self._functions.get(unit.main, set()))
            return
        for reader, target in self._targets(value):
            fast = qlinear.write(self._writer, unit, target) if self._fast else None
            result = _FORMS[unit.form](self._writer, unit, target) if fast is None else fast
            self._take_place(reader, result)
            note_meaning(result, value.name or "", target.scale, target.zero_point)

    def _move(self, unit: Unit) -> None:
        wanted = [self._targets(value) if is_float(value) else [] for value in unit.outputs]
        results = moves.move(self._writer, unit)
        for value, (codes, form), readers in zip(unit.outputs, results, wanted, strict=False):
            if form is None:
                self._stand_for(value, codes)
                continue
            note_meaning(codes, value.name or "", form.scale, form.zero_point)
            for reader, target in readers:
                self._take_place(reader, self._writer.rescale(Codes(codes, form), target))

    def _stand_for(self, value: ir.Value, result: ir.Value, spared: Collection[ir.Node] = ()) -> None:
        """Let `result` take the place of a tensor that never was real, its name as an output included.

        Args:
            value: the tensor, of integers or truth values.
            result: what is read instead of it.
            spared: nodes that go on reading `value`: functions that are yet to be tabulated through it.
        """
        result.shape = value.shape
        for use in list(value.uses()):
            if use.node not in spared:
                use.node.replace_input_with(use.idx, result)
        outputs = [index for index, one in enumerate(self._graph.outputs) if one is value]
        for index in outputs:
            self._graph.outputs[index] = result
        if outputs:
            name, value.name = value.name, qgraph.ir.fresh_name(self._graph, f"{value.name}_replaced")
            result.name, result.type = name, value.type

    def _targets(self, value: ir.Value) -> list[tuple[ir.Node, Target]]:
        """Return the QuantizeLinear that read a value, each with the integers that it makes.

        Raises:
            UnfitError: somebody else reads it.
        """
        readers = [use.node for use in value.uses()]
        others = [node for node in readers if not qgraph.ir.is_op(node, "QuantizeLinear")]
        if value.is_graph_output():
            raise UnfitError(f"its result '{value.name}' is an output in float")
        if others:
            raise UnfitError(f"its result '{value.name}' is read in float by '{qgraph.ir.node_label(others[0])}'")
        return [(node, self._writer.form(node, value)) for node in readers]

    def _take_place(self, quantizer: ir.Node, result: ir.Value) -> None:
        """Let integers take the place of what a QuantizeLinear makes."""
        output = quantizer.outputs[0]
        name = output.name
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        self._graph.remove(quantizer, safe=True)
        if result.producer() is not None and name and result.name and result.name.endswith("_out"):
            output.name = None
            result.name = name

    def _sweep(self) -> None:
        """Remove what nobody reads any more."""
        for node in reversed(self._graph):
            used = any(value.uses() or value.is_graph_output() for value in node.outputs)
            if not used:
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                self._graph.initializers.pop(name)

    def _mark(self) -> None:
        """Mark what stays in float between the quantizers, and remember why."""
        for node in self._graph:
            if qgraph.ir.is_op(node, "QuantizeLinear", "DequantizeLinear") or not computes_floats(node):
                continue
            reason = self._reasons.get(node, "what it reads or makes is not quantized")
            node.metadata_props[BOUNDARY_KEY] = reason
            self.boundaries[node] = reason

    def notes(self) -> list[str]:
        """Return what was written, and what the proofs of overflow say."""
        counted = (Form.LAYER, Form.MATMUL, Form.TABLE, Form.NORM, Form.SOFTMAX)
        notes = [f"{self._written[form]} {form.value} in integers" for form in counted if self._written[form]]
        if self.boundaries:
            notes.append(f"{len(self.boundaries)} nodes stay in float")
        return [*notes, *self._writer.remarks()]


def _is_rescale(node: ir.Node) -> bool:
    value = node.inputs[0] if node.inputs else None
    return (
        qgraph.ir.is_op(node, "QuantizeLinear")
        and value is not None
        and qgraph.ir.is_op(value.producer(), "DequantizeLinear")
    )
