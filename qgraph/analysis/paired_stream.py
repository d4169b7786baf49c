"""The mean error of every layer's output channels, from running a quantized model beside what it was before.

    local_errors         each layer by itself: the quantized layer reads what the reference's reads. One run
    sequential_errors    each layer where it is: what comes before is quantized, and corrected already. One run of both

The second goes through the quantized graph stage by stage. A stage ends at the layers that have equally many layers
before them, and every node runs in one stage only: a layer's output is kept for each sample as it was before its
correction, which is added when later stages read it. So the cost grows with the number of layers, not its square.
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
from qgraph.analysis.probes import Probe, first_line
from qgraph.analysis.segment_runs import CarriedValues, SegmentRun
from qgraph.errors import UserError
from qgraph.numerics.bias_correction import Activation, Errors, matching_shifts
from qgraph.pipeline import Context, Feeds
from qgraph.work_folder import SCRATCH

__all__ = ["Correct", "local_errors", "sequential_errors"]

Correct = Callable[[PairedLayer, Errors], np.ndarray]
"""Corrects a layer whose errors are known, and returns what that adds to its output channels, float (channels,)."""
_MOST_ROWS = 64
"""Kept of one feed; of more, means over groups are."""


def local_errors(
    reference: ir.Model, layers: Sequence[PairedLayer], context: Context, *, who: str, most: int = 0
) -> dict[PairedLayer, Errors]:
    """Return each layer's errors on the inputs that the reference has for it.

    Args:
        reference: what the model was before.
        layers: of `paired_layers`.
        context: its samples, threads and progress are used.
        who: the name that progress and errors show.
        most: samples to use at most, spread over all; 0 for no bound.

    Raises:
        UserError: there are no samples, or the model does not run on one.
    """

    def add(copy: ir.Model, values: Mapping[str, ir.Value]) -> list[ir.Value]:
        writer = _Writer(copy)
        outputs = []
        for layer in layers:
            source, exact = layer.twin.inputs[0], layer.twin_last.outputs[0]
            assert source is not None
            rounded = writer.quantized_layer(layer, values[str(source.name)])
            error = writer.node("Sub", values[str(exact.name)], rounded)
            outputs += [writer.mean_rows(layer, error), writer.node("Size", error)]
        return outputs

    found = {layer: Errors() for layer in layers}
    for layer, _, rows, positions in _rows(reference, layers, add, context, who, most):
        found[layer].add(rows, positions)
    return found


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

    def add(copy: ir.Model, values: Mapping[str, ir.Value]) -> list[ir.Value]:
        writer = _Writer(copy)
        outputs = []
        for layer in layers:
            exact = [values[str(value.name)] for value in layer.exact_outputs]
            means = [writer.mean_rows(layer, value) for value in exact]
            outputs += [means[0] if len(means) == 1 else writer.node("Concat", *means, axis=1)]
            outputs += [writer.node("Size", exact[0])]
        return outputs

    exact = _Exact()
    for layer, number, rows, positions in _rows(reference, layers, add, context, who, most):
        exact[layer, number] = rows, positions
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


_Exact = dict[tuple[PairedLayer, int], tuple[np.ndarray, np.ndarray]]
"""By layer and sample: means of the reference's outputs, side by side, and the positions that each goes over."""


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
    exact: _Exact,
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
            errors[layer].add(rows[:, : layer.channels] - _mean_rows(layer, arrays[layer.output]), positions)
        for value in segment.gives:
            store.put(value, number, arrays[value])
    return errors


