"""Which nodes can be stored in 8 bits and run with activations quantized at run time, and what they consist of.

y = MatMul(x, W);  z = Add(y, b)    =>    Layer(node=MatMul, weights=(1,), last=Add, bias=b)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Skipped

__all__ = ["BLOCKS", "Layer", "UnfitError", "dims_of", "is_candidate", "layer_of", "subtracted", "without_shared"]

BLOCKS = (128, 64, 32, 16)
"""Elements of an embedding's row that share a scale: the largest that divides the row."""
_NO_KERNEL = {
    "Conv": "convolutions have no integer kernel for activations quantized at run time; 'qdq' quantizes them",
    "ConvTranspose": "convolutions have no integer kernel for activations quantized at run time; 'qdq' quantizes them",
    "GRU": "there is no integer kernel for GRU",
    "RNN": "there is no integer kernel for RNN",
    "Attention": "its products are of activations with activations",
}


class UnfitError(Exception):
    """The reason why a node stays in float."""


@dataclass(frozen=True)
class Layer:
    """A node to rewrite.

    Attributes:
        node: the node.
        weights: which of its inputs are stored in 8 bits.
        last: the node whose output the new one takes over: `node`, or the Add of a bias behind it.
        bias: what that Add adds, or a Gemm's bias.
        bias_factor: what the bias is to be multiplied by.
        transposed: the weight is laid out [out, in].
        factor: what the weight is to be multiplied by.
        residual: the Add behind `last` that becomes a Sub; weight and bias are negated.
    """

    node: ir.Node
    weights: tuple[int, ...]
    last: ir.Node
    bias: ir.Value | None = None
    bias_factor: float = 1.0
    transposed: bool = False
    factor: float = 1.0
    residual: ir.Node | None = None


def is_candidate(node: ir.Node) -> bool:
    """Tell whether a node holds weights that might be stored in 8 bits, or multiplies without a kernel for it."""
    if node.domain not in ("", "ai.onnx"):
        return False
    return node.op_type in _NO_KERNEL or (
        node.op_type in _FINDERS and (node.op_type != "Gather" or _is_embedding(node))
    )


def layer_of(node: ir.Node, min_elements: int) -> Layer:
    """Return what is to be quantized of a candidate.

    Raises:
        UnfitError: it stays in float; the text says why.
    """
    if node.op_type in _NO_KERNEL:
        raise UnfitError(_NO_KERNEL[node.op_type])
    layer = _FINDERS[node.op_type](node)
    for index in layer.weights:
        weight = node.inputs[index]
        assert weight is not None
        _require_weight(weight, min_elements)
    return layer


def _matmul(node: ir.Node) -> Layer:
    left, right = node.inputs
    if right is None or not _is_constant(right):
        constant = left is not None and _is_constant(left)
        raise UnfitError("its constant is the left factor" if constant else "it multiplies activations")
    _require_matrix(right)
    _require_rows(left)
    add = qgraph.ir.only_consumer(node.outputs[0])
    if add is not None and qgraph.ir.is_op(add, "Add") and add.graph is node.graph:
        other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
        if _is_bias(other, dims_of(right)[1]):
            return Layer(node, (1,), add, other)
    return Layer(node, (1,), node)


