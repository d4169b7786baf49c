"""Activations turned by random rotations that are folded into the weights.

    embedding E                  =>    E Q              the residual stream x becomes x Q
    x + MatMul(h, W)             =>    x + MatMul(h, W Q)
    MatMul(norm(x) * g, V)       =>    MatMul(norm(x), Q' diag(g) V)
    MatMul(attend(MatMul(z, V_h)), O_h)  =>  MatMul(attend(MatMul(z, V_h R)), R' O_h)       for each head h

Q and R are randomised Hadamard matrices. What the model computes stays; what changes is that no channel and no weight
stands out any more, which few bits want. Nothing is left to do at run time. Where there are calibration samples, Q
starts from the principal directions of what they send through the stream: a Hadamard matrix then gives every channel
the same energy exactly, instead of about the same.

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
from qgraph.analysis.block_stream import BlockStream
from qgraph.analysis.channel_sources import Origin, Source
from qgraph.analysis.linear_layers import LinearLayer, linear_layers
from qgraph.analysis.residual_stream import Gain, Stream, residual_streams
from qgraph.analysis.scale_folding import foldings, input_source, replace_constant
from qgraph.numerics.eigenbasis import eigenbasis
from qgraph.numerics.hessian import Hessian
from qgraph.numerics.rotation import Rotation, rotation
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
    calibrated: bool = field(
        default=True,
        metadata={"help": "spread what calibration samples send evenly over all channels, if there are any"},
    )
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
                turn = _StreamTurn(model, stream)
                problem = turn.problem()
                if problem is not None:
                    skipped.append(problem)
                    continue
                notes += turn.run(self._basis(model, context, stream, seed + number))
                changed += len(stream.embeddings) + len(stream.writers) + len(stream.readers)
        return Report(changed=changed, skipped=skipped, notes=notes)

    def _basis(self, model: ir.Model, context: Context, stream: Stream, seed: int) -> _Basis:
        random = rotation(stream.width, seed)
        if not self.calibrated or context.calibration is None or not random.is_hadamard:
            return _Basis(random)
        return _Basis(random, eigenbasis(_covariance(model, context, stream, self.name)))


def _covariance(model: ir.Model, context: Context, stream: Stream, who: str) -> np.ndarray:
    """Return the second moment of what the readers get, before the gains: float64 [width, width].

    Every activation that is read counts the same, whatever its size.
    """
    inverse: dict[ir.Value, np.ndarray] = {}
    for gain in stream.gains:
        factors = qgraph.ir.constant(gain.node.inputs[gain.index])
        assert factors is not None
        wide = factors.reshape(-1).astype(np.float64)
        used = np.abs(wide) > 1e-6 * np.abs(wide).max()
        inverse[gain.layers[0].x] = np.where(used, 1.0 / np.where(used, wide, 1.0), 0.0)
    total = np.zeros((stream.width, stream.width))
    done: set[ir.Value] = set()
    for stage in BlockStream(model, context, stream.readers, who=who, sequential="block").stages():
        hessians = {x: Hessian(stream.width) for x in stage.layers if x not in done}
        done |= hessians.keys()
        for rows in stage.rows() if hessians else ():
            for x, hessian in hessians.items():
                hessian.add(rows[x].changed)
        for x, hessian in hessians.items():
            factors = inverse.get(x, np.ones(stream.width))
            moment = hessian.matrix * factors * factors[:, None]
            total += moment / max(np.trace(moment), 1e-30)
    return total


@dataclass(frozen=True)
class _Basis:
    """An orthogonal matrix Q: principal directions of what flows, if there are any, times a random Hadamard matrix."""

    rotation: Rotation
    directions: np.ndarray | None = None

    def apply(self, array: np.ndarray, axis: int = -1) -> np.ndarray:
        """Return the array with every vector v along `axis` replaced by v Q."""
        if self.directions is not None:
            array = np.moveaxis(np.moveaxis(array, axis, -1) @ self.directions.astype(array.dtype), -1, axis)
        return self.rotation.apply(array, axis)


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
        basis = _Basis(rotation(heads.shape[1], seed))
        for source, rows in zip(folding.origin.sources, blocks, strict=True):
            if source.matrix is not None and source.index != 2:
                _rewrite(model, [source.matrix], _Blocks(rows, basis, columns=False))
            else:
                _turn_vector(model, source, rows, basis)
        for layer in folding.layers:
            _rewrite(model, [layer], _Blocks(heads, basis, columns=True))
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
    basis: _Basis
    columns: bool

    def __call__(self, matrix: np.ndarray) -> np.ndarray:
        result = matrix.copy()
        target = result.T if self.columns else result
        for rows in self.places:
            target[rows] = self.basis.apply(target[rows], axis=0)
        return result


def _turn_vector(model: ir.Model, source: Source, places: np.ndarray | None, basis: _Basis) -> None:
    """Turn a constant along its last axis, in blocks of a head each, or as a whole."""
    array = qgraph.ir.constant(source.value)
    assert array is not None
    shape = np.broadcast_shapes(array.shape, source.channels.shape)
    wide = np.broadcast_to(array, shape).astype(np.float64)
    if places is None:
        wide = basis.apply(wide)
    else:
        flat = wide.reshape(-1)
        flat[places] = basis.apply(flat[places])
        wide = flat.reshape(shape)
    replace_constant(model, [source], ir.tensor(wide.astype(array.dtype)), _SUFFIX)


# --- the residual stream ---------------------------------------------------------------------------------------------


class _StreamTurn:
    """Turns one stream by an orthogonal matrix Q."""

    def __init__(self, model: ir.Model, stream: Stream) -> None:
        self._model = model
        self._stream = stream
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

    def run(self, basis: _Basis) -> list[str]:
        """Rewrite the weights and take the gains away; return notes."""
        self._basis = basis
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
            _turn_vector(self._model, Source(node, index, np.arange(stream.width)), None, self._basis)
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
            _Turn(self._basis, factors, writes=first.node in self._columns, reads=first.node in self._rows),
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
            if not weight.uses() and self._model.graph.initializers.get(str(weight.name)) is weight:
                del self._model.graph.initializers[str(weight.name)]

    def _product(self, value: ir.Value, name: str, factors: np.ndarray, before: ir.Node) -> ir.Value:
        turned = self._basis.apply(self._basis.apply(np.diag(factors.reshape(-1).astype(np.float64))), axis=0)
        matrix = qgraph.ir.initializer(self._model.graph, f"{name}_{_SUFFIX}", turned.astype(factors.dtype))
        node = ir.node("MatMul", [value, matrix], name=qgraph.ir.fresh_name(self._model.graph, f"{name}_product"))
        product = node.outputs[0]
        product.name, product.type, product.shape = node.name, value.type, value.shape
        qgraph.ir.insert_before(before, node)
        return product


@dataclass(frozen=True)
class _Turn:
    """Multiplies a matrix [N, K] by Q' from the left where it writes the stream, by diag(g) Q where it reads it."""

    basis: _Basis
    factors: np.ndarray | None
    writes: bool
    reads: bool

    def __call__(self, matrix: np.ndarray) -> np.ndarray:
        if self.factors is not None:
            matrix = matrix * self.factors.astype(np.float32)
        if self.reads:
            matrix = self.basis.apply(matrix)
        return self.basis.apply(matrix, axis=0) if self.writes else matrix


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
