"""Factors for the channels of an activation, moved into the constants before it and behind it.

    y = MatMul(x, W)    =>    y = MatMul(x / s, diag(s) W)

The division goes into the constants that make x where `channel_sources` finds them: the weight of the norm before, the
columns of the linear layer before, even behind gating and attention. Where it finds none, a Mul is inserted.

    RMSNormalization(z, g) -> x             =>    RMSNormalization(z, g / s) -> x
    Mul(act(MatMul(z, G)), MatMul(z, U))    =>    Mul(act(MatMul(z, G)), MatMul(z, U diag(1 / s)))
    x                                       =>    Mul(x, 1 / s)

This one rewrite serves every method that chooses s: smoothing, AWQ, equalization.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_sources import NoSourceError, Origin, Source, find_origin
from qgraph.analysis.linear_layers import LinearLayer, linear_layers
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.pipeline import Context

__all__ = [
    "Folding",
    "by_input",
    "current",
    "find_folding",
    "foldings",
    "input_source",
    "is_shared",
    "multiply",
    "replace_constant",
    "rescale",
    "scale_input",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Folding:
    """How factors for the input of some layers can be moved.

    Attributes:
        x: the activation [..., channels].
        layers: the linear layers that read it, in topological order; none shares its weight with others.
        origin: the constants before x; None where a Mul is needed.
        reason: why it is needed.
    """

    x: ir.Value
    layers: Sequence[LinearLayer]
    origin: Origin | None
    reason: str = ""

    @property
    def channels(self) -> int:
        """Length of the last axis of x."""
        return self.layers[0].inputs

    @property
    def tied(self) -> np.ndarray:
        """int, (channels,): the first channel of those that have to take the same factor."""
        return np.arange(self.channels) if self.origin is None else self.origin.tied


def by_input(layers: Iterable[LinearLayer]) -> dict[ir.Value, list[LinearLayer]]:
    """Return the linear layers, without embeddings, by the activation they read."""
    groups: dict[ir.Value, list[LinearLayer]] = {}
    for layer in layers:
        if layer.kind == "linear":
            groups.setdefault(layer.x, []).append(layer)
    return groups


def is_shared(layer: LinearLayer) -> bool:
    """Tell whether somebody else reads the layer's weight too, so that it cannot be changed for this layer alone."""
    values = [current(layer).weight]
    right = layer.node.inputs[0 if layer.kind == "embedding" else 1]
    if right is not None and right is not values[0]:
        values.append(right)
    return any(qgraph.ir.only_consumer(value) is None for value in values)


def current(layer: LinearLayer) -> LinearLayer:
    """Return the layer with the weight and the input that its node reads now."""
    x, right = layer.node.inputs[:2] if layer.kind == "linear" else layer.node.inputs[1::-1]
    assert x is not None
    assert right is not None
    behind = right.producer()
    weight = behind.inputs[0] if right.const_value is None and behind is not None else right
    assert weight is not None
    return dataclasses.replace(layer, weight=weight, x=x)


def foldings(model: ir.Model, context: Context) -> list[Folding]:
    """Return the way for every activation that only linear layers with weights of their own are found for."""
    layers = linear_layers(model).layers
    shapes = context.analyse(shapes_of, model)
    groups = by_input(layers)
    return [
        find_folding(x, readers, shapes, layers) for x, readers in groups.items() if not any(map(is_shared, readers))
    ]


def find_folding(x: ir.Value, readers: Sequence[LinearLayer], shapes: Shapes, layers: Sequence[LinearLayer]) -> Folding:
    """Return how factors of x can be moved.

    Args:
        x: an activation [..., channels].
        readers: the linear layers that get the inverse factors; all must have the same number of inputs.
        shapes: of the model.
        layers: all linear layers of the model.
    """
    try:
        origin = find_origin(x, [layer.node for layer in readers], readers[0].inputs, shapes, layers)
    except NoSourceError as reason:
        return Folding(x, tuple(readers), None, str(reason))
    return Folding(x, tuple(readers), origin)


