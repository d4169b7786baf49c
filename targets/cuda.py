"""ONNX Runtime on NVIDIA GPUs.

`cuda-int4` stores the weights of linear layers and embeddings in 4 bits (any width of 2 to 8 through `--passes`) and
computes in float16, keeping in float32 what overflows. Where the installed ONNX Runtime has no CUDA provider, the same
operators are run on the CPU to verify the result, and the artifact says so.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.runtime.session import CPU_PROVIDER, installed_providers, open_session
from qgraph.targets.base import Kernels, Session
from qgraph.targets.cpu import CpuFp32
from qgraph.targets.cpu_int4 import refused_blocks, weight_kernels, weight_passes

__all__ = ["CudaInt4"]

_PROVIDER = "CUDAExecutionProvider"
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


@dataclasses.dataclass(frozen=True)
class CudaInt4(CpuFp32):
    """Weights of few bits on an NVIDIA GPU, activations in float16."""

    name: ClassVar[str] = "cuda-int4"
    summary: ClassVar[str] = "weights of 2 to 8 bits and float16 activations in ONNX Runtime on an NVIDIA GPU"
    extra: ClassVar[str] = "cuda"

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return AWQ and GPTQ where there are calibration data, else rounding to nearest."""
        del model
        return weight_passes(context)

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in float16 and low-bit kernels."""
        return Pipeline.parse("to-fp16,matmul-nbits{gapless=true},remove-unused")

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return what the CUDA provider would hand to the CPU, or compute in float although it is quantized."""
        return [*refused_blocks(model), *_refused(model)]

    def stand_in(self) -> str:
        """Return a note where ONNX Runtime is installed without its CUDA provider."""
        installed = installed_providers()
        if not installed or _PROVIDER in installed:
            return ""
        return "the CPU provider (same operators; not run on CUDA here)"

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open model.onnx with the CUDA provider, or with the CPU provider where there is none.

        Raises:
            UserError: ONNX Runtime is not installed.
        """
        wanted = [_PROVIDER, CPU_PROVIDER] if not self.stand_in() else [CPU_PROVIDER]
        session: Session = open_session(folder / "model.onnx", threads=threads, providers=wanted)
        return session

    def placement(self, folder: Path) -> None:
        """Return None: what the provider takes is known on its device alone."""
        del folder

    def kernels(self, folder: Path) -> Kernels:
        """Count the operators as they are written: the provider fuses none of those with weights."""
        return weight_kernels(qgraph.ir.load(folder / "model.onnx"), integers=False)


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
