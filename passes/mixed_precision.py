"""Some nodes at a higher precision than the others.

    Conv(x, W)    =>    Conv(x, W), noted: stays in float, because it is listed in mixed-precision

Nothing is quantized here: what shall stay in float, or have weights of 8 bits among weights of 4, is noted in the
metadata of the nodes, and the quantizers behind this pass (`adaround`, `gptq`, `rtn`, `qdq`) keep to it:

    mixed-precision{nodes=[/stem/*],to=float},qdq
    mixed-precision{nodes=[/head/*],to=int8},adaround{bits=4},qdq
    mixed-precision{sqnr=30},qdq
    mixed-precision{count=3,weights=int4},qdq{weights=int4}

With `sqnr` or `count` the nodes are searched for: a copy of the model is quantized by `qdq`, the effect of each rounded
tensor on the outputs is told from gradients (`qgraph.analysis.quantization_sensitivity`), and nodes are kept in float
(with `weights=int4`: at 8 bits first) by what they gain for what they cost, until the predicted SQNR of the outputs is
reached. What is fused, and what can no longer run in integers beside a node in float, counts with it.

It does not fire on nodes of operators that have no integer kernel and no weights: these run in float anyway; nor where
the predicted SQNR is reached already.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.calibration import calibrate
from qgraph.analysis.integer_rules import is_constant, kind_of
from qgraph.analysis.linear_layers import matches
from qgraph.analysis.perturbation_effects import Effects, decibels, effects
from qgraph.analysis.quantized_tensors import QuantizedTensor, quantized_tensors
from qgraph.passes._precision_search import Choice, PrecisionSearch
from qgraph.passes._weight_options import BITS, FLOAT_KEY, chosen_bits, set_bits
from qgraph.pipeline import Context, Feeds, Pass, Pipeline, Report, Samples, Skipped
from qgraph.spec import Spec, Value

__all__ = ["FLOAT_KEY", "MixedPrecision", "mark"]

_WIDTHS = {"float": 16, "int8": 8}
_LISTED = "it is listed in mixed-precision"
_ROWS = 64
_ROUNDS = 3
"""Searches: what is left in float changes what is quantized, which is looked at anew."""


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Keep listed nodes, or those found to hurt the outputs most, in float or their weights at 8 bits."""

    name: ClassVar[str] = "mixed-precision"
    preserves: ClassVar = frozenset({calibrate})
    nodes: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes"})
    to: Literal["float", "int8"] = field(
        default="float", metadata={"help": "what these nodes shall be: in float, or with weights of 8 bits"}
    )
    sqnr: float = field(
        default=0.0,
        metadata={"help": "search for nodes until the outputs have this SQNR in dB, as predicted; 0: do not"},
    )
    count: int = field(default=0, metadata={"help": "search for this many nodes that hurt the outputs most; 0: do not"})
    weights: Literal["int8", "int4"] = field(
        default="int8", metadata={"help": "integers of weights that the quantizer behind will use, for searching"}
    )
    method: Literal["minmax", "moving-average", "percentile", "entropy", "mse"] = field(
        default="minmax", metadata={"help": "how it will choose the ranges of activations, for searching"}
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "patterns of nodes that it will leave alone, for searching"}
    )

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Note what the nodes shall be; `skipped` has those that were named although it makes no difference.

        Raises:
            UserError: to search, there are no calibration samples, or the model does not run on one.
        """
        listed = self._list(model)
        if not (self.sqnr or self.count):
            return listed if self.nodes else Report(notes=["no nodes are listed, and no sqnr or count to search for"])
        found = self._search(model, context)
        return Report(
            changed=listed.changed + found.changed,
            skipped=[*listed.skipped, *found.skipped],
            notes=[*listed.notes, *found.notes],
            figures=found.figures,
        )

    def _list(self, model: ir.Model) -> Report:
        changed, skipped, labels = 0, [], []
        for node in qgraph.ir.walk(model):
            label = qgraph.ir.node_label(node)
            labels.append(label)
            if not matches(label, self.nodes):
                continue
            reason = _unfit(node, self.to)
            if reason is None:
                changed += mark(node, self.to, _LISTED)
            else:
                skipped.append(Skipped(label, reason))
        unknown = [pattern for pattern in self.nodes if not any(matches(label, (pattern,)) for label in labels)]
        notes = [f"nodes: no node is called '{pattern}'" for pattern in unknown]
        if changed:
            notes.insert(0, f"{changed} node{'s' * (changed > 1)} marked: {self.to}")
        return Report(changed=changed, skipped=skipped, notes=notes)

    # --- searching ----------------------------------------------------------------------------------------------------

    def _search(self, model: ir.Model, context: Context) -> Report:
        """Search and mark; what is quantized only because of the nodes in float is looked at anew."""
        target = 10 ** (-self.sqnr / 10) if self.sqnr else 0.0
        chosen, made = Choice(), 0
        before: float | None = None
        power, layers, left = 0.0, 0, 0
        for _ in range(_ROUNDS):
            tensors = self._tensors(model, context)
            if not tensors:
                break
            search = PrecisionSearch(model, tensors, self._effects(model, context, tensors), self._barred)
            power, left = search.power(Choice()), search.layers(Choice())
            if before is None:
                before, layers = power, left
            if (self.sqnr and power <= target) or (self.count and made >= self.count):
                break
            more = search.until(target) if self.sqnr else search.best(self.count - made)
            if not more:
                break
            chosen, made = chosen.with_(more), made + len(more.floats) + len(more.wide)
            power, left = search.power(more), search.layers(more)
            self._mark(more)
            if search.covers(more):
                break
        if before is None:
            return Report(notes=["nothing would be quantized"])
        return self._told(model, chosen, decibels(1.0, before), decibels(1.0, power), (layers, layers - left))

    def choices(self, model: ir.Model, context: Context, goals: Iterable[float]) -> list[list[str]]:
        """Return for each of several SQNRs of the outputs, in dB, the nodes that have to stay in float for it.

        For those who try several: the noise is looked at once, so that what is quantized only because of the nodes in
        float is not looked at anew, as `apply` does.

        Args:
            model: is not changed; what it would be quantized to is found out by `qdq`.
            context: its calibration samples are run.
            goals: in dB.

        Raises:
            UserError: there are no calibration samples, or the model does not run on one.
        """
        tensors = self._tensors(model, context)
        if not tensors:
            return [[] for _ in goals]
        search = PrecisionSearch(model, tensors, self._effects(model, context, tensors), self._barred)
        return [_labels(model, search.until(10 ** (-goal / 10)).floats) for goal in goals]

    def _tensors(self, model: ir.Model, context: Context) -> dict[str, QuantizedTensor]:
        """Return what a quantizer would round; of weights of 4 bits, what 8 would be as well, behind the others."""
        found, _ = quantized_tensors(model, self._quantized(model, context, self.weights))
        if self.weights == "int4":
            wide, _ = quantized_tensors(model, self._quantized(model, context, "int8"))
            narrow = {one.tensor for one in found if one.kind == "weight" and one.bits < _WIDTHS["int8"]}
            found += [one for one in wide if one.kind == "weight" and one.tensor in narrow and one.bits == 8]
        return {f"{number} {one.tensor}": one for number, one in enumerate(found)}

    def _effects(self, model: ir.Model, context: Context, tensors: Mapping[str, QuantizedTensor]) -> Effects:
        """Return the effects; a weight of 8 bits has that of its 4 bits, in the ratio of the errors."""
        narrow = {one.tensor: name for name, one in tensors.items() if one.kind == "weight" and one.bits < 8}
        wide = {name: narrow[one.tensor] for name, one in tensors.items() if one.bits == 8 and one.tensor in narrow}
        errors = {name: one.perturbation for name, one in tensors.items() if name not in wide}
        few = _few(context.samples("mixed-precision with sqnr or count"))
        found = effects(model, dataclasses.replace(context, calibration=few), errors)
        return found.with_copies(
            {name: (like, np.asarray(tensors[name].perturbation.error)) for name, like in wide.items()}
        )

    def _quantized(self, model: ir.Model, context: Context, weights: str) -> ir.Model:
        copy = model.clone()
        # By name: passes do not know one another. What is calibrated on the way stays known for the pass itself.
        options: dict[str, Value] = {"weights": weights, "method": self.method, "exclude": self.exclude}
        for one in Pipeline.from_specs([Spec("qdq", options)]):
            one.apply(copy, dataclasses.replace(context, reference=None))
        return copy

    def _barred(self, node: ir.Node) -> str | None:
        if chosen_bits([node], _WIDTHS["int8"]) is None:
            return "it stays in float"
        return "it is excluded" if matches(qgraph.ir.node_label(node), self.exclude) else None

    def _mark(self, choice: Choice) -> None:
        wanted = f"for {self.sqnr:g} dB at the outputs" if self.sqnr else "as one of those that hurt the outputs most"
        for node in choice.wide - choice.floats:
            mark(node, "int8", "")
        for node in choice.floats:
            mark(node, "float", f"mixed-precision chose it {wanted}")

    def _told(
        self, model: ir.Model, chosen: Choice, before: float | None, after: float | None, layers: tuple[int, int]
    ) -> Report:
        floats = _labels(model, chosen.floats)
        wide = _labels(model, chosen.wide - chosen.floats)
        parts = []
        if floats:
            parts.append(f"{layers[1]} of {layers[0]} layers in float")
        if wide:
            parts.append(f"{len(wide)} with weights of 8 bits")
        change = f"predicted SQNR {_text(before)}" + (f" -> {_text(after)}" if chosen else "")
        notes = [f"{', '.join(parts) or 'nothing to keep in float'}: {change}"]
        if self.sqnr and (after or math.inf) < self.sqnr:
            notes.append(f"no choice reaches {self.sqnr:g} dB")
        figures = {"float": floats, "int8": wide, "sqnr_before": before, "sqnr_after": after}
        return Report(changed=len(floats) + len(wide), notes=notes, figures=figures)


def _few(samples: Samples) -> list[Feeds]:
    """Return samples from all over, with not many more rows than `_ROWS`."""
    first = next(iter(samples), None)
    rows = 1 if not first else max(1, max((len(one) for one in first.values() if one.ndim), default=1))
    step = max(1, len(samples) * rows // _ROWS)
    return [feed for number, feed in enumerate(samples) if number % step == 0]


def _labels(model: ir.Model, nodes: Iterable[ir.Node]) -> list[str]:
    chosen = set(nodes)
    return [qgraph.ir.node_label(node) for node in model.graph if node in chosen]


def _text(figure: float | None) -> str:
    return "exact" if figure is None else f"{figure:.1f} dB"


def mark(node: ir.Node, to: str, reason: str) -> bool:
    """Note what a node shall be, with the reason where that is float; tell whether that is new."""
    before = dict(node.metadata_props)
    if to == "float":
        node.metadata_props.setdefault(FLOAT_KEY, reason)
    if to == "float" or _has_weight(node):
        set_bits(node, max(_WIDTHS[to], int(before.get(BITS, "0"))))
    return before != node.metadata_props


def _unfit(node: ir.Node, to: str) -> str | None:
    """Return why a mark on a node would make no difference, or None."""
    if to == "int8":
        return None if _has_weight(node) else "it has no weight whose width could be chosen"
    return None if _has_weight(node) or kind_of(node) is not None else "it runs in float anyway"


def _has_weight(node: ir.Node) -> bool:
    """Tell whether a node reads a constant that weight quantizers may take: floats of two dimensions or more."""
    return any(
        value is not None
        and is_constant(value)
        and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        and value.shape is not None
        and len(value.shape) > 1
        for value in node.inputs
    )