def scale_input(model: ir.Model, folding: Folding, scales: np.ndarray, *, suffix: str) -> None:
    """Divide x by `scales` and multiply the weights that read it; what the model computes stays.

    Args:
        model: is changed.
        folding: of this model; what was changed since must not lie on its way.
        scales: float, (channels,), positive; equal where `folding.tied` says so.
        suffix: appended to the names of rewritten constants.

    Raises:
        ValueError: tied channels differ, or a scale is not positive.
    """
    scales = np.asarray(scales, np.float64)
    if not (np.isfinite(scales) & (scales > 0.0)).all() or not np.array_equal(scales, scales[folding.tied]):
        raise ValueError("scales must be positive, and equal for channels that are tied")
    smoothed = folding.x
    if folding.origin is None:
        smoothed = _divided(model, folding.x, folding.layers[0].node, scales, suffix)
    else:
        for source in folding.origin.sources:
            rescale(model, source, 1.0 / scales, suffix)
    for layer in folding.layers:
        layer.node.replace_input_with(0, smoothed)
        rescale(model, input_source(layer), scales, suffix)


def input_source(layer: LinearLayer) -> Source:
    """Return the layer's weight, or table, as it stands now, with its rows as channels of the input."""
    channels = np.arange(layer.inputs)
    if layer.kind == "embedding":
        return Source(layer.node, 0, channels, layer)
    right = layer.node.inputs[1]
    assert right is not None
    behind = right.producer() if right.const_value is None else None
    node, index = (layer.node, 1) if behind is None else (behind, 0)
    return Source(node, index, channels if layer.transposed else channels[:, None], layer)


def _divided(model: ir.Model, x: ir.Value, before: ir.Node, scales: np.ndarray, suffix: str) -> ir.Value:
    dtype = x.dtype if x.dtype is not None else ir.DataType.FLOAT
    factors = (1.0 / scales).astype(dtype.numpy())
    factor = qgraph.ir.initializer(model.graph, f"{x.name}_{suffix}_factors", factors)
    mul = ir.node("Mul", [x, factor], name=qgraph.ir.fresh_name(model.graph, f"{x.name}_{suffix}"))
    smoothed = mul.outputs[0]
    smoothed.name, smoothed.type, smoothed.shape = mul.name, x.type, x.shape
    qgraph.ir.insert_before(before, mul)
    return smoothed


def rescale(model: ir.Model, source: Source, factors: np.ndarray, suffix: str) -> None:
    """Put a constant times the factors of its channels in its place, for this one reader.

    Args:
        model: is changed.
        source: the constant; matrices are computed when they are read or written, each time anew.
        factors: float, (channels,).
        suffix: appended to its name.
    """
    multiply(model, source, np.append(factors, 1.0)[source.channels].astype(np.float32), suffix)


def multiply(model: ir.Model, source: Source, spread: np.ndarray, suffix: str) -> None:
    """Put a constant times `spread`, float32 or float64, which broadcasts against it, in its place; see `rescale`."""
    tensor = source.value.const_value or ir.convenience.get_const_tensor(source.value)
    assert tensor is not None

    def compute() -> np.ndarray:
        array = tensor.numpy()
        return np.asarray(array.astype(spread.dtype) * spread).astype(array.dtype)

    shape = np.broadcast_shapes(tuple(tensor.shape.numpy()), spread.shape)
    replace_constant(model, [source], qgraph.ir.lazy(compute, tensor.dtype, shape), suffix)


def replace_constant(model: ir.Model, sources: Sequence[Source], tensor: ir.TensorProtocol, suffix: str) -> None:
    """Let the given readers of one constant read `tensor` instead; a constant that nobody reads any more goes."""
    old = sources[0].value
    base = f"{old.name}".removesuffix(f"_{suffix}")
    vector = sources[0].matrix is None or len(tensor.shape) < 2
    new = qgraph.ir.initializer(model.graph, f"{base}_{suffix}", ir.tensor(tensor.numpy()) if vector else tensor)
    for source in sources:
        source.node.replace_input_with(source.index, new)
    if old.uses() or old.is_graph_output():
        return
    producer = old.producer()
    if producer is not None:
        qgraph.ir.discard(producer)
    elif old.name is not None and model.graph.initializers.get(old.name) is old:
        del model.graph.initializers[old.name]
