"""Outlier channels of activations moved into the weights.

    y = MatMul(x, W)    =>    y = MatMul(Mul(x, 1 / s), diag(s) W)          Gemm likewise

    y = MatMul(Attention(q, k, MatMul(z, V) + b), W)
    =>
    y = MatMul(Attention(q, k, MatMul(z, V diag(1 / s)) + b / s), diag(s) W)        without a Mul

Exact in real numbers; what changes is what 8 bits make of it. Products of the same x share one Mul. s is 1 for most
channels: see `qgraph.numerics.smoothing`. It is found from calibration samples, and a Mul is spent only where the noise
of the quantized product is above `tolerated` and falls by `least_gain` at least. All that an encoder wants cost about
4 % of its time.

It does not fire on weights that are computed, of more than two dimensions, of another type than float32, or that
somebody else reads too. A second run finds nothing to gain.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.activations import Watch
from qgraph.analysis.reductions import Request
from qgraph.numerics.smoothing import Sample, search_scales
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
        groups, skipped = self._groups(model)
        if not groups:
            return Report(skipped=skipped)
        samples, unavailable = _watch(model, context, groups)
        changed, figures = 0, {}
        for x, nodes in groups.items():
            seen = samples.get(x.name or "", [])
            if not seen:
                reason = unavailable.get(x.name or "", "its input was empty in every sample")
                skipped += [Skipped(qgraph.ir.node_label(node), reason) for node in nodes]
                continue
            scales, before, after = search_scales(seen, np.hstack([_matrix(node) for node in nodes]))
            gains = _decibels(before) < self.tolerated and _decibels(after) - _decibels(before) >= self.least_gain
            if gains:
                _smooth(model, x, nodes, scales)
                changed += len(nodes)
            figures[x.name or ""] = [round(_decibels(noise), 2) for noise in (before, after if gains else before)]
        smoothed = sum(before != after for before, after in figures.values())
        notes = [f"{smoothed} of {len(figures)} inputs smoothed"] if smoothed else []
        return Report(changed=changed, skipped=skipped, notes=notes, figures={"signal_to_noise": figures})

    def _groups(self, model: ir.Model) -> tuple[dict[ir.Value, list[ir.Node]], list[Skipped]]:
        """Return the nodes that multiply a constant, by the activation they read."""
        groups: dict[ir.Value, list[ir.Node]] = {}
        skipped: list[Skipped] = []
        for node in model.graph:
            if not qgraph.ir.is_op(node, "MatMul", "Gemm"):
                continue
            label = qgraph.ir.node_label(node)
            excluded = any(fnmatch.fnmatchcase(label, pattern) for pattern in self.exclude)
            reason = "it is excluded" if excluded else _why_not(node)
            x = node.inputs[0]
            if reason is not None or x is None:
                skipped.append(Skipped(label, reason or "it has no input"))
                continue
            groups.setdefault(x, []).append(node)
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


def _matrix(node: ir.Node) -> np.ndarray:
    """Return the weight as [channels, columns]."""
    weight = qgraph.ir.constant(node.inputs[1])
    assert weight is not None
    return weight.T if _is_transposed(node) else weight


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))


def _watch(
    model: ir.Model, context: Context, groups: Mapping[ir.Value, Sequence[ir.Node]]
) -> tuple[dict[str, list[Sample]], Mapping[str, str]]:
    watch = Watch(model, context, [Request(x.name or "", -1, _ROWS_PER_FEED) for x in groups])
    samples: dict[str, list[Sample]] = {}
    for name, observation in watch:
        kept = samples.setdefault(name, [])
        if len(kept) < _MOST_FEEDS:
            kept.append(Sample(observation.low, observation.high, observation.sample.T.astype(np.float32)))
    return samples, watch.unavailable


def _smooth(model: ir.Model, x: ir.Value, nodes: Sequence[ir.Node], scales: np.ndarray) -> None:
    """Divide x by the scales, in the constants that make it if possible, and multiply the weights by them."""
    source = _values_constants(x, len(nodes), len(scales))
    for value in source:
        _rescale(model, value, 1.0 / scales)
    smoothed = x if source else _divided(model, x, nodes[0], scales)
    for node in nodes:
        weight = node.inputs[1]
        assert weight is not None
        node.replace_input_with(0, smoothed)
        _rescale(model, weight, scales if _is_transposed(node) else scales[:, None])


def _values_constants(x: ir.Value, readers: int, channels: int) -> list[ir.Value]:
    """Return the constants that are linear in x, column by column: weight and bias of an attention's values.

    Empty if x is nothing of the kind, or is read by others than the products.
    """
    attention = x.producer()
    if not qgraph.ir.is_op(attention, "Attention") or len(x.uses()) != readers or x.is_graph_output():
        return []
    assert attention is not None
    value = attention.inputs[2]
    constants: list[ir.Value] = []
    while value is not None and qgraph.ir.only_consumer(value) is not None:
        node = value.producer()
        if not qgraph.ir.is_op(node, "Add", "MatMul"):
            return []
        assert node is not None
        constant = next((one for one in node.inputs if one is not None and one.const_value is not None), None)
        if constant is None or not _fits_columns(constant, channels):
            return []
        constants.append(constant)
        if node.op_type == "MatMul":
            return constants if node.inputs[1] is constant else []
        value = next(one for one in node.inputs if one is not constant)
    return []


def _fits_columns(constant: ir.Value, channels: int) -> bool:
    tensor = constant.const_value
    assert tensor is not None
    own = not constant.is_graph_input() and qgraph.ir.only_consumer(constant) is not None
    return own and tensor.dtype == ir.DataType.FLOAT and tensor.shape.numpy()[-1:] == (channels,)


def _divided(model: ir.Model, x: ir.Value, before: ir.Node, scales: np.ndarray) -> ir.Value:
    factor = qgraph.ir.initializer(model.graph, f"{x.name}_smoothing", (1.0 / scales).astype(np.float32))
    mul = ir.node("Mul", [x, factor], name=qgraph.ir.fresh_name(model.graph, f"{x.name}_smooth"))
    smoothed = mul.outputs[0]
    smoothed.name, smoothed.type, smoothed.shape = mul.name, x.type, x.shape
    qgraph.ir.insert_before(before, mul)
    return smoothed


def _rescale(model: ir.Model, constant: ir.Value, factors: np.ndarray) -> None:
    """Put a constant times `factors`, computed when the file is written, in the place of a constant."""
    tensor = constant.const_value
    assert tensor is not None
    shape = tensor.shape.numpy()
    scaled = qgraph.ir.lazy(lambda: (tensor.numpy() * factors).astype(np.float32), ir.DataType.FLOAT, shape)
    new = qgraph.ir.initializer(model.graph, f"{constant.name}_smooth", scaled)
    constant.replace_all_uses_with(new)
    name = constant.name
    if name is not None and model.graph.initializers.get(name) is constant:
        del model.graph.initializers[name]


def _decibels(noise: float) -> float:
    return -10.0 * math.log10(max(noise, 1e-20))
