"""What `gptq` and `adaround` share: rounding layer after layer, each to the inputs that those before give it now.

A subclass solves one problem at a time: rows of weights, and the Hessian of their inputs. Here is what makes up the
problems: the stream through the model, the moments of what goes into the layers, and what the weights shall come near
to, so that they make up for what rounding the layers before has changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.block_stream import BlockStream, Rows, Stage
from qgraph.analysis.compressed_weights import format_scheme
from qgraph.analysis.convolutions import Convolution
from qgraph.analysis.finished_layers import Finished, FinishedLayers
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.sparse_weights import pattern_of
from qgraph.errors import UserError
from qgraph.numerics.hessian import output_error
from qgraph.numerics.moments import LayerMoments
from qgraph.numerics.patches import Window
from qgraph.numerics.products import steady
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, levels, spread_groups
from qgraph.passes._weight_rounding import PRODUCTS, Chosen, Prepared, WeightRounding, some_of
from qgraph.pipeline import Context

__all__ = ["Problem", "SequentialRounding"]

_VERSION = 3
"""Of what is kept of finished layers; another one starts anew."""
_DRIFT_DAMPING = 0.001
_DRIFT_DAMPING_BY_INPUTS = 0.1
"""Shares of the mean diagonal that keep the making up for drift to what the samples show: the least, and one that grows
with the inputs for each row that was seen, since few rows can be fitted by many weights."""
_PATCHES = 8192
_PATCHES_PER_INPUT = 64
"""Patches that a convolution's moments are taken from: the least of all samples together, and for each input."""
_PATCH_ELEMENTS = 1 << 25
"""Of the patches of one sample, at most: 128 MB."""

Produce = Callable[[], QuantizedWeight]


class Problem(NamedTuple):
    """Rows of weights to round.

    Attributes:
        weight: what to come near to, float32 [N, K]; [G, M, K] for a layer in groups.
        hessian: of the inputs that the rounded layers before give, float64 [K, K] or [G, K, K].
        scheme: what to round to.
        convolution: whether it is one, with one positive scale for each output.
        stays: bool, in the shape of `weight`: what may be other than zero; None where all may.
    """

    weight: np.ndarray
    hessian: np.ndarray
    scheme: WeightScheme
    convolution: bool
    stays: np.ndarray | None = None


@dataclass(frozen=True)
class SequentialRounding(WeightRounding):
    """The options and the course of passes that round layer after layer; subclasses say how one is rounded."""

    damping: float = field(default=0.01, metadata={"help": "share of the mean diagonal added to the Hessian"})
    sequential: Literal["layer", "block"] = field(
        default="layer", metadata={"help": "take the inputs of a layer after all before it, or a block at once"}
    )
    drift: float = field(
        default=1.0,
        metadata={"help": "share of what quantizing the layers before has changed that the weights make up for"},
    )
    ops: tuple[str, ...] = field(
        default=PRODUCTS, metadata={"help": "operators whose weights to round: Conv, ConvTranspose, Gemm, MatMul"}
    )
    depthwise_bits: int = field(
        default=0,
        metadata={"help": "bits of convolutions with a group for each channel, which are few and lose most; 0: as all"},
    )

    def operators(self) -> tuple[str, ...]:
        """Return the operators whose weights are rounded, besides embedding tables."""
        return self.ops

    def default_bits(self, layers: Sequence[LinearLayer]) -> int:
        """Return the width of a weight that no mark on its nodes says otherwise of."""
        is_depthwise = any(isinstance(layer, Convolution) and layer.is_depthwise for layer in layers)
        return self.depthwise_bits if is_depthwise and self.depthwise_bits else super().default_bits(layers)

    def check(self) -> None:
        """Raise UserError where options are out of range."""
        if self.damping < 0:
            raise UserError(
                f"{self.name}: damping is a share of the Hessian's diagonal, 0 or more, not {self.damping:g}"
            )
        if not 0.0 <= self.drift <= 1.0:
            raise UserError(f"{self.name}: drift is a share, from 0 to 1, not {self.drift:g}")

    def solve(self, problem: Problem) -> tuple[QuantizedWeight, float]:
        """Return the rounded rows, and the damping that was needed.

        Raises:
            ValueError: the Hessian is not finite, or far from positive semidefinite.
        """
        raise NotImplementedError

    def prepare(self, model: ir.Model, context: Context, chosen: Chosen) -> Prepared:
        """Quantize all layers; `figures` has bits and the relative output error of each.

        Raises:
            UserError: there are no calibration samples, the model does not run on one, a weight is not finite, or the
                disk is full; an option is out of range.
        """
        self.check()
        return _Work(self, model, context, chosen).run()


