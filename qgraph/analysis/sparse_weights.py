"""Which layers were made sparse, and whether their weights still have the zeros.

A pass that sets weights to zero writes the pattern into the metadata of the nodes that read them (`SPARSE_KEY`); the
pipeline asks `ZerosStay` after every pass, so that no later pass fills zeros in without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.numerics.sparse_packing import with_zeros
from qgraph.numerics.sparsity import Pattern, follows, parse_pattern

__all__ = [
    "SPARSE_KEY",
    "SparseWeight",
    "ZerosStay",
    "mark_packed",
    "mark_sparse",
    "pattern_of",
    "sparse_weights",
    "weight_matrix",
]

SPARSE_KEY = "qgraph.sparse"
"""Metadata of a node that reads a sparse weight: "2:4", or "unstructured 0.5"."""

_PACKED_KEY = "qgraph.packed"
"""Metadata of the Gather that ends the unpacking of a weight (`qgraph.numerics.sparse_packing`)."""

_READERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight with zeros of a pattern.

    Attributes:
        node: that reads it.
        pattern: of the zeros, along the inputs of each output.
        matrix: float or integers [N, K] in which zeros are zeros; None where it is computed in a way not understood.
    """

    node: ir.Node
    pattern: Pattern
    matrix: np.ndarray | None


def mark_sparse(node: ir.Node, pattern: Pattern, zeros: float) -> None:
    """Note that the weight which `node` reads has zeros of a pattern, and a share of them."""
    share = min(max(zeros, 0.0001), 0.9999)  # a weight may be all zeros
    text = f"{pattern.kept}:{pattern.of}" if pattern.kind == "neighbours" else f"{pattern.kind} {share:.4f}"
    node.metadata_props[SPARSE_KEY] = text


def mark_packed(gather: ir.Node) -> None:
    """Note that a Gather of constant values gives a weight that is stored as a mask and what is not zero."""
    gather.metadata_props[_PACKED_KEY] = "mask"


def pattern_of(node: ir.Node) -> Pattern | None:
    """Return the pattern that is noted at a node."""
    text = node.metadata_props.get(SPARSE_KEY)
    if text is None:
        return None
    name, _, share = text.partition(" ")
    return parse_pattern(name, float(share) if share else 0.5)


def sparse_weights(model: ir.Model) -> Iterator[SparseWeight]:
    """Yield the weights that were made sparse, in the order of the nodes."""
    for node in qgraph.ir.walk(model):
        pattern = pattern_of(node) if qgraph.ir.is_op(node, *_READERS) else None
        if pattern is not None:
            yield SparseWeight(node, pattern, weight_matrix(node))


class ZerosStay:
    """A promise for `Context.promises`: weights that were made sparse keep their zeros.

    Weights that are still the same as when they were last looked at are not read again.
    """

    def __init__(self) -> None:
        self._known: dict[ir.Node, object] = {}

    def __call__(self, model: ir.Model) -> str | None:
        """Return which node's weight has lost its zeros, or None."""
        for node in qgraph.ir.walk(model):
            pattern = pattern_of(node) if qgraph.ir.is_op(node, *_READERS) else None
            standing = None if pattern is None else _standing(node)
            if pattern is None or self._known.get(node) is standing:
                continue
            matrix = weight_matrix(node)
            if matrix is not None and not follows(matrix, pattern):
                return f"the weight of '{qgraph.ir.node_label(node)}' was {pattern}, and has lost zeros"
            self._known[node] = standing
        return None


def _standing(node: ir.Node) -> object:
    """Return the tensor that holds the weight of a node."""
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    while producer is not None and producer.inputs:
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    return None if value is None else value.const_value


def weight_matrix(node: ir.Node) -> np.ndarray | None:
    """Return the weight that a node reads as a matrix [N, K], integers less their zero points.

    The inputs of a convolution come channel by channel for every element of the kernel: patterns run along channels.
    """
    value = node.inputs[1]
    array = None if value is None else _array(value)
    if array is None:
        return None
    if node.op_type == "Conv":
        return np.moveaxis(array, 1, -1).reshape(len(array), -1)
    if node.op_type == "ConvTranspose":
        return np.moveaxis(array.swapaxes(0, 1), 1, -1).reshape(array.shape[1], -1)
    if array.ndim != 2:
        return None
    flipped = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0
    return array if flipped else array.T


def _array(value: ir.Value) -> np.ndarray | None:
    array = qgraph.ir.constant(value)
    if array is not None:
        return array
    node = value.producer()
    if node is None or node.inputs[0] is None:
        return None
    if _PACKED_KEY in node.metadata_props:
        return _unpacked(node)
    if qgraph.ir.is_op(node, "Cast", "Identity"):
        return _array(node.inputs[0])
    if qgraph.ir.is_op(node, "Transpose"):
        inner = _array(node.inputs[0])
        return None if inner is None else inner.transpose(node.attributes.get_ints("perm", ()) or None)
    if not qgraph.ir.is_op(node, "DequantizeLinear"):
        return None
    codes = _array(node.inputs[0])
    offset = _array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros((), np.int8)
    if codes is None or offset is None:
        return None
    return np.asarray(codes.astype(np.int32) - _spread(offset.astype(np.int32), codes.shape, node))


def _unpacked(gather: ir.Node) -> np.ndarray | None:
    """Return the weight that a marked Gather gives; None where what stands before it is not as it was written."""
    values, place = qgraph.ir.constant(gather.inputs[0]), gather.inputs[1]
    reshape = None if place is None else place.producer()
    if values is None or not qgraph.ir.is_op(reshape, "Reshape"):
        return None
    assert reshape is not None
    shape, value = qgraph.ir.constant(reshape.inputs[1]), reshape.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        value = producer.inputs[0] if producer.inputs else None
    mask = qgraph.ir.constant(value)
    if shape is None or mask is None:
        return None
    return with_zeros(mask, values, tuple(shape.tolist()))


def _spread(offset: np.ndarray, shape: tuple[int, ...], node: ir.Node) -> np.ndarray:
    """Return zero points in a shape that broadcasts against the integers."""
    axis = node.attributes.get_int("axis", 1) % max(len(shape), 1)
    block = node.attributes.get_int("block_size", 0)
    if offset.ndim == 0:
        return offset
    if block:
        return np.take(np.repeat(offset, block, axis), np.arange(shape[axis]), axis)
    return offset.reshape([-1 if index == axis else 1 for index in range(len(shape))])
