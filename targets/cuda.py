"""ONNX Runtime on NVIDIA GPUs, through its CUDA provider.

    cuda-fp16    float16, float32 where float16 overflows or loses sums
    cuda-int8    linear layers and embeddings in 8 bits, read by a float16 kernel (MatMulNBits)
    cuda-int4    the same in 4 bits; any width of 2 to 8 through `--passes`
    cuda-fp8     linear layers in float8e4m3fn, dequantized to float16 at every run

`cuda-int8` is weight-only by what the provider has: it runs no integer convolution and no product of a quantized graph
(QLinearConv, QLinearMatMul, a MatMul between DequantizeLinear), and its MatMulInteger takes int8 by int8, while
DynamicQuantizeLinear makes uint8, and on the CPU: every layer would be copied there and back. A model whose work is in
convolutions is refused, with the targets that serve it. `cuda-fp8` is weight-only too: a product of two 8-bit floats
is GemmFloat8, which exists on the device alone (compute capability 8.9 and 9.0), so that nothing could be verified;
TensorRT multiplies in 8-bit floats (`tensorrt-fp8`).

Where the installed ONNX Runtime has no CUDA provider, or its libraries do not load, the same operators are run on the
CPU to verify the result, and the artifact says so.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.cost import cost
from qgraph.analysis.linear_layers import linear_layers
from qgraph.errors import UserError
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.targets.cpu_int4 import refused_blocks, weight_passes
from qgraph.targets.nvidia import NvidiaTarget, once_each, work_of

__all__ = ["CudaFp8", "CudaFp16", "CudaInt4", "CudaInt8"]

_FUSE_ATTENTION = "fuse-attention{grouped=false}"
"""By its source of 1.25, the provider's Attention fails for heads that share keys under a mask. Rotations are not
fused: at opset 23, which that takes, Cos and Sin of their tables would be computed on the CPU and copied."""
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_NO_KERNEL = {
    **dict.fromkeys(
        ("ConvInteger", "QLinearConv"), "the CUDA provider has no integer convolution: it would run on the CPU"
    ),
    **dict.fromkeys(
        ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul"),
        "the CUDA provider has no such integer product: it would run on the CPU",
    ),
    "DynamicQuantizeLSTM": "the CUDA provider has no integer LSTM: it would run on the CPU",
}
_QUANTIZED = "the CUDA provider fuses no quantized activations: it would quantize and dequantize, and compute in float"
_WEIGHT_OPSET = 21
"""Weights between passes stand behind a DequantizeLinear of 4 bits or of blocks."""
_TABLE = "onnxruntime-cuda"
_FUSE = ",".join(f"{name}{{table={_TABLE}}}" for name in ("fuse-gelu", "fuse-norms", "fuse-rotary"))
_FEWEST = 1024
"""Weights of fewer elements stay in float, as `rtn` leaves them."""


@dataclasses.dataclass(frozen=True)
class CudaFp16(NvidiaTarget):
    """float16 on an NVIDIA GPU."""

    name: ClassVar[str] = "cuda-fp16"
    summary: ClassVar[str] = "float16 in ONNX Runtime on an NVIDIA GPU, float32 where float16 would overflow"

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return no passes: lowering makes it float16."""
        del model, context
        return Pipeline()

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in the operators of transformers, as far as the table has them, and float16."""
        return Pipeline.parse(f"{_FUSE},{_FUSE_ATTENTION},to-fp16,remove-unused")

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return what the CUDA provider would hand to the CPU, or compute in float although it is quantized."""
        return once_each([*_refused(model), *self.without_kernels(model)])


@dataclasses.dataclass(frozen=True)
class CudaInt4(NvidiaTarget):
    """Weights of few bits on an NVIDIA GPU, activations in float16."""

    name: ClassVar[str] = "cuda-int4"
    summary: ClassVar[str] = "weights of 2 to 8 bits and float16 activations in ONNX Runtime on an NVIDIA GPU"
    opset: ClassVar[int] = _WEIGHT_OPSET

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return AWQ and GPTQ where there are calibration data, else rounding to nearest."""
        del model
        return weight_passes(context)

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in the operators of transformers, float16 and low-bit kernels."""
        kernels = f"matmul-nbits{{gapless=true,table={_TABLE}}}"
        return Pipeline.parse(f"{_FUSE},{_FUSE_ATTENTION},to-fp16,{kernels},remove-unused")

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return what the CUDA provider would hand to the CPU, or compute in float although it is quantized."""
        return once_each([*refused_blocks(model), *_refused(model), *self.without_kernels(model)])


@dataclasses.dataclass(frozen=True)
class CudaInt8(CudaInt4):
    """Weights of 8 bits on an NVIDIA GPU, activations in float16."""

    name: ClassVar[str] = "cuda-int8"
    summary: ClassVar[str] = "linear layers with 8-bit weights and float16 activations in ONNX Runtime on an NVIDIA GPU"

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return rounding to 8 bits, which loses next to nothing without data.

        Raises:
            UserError: convolutions do most of the work, or there is no linear layer.
        """
        del context
        _require_linear(model, self.name, "integer", "tensorrt-int8")
        return Pipeline.parse("rtn{bits=8,group=128}")


