"""How much each weight's compression costs, scheme by scheme, one weight after the other.

    hessian    tr(E H E') / tr(W H W'): the share of a layer's output energy that rounding moves. E = W - Q(W), H of the
               inputs that calibration sends; for an embedding table, rows count as often as they are looked up
    kl         the divergence of the model's output distribution when only this weight is rounded. Measured for the two
               schemes around which the others are placed by their `hessian` error

`hessian` needs the memory of one block and one run through the model, whatever its size, but says nothing of how much
an output matters. `kl` does, for two more runs for each weight.

Source: Frantar et al., "GPTQ" (2022), section 3, for the error; Li et al., "SliM-LLM" (2024), section 3, and the
per-layer tables of Dong et al., "HAWQ" (2019), for what it is used for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from qgraph.analysis.block_stream import BlockStream
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.probes import Probe, first_line, raw_outputs
from qgraph.errors import UserError
from qgraph.numerics.hessian import Hessian, output_error
from qgraph.numerics.weights import WeightScheme, quantize_weight
from qgraph.pipeline import Context, Feeds

__all__ = ["Metric", "Sensitivity", "sensitivities"]

Metric = Literal["hessian", "kl"]

_MOST_FEEDS = 16
"""Samples that the divergence is measured on."""
_TINY = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """What compressing one weight costs.

    Attributes:
        weight: the initializer.
        layers: that read it; of a tied table several.
        errors: float64, one for each scheme; shares of the output energy, or nats.
    """

    weight: ir.Value
    layers: Sequence[LinearLayer]
    errors: np.ndarray

    @property
    def name(self) -> str:
        """The name of the first layer."""
        return self.layers[0].name


def sensitivities(
    model: ir.Model,
    context: Context,
    weights: Mapping[ir.Value, Sequence[LinearLayer]],
    schemes: Sequence[WeightScheme],
    *,
    metric: Metric,
    who: str,
) -> list[Sensitivity]:
    """Return the errors of rounding each weight to the nearest, in the order of `weights`.

    Args:
        model: is not changed.
        context: its samples, threads, memory bound and progress are used.
        weights: the layers that read each weight, as `linear_layers(model).by_weight`.
        schemes: to compare.
        metric: what to measure.
        who: the name that progress and errors show.

    Raises:
        UserError: there are no calibration samples, the model does not run on one, or a weight is NaN or infinite.
    """
    shares = _output_shares(model, context, weights, schemes, who)
    if metric == "kl":
        shares = _divergences(model, context, weights, schemes, shares, who)
    return [Sensitivity(weight, layers, shares[weight]) for weight, layers in weights.items()]


def _output_shares(
    model: ir.Model,
    context: Context,
    weights: Mapping[ir.Value, Sequence[LinearLayer]],
    schemes: Sequence[WeightScheme],
    who: str,
) -> dict[ir.Value, np.ndarray]:
    """Return tr(E H E') / tr(W H W') of each weight and scheme, over all layers that read it."""
    totals = {weight: np.zeros(len(schemes) + 1) for weight in weights}
    layers = [layer for group in weights.values() for layer in group]
    for layer in layers:
        if layer.kind == "embedding":
            totals[layer.weight] += _row_errors(layer, context, schemes, who)
    together: Literal["layer", "block"] = "layer"
    linear = [layer for layer in layers if layer.kind == "linear"]
    if sum(8 * layer.inputs**2 for layer in linear) <= context.calibration_memory:
        together = "block"
    for stage in BlockStream(model, context, linear, who=who, sequential=together).stages():
        hessians = {x: Hessian(readers[0].inputs) for x, readers in stage.layers.items()}
        for rows in stage.rows():
            for x, hessian in hessians.items():
                hessian.add(rows[x].changed)
        for x, readers in stage.layers.items():
            matrix = hessians[x].matrix
            for layer in readers:
                weight = layer.matrix()
                rounded = (_rounded(layer, weight, scheme) for scheme in schemes)
                errors = [output_error(weight, one, matrix) for one in rounded]
                totals[layer.weight] += [*errors, output_error(weight, np.zeros((1, 1)), matrix)]
    return {weight: total[:-1] / max(total[-1], _TINY) for weight, total in totals.items()}


def _row_errors(layer: LinearLayer, context: Context, schemes: Sequence[WeightScheme], who: str) -> np.ndarray:
    """Return the squared error of a table's rows for each scheme, and their energy, by how often each is looked up."""
    counts = np.zeros(layer.outputs)
    for feed in context.samples(f"'{who}'"):
        ids = feed.get(layer.x.name or "") if layer.x.is_graph_input() else None
        if ids is not None:
            counts += np.bincount(ids.reshape(-1) % layer.outputs, minlength=layer.outputs)
    if not counts.any():
        counts += 1.0
    weight = layer.matrix()
    errors = [((weight - _rounded(layer, weight, scheme)) ** 2).sum(axis=1) for scheme in schemes]
    figures = np.array([float(counts @ rows) for rows in (*errors, (weight**2).sum(axis=1))])
    return np.asarray(figures / counts.sum())


