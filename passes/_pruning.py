"""What the passes that cut units share: which to cut, how the layers behind make up for it, and the cut itself."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.block_stream import BlockStream
from qgraph.analysis.cut_multiply_adds import CutMultiplyAdds
from qgraph.analysis.cutting import cut
from qgraph.analysis.dimensions import Atom
from qgraph.analysis.importance import importance, rows_of
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.prunable import Kind, Units, prunable
from qgraph.errors import UserError
from qgraph.numerics.pruning import Limits, Moments, compensate, keep_each, keep_together
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["StructuredPruning"]

_BISECTIONS = 30
_NEED_DATA = ("activation", "reconstruction", "taylor")


@dataclass(frozen=True)
class StructuredPruning(Pass):
    """The options and the work of passes that cut units; subclasses say of which kind."""

    kind: ClassVar[Kind]
    units_are: ClassVar[str]
    """What units are called, in the plural."""

    ratio: float = field(default=0.25, metadata={"help": "share of the units that is cut, above 0 and below 1"})
    of: Literal["units", "multiply-adds"] = field(
        default="units", metadata={"help": "what the ratio is a share of: units, or multiply-adds with weights"}
    )
    keep: int = field(default=0, metadata={"help": "instead of the ratio: how many units of each layer stay"})
    importance: Literal["auto", "magnitude", "activation", "reconstruction", "taylor", "random"] = field(
        default="auto", metadata={"help": "how units are ranked; auto: reconstruction with calibration data"}
    )
    scope: Literal["layer", "global"] = field(
        default="layer", metadata={"help": "cut the same share of every layer, or rank the units of all together"}
    )
    least: int = field(default=1, metadata={"help": "units that stay in every layer, at least"})
    multiple: int = field(
        default=1, metadata={"help": "outputs that stay are a multiple of it (8 or 64 suit tensor cores)"}
    )
    reconstruct: bool = field(
        default=True, metadata={"help": "fit the layers behind to the calibration data, where there are some"}
    )
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"the ratio {self.ratio:g} is not between 0 and 1: it is the share of units that is cut")
        if self.keep < 0 or self.least < 1 or self.multiple < 1:
            raise ValueError("keep must not be negative, and least and multiple must be positive")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Cut; `figures` has how many units of each layer stay.

        Raises:
            UserError: calibration data are needed and there are none, a weight is not finite, or gradients do not
                reach some unit.
        """
        found = context.analyse(prunable, model)
        skipped = [one for kind, one in found.frozen if kind == self.kind]
        units = [one for one in found.units if one.kind == self.kind]
        chosen = []
        for one in units:
            reason = self._unfit(one)
            if reason:
                skipped.append(Skipped(one.name, reason))
            else:
                chosen.append(one)
        if not chosen:
            return Report(skipped=skipped, notes=[] if skipped else [f"no {self.units_are} were found"])
        kept = self._kept(model, context, chosen)
        cut_units = {one.atom: stay for one, stay in zip(chosen, kept, strict=True) if len(stay) < one.count}
        if not cut_units:
            return Report(skipped=skipped, notes=[f"no {self.units_are} can be cut without falling below the limits"])
        context.keep_reference(model)
        before = qgraph.ir.parameter_count(model)
        readers = _changed_readers(chosen, cut_units)
        notes = []
        if self.reconstruct and context.calibration is not None:
            notes += self._fit(model, context, readers)
        elif self.reconstruct:
            notes.append("the layers behind are not fitted: there are no calibration data")
        cut(model, found.coupling, cut_units)
        total, left = sum(one.count for one in chosen), sum(map(len, kept))
        notes.insert(0, f"{total - left} of {total} {self.units_are} cut in {len(cut_units)} places")
        notes.insert(1, f"{100 * (1 - qgraph.ir.parameter_count(model) / before):.1f} % of the parameters")
        figures = {one.name: [one.count, len(stay)] for one, stay in zip(chosen, kept, strict=True)}
        return Report(total - left, skipped, notes, {self.units_are: figures})

    def _unfit(self, units: Units) -> str:
        names = {slot.layer.name for slot in (*units.makers, *units.readers)}
        if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.exclude):
            return "it is excluded"
        if not units.readers:
            return f"no layer that can be followed reads its {self.units_are}"
        if self.keep > units.count:
            return f"it has {units.count} {self.units_are}, fewer than the {self.keep} that are to stay"
        if units.count <= self.least:
            return f"it has only {units.count} {self.units_are}"
        return ""

    def _kept(self, model: ir.Model, context: Context, units: Sequence[Units]) -> list[np.ndarray]:
        measure = self.importance
        if measure == "auto":
            measure = "reconstruction" if context.calibration is not None else "magnitude"
        if measure in _NEED_DATA and context.calibration is None:
            raise UserError(
                f"'{self.name}' with importance={measure} needs calibration data: pass --calib DATA (or "
                "calibration=feeds in Python), or importance=magnitude"
            )
        scores = importance(model, context, units, measure, self.name)
        limits = [Limits(self.least, _step(self.multiple, one.width)) for one in units]
        if self.keep:
            limits = [dataclasses.replace(limit, least=self.keep) for limit in limits]
            return [
                keep_each([score], 1.0 - self.keep / one.count, [limit])[0]
                for one, score, limit in zip(units, scores, limits, strict=True)
            ]
        if self.of == "units":
            costs = [_cost(found) for found in units]
            return self._cut_to(self.ratio, scores, costs, limits)
        count = CutMultiplyAdds(model, context.analyse(prunable, model).coupling, context)
        costs = [count.of_one(one.atom) for one in units]
        bound = (1.0 - self.ratio) * count.total

        def fits(kept: Sequence[np.ndarray]) -> bool:
            return count.left({one.atom: len(stay) for one, stay in zip(units, kept, strict=True)}) <= bound

        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(self._cut_to(middle, scores, costs, limits)) else (middle, high)
        return self._cut_to(high, scores, costs, limits)

    def _cut_to(
        self, share: float, scores: Sequence[np.ndarray], costs: Sequence[float], limits: Sequence[Limits]
    ) -> list[np.ndarray]:
        if self.scope == "layer":
            return keep_each(scores, share, limits)
        return keep_together(scores, costs, share, limits)

    def _fit(self, model: ir.Model, context: Context, readers: Mapping[LinearLayer, np.ndarray]) -> list[str]:
        """Let each layer behind give what it gave, as well as it can, from the inputs that stay; return notes."""
        changed: dict[ir.Value, np.ndarray] = {}
        scarce: list[str] = []
        stream = BlockStream(model, context, list(readers), who=self.name, originals=True)
        for stage in stream.stages():
            layers = [layer for group in stage.layers.values() for layer in group]
            moments = {layer: Moments(layer.inputs) for layer in layers}
            for number, rows in enumerate(stage.rows()):
                for x, group in stage.layers.items():
                    original = rows[x].original
                    assert original is not None
                    for layer in group:
                        seed = context.seed + number
                        moments[layer].add(rows_of(layer, rows[x].changed, seed), rows_of(layer, original, seed))
            for layer in layers:
                if moments[layer].rows < np.count_nonzero(readers[layer]):
                    scarce.append(f"{moments[layer].rows} rows for the inputs of '{layer.name}'")
                bias = _own_bias(layer)
                array = None if bias is None else _vector(bias)
                weight, shifted = compensate(layer.matrix(), array, readers[layer], moments[layer])
                stage.change(layer.weight, weight)
                changed[layer.weight] = layer.stored(weight)
                if bias is not None and shifted is not None:
                    stage.replace(bias, shifted)
                    changed[bias] = shifted
        for value, array in changed.items():
            tensor = value.const_value
            assert tensor is not None
            shaped = array.reshape(tensor.shape.numpy()).astype(tensor.dtype.numpy())
            value.const_value = ir.tensor(shaped, dtype=tensor.dtype, name=value.name)
        return [f"more calibration samples would do better: there are only {scarce[0]}"] if scarce else []


