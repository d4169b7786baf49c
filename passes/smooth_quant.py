"""Outlier channels of activations moved into the weights.

    y = MatMul(x, W)    =>    y = MatMul(Mul(x, 1 / s), diag(s) W)          Gemm likewise

    y = MatMul(Attention(q, k, MatMul(z, V) + b), W)
    =>
    y = MatMul(Attention(q, k, MatMul(z, V diag(1 / s)) + b / s), diag(s) W)        without a Mul

Exact in real numbers; what changes is what 8 bits make of it. Products of the same x share one Mul, and need none
where the constants that make x take the factors: those of a norm or a layer before (`qgraph.analysis.scale_folding`).
s is 1 for most channels: see `qgraph.numerics.smoothing`. It is found from calibration samples, and scales are set
only where the noise of the quantized product is above `tolerated` and falls by `least_gain` at least. All Muls that an
encoder wants cost about 4 % of its time.

It does not fire on weights that are computed, of more than two dimensions, of another type than float32, or that
somebody else reads too. A second run finds nothing to gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.activations import Watch
from qgraph.analysis.linear_layers import LinearLayer, linear_layers, matches
from qgraph.analysis.reductions import Request
from qgraph.analysis.scale_folding import current, find_folding, scale_input
from qgraph.analysis.shapes import shapes_of
from qgraph.numerics.smoothing import Sample, product_noise, search_scales
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["SmoothQuant"]

_ROWS_PER_FEED = 16
_MOST_FEEDS = 32
"""Rows are kept of this many feeds; bounds of the others would add little."""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Scale outlier channels of activations down, and the weights that read them up."""

    name: ClassVar[str] = "smooth-quant"
    tolerated: float = field(default=28.0, metadata={"help": "products of a better signal-to-noise ratio (dB) stay"})
    least_gain: float = field(default=2.0, metadata={"help": "gain (dB) below which a product stays as it is"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Smooth what needs it; `figures` has the signal-to-noise ratio of every input before and after, in dB.

        Raises:
            UserError: there are no calibration samples, or the model does not run on one.
        """
        layers = linear_layers(model).layers
        groups, skipped = self._groups(model, layers)
        if not groups:
            return Report(skipped=skipped)
        samples, unavailable = _watch(model, context, groups)
        shapes = context.analyse(shapes_of, model)
        changed, figures = 0, {}
        for x, stale in groups.items():
            readers = [current(layer) for layer in stale]
            seen = samples.get(x.name or "", [])
            if not seen:
                reason = unavailable.get(x.name or "", "its input was empty in every sample")
                skipped += [Skipped(layer.name, reason) for layer in readers]
                continue
            folding = find_folding(x, readers, shapes, layers)
            weight = np.hstack([layer.matrix().T for layer in readers])
            scales, before, after = _tied_search(seen, weight, folding.tied)
            gains = _decibels(before) < self.tolerated and _decibels(after) - _decibels(before) >= self.least_gain
            if gains:
                scale_input(model, folding, scales, suffix="smooth")
                changed += len(readers)
            figures[x.name or ""] = [round(_decibels(noise), 2) for noise in (before, after if gains else before)]
        smoothed = sum(before != after for before, after in figures.values())
        notes = [f"{smoothed} of {len(figures)} inputs smoothed"] if smoothed else []
        return Report(changed=changed, skipped=skipped, notes=notes, figures={"signal_to_noise": figures})

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
        return groups, skipped


def _why_not(node: ir.Node) -> str | None:
    x, weight = node.inputs[:2]
    if weight is None or weight.const_value is None or weight.is_graph_input():
        return "it multiplies activations"
    if x is None or x.const_value is not None:
        return "its left factor is constant"
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


def _tied_search(seen: Sequence[Sample], weight: np.ndarray, tied: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Search scales; channels that have to take the same one take the largest that any of them wants."""
    scales, before, after = search_scales(seen, weight)
    if np.array_equal(tied, np.arange(len(tied))):
        return scales, before, after
    largest = np.zeros_like(scales)
    np.maximum.at(largest, tied, scales)
    scales = largest[tied]
    return scales, before, product_noise(seen, weight, scales)


def _decibels(noise: float) -> float:
    return -10.0 * math.log10(max(noise, 1e-20))
