"""Low-bit weights in ONNX Runtime on the CPU.

`cpu-int4` stores the weights of linear layers and embeddings in 4 bits (any width of 2 to 8 through `--passes`) and
multiplies activations, rounded to 8 bits block by block, with them in integers (MatMulNBits, accuracy level 4). It
needs no calibration data; with them, channels are scaled by AWQ and weights rounded by GPTQ instead of to nearest.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.targets.base import Kernels
from qgraph.targets.cpu import FUSE, CpuFp32

__all__ = ["CpuInt4", "refused_blocks", "weight_kernels", "weight_passes"]

BITS = (2, 4, 8)
_LEAST_BLOCK = 16
_TWO_BIT_BLOCKS = (32, 64, 128)
"""Blocks of 2 bits that ONNX Runtime's CPU kernels multiply in integers; others they compute in float, silently."""
_INTEGER_LEVEL = 4
_PRODUCTS = ("Attention", "Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "GRU", "Gemm", "LSTM",
             "MatMul", "MultiHeadAttention", "GroupQueryAttention", "NhwcFusedConv", "RNN")  # fmt: skip
_INTEGERS = ("ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv",
             "QLinearMatMul")  # fmt: skip


def weight_passes(context: Context) -> Pipeline:
    """Return the passes that compress weights to 4 bits: AWQ and GPTQ where there are samples to learn from."""
    return Pipeline.parse(
        "rtn{bits=4,group=32}" if context.calibration is None else "awq{bits=4,group=32},gptq{bits=4,group=32}"
    )


@dataclasses.dataclass(frozen=True)
class CpuInt4(CpuFp32):
    """Weights of few bits on the CPU, multiplied in integers."""

    name: ClassVar[str] = "cpu-int4"
    summary: ClassVar[str] = "weights of 2 to 8 bits, multiplied in integers by ONNX Runtime on the CPU"

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return AWQ and GPTQ where there are calibration data, else rounding to nearest."""
        del model
        return weight_passes(context)

    def lower_passes(self) -> Pipeline:
        """Return the passes that fuse what stays in float, and end in low-bit kernels."""
        return Pipeline.parse(f"{FUSE},matmul-nbits{{table=onnxruntime-cpu}},keep-sums,remove-unused")

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return the low-bit products that have no kernel, and what computes in bfloat16."""
        return [*refused_blocks(model), *super().check(model)]


def refused_blocks(model: ir.Model) -> list[Skipped]:
    """Return the low-bit products and look-ups of a form that ONNX Runtime has no kernel for."""
    refused = []
    for node in qgraph.ir.walk(model):
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized") or node.domain != "com.microsoft":
            continue
        bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 128)
        reason = None
        if bits not in BITS:
            reason = f"there are kernels for 2, 4 and 8 bits, not for {bits}"
        elif block < _LEAST_BLOCK or block & (block - 1):
            reason = f"blocks must be a power of two from {_LEAST_BLOCK}, not {block}"
        if reason is not None:
            refused.append(Skipped(qgraph.ir.node_label(node), reason))
    return refused


def weight_kernels(model: ir.Model, *, integers: bool) -> Kernels:
    """Count what runs: integer arithmetic, weights of few bits that are read by float arithmetic, float, and the rest.

    Args:
        model: as the runtime has fused it.
        integers: whether MatMulNBits of accuracy level 4 multiplies in integers.
    """
    counts = {name: Counter[str]() for name in ("integer", "floating", "low_bit", "other")}
    left: list[Skipped] = []
    for node in qgraph.ir.walk(model):
        kind = _kind(node, integers=integers)
        counts[kind][node.op_type] += 1
        if kind == "floating":
            left.append(Skipped(qgraph.ir.node_label(node), _why_float(node)))
    return Kernels(counts["integer"], counts["floating"], counts["other"], left, counts["low_bit"])


def _kind(node: ir.Node, *, integers: bool) -> str:
    if node.op_type == "MatMulNBits":
        level = node.attributes.get_int("accuracy_level", 0)
        slow = (
            node.attributes.get_int("bits", 4) == 2 and node.attributes.get_int("block_size", 0) not in _TWO_BIT_BLOCKS
        )
        return "integer" if integers and level == _INTEGER_LEVEL and not slow else "low_bit"
    if node.op_type in ("GatherBlockQuantized", "MatMulBnb4"):
        return "low_bit"
    if node.op_type in _INTEGERS:
        return "integer"
    return "floating" if node.op_type in _PRODUCTS else "other"


def _why_float(node: ir.Node) -> str:
    if node.op_type.endswith("Attention"):
        return "it multiplies activations with activations"
    factors = [value for value in node.inputs[:2] if value is not None]
    if any(_is_dequantized(value) for value in factors):
        return "its weight is dequantized to float at every run: there is no kernel for its form"
    if all(value.const_value is None for value in factors):
        return "it multiplies activations with activations"
    return "its weight is stored in float"


def _is_dequantized(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and qgraph.ir.is_op(node, "Transpose") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return qgraph.ir.is_op(node, "DequantizeLinear")
