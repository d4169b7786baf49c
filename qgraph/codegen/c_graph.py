"""An integer graph as code generators see it: static shapes, constants, and the quantized tensors at its edges.

x (float) -> QuantizeLinear -> xq ... yq -> DequantizeLinear -> y (float)    =>    xq is an input, yq an output
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes
from qgraph.errors import UserError

__all__ = ["IntegerGraph", "Port", "refusal"]

_MOST_ELEMENTS = (1 << 31) - 1
_INTEGER_KINDS = "iub"


@dataclass(frozen=True)
class Port:
    """A tensor at the edge of the graph.

    Attributes:
        value: the integer tensor: what QuantizeLinear makes, what DequantizeLinear reads, or the edge itself.
        source: the name of the graph's input or output.
        dtype: its integer type.
        shape: its sizes.
        scale: of one step, as QuantizeLinear and DequantizeLinear say; None where the edge is an integer itself.
        zero_point: the integer that stands for 0.
    """

    value: ir.Value
    source: str
    dtype: np.dtype
    shape: tuple[int, ...]
    scale: float | None = None
    zero_point: int = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def refusal(node: ir.Node, reason: str) -> UserError:
    """Return the error for a node that no code can be written for."""
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
    return UserError(
        f"node '{qgraph.ir.node_label(node)}' ({domain}{node.op_type}) cannot be written as integer code: {reason}"
    )


class IntegerGraph:
    """Types, shapes and constants of an integer graph, whose shapes must be static.

    Attributes:
        inputs, outputs: the tensors at the edges, in the order of the graph's inputs and outputs.

    Raises:
        UserError: a shape is dynamic, a tensor too large, or a float tensor lies between the edges.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._refuse_dynamic_inputs()
        self._shapes = Shapes(model).run()
        self._constants: dict[ir.Value, np.ndarray | None] = {}
        self.inputs = [port for value in model.graph.inputs for port in self._input_ports(value)]
        self.outputs = [self._output_port(value) for value in model.graph.outputs]

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """Return the sizes of a tensor.

        Raises:
            UserError: they are not known, or the tensor is too large for 32-bit indices.
        """
        dims = self._shapes.dims(value)
        node = value.producer()
        if dims is None or not all(isinstance(dim, int) for dim in dims):
            reason = self._shapes.reasons.get(value, f"its size {list(map(str, dims or ()))} depends on the data")
            text = f"the shape of '{value.name}' is not known ({reason}); fold constants first, or fix input shapes"
            raise UserError(text) if node is None else refusal(node, text)
        sizes = tuple(int(dim) for dim in dims if isinstance(dim, int))
        if 0 in sizes and self.constant(value) is None:
            raise UserError(f"tensor '{value.name}' of shape {list(sizes)} is empty: there is nothing to compute")
        if math.prod(sizes) > _MOST_ELEMENTS:
            raise UserError(f"tensor '{value.name}' has {math.prod(sizes)} elements, more than 32-bit indices reach")
        return sizes

    def size(self, value: ir.Value) -> int:
        """Return the number of elements of a tensor."""
        return math.prod(self.shape(value))

    def dtype(self, value: ir.Value) -> np.dtype:
        """Return the integer type of a tensor.

        Raises:
            UserError: it is a float tensor, or of a type that C has not; says at which node.
        """
        dtype = self._shapes.dtype(value)
        node = value.producer()
        if dtype is None and node is None:
            raise UserError(f"the type of '{value.name}' is not known")
        if dtype is not None and dtype.bitwidth >= 8:
            numpy = dtype.numpy()
            if numpy.kind in _INTEGER_KINDS:
                return numpy
        if node is None:
            raise UserError(f"'{value.name}' is {dtype}: only integers of 8 to 64 bits and bool can be written as code")
        why = node.metadata_props.get("qgraph.boundary")
        raise refusal(node, f"'{value.name}' is {dtype}" + (f" (a boundary: {why})" if why else ", no integer"))

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """Return the elements of a tensor that the graph's shapes and constants alone decide."""
        if value is None:
            return None
        if value not in self._constants:
            array = qgraph.ir.constant(value)
            self._constants[value] = self._shapes.array(value) if array is None else array
        return self._constants[value]

    def integers(self, node: ir.Node, position: int, default: list[int] | None = None) -> list[int]:
        """Return a constant input of a node as a list.

        Raises:
            UserError: it is computed at run time, or left out and there is no default.
        """
        value = node.inputs[position] if position < len(node.inputs) else None
        array = self.constant(value)
        if array is not None:
            return [int(number) for number in array.reshape(-1)]
        if value is not None or default is None:
            raise refusal(node, f"its input {position} must be a constant")
        return default

    # --- edges -------------------------------------------------------------------------------------------------------

    def _refuse_dynamic_inputs(self) -> None:
        for value in self.model.graph.inputs:
            shape = value.shape
            if shape is None or not shape.is_static():
                example = ",".join(str(dim) if isinstance(dim, int) else "1" for dim in shape or [1])
                known = "no shape" if shape is None else f"the shape {[str(dim) for dim in shape]}"
                raise UserError(
                    f"input '{value.name}' has {known}, and code needs every size: "
                    f"fix it, for instance with --shape {value.name}={example}"
                )

    def _input_ports(self, value: ir.Value) -> Iterator[Port]:
        name = value.name or ""
        if value.dtype is None or not value.dtype.is_floating_point():
            yield Port(value, name, self.dtype(value), self.shape(value))
            return
        for node in value.consumers():
            if not qgraph.ir.is_op(node, "QuantizeLinear"):
                raise self._boundary(node, f"it reads the float input '{name}'")
            yield self._quantized(node, node.outputs[0], name)

    def _output_port(self, value: ir.Value) -> Port:
        node = value.producer()
        if not qgraph.ir.is_op(node, "DequantizeLinear"):
            return Port(value, value.name or "", self.dtype(value), self.shape(value))
        assert node is not None
        source = node.inputs[0]
        assert source is not None
        return self._quantized(node, source, value.name or "")

    def _quantized(self, node: ir.Node, value: ir.Value, name: str) -> Port:
        scale = self.constant(node.inputs[1])
        zero = self.constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
        if scale is None or scale.size != 1 or zero is None or zero.size != 1:
            raise refusal(node, "its scale and zero point must be constant scalars")
        return Port(value, name, self.dtype(value), self.shape(value), float(scale.item()), int(zero.item()))

    def _boundary(self, node: ir.Node, what: str) -> UserError:
        reason = node.metadata_props.get("qgraph.boundary")
        return refusal(node, f"{what}, outside the quantized edges" + (f" (a boundary: {reason})" if reason else ""))
