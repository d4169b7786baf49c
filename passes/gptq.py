"""Weights rounded one input after the other, so that those still to come make up for the error (GPTQ).

    y = MatMul(x, W)    =>    y = MatMul(x, DequantizeLinear(Wq, scale, zero_point))        Gemm and Gather likewise

What an input's error costs is seen from calibration samples: the Hessian of each layer's squared output error (Frantar
et al. 2022), taken block by block, after the layers before were quantized. Layers that read the same value share it;
that of a weight which several layers read is their sum. The weights also make up for what quantizing the layers before
has changed in their input (Li et al. 2025, GPTAQ), and in the residual stream that their outputs are added to.
Embedding tables are rounded to the nearest, with ranges of least squared error; a table that is the output layer too
stays one.

It does not fire on weights that are computed, shared with a node that is no linear layer, or compressed already; see
`qgraph.analysis.linear_layers`. Whatever scales or rotates weights (AWQ, rotations) goes before. A second run finds
nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.block_stream import BlockStream, Rows, Stage
from qgraph.analysis.compressed_weights import format_scheme
from qgraph.analysis.finished_layers import Finished, FinishedLayers
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.errors import UserError
from qgraph.numerics.gptq import Hessian, gptq, output_error
from qgraph.numerics.retarget import Drift, retarget
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, quantize_weight
from qgraph.passes._weight_rounding import Chosen, Prepared, WeightRounding, some_of
from qgraph.pipeline import Context

__all__ = ["Gptq"]

_VERSION = 1
"""Of what is kept of finished layers; another one starts anew."""
_DRIFT_DAMPING = 0.001
_DRIFT_DAMPING_BY_INPUTS = 0.1
"""Shares of the mean diagonal that keep the making up for drift to what the samples show: the least, and one that grows
with the inputs for each row that was seen, since few rows can be fitted by many weights."""

Produce = Callable[[], QuantizedWeight]


@dataclass(frozen=True)
class Gptq(WeightRounding):
    """Quantize weights so that the error in a layer's outputs is least (GPTQ)."""

    name: ClassVar[str] = "gptq"
    format: Literal["int", "nf4", "fp8e4m3", "fp8e5m2", "mxfp4", "nvfp4", "ternary"] = field(
        default="int", metadata={"help": "integers, or a small float format, which has its own bits"}
    )
    damping: float = field(default=0.01, metadata={"help": "share of the mean diagonal added to the Hessian"})
    order: Literal["activation", "none"] = field(
        default="activation", metadata={"help": "inputs of the largest activations first, or as they lie"}
    )
    clip: Literal["mse", "minmax"] = field(default="mse", metadata={"help": "ranges of least squared error, or full"})
    refine: int = field(
        default=10, metadata={"help": "rounds of deciding every group again, each as long as GPTQ itself"}
    )
    sequential: Literal["layer", "block"] = field(
        default="layer", metadata={"help": "take the inputs of a layer after all before it, or a block at once"}
    )
    drift: float = field(
        default=1.0,
        metadata={"help": "share of what quantizing the layers before has changed that the weights make up for"},
    )

    def scheme(self, bits: int) -> WeightScheme:
        """Return the scheme of a weight with `bits` bits; ValueError if the options do not go together."""
        return WeightScheme(self.format, bits, self.group, self.symmetric)

    def round(self, weight: np.ndarray, scheme: WeightScheme) -> QuantizedWeight:
        """Round an embedding table, which has no Hessian, to the nearest."""
        return quantize_weight(weight, scheme, method=self.clip)

    def prepare(self, model: ir.Model, context: Context, chosen: Chosen) -> Prepared:
        """Quantize all layers; `figures` has bits and the relative output error of each.

        Raises:
            UserError: there are no calibration samples, the model does not run on one, a weight is not finite, or the
                disk is full; damping, refine or drift are out of range.
        """
        if self.damping < 0:
            raise UserError(f"gptq: damping is a share of the Hessian's diagonal, 0 or more, not {self.damping:g}")
        if self.refine < 0:
            raise UserError(f"gptq: refine is a number of rounds, 0 or more, not {self.refine}")
        if not 0.0 <= self.drift <= 1.0:
            raise UserError(f"gptq: drift is a share, from 0 to 1, not {self.drift:g}")
        return _Work(self, model, context, chosen).run()


def _is_table(layers: Sequence[LinearLayer]) -> bool:
    return any(layer.kind == "embedding" for layer in layers)


