"""Activations turned by random rotations that are folded into the weights.

    embedding E                  =>    E Q              the residual stream x becomes x Q
    x + MatMul(h, W)             =>    x + MatMul(h, W Q)
    MatMul(norm(x) * g, V)       =>    MatMul(norm(x), Q' diag(g) V)
    MatMul(attend(MatMul(z, V_h)), O_h)  =>  MatMul(attend(MatMul(z, V_h R)), R' O_h)       for each head h

Q and R are randomised Hadamard matrices. What the model computes stays; what changes is that no channel and no weight
stands out any more, which few bits want. Nothing is left to do at run time.

The norms must not subtract a mean, their weights go into the layers that they feed, and all that reads or writes the
stream must be known (`qgraph.analysis.residual_stream`); otherwise the stream stays, with the reason. An embedding
table that is the output layer too would take the weight of the last norm on one side only. It stays shared, with a
small product diag(g) turned by Q before the output layer, unless a second table is no larger than that.

Source: Ashkboos et al., "QuaRot" (2024), sections 4.1 and 4.2; Liu et al., "SpinQuant" (2024), R1 and R2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_sources import Origin, Source
from qgraph.analysis.linear_layers import LinearLayer, linear_layers
from qgraph.analysis.residual_stream import Gain, Stream, residual_streams
from qgraph.analysis.scale_folding import foldings, input_source, replace_constant
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["Rotate"]

_SUFFIX = "rotated"
_TURNED = "qgraph.rotated"
"""Key in the metadata of the nodes that start a turned stream or read turned values: once is enough."""


@dataclass(frozen=True)
class Rotate(Pass):
    """Turn the residual stream and the values of every head by random Hadamard matrices, inside the weights."""

    name: ClassVar[str] = "rotate"
    stream: bool = field(default=True, metadata={"help": "turn the residual stream"})
    heads: bool = field(default=True, metadata={"help": "turn the values of every attention head"})
    seed: int = field(default=0, metadata={"help": "of the random signs, added to the compilation's"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Turn what can be turned."""
        changed = 0
        skipped: list[Skipped] = []
        notes: list[str] = []
        seed = context.seed + self.seed
        if self.heads:
            turned = _turn_heads(model, context, seed)
            changed += 2 * turned
            notes += [f"values of {turned} attention blocks turned"] if turned else []
        if self.stream:
            streams, left = residual_streams(model, context)
            skipped += left
            for number, stream in enumerate(streams):
                if any(_TURNED in layer.node.metadata_props for layer in stream.embeddings):
                    continue
                turn = _StreamTurn(model, stream, _random_hadamard(stream.width, seed + number))
                problem = turn.problem()
                if problem is not None:
                    skipped.append(problem)
                    continue
                notes += turn.run()
                changed += len(stream.embeddings) + len(stream.writers) + len(stream.readers)
        return Report(changed=changed, skipped=skipped, notes=notes)


# --- values of heads -------------------------------------------------------------------------------------------------


def _turn_heads(model: ir.Model, context: Context, seed: int) -> int:
    """Turn values and what reads the attention's result; return the number of attentions."""
    turned = 0
    for folding in foldings(model, context):
        blocks = _head_blocks(folding.origin) if folding.origin is not None else None
        if folding.origin is None or blocks is None or _TURNED in folding.layers[0].node.metadata_props:
            continue
        heads = folding.origin.heads
        assert heads is not None
        rotation = _random_hadamard(heads.shape[1], seed)
        for source, rows in zip(folding.origin.sources, blocks, strict=True):
            if source.matrix is not None and source.index != 2:
                _rewrite(model, [source.matrix], _Blocks(rows, rotation, columns=False))
            else:
                _turn_vector(model, source, rows, rotation)
        for layer in folding.layers:
            _rewrite(model, [layer], _Blocks(heads, rotation, columns=True))
            layer.node.metadata_props[_TURNED] = "values"
        turned += 1
    return turned


def _head_blocks(origin: Origin) -> list[np.ndarray] | None:
    """Return, for each source, the places [heads, size] of each head's values; None if they do not line up."""
    if origin.heads is None:
        return None
    count, size = origin.heads.shape
    head, place = np.full(origin.tied.size, -1), np.full(origin.tied.size, -1)
    head[origin.heads] = np.arange(count)[:, None]
    place[origin.heads] = np.arange(size)
    if (head < 0).any() or not np.array_equal(place[origin.tied], place):
        return None
    blocks = []
    for source in origin.sources:
        channels = source.channels.reshape(-1)
        used = np.flatnonzero(channels >= 0)
        order = used[np.lexsort((place[channels[used]], head[channels[used]]))]
        if order.size % size or not (place[channels[order]].reshape(-1, size) == np.arange(size)).all():
            return None
        blocks.append(order.reshape(-1, size))
    return blocks


