"""Where `full-qdq` spends 16 bits: where the form of an operator asks for it, and where the outputs feel 8 bits most.

The effects of all roundings on the outputs come from one pass of gradients over a few samples
(`qgraph.analysis.perturbation_effects`). Tensors get 16 bits, those that hurt most first, until the outputs are as near
to float as was asked for, or as the rounding of the weights lets them be.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import is_constant
from qgraph.analysis.integer_units import Form, Unit
from qgraph.analysis.perturbation_effects import Effects, decibels, effects
from qgraph.analysis.perturbations import Perturbation, Rounding
from qgraph.errors import UserError
from qgraph.passes._full_qdq_stands import Options, Stand, parameters
from qgraph.passes._full_qdq_weights import PLAIN, felt_weights, style_of, weight_errors
from qgraph.pipeline import Context

__all__ = ["Widths"]

_STEEP = frozenset({"Log", "Sqrt", "Reciprocal", "Exp", "Pow", "Div"})
"""Functions whose slope varies so much that 8 bits of their argument or result are not enough."""
_SAMPLES = 8
_DRAWS = 64
_TELLING = 0.5
"""The share of cotangents that must have met no infinite gradient."""
_LINEAR = 0.1
"""Noise power of weights in 8 bits, relative to the outputs, above which gradients cannot be right."""
_HEADROOM = 1.25
"""How much further than what was seen 16 bits reach in a model where a clipped number may tip over what follows."""


class Widths:
    """Chooses the widths of a plan.

    Args:
        model: is not changed.
        units: its parts.
        stands: what stands for each tensor; `wide` and `layers_wide` are set in place.
        options: those of the pass.
    """

    def __init__(
        self, model: ir.Model, units: Sequence[Unit], stands: Mapping[ir.Value, Stand], options: Options
    ) -> None:
        self._model = model
        self._units = units
        self._stand = stands
        self._options = options
        self.wide_weights: frozenset[ir.Value] = frozenset()

    def choose(self, context: Context) -> list[str]:
        """Set the widths, and return remarks for the reader."""
        self._follow_forms()
        self._widen_streams()
        self._narrow_pools()
        return self._follow_effects(context) if self._options.sqnr > 0 else []

    # --- what operators ask for ---------------------------------------------------------------------------------------

    def _follow_forms(self) -> None:
        for value in self._model.graph.outputs:
            if value in self._stand:
                self._stand[value].wide = True
        for unit in self._units:
            for value in _wanting(unit):
                if value in self._stand:
                    self._stand[value].wide = True

    def _widen_streams(self) -> None:
        """Widen what adds up to something wide, and the factors between: the residual stream."""
        changed = True
        while changed:
            changed = False
            for unit in self._units:
                if unit.form not in (Form.SUM, Form.PRODUCT, Form.REDUCE):
                    continue
                stand = self._stand.get(unit.outputs[0])
                if stand is None or not (stand.wide or _feeds_sums(unit)):
                    continue
                for value in (*unit.outputs, *(unit.inputs if unit.form is Form.SUM else ())):
                    other = self._stand.get(value)
                    if other is not None and not other.wide and not other.fixed:
                        other.wide = changed = True

    def _narrow_pools(self) -> None:
        """Keep 8 bits around MaxPool, which has no 16-bit form."""
        for unit in self._units:
            if unit.main.op_type == "MaxPool":
                for value in (*unit.inputs, *unit.outputs):
                    if value in self._stand:
                        self._stand[value].wide = False

    # --- what the outputs feel ----------------------------------------------------------------------------------------

    def _follow_effects(self, context: Context) -> list[str]:
        roundings, style = self._roundings(), style_of(self._options)
        weights = weight_errors(self._units, style)
        plain = weights if style == PLAIN else weight_errors(self._units, PLAIN)
        probes = {f"{name} in 8 bits": Perturbation(name, error) for name, error in plain.items()}
        errors = {name: one for named in roundings.values() for name, one in named.items()}
        few = dataclasses.replace(
            context, calibration=list(itertools.islice(context.samples("full-qdq"), _SAMPLES)), _analyses={}
        )
        try:
            found = effects(self._model, few, {**errors, **weights, **probes}, draws=_DRAWS)
        except UserError as error:
            return [f"widths follow the operators alone: {error}"]
        # The gradient of a root at zero is infinite: a cotangent that met one tells nothing.
        finite = np.isfinite(found.draws).all(axis=1)
        known = dataclasses.replace(found, draws=found.draws[finite])
        if finite.mean() < _TELLING or known.power(probes) > _LINEAR:
            return [*self._widen_all(roundings), *self._widen_weights(few, weights)]
        return self._widen_worst(known, roundings, weights)

    def _widen_all(self, stands: Iterable[Stand]) -> list[str]:
        for stand in stands:
            stand.wide = stand.layers_wide = True
        for stand in self._stand.values():
            stand.headroom = 1.0 if stand.fixed else _HEADROOM
        return ["every tensor that may has 16 bits: the model is too far from linear to tell what its outputs feel"]

    def _widen_weights(self, context: Context, errors: Mapping[str, np.ndarray]) -> list[str]:
        if self._options.wide_weights != "auto" or self._options.weights != "int8":
            return []
        self.wide_weights, notes = felt_weights(self._model, context, self._units, errors, self._options)
        return notes

    def _widen_worst(
        self,
        found: Effects,
        roundings: Mapping[Stand, Mapping[str, Perturbation]],
        weights: Mapping[str, np.ndarray],
    ) -> list[str]:
        """Widen what hurts most until the rest is within what was asked for, or within what the weights do."""
        by_weights = found.power(weights)
        allowed = max(10 ** (-self._options.sqnr / 10) - by_weights, by_weights)
        hurt = {stand: found.power(named) for stand, named in roundings.items()}
        order = sorted(hurt, key=lambda stand: -hurt[stand])
        left = [name for named in roundings.values() for name in named]
        before = found.power([*left, *weights])
        count = 0
        for stand in order:
            if found.power(left) <= allowed or hurt[stand] == 0:
                break
            stand.wide = stand.layers_wide = True
            left = [name for name in left if name not in roundings[stand]]
            count += 1
        if not count:
            return []
        told = [decibels(1.0, power) for power in (before, found.power([*left, *weights]))]
        figures = " to ".join("exact" if one is None else f"{one:.1f} dB" for one in told)
        return [f"{count} more at 16 bits for the outputs: {figures} predicted"]

    def _roundings(self) -> dict[Stand, dict[str, Perturbation]]:
        """Return the roundings to 8 bits that could be to 16, by what stands for the tensors."""
        found: dict[Stand, dict[str, Perturbation]] = {}
        pooled = {
            self._stand.get(value) for unit in self._units if unit.main.op_type == "MaxPool" for value in unit.inputs
        }
        moved = {value for unit in self._units if unit.form is Form.MOVE for value in unit.outputs}
        narrow = {(node, index) for (node, index), _ in self.narrowed()}
        for value, stand in self._stand.items():
            if stand in pooled or stand.fixed or is_constant(value) or not value.name:
                continue
            if not stand.wide and value not in moved:
                found.setdefault(stand, {})[value.name] = Perturbation(value.name, self._rounding(stand))
            elif stand.wide:
                layers = {(u.node, u.idx) for u in value.uses()} & narrow & self._layer_reads()
                if layers:
                    spared = {
                        (qgraph.ir.node_label(u.node), u.idx) for u in value.uses() if (u.node, u.idx) not in layers
                    }
                    one = Perturbation(value.name, self._rounding(stand), frozenset(spared), spares_output=True)
                    found.setdefault(stand, {})[value.name] = one
        return found

    def _rounding(self, stand: Stand) -> Rounding:
        scale, zero_point = parameters(dataclasses.replace(stand, wide=False), self._options)
        return Rounding(np.asarray(scale), np.asarray(zero_point))

    def _layer_reads(self) -> set[tuple[ir.Node, int]]:
        return {(unit.main, index) for unit in self._units if unit.form is Form.LAYER
                for index in range(len(unit.main.inputs))}  # fmt: skip

    # --- who reads 8 bits all the same --------------------------------------------------------------------------------

    def narrowed(self) -> Iterator[tuple[tuple[ir.Node, int], Stand]]:
        """Yield the inputs of products that read a wide tensor in 8 bits, and what stands for it there."""
        narrow: dict[Stand, Stand] = {}
        for unit in self._units:
            if unit.form not in (Form.LAYER, Form.MATMUL):
                continue
            for index, value in enumerate(unit.main.inputs):
                stand = self._stand.get(value) if value is not None else None
                if stand is None or value not in unit.inputs or not stand.wide:
                    continue
                if unit.form is Form.LAYER and stand.layers_wide:
                    continue
                if stand not in narrow:
                    narrow[stand] = dataclasses.replace(stand, wide=False, members=[])
                yield (unit.main, index), narrow[stand]


def _wanting(unit: Unit) -> tuple[ir.Value, ...]:
    """Return the tensors around a unit that it needs in 16 bits."""
    whole = unit.form is Form.TABLE and unit.outputs[0].dtype not in (ir.DataType.FLOAT, ir.DataType.BOOL, None)
    if whole or unit.form in (Form.COMPARE, Form.NORM, Form.SOFTMAX):
        return unit.inputs
    if unit.form in (Form.QUOTIENT, Form.HYPOT):
        return (*unit.inputs, *unit.outputs)
    steep = [node for node in unit.nodes if node.op_type in _STEEP]
    if unit.form is Form.TABLE and any(not _divides_by_constant(node) for node in steep):
        return (*unit.inputs, *unit.outputs)
    return ()


def _divides_by_constant(node: ir.Node) -> bool:
    return node.op_type == "Div" and qgraph.ir.constant(node.inputs[1]) is not None


def _feeds_sums(unit: Unit) -> bool:
    """Tell whether a product is read by sums alone, as in a rotary embedding."""
    if unit.form is not Form.PRODUCT:
        return False
    readers = [use.node for use in unit.outputs[0].uses()]
    return bool(readers) and all(qgraph.ir.is_op(node, "Add", "Sub") for node in readers)