class _Work:
    """One run over the layers: what came out, and what is to be told about it."""

    def __init__(self, options: Gptq, model: ir.Model, context: Context, chosen: Chosen) -> None:
        self._options = options
        self._model = model
        self._context = context
        self._layers = {weight: layers for weight, (layers, _) in chosen.items()}
        self._schemes = {weight: scheme for weight, (_, scheme) in chosen.items()}
        self._moments: dict[ir.Value, _Moments] = {}
        self._figures: dict[str, Mapping[str, Any]] = {}

    def run(self) -> Prepared:
        """Return what gives each quantized weight, and what to tell."""
        for layers in self._layers.values():
            _require_finite(layers[0])
        produced = {weight: self._rounded(weight) for weight, layers in self._layers.items() if _is_table(layers)}
        linear = [layer for weight, layers in self._layers.items() if weight not in produced for layer in layers]
        if linear:
            produced |= self._quantized(linear, produced)
        return Prepared(produced, self._notes(), {"layers": self._figures})

    def _rounded(self, weight: ir.Value) -> Produce:
        """Round an embedding table to the nearest, whenever it is asked for."""
        layer, scheme = self._layers[weight][0], self._schemes[weight]
        self._figures[layer.name] = {"bits": scheme.bits}
        return lambda: self._options.round(layer.matrix(), scheme)

    def _quantized(self, linear: Sequence[LinearLayer], tables: Mapping[ir.Value, Produce]) -> dict[ir.Value, Produce]:
        options = self._options
        schemes = [format_scheme(scheme) for scheme in self._schemes.values()]
        self._context.samples(f"'{options.name}'")  # before anything else asks for them in a name of its own
        self._finished = FinishedLayers(self._model, self._context, f"{_VERSION} {options!r} {schemes}")
        stream = BlockStream(
            self._model,
            self._context,
            linear,
            who=options.name,
            sequential=options.sequential,
            originals=options.drift > 0,
        )
        for weight, produce in tables.items():
            stream.change(self._layers[weight][0], produce().dequantize())
        produced: dict[ir.Value, Produce] = {}
        for stage in stream.stages():
            produced |= self._stage(stage)
        return produced

    def _stage(self, stage: Stage) -> dict[ir.Value, Produce]:
        """Quantize the weights whose last layer is in this stage."""
        here = dict.fromkeys(layer.weight for layers in stage.layers.values() for layer in layers)
        ready = [weight for weight in here if self._is_last(weight, stage)]
        known = {weight: self._finished.find(weight.name or "", self._schemes[weight]) for weight in ready}
        produced = {weight: self._told(weight, one) for weight, one in known.items() if one is not None}
        open_ends = [weight for weight in here if weight not in produced]
        if open_ends:
            self._watch(stage, open_ends)
            for weights in self._together([weight for weight in ready if weight not in produced]):
                produced |= self._quantize(weights, self._moments[self._key(weights[0])])
        for weight in ready:
            stage.change(weight, produced[weight]().dequantize())
        self._moments = {key: one for key, one in self._moments.items() if key in self._layers and key not in produced}
        return produced

    def _is_last(self, weight: ir.Value, stage: Stage) -> bool:
        last = self._layers[weight][-1]
        return any(layer is last for layer in stage.layers.get(last.x, ()))

    def _key(self, weight: ir.Value) -> ir.Value:
        """Return what a weight's moments are kept under: its layer's input, or itself if several layers read it."""
        layers = self._layers[weight]
        return weight if len(layers) > 1 else layers[0].x

    def _watch(self, stage: Stage, weights: Sequence[ir.Value]) -> None:
        """Sum the moments of what goes into the layers of `weights`; what was summed before goes on."""
        keys: dict[ir.Value, list[ir.Value]] = {}
        for x, layers in stage.layers.items():
            keys[x] = list(dict.fromkeys(self._key(layer.weight) for layer in layers if layer.weight in weights))
            for key in keys[x]:
                self._moments.setdefault(key, _Moments(layers[0].inputs))
        added = self._added(stage, weights)
        for rows in stage.rows(list(added.values())):
            for x in stage.layers:
                for key in keys[x]:
                    self._moments[key].add(rows[x])
            for layer, value in added.items():
                self._moments[self._key(layer.weight)].add_sum(layer, rows[layer.x], rows[value])

    def _added(self, stage: Stage, weights: Sequence[ir.Value]) -> dict[LinearLayer, ir.Value]:
        """Return what is added to the outputs of layers that alone read their weight: the residual stream."""
        if not self._options.drift:
            return {}
        layers = [layer for some in stage.layers.values() for layer in some if layer.weight in weights]
        found = {layer: _summand(layer) for layer in layers if len(self._layers[layer.weight]) == 1}
        return {layer: value for layer, value in found.items() if value is not None and stage.knows(value)}

    def _together(self, weights: Sequence[ir.Value]) -> list[list[ir.Value]]:
        """Group weights that share moments and scheme: their rows are quantized in one go, with the same result."""
        groups: dict[tuple[ir.Value, WeightScheme], list[ir.Value]] = {}
        for weight in weights:
            groups.setdefault((self._key(weight), self._schemes[weight]), []).append(weight)
        if self._options.format == "nvfp4":  # its groups share one more scale, that of the whole matrix
            return [[weight] for weight in weights]
        return list(groups.values())

    def _told(self, weight: ir.Value, finished: Finished) -> Produce:
        """Take up what is to be told about a finished weight, and return what gives it."""
        self._figures[self._layers[weight][0].name] = finished.facts
        return finished.produce

    def _quantize(self, weights: Sequence[ir.Value], moments: _Moments) -> dict[ir.Value, Produce]:
        options, scheme = self._options, self._schemes[weights[0]]
        layers = [self._layers[weight][0] for weight in weights]
        hessian = moments.hessian.matrix
        original = np.concatenate([layer.matrix() for layer in layers])
        wanted = moments.wanted(original, layers, options)
        try:
            result = gptq(
                wanted,
                hessian,
                scheme,
                damping=options.damping,
                order=options.order,
                clip=options.clip,
                refine=options.refine,
            )
        except ValueError as error:
            raise UserError(f"gptq: '{layers[0].name}': {error}") from error
        produced: dict[ir.Value, Produce] = {}
        start = 0
        for weight, layer in zip(weights, layers, strict=True):
            part = _rows(result.quantized, slice(start, start + layer.outputs))
            rows = original[start : start + layer.outputs]
            facts = {
                "bits": scheme.bits,
                "relative_error": _relative_error(rows, part, hessian),
                "rows": moments.hessian.rows,
                "damping": result.damping,
            }
            produced[weight] = self._told(weight, self._finished.keep(weight.name or "", part, facts))
            start += layer.outputs
        return produced

    def _notes(self) -> list[str]:
        """Return what the reader should know."""
        inputs = {layers[0].name: layers[0].inputs for layers in self._layers.values()}
        facts = self._figures.items()
        short = [name for name, one in facts if one.get("rows", inputs[name]) < inputs[name]]
        damped = [f"{name} {one['damping']:g}" for name, one in facts if one.get("damping", 0) > self._options.damping]
        notes = []
        if short:
            notes.append(f"fewer calibration rows than inputs (give more samples) in {some_of(short)}")
        if damped:
            notes.append(f"damping raised in {some_of(damped)}")
        return notes


