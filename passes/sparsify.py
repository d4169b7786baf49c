"""Weights set to zero, by a pattern that hardware or a sparse format can use.

    y = MatMul(x, W)    =>    y = MatMul(x, W with 2 of every 4 neighbouring inputs zero)        Gemm and Conv likewise

`magnitude` keeps the largest weights; `wanda` the largest weights times the sizes of their inputs, seen from
calibration samples (Sun et al. 2023); `sparsegpt` lets the weights that stay make up for those that go, layer after
layer (Frantar and Alistarh 2023), each seeing what the sparse layers before it give. Patterns: 2:4 or another n:m,
`unstructured` or `block` (4 x 4) with a `ratio` of zeros. They run along the inputs of each output, those of a
convolution along the channels of every element of its kernel, as sparse tensor cores want them.

The file does not get smaller by itself: zeros are stored like other numbers, until `pack-sparse` leaves them out.
Quantizers round zero to zero, and the pipeline checks after every pass that no zero was filled in.

It does not fire on weights that are computed, shared, embeddings, compressed or sparse already, or smaller than
`min_elements`; n:m not where the inputs of a layer are fewer than m.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.block_stream import BlockStream, Stage
from qgraph.analysis.convolutions import Convolution, weighted_layers
from qgraph.analysis.importance import rows_of
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.sparse_weights import ZerosStay, mark_sparse, pattern_of
from qgraph.errors import UserError
from qgraph.numerics.moments import LayerMoments
from qgraph.numerics.sparsity import Pattern, mask_of, parse_pattern, sparse_gptq
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["Sparsify"]

_DRIFT_DAMPING = 0.01


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set weights to zero in a pattern, and let the others make up for it."""

    name: ClassVar[str] = "sparsify"
    pattern: str = field(default="2:4", metadata={"help": "n:m, unstructured or block"})
    ratio: float = field(default=0.5, metadata={"help": "share of zeros, for unstructured and block"})
    method: Literal["auto", "magnitude", "wanda", "sparsegpt"] = field(
        default="auto", metadata={"help": "which weights go; auto: sparsegpt with calibration data, else magnitude"}
    )
    damping: float = field(default=0.01, metadata={"help": "share of the mean diagonal added to the Hessian"})
    drift: float = field(
        default=1.0, metadata={"help": "share of what the layers before have changed that the weights make up for"}
    )
    ops: tuple[str, ...] = field(
        default=("Conv", "Gemm", "MatMul"), metadata={"help": "operators whose weights become sparse"}
    )
    min_elements: int = field(default=1024, metadata={"help": "smaller weights stay as they are"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def __post_init__(self) -> None:
        parse_pattern(self.pattern, self.ratio)
        if self.damping < 0 or not 0.0 <= self.drift <= 1.0:
            raise ValueError("damping must not be negative, and drift is a share from 0 to 1")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Set weights to zero; `figures` has the share of zeros and the relative output error of every layer.

        Raises:
            UserError: wanda or sparsegpt without calibration samples, the model does not run on one, or a weight is
                not finite.
        """
        pattern = parse_pattern(self.pattern, self.ratio)
        method = self.method
        if method == "auto":
            method = "sparsegpt" if context.calibration is not None else "magnitude"
        if method != "magnitude":
            context.samples(f"'{self.name}' with method={method}")
        layers, skipped = self._layers(model, context, pattern)
        if not layers:
            return Report(skipped=skipped)
        context.keep_reference(model)
        changed, figures = self._sparse(model, context, layers, pattern, method)
        zeros = sum(int(np.count_nonzero(array == 0)) for array in changed.values())
        total = sum(array.size for array in changed.values())
        for layer in layers:
            array = changed[layer]
            tensor = layer.weight.const_value
            assert tensor is not None
            layer.weight.const_value = ir.tensor(
                array.astype(tensor.dtype.numpy()), dtype=tensor.dtype, name=layer.weight.name
            )
            mark_sparse(layer.node, pattern, float(np.mean(array == 0)))
        context.promises.append(ZerosStay())
        notes = [f"{len(layers)} weights {pattern} by {method}", f"{100 * zeros / total:.1f} % of them zero"]
        return Report(len(layers), skipped, notes, {"layers": figures})

    def _layers(self, model: ir.Model, context: Context, pattern: Pattern) -> tuple[list[LinearLayer], list[Skipped]]:
        found = weighted_layers(model, context, tuple(op for op in self.ops if op.startswith("Conv")))
        skipped, layers = list(found.skipped), []
        for weight, group in found.by_weight.items():
            shared = len(group) > 1 or qgraph.ir.only_consumer(weight) is None
            reason = self._unfit(group[0], pattern, shared=shared)
            if reason is None:
                layers.append(group[0])
            elif reason:
                skipped += [Skipped(layer.name, reason) for layer in group]
        return layers, skipped

    def _unfit(self, layer: LinearLayer, pattern: Pattern, *, shared: bool) -> str | None:
        """Return why a layer is left alone; '' where there is nothing to say of it."""
        if any(fnmatch.fnmatchcase(layer.name, name) for name in self.exclude):
            return "it is excluded"
        if layer.kind == "embedding" or layer.node.op_type not in self.ops:
            return "it is an embedding" if layer.kind == "embedding" else f"{layer.node.op_type} is not among 'ops'"
        if pattern_of(layer.node) is not None:
            return ""
        if shared:
            return "its weight is shared"
        if isinstance(layer, Convolution) and layer.groups > 1:
            return "its channels are in groups"
        if layer.inputs * layer.outputs < self.min_elements:
            return f"its weight has fewer than {self.min_elements} elements"
        channels = layer.shape[1] if isinstance(layer, Convolution) else layer.inputs
        if not pattern.fits(channels):
            return f"its {channels} inputs are no multiple of {pattern.of}"
        return None

    def _sparse(
        self, model: ir.Model, context: Context, layers: Sequence[LinearLayer], pattern: Pattern, method: str
    ) -> tuple[dict[LinearLayer, np.ndarray], dict[str, dict[str, float]]]:
        """Return the sparse weights as they are stored, and facts by layer."""
        matrices: dict[LinearLayer, np.ndarray] = {}
        figures: dict[str, dict[str, float]] = {}
        for layer in layers:  # before any of them spoils what the samples give
            _finite(layer)
        if method == "magnitude":
            for layer in layers:
                weight = _finite(layer)
                order = _by_channels(layer)
                matrices[layer] = np.zeros_like(weight)
                kept = mask_of(np.abs(weight[:, order]), pattern)
                matrices[layer][:, order] = np.where(kept, weight[:, order], 0)
        else:
            stream = BlockStream(
                model, context, layers, who=self.name, originals=method == "sparsegpt" and self.drift > 0
            )
            for stage in stream.stages():
                for layer, moments in self._moments(stage, context).items():
                    matrices[layer] = self._solved(layer, moments, pattern, method)
                    stage.change(layer.weight, matrices[layer])
                    figures[layer.name] = {
                        "relative_error": _relative(layer.matrix(), matrices[layer], moments.hessian)
                    }
        for layer in layers:
            figures.setdefault(layer.name, {})["zeros"] = float(np.mean(matrices[layer] == 0))
        return {layer: layer.stored(matrices[layer]) for layer in layers}, figures

    def _moments(self, stage: Stage, context: Context) -> Mapping[LinearLayer, LayerMoments]:
        found: dict[LinearLayer, LayerMoments] = {}
        taken: dict[ir.Value, list[LinearLayer]] = {}
        for x, group in stage.layers.items():
            # Products that read the same tensor have the same moments; convolutions have windows of their own.
            apart = [layer for layer in group if isinstance(layer, Convolution)]
            alike = [layer for layer in group if not isinstance(layer, Convolution)]
            taken[x] = [*apart, *alike[:1]]
            found.update((layer, LayerMoments(layer.inputs)) for layer in taken[x])
            found.update((layer, found[alike[0]]) for layer in alike)
        for number, rows in enumerate(stage.rows()):
            for x, group in taken.items():
                for layer in group:
                    seed = context.seed + number
                    original = rows[x].original
                    before = None if original is None else rows_of(layer, original, seed)
                    found[layer].add(rows_of(layer, rows[x].changed, seed), before)
        return found

    def _solved(self, layer: LinearLayer, moments: LayerMoments, pattern: Pattern, method: str) -> np.ndarray:
        weight, order = _finite(layer), _by_channels(layer)
        hessian = moments.hessian[np.ix_(order, order)]
        result = np.empty_like(weight)
        if method == "wanda":
            scores = np.abs(weight[:, order]) * np.sqrt(np.maximum(hessian.diagonal(), 0.0))
            result[:, order] = np.where(mask_of(scores, pattern, by_output=True), weight[:, order], 0)
            return result
        wanted = weight
        if moments.drifts:
            wanted = moments.wanted(weight, self.drift * moments.pull(weight), _DRIFT_DAMPING)
        result[:, order] = sparse_gptq(wanted[:, order], hessian, pattern, damping=self.damping).weight
        return result


def _by_channels(layer: LinearLayer) -> np.ndarray:
    """Return the columns of a layer's matrix in the order in which patterns run: channels next to one another."""
    columns = np.arange(layer.inputs)
    return columns.reshape(layer.shape[1], -1).T.reshape(-1) if isinstance(layer, Convolution) else columns


def _finite(layer: LinearLayer) -> np.ndarray:
    weight = layer.matrix()
    if not np.isfinite(weight).all():
        raise UserError(f"the weight '{layer.weight.name}' of '{layer.name}' holds NaN or infinity: mend the model")
    return weight


def _relative(weight: np.ndarray, sparse: np.ndarray, hessian: np.ndarray) -> float:
    error = (weight - sparse).astype(np.float64)
    lost = float(np.einsum("nk,kl,nl->", error, hessian, error, optimize=True))
    power = float(np.einsum("nk,kl,nl->", weight, hessian, weight, optimize=True))
    return float(f"{lost / max(power, 1e-300):.4g}")
