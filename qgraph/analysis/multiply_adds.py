"""Multiply-adds of single nodes, from shapes alone.

Of an attention the products Q K^T and softmax V count, of a recurrent cell the products with the input and with the
state. Operators that only move or map elements count as zero; an operator that is not known raises `UnknownCostError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

__all__ = ["UnknownCostError", "multiply_adds"]

_JOINED = 3
"""Dimensions of operands whose heads lie side by side."""
_PAST_KEY = 4


class UnknownCostError(Exception):
    """The multiply-adds cannot be known; the message says why."""


ShapeOf = Callable[[ir.Value], Sequence[int]]
"""Gives the shape of a value, or raises `UnknownCostError`."""


def multiply_adds(node: ir.Node, shape_of: ShapeOf) -> int:
    """Return the multiply-adds of one run of `node`, without those of its subgraphs.

    Raises:
        UnknownCostError: a shape is missing or the operator is not known.
    """
    rule = _RULES.get(node.op_type)
    if rule is not None:
        return rule(_Operands(node, shape_of))
    if node.domain in ("", "ai.onnx", "ai.onnx.ml") or node.op_type in _FREE_EXTRAS:
        return 0
    raise UnknownCostError(f"operator {node.op_type} of domain '{node.domain}' is not known")


class _Operands:
    """A node with the shapes of what it reads and writes."""

    def __init__(self, node: ir.Node, shape_of: ShapeOf) -> None:
        self.node = node
        self.domain = node.domain
        self._shape_of = shape_of

    def shape(self, position: int) -> list[int]:
        """Return the shape of an input."""
        value = self.node.inputs[position] if position < len(self.node.inputs) else None
        if value is None:
            raise UnknownCostError(f"input {position} is missing")
        return list(self._shape_of(value))

    def has(self, position: int) -> bool:
        """Tell whether an input is given."""
        return position < len(self.node.inputs) and self.node.inputs[position] is not None

    def out(self) -> list[int]:
        """Return the shape of the first output."""
        return list(self._shape_of(self.node.outputs[0]))

    def option(self, name: str) -> int:
        """Return an integer attribute, 0 where it is not set."""
        return int(self.node.attributes.get_int(name, 0) or 0)


def _product(left: int, right: int) -> Callable[[_Operands], int]:
    """Return the rule of a batched matrix product whose operands are the inputs at these positions."""

    def rule(of: _Operands) -> int:
        a, b = of.shape(left), of.shape(right)
        if not a or not b:
            raise UnknownCostError("a matrix product of scalars")
        inner = a[-2] if of.option("transA") and len(a) > 1 else a[-1]
        rows = math.prod(a) // inner if inner else 0
        columns = 1
        if len(b) > 1:
            columns = b[-2] if of.option("transB") else b[-1]
        if len(b) > 2 and math.prod(a[:-2]) < math.prod(b[:-2]):
            # The batch axes of `a` are broadcast.
            rows = (a[-2] if len(a) > 1 else 1) * math.prod(b[:-2])
        return rows * inner * columns

    return rule


def _convolution(weight: int) -> Callable[[_Operands], int]:
    return lambda of: math.prod(of.out()) * math.prod(of.shape(weight)[1:])


def _transposed_convolution(of: _Operands) -> int:
    return math.prod(of.shape(0)) * math.prod(of.shape(1)[1:])


def _packed_product(of: _Operands) -> int:
    return math.prod(of.shape(0)) * of.option("N")


def _recurrent(of: _Operands) -> int:
    steps, batch, width = of.shape(0)
    directions, gates_times_hidden, _ = of.shape(1)
    hidden = of.shape(2)[-1]
    return steps * batch * directions * gates_times_hidden * (width + hidden)


def _einsum(of: _Operands) -> int:
    equation = of.node.attributes.get_string("equation", "").replace(" ", "")
    if "." in equation:
        raise UnknownCostError("an Einsum with an ellipsis")
    sizes: dict[str, int] = {}
    terms = equation.partition("->")[0].split(",")
    for position, term in enumerate(terms):
        sizes.update(zip(term, of.shape(position), strict=True))
    return math.prod(sizes.values()) * (len(terms) - 1)


def _attention(of: _Operands) -> int:
    """Count `Attention` of ONNX or `MultiHeadAttention`: Q, K, V come in projected, [B, S, width] or [B, H, S, d].

    Those of ONNX may share keys among heads, and put them behind a cache [B, H, past, d].
    """
    q, k, v = (of.shape(position) for position in range(3))
    if not len(q) == len(k) == len(v):
        raise UnknownCostError("packed operands of an attention")
    queries, keys = q[-2], k[-2]
    if of.domain == "" and of.has(_PAST_KEY):
        keys += of.shape(_PAST_KEY)[-2]
    groups = of.option("kv_num_heads")
    width = v[-1] * of.option("q_num_heads") // groups if len(v) == _JOINED and groups else v[-1]
    per_pair = math.prod(q) // queries + math.prod(q[:-1]) // queries * width
    return queries * keys * per_pair


def _projected_attention(of: _Operands) -> int:
    """Count `Attention` and `QAttention` of ONNX Runtime: input [B, S, D], weight [D, 3 W] holds the projections."""
    batch, length, width = of.shape(0)
    columns = of.shape(1)[-1]
    return batch * length * width * columns + 2 * batch * length * length * (columns // 3)


def _either_attention(of: _Operands) -> int:
    return _projected_attention(of) if of.domain == "com.microsoft" else _attention(of)


_RULES: dict[str, Callable[[_Operands], int]] = {
    "MatMul": _product(0, 1),
    "Gemm": _product(0, 1),
    "FusedMatMul": _product(0, 1),
    "FusedGemm": _product(0, 1),
    "MatMulInteger": _product(0, 1),
    "MatMulIntegerToFloat": _product(0, 1),
    "DynamicQuantizeMatMul": _product(0, 1),
    "QLinearMatMul": _product(0, 3),
    "QGemm": _product(0, 3),
    "MatMulNBits": _packed_product,
    "MatMulBnb4": _packed_product,
    "Conv": _convolution(1),
    "FusedConv": _convolution(1),
    "NhwcFusedConv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed_convolution,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "DynamicQuantizeLSTM": _recurrent,
    "Einsum": _einsum,
    "Attention": _either_attention,
    "QAttention": _projected_attention,
    "MultiHeadAttention": _attention,
}

_FREE_EXTRAS = frozenset(
    {
        "BiasGelu",
        "DequantizeLinear",
        "EmbedLayerNormalization",
        "FastGelu",
        "GatherBlockQuantized",
        "Gelu",
        "LayerNormalization",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QuantizeLinear",
        "QuickGelu",
        "ReorderInput",
        "ReorderOutput",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