def _gemm(node: ir.Node) -> Layer:
    weight = node.inputs[1]
    if weight is None or not _is_constant(weight):
        raise UnfitError("it multiplies activations")
    _require_matrix(weight)
    if node.attributes.get_int("transA", 0):
        raise UnfitError("its input is transposed")
    transposed = bool(node.attributes.get_int("transB", 0))
    columns = dims_of(weight)[0 if transposed else 1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not _is_bias(bias, columns):
        raise UnfitError("its bias is not a constant for each output column")
    alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    return Layer(node, (1,), node, bias, beta, transposed, alpha)


def _lstm(node: ir.Node) -> Layer:
    if any(value is None or not _is_constant(value) for value in node.inputs[1:3]):
        raise UnfitError("its weights are computed")
    if node.attributes.get_int("layout", 0):
        raise UnfitError("its batch comes first, which the integer kernel cannot do")
    return Layer(node, (1, 2), node, transposed=True)


def _gather(node: ir.Node) -> Layer:
    table = node.inputs[0]
    assert table is not None
    if not any(dims_of(table)[1] % block == 0 for block in BLOCKS):
        raise UnfitError(f"the {dims_of(table)[1]} columns of its table are not a multiple of {BLOCKS[-1]}")
    return Layer(node, (0,), node)


def _is_embedding(node: ir.Node) -> bool:
    """Tell whether a Gather looks up rows of a float matrix."""
    table = node.inputs[0]
    if table is None or not _is_constant(table) or table.dtype not in _FLOATS:
        return False
    return len(dims_of(table)) == 2 and node.attributes.get_int("axis", 0) in (0, -2)


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_FINDERS: dict[str, Callable[[ir.Node], Layer]] = {"MatMul": _matmul, "Gemm": _gemm, "LSTM": _lstm, "Gather": _gather}


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def dims_of(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def _require_matrix(weight: ir.Value) -> None:
    if len(dims_of(weight)) != 2:
        raise UnfitError(f"its weight has {len(dims_of(weight))} dimensions, not 2")


def _require_rows(value: ir.Value | None) -> None:
    if value is not None and value.shape is not None and len(value.shape) < 2:
        raise UnfitError("its input is a vector")


def _require_weight(weight: ir.Value, min_elements: int) -> None:
    tensor = weight.const_value
    assert tensor is not None
    if tensor.dtype != ir.DataType.FLOAT:
        raise UnfitError(f"its weight is {tensor.dtype.name.lower()}, not float32")
    if tensor.size < max(min_elements, 1):
        raise UnfitError(f"its weight has {tensor.size} elements: too few to gain anything")
    if weight.is_graph_output():
        raise UnfitError("its weight is an output of the model")


def _is_bias(value: ir.Value | None, columns: int) -> bool:
    """Tell whether a constant adds one number to each of `columns` and leaves the rank of a matrix alone."""
    if value is None or not _is_constant(value) or value.dtype != ir.DataType.FLOAT:
        return False
    dims = dims_of(value)
    return len(dims) <= 2 and all(dim == 1 for dim in dims[:-1]) and (not dims or dims[-1] in (1, columns))


def without_shared(layers: Sequence[Layer]) -> tuple[list[Layer], list[Skipped]]:
    """Leave out layers whose weight also serves a node that stays in float: storing it twice gains nothing."""
    kept, skipped = list(layers), list[Skipped]()
    while True:
        nodes = {layer.node for layer in kept}
        shared = {layer.node: reader for layer in kept if (reader := _float_reader(layer, nodes)) is not None}
        if not shared:
            return kept, skipped
        for node, reader in shared.items():
            reason = f"its weight is read by '{qgraph.ir.node_label(reader)}' too, which stays in float"
            skipped.append(Skipped(qgraph.ir.node_label(node), reason))
        kept = [layer for layer in kept if layer.node not in shared]


def subtracted(layers: Sequence[Layer]) -> list[Layer]:
    """Negate the layers that go into an Add which a LayerNormalization reads, one of each Add."""
    claimed: set[ir.Node] = set()
    result = []
    for layer in layers:
        residual = _residual(layer)
        if residual is not None and residual not in claimed:
            claimed.add(residual)
            result.append(replace(layer, factor=-layer.factor, bias_factor=-layer.bias_factor, residual=residual))
        else:
            result.append(layer)
    return result


def _residual(layer: Layer) -> ir.Node | None:
    if layer.node.op_type not in ("MatMul", "Gemm"):
        return None
    add = qgraph.ir.only_consumer(layer.last.outputs[0])
    if add is None or not qgraph.ir.is_op(add, "Add") or add.graph is not layer.node.graph:
        return None
    return add if any(qgraph.ir.is_op(use.node, "LayerNormalization") for use in add.outputs[0].uses()) else None


def _float_reader(layer: Layer, quantized: set[ir.Node]) -> ir.Node | None:
    weights = [layer.node.inputs[index] for index in layer.weights]
    readers = (use.node for weight in weights if weight is not None for use in weight.uses())
    return next((reader for reader in readers if reader not in quantized), None)
