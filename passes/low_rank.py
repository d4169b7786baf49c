"""Weights as products of two thin matrices.

    y = MatMul(x, W)               =>    y = MatMul(MatMul(x, A), B)                  W [K, N], A [K, r], B [r, N]
    y = Gemm(x, W, b)              =>    y = Gemm(Gemm(x, A), B, b)
    y = Conv(x, W, b)              =>    y = Conv(Conv(x, A), B, b)                   B of one element: channels
    y = Conv(x, W, b)              =>    y = Conv(Conv(x, A), B, b)                   k x 1, then 1 x k: spatial
    y = Conv(x, W, b)              =>    y = Conv(Conv(Conv(x, A), C), B, b)          Tucker-2

    y = MatMul(x, dequantized W)   =>    y = Add(MatMul(x, dequantized W), MatMul(MatMul(x, A), B))     of=error

With calibration data, A and B are those of the least error in the layer's output (`method=activation`), given what the
layers before, thinned already, make of the samples; without, those of the least error in the weight (`svd`). Either a
`rank`, or the share of the output's `energy` that is kept, or the share (`ratio`) of all these weights that is cut:
then the ranks are allocated over the layers for the least error in all. A layer stays whole where that would not save
multiply-adds. With `of=error`, what a quantizer before took from a weight is brought back as far as the rank reaches.

It does not fire on weights that are shared, computed or compressed already (but for `of=error`), on embeddings, and on
grouped or transposed convolutions.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.block_stream import BlockStream
from qgraph.analysis.compressed_weights import compressed
from qgraph.analysis.convolutions import Convolution, weighted_layers
from qgraph.analysis.importance import rows_of
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.output_gradients import output_gradients
from qgraph.errors import UserError
from qgraph.numerics.low_rank import Factors, Spectrum, allocate_ranks, factors, rank_for_energy, spectrum
from qgraph.numerics.pruning import Moments, compensate
from qgraph.passes._low_rank_parts import Parts, add_beside, replace_layer, spatial_parts, tucker_parts, two_parts
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["LowRank"]

_ERROR_RANK = 16
_MANY_NODES = 2000
"""Of larger graphs, the layers of a block are thinned at once: opening a session for each would take long."""


@dataclass(frozen=True)
class LowRank(Pass):
    """Write weights as products of two thin matrices, where that saves multiplications."""

    name: ClassVar[str] = "low-rank"
    rank: int = field(default=0, metadata={"help": "the same rank for every layer"})
    energy: float = field(default=0.0, metadata={"help": "share of each layer's output that is kept, 0 to 1"})
    ratio: float = field(default=0.2, metadata={"help": "share of all these weights that is cut, 0 to 1"})
    method: Literal["auto", "svd", "activation"] = field(
        default="auto",
        metadata={"help": "least error in the weight or in the output; auto: the latter with calibration data"},
    )
    errors: Literal["outputs", "layer"] = field(
        default="outputs",
        metadata={"help": "errors in a layer's output count as they change the model's outputs, or all alike"},
    )
    of: Literal["weight", "error"] = field(
        default="weight", metadata={"help": "thin the weights, or bring back what quantizing them has lost"}
    )
    conv: Literal["channel", "spatial", "tucker"] = field(
        default="channel", metadata={"help": "how kernels are decomposed; spatial and tucker look at the weight alone"}
    )
    min_elements: int = field(default=4096, metadata={"help": "smaller weights stay whole"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError("rank must not be negative")
        if not 0.0 <= self.energy <= 1.0:
            raise ValueError(f"the energy {self.energy:g} is not between 0 and 1: it is the share that is kept")
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"the ratio {self.ratio:g} is not between 0 and 1: it is the share that is cut")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Decompose; `figures` has the rank of every layer, 0 for those that stay whole.

        Raises:
            UserError: method=activation without calibration samples, the model does not run on one, a weight is not
                finite, or of=error without a quantizer before.
        """
        if self.method == "activation":
            context.samples(f"'{self.name}' with method=activation")
        if self.of == "error":
            return self._bring_back(model, context)
        layers, skipped = self._layers(model, context)
        if not layers:
            return Report(skipped=skipped)
        counts, missing = self._counts(model, context, layers)
        ranks = self._ranks(model, context, layers, counts)
        whole = [layer for layer, rank in ranks.items() if rank == 0]
        skipped += [Skipped(layer.name, "no rank that keeps enough would save multiply-adds") for layer in whole]
        thinned = {layer: rank for layer, rank in ranks.items() if rank}
        if not thinned:
            return Report(skipped=skipped)
        context.keep_reference(model)
        before = qgraph.ir.parameter_count(model)
        for layer, parts in self._decomposed(model, context, thinned, counts).items():
            replace_layer(model, layer, parts)
        share = 100 * (1 - qgraph.ir.parameter_count(model) / before)
        notes = [
            f"{len(thinned)} layers thinned to ranks {_span(thinned.values())}",
            f"{share:.1f} % of the parameters cut",
        ]
        if missing:
            notes.append(f"errors of all layers count alike: {missing}")
        return Report(len(thinned), skipped, notes, {"ranks": {layer.name: rank for layer, rank in ranks.items()}})

    def _layers(self, model: ir.Model, context: Context) -> tuple[list[LinearLayer], list[Skipped]]:
        found = weighted_layers(model, context, ("Conv",))
        skipped = list(found.skipped)
        layers = []
        for weight, group in found.by_weight.items():
            layer = group[0]
            reason = self._unfit(layer, shared=len(group) > 1 or qgraph.ir.only_consumer(weight) is None)
            if reason:
                skipped += [Skipped(one.name, reason) for one in group]
            else:
                layer.require_finite()
                layers.append(layer)
        return layers, skipped

    def _unfit(self, layer: LinearLayer, *, shared: bool) -> str:
        if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in self.exclude):
            return "it is excluded"
        if layer.kind == "embedding":
            return "it is an embedding"
        if shared:
            return "its weight is shared"
        if isinstance(layer, Convolution) and layer.groups > 1:
            return "its channels are in groups"
        if isinstance(layer, Convolution) and self.conv == "spatial" and not _is_flat(layer.shape):
            return "its kernel has not two spatial axes"
        if layer.inputs * layer.outputs < self.min_elements:
            return f"its weight has fewer than {self.min_elements} elements"
        return ""

    def _counts(
        self, model: ir.Model, context: Context, layers: Sequence[LinearLayer]
    ) -> tuple[dict[LinearLayer, np.ndarray], str]:
        """Return how much errors in what layers give count at the outputs, or none and why."""
        if not self._by_activation(context) or self.errors == "layer":
            return {}, ""
        return output_gradients(model, context, [layer for layer in layers if not self._is_spatial(layer)], self.name)

    # --- ranks --------------------------------------------------------------------------------------------------------

    def _by_activation(self, context: Context) -> bool:
        return self.method == "activation" or (self.method == "auto" and context.calibration is not None)

    def _ranks(
        self, model: ir.Model, context: Context, layers: Sequence[LinearLayer], counts: Mapping[LinearLayer, np.ndarray]
    ) -> dict[LinearLayer, int]:
        if self.rank:
            return {layer: self._capped(layer, self.rank) for layer in layers}
        if self.conv == "tucker" and not self.energy and any(isinstance(layer, Convolution) for layer in layers):
            return {layer: self._rank_within(layer) for layer in layers}
        found = self._spectra(model, context, layers, counts)
        if self.energy:
            return {layer: self._capped(layer, rank_for_energy(found[layer], self.energy)) for layer in layers}
        chosen = allocate_ranks([found[layer] for layer in layers], 1.0 - self.ratio)
        return dict(zip(layers, chosen, strict=True))

    def _capped(self, layer: LinearLayer, rank: int) -> int:
        """Return a rank if it saves multiply-adds, else 0."""
        return rank if rank > 0 and _size_at(layer, rank, self.conv) < layer.inputs * layer.outputs else 0

    def _rank_within(self, layer: LinearLayer) -> int:
        """Return the largest rank that leaves `ratio` of a layer's weights out."""
        bound = (1.0 - self.ratio) * layer.inputs * layer.outputs
        fits = [rank for rank in range(1, layer.outputs + 1) if _size_at(layer, rank, self.conv) <= bound]
        return max(fits, default=0)

    def _spectra(
        self, model: ir.Model, context: Context, layers: Sequence[LinearLayer], counts: Mapping[LinearLayer, np.ndarray]
    ) -> dict[LinearLayer, Spectrum]:
        found = {
            layer: spectrum(_spatial(layer) if self._is_spatial(layer) else layer.matrix(), None)
            for layer in layers
            if self._is_spatial(layer) or not self._by_activation(context)
        }
        others = [layer for layer in layers if layer not in found]
        for stage in BlockStream(model, context, others, who=self.name, sequential="block").stages() if others else ():
            moments = _moments(stage.layers)
            for number, rows in enumerate(stage.rows()):
                for x, group in stage.layers.items():
                    for layer in group:
                        part = rows_of(layer, rows[x].changed, context.seed + number)
                        moments[layer].add(part, part)
            for layer, moment in moments.items():
                found[layer] = spectrum(layer.matrix(), moment.gram[:-1, :-1], counts.get(layer))
        return found

    def _is_spatial(self, layer: LinearLayer) -> bool:
        return isinstance(layer, Convolution) and self.conv != "channel"

    # --- factors ------------------------------------------------------------------------------------------------------

    def _decomposed(
        self,
        model: ir.Model,
        context: Context,
        ranks: Mapping[LinearLayer, int],
        counts: Mapping[LinearLayer, np.ndarray],
    ) -> dict[LinearLayer, Parts]:
        found: dict[LinearLayer, Parts] = {}
        followed = []
        for layer, rank in ranks.items():
            if isinstance(layer, Convolution) and self.conv == "spatial":
                found[layer] = spatial_parts(layer, rank)
            elif isinstance(layer, Convolution) and self.conv == "tucker":
                found[layer] = tucker_parts(layer, rank)
            elif self._by_activation(context):
                followed.append(layer)
            else:
                both = factors(layer.matrix(), None, rank)
                found[layer] = two_parts(layer, both.first, both.second)
        order: Literal["layer", "block"] = "layer" if len(model.graph) <= _MANY_NODES else "block"
        stream = BlockStream(model, context, followed, who=self.name, sequential=order, originals=True)
        for stage in stream.stages() if followed else ():
            moments = _moments(stage.layers)
            for number, rows in enumerate(stage.rows()):
                for x, group in stage.layers.items():
                    original = rows[x].original
                    assert original is not None
                    for layer in group:
                        seed = context.seed + number
                        moments[layer].add(rows_of(layer, rows[x].changed, seed), rows_of(layer, original, seed))
            for layer, moment in moments.items():
                best, _ = compensate(layer.matrix(), None, np.ones(layer.inputs, bool), moment)
                both = factors(best, moment.gram[:-1, :-1], ranks[layer], counts.get(layer))
                stage.change(layer.weight, both.second @ both.first)
                found[layer] = two_parts(layer, both.first, both.second)
        return {layer: found[layer] for layer in ranks}

    # --- the error of a quantizer -------------------------------------------------------------------------------------

    def _bring_back(self, model: ir.Model, context: Context) -> Report:
        reference = context.reference
        if reference is None:
            raise UserError("'low-rank' with of=error needs a quantizer of weights before it, such as rtn or gptq")
        skipped: list[Skipped] = []
        lost: dict[LinearLayer, np.ndarray] = {}
        readers: dict[LinearLayer, list[ir.Node]] = {}
        layers = {str(one.weight.name): one for one in weighted_layers(reference, None).layers if one.kind == "linear"}
        for weight in compressed(model):
            layer = layers.get(weight.name)
            nodes = [node for node in weight.readers if qgraph.ir.is_op(node, "MatMul", "Gemm")]
            labels = list(map(qgraph.ir.node_label, nodes))
            excluded = any(fnmatch.filter(labels, pattern) for pattern in self.exclude)
            if layer is None or not nodes or excluded:
                reason = "it is excluded" if excluded else "its weight is no linear layer's of the model before"
                skipped.append(Skipped(weight.name, reason))
                continue
            lost[layer] = layer.matrix() - weight.quantized().dequantize()
            readers[layer] = nodes
        ranks = {layer: min(self.rank or _ERROR_RANK, *error.shape) for layer, error in lost.items()}
        if self._by_activation(context) and lost:
            both = self._lost_in_output(reference, context, lost, ranks)
        else:
            both = {layer: factors(error, None, ranks[layer]) for layer, error in lost.items()}
        for layer, found in both.items():
            for node in readers[layer]:
                add_beside(model, node, found.first, found.second)
        notes = [f"the errors of {len(both)} weights brought back with rank {_span(ranks.values())}"] if both else []
        return Report(len(both), skipped, notes, {"ranks": {layer.name: rank for layer, rank in ranks.items()}})

    def _lost_in_output(
        self,
        reference: ir.Model,
        context: Context,
        lost: Mapping[LinearLayer, np.ndarray],
        ranks: Mapping[LinearLayer, int],
    ) -> dict[LinearLayer, Factors]:
        found = {}
        for stage in BlockStream(reference, context, list(lost), who=self.name, sequential="block").stages():
            moments = _moments(stage.layers)
            for rows in stage.rows():
                for x, group in stage.layers.items():
                    for layer in group:
                        moments[layer].add(rows[x].changed, rows[x].changed)
            for layer, moment in moments.items():
                found[layer] = factors(lost[layer], moment.gram[:-1, :-1], ranks[layer])
        return {layer: found[layer] for layer in lost}


