"""Running integer graphs in numpy by the definitions of their operators: slow, obvious, and the oracle for all else.

Knows the integer operators of ONNX, the integer functions (`qgraph.numerics.requantize`, `.integer_math`) by their
definitions and not by their bodies, other model-local functions by their bodies, If, and the QuantizeLinear and
DequantizeLinear at the ends. Integers that would leave their type are an error, not a number.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_functions import DOMAIN
from qgraph.analysis.shapes import attribute_values
from qgraph.errors import UserError, nearest
from qgraph.numerics.operators import NotFoldedError, Operator
from qgraph.runtime.reference_arithmetic import ARITHMETIC, FUNCTIONS
from qgraph.runtime.reference_layers import LAYERS
from qgraph.runtime.reference_moves import MOVES

__all__ = ["ReferenceSession"]

_OPERATORS: Mapping[tuple[str, str], Operator] = {
    **{("", name): operator for table in (ARITHMETIC, LAYERS, MOVES) for name, operator in table.items()},
    **{(DOMAIN, name): operator for name, operator in FUNCTIONS.items()},
}
_TAKES_FLOAT = ("DequantizeLinear", "QuantizeLinear", "Resize")
_FAULTS = (ArithmeticError, LookupError, TypeError, ValueError)
"""What an operator raises on what it cannot compute."""

_Arrays = dict[ir.Value, np.ndarray]


class ReferenceSession:
    """An integer graph, ready to run.

    Args:
        model: a model, which is read and not changed, or the path of one.
    """

    def __init__(self, model: ir.Model | str | os.PathLike[str]) -> None:
        self._model = model if isinstance(model, ir.Model) else qgraph.ir.load(model)
        self._constants: _Arrays = {}
        for graph in qgraph.ir.all_graphs(self._model):
            for value in graph.initializers.values():
                if value.const_value is not None:
                    self._constants[value] = np.asarray(value.const_value.numpy())

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return outputs of the model: those named, or all in order for None.

        Args:
            output_names: of the graph's outputs.
            feeds: an array for every input of the graph that has no default.

        Raises:
            UserError: a feed or an output does not fit the model, a node is of an operator that is not known here or
                of float, or an integer leaves its type.
        """
        outputs = {value.name or "": value for value in self._model.graph.outputs}
        for name in output_names or ():
            if name not in outputs:
                raise UserError(f"the model has no output '{name}'.{nearest(name, outputs)}")
        arrays = self._execute(feeds)
        return [arrays[outputs[name]] for name in (outputs if output_names is None else output_names)]

    def trace(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every input and every value that a node gave, by name; those of the branches taken included.

        Raises:
            UserError: as for `run`.
        """
        arrays = self._execute(feeds)
        return {value.name or "": array for value, array in arrays.items() if value not in self._constants}

    def _execute(self, feeds: Mapping[str, np.ndarray]) -> _Arrays:
        arrays = {**self._constants, **self._fed(feeds)}
        self._nodes(self._model.graph, arrays)
        return arrays

    def _fed(self, feeds: Mapping[str, np.ndarray]) -> _Arrays:
        inputs = {value.name or "": value for value in self._model.graph.inputs}
        for name in feeds:
            if name not in inputs:
                raise UserError(f"the model has no input '{name}'.{nearest(name, inputs)}")
        for name, value in inputs.items():
            if name not in feeds and value not in self._constants:
                raise UserError(f"there is no array for input '{name}'")
        return {inputs[name]: _fitted(inputs[name], np.asarray(array)) for name, array in feeds.items()}

    def _nodes(self, nodes: Iterable[ir.Node], arrays: _Arrays) -> None:
        for node in nodes:
            try:
                results = self._node(node, arrays)
            except _FAULTS as error:
                raise UserError(f"{node.op_type} '{qgraph.ir.node_label(node)}' cannot be computed: {error}") from error
            arrays.update(zip(node.outputs, results, strict=False))

    def _node(self, node: ir.Node, arrays: _Arrays) -> Sequence[np.ndarray]:
        if qgraph.ir.is_op(node, "If"):
            return self._branch(node, arrays)
        constant = qgraph.ir.constant(node.outputs[0])
        if constant is not None:
            return [constant]
        inputs = [None if value is None else arrays[value] for value in node.inputs]
        domain = "" if node.domain == "ai.onnx" else node.domain
        operator = _OPERATORS.get((domain, node.op_type))
        if operator is None:
            return self._call(node, inputs)
        if node.op_type not in _TAKES_FLOAT and any(one is not None and one.dtype.kind == "f" for one in inputs):
            raise NotFoldedError("it is of float, and the reference runs integers")
        result = operator(attribute_values(node), inputs)
        return result if isinstance(result, tuple) else [result]

    def _branch(self, node: ir.Node, arrays: _Arrays) -> Sequence[np.ndarray]:
        condition = node.inputs[0]
        if condition is None:
            raise NotFoldedError("it has no condition")
        taken = "then_branch" if arrays[condition].item() else "else_branch"
        graph = node.attributes[taken].as_graph()
        self._nodes(graph, arrays)
        return [arrays[value] for value in graph.outputs]

    def _call(self, node: ir.Node, inputs: Sequence[np.ndarray | None]) -> Sequence[np.ndarray]:
        function = self._model.functions.get((node.domain, node.op_type, node.overload))
        if function is None:
            raise NotFoldedError("the reference knows no such operator")
        given = zip(function.inputs, inputs, strict=False)
        inner: _Arrays = {value: array for value, array in given if array is not None}
        self._nodes(function, inner)
        return [inner[value] for value in function.outputs]


def _fitted(value: ir.Value, array: np.ndarray) -> np.ndarray:
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        raise UserError(f"input '{value.name}' is of {value.dtype.numpy()}, and its array of {array.dtype}")
    if value.shape is not None:
        fits = len(value.shape) == array.ndim and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(value.shape, array.shape, strict=True)
        )
        if not fits:
            raise UserError(
                f"input '{value.name}' has shape {value.shape}, which its array's {array.shape} does not fit"
            )
    return array