@dataclass(frozen=True)
class _Blocks:
    """Turns rows, or columns, of a matrix [N, K] in blocks of a head each."""

    places: np.ndarray
    rotation: np.ndarray
    columns: bool

    def __call__(self, matrix: np.ndarray) -> np.ndarray:
        result = matrix.copy()
        target = result.T if self.columns else result
        for rows in self.places:
            target[rows] = self.rotation.T @ target[rows]
        return result


def _turn_vector(model: ir.Model, source: Source, places: np.ndarray | None, rotation: np.ndarray) -> None:
    """Turn a constant along its last axis, in blocks of a head each, or as a whole."""
    array = qgraph.ir.constant(source.value)
    assert array is not None
    shape = np.broadcast_shapes(array.shape, source.channels.shape)
    wide = np.broadcast_to(array, shape).astype(np.float64)
    if places is None:
        wide = wide @ rotation
    else:
        flat = wide.reshape(-1)
        flat[places] = flat[places] @ rotation
        wide = flat.reshape(shape)
    replace_constant(model, [source], ir.tensor(wide.astype(array.dtype)), _SUFFIX)


# --- the residual stream ---------------------------------------------------------------------------------------------


class _StreamTurn:
    """Turns one stream by an orthogonal matrix Q, float64 [width, width]."""

    def __init__(self, model: ir.Model, stream: Stream, rotation: np.ndarray) -> None:
        self._model = model
        self._stream = stream
        self._rotation = rotation
        self._gains = {layer.node: gain for gain in stream.gains for layer in gain.layers}
        self._rows = {layer.node for layer in (*stream.embeddings, *stream.readers)}
        self._columns = {layer.node for layer in stream.writers}
        self._multiplied: set[ir.Node] = set()
        """Output layers that read their input times the turned gain."""
        groups = linear_layers(model).by_weight.values()
        self._groups = [group for group in groups if any(self._turns(layer) for layer in group)]

    def _turns(self, layer: LinearLayer) -> bool:
        return layer.node in self._rows or layer.node in self._columns

    def problem(self) -> Skipped | None:
        """Return which shared weight stands in the way: one that its readers do not read alike."""
        for group in self._groups:
            for layer in group:
                alike = layer.node in self._rows and layer.node not in self._columns
                if len(group) > 1 and not (alike and layer.transposed == group[0].transposed):
                    return Skipped(layer.name, "it shares its weight with others, which the rotation would set apart")
        return None

    def run(self) -> list[str]:
        """Rewrite the weights and take the gains away; return notes."""
        stream, notes = self._stream, []
        for group in self._groups:
            plain = [layer for layer in group if self._factors(layer) is None]
            weighted = [layer for layer in group if self._factors(layer) is not None]
            if plain and weighted:
                notes += [self._part(layer) for layer in weighted]
                kept = [layer for layer in weighted if layer.node in self._multiplied]
                plain, weighted = plain + kept, [layer for layer in weighted if layer not in kept]
            for layers in (plain, *([layer] for layer in weighted)):
                if layers:
                    self._turn(layers)
        for node, index in stream.vectors:
            _turn_vector(self._model, Source(node, index, np.arange(stream.width)), None, self._rotation)
        for gain in stream.gains:
            self._drop(gain)
        for layer in stream.embeddings:
            layer.node.metadata_props[_TURNED] = "stream"
        told = f"residual stream of {stream.width} channels turned"
        return [f"{told}: {len(stream.writers)} layers write it, {len(stream.readers)} read it", *notes]

    def _factors(self, layer: LinearLayer) -> np.ndarray | None:
        """Return what multiplies the stream on the way to a layer, unless it is one everywhere."""
        gain = self._gains.get(layer.node)
        if gain is None:
            return None
        factors = qgraph.ir.constant(gain.node.inputs[gain.index])
        assert factors is not None
        factors = factors.reshape(-1).astype(np.float64)
        return None if (factors == 1.0).all() else factors

    def _turn(self, layers: Sequence[LinearLayer]) -> None:
        first = layers[0]
        factors = None if first.node in self._multiplied or len(layers) > 1 else self._factors(first)
        _rewrite(
            self._model,
            layers,
            _Turn(self._rotation, factors, writes=first.node in self._columns, reads=first.node in self._rows),
        )

    def _part(self, layer: LinearLayer) -> str:
        """Choose what an output layer whose table is an embedding too gets: a product before it, or its own table."""
        if layer.outputs <= layer.inputs:
            return f"'{layer.name}' got a weight of its own, {layer.outputs} x {layer.inputs}: it was the embedding's"
        self._multiplied.add(layer.node)
        return (
            f"'{layer.name}' shares its weight with the embedding: a product of {layer.inputs} x {layer.inputs} "
            "before it takes the weight of the norm"
        )

    def _drop(self, gain: Gain) -> None:
        """Take a gain away: those who read it read the value, or its product with the turned gain."""
        weight = gain.node.inputs[gain.index]
        factors = qgraph.ir.constant(weight)
        assert weight is not None
        assert factors is not None
        if qgraph.ir.is_op(gain.node, "Mul"):
            value = gain.node.inputs[1 - gain.index]
        else:
            value = gain.node.outputs[0]
            ones = ir.tensor(np.ones_like(factors))
            replace_constant(self._model, [Source(gain.node, gain.index, np.arange(factors.size))], ones, _SUFFIX)
        assert value is not None
        product: ir.Value | None = None
        for layer in gain.layers:
            if layer.node not in self._multiplied:
                layer.node.replace_input_with(0, value)
                continue
            if product is None:
                product = self._product(value, f"{weight.name}", factors, layer.node)
            layer.node.replace_input_with(0, product)
        if not gain.node.outputs[0].uses():
            qgraph.ir.discard(gain.node)

    def _product(self, value: ir.Value, name: str, factors: np.ndarray, before: ir.Node) -> ir.Value:
        turned = self._rotation.T @ (factors.reshape(-1, 1).astype(np.float64) * self._rotation)
        matrix = qgraph.ir.initializer(self._model.graph, f"{name}_{_SUFFIX}", turned.astype(factors.dtype))
        node = ir.node("MatMul", [value, matrix], name=qgraph.ir.fresh_name(self._model.graph, f"{name}_product"))
        product = node.outputs[0]
        product.name, product.type, product.shape = node.name, value.type, value.shape
        qgraph.ir.insert_before(before, node)
        return product


