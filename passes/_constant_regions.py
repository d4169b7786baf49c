"""Parts of a graph that read nothing but large constants, folded as a whole or not at all.

    Wq = Slice(W, ...);  Wk = Slice(W, ...);  Wv = Slice(W, ...)    =>    initializers Wq, Wk, Wv instead of W

Whether a file grows can only be told of all nodes that share constants, so they are collected first. Results are
lazy tensors, computed from the constants when the file is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes, attribute_values
from qgraph.numerics import operators

__all__ = ["ConstantRegions"]

_ALWAYS_DEFINED = {"Add", "Concat", "Flatten", "Identity", "Mul", "Neg", "Reshape", "Slice", "Squeeze", "Sub"}
_ALWAYS_DEFINED |= {"Transpose", "Unsqueeze"}
_DEFINED_FOR_FLOATS = {"Cast", "Div", "Reciprocal", "Sqrt"}
"""Operators that cannot fail; any other is computed at once: a failure while the file is written comes too late."""


class ConstantRegions:
    """Collects nodes whose inputs are constant, and folds those that do not make the model larger.

    Args:
        shapes: what is known of the values.
        max_bytes: larger results stay lazy, and a region may make the model larger by this much.
    """

    def __init__(self, shapes: Shapes, max_bytes: int) -> None:
        self._shapes = shapes
        self._max_bytes = max_bytes
        self._results: dict[ir.Value, ir.LazyTensor] = {}
        self._nodes: list[ir.Node] = []

    def offer(self, node: ir.Node) -> None:
        """Take a node into consideration, if its one output is computable from constants and is no graph output."""
        if not operators.is_known(node.op_type) or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            return
        tensors = [self._tensor(value) for value in node.inputs]
        constant = all(tensor is not None or v is None for tensor, v in zip(tensors, node.inputs, strict=True))
        if not constant or not any(tensor is not None for tensor in tensors):
            return
        output = node.outputs[0]
        dims, dtype = self._shapes.dims(output), self._shapes.dtype(output)
        if dims is None or dtype is None or dtype.bitwidth < 8:
            return
        shape = [dim for dim in dims if isinstance(dim, int)]
        if len(shape) < len(dims):
            return
        if math.prod(shape) * dtype.itemsize > self._max_bytes and not _cannot_fail(node, dtype):
            return
        self._results[output] = qgraph.ir.lazy(_computation(node, tensors), dtype, shape)
        self._nodes.append(node)

    def _tensor(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        if value is None or value.is_graph_input():
            return None
        if value in self._results:
            return self._results[value]
        tensor = value.const_value
        if tensor is None and qgraph.ir.is_op(value.producer(), "Constant"):
            tensor = ir.convenience.get_const_tensor(value)
        return None if tensor is None or tensor.dtype == ir.DataType.STRING else tensor

    def chosen(self, room: int) -> list[tuple[list[ir.Node], dict[ir.Value, ir.TensorProtocol]]]:
        """Return the regions to fold: their nodes, and the tensors that replace what others read of them.

        Args:
            room: bytes by which all regions together may make the model larger.
        """
        regions: list[tuple[list[ir.Node], dict[ir.Value, ir.TensorProtocol]]] = []
        for nodes in self._components():
            inside = set(nodes)
            read = [node.outputs[0] for node in nodes if any(use.node not in inside for use in node.outputs[0].uses())]
            growth = sum(self._results[value].nbytes for value in read) - _freed(nodes, inside)
            if growth > min(room, self._max_bytes):
                continue
            tensors = self._computed(read)
            if tensors is not None:
                room -= max(growth, 0)
                regions.append((nodes, tensors))
        return regions

    def _components(self) -> list[list[ir.Node]]:
        """Return the nodes that hang together by the constants that they read, in the order of the graph."""
        leader: dict[ir.Value, ir.Value] = {}

        def find(value: ir.Value) -> ir.Value:
            while leader.setdefault(value, value) is not value:
                leader[value] = leader[leader[value]]
                value = leader[value]
            return value

        # A node of a branch that was removed since has lost its inputs.
        nodes = [node for node in self._nodes if any(value is not None for value in node.inputs)]
        for node in nodes:
            for value in node.inputs:
                if value is not None:
                    leader[find(value)] = find(node.outputs[0])
        components: dict[ir.Value, list[ir.Node]] = {}
        for node in nodes:
            components.setdefault(find(node.outputs[0]), []).append(node)
        return list(components.values())

    def _computed(self, values: Sequence[ir.Value]) -> dict[ir.Value, ir.TensorProtocol] | None:
        """Compute the small ones of `values`; None if numpy would not compute one as ONNX does."""
        tensors: dict[ir.Value, ir.TensorProtocol] = {}
        for value in values:
            tensor = self._results[value]
            try:
                tensors[value] = ir.tensor(tensor.numpy()) if tensor.nbytes <= self._max_bytes else tensor
            except operators.NotFoldedError:
                return None
        return tensors


def _cannot_fail(node: ir.Node, dtype: ir.DataType) -> bool:
    return node.op_type in _ALWAYS_DEFINED or (dtype.is_floating_point() and node.op_type in _DEFINED_FOR_FLOATS)


def _freed(nodes: Sequence[ir.Node], inside: set[ir.Node]) -> int:
    """Return the bytes of the constants that nobody but `nodes` reads."""
    constants = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    alone = (v for v in constants if v.is_initializer() and all(use.node in inside for use in v.uses()))
    return sum(value.const_value.nbytes for value in alone if value.const_value is not None)


def _computation(node: ir.Node, tensors: Sequence[ir.TensorProtocol | None]) -> Callable[[], np.ndarray]:
    """Return a function that computes the only output of a node from the tensors it reads now."""
    op_type, attributes = node.op_type, attribute_values(node)

    def compute() -> np.ndarray:
        arrays = [np.asarray(tensor.numpy()) if tensor is not None else None for tensor in tensors]
        return operators.evaluate(op_type, attributes, arrays)[0]

    return compute