def _changed_readers(units: Sequence[Units], kept: Mapping[Atom, np.ndarray]) -> dict[LinearLayer, np.ndarray]:
    """Return the layers that lose inputs, with bool [K] of those that stay; weights that others read are left out."""
    found: dict[LinearLayer, np.ndarray] = {}
    for one in units:
        if one.atom not in kept:
            continue
        stays = np.isin(np.arange(one.count), kept[one.atom])
        for slot in one.readers:
            if qgraph.ir.only_consumer(slot.layer.weight) is None:
                continue
            columns = found.setdefault(slot.layer, np.ones(slot.layer.inputs, bool))
            columns &= stays[np.maximum(slot.unit, 0)] | (slot.unit < 0)
    return found


def _own_bias(layer: LinearLayer) -> ir.Value | None:
    """Return a bias that nobody else reads."""
    bias = layer.bias
    if bias is None or bias.const_value is None or bias.const_value.size != layer.outputs:
        return None
    if layer.node.attributes.get_float("alpha", 1.0) != layer.node.attributes.get_float("beta", 1.0):
        return None
    return bias if qgraph.ir.only_consumer(bias) is not None else None


def _vector(value: ir.Value) -> np.ndarray:
    tensor = value.const_value
    assert tensor is not None
    return np.asarray(tensor.numpy(), np.float32).reshape(-1)


def _step(multiple: int, width: int) -> int:
    """Return the number of units whose outputs are the least multiple of `multiple`."""
    return multiple // int(np.gcd(multiple, width))


def _cost(units: Units) -> float:
    """Return the number of weights that go with one unit."""
    return sum(site.value.const_value.size for site in units.sites if site.value.const_value is not None) / units.count
