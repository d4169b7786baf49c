"""A target whose models have rounded weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from qgraph.pipeline import Context, Pipeline
from qgraph.runtime.session import open_session
from qgraph.targets.base import Session, Target
from qgraph_example.round_weights import RoundWeights


@dataclasses.dataclass(frozen=True)
class CpuRounded(Target):
    """Float models on ONNX Runtime's CPU provider whose weights have few digits, and so compress well in archives."""

    name: ClassVar[str] = "cpu-rounded"
    summary: ClassVar[str] = "fp32 with rounded weights, on ONNX Runtime's CPU provider"

    def prepare_passes(self) -> Pipeline:
        """Change nothing."""
        return Pipeline()

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Round the weights."""
        del model, context
        return Pipeline([RoundWeights()])

    def lower_passes(self) -> Pipeline:
        """Change nothing."""
        return Pipeline()

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open the model in ONNX Runtime."""
        return open_session(folder / "model.onnx", threads=threads)