def _is_table(layers: Sequence[LinearLayer]) -> bool:
    return any(layer.kind == "embedding" for layer in layers)


class _Work:
    """One run over the layers: what came out, and what is to be told about it."""

    def __init__(self, options: SequentialRounding, model: ir.Model, context: Context, chosen: Chosen) -> None:
        self._options = options
        self._model = model
        self._context = context
        self._layers = {weight: layers for weight, (layers, _) in chosen.items()}
        self._schemes = {weight: scheme for weight, (_, scheme) in chosen.items()}
        self._moments: dict[Hashable, LayerMoments] = {}
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

    def _key(self, weight: ir.Value) -> Hashable:
        """Return what a weight's moments are kept under: what its layer reads, or itself if several layers read it."""
        layers = self._layers[weight]
        return weight if len(layers) > 1 else _source(layers[0])

    def _watch(self, stage: Stage, weights: Sequence[ir.Value]) -> None:
        """Sum the moments of what goes into the layers of `weights`; what was summed before goes on."""
        watched: dict[tuple[Hashable, Hashable], LinearLayer] = {}
        for layers in stage.layers.values():
            for layer in layers:
                if layer.weight in weights:
                    key = self._key(layer.weight)
                    watched.setdefault((key, _source(layer)), layer)
                    self._moments.setdefault(key, LayerMoments(layer.inputs, layer.groups))
        added = self._added(stage, weights)
        samples = len(self._context.samples(f"'{self._options.name}'"))
        for number, rows in enumerate(stage.rows(list(added.values()))):
            taken: dict[Hashable, _Taken] = {}
            for (key, source), layer in watched.items():
                if source not in taken:
                    taken[source] = _Taken(layer, rows[layer.x], number, samples)
                self._moments[key].add(taken[source].changed, taken[source].original)
            for layer, value in added.items():
                one = taken[_source(layer)]
                moved = one.moved(layer, rows[value])
                if moved is not None:
                    self._moments[self._key(layer.weight)].add_moved(layer, moved, one.changed)

    def _added(self, stage: Stage, weights: Sequence[ir.Value]) -> dict[LinearLayer, ir.Value]:
        """Return what is added to the outputs of layers that alone read their weight: the residual stream."""
        if not self._options.drift:
            return {}
        layers = [layer for some in stage.layers.values() for layer in some if layer.weight in weights]
        found = {layer: _summand(layer) for layer in layers if len(self._layers[layer.weight]) == 1}
        return {layer: value for layer, value in found.items() if value is not None and stage.knows(value)}

    def _together(self, weights: Sequence[ir.Value]) -> list[list[ir.Value]]:
        """Group weights that share moments and scheme: their rows are quantized in one go, with the same result."""
        groups: dict[tuple[Hashable, WeightScheme], list[ir.Value]] = {}
        for weight in weights:
            groups.setdefault((self._key(weight), self._schemes[weight]), []).append(weight)
        if any(self._schemes[weight].format == "nvfp4" for weight in weights):  # a scale of the whole matrix besides
            return [[weight] for weight in weights]
        return list(groups.values())

    def _told(self, weight: ir.Value, finished: Finished) -> Produce:
        """Take up what is to be told about a finished weight, and return what gives it."""
        self._figures[self._layers[weight][0].name] = finished.facts
        return finished.produce

    def _quantize(self, weights: Sequence[ir.Value], moments: LayerMoments) -> dict[ir.Value, Produce]:
        options, scheme = self._options, self._schemes[weights[0]]
        layers = [self._layers[weight][0] for weight in weights]
        stacks = [_stacked(layer) for layer in layers]
        original = np.concatenate(stacks, axis=-2)
        wanted = original
        if moments.drifts:
            pull = np.concatenate(
                [moments.pull(stack, layer) for stack, layer in zip(stacks, layers, strict=True)], axis=-2
            )
            damping = max(_DRIFT_DAMPING, _DRIFT_DAMPING_BY_INPUTS * layers[0].inputs / max(moments.rows, 1))
            wanted = moments.wanted(original, options.drift * pull, damping)
        hessian = moments.hessian
        try:
            problem = Problem(wanted, hessian, scheme, layers[0].kind == "convolution", _stays(layers, stacks))
            result, damping = options.solve(problem)
            result = _with_zeros(result, problem.stays)
        except ValueError as error:
            raise UserError(f"{options.name}: '{layers[0].name}': {error}") from error
        produced: dict[ir.Value, Produce] = {}
        places = np.arange(original[..., 0].size).reshape(original.shape[:-1])
        start = 0
        for weight, stack in zip(weights, stacks, strict=True):
            rows = places[..., start : start + stack.shape[-2]].reshape(-1)
            part = _rows(result, rows)
            facts = {
                "bits": scheme.bits,
                "relative_error": _relative_error(stack, part, hessian),
                "rows": moments.rows,
                "damping": damping,
            }
            produced[weight] = self._told(weight, self._finished.keep(weight.name or "", part, facts))
            start += stack.shape[-2]
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