class _Moments:
    """What is summed of the rows that go into layers."""

    def __init__(self, inputs: int) -> None:
        self.hessian = Hessian(inputs)
        self._drift: Drift | None = None
        self._sums: dict[LinearLayer, Drift] = {}
        self._inputs = inputs

    def add(self, rows: Rows) -> None:
        """Count one sample in."""
        self.hessian.add(rows.changed)
        if rows.original is not None:
            self._drift = self._drift or Drift(self._inputs)
            self._drift.add(rows.original - rows.changed, rows.changed)

    def add_sum(self, layer: LinearLayer, rows: Rows, added: Rows) -> None:
        """Count in what is added to a layer's outputs; what is broadcast to them tells nothing of single rows."""
        if added.original is None or added.changed.shape != (len(rows.changed), layer.outputs):
            return
        self._sums.setdefault(layer, Drift(self._inputs, layer.outputs)).add(
            added.original - added.changed, rows.changed
        )

    def wanted(self, weight: np.ndarray, layers: Sequence[LinearLayer], options: Gptq) -> np.ndarray:
        """Return the weights [N, K] of `layers`, one above the other, to come near to."""
        if self._drift is None:
            return weight
        pull = self._drift.through(weight)
        start = 0
        for layer in layers:
            if layer in self._sums:
                pull[start : start + layer.outputs] += self._sums[layer].mean()
            start += layer.outputs
        damping = max(_DRIFT_DAMPING, _DRIFT_DAMPING_BY_INPUTS * self._inputs / max(self.hessian.rows, 1))
        return retarget(weight, options.drift * pull, self.hessian.matrix, damping)


def _summand(layer: LinearLayer) -> ir.Value | None:
    """Return what is added to a layer's outputs, behind its bias: the residual stream, if anything."""
    value = layer.node.outputs[0]
    while True:
        add = qgraph.ir.only_consumer(value)
        if add is None or not qgraph.ir.is_op(add, "Add") or add.graph is not layer.node.graph:
            return None
        other = add.inputs[1] if add.inputs[0] is value else add.inputs[0]
        if other is None or other.const_value is None:
            return other
        value = add.outputs[0]


def _require_finite(layer: LinearLayer) -> None:
    if not np.isfinite(layer.matrix()).all():
        raise UserError(f"the weight '{layer.weight.name}' of '{layer.name}' holds NaN or infinity: mend the model")
    qgraph.ir.forget_pages()


def _relative_error(weight: np.ndarray, quantized: QuantizedWeight, hessian: np.ndarray) -> float:
    """Return the squared error of a layer's outputs as a share of their square."""
    size = float(np.vdot(weight @ hessian, weight))
    return output_error(weight, quantized.dequantize(), hessian) / size if size > 0 else 0.0


def _rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    zero_point = None if weight.zero_point is None else weight.zero_point[rows]
    return QuantizedWeight(weight.codes[rows], weight.scale[rows], zero_point, weight.scheme)
