"""ONNX Runtime on the CPU."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pipeline
from qgraph.runtime.session import open_session
from qgraph.targets.base import Kernels, Session, Target

__all__ = ["CpuFp32", "CpuInt8"]

_PREPARE = (
    "inline-functions,lift-constants,convert-opset{version=21},fold-constants,remove-identity,fold-batch-norm,"
    "deduplicate-initializers,merge-duplicates,remove-unused"
)


class _OnnxRuntimeCpu(Target):
    def prepare_passes(self) -> Pipeline:
        """Return the clean-up passes, which keep every value."""
        return Pipeline.parse(_PREPARE)

    def lower_passes(self) -> Pipeline:
        """Return the last clean-up."""
        return Pipeline.parse("remove-unused")

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open model.onnx in ONNX Runtime."""
        return open_session(folder / "model.onnx", threads=threads)


@dataclasses.dataclass(frozen=True)
class CpuFp32(_OnnxRuntimeCpu):
    """Float on the CPU: cleaned up, nothing quantized."""

    name: ClassVar[str] = "cpu-fp32"
    summary: ClassVar[str] = "float32 in ONNX Runtime on the CPU; for pruning and other passes without quantization"

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return no passes."""
        del model, context
        return Pipeline()


@dataclasses.dataclass(frozen=True)
class CpuInt8(_OnnxRuntimeCpu):
    """8-bit integers on the CPU."""

    name: ClassVar[str] = "cpu-int8"
    summary: ClassVar[str] = "8-bit integer kernels of ONNX Runtime on the CPU, static or dynamic as each region wants"

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return static quantization for convolutional graphs, dynamic quantization for others."""
        if any(qgraph.ir.is_op(node, "Conv") for node in qgraph.ir.walk(model)):
            return Pipeline.parse("qdq")
        smooth = "" if context.calibration is None else "smooth-quant,"
        return Pipeline.parse(f"fuse-attention,{smooth}dynamic-int8")

    def kernels(self, folder: Path) -> Kernels:
        """Count the kernels of the graph as ONNX Runtime has fused it."""
        with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
            optimised = Path(scratch) / "model.onnx"
            open_session(folder / "model.onnx", optimised_path=optimised)
            counts = Counter(node.op_type for node in qgraph.ir.walk(qgraph.ir.load(optimised)))
        integer = {op: n for op, n in counts.items() if op.startswith("QLinear") or "Integer" in op or op == "QGemm"}
        floating = {op: n for op, n in counts.items() if op in ("Conv", "FusedConv", "MatMul", "Gemm", "FusedMatMul")}
        other = {op: n for op, n in counts.items() if op not in integer and op not in floating}
        return Kernels(integer, floating, other)