class _Taken:
    """What one sample sends into a layer: rows as they are, or the patches of a convolution.

    Attributes:
        changed: float32 [n, K]; [groups, n, K] of a layer in groups.
        original: the same in the model as it was, or None.
    """

    def __init__(self, layer: LinearLayer, rows: Rows, number: int, samples: int) -> None:
        self.changed, self.original = rows
        self._whole = rows.changed.shape
        if isinstance(layer, Convolution):
            most = -(-max(_PATCHES, _PATCHES_PER_INPUT * layer.inputs) // samples)
            most = min(most, _PATCH_ELEMENTS // (layer.inputs * layer.groups) + 1)
            self._positions = layer.window.positions(rows.changed.shape, most, number)
            self.changed = self._patches(layer.window, rows.changed)
            self.original = None if rows.original is None else self._patches(layer.window, rows.original)

    def _patches(self, window: Window, x: np.ndarray) -> np.ndarray:
        patches = window.rows(x, self._positions)
        return patches if window.groups > 1 else patches[0]

    def moved(self, layer: LinearLayer, added: Rows) -> np.ndarray | None:
        """Return how that has moved which is added to the layer's outputs, [n, M], or [groups, n, M].

        None for what is broadcast to them, which tells nothing of single rows.
        """
        if added.original is None:
            return None
        difference = added.original - added.changed
        if isinstance(layer, Convolution):
            outputs = (self._positions[0], slice(None), *self._positions[1:])
            if difference.ndim != len(outputs) or difference.shape != self._shape(layer):
                return None
            found: np.ndarray = difference[outputs]
            if layer.groups == 1:
                return found
            return np.ascontiguousarray(found.reshape(len(found), layer.groups, -1).transpose(1, 0, 2))
        return difference if difference.shape == (len(self.changed), layer.outputs) else None

    def _shape(self, layer: Convolution) -> tuple[int, ...]:
        samples, _, *sizes = self._whole
        return (samples, layer.outputs, *layer.window.outputs(tuple(sizes)))


def _stays(layers: Sequence[LinearLayer], stacks: Sequence[np.ndarray]) -> np.ndarray | None:
    """Return what may be other than zero in the rows of layers, or None where none of them was made sparse."""
    sparse = [pattern_of(layer.node) is not None for layer in layers]
    if not any(sparse):
        return None
    parts = [stack != 0 if one else np.ones(stack.shape, bool) for stack, one in zip(stacks, sparse, strict=True)]
    return np.concatenate(parts, axis=-2)


def _with_zeros(result: QuantizedWeight, stays: np.ndarray | None) -> QuantizedWeight:
    """Set what must be zero to zero, for solvers that do not look at it."""
    if stays is None:
        return result
    if result.zero_point is None:
        zero: np.ndarray = np.asarray(np.argmin(np.abs(levels(result.scheme))), np.uint8)
    else:
        zero = spread_groups(result.zero_point, result.scheme, result.codes.shape[1])
    codes = np.where(stays.reshape(result.codes.shape), result.codes, zero).astype(np.uint8)
    return dataclasses.replace(result, codes=codes)


def _source(layer: LinearLayer) -> Hashable:
    """Return what layers with the same rows have in common: what they read, and how a kernel moves over it."""
    return (layer.x, layer.window) if isinstance(layer, Convolution) else layer.x


def _stacked(layer: LinearLayer) -> np.ndarray:
    """Return the weights, float32 [N, K], or [groups, M, K]."""
    matrix = layer.matrix()
    return matrix if layer.groups == 1 else matrix.reshape(layer.groups, -1, layer.inputs)


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
    found = quantized.dequantize().reshape(weight.shape)
    if weight.ndim == 3:
        with steady():
            error = np.asarray(weight, np.float64) - found
            lost = float(np.vdot(error @ hessian, error))
            size = float(np.vdot(weight @ hessian, weight))
    else:
        lost = output_error(weight, found, hessian)
        size = float(np.vdot(weight @ hessian, weight))
    return lost / size if size > 0 else 0.0


def _rows(weight: QuantizedWeight, rows: np.ndarray) -> QuantizedWeight:
    zero_point = None if weight.zero_point is None else weight.zero_point[rows]
    return QuantizedWeight(weight.codes[rows], weight.scale[rows], zero_point, weight.scheme)
