"""ONNX Runtime on the CPU, and float there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.passes.qdq import FLOAT_KEY
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.runtime.placement import Placement
from qgraph.runtime.placement_reading import read_placement
from qgraph.runtime.session import CPU_PROVIDER, open_session
from qgraph.targets.base import Kernels, Session, Target, cleaned_up

__all__ = ["FUSE", "FUSE_ATTENTION", "CpuFp32", "OnnxRuntimeCpu"]

FUSE_ATTENTION = "fuse-attention{stacked_heads=2}"
FUSE = f"fuse-gelu,fuse-norms,fuse-rotary,{FUSE_ATTENTION}"
"""What the runtime computes faster in one operator."""
_LAYERS = ("Attention", "Conv", "ConvTranspose", "GRU", "Gemm", "LSTM", "MatMul", "MatMulNBits", "RNN")
_BFLOAT16 = "it computes in bfloat16, for which the CPU has no kernels: convert the model to float32 or float16"


class OnnxRuntimeCpu(Target):
    """What every target of ONNX Runtime's CPU provider shares."""

    def providers(self) -> Sequence[tuple[str, Mapping[str, str]]]:
        """Return the CPU provider."""
        return [(CPU_PROVIDER, {})]

    def prepare_passes(self) -> Pipeline:
        """Return the clean-up passes, which keep every value."""
        return cleaned_up()

    def lower_passes(self) -> Pipeline:
        """Return the last clean-up."""
        return Pipeline.parse("remove-unused")

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return the layers that compute in bfloat16."""
        layers = [node for node in qgraph.ir.walk(model) if node.op_type in _LAYERS]
        found = [node for node in layers if node.outputs[0].dtype == ir.DataType.BFLOAT16]
        return [Skipped(qgraph.ir.node_label(node), _BFLOAT16) for node in found]

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open model.onnx in ONNX Runtime.

        Raises:
            UserError: it is not installed.
        """
        session: Session = open_session(folder / "model.onnx", threads=threads)
        return session

    def placement(self, folder: Path) -> Placement | None:
        """Return the placement in the graph as ONNX Runtime has fused it for the CPU.

        Raises:
            UserError: it is not installed.
        """
        return _read(folder / "model.onnx", (folder / "model.onnx").stat().st_mtime_ns)

    def kernels(self, folder: Path) -> Kernels | None:
        """Count what the placement says."""
        placement = self.placement(folder)
        return None if placement is None else Kernels.of(placement, _reasons(qgraph.ir.load(folder / "model.onnx")))


@functools.lru_cache(maxsize=2)
def _read(model: Path, changed: int) -> Placement:
    """Read a placement once for all who ask for it; `changed` is when the file was written."""
    del changed
    return read_placement(model)


def _reasons(model: ir.Model) -> dict[str, str]:
    """Return why layers stay in float, by their labels."""
    return {
        qgraph.ir.node_label(node): node.metadata_props[FLOAT_KEY]
        for node in qgraph.ir.walk(model)
        if FLOAT_KEY in node.metadata_props
    }


@dataclasses.dataclass(frozen=True)
class CpuFp32(OnnxRuntimeCpu):
    """Float on the CPU: cleaned up, nothing quantized; sparse weights are unpacked at load."""

    name: ClassVar[str] = "cpu-fp32"
    summary: ClassVar[str] = "float32 in ONNX Runtime on the CPU: for pruning and other passes without quantization"

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return no passes."""
        del model, context
        return Pipeline()

    def lower_passes(self) -> Pipeline:
        """Fuse what the runtime computes faster in one operator, store sparse weights in fewer bytes, and clean up."""
        return Pipeline.parse(
            f"{FUSE},absorb-biases,flatten-rows,matmul-add-to-gemm,keep-sums,pack-sparse,remove-unused"
        )