def _behind_activation(
    layer: PairedLayer, activation: Activation, before: Errors, exact: _Exact, store: _ShiftedValues
) -> Errors:
    """Return the shifts that make the means behind the activation equal, from the mean errors before it."""
    rows_before, weights = before.arrays()
    if not rows_before.size or not np.isfinite(rows_before).all():
        return before

    def measure(shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found, slopes = Errors(), Errors()
        for number in range(store.samples):
            rows, positions = exact[layer, number]
            array = _shifted(layer, store.get(layer.output, number), shift)
            found.add(rows[:, layer.channels :] - _mean_rows(layer, activation(array)), positions)
            slopes.add(_mean_rows(layer, activation.slope(array)), positions)
        slope_rows, _ = slopes.arrays()
        return found.arrays()[0], weights @ slope_rows / weights.sum()

    squares, means = Errors(), Errors()
    for number in range(store.samples):
        array, (_, positions) = store.get(layer.output, number), exact[layer, number]
        squares.add(_mean_rows(layer, np.square(array)), positions)
        means.add(_mean_rows(layer, array), positions)
    second, first = (weights @ one.arrays()[0] / weights.sum() for one in (squares, means))
    deviation = np.sqrt(np.maximum(second - np.square(first), 0.0))
    result = Errors()
    result.add(matching_shifts(measure, weights, rows_before, deviation), weights)
    return result


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
    for number, feed in enumerate(_samples(context, who, most)):
        for value in inputs:
            if value.name in feed:
                store.put(value, number, feed[value.name])
            elif value.const_value is not None:
                store.put(value, number, np.asarray(value.const_value.numpy()))


# --- means ------------------------------------------------------------------------------------------------------------


def _samples(context: Context, who: str, most: int) -> Iterator[Feeds]:
    """Yield the samples, or `most` of them, evenly spread."""
    samples = context.samples(f"'{who}'")
    if not len(samples):
        raise UserError("the calibration set is empty: give at least one sample")
    count = min(most, len(samples)) if most > 0 else len(samples)
    chosen = {index * len(samples) // count for index in range(count)}
    yield from (feed for index, feed in enumerate(samples) if index in chosen)


def _rows(
    model: ir.Model,
    layers: Sequence[PairedLayer],
    add: Callable[[ir.Model, Mapping[str, ir.Value]], list[ir.Value]],
    context: Context,
    who: str,
    most: int,
) -> Iterator[tuple[PairedLayer, int, np.ndarray, np.ndarray]]:
    """Run a model with the outputs of `add`: rows of means and a size for each layer.

    Yields layer, number of the sample, rows (samples of the feed, channels) and how many positions each stands for.
    """
    probe: Probe | None = None
    total = len(context.samples(f"'{who}'"))
    total = min(most, total) if most > 0 else total
    for number, feed in enumerate(_samples(context, who, most)):
        context.progress(who, number, total)
        probe = probe or Probe(model, add, frozenset(feed), threads=context.threads)
        try:
            arrays = probe.run(feed)
        except Exception as error:
            raise UserError(f"the model does not run on calibration sample {number}: {first_line(error)}") from error
        for index, layer in enumerate(layers):
            rows = arrays[2 * index].astype(np.float64)
            positions = int(arrays[2 * index + 1]) // max(len(rows) * layer.channels, 1)
            yield layer, number, _grouped(rows), positions * _group_sizes(len(rows))
    context.progress(who, total, total)


def _mean_rows(layer: PairedLayer, array: np.ndarray) -> np.ndarray:
    """Return the same of an array that `_Writer.mean_rows` computes in a graph."""
    if layer.axis == 1:
        return _grouped(array.reshape(*array.shape[:2], -1).mean(axis=2, dtype=np.float64))
    if layer.rank is None or layer.rank < 2:
        return np.asarray(array.reshape(-1, layer.channels).mean(axis=0, dtype=np.float64)[None])
    return _grouped(array.reshape(len(array), -1, layer.channels).mean(axis=1, dtype=np.float64))


def _grouped(rows: np.ndarray) -> np.ndarray:
    """Return the rows, or the means of groups of consecutive ones."""
    sizes = _group_sizes(len(rows))
    if len(sizes) == len(rows):
        return rows
    starts = np.cumsum(sizes) - sizes
    return np.asarray(np.add.reduceat(rows, starts, axis=0) / sizes[:, None])


def _group_sizes(count: int) -> np.ndarray:
    size = -(-count // _MOST_ROWS)
    return np.array([min(size, count - start) for start in range(0, count, max(size, 1))], np.int64)


class _Writer:
    """Adds to a copy of the reference, under names of its own."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._opset = model.graph.opset_imports.get("", 1)
        self._count = 0

    def _name(self) -> str:
        self._count += 1
        return f"qgraph.pair.{self._count}"

    def node(self, op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)
        node.outputs[0].name = self._name()
        self._graph.append(node)
        return node.outputs[0]

    def constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = self._name()
        shape = ir.Shape(tuple(tensor.shape.numpy()))
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def mean_rows(self, layer: PairedLayer, value: ir.Value) -> ir.Value:
        """Return the mean of each channel for each index of the first axis, or for all where the rank is unknown."""
        if layer.rank is None or layer.rank < 2:
            return self._mean(self.node("Flatten", value, axis=-1), [0], keep=1)
        if layer.rank == 2:
            return value
        axes = range(2, layer.rank) if layer.axis == 1 else range(1, layer.rank - 1)
        return self._mean(value, list(axes), keep=0)

    def _mean(self, value: ir.Value, axes: list[int], *, keep: int) -> ir.Value:
        if self._opset < 18:
            return self.node("ReduceMean", value, axes=axes, keepdims=keep)
        return self.node("ReduceMean", value, self.constant(ir.tensor(np.array(axes, np.int64))), keepdims=keep)

    def quantized_layer(self, layer: PairedLayer, source: ir.Value) -> ir.Value:
        """Return the output of the quantized layer where it reads `source`, rounded as it is for the layer."""
        x = layer.node.inputs[0]
        assert x is not None
        made: dict[ir.Value, ir.Value] = {}
        rounding = x.producer()
        if rounding is not None and qgraph.ir.is_op(rounding, "DequantizeLinear"):
            integers, scale, *zero_point = rounding.inputs
            if all(qgraph.ir.constant(one) is not None for one in (scale, *zero_point) if one is not None):
                source = self._rounded(rounding, integers, source, made)
        made[x] = source
        return self._copied(layer.output, made)

    def _rounded(
        self, rounding: ir.Node, integers: ir.Value | None, source: ir.Value, made: dict[ir.Value, ir.Value]
    ) -> ir.Value:
        parameters = [self._copied(value, made) for value in rounding.inputs[1:] if value is not None]
        if len(parameters) == 1 and integers is not None and integers.dtype is not None:
            scale = qgraph.ir.constant(rounding.inputs[1])
            zeros = np.zeros(() if scale is None else scale.shape, np.int64).astype(integers.dtype.numpy())
            parameters.append(self.constant(ir.tensor(zeros, dtype=integers.dtype)))
        attributes = {key: one.as_int() for key, one in rounding.attributes.items() if key in ("axis", "block_size")}
        rounded = self.node("QuantizeLinear", source, *parameters, **attributes)
        return self.node("DequantizeLinear", rounded, *parameters, **attributes)

    def _copied(self, value: ir.Value, made: dict[ir.Value, ir.Value]) -> ir.Value:
        """Copy what computes `value` of the quantized model, down to what is in `made`."""
        if value not in made:
            node = value.producer()
            if node is None:
                assert value.const_value is not None
                made[value] = self.constant(value.const_value)
            else:
                inputs = [None if one is None else self._copied(one, made) for one in node.inputs]
                copy = ir.Node(
                    node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs)
                )
                for old, new in zip(node.outputs, copy.outputs, strict=True):
                    new.name = self._name()
                    made[old] = new
                self._graph.append(copy)
        return made[value]
