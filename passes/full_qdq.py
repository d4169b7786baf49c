"""Quantization of everything: Q and D around every float tensor, so that integers can compute the whole graph.

    x -> Conv(W, b) -> Relu -> Softmax -> y
    =>
    x -> Q -> D -> Conv(D(W8), b) -> Relu -> Q -> D -> Softmax -> Q -> D -> y

Where `qdq` quantizes what a runtime has fast kernels for, this pass leaves nothing in float that has an integer form at
all (`qgraph.analysis.integer_units`); `integer-requantize` then writes that form. What computes one rounding stays
together (a layer with what is added to it, scaled and clamped; a chain of functions of one tensor), and what only moves
elements keeps the scale.

Activations have 8 bits, or 16 (int16, zero point 0) where 8 would hurt and no product needs them small:

    what a normalization or a softmax reads, and the residual stream that leads there
    around logarithms, roots, reciprocals and quotients
    outputs of the model
    the tensors whose rounding the outputs feel most, until these keep `sqnr` dB or as much as the weights let them

A product of two activations always reads 8 bits; so does a layer, unless its input is one of those last.

Where gradients cannot tell what the outputs feel (before a logarithm, say), every tensor that may has 16 bits, which
then reach a quarter further than what was seen: what is clipped there costs more than a bit. A weight whose rounding to
8 bits alone makes a tenth of the noise that `sqnr` allows, as measured, has 16 bits then too (`wide_weights`), which
`integer-requantize` multiplies as two halves of 8.

Masks (what is computed from integers alone and reaches far below what a softmax can see) are cut off where the softmax
is zero anyway. Left alone: weights that were rounded before, tensors that are quantized already, what `exclude` names,
operators without an integer form, and, where the table of ONNX Runtime's CPU provider has no quantizers of the type,
everything, each with the reason. A second run changes nothing.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_units import Form, Units, integer_units
from qgraph.errors import UserError
from qgraph.passes._full_qdq_plan import Plan, make_plan
from qgraph.passes._full_qdq_write import write
from qgraph.passes._qdq_kernels import TABLES, without_quantizers
from qgraph.passes._weight_options import FLOAT_KEY
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["FullQdq"]

_FIRST_OPSET = 21
"""The first whose QuantizeLinear knows int16."""
_TABLE = TABLES["onnxruntime"]
"""Whose kernels these are."""


@dataclass(frozen=True)
class FullQdq(Pass):
    """Quantize every tensor, to 8 or 16 bits, so that integers can compute the whole model."""

    name: ClassVar[str] = "full-qdq"
    activations: Literal["uint8", "int8"] = field(default="uint8", metadata={"help": "integers of 8-bit activations"})
    symmetric: bool = field(default=False, metadata={"help": "8-bit activations around zero, without a zero point"})
    weights: Literal["int8", "int4"] = field(default="int8", metadata={"help": "integers of weights"})
    per_channel: bool = field(default=True, metadata={"help": "one weight scale for each output channel"})
    scales: Literal["any", "pow2"] = field(
        default="any", metadata={"help": "pow2: powers of two only, for hardware that shifts"}
    )
    method: Literal["minmax", "moving-average", "percentile", "entropy", "mse"] = field(
        default="minmax", metadata={"help": "how the ranges of 8-bit activations are chosen"}
    )
    wide: Literal["auto", "none"] = field(default="auto", metadata={"help": "auto: 16 bits where 8 would hurt"})
    wide_weights: Literal["auto", "none", "all"] = field(
        default="auto", metadata={"help": "16 bits for weights, in two halves; auto: where 8 are measured to hurt"}
    )
    sqnr: float = field(
        default=30.0, metadata={"help": "dB at the outputs for which tensors get 16 bits; 0: by operators alone"}
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave in float"}
    )

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Quantize; `skipped` has every node that stays in float."""
        opset = model.graph.opset_imports.get("", 0)
        if opset < _FIRST_OPSET:
            raise UserError(
                f"full-qdq needs opset {_FIRST_OPSET}, and the model has {opset}: put convert-opset before it"
            )
        narrow, wide = (
            without_quantizers(ir.DataType[word.upper()], _TABLE, opset) for word in (self.activations, "int16")
        )
        units = self._units(model.graph, narrow)
        options = self if wide is None else replace(self, wide="none", wide_weights="none")
        plan = make_plan(model, context, units, options)
        if not plan.values and not plan.weights:
            return Report(skipped=_told(plan))
        context.keep_reference(model)
        unused = self._unused(model.graph)
        for node, reason in plan.refused.items():
            node.metadata_props[FLOAT_KEY] = reason
        write(model.graph, plan, options)
        notes = [*_notes(plan), *unused] + ([f"nothing in 16 bits: {wide}"] if wide is not None else [])
        return Report(len(plan.units), _told(plan), notes)

    def _unused(self, graph: ir.Graph) -> list[str]:
        labels = [qgraph.ir.node_label(node) for node in graph]
        unused = [pattern for pattern in self.exclude if not fnmatch.filter(labels, pattern)]
        return [f"exclude: no node is called '{pattern}'" for pattern in unused]

    def _units(self, graph: ir.Graph, without: str | None) -> Units:
        """Return what can be quantized, less what is excluded, or all if the runtime is without quantizers."""
        found = integer_units(graph)
        kept, refused = [], dict(found.refused)
        for unit in found.units:
            excluded = (reason for node in unit.nodes if (reason := self._excluded(node)) is not None)
            reason = next(excluded, without)
            if reason is None:
                kept.append(unit)
            else:
                refused.update(dict.fromkeys(unit.nodes, reason))
        return Units(kept, refused)

    def _excluded(self, node: ir.Node) -> str | None:
        if FLOAT_KEY in node.metadata_props:
            return node.metadata_props[FLOAT_KEY]
        label = qgraph.ir.node_label(node)
        return "it is excluded" if any(fnmatch.fnmatchcase(label, one) for one in self.exclude) else None


def _told(plan: Plan) -> list[Skipped]:
    return [Skipped(qgraph.ir.node_label(node), reason) for node, reason in plan.refused.items()]


def _notes(plan: Plan) -> list[str]:
    forms = Counter(unit.form for unit in plan.units)
    wide = sum(one.wide for one in set(plan.values.values()))
    counted = (Form.LAYER, Form.MATMUL, Form.TABLE, Form.NORM, Form.SOFTMAX)
    notes = [f"{forms[form]} {form.value}" for form in counted if forms[form]]
    return [*notes, f"{wide} of {len(set(plan.values.values()))} scales at 16 bits", *plan.notes]