@dataclass(frozen=True)
class _Turn:
    """Multiplies a matrix [N, K] by Q' from the left where it writes the stream, by diag(g) Q where it reads it."""

    rotation: np.ndarray
    factors: np.ndarray | None
    writes: bool
    reads: bool

    def __call__(self, matrix: np.ndarray) -> np.ndarray:
        if self.factors is not None:
            matrix = matrix * self.factors.astype(np.float32)
        rotation = self.rotation.astype(np.float32)
        if self.reads:
            matrix = matrix @ rotation
        return np.asarray(rotation.T @ matrix if self.writes else matrix)


def _rewrite(model: ir.Model, layers: Sequence[LinearLayer], change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Put `change` of a weight, as float32 [N, K], in its place, when it is read or written.

    Args:
        model: is changed.
        layers: share the weight, laid out alike.
        change: float32 [N, K] to float32 [N, K].
    """
    sources = [input_source(layer) for layer in layers]
    tensor = sources[0].value.const_value
    assert tensor is not None
    transposed = layers[0].transposed

    def compute() -> np.ndarray:
        stored = tensor.numpy()
        matrix = change(np.asarray(stored if transposed else stored.T, np.float32))
        return np.asarray(matrix if transposed else matrix.T).astype(stored.dtype)

    lazy = qgraph.ir.lazy(compute, tensor.dtype, tensor.shape.numpy())
    replace_constant(model, sources, lazy, _SUFFIX)


def _random_hadamard(size: int, seed: int) -> np.ndarray:
    """Return signs times a Hadamard matrix of the power of two in `size`, times a random orthogonal matrix of the rest.

    Float64 [size, size], orthogonal.
    """
    rng = np.random.default_rng(seed)
    power = size & -size
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rest = np.linalg.qr(rng.normal(size=(size // power, size // power)))[0]
    signs = rng.choice([-1.0, 1.0], size)
    return np.asarray(signs[:, None] * np.kron(hadamard, rest) / np.sqrt(power))
