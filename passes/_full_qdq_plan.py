"""Which tensors `full-qdq` quantizes, which of them share a scale, in how many bits, and over which range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import is_constant
from qgraph.analysis.integer_units import Form, Unit, Units, is_float, layer_weight
from qgraph.analysis.tensor_statistics import Statistics, statistics
from qgraph.errors import UserError
from qgraph.passes._full_qdq_stands import Options, Stand, scheme_of
from qgraph.passes._full_qdq_widths import Widths
from qgraph.pipeline import Context

__all__ = ["Plan", "make_plan"]

_MASKED = -1000.0
"""What reaches further down than this is a mask."""
_UNSEEN = 16.0
"""A softmax does not see what lies this far below its largest input: exp(-16) is a ten-millionth."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `full-qdq` writes.

    Attributes:
        units: the parts that will have integers all around.
        refused: nodes that stay in float, each with the reason.
        values: tensors to quantize, and what stands for them.
        narrow: (node, input) pairs that read a wide tensor in 8 bits, and what stands for it there.
        weights: layers whose weight is to be quantized.
        wide_weights: weights that get 16 bits.
        notes: remarks for the reader.
    """

    units: list[Unit]
    refused: Mapping[ir.Node, str]
    values: Mapping[ir.Value, Stand]
    narrow: Mapping[tuple[ir.Node, int], Stand]
    weights: list[ir.Node]
    wide_weights: frozenset[ir.Value] = frozenset()
    notes: list[str] = dataclasses.field(default_factory=list)


def make_plan(model: ir.Model, context: Context, units: Units, options: Options) -> Plan:
    """Plan the quantization of a model; see `full-qdq`.

    Raises:
        UserError: the model computes in half precision only, or the calibration data do not do.
    """
    return _Planner(model, context, units, options).plan()


class _Planner:
    def __init__(self, model: ir.Model, context: Context, units: Units, options: Options) -> None:
        self._model = model
        self._context = context
        self._options = options
        self._units = list(units.units)
        self._refused = dict(units.refused)
        self._stand: dict[ir.Value, Stand] = {}

    def plan(self) -> Plan:
        if not any(is_float(value) and value.dtype is ir.DataType.FLOAT for value in self._all_values()):
            if any(value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) for value in self._all_values()):
                raise UserError("the model computes in half precision; full-qdq needs it in float32: export it so")
            return Plan([], self._refused, {}, {}, [])
        while True:
            self._stand = {}
            self._group()
            unfit = self._measure()
            if not unfit:
                break
            for unit in [one for one in self._units if unfit.keys() & {*one.inputs, *one.outputs}]:
                reason = next(unfit[value] for value in (*unit.inputs, *unit.outputs) if value in unfit)
                self._refused.update(dict.fromkeys(unit.nodes, reason))
                self._units.remove(unit)
        weights = [unit.main for unit in self._units if unit.form is Form.LAYER and _stored_float(unit.main)]
        widths = Widths(self._model, self._units, self._stand, self._options)
        notes = widths.choose(self._context) if self._options.wide == "auto" else []
        narrow = dict(widths.narrowed())
        return Plan(self._units, self._refused, self._stand, narrow, weights, widths.wide_weights, notes)

    def _all_values(self) -> Iterator[ir.Value]:
        yield from self._model.graph.inputs
        for node in self._model.graph:
            yield from node.outputs

    # --- groups -------------------------------------------------------------------------------------------------------

    def _group(self) -> None:
        """Find the tensors to quantize; what only moves elements keeps its input's group."""
        wanted: dict[ir.Value, None] = {}
        wanted.update(dict.fromkeys(value for value in self._model.graph.inputs if self._read_by_units(value)))
        for unit in self._units:
            wanted.update(dict.fromkeys((*unit.inputs, *unit.outputs)))
        for node in self._refused:
            wanted.update(dict.fromkeys(value for value in node.outputs if self._read_by_units(value)))
        wanted.update(dict.fromkeys(value for value in self._model.graph.outputs if value not in self._islands()))
        for value in wanted:
            if value.dtype is ir.DataType.FLOAT and not _is_quantized(value):
                self._stand[value] = Stand([value])
        for unit in self._units:
            if unit.form is Form.MOVE:
                self._keep_together([*unit.inputs, *unit.outputs])
            elif unit.form is Form.JOIN:
                alone = [value for value in unit.terms if self._only_reader(value, unit)]
                self._keep_together([*unit.outputs, *alone])
            elif unit.form is Form.COMPARE:
                self._keep_together(unit.inputs)  # what is equal must have equal integers
        for unit in self._units:
            if unit.form is Form.JOIN:
                self._own_constants(unit)

    def _own_constants(self, unit: Unit) -> None:
        """Give the constants of a join the scale of its result, at which they end anyway."""
        result = self._stand.get(unit.outputs[0])
        for value in unit.terms:
            if (
                is_constant(value)
                and result is not None
                and value not in self._stand
                and value.dtype is ir.DataType.FLOAT
            ):
                self._stand[value] = result
                result.members.append(value)

    def _islands(self) -> set[ir.Value]:
        return {value for node in self._refused for value in node.outputs}

    def _read_by_units(self, value: ir.Value) -> bool:
        readers = {use.node for use in value.uses()} - set(self._refused)
        return any(node.graph is self._model.graph and not qgraph.ir.is_op(node, "QuantizeLinear") for node in readers)

    def _only_reader(self, value: ir.Value, unit: Unit) -> bool:
        return (
            not value.is_graph_output() and not is_constant(value) and {use.node for use in value.uses()} == {unit.main}
        )

    def _keep_together(self, values: Iterable[ir.Value]) -> None:
        stands = list(dict.fromkeys(self._stand[value] for value in values if value in self._stand))
        for other in stands[1:]:
            stands[0].members += other.members
            self._stand.update(dict.fromkeys(other.members, stands[0]))

    # --- ranges -------------------------------------------------------------------------------------------------------

    def _measure(self) -> dict[ir.Value, str]:
        """Give every group its range, and return the tensors that have none, with the reason."""
        computed = [value for value in self._stand if not is_constant(value)]
        scheme = scheme_of(self._options)
        names = tuple(value.name or "" for value in computed)
        seen, unavailable = self._context.analyse(statistics, self._model, names, self._options.method, scheme)
        masks = self._masks()
        for stand in dict.fromkeys(self._stand.values()):
            known = [seen[str(value.name)] for value in stand.members if value.name in seen]
            arrays = [array for value in stand.members if (array := qgraph.ir.constant(value)) is not None]
            _fit(stand, known, arrays)
        self._fix(seen, masks)
        unfit: dict[ir.Value, str] = {}
        for value, stand in self._stand.items():
            if stand.fixed:
                continue
            if value.name in unavailable and not is_constant(value):
                unfit[value] = f"'{value.name}' is not calibrated because {unavailable[str(value.name)]}"
            elif max(-stand.low, stand.high) > -_MASKED * 1e12:
                unfit[value] = f"'{value.name}' reaches from {stand.low:.3g} to {stand.high:.3g}, as masks do"
        return unfit

    def _masks(self) -> set[ir.Value]:
        """Return the tensors that are computed from integers and single numbers alone."""
        masks: set[ir.Value] = set()
        for unit in self._units:
            constants = [value for value in (*unit.terms, *unit.inputs) if is_constant(value)]
            whole = all(qgraph.ir.constant(value).size == 1 for value in constants if is_float(value))  # type: ignore[union-attr]
            fits = unit.form in (Form.CAST, Form.JOIN, Form.MOVE, Form.TABLE, Form.SUM, Form.PRODUCT)
            if fits and whole and all(value in masks or is_constant(value) for value in unit.inputs if is_float(value)):
                masks.update(unit.outputs)
        return masks

    def _fix(self, seen: Mapping[str, Statistics], masks: set[ir.Value]) -> None:
        """Set the ranges that follow from what makes a tensor: softmax, and masks before it."""
        softmaxed = {self._stand[unit.inputs[0]] for unit in self._units if unit.form is Form.SOFTMAX
                     and unit.inputs[0] in self._stand}  # fmt: skip
        softmax_made = self._moved_from(unit.outputs[0] for unit in self._units if unit.form is Form.SOFTMAX)
        for unit in self._units:
            stand = self._stand.get(unit.outputs[0]) if unit.outputs else None
            if stand is None:
                continue
            if unit.form is Form.SOFTMAX:
                stand.low, stand.high = min(stand.low, 0.0), max(stand.high, 1.0)
                stand.fixed = all(value in softmax_made for value in stand.members)
            elif unit.form in (Form.SUM, Form.JOIN) and stand in softmaxed:
                self._mask_out(unit, stand, seen, masks)

    def _moved_from(self, values: Iterable[ir.Value]) -> set[ir.Value]:
        """Return `values` and what only moves their elements."""
        found = set(values)
        for unit in self._units:
            if unit.form is Form.MOVE and found.intersection(unit.inputs):
                found.update(unit.outputs)
        return found

    def _mask_out(self, unit: Unit, stand: Stand, seen: Mapping[str, Statistics], masks: set[ir.Value]) -> None:
        hidden = [value for value in unit.terms if self._hides(value, seen, masks)]
        others = [value for value in unit.terms if value not in hidden and value in self._stand]
        if not hidden or not others:
            return
        # Not what their group reaches: a join's addends may share that with the mask itself.
        lows, highs = zip(*[self._reach(value, seen) for value in others], strict=True)
        low, high = (min(lows), max(highs))
        if unit.form is Form.SUM:
            low, high = (sum(ends) * float(unit.tail.factor) for ends in (lows, highs))
        stand.low, stand.high, stand.fixed = low - _UNSEEN, high, True
        for value in hidden:
            mask = self._stand.get(value)
            if mask is not None and mask is not stand:
                mask.low, mask.high, mask.fixed = low - high - _UNSEEN, 0.0, True

    def _reach(self, value: ir.Value, seen: Mapping[str, Statistics]) -> tuple[float, float]:
        array, known = qgraph.ir.constant(value), seen.get(str(value.name))
        if array is not None and array.size:
            return float(array.min()), float(array.max())
        stand = self._stand[value]
        return (stand.low, stand.high) if known is None else (known.low, known.high)

    def _hides(self, value: ir.Value, seen: Mapping[str, Statistics], masks: set[ir.Value]) -> bool:
        array = qgraph.ir.constant(value)
        if array is not None:
            return bool(array.size) and float(np.min(array)) < _MASKED
        low = seen[str(value.name)].least if value.name in seen else -math.inf
        return value in masks and low < _MASKED


def _fit(stand: Stand, known: list[Statistics], arrays: list[np.ndarray]) -> None:
    lows = [one.low for one in known] + [float(array.min()) for array in arrays if array.size]
    highs = [one.high for one in known] + [float(array.max()) for array in arrays if array.size]
    stand.low, stand.high = min(lows, default=0.0), max(highs, default=0.0)


def _is_quantized(value: ir.Value) -> bool:
    """Tell whether a value stands for integers already, or is read by nothing but QuantizeLinear."""
    if qgraph.ir.is_op(value.producer(), "DequantizeLinear"):
        return True
    uses = value.uses()
    return (
        bool(uses) and not value.is_graph_output() and all(qgraph.ir.is_op(use.node, "QuantizeLinear") for use in uses)
    )


def _stored_float(node: ir.Node) -> bool:
    weight = layer_weight(node)
    return weight is not None and is_constant(weight[1])
