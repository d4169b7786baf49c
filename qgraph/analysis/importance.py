"""How much every unit of a model matters, by one of several measures; the larger, the more.

magnitude        squares of the weights that make and read it (Li et al. 2017, "Pruning Filters for Efficient
                 ConvNets", over all coupled layers)
activation       the energy that it contributes to what the layers behind give, tr(W_S H_SS W_S^T)
reconstruction   the error that is left where the other units make up for it as well as they can, after all that matter
                 less have gone; it counts as it changes the outputs of the model, where gradients reach
taylor           the squared change of the model's outputs to first order (Molchanov et al. 2019, "Importance
                 Estimation for Neural Network Pruning"), the mean over random directions of the outputs: no labels
                 are needed, and for a trained model the gradient of its own loss would say little
random           none at all: the floor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from qgraph.analysis.block_stream import BlockStream
from qgraph.analysis.convolutions import Convolution
from qgraph.analysis.gradients import gradient_model, uncovered
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.output_gradients import output_gradients
from qgraph.analysis.probes import Probe, first_line, raw_outputs
from qgraph.analysis.prunable import Units
from qgraph.errors import UserError
from qgraph.numerics.pruning import Moments, Reading, eliminations, energies
from qgraph.pipeline import Context

__all__ = ["MEASURES", "Measure", "importance", "rows_of"]

Measure = Literal["magnitude", "activation", "reconstruction", "taylor", "random"]
MEASURES: tuple[Measure, ...] = ("magnitude", "activation", "reconstruction", "taylor", "random")
MOST_ROWS = 2048
"""Patches of a sample of images that count."""
_DIRECTIONS = 2
_MOST_FEEDS = 64
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def importance(
    model: ir.Model, context: Context, units: Sequence[Units], measure: Measure, who: str
) -> list[np.ndarray]:
    """Return the importance of the units of each group, float64, comparable between groups.

    Raises:
        UserError: the measure needs calibration samples and there are none, weights are not finite, the model does not
            run on a sample, or gradients do not reach some units (the message says where).
    """
    for one in units:
        for slot in (*one.makers, *one.readers):
            slot.layer.require_finite()
    if measure == "random":
        generator = np.random.default_rng(context.seed)
        return [generator.random(one.count) for one in units]
    if measure == "magnitude":
        return [_magnitude(one) for one in units]
    if measure == "taylor":
        return _taylor(model, context, units, who)
    return _by_moments(model, context, units, measure, who)


def rows_of(layer: LinearLayer, array: np.ndarray, seed: int) -> np.ndarray:
    """Return what a layer reads of a sample, one row of its inner product each: float32 [n, K]."""
    if not isinstance(layer, Convolution):
        return array
    positions = layer.window.positions(array.shape, MOST_ROWS, seed)
    return np.asarray(layer.window.rows(array, positions)[0])


def _magnitude(units: Units) -> np.ndarray:
    found = np.zeros(units.count)
    for slot, by_rows in (*((slot, True) for slot in units.makers), *((slot, False) for slot in units.readers)):
        squares = np.square(slot.layer.matrix(), dtype=np.float64)
        members = slot.unit >= 0
        sums = np.bincount(slot.unit[members], squares.sum(axis=1 if by_rows else 0)[members], units.count)
        found += sums / max(float(sums.mean()), 1e-30)
    return found


def _by_moments(
    model: ir.Model, context: Context, units: Sequence[Units], measure: Measure, who: str
) -> list[np.ndarray]:
    readers = {slot.layer: None for one in units for slot in one.readers}
    counts = output_gradients(model, context, list(readers), who)[0] if measure == "reconstruction" else {}
    moments: dict[LinearLayer, np.ndarray] = {}
    left = {number: {slot.layer for slot in one.readers} for number, one in enumerate(units)}
    found = [np.zeros(one.count) for one in units]
    for stage in BlockStream(model, context, list(readers), who=who, sequential="block").stages():
        sums = {layer: Moments(layer.inputs) for group in stage.layers.values() for layer in group}
        for number, rows in enumerate(stage.rows()):
            for x, group in stage.layers.items():
                for layer in group:
                    part = rows_of(layer, rows[x].changed, context.seed + number)
                    sums[layer].add(part, part)
        moments |= {layer: one.gram for layer, one in sums.items()}
        for number in [number for number, layers in left.items() if layers <= moments.keys()]:
            found[number] = (
                _energy(units[number], moments)
                if measure == "activation"
                else _eliminated(units[number], moments, counts)
            )
            del left[number]
        waiting = set().union(*left.values()) if left else set()
        moments = {layer: gram for layer, gram in moments.items() if layer in waiting}
    return found


def _energy(units: Units, moments: Mapping[LinearLayer, np.ndarray]) -> np.ndarray:
    found = np.zeros(units.count)
    for slot in units.readers:
        matrix, weight = moments[slot.layer][:-1, :-1], slot.layer.matrix()
        total = float(np.einsum("ni,ij,nj->", weight, matrix, weight, optimize=True))
        found += energies(weight, slot.unit, units.count, matrix) / max(total, 1e-30)
    return found


def _eliminated(
    units: Units, moments: Mapping[LinearLayer, np.ndarray], counts: Mapping[LinearLayer, np.ndarray]
) -> np.ndarray:
    readings = []
    for slot in units.readers:
        matrix, weight, unit = moments[slot.layer], slot.layer.matrix(), slot.unit
        if slot.layer.bias is None:
            matrix = matrix[:-1, :-1]
        else:
            # The bias makes up for means: one more input, that is always 1 and always stays.
            weight, unit = np.column_stack([weight, np.zeros(len(weight))]), np.append(unit, -1)
        readings.append(Reading(weight, unit, matrix, counts.get(slot.layer)))
    return eliminations(readings, units.count)


def _taylor(model: ir.Model, context: Context, units: Sequence[Units], who: str) -> list[np.ndarray]:
    """Return E[(sum over the weights that read a unit of weight * gradient)^2], relative to the outputs' power."""
    samples = context.samples(f"'{who}' by gradients")
    outputs = [str(value.name) for value in model.graph.outputs if value.dtype in _FLOATS]
    weights = {str(slot.layer.weight.name): slot.layer for one in units for slot in one.readers}
    missing = uncovered(model, outputs, list(weights))
    if missing:
        node, reason = next(iter(missing.items()))
        raise UserError(
            f"{who}: there is no gradient through '{node}' ({reason}): take importance=activation or reconstruction"
        )
    backward = gradient_model(model, outputs, list(weights))
    generator = np.random.default_rng(context.seed)
    found = [np.zeros(one.count) for one in units]
    power = 0.0
    forward: Probe | None = None
    probe: Probe | None = None
    for number, (feed, _) in enumerate(zip(samples, range(_MOST_FEEDS), strict=False)):
        context.progress(who, number, min(len(samples), _MOST_FEEDS))
        if forward is None:
            forward = Probe(model, raw_outputs(outputs), frozenset(feed), threads=context.threads)
            names = [str(backward.values[name].name) for name in weights]
            fed = frozenset(feed) | {str(value.name) for value in backward.cotangents.values()}
            probe = Probe(backward.model, raw_outputs(names), fed, threads=context.threads)
        assert probe is not None
        try:
            given = forward.run(feed)
            power += sum(float(np.square(one, dtype=np.float64).sum()) for one in given)
            for _ in range(_DIRECTIONS):
                directions = {
                    str(backward.cotangents[name].name): generator.choice([-1.0, 1.0], one.shape).astype(one.dtype)
                    for name, one in zip(outputs, given, strict=True)
                }
                gradients = dict(zip(weights, probe.run({**feed, **directions}), strict=True))
                _count(found, units, weights, gradients)
        except Exception as error:
            raise UserError(f"the model does not run on calibration sample {number}: {first_line(error)}") from error
    return [one / max(power, 1e-30) for one in found]


def _count(
    found: Sequence[np.ndarray],
    units: Sequence[Units],
    weights: Mapping[str, LinearLayer],
    gradients: Mapping[str, np.ndarray],
) -> None:
    products = {}
    for name, layer in weights.items():
        tensor = layer.weight.const_value
        assert tensor is not None
        whole = tensor.numpy().astype(np.float64) * gradients[name]
        products[name] = _as_matrix(layer, whole).sum(axis=0)
    for one, units_found in zip(units, found, strict=True):
        change = np.zeros(one.count)
        for slot in one.readers:
            members = slot.unit >= 0
            change += np.bincount(slot.unit[members], products[str(slot.layer.weight.name)][members], one.count)
        units_found += np.square(change)


def _as_matrix(layer: LinearLayer, array: np.ndarray) -> np.ndarray:
    """Return an array in the layout of a layer's weight as its matrix [N, K]."""
    if isinstance(layer, Convolution):
        turned = array if layer.transposed else array.swapaxes(0, 1)
        return turned.reshape(layer.outputs, layer.inputs)
    return array if layer.transposed else array.T
