"""A float model as a module of TVM's graph language Relax, by TVM's own importer, with its weights kept out of it.

    model(x), initializers W, s    =>    main(x, W), s a constant    and the parameters [W], still lazy

What is large and read as data becomes an argument behind the model's own inputs: importing holds no weights in memory,
and the library none. What an operator wants to know when it is compiled (shapes, axes, bounds) stays a constant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

import qgraph.ir
from qgraph.codegen.tvm_lowering import require_tvm
from qgraph.pipeline import Skipped

__all__ = ["Imported", "Parameter", "advice", "imported", "refused"]

_LEAST_BYTES = 256
"""Smaller ones are constants of the library."""
_DATA_INPUTS = {
    **dict.fromkeys(("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "MatMul", "BitwiseAnd"), (0, 1)),
    **dict.fromkeys(("Cast", "Gather", "GatherElements", "Reshape", "Squeeze", "Transpose", "Unsqueeze"), (0,)),
    **dict.fromkeys(("Conv", "ConvTranspose", "LayerNormalization"), (1, 2)),
    **dict.fromkeys(("BitShift", "Concat", "Identity", "Sqrt"), (0,)),
    "DequantizeLinear": (0, 1, 2),
    "Gemm": (0, 1, 2),
    "PRelu": (1,),
    "Where": (1, 2),
}
"""The inputs, by operator, for which any tensor will do: those that the importer need not look into."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A weight that is an argument of the compiled function.

    Attributes:
        name: of the initializer.
        tensor: its values, read when they are written.
    """

    name: str
    tensor: ir.TensorProtocol

    @property
    def dtype(self) -> str:
        """Its type, TVM's name."""
        return str(self.tensor.dtype.numpy())

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape.numpy())


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model as TVM has it.

    Attributes:
        module: a `tvm.IRModule`; its function `main` takes the model's inputs, in order, then the parameters.
        parameters: the weights.
    """

    module: Any
    parameters: tuple[Parameter, ...]


class _ImportError(Exception):
    """TVM's importer does not take the model."""


def imported(model: ir.Model) -> Imported:
    """Import a lowered model.

    Args:
        model: of operators of the default domain; is not changed.

    Raises:
        UserError: TVM is not installed.
        ValueError: the importer refuses the model; `refused` says what of it.
    """
    require_tvm()
    clone, parameters = _without_weights(model)
    try:
        module = _converted(clone)
    except _ImportError as error:
        raise ValueError(str(error)) from error
    module["main"] = module["main"].with_attr("num_input", len(model.graph.inputs))
    return Imported(module, parameters)


def refused(model: ir.Model) -> list[Skipped]:
    """Return the node that TVM's importer stops at, with its reason; empty where it takes the model.

    Raises:
        UserError: TVM is not installed.
    """
    require_tvm()
    clone, _ = _without_weights(model)
    reason = _stops(clone)
    if reason is None:
        return []
    nodes = list(clone.graph)
    least, most = 0, len(nodes)  # the first `least` nodes import, the first `most` do not
    while most - least > 1:
        middle = (least + most) // 2
        found = _stops(_head(clone, nodes[:middle]))
        least, most, reason = (middle, most, reason) if found is None else (least, middle, found)
    return [Skipped(qgraph.ir.node_label(nodes[most - 1]), f"{nodes[most - 1].op_type}: {reason}{advice(model)}")]


def advice(model: ir.Model) -> str:
    """Say how to fix the sizes, if any is open: most of what the importer refuses is about shapes.

    Returns:
        A sentence to put behind a reason, or ''.
    """
    for value in model.graph.inputs:
        if value.shape is not None and not value.shape.is_static():
            example = ",".join(str(size) if isinstance(size, int) else "1" for size in value.shape)
            return f". Sizes of its inputs are open: fix them, for instance with --shape {value.name}={example}"
    return ""


def _stops(model: ir.Model) -> str | None:
    try:
        _converted(model)
    except _ImportError as error:
        return str(error)
    return None


def _head(model: ir.Model, nodes: Sequence[ir.Node]) -> ir.Model:
    """Return the model of the first nodes; the outputs of the last are its own."""
    head = model.clone()
    kept = list(head.graph)[: len(nodes)]
    dropped = list(head.graph)[len(nodes) :]
    head.graph.outputs.clear()
    head.graph.outputs.extend(value for value in kept[-1].outputs if value.name)
    for node in reversed(dropped):
        qgraph.ir.discard(node)
    return head


def _converted(model: ir.Model) -> Any:
    from tvm.relax.frontend.onnx import from_onnx

    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names that are no identifiers: inputs are told apart by their order
            return from_onnx(ir.to_proto(model), keep_params_in_input=False)
    except Exception as error:
        raise _ImportError(_reason(error)) from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"TVM's importer says: {lines[-1][:200] if lines else type(error).__name__}"


def _without_weights(model: ir.Model) -> tuple[ir.Model, tuple[Parameter, ...]]:
    """Return a copy whose weights are inputs, and the weights in their order."""
    clone = model.clone()
    parameters = []
    for value in list(_weights(clone.graph)):
        tensor = value.const_value
        if tensor is None or value.name is None:
            raise ValueError("an initializer has no data")
        parameters.append(Parameter(value.name, tensor))
        clone.graph.initializers.pop(value.name)
        value.const_value = None
        value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
        clone.graph.inputs.append(value)
    return clone, tuple(parameters)


def _weights(graph: ir.Graph) -> Iterator[ir.Value]:
    own = {value.name for value in graph.inputs}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.name in own or value.is_graph_output():
            continue
        uses = value.uses()
        if tensor.nbytes >= _LEAST_BYTES and uses and all(_is_data(node, index, graph) for node, index in uses):
            yield value


def _is_data(node: ir.Node, index: int, graph: ir.Graph) -> bool:
    return node.graph is graph and index in _DATA_INPUTS.get(node.op_type, ())
