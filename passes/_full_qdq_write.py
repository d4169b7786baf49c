"""Writing the QuantizeLinear and DequantizeLinear that `full-qdq` has planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import is_constant
from qgraph.analysis.integer_units import Form, layer_weight
from qgraph.passes._full_qdq_plan import Plan
from qgraph.passes._full_qdq_stands import Options, Stand, parameters
from qgraph.passes._full_qdq_weights import Rounded, round_weight, style_of

__all__ = ["write"]


def write(graph: ir.Graph, plan: Plan, options: Options) -> None:
    """Quantize what a plan says.

    Args:
        graph: the main graph.
        plan: what to write.
        options: those of the pass.
    """
    _Writer(graph, options).run(plan)


class _Writer:
    def __init__(self, graph: ir.Graph, options: Options) -> None:
        self._graph = graph
        self._options = options
        self._stored: dict[Stand, tuple[ir.Value, ir.Value]] = {}
        self._weights: dict[tuple[ir.Value, int], ir.Value] = {}

    def run(self, plan: Plan) -> None:
        movers = {unit.main for unit in plan.units if unit.form in (Form.MOVE, Form.JOIN)}
        for node in plan.weights:
            self._quantize_weight(node, plan.wide_weights)
        for value, stand in plan.values.items():
            if is_constant(value):
                self._quantize_constant(value, stand, movers)
            else:
                self._quantize(value, stand, plan.narrow)

    def _quantize(self, value: ir.Value, stand: Stand, narrow: Mapping[tuple[ir.Node, int], Stand]) -> None:
        """Let everybody read what integers stand for in the place of a tensor."""
        uses = [(use.node, use.idx) for use in value.uses()]
        # An input that is an output too keeps its name, and so stays what it is there.
        output = [] if value.is_graph_input() else [i for i, one in enumerate(self._graph.outputs) if one is value]
        real = self._pair(value, stand, value, value.name or "value")
        copies: dict[Stand, ir.Value] = {}
        for node, index in uses:
            other = narrow.get((node, index))
            if other is not None and other not in copies:
                copies[other] = self._pair(real, other, value, f"{value.name}_8bit")
            node.replace_input_with(index, real if other is None else copies[other])
        for index in output:
            self._graph.outputs[index] = real
        if output:
            real.name, value.name = value.name, qgraph.ir.fresh_name(self._graph, f"{value.name}_raw")

    def _pair(self, source: ir.Value, stand: Stand, like: ir.Value, name: str) -> ir.Value:
        scale, zero_point = self._parameters(stand, name)
        integers = self._node("QuantizeLinear", [source, scale, zero_point], f"{name}_q", like, zero_point.dtype)
        real = self._node("DequantizeLinear", [integers.outputs[0], scale, zero_point], f"{name}_dq", like)
        maker = source.producer()
        if maker is None:
            self._graph.insert_before(self._graph[0], [integers, real])
        else:
            self._graph.insert_after(maker, [integers, real])
        return real.outputs[0]

    def _parameters(self, stand: Stand, name: str) -> tuple[ir.Value, ir.Value]:
        if stand not in self._stored:
            scale, zero_point = parameters(stand, self._options)
            self._stored[stand] = (
                qgraph.ir.initializer(self._graph, f"{name}_scale", np.asarray(scale, np.float32)),
                qgraph.ir.initializer(self._graph, f"{name}_zero_point", np.asarray(zero_point)),
            )
        return self._stored[stand]

    def _node(
        self, op_type: str, inputs: list[ir.Value], name: str, like: ir.Value, dtype: ir.DataType | None = None
    ) -> ir.Node:
        node = ir.node(op_type, inputs, name=qgraph.ir.fresh_name(self._graph, name))
        output = node.outputs[0]
        output.name, output.shape = node.name, like.shape
        output.dtype = dtype or ir.DataType.FLOAT
        return node

    def _quantize_constant(self, value: ir.Value, stand: Stand, movers: set[ir.Node]) -> None:
        """Store a constant that is moved or joined, for those who do that."""
        array = qgraph.ir.constant(value)
        assert array is not None
        scale, zero_point = parameters(stand, self._options)
        limits = np.iinfo(zero_point.dtype)
        with np.errstate(over="ignore"):
            codes = np.clip(np.rint(array / scale) + int(zero_point), limits.min, limits.max)
        name = value.name or "constant"
        stored = qgraph.ir.initializer(self._graph, f"{name}_q", np.asarray(codes).astype(zero_point.dtype))
        scales = self._parameters(stand, name)
        node = self._node("DequantizeLinear", [stored, *scales], f"{name}_dq", value)
        self._graph.insert_before(self._graph[0], node)
        for use in value.uses():
            if use.node in movers:
                use.node.replace_input_with(use.idx, node.outputs[0])

    # --- weights ------------------------------------------------------------------------------------------------------

    def _quantize_weight(self, node: ir.Node, wide: Set[ir.Value]) -> None:
        found = layer_weight(node)
        assert found is not None
        index, weight = found
        style = style_of(self._options)
        rounded = round_weight(node, dataclasses.replace(style, bits=16) if weight in wide else style)
        key = (weight, -1 if rounded.axis is None else rounded.axis)
        if key not in self._weights:
            self._weights[key] = self._store(weight, rounded)
        node.replace_input_with(index, self._weights[key])

    def _store(self, weight: ir.Value, rounded: Rounded) -> ir.Value:
        name = weight.name or "weight"
        codes = ir.tensor(rounded.codes.astype(rounded.dtype.numpy()), dtype=rounded.dtype)
        inputs = [
            qgraph.ir.initializer(self._graph, f"{name}_q", codes),
            qgraph.ir.initializer(self._graph, f"{name}_scale", rounded.scale),
        ]
        node = self._node("DequantizeLinear", inputs, f"{name}_dq", weight)
        if rounded.axis is not None:
            node.attributes["axis"] = ir.AttrInt64("axis", rounded.axis)
        self._graph.insert_before(self._graph[0], node)
        return node.outputs[0]
