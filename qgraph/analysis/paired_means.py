"""Means of layers' outputs, by channel and sample, taken inside the graph in one run of the reference.

x -> Conv(W, b) -> y                      y -> ReduceMean -> rows
x -> Q -> D -> Conv(D(W8), D(b32)) -> z   Sub(y, z) -> ReduceMean -> rows

local_errors     each layer by itself: a copy of the quantized layer reads what the reference's reads
exact_means      what the reference's layers give, and what their activations make of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.paired_layers import PairedLayer
from qgraph.analysis.probes import Probe, first_line
from qgraph.errors import UserError
from qgraph.numerics.bias_correction import Errors
from qgraph.pipeline import Context, Feeds

__all__ = ["ExactMeans", "chosen_samples", "exact_means", "local_errors", "mean_rows"]

ExactMeans = dict[tuple[PairedLayer, int], tuple[np.ndarray, np.ndarray]]
"""By layer and sample: means of `PairedLayer.exact_outputs` side by side, and the positions that each goes over."""
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


def exact_means(
    reference: ir.Model, layers: Sequence[PairedLayer], context: Context, *, who: str, most: int = 0
) -> ExactMeans:
    """Return the means of what the reference's layers, and the activations behind them, give.

    Args and errors are those of `local_errors`.
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

    found = _rows(reference, layers, add, context, who, most)
    return {(layer, number): (rows, positions) for layer, number, rows, positions in found}


def chosen_samples(context: Context, who: str, most: int) -> Iterator[Feeds]:
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
    for number, feed in enumerate(chosen_samples(context, who, most)):
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


def mean_rows(layer: PairedLayer, array: np.ndarray) -> np.ndarray:
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
