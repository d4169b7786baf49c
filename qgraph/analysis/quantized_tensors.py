"""The quantized tensors of a model in ONNX's own QuantizeLinear (Q) and DequantizeLinear (D), and what each stands for.

    x -> Q -> D -> Conv            x is an activation; its error is D(Q(x)) - x
    Conv(..., D(W8)), D(Cast(W4))  a constant; its error is what D gives minus the constant of the float model
    D(Gather(T8, i))               a table, likewise

The float model is told by name: nodes by their names, tensors by `qgraph.source` in their metadata or their own names.
Readers that get the float tensor in the quantized model too are spared its error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.perturbations import Perturbation, Rounding
from qgraph.analysis.probes import main_values

__all__ = ["SOURCE_KEY", "QuantizedTensor", "dequantized", "quantized_tensors"]

SOURCE_KEY = "qgraph.source"
"""Metadata of a value that stands for a tensor of the source under another name."""
_MOST_MOVES = 64
_CLAMPS = ("Clip", "Relu")


class QuantizedTensor(NamedTuple):
    """A tensor of the float model that the quantized model has in integers.

    Attributes:
        tensor: its name.
        kind: of the tensor.
        bits: of its integers.
        readers: nodes of the float model that get the rounded form.
        perturbation: its error, for `qgraph.analysis.perturbation_effects`.
    """

    tensor: str
    kind: Literal["weight", "activation"]
    bits: int
    readers: tuple[str, ...]
    perturbation: Perturbation


def quantized_tensors(reference: ir.Model, quantized: ir.Model) -> tuple[list[QuantizedTensor], list[str]]:
    """Return the quantized tensors in the order of the quantized graph, and those that could not be paired, and why."""
    pairing = _Pairing(reference, quantized)
    found: list[QuantizedTensor] = []
    for node in quantized.graph:
        if qgraph.ir.is_op(node, "QuantizeLinear"):
            found += pairing.activation(node)
        elif qgraph.ir.is_op(node, "DequantizeLinear"):
            found += pairing.constant(node)
    order = {name: index for index, name in enumerate(main_values(reference))}
    places = {qgraph.ir.node_label(node): index for index, node in enumerate(reference.graph)}
    found.sort(key=lambda one: (min((places.get(name, 0) for name in one.readers), default=0), order[one.tensor]))
    return found, pairing.notes


class _Pairing:
    def __init__(self, reference: ir.Model, quantized: ir.Model) -> None:
        self.notes: list[str] = []
        self._values = main_values(reference)
        self._nodes = {qgraph.ir.node_label(node): node for node in reference.graph}
        self._makers = {value.name: node for node in reference.graph for value in node.outputs}
        self._outputs = {value.name for value in reference.graph.outputs}
        self._tables: set[ir.Value] = set()
        del quantized

    # --- activations --------------------------------------------------------------------------------------------------

    def activation(self, node: ir.Node) -> Iterator[QuantizedTensor]:
        """Yield what a QuantizeLinear rounds."""
        x = node.inputs[0]
        assert x is not None
        if qgraph.ir.constant(x) is not None:
            return
        name = self._meaning(node, x)
        if name is None:
            self.notes.append(f"'{x.name}': the float model has no tensor of this name")
            return
        parameters = _parameters(node)
        if parameters is None:
            self.notes.append(f"'{name}': its scale is computed at run time")
            return
        scale, zero_point, kind = parameters
        low, high = _integer_range(kind)
        error = Rounding(scale, zero_point, node.attributes.get_int("axis", 1), low, high)
        float_readers = {(self._label(use.node), use.idx) for use in x.uses() if use.node is not node}
        yield self._tensor(name, "activation", kind, error, float_readers, spares_output=x.is_graph_output())

    def _meaning(self, node: ir.Node, x: ir.Value) -> str | None:
        """Return the name in the float model of what a QuantizeLinear rounds."""
        reals = [use.node.outputs[0] for use in node.outputs[0].uses() if use.node.op_type == "DequantizeLinear"]
        told = [value.metadata_props.get(SOURCE_KEY) for value in (x, *reals)]
        for name in (told[0], x.name, *told[1:], *(value.name for value in reals)):
            if name in self._values:
                return name
        return None

    def _tensor(
        self,
        name: str,
        kind: Literal["weight", "activation"],
        dtype: ir.DataType,
        error: Rounding | np.ndarray,
        spared: set[tuple[str, int]],
        *,
        spares_output: bool = False,
    ) -> QuantizedTensor:
        uses = [(qgraph.ir.node_label(use.node), use.idx) for use in self._values[name].uses()]
        spared = {use for use in uses if use in spared}
        readers = tuple(dict.fromkeys(label for label, index in uses if (label, index) not in spared))
        perturbation = Perturbation(name, error, frozenset(spared), spares_output)
        return QuantizedTensor(name, kind, dtype.bitwidth, self._in_order(readers), perturbation)

    def _in_order(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        chosen = set(labels)
        return tuple(label for label in self._nodes if label in chosen) or tuple(sorted(labels))

    # --- constants ----------------------------------------------------------------------------------------------------

    def constant(self, node: ir.Node) -> Iterator[QuantizedTensor]:
        """Yield what the integers of a DequantizeLinear stand for, if they are constant."""
        stored = _stored(node.inputs[0])
        if stored is None:
            yield from self._table(node)
            return
        real = dequantized(node, stored)
        if real is None:
            self.notes.append(f"'{node.outputs[0].name}': its scale is computed at run time")
            return
        dtype = stored.dtype or ir.DataType.INT8
        yield from self._as_read(node.outputs[0], real, dtype)

    def _table(self, node: ir.Node) -> Iterator[QuantizedTensor]:
        """Yield the table whose rows come, maybe moved, to a DequantizeLinear."""
        value = node.inputs[0]
        for _ in range(_MOST_MOVES):
            maker = value.producer() if value is not None else None
            if maker is None or qgraph.ir.is_op(maker, "QuantizeLinear") or not maker.inputs:
                return
            stored = _stored(maker.inputs[0])
            if stored is None:
                value = maker.inputs[0]
                continue
            table = maker.inputs[0]
            if table is None or table in self._tables or not qgraph.ir.is_op(maker, "Gather"):
                return
            self._tables.add(table)
            real = dequantized(node, stored)
            if real is not None:
                yield from self._as_read(table, real, stored.dtype or ir.DataType.INT8)
            return

    def _as_read(self, value: ir.Value, real: np.ndarray, dtype: ir.DataType) -> Iterator[QuantizedTensor]:
        """Pair what reads a constant in the quantized model with the constants that the same nodes read in floats."""
        readers: dict[str, list[tuple[ir.Node, int, ir.Node]]] = {}
        for use in sorted(value.uses(), key=lambda use: (qgraph.ir.node_label(use.node), use.idx)):
            before = self._before(use.node)
            weight = before.inputs[use.idx] if before is not None and use.idx < len(before.inputs) else None
            if before is not None and weight is not None and weight.name in self._values:
                readers.setdefault(weight.name, []).append((before, use.idx, use.node))
        if not readers:
            self.notes.append(f"'{value.name}': no node of the float model reads its like")
        for name, some in readers.items():
            exact = qgraph.ir.constant(self._values[name])
            meant = None if exact is None else _meant(real, *some[0])
            if exact is None or meant is None or meant.size != exact.size:
                self.notes.append(f"'{name}': the float model has another tensor in its place")
                continue
            error = np.asarray(meant.reshape(exact.shape) - exact.astype(np.float32))
            reading = {(qgraph.ir.node_label(before), index) for before, index, _ in some}
            uses = {(qgraph.ir.node_label(use.node), use.idx) for use in self._values[name].uses()}
            yield self._tensor(name, "weight", dtype, error, uses - reading, spares_output=True)

    def _before(self, node: ir.Node) -> ir.Node | None:
        """Return the node of the float model that `node` stands for.

        One without a name is known by what it makes; where that took the name of a clamp behind it, by what the clamp
        reads.
        """
        found = self._nodes.get(qgraph.ir.node_label(node))
        if found is not None:
            return found
        result = node.outputs[0]
        names = [result.metadata_props.get(SOURCE_KEY), result.name]
        names += [self._meaning(use.node, result) for use in result.uses() if use.node.op_type == "QuantizeLinear"]
        found = next((self._makers[name] for name in names if name in self._makers), None)
        while found is not None and found.op_type in _CLAMPS and node.op_type not in _CLAMPS:
            source = found.inputs[0]
            found = None if source is None else source.producer()
        return found

    def _label(self, node: ir.Node) -> str:
        found = self._before(node) if node.outputs else None
        return qgraph.ir.node_label(node if found is None else found)


def _meant(real: np.ndarray, before: ir.Node, index: int, after: ir.Node) -> np.ndarray | None:
    """Return what a constant of the quantized model is in terms of that of the float model."""
    if before.op_type == "Gemm":
        factor = before.attributes.get_float("beta" if index == 2 else "alpha", 1.0)
        now = after.attributes.get_float("beta" if index == 2 else "alpha", 1.0)
        return real * np.float32(now / factor) if factor else None
    if (before.op_type, after.op_type) == ("Sub", "Add"):
        return -real
    if (before.op_type, after.op_type) == ("Div", "Mul"):
        return np.reciprocal(np.where(real == 0, np.inf, real))
    return real if before.op_type == after.op_type else None


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Return the constant that holds integers, maybe behind a Cast that widens them."""
    if value is not None and qgraph.ir.is_op(value.producer(), "Cast"):
        maker = value.producer()
        assert maker is not None
        value = maker.inputs[0]
    return value if qgraph.ir.constant(value) is not None else None


