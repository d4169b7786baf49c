"""2:4 sparse weights on NVIDIA GPUs, through ONNX Runtime's TensorRT provider.

Sparse tensor cores (compute capability 8.0 and above) multiply weights of which two of every four neighbouring inputs
are zero at twice the rate. TensorRT finds such weights by itself in an ordinary model, along the channels of
convolutions and the inner axis of products, if it is told to look (`trt_sparsity_enable`); the zeros are therefore
stored as they are, and the file is as large as a dense one. `check` proves from the stored weights that every layer
that was made sparse has the pattern along the right axis. Where the TensorRT provider is not installed, the same model
runs on what is, to verify its outputs, and the artifact says so.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.sparse_weights import sparse_weights
from qgraph.numerics.sparsity import follows
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.targets.base import Kernels
from qgraph.targets.tensorrt import FUSE, TensorrtTarget

__all__ = ["CudaSparse24"]

_LAYERS = ("Attention", "Conv", "ConvTranspose", "GRU", "Gemm", "GroupQueryAttention", "LSTM", "MatMul",
           "MultiHeadAttention", "RNN")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CudaSparse24(TensorrtTarget):
    """Two of four neighbouring inputs zero, float16, in TensorRT."""

    name: ClassVar[str] = "cuda-sparse24"
    summary: ClassVar[str] = "weights that are 2:4 sparse, and float16, in ONNX Runtime's TensorRT provider"
    flags: ClassVar[Mapping[str, str]] = {"trt_fp16_enable": "1", "trt_sparsity_enable": "1"}

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return SparseGPT where there are calibration data, else the choice by magnitude."""
        del model, context
        return Pipeline.parse("sparsify{pattern=2:4}")

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in float16."""
        return Pipeline.parse(f"{FUSE},to-fp16,remove-unused")

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return the layers that were made sparse and whose stored weights are not 2:4 along the right axis.

        What breaks TensorRT's rules, and layers that would run on the CPU, are among them.
        """
        refused = super().check(model)
        for one in sparse_weights(model):
            label = qgraph.ir.node_label(one.node)
            if str(one.pattern) != "2:4":
                refused.append(Skipped(label, f"its weight is {one.pattern}, and sparse tensor cores want 2:4"))
            elif one.matrix is None:
                refused.append(Skipped(label, "its weight is computed at run time, which TensorRT cannot see through"))
            elif not follows(one.matrix, one.pattern):
                refused.append(Skipped(label, "its weight has more than two of four neighbouring inputs"))
        return refused

    def counted(self, model: ir.Model) -> Kernels:
        """Count the layers, sparse ones apart; TensorRT picks its kernels on the device itself."""
        sparse = {one.node for one in sparse_weights(model)}
        counts = Counter(
            f"{node.op_type} 2:4" if node in sparse else node.op_type
            for node in qgraph.ir.walk(model)
            if qgraph.ir.is_op(node, *_LAYERS) or node in sparse
        )
        others = Counter(node.op_type for node in qgraph.ir.walk(model) if not qgraph.ir.is_op(node, *_LAYERS))
        return Kernels(integer={}, floating=dict(counts), other=dict(others))
