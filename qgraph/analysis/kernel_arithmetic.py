"""What a kernel computes in: integers, floats, or nothing at all, by its operator and the types that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

__all__ = ["COMPUTE", "LOW_BIT", "MOVES", "Arithmetic", "arithmetic", "block_form", "family", "nbits_form"]

Arithmetic = Literal["integer", "low-bit", "float", "none"]
"""Integer: quantized numbers are multiplied and added. Low-bit: floats are, with weights that are stored in few bits.
Float: floats are. None: data are moved, converted or compared, or sizes and indices computed."""

COMPUTE = frozenset({
    "Attention", "Conv", "ConvTranspose", "GRU", "Gemm", "LSTM", "MatMul", "RNN", "com.microsoft.Attention",
    "com.microsoft.FusedConv", "com.microsoft.FusedGemm", "com.microsoft.FusedMatMul",
    "com.microsoft.GroupQueryAttention", "com.microsoft.MultiHeadAttention", "com.microsoft.NhwcFusedConv",
    "com.microsoft.nchwc.Conv",
})  # fmt: skip
"""Float kernels of layers that have integer forms: those that a model in integers should have few of."""
MOVES = frozenset({
    "Cast", "Compress", "Concat", "DepthToSpace", "DequantizeLinear", "DynamicQuantizeLinear", "Expand", "Flatten",
    "Gather", "GatherElements", "GatherND", "Identity", "If", "Loop", "MaxPool", "MemcpyFromHost", "MemcpyToHost",
    "NonZero", "Pad", "QuantizeLinear", "Reshape", "ReverseSequence", "Scan", "ScatterElements", "ScatterND", "Shape",
    "Size", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
    "com.microsoft.DequantizeLinear", "com.microsoft.NhwcMaxPool", "com.microsoft.QuantizeLinear",
    "com.microsoft.nchwc.MaxPool", "com.microsoft.nchwc.ReorderInput", "com.microsoft.nchwc.ReorderOutput",
})  # fmt: skip
"""Kernels that compute nothing: they move, compare or convert."""
LOW_BIT = frozenset({"com.microsoft.GatherBlockQuantized", "com.microsoft.MatMulBnb4", "com.microsoft.MatMulNBits"})
"""Kernels of weights of few bits; MatMulNBits computes in floats unless it is known better."""
_INTEGER = frozenset({
    "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "com.microsoft.DynamicQuantizeLSTM",
    "com.microsoft.DynamicQuantizeMatMul", "com.microsoft.MatMulIntegerToFloat", "com.microsoft.QAttention",
    "com.microsoft.QGemm",
})  # fmt: skip
_INTEGER_PREFIX = "com.microsoft.QLinear"
_QUANTIZED = frozenset({"int8", "uint8", "int4", "uint4", "int16", "uint16"})
_FLOATS = frozenset({"bfloat16", "float16", "float32", "float64"})
_FIRST_INPUT = frozenset({"Resize", "Upsample"})
"""Kernels whose other inputs are numbers that say what to do."""
_FAMILIES = {
    "com.microsoft.FusedConv": "Conv",
    "com.microsoft.NhwcFusedConv": "Conv",
    "com.microsoft.nchwc.Conv": "Conv",
    "com.microsoft.FusedGemm": "MatMul",
    "com.microsoft.FusedMatMul": "MatMul",
    "com.microsoft.QLinearConv": "QLinearConv",
    "com.microsoft.DynamicQuantizeMatMul": "MatMulInteger",
    "com.microsoft.MatMulIntegerToFloat": "MatMulInteger",
    "Gemm": "MatMul",
}


def arithmetic(kernel: str, types: Sequence[str], integer_blocks: bool | None = None) -> Arithmetic:
    """Return what a kernel computes in.

    Args:
        kernel: as tables call it.
        types: of its inputs, then of its outputs, as tables call them.
        integer_blocks: of a MatMulNBits, whether it multiplies in integers.
    """
    if kernel in LOW_BIT:
        return "integer" if integer_blocks else "low-bit"
    if kernel in _INTEGER or kernel.startswith(_INTEGER_PREFIX):
        return "integer"
    if kernel in MOVES:
        return "none"
    told = types[:1] if kernel in _FIRST_INPUT else types
    if _FLOATS.intersection(told):
        return "float"
    return "integer" if _QUANTIZED.intersection(told) else "none"


def family(kernel: str) -> str:
    """Return a kernel without what it does besides, such as an activation or a bias.

    Which form of a convolution runs is the processor's choice.
    """
    return _FAMILIES.get(kernel, kernel)


def nbits_form(attributes: Sequence[int]) -> tuple[str, ...]:
    """Return a MatMulNBits in the words of the table, by bits, block and accuracy level."""
    bits, block, level = attributes
    return (f"{bits} bits", f"blocks of {block}", f"accuracy_level {level}")


def block_form(bits: int, block: int) -> tuple[str, ...]:
    """Return a dequantized weight of a product, in blocks along its inner axis, in the words of the table."""
    return (f"int{bits} weight [K, N] in blocks of {block} along K",)