def _parameters(node: ir.Node) -> tuple[np.ndarray, np.ndarray, ir.DataType] | None:
    """Return scale, zero point (int32) and integer type of a Q or D; None where the scale is computed."""
    scale = qgraph.ir.constant(node.inputs[1])
    if scale is None:
        return None
    zero = _stored(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None:
        points = np.asarray(qgraph.ir.constant(zero)).astype(np.int32)
        return scale.astype(np.float32), points, zero.dtype or ir.DataType.UINT8
    kind = ir.DataType(node.attributes.get_int("output_dtype", 0)) if node.op_type == "QuantizeLinear" else None
    known = kind if kind is not None and kind != ir.DataType.UNDEFINED else ir.DataType.UINT8
    return scale.astype(np.float32), np.zeros(scale.shape, np.int32), known


def _integer_range(kind: ir.DataType) -> tuple[int, int]:
    bits = kind.bitwidth
    return (0, (1 << bits) - 1) if kind.name.startswith("UINT") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def dequantized(node: ir.Node, stored: ir.Value) -> np.ndarray | None:
    """Return what DequantizeLinear makes of constant integers, float32; None where the scale is computed."""
    parameters = _parameters(node)
    integers = qgraph.ir.constant(stored)
    if parameters is None or integers is None:
        return None
    # Blocks get an axis of their own, so that neither scales nor zero points are written out for every element.
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    apart = list(integers.shape)
    if block and parameters[0].size > 1 and apart[axis] == parameters[0].shape[axis] * block:
        place = axis % len(apart)
        apart[place : place + 1] = [apart[place] // block, block]
        scale, zero = (
            entries if entries.size == 1 else np.expand_dims(entries, place + 1) for entries in parameters[:2]
        )
    else:
        scale, zero = (_spread(entries, node, integers.shape) for entries in parameters[:2])
    real = integers.astype(np.float32).reshape(apart)
    if zero.any():
        real -= zero.astype(np.float32)
    real *= scale
    return real.reshape(integers.shape)


def _spread(entries: np.ndarray, node: ir.Node, shape: tuple[int, ...]) -> np.ndarray:
    """Return scales or zero points in a shape that broadcasts against `shape`."""
    if entries.size == 1:
        return entries.reshape(())
    axis = node.attributes.get_int("axis", 1) % len(shape)
    if (entries.ndim == 1 and len(shape) > 1) or (entries.ndim == 1 == len(shape) and entries.shape == shape):
        return entries.reshape([-1 if one == axis else 1 for one in range(len(shape))])
    block = node.attributes.get_int("block_size", 0) or -(-shape[axis] // entries.shape[axis])
    return np.take(np.repeat(entries, block, axis=axis), np.arange(shape[axis]), axis=axis)
