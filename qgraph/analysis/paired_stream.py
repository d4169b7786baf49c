"""The mean error of every layer's output channels where it is: what comes before is quantized, and corrected already.

    sequential_errors(model, reference, layers, context, correct)        calls correct(layer, errors) in order

The quantized graph is gone through stage by stage. A stage ends at the layers that have equally many layers before
them, and every node runs in one stage only: a layer's output is kept for each sample as it was before its correction,
which is added when later stages read it. So the cost grows with the number of layers, not its square. What crosses from
stage to stage is kept in memory as far as there is room, and otherwise in files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.blocks import Segment
from qgraph.analysis.paired_layers import PairedLayer, fixed_values
from qgraph.analysis.paired_means import ExactMeans, chosen_samples, exact_means, mean_rows
from qgraph.analysis.segment_runs import CarriedValues, SegmentRun
from qgraph.numerics.bias_correction import Activation, Errors, matching_shifts
from qgraph.pipeline import Context
from qgraph.work_folder import SCRATCH

__all__ = ["Correct", "sequential_errors"]

Correct = Callable[[PairedLayer, Errors], np.ndarray]
"""Corrects a layer whose errors are known, and returns what that adds to its output channels, float (channels,)."""
_MOST_POSITIONS = 512
"""Of a sample, at which the activation is computed anew for every shift that is tried."""


def sequential_errors(
    model: ir.Model,
    reference: ir.Model,
    layers: Sequence[PairedLayer],
    context: Context,
    correct: Correct,
    *,
    who: str,
    most: int = 0,
) -> None:
    """Call `correct` for every layer, with its errors when all layers before it are corrected.

    Args:
        model: the quantized one; `correct` may change the bias of the layer that it is given.
        reference: what it was before.
        layers: of `paired_layers`.
        context: its samples, threads, memory bound, work folder and progress are used.
        correct: corrects one layer.
        who: the name that progress and errors show.
        most: samples to use at most, spread over all; 0 for no bound.

    Raises:
        UserError: there are no samples, a model does not run on one, or the disk is full.
    """

    exact = exact_means(reference, layers, context, who=who, most=most)
    if context.work_folder is not None:
        context.work_folder.mkdir(parents=True, exist_ok=True)
    stages = _stages(model, layers)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=context.work_folder) as scratch:
        store = _ShiftedValues(Path(scratch) / "values", context.calibration_memory)
        _take_inputs(store, stages, context, who, most)
        for index, (segment, ends) in enumerate(stages):
            progress = _Progress(context, who, index * store.samples, len(stages) * store.samples)
            before = _run_stage(model, segment, ends, exact, store, context.threads, progress)
            for layer in ends:
                errors = before[layer]
                if layer.activation is not None and layer.output in segment.gives:
                    errors = _behind_activation(layer, layer.activation, errors, exact, store)
                store.shift(layer, correct(layer, errors))
            later = {value for other, _ in stages[index + 1 :] for value in other.reads}
            for value in segment.reads:
                if value not in later:
                    store.drop(value)
            qgraph.ir.forget_pages()
        context.progress(who, len(stages) * store.samples, len(stages) * store.samples)


class _Progress(NamedTuple):
    context: Context
    who: str
    done: int
    total: int

    def __call__(self, more: int) -> None:
        self.context.progress(self.who, self.done + more, self.total)


def _run_stage(
    model: ir.Model,
    segment: Segment,
    ends: Sequence[PairedLayer],
    exact: ExactMeans,
    store: _ShiftedValues,
    threads: int,
    progress: _Progress,
) -> dict[PairedLayer, Errors]:
    """Run a stage on all samples, keep what it gives, and return the mean errors of the layers that end it."""
    errors = {layer: Errors() for layer in ends}
    wanted = list(dict.fromkeys([*segment.gives, *(layer.output for layer in ends)]))
    run = SegmentRun(model, segment, wanted, store, threads=threads)
    for number in range(store.samples):
        progress(number)
        arrays = run(number)
        for layer in ends:
            rows, positions = exact[layer, number]
            errors[layer].add(rows[:, : layer.channels] - mean_rows(layer, arrays[layer.output]), positions)
        for value in segment.gives:
            store.put(value, number, arrays[value])
    return errors


def _behind_activation(
    layer: PairedLayer, activation: Activation, before: Errors, exact: ExactMeans, store: _ShiftedValues
) -> Errors:
    """Return the shifts that make the means behind the activation equal, from the mean errors before it."""
    rows_before, weights = before.arrays()
    if not rows_before.size or not np.isfinite(rows_before).all():
        return before
    errors, changed, squares, means = Errors(), Errors(), Errors(), Errors()
    drawn = []
    for number in range(store.samples):
        array, (rows, positions) = store.get(layer.output, number), exact[layer, number]
        some = _drawn(layer, array)
        drawn.append((some, positions))
        errors.add(rows[:, layer.channels :] - mean_rows(layer, activation(array)), positions)
        changed.add(mean_rows(layer, activation(some)), positions)
        squares.add(mean_rows(layer, np.square(some)), positions)
        means.add(mean_rows(layer, some), positions)

    def measure(shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take what the shift changes from the positions that were drawn, and the rest from all."""
        found, slopes = Errors(), Errors()
        for some, positions in drawn:
            array = _shifted(layer, some, shift)
            found.add(mean_rows(layer, activation(array)), positions)
            slopes.add(mean_rows(layer, activation.slope(array)), positions)
        rows = errors.arrays()[0] + changed.arrays()[0] - found.arrays()[0]
        return rows, weights @ slopes.arrays()[0] / weights.sum()

    second, first = (weights @ one.arrays()[0] / weights.sum() for one in (squares, means))
    deviation = np.sqrt(np.maximum(second - np.square(first), 0.0))
    result = Errors()
    result.add(matching_shifts(measure, weights, rows_before, deviation), weights)
    return result