@dataclasses.dataclass(frozen=True)
class CudaFp8(NvidiaTarget):
    """Weights in 8-bit floats on an NVIDIA GPU, activations in float16."""

    name: ClassVar[str] = "cuda-fp8"
    summary: ClassVar[str] = "linear layers with float8e4m3fn weights and float16 activations on an NVIDIA GPU"
    opset: ClassVar[int] = _WEIGHT_OPSET

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return rounding to float8e4m3fn, one scale for each output.

        Raises:
            UserError: convolutions do most of the work, or there is no linear layer.
        """
        del context
        _require_linear(model, self.name, "float8", "tensorrt-fp8")
        return Pipeline.parse("rtn{format=fp8e4m3,group=0}")

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in the operators of transformers, as far as the table has them, and float16."""
        return Pipeline.parse(f"{_FUSE},{_FUSE_ATTENTION},to-fp16,remove-unused")

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return what the CUDA provider would hand to the CPU: layers, and the weights that they read."""
        dequantizers = {qgraph.ir.node_label(node) for node in work_of(model, "DequantizeLinear")}
        split = self.split(model)
        left = [one for one in split.left if one.node in dequantizers]
        return once_each([*_refused(model), *self.without_kernels(model, split), *left])


def _require_linear(model: ir.Model, target: str, kind: str, instead: str) -> None:
    """Raise a UserError unless linear layers do at least half of the multiplying."""
    works = {one.name: one.multiply_adds or 0 for one in cost(model).nodes}
    convolutions = work_of(model, *_CONVOLUTIONS)
    large = [
        layer
        for layer in linear_layers(model).layers
        if layer.kind == "linear" and layer.inputs * layer.outputs >= _FEWEST
    ]
    in_convolutions = sum(works.get(qgraph.ir.node_label(node), 0) for node in convolutions)
    if convolutions and (not large or in_convolutions > sum(works.get(layer.name, 0) for layer in large)):
        told = f"{len(convolutions)} Conv node{'s' * (len(convolutions) > 1)}"
        what = f"ONNX Runtime's CUDA provider has no {kind} Conv"
        others = f"--target {instead}, or --target cuda-fp16"
    elif not large:
        told = f"outside subgraphs it has no linear layer of {_FEWEST} weights or more in float32 or float16"
        what, others = "there is nothing to store in 8 bits", "--target cuda-fp16"
    else:
        return
    raise UserError(f"{target} cannot run this model: {told}, and {what}. Use {others}.")


def _refused(model: ir.Model) -> list[Skipped]:
    refused = []
    for node in qgraph.ir.walk(model):
        reason = _NO_KERNEL.get(node.op_type)
        if qgraph.ir.is_op(node, "QuantizeLinear", "DynamicQuantizeLinear"):
            reason = _QUANTIZED
        elif node.op_type == "GatherBlockQuantized":
            reason = _gaps(node)
        if reason is not None:
            refused.append(Skipped(qgraph.ir.node_label(node), reason))
    return refused


def _gaps(node: ir.Node) -> str | None:
    """Say why the rows of a packed table cannot be looked up: the provider counts groups from the first on."""
    table = node.inputs[0]
    if table is None or table.shape is None or not isinstance(table.shape[-1], int):
        return None
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 128)
    width = table.shape[-1] * (8 // bits if table.dtype == ir.DataType.UINT8 else 1)
    if width % block:
        return f"the CUDA provider looks up whole groups only, and rows of {width} are no multiple of {block}"
    has_zero_points = len(node.inputs) > 3 and node.inputs[3] is not None
    groups = width // block
    if has_zero_points and groups * bits % 8:
        return (
            f"the CUDA provider reads zero points without gaps between rows, and {groups} of {bits} bits do not fill "
            "whole bytes: use symmetric weights, or another group"
        )
    return None
