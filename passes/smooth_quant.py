"""Outlier channels of activations moved into the weights.

    y = MatMul(x, W)    =>    y = MatMul(Mul(x, 1 / s), diag(s) W)          Gemm likewise

    y = MatMul(Attention(q, k, MatMul(z, V) + b), W)
    =>
    y = MatMul(Attention(q, k, MatMul(z, V diag(1 / s)) + b / s), diag(s) W)        without a Mul

Exact in real numbers; what changes is what 8 bits make of it. Products of the same x share one Mul, and need none
where the constants that make x take the factors: those of a norm or a layer before (`qgraph.analysis.scale_folding`).
s = max|x|^alpha / max|w|^(1 - alpha), and alpha is searched for each x; scales that are 1 but for the channels above a
threshold are tried too (see `qgraph.numerics.smoothing`). They are judged on calibration samples by the noise of the
quantized products, and set only where that falls by `least_gain` at least. Where it takes a Mul, it must have been
above `tolerated` and fall by `mul_gain`: all Muls that an encoder wants cost about 4 % of its time. A fixed `alpha` is
set everywhere.

It does not fire on weights that are computed, of more than two dimensions, of another type than float32, or that
somebody else reads too. What is smoothed already is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.activations import Watch
from qgraph.analysis.linear_layers import LinearLayer, linear_layers, matches
from qgraph.analysis.reductions import Request
from qgraph.analysis.scale_folding import Folding, current, find_folding, scale_input
from qgraph.analysis.shapes import shapes_of
from qgraph.errors import UserError
from qgraph.numerics.smoothing import ALPHAS, Sample, Smoothing, search_scales
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["SmoothQuant"]

_ROWS_PER_FEED = 16
_MOST_FEEDS = 32
"""Rows are kept of this many feeds; bounds of the others would add little."""
_SMOOTHED = "qgraph.smoothed"
"""Metadata of a product whose input is smoothed: the alpha, or "threshold"."""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Scale outlier channels of activations down, and the weights that read them up."""

    name: ClassVar[str] = "smooth-quant"
    alpha: float | Literal["search"] = field(
        default="search", metadata={"help": "share of the difficulty that moves into the weights, 0 to 1"}
    )
    activations: Literal["dynamic", "static"] = field(
        default="dynamic", metadata={"help": "the ranges to smooth for: those of each run, or one for all samples"}
    )
    least_gain: float = field(default=0.5, metadata={"help": "gain (dB) below which a product stays as it is"})
    mul_gain: float = field(default=2.0, metadata={"help": "the same where the scales cost a Mul at run time"})
    tolerated: float = field(
        default=28.0, metadata={"help": "signal-to-noise ratio (dB) from which no Mul is worth it"}
    )
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def __post_init__(self) -> None:
        if self.alpha != "search" and not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha is {self.alpha}: give a number from 0 to 1, or 'search'")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Smooth what needs it; `figures` has the signal-to-noise ratio of every input before and after, in dB.

        Raises:
            UserError: there are no calibration samples, the model does not run on one, or a weight is NaN or infinite.
        """
        layers = linear_layers(model).layers
        groups, skipped = self._groups(model, layers)
        if not groups:
            return Report(skipped=skipped)
        samples, unavailable = _watch(model, context, groups)
        shapes = context.analyse(shapes_of, model)
        changed, figures = 0, {}
        alphas: dict[str, float | None] = {}
        for done, (x, stale) in enumerate(groups.items()):
            context.progress("smooth", done, len(groups))
            readers = [current(layer) for layer in stale]
            seen = samples.get(x.name or "", [])
            if not seen:
                reason = unavailable.get(x.name or "", "its input was empty in every sample")
                skipped += [Skipped(layer.name, reason) for layer in readers]
                continue
            folding = find_folding(x, readers, shapes, layers)
            found = self._search(seen, [_finite(layer).T for layer in readers], folding)
            gains = self._gains(found, folding)
            if gains:
                scale_input(model, folding, found.scales, suffix="smooth")
                changed += len(readers)
                alphas[x.name or ""] = found.alpha
                for layer in readers:
                    layer.node.metadata_props[_SMOOTHED] = "threshold" if found.alpha is None else f"{found.alpha:g}"
            figures[x.name or ""] = [
                _decibels(noise) for noise in (found.before, found.after if gains else found.before)
            ]
        context.progress("smooth", len(groups), len(groups))
        notes = [f"{len(alphas)} of {len(figures)} inputs smoothed, {_told(alphas.values())}"] if alphas else []
        return Report(
            changed=changed, skipped=skipped, notes=notes, figures={"signal_to_noise": figures, "alpha": alphas}
        )

    def _search(self, seen: Sequence[Sample], weights: Sequence[np.ndarray], folding: Folding) -> Smoothing:
        return search_scales(
            seen,
            weights,
            per_run=self.activations == "dynamic",
            alphas=ALPHAS if self.alpha == "search" else (self.alpha,),
            thresholds=self.alpha == "search",
            tied=folding.tied,
        )

    def _gains(self, found: Smoothing, folding: Folding) -> bool:
        """Tell whether scales are worth setting."""
        if self.alpha != "search":
            return True
        before, after = _decibels(found.before), _decibels(found.after)
        if folding.origin is not None:
            return after - before >= self.least_gain
        return before < self.tolerated and after - before >= max(self.least_gain, self.mul_gain)

    def _groups(
        self, model: ir.Model, layers: Sequence[LinearLayer]
    ) -> tuple[dict[ir.Value, list[LinearLayer]], list[Skipped]]:
        """Return the layers that can be scaled, by the activation they read."""
        groups: dict[ir.Value, list[LinearLayer]] = {}
        skipped: list[Skipped] = []
        found = {layer.node: layer for layer in layers}
        for node in model.graph:
            if not qgraph.ir.is_op(node, "MatMul", "Gemm"):
                continue
            label = qgraph.ir.node_label(node)
            layer = found.get(node)
            reason = "it is excluded" if matches(label, self.exclude) else _why_not(node)
            if reason is not None or layer is None:
                skipped.append(Skipped(label, reason or "it is no product of rows with a constant matrix"))
                continue
            groups.setdefault(layer.x, []).append(layer)
        inner = [node for graph in model.graph.subgraphs() for node in graph if qgraph.ir.is_op(node, "MatMul", "Gemm")]
        reason = "it is inside a subgraph, which calibration does not see"
        return groups, [*skipped, *(Skipped(qgraph.ir.node_label(node), reason) for node in inner)]


def _finite(layer: LinearLayer) -> np.ndarray:
    matrix = layer.matrix()
    if not np.isfinite(matrix).all():
        raise UserError(f"smooth-quant: the weight of '{layer.name}' holds NaN or infinity: mend the model")
    return matrix


def _why_not(node: ir.Node) -> str | None:
    x, weight = node.inputs[:2]
    if weight is None or weight.const_value is None or weight.is_graph_input():
        return "it multiplies activations"
    if x is None or x.const_value is not None:
        return "its left factor is constant"
    if _SMOOTHED in node.metadata_props:
        return "its input is smoothed already"
    if weight.const_value.dtype != ir.DataType.FLOAT or len(weight.const_value.shape) != 2:
        return "its weight is not a float32 matrix"
    if len(weight.uses()) > 1 or weight.is_graph_output():
        return "its weight is used elsewhere too"
    return "its input is transposed" if node.attributes.get_int("transA", 0) else None


def _watch(
    model: ir.Model, context: Context, groups: Iterable[ir.Value]
) -> tuple[dict[str, list[Sample]], Mapping[str, str]]:
    watch = Watch(model, context, [Request(x.name or "", -1, _ROWS_PER_FEED) for x in groups])
    samples: dict[str, list[Sample]] = {}
    for name, observation in watch:
        kept = samples.setdefault(name, [])
        if len(kept) < _MOST_FEEDS:
            kept.append(Sample(observation.low, observation.high, observation.sample.T.astype(np.float32)))
    return samples, watch.unavailable


def _told(alphas: Collection[float | None]) -> str:
    """Return the range of the alphas that were chosen, and how many inputs took a threshold instead."""
    chosen = sorted(alpha for alpha in alphas if alpha is not None)
    above = len(alphas) - len(chosen)
    told = (
        [f"alpha {chosen[0]:g}" if chosen[0] == chosen[-1] else f"alpha {chosen[0]:g} to {chosen[-1]:g}"]
        if chosen
        else []
    )
    return " and ".join([*told, f"{above} above a threshold"] if above else told)


def _decibels(noise: float) -> float:
    return round(-10.0 * math.log10(max(noise, 1e-20)), 2)
