"""A thin writer of ONNX graphs over onnx_ir that names nodes and values as torch's exporter does."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["IR_VERSION", "OPSET", "Attribute", "GraphWriter"]

OPSET = 20
IR_VERSION = 10

Attribute = int | float | str | list[int] | list[float]


class GraphWriter:
    """Collects nodes and initializers in order; :meth:`model` turns them into a model.

    Parameters are looked up by their torch name, so that the graph has exactly the names of the checkpoint.
    """

    def __init__(self, name: str, parameters: Mapping[str, NDArray[np.float32]]) -> None:
        self._name = name
        self._parameters = parameters
        self._tape = ir.tape.Tape()
        self._initializers: dict[str, ir.Value] = {}
        self._inputs: list[ir.Value] = []
        self._scope: list[str] = []
        self._names: Counter[str] = Counter()

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put ``name`` before the names of the nodes and the parameters made inside the block."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; a string is a dynamic dimension."""
        value = ir.val(name, dtype, shape)
        self._inputs.append(value)
        return value

    def op(self, op_type: str, *inputs: ir.Value | None, attributes: Mapping[str, Attribute] | None = None) -> ir.Value:
        """Append a node with one output and return that output."""
        path = "/".join(("", *self._scope, op_type))
        repeat = self._names[path]
        self._names[path] += 1
        name = f"{path}_{repeat}" if repeat else path
        output = self._tape.op(op_type, inputs, attributes, name=name)
        output.name = f"{name}_output_0"
        return output

    def parameter(self, name: str, *, transpose: bool = False) -> ir.Value:
        """Return the initializer of a parameter of the current scope, as ``[in, out]`` when ``transpose`` is set."""
        key = ".".join((*self._scope, name))
        array = self._parameters[key]
        return self.constant(key, np.ascontiguousarray(array.T) if transpose else array)

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """Return the initializer called ``name``, made on first use and shared from then on."""
        if name not in self._initializers:
            self._initializers[name] = self._tape.initializer(ir.tensor(array, name=name))
        return self._initializers[name]

    def scalar(self, value: float) -> ir.Value:
        """Return a float32 scalar initializer."""
        return self.constant(f"float_{value:.9g}", np.array(value, dtype=np.float32))

    def integer(self, value: int) -> ir.Value:
        """Return an int64 scalar initializer."""
        return self.constant(f"int64_{value}", np.array(value, dtype=np.int64))

    def integers(self, *values: int) -> ir.Value:
        """Return an int64 vector initializer (a shape, axes, slice bounds)."""
        return self.constant(f"int64s_{'_'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def linear(self, x: ir.Value, *, bias: bool = True) -> ir.Value:
        """Write a torch Linear over the last axis of ``x``: MatMul with the weight ``[in, out]``, then Add."""
        product = self.op("MatMul", x, self.parameter("weight", transpose=True))
        return self.op("Add", product, self.parameter("bias")) if bias else product

    def normed_conv(
        self, x: ir.Value, *, kernel: int, stride: int = 1, groups: int = 1, epsilon: float = 1e-5
    ) -> ir.Value:
        """Write Conv (scope ``conv``, no bias, padded to keep the size) and BatchNormalization (scope ``norm``)."""
        with self.scope("conv"):
            attributes: dict[str, Attribute] = {
                "dilations": [1, 1],
                "group": groups,
                "kernel_shape": [kernel, kernel],
                "pads": [kernel // 2] * 4,
                "strides": [stride, stride],
            }
            x = self.op("Conv", x, self.parameter("weight"), attributes=attributes)
        with self.scope("norm"):
            statistics = [self.parameter(part) for part in ("weight", "bias", "running_mean", "running_var")]
            return self.op("BatchNormalization", x, *statistics, attributes={"epsilon": epsilon})

    def model(self, output: ir.Value, name: str, shape: Sequence[int | str]) -> ir.Model:
        """Return the model whose only output is the float32 ``output``, renamed to ``name``."""
        output.name = name
        output.dtype = ir.DataType.FLOAT
        output.shape = ir.Shape(shape)
        graph = ir.Graph(
            self._inputs,
            [output],
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET},
            name=self._name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="qgraph.models")