def _moments(layers: Mapping[ir.Value, Sequence[LinearLayer]]) -> dict[LinearLayer, Moments]:
    return {layer: Moments(layer.inputs) for group in layers.values() for layer in group}


def _size_at(layer: LinearLayer, rank: int, conv: str) -> int:
    """Return the elements of a layer's parts at a rank."""
    if isinstance(layer, Convolution) and conv == "spatial":
        outputs, inputs, height, width = layer.shape
        return rank * (inputs * height + outputs * width)
    if isinstance(layer, Convolution) and conv == "tucker":
        outputs, inputs, *taps = layer.shape
        less, more = min(rank, inputs), min(rank, outputs)
        return inputs * less + less * more * math.prod(taps) + more * outputs
    return rank * (layer.inputs + layer.outputs)


def _is_flat(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and min(shape[2:]) > 1


def _spatial(layer: LinearLayer) -> np.ndarray:
    """Return the matrix of a kernel whose rank is that of its decomposition in space."""
    assert isinstance(layer, Convolution)
    outputs, inputs, height, width = layer.shape
    kernel = layer.matrix().reshape(layer.shape)
    return kernel.transpose(0, 3, 1, 2).reshape(outputs * width, inputs * height)


def _span(ranks: Collection[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"{low}" if low == high else f"{low} to {high}"