def _drawn(layer: PairedLayer, array: np.ndarray) -> np.ndarray:
    """Return a layer's output at some positions of each sample, evenly spread."""
    if layer.axis == -1:
        if layer.rank is None or layer.rank < 3:
            return array
        rows = array.reshape(len(array), -1, layer.channels)
        return np.ascontiguousarray(rows[:, :: max(1, -(-rows.shape[1] // _MOST_POSITIONS))])
    planes = array.reshape(*array.shape[:2], -1)
    return np.ascontiguousarray(planes[:, :, :: max(1, -(-planes.shape[2] // _MOST_POSITIONS))])


# --- stages -----------------------------------------------------------------------------------------------------------


def _stages(model: ir.Model, layers: Sequence[PairedLayer]) -> list[tuple[Segment, list[PairedLayer]]]:
    """Cut the main graph behind the layers that have equally many layers before them; what follows all is left out."""
    ends, fixed = {layer.last: layer for layer in layers}, fixed_values(model)
    before: dict[ir.Value, int] = dict.fromkeys(model.graph.inputs, 0)
    parts: dict[int, list[ir.Node]] = {}
    made: dict[ir.Value, int] = {}
    for node in model.graph:
        if fixed.issuperset(node.outputs):
            continue
        moving = [value for value in _inputs(node, model.graph) if value not in fixed]
        depth = max((before.get(value, 0) for value in moving), default=0)
        parts.setdefault(depth + 1, []).append(node)
        for value in node.outputs:
            before[value] = depth + (node in ends)
            made[value] = depth + 1
    count = max((before[layer.output] for layer in layers), default=0)
    reads = {number: _crossing(parts[number], number, made, model.graph, fixed) for number in range(1, count + 1)}
    stages = []
    for number in range(1, count + 1):
        later = dict.fromkeys(value for other in range(number + 1, count + 1) for value in reads[other])
        gives = [value for value in later if made.get(value) == number]
        segment = Segment(parts[number], reads[number], gives, None, 0)
        stages.append((segment, [ends[node] for node in parts[number] if node in ends]))
    return stages


def _inputs(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the values of the main graph that a node or its subgraphs read."""
    inner = (one for part in qgraph.ir.inner_graphs(node) for one in ir.traversal.RecursiveGraphIterator(part))
    outputs = (value for part in qgraph.ir.inner_graphs(node) for value in part.outputs)
    captured = [value for one in inner for value in one.inputs if value is not None and value.graph is graph]
    captured += [value for value in outputs if value.graph is graph]
    yield from (value for value in (*node.inputs, *captured) if value is not None)


def _crossing(
    nodes: Sequence[ir.Node], number: int, made: Mapping[ir.Value, int], graph: ir.Graph, fixed: set[ir.Value]
) -> list[ir.Value]:
    """Return what a stage reads from before: integers rather than what they stand for, which is computed again."""
    found: dict[ir.Value, None] = {}
    for node in nodes:
        for value in _inputs(node, graph):
            source = value
            while made.get(source, 0) != number and qgraph.ir.is_op(source.producer(), "DequantizeLinear"):
                node_before = source.producer()
                assert node_before is not None
                assert node_before.inputs[0] is not None
                source = node_before.inputs[0]
            if made.get(source, 0) != number and source not in fixed:
                found[source] = None
    return list(found)


class _ShiftedValues(CarriedValues):
    """Values of which some are read with a number added to each channel."""

    def __init__(self, folder: Path, room: int) -> None:
        super().__init__(folder, room)
        self._shifts: dict[ir.Value, tuple[PairedLayer, np.ndarray]] = {}

    def shift(self, layer: PairedLayer, shift: np.ndarray) -> None:
        if shift.any():
            self._shifts[layer.output] = layer, shift

    def get(self, value: ir.Value, number: int) -> np.ndarray:
        array = super().get(value, number)
        return _shifted(self._shifts[value][0], array, self._shifts[value][1]) if value in self._shifts else array


def _shifted(layer: PairedLayer, array: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return a layer's output with a number added to each channel."""
    channels = shift.astype(array.dtype)
    return np.asarray(array + (channels if layer.axis == -1 else channels.reshape(-1, *[1] * (array.ndim - 2))))


def _take_inputs(
    store: CarriedValues, stages: Sequence[tuple[Segment, object]], context: Context, who: str, most: int
) -> None:
    inputs = dict.fromkeys(value for segment, _ in stages for value in segment.reads if value.is_graph_input())
    for number, feed in enumerate(chosen_samples(context, who, most)):
        for value in inputs:
            if value.name in feed:
                store.put(value, number, feed[value.name])
            elif value.const_value is not None:
                store.put(value, number, np.asarray(value.const_value.numpy()))
