"""The quantized forms of values, for `qdq`: made once, where they are first needed, and named after what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.numerics.quantize import Parameters, Quantized, quantize, scale_and_zero_point
from qgraph.numerics.schemes import Scheme

__all__ = ["SOURCE_KEY", "QuantizedValues", "Schemes"]

SOURCE_KEY = "qgraph.source"
"""Metadata of a value that stands for a tensor of the source under another name."""


@dataclass(frozen=True)
class Schemes:
    """How activations and weights are quantized.

    Attributes:
        activation: per tensor.
        weight: per tensor.
        per_channel: whether weights get a scale for each output channel instead.
        four_bits: whether weights get 4 bits where nothing else is noted at their nodes.
        clip: how the ranges of weights are chosen.
        inputs_only: quantize what the nodes of the plan read, and nothing that they make; biases stay in float.
    """

    activation: Scheme
    weight: Scheme
    per_channel: bool
    four_bits: bool = False
    clip: Literal["minmax", "mse"] = "minmax"
    inputs_only: bool = False


class QuantizedValues:
    """Gives values of a graph their quantized and dequantized forms.

    Nodes are inserted behind the producer of what they read, so that a graph in topological order stays so.

    Args:
        graph: the main graph.
        group: the group of each value to quantize; a group shares scale and zero point.
        ranges: least and largest number of each group.
        scheme: how to quantize them.
    """

    def __init__(
        self,
        graph: ir.Graph,
        group: Mapping[ir.Value, ir.Value],
        ranges: Mapping[ir.Value, tuple[float, float]],
        scheme: Scheme,
    ) -> None:
        self.graph = graph
        self.scheme = scheme
        self.dtype = ir.DataType.from_numpy(scheme.dtype)
        self._group = group
        self._parameters = {value: scale_and_zero_point(*ranges[value], scheme) for value in ranges}
        self._names = {value: value.name or "value" for value in group}
        self._stored: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._integers: dict[ir.Value, ir.Value] = {}
        self._reals: dict[ir.Value, ir.Value] = {}
        self._operands: dict[tuple[object, ...], ir.Value] = {}
        self._replaced: dict[ir.Value, None] = {}

    def __contains__(self, value: object) -> bool:
        return value in self._group

    def name(self, value: ir.Value) -> str:
        """Return the name that `value` had before anything was rewritten."""
        return self._names[value]

    def parameters(self, value: ir.Value) -> Parameters:
        """Return scale and zero point of a value's quantized form."""
        return self._parameters[self._group[value]]

    def stored_parameters(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the initializers of scale and zero point."""
        group = self._group[value]
        if group not in self._stored:
            name, parameters = self._names[group], self._parameters[group]
            self._stored[group] = self.store_parameters(name, parameters)
        return self._stored[group]

    def integers(self, value: ir.Value) -> ir.Value:
        """Return the quantized form of a value; a QuantizeLinear makes it unless `define` named another."""
        if value not in self._integers:
            self._integers[value] = self.quantized_from(value, value)
        return self._integers[value]

    def quantized_from(self, real: ir.Value, meaning: ir.Value) -> ir.Value:
        """Return `real` quantized with the scale and the name of `meaning`."""
        inputs = [real, *self.stored_parameters(meaning)]
        node = self.node("QuantizeLinear", inputs, f"{self._names[meaning]}_q", meaning, self.dtype)
        self.insert_after(real, node)
        return node.outputs[0]

    def real(self, value: ir.Value) -> ir.Value:
        """Return the dequantized form of a value."""
        if value not in self._reals:
            integers = self.integers(value)
            inputs = [integers, *self.stored_parameters(value)]
            node = self.node("DequantizeLinear", inputs, f"{self._names[value]}_dq", value)
            node.outputs[0].metadata_props[SOURCE_KEY] = self._names[value]
            self.insert_after(integers, node)
            self._reals[value] = node.outputs[0]
        return self._reals[value]

    def define(self, value: ir.Value, integers: ir.Value) -> None:
        """Let `integers` be the quantized form of a value."""
        self._integers[value] = integers

    def become_integers(self, value: ir.Value) -> None:
        """Turn a value itself, which an integer operator makes, into its quantized form."""
        value.name = qgraph.ir.fresh_name(self.graph, f"{self._names[value]}_q")
        value.type = ir.TensorType(self.dtype)  # a clone of the model shares the old one
        self._integers[value] = value

    def take_over(self, name_of: ir.Value, by: ir.Value) -> None:
        """Let the float value `by` have the name of a value that goes: quantized, it means the same."""
        name_of.name = None
        by.name = self._names[name_of]
        self._names[by] = self._names[name_of]

    def become_output(self, index: int, value: ir.Value) -> None:
        """Let the dequantized form of a value be the graph output that it was."""
        name, result, node = self._names[value], self.real(value), self.integers(value).producer()
        while node is not None and qgraph.ir.is_op(node, "Clip") and node.inputs[0] is not None:
            node = node.inputs[0].producer()  # that clamps integers
        before = node.inputs[0] if qgraph.ir.is_op(node, "QuantizeLinear") and node is not None else None
        for holder in (value, before):
            if holder is not None and holder.name == name:
                holder.name = qgraph.ir.fresh_name(self.graph, f"{name}_raw")
        result.name, result.shape = name, value.shape
        self.graph.outputs[index] = result

    def operand(self, name: str, array: np.ndarray) -> ir.Value:
        """Return a constant operand of an element-wise operator, quantized and dequantized."""
        key = (array.shape, array.tobytes())
        if key not in self._operands:
            quantized = quantize(array, self.scheme)
            self._operands[key] = self.constant(name, quantized.values, quantized)
        return self._operands[key]

    def constant(
        self,
        name: str,
        integers: np.ndarray | ir.TensorProtocol,
        parameters: Parameters | Quantized,
        axis: int | None = None,
    ) -> ir.Value:
        """Return what stored integers stand for; `axis` is the one of the channels."""
        stored = self.store(f"{name}_q", integers)
        attributes = {} if axis is None else {"axis": axis}
        if stored.dtype == ir.DataType.INT4:  # symmetric, and no zero point means zero
            inputs = [stored, self.store(f"{name}_scale", np.asarray(parameters.scale))]
        else:
            inputs = [stored, *self.store_parameters(name, parameters)]
        node = self.node("DequantizeLinear", inputs, f"{name}_dq", stored, attributes=attributes)
        self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]

    def store_parameters(self, name: str, parameters: Parameters | Quantized) -> tuple[ir.Value, ir.Value]:
        """Return new initializers of scale and zero point."""
        return (
            self.store(f"{name}_scale", np.asarray(parameters.scale)),
            self.store(f"{name}_zero_point", np.asarray(parameters.zero_point)),
        )

    def store(self, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """Return a new initializer."""
        return qgraph.ir.initializer(self.graph, name, array)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        like: ir.Value,
        dtype: ir.DataType = ir.DataType.FLOAT,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Node:
        """Return a new node whose output has the shape of `like`; it is in no graph yet."""
        node = ir.node(op_type, inputs, attributes, name=qgraph.ir.fresh_name(self.graph, name))
        output = node.outputs[0]
        output.name, output.dtype, output.shape = node.name, dtype, like.shape
        return node

    def insert_after(self, value: ir.Value, node: ir.Node) -> None:
        """Insert a node behind the producer of `value`."""
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)

    def replace_constant(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Put `value` in the place of a constant input."""
        before = node.inputs[index]
        if before is not None:
            self._replaced[before] = None
        node.replace_input_with(index, value)

    def drop_replaced(self) -> None:
        """Remove the constants that nobody reads any more."""
        for value in self._replaced:
            if not value.is_initializer() or value.uses() or value.is_graph_output():
                continue
            if value.graph is not None:
                value.graph.initializers.pop(value.name or "", None)
