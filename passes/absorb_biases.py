"""Biases that somebody else adds as well, absorbed there: an operator less for each, over all of the activations.

    x = LayerNormalization(s, g, b)                     =>    x = LayerNormalization(s, g, b + c)
    z = x + (MatMul(h, V) + c)                          =>    z = x + MatMul(h, V)
    y = MatMul(x, W) + d      for each further reader   =>    y = MatMul(x, W) + (d - c W)

    Attention(q, k + c, v)                              =>    Attention(q, k, v)

The first is how a network that normalizes after its sums (BERT) adds a block's bias to the residual: the normalization
before it adds one anyway, and what else reads that only multiplies and adds. In the second, c adds q c to a query's
scores of all keys alike, which Softmax does not see. The sums are the same but for the order of rounding; constants are
computed in float64. Values that differ now get new names, so that nobody compares them with what they were.

It does not fire where a normalized value is a graph output or read by anything but one residual sum and products with
constant matrices, or where that sum adds such a product to it; where c is so large that rounding would show in those
products; where keys are rotated, kept in a cache, capped or put out; for other types than float32. Related: Nagel et
al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.1.3, absorbs biases in
the layer behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.passes._rules import matrix_dims
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["AbsorbBiases"]

_LARGEST = 4.0
"""How many times as long as a normalized vector a bias may be: beyond, rounding it would show."""
_TOO_LARGE = "the bias of its residual sum is many times as large as what it normalizes to: rounding would show"


@dataclass(frozen=True)
class _Sum:
    """A constant added to the elements of the last axis: `node` = `rest` + `constant`."""

    node: ir.Node
    rest: ir.Value
    constant: np.ndarray


@dataclass(frozen=True)
class _Product:
    """What multiplies a normalized value by a matrix, and the bias behind it; none where a shift goes unnoticed."""

    node: ir.Node
    bias: _Sum | None


@dataclass(frozen=True)
class AbsorbBiases(Pass):
    """Absorb biases of residual sums in the normalization before them, and drop those of attention's keys."""

    name: ClassVar[str] = "absorb-biases"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Absorb; `skipped` has the normalizations whose residual sum has too large a bias."""
        shapes = context.analyse(shapes_of, model)
        keys = sum([_drop_key_bias(node, shapes) for node in qgraph.ir.walk(model)])
        absorbed, skipped = 0, []
        for norm in [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "LayerNormalization")]:
            found = _readers(norm, shapes)
            if found is None:
                continue
            if _is_too_large(norm, found[0].constant):
                skipped.append(Skipped(qgraph.ir.node_label(norm), _TOO_LARGE))
                continue
            _absorb(model, norm, *found)
            absorbed += 1
        notes = [f"{absorbed} biases of residual sums absorbed in normalizations"] if absorbed else []
        notes += [f"{keys} biases of keys dropped"] if keys else []
        return Report(absorbed + keys, skipped, notes)


def _drop_key_bias(node: ir.Node, shapes: Shapes) -> bool:
    """Let an Attention read keys without their bias, if that is all it would notice of it."""
    key = _plain_key(node)
    bias = None if key is None else _sum(key.producer(), shapes)
    if bias is None or qgraph.ir.only_consumer(bias.node.outputs[0]) is not node:
        return False
    node.replace_input_with(1, bias.rest)
    qgraph.ir.discard(bias.node)
    return True


def _plain_key(node: ir.Node) -> ir.Value | None:
    """Return the keys of an Attention that takes them as they come and puts out nothing but its result."""
    if not qgraph.ir.is_op(node, "Attention") or len(node.inputs) < 3 or any(node.inputs[4:6]):
        return None
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None
    return None if node.attributes.get_float("softcap", 0.0) else node.inputs[1]


def _readers(norm: ir.Node, shapes: Shapes) -> tuple[_Sum, ir.Node, list[_Product]] | None:
    """Return the bias in the one residual sum that reads a normalized value, that sum, and the products that do."""
    value = norm.outputs[0]
    if any(output.uses() or output.is_graph_output() for output in norm.outputs[1:]) or value.is_graph_output():
        return None
    if norm.attributes.get_int("axis", -1) != -1 or any(one and _vector(one) is None for one in norm.inputs[1:]):
        return None
    residual: tuple[_Sum, ir.Node] | None = None
    products: list[_Product] = []
    for use in sorted(value.uses(), key=lambda one: (one.node.name or "", one.idx)):
        if qgraph.ir.is_op(use.node, "Shape"):
            continue
        product = _product(use.node, use.idx, shapes)
        if product is not None:
            products.append(product)
        elif residual is None and (bias := _residual_bias(use.node, value, shapes)) is not None:
            residual = bias, use.node
        else:
            return None
    if residual is None or any(one.bias is not None and one.bias.node is residual[0].node for one in products):
        return None
    return (*residual, products)


def _residual_bias(add: ir.Node, value: ir.Value, shapes: Shapes) -> _Sum | None:
    """Return the inner sum of value + (product + bias), if nobody else reads it and the product is as large as it."""
    if not qgraph.ir.is_op(add, "Add") or add.inputs[0] is add.inputs[1]:
        return None
    inner = add.inputs[1] if add.inputs[0] is value else add.inputs[0]
    bias = _sum(inner.producer() if inner is not None else None, shapes)
    if bias is None or qgraph.ir.only_consumer(bias.node.outputs[0]) is not add or bias.node.graph is not add.graph:
        return None
    dims = shapes.dims(value)
    return bias if dims is not None and dims == shapes.dims(bias.rest) and bias.constant.size == dims[-1] else None


def _product(node: ir.Node, index: int, shapes: Shapes) -> _Product | None:
    """Return a node as a product of its first input and a constant matrix whose result can take a shift back."""
    dims = matrix_dims(node.inputs[1]) if qgraph.ir.is_op(node, "MatMul") and index == 0 else None
    reader = qgraph.ir.only_consumer(node.outputs[0])
    if dims is None or reader is None:
        return None
    if _plain_key(reader) is node.outputs[0] and list(reader.inputs).count(node.outputs[0]) == 1:
        return _Product(node, None)
    bias = _sum(reader, shapes)
    return None if bias is None or bias.constant.size != dims[1] else _Product(node, bias)


def _sum(node: ir.Node | None, shapes: Shapes) -> _Sum | None:
    """Return an Add or Sum of two as a sum with a constant vector over the last axis, or None."""
    if node is None or not qgraph.ir.is_op(node, "Add", "Sum") or len(node.inputs) != 2:
        return None
    if shapes.dtype(node.outputs[0]) != ir.DataType.FLOAT:
        return None
    for rest, constant in (node.inputs, node.inputs[::-1]):
        vector = _vector(constant)
        dims = shapes.dims(rest) if rest is not None else None
        if vector is not None and rest is not None and dims is not None and dims[-1:] == (vector.size,):
            return _Sum(node, rest, vector)
    return None


def _vector(value: ir.Value | None) -> np.ndarray | None:
    array = qgraph.ir.constant(value)
    return array if array is not None and array.ndim == 1 and array.dtype == np.float32 else None


def _is_too_large(norm: ir.Node, bias: np.ndarray) -> bool:
    """Tell whether a bias is much longer than the vectors that a normalization puts out."""
    parts = [_vector(value) for value in norm.inputs[1:]]
    length = np.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in parts if part is not None))
    return bool(np.linalg.norm(bias.astype(np.float64)) > _LARGEST * length)


def _absorb(model: ir.Model, norm: ir.Node, bias: _Sum, residual: ir.Node, products: list[_Product]) -> None:
    graph, shift = model.graph, bias.constant.astype(np.float64)
    norm.resize_inputs(3)
    before = _vector(norm.inputs[2])
    name = f"{norm.outputs[0].name}_bias" if norm.inputs[2] is None else f"{norm.inputs[2].name}_shifted"
    _replace_constant(graph, norm, 2, name, shift if before is None else before + shift)
    _rename(graph, norm.outputs[0])
    for product in products:
        _rename(graph, product.node.outputs[0])
        if product.bias is not None:
            add = product.bias.node
            index = 1 if add.inputs[0] is product.node.outputs[0] else 0
            old, weight = add.inputs[index], qgraph.ir.constant(product.node.inputs[1])
            assert old is not None
            assert weight is not None
            restored = product.bias.constant - shift @ weight.astype(np.float64)
            _replace_constant(graph, add, index, f"{old.name}_shifted", restored)
    residual.replace_input_with(list(residual.inputs).index(bias.node.outputs[0]), bias.rest)
    qgraph.ir.discard(bias.node)


def _replace_constant(graph: ir.Graph, node: ir.Node, index: int, name: str, array: np.ndarray) -> None:
    node.replace_input_with(index, qgraph.ir.initializer(graph, name, array.astype(np.float32)))


def _rename(graph: ir.Graph, value: ir.Value) -> None:
    value.name = qgraph.ir.fresh_name(graph, f"{value.name}_shifted")
    value.metadata_props.clear()
