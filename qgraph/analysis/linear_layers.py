"""Which nodes of a graph multiply by a constant matrix, or look rows up in one, and what they consist of.

    y = MatMul(x, W)               W [K, N]
    y = MatMul(x, Transpose(W))    W [N, K]
    y = Gemm(x, W, b)              W [K, N], or [N, K] with transB
    y = Gather(W, ids)             W [N, K]: an embedding table, whose rows are read as they are

Found from the graph alone: no name means anything. A weight with several readers (an embedding table that is also the
output layer, say) is one weight with several layers; it stays one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.errors import UserError
from qgraph.pipeline import Context, Skipped

__all__ = ["LinearLayer", "LinearLayers", "UnfitError", "collect", "linear_layers", "matches"]

Layer = TypeVar("Layer", bound="LinearLayer")

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_RECURRENT = ("LSTM", "GRU", "RNN")
_RELAYING = ("Cast", "Concat", "Expand", "Identity", "Neg", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that hand numbers on as they are, up to their place and sign."""


_LONGEST_CHAIN = 8
"""Nodes between an initializer and the weight that they compute from it; exporters write two or three."""


class UnfitError(Exception):
    """The reason why a node is no linear layer."""


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A product of activations with a constant matrix, or a look-up in one.

    Attributes:
        node: MatMul, Gemm or Gather.
        weight: the initializer, float32, float16 or bfloat16; a Transpose may stand between it and the node.
        x: the activation [..., K]; the ids for an embedding.
        kind: "embedding" for a Gather, whose rows reach the graph without a product; "convolution" for those of
            `qgraph.analysis.convolutions`, which are found apart.
        transposed: the weight is laid out [N, K], else [K, N].
        bias: the constant that a Gemm, or the only Add behind a MatMul, adds to each row.
        name: of the node, as it is shown.
        inputs: K, the length of the inner product (of a row, for an embedding).
        outputs: N.
    """

    node: ir.Node
    weight: ir.Value
    x: ir.Value
    kind: Literal["linear", "embedding", "convolution"]
    transposed: bool
    bias: ir.Value | None
    name: str
    inputs: int
    outputs: int

    @property
    def groups(self) -> int:
        """The number of parts that the outputs are cut into, each with inputs of its own: 1 for a product."""
        return 1

    def matrix(self) -> np.ndarray:
        """Read the weight now: float32 [N, K], contiguous.

        A Gemm's alpha and beta are no part of it: they apply to whatever stands in the weight's place.
        """
        tensor = self.weight.const_value
        assert tensor is not None
        array = tensor.numpy()
        return np.ascontiguousarray(array if self.transposed else array.T, dtype=np.float32)

    def require_finite(self) -> None:
        """Check the weight.

        Raises:
            UserError: it holds NaN or infinity.
        """
        if not np.isfinite(self.matrix()).all():
            raise UserError(f"the weight '{self.weight.name}' of '{self.name}' holds NaN or infinity: mend the model")

    def stored(self, matrix: np.ndarray) -> np.ndarray:
        """Return a matrix [N, K] in the layout of the weight, contiguous."""
        return np.ascontiguousarray(matrix if self.transposed else matrix.T)


@dataclass(frozen=True, eq=False)
class LinearLayers:
    """What `linear_layers` found.

    Attributes:
        layers: in topological order.
        skipped: nodes with weights, or that multiply, which are none, each with its reason.
        by_weight: the layers that read each weight, in the order in which the weights come first.
    """

    layers: Sequence[LinearLayer]
    skipped: Sequence[Skipped]
    by_weight: Mapping[ir.Value, Sequence[LinearLayer]]


def linear_layers(model: ir.Model, context: Context | None = None) -> LinearLayers:
    """Find the linear layers of the main graph.

    Left alone, each with its reason: weights that are computed, are also inputs or outputs of the model, have not two
    dimensions, are no float16, bfloat16 or float32, or that a node reads which is no linear layer; products of
    activations; constants on the left; convolutions and recurrent layers; nodes inside subgraphs; tables of factors,
    such as those of a rotary embedding.

    Args:
        model: is not changed.
        context: not used; `Context.analyse` passes it.
    """
    del context
    return collect(model, _is_candidate, _layer, _without_foreign_readers)


def collect(
    model: ir.Model,
    is_candidate: Callable[[ir.Node], bool],
    layer_of: Callable[[ir.Node, str], Layer],
    without_foreign_readers: Callable[[Sequence[Layer]], tuple[list[Layer], list[Skipped]]],
) -> LinearLayers:
    """Find the layers of one kind in the main graph.

    Args:
        model: is not changed.
        is_candidate: tells which nodes might be one.
        layer_of: makes a layer of a node and its label, or raises `UnfitError` with the reason why not.
        without_foreign_readers: leaves out those whose weight others read too.
    """
    found: list[Layer] = []
    skipped: list[Skipped] = []
    for node in qgraph.ir.walk(model):
        if not is_candidate(node):
            continue
        label = qgraph.ir.node_label(node)
        try:
            if node.graph is not model.graph:
                raise UnfitError("it lies inside a subgraph")
            found.append(layer_of(node, label))
        except UnfitError as reason:
            skipped.append(Skipped(label, str(reason)))
    kept, shared = without_foreign_readers(found)
    by_weight: dict[ir.Value, list[LinearLayer]] = {}
    for layer in kept:
        by_weight.setdefault(layer.weight, []).append(layer)
    return LinearLayers(tuple(kept), tuple(skipped + shared), by_weight)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a node's name matches one of the patterns (`*`, `?`, `[...]`; upper and lower case differ)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_candidate(node: ir.Node) -> bool:
    if qgraph.ir.is_op(node, "MatMul", "Gemm", *_CONVOLUTIONS, *_RECURRENT):
        return True
    # A Gather of anything but a float matrix is arithmetic on shapes or positions.
    return qgraph.ir.is_op(node, "Gather") and _is_table(node)


def _is_table(node: ir.Node) -> bool:
    table = node.inputs[0]
    if table is None or table.const_value is None or table.dtype not in (*_FLOATS, ir.DataType.DOUBLE):
        return False
    return len(_dims(table)) == 2 and node.attributes.get_int("axis", 0) in (0, -2)


def _layer(node: ir.Node, label: str) -> LinearLayer:
    if node.op_type in _CONVOLUTIONS:
        raise UnfitError("it is a convolution: its weight is no matrix that rows of activations are multiplied with")
    if node.op_type in _RECURRENT:
        raise UnfitError(f"the weights of an {node.op_type} are read at every step")
    if node.op_type == "Gather":
        return _embedding(node, label)
    return _product(node, label)


def _product(node: ir.Node, label: str) -> LinearLayer:
    x, right = node.inputs[:2]
    if x is None or right is None:
        raise UnfitError("it has no input")
    weight, flipped = _behind_transpose(right)
    if weight.const_value is None:
        raise UnfitError(_why_computed(x, weight))
    _require_weight(weight)
    if x.const_value is not None:
        raise UnfitError("both its factors are constants")
    if x.shape is not None and len(x.shape) < 2:
        raise UnfitError("its input is a vector")
    if node.attributes.get_int("transA", 0):
        raise UnfitError("its input is transposed")
    transposed = flipped != bool(node.attributes.get_int("transB", 0))
    outputs, inputs = _dims(weight) if transposed else reversed(_dims(weight))
    bias = _gemm_bias(node) if node.op_type == "Gemm" else _added(node, outputs)
    return LinearLayer(node, weight, x, "linear", transposed, bias, label, inputs, outputs)


def _embedding(node: ir.Node, label: str) -> LinearLayer:
    table, ids = node.inputs[:2]
    assert table is not None
    assert ids is not None
    _require_weight(table)
    if ids.const_value is not None:
        raise UnfitError("the rows that it looks up are always the same")
    if _gives_factors(node):
        raise UnfitError("what it looks up is multiplied with activations: a table of factors, not an embedding")
    outputs, inputs = _dims(table)
    return LinearLayer(
        node, table, ids, "embedding", transposed=True, bias=None, name=label, inputs=inputs, outputs=outputs
    )


def _behind_transpose(value: ir.Value) -> tuple[ir.Value, bool]:
    """Return the constant behind a Transpose that swaps two dimensions, and whether there is one."""
    node = value.producer()
    if not qgraph.ir.is_op(node, "Transpose"):
        return value, False
    assert node is not None
    source = node.inputs[0]
    if source is None or source.const_value is None or len(_dims(source)) != 2:
        return value, False
    return source, list(node.attributes.get_ints("perm", (1, 0))) == [1, 0]


def _why_computed(x: ir.Value, weight: ir.Value) -> str:
    if x.const_value is not None:
        return "its constant is the left factor"
    producer = weight.producer()
    if qgraph.ir.is_op(producer, "Constant"):
        return "its weight is a Constant node: 'lift-constants' makes it an initializer"
    if qgraph.ir.is_op(producer, "Transpose") and producer is not None and producer.inputs[0] is not None:
        source = producer.inputs[0].producer()
        producer = source if qgraph.ir.is_op(source, "DequantizeLinear") else producer
    if qgraph.ir.is_op(producer, "DequantizeLinear"):
        return "its weight is compressed already"
    if producer is not None and _from_constants(producer):
        return f"its weight is computed by '{qgraph.ir.node_label(producer)}': 'fold-constants' makes it an initializer"
    return "it multiplies activations"


def _from_constants(node: ir.Node) -> bool:
    """Tell whether a node computes a constant: a few steps back, there is nothing but initializers."""
    front, depth = [node], 0
    while front and depth < _LONGEST_CHAIN:
        values = [value for one in front for value in one.inputs if value is not None and value.const_value is None]
        if any(value.producer() is None for value in values):
            return False
        front = [producer for value in values if (producer := value.producer()) is not None]
        depth += 1
    return not front


def _require_weight(weight: ir.Value) -> None:
    assert weight.const_value is not None
    if weight.is_graph_input():
        raise UnfitError("its weight is also an input of the model, which a caller may replace")
    if weight.is_graph_output():
        raise UnfitError("its weight is an output of the model")
    if len(_dims(weight)) != 2:
        raise UnfitError(f"its weight has {len(_dims(weight))} dimensions, not 2")
    if weight.const_value.dtype not in _FLOATS:
        raise UnfitError(f"its weight is {weight.const_value.dtype.name.lower()}")
    if weight.const_value.size == 0:
        raise UnfitError("its weight is empty")


def _dims(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def _gemm_bias(node: ir.Node) -> ir.Value | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias if bias is not None and bias.const_value is not None else None


def _added(node: ir.Node, columns: int) -> ir.Value | None:
    add = qgraph.ir.only_consumer(node.outputs[0])
    if add is None or not qgraph.ir.is_op(add, "Add"):
        return None
    other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    if other is None or other.const_value is None:
        return None
    dims = _dims(other)
    return other if dims[-1:] == (columns,) and all(dim == 1 for dim in dims[:-1]) else None


def _gives_factors(node: ir.Node) -> bool:
    """Tell whether the rows are, handed on unchanged, multiplied with something that does not come from them.

    A norm multiplies an embedding with its own size, and with constants.
    """
    relayed, queue = {node}, [node]
    while queue:
        for use in queue.pop().outputs[0].uses():
            reader = use.node
            if qgraph.ir.is_op(reader, *_RELAYING) and reader not in relayed:
                relayed.add(reader)
                queue.append(reader)
            elif reader.op_type == "RotaryEmbedding" or (
                qgraph.ir.is_op(reader, "Mul") and _is_foreign(reader.inputs[1 - use.idx], node)
            ):
                return True
    return False


def _is_foreign(value: ir.Value | None, source: ir.Node) -> bool:
    """Tell whether a value is computed at run time without the output of `source`."""
    if value is None or value.const_value is not None:
        return False
    seen, queue = set[ir.Node](), [value.producer()]
    computed = False
    while queue:
        node = queue.pop()
        if node is source:
            return False
        if node is None:
            computed = True
        elif node not in seen:
            seen.add(node)
            queue += [one.producer() for one in node.inputs if one is not None and one.const_value is None]
    return computed


def _without_foreign_readers(layers: Sequence[LinearLayer]) -> tuple[list[LinearLayer], list[Skipped]]:
    """Leave out layers whose weight also serves a node that is none: it would see the change."""
    nodes = {layer.node for layer in layers}
    kept, skipped = list[LinearLayer](), list[Skipped]()
    for layer in layers:
        foreign = next((reader for reader in _readers(layer.weight) if reader not in nodes), None)
        if foreign is None:
            kept.append(layer)
        else:
            reason = f"its weight is read by '{qgraph.ir.node_label(foreign)}' too, which is no linear layer"
            skipped.append(Skipped(layer.name, reason))
    return kept, skipped


def _readers(weight: ir.Value) -> Iterable[ir.Node]:
    for use in weight.uses():
        if qgraph.ir.is_op(use.node, "Transpose") and use.node.outputs[0].uses():
            if use.node.outputs[0].is_graph_output():
                yield use.node
            yield from (inner.node for inner in use.node.outputs[0].uses())
        else:
            yield use.node