def _rounded(layer: LinearLayer, weight: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    try:
        return quantize_weight(weight, scheme).dequantize()
    except ValueError as error:
        raise UserError(f"the weight '{layer.weight.name}' of '{layer.name}': {error}: mend the model") from error


def _divergences(
    model: ir.Model,
    context: Context,
    weights: Mapping[ir.Value, Sequence[LinearLayer]],
    schemes: Sequence[WeightScheme],
    shares: Mapping[ir.Value, np.ndarray],
    who: str,
) -> dict[ir.Value, np.ndarray]:
    """Return the divergence of each weight and scheme: measured for two, between and beyond by powers of the share."""
    samples = context.samples(f"'{who}'")
    feeds = [feed for feed, _ in zip(samples, range(_MOST_FEEDS), strict=False)]
    measure = _Outputs(model, context, feeds)
    order = np.argsort([float(np.mean([share[index] for share in shares.values()])) for index in range(len(schemes))])
    marks = (int(order[-1]), int(order[len(order) // 2]))
    result = {}
    for done, (weight, layers) in enumerate(weights.items()):
        context.progress(who, done, len(weights))
        seen = {mark: measure.divergence(layers[0], schemes[mark]) for mark in dict.fromkeys(marks)}
        result[weight] = _placed(shares[weight], seen)
    context.progress(who, len(weights), len(weights))
    return result


def _placed(shares: np.ndarray, seen: Mapping[int, float]) -> np.ndarray:
    """Return c * share^p through the points that were seen; p is 1 where they do not tell."""
    xs = np.log(np.maximum([shares[index] for index in seen], _TINY))
    ys = np.log(np.maximum(list(seen.values()), _TINY))
    slope = float((ys[0] - ys[-1]) / (xs[0] - xs[-1])) if abs(xs[0] - xs[-1]) > 0.1 else 1.0
    slope = min(max(slope, 0.5), 2.0)
    return np.asarray(np.exp(ys[-1] + slope * (np.log(np.maximum(shares, _TINY)) - xs[-1])))


class _Outputs:
    """The first floating-point output of a model on some samples, as it is and with one weight rounded."""

    def __init__(self, model: ir.Model, context: Context, feeds: Sequence[Feeds]) -> None:
        self._model = model
        self._context = context
        self._feeds = feeds
        if not feeds:
            raise UserError("the calibration set is empty: give at least one sample")
        floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        output = next((value for value in model.graph.outputs if value.dtype in floats), None)
        if output is None:
            raise UserError("the model gives out no floating-point numbers, so metric=kl has nothing to compare")
        self._name = str(output.name)
        self._exact = [_log_softmax(one) for one in self._run(None, None)]

    def divergence(self, layer: LinearLayer, scheme: WeightScheme) -> float:
        """Return the mean over rows of KL(exact || changed), in nats, of the softmax over the last axis."""
        total, rows = 0.0, 0
        for exact, changed in zip(self._exact, self._run(layer, scheme), strict=True):
            other = _log_softmax(changed)
            total += float((np.exp(exact) * (exact - other)).sum())
            rows += exact.size // exact.shape[-1]
        return max(total / max(rows, 1), 0.0)

    def _run(self, layer: LinearLayer | None, scheme: WeightScheme | None) -> list[np.ndarray]:
        def add(copy: ir.Model, values: Mapping[str, ir.Value]) -> list[ir.Value]:
            if layer is not None and scheme is not None:
                matrix = _rounded(layer, layer.matrix(), scheme)
                stored = np.ascontiguousarray(matrix if layer.transposed else matrix.T)
                weight = values[str(layer.weight.name)]
                assert weight.dtype is not None
                weight.const_value = ir.tensor(stored.astype(weight.dtype.numpy()), name=weight.name)
            return raw_outputs([self._name])(copy, values)

        probe = Probe(self._model, add, frozenset(self._feeds[0]), threads=self._context.threads)
        try:
            return [probe.run(feed)[0].astype(np.float64) for feed in self._feeds]
        except Exception as error:
            raise UserError(f"the model does not run on a calibration sample: {first_line(error)}") from error


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
