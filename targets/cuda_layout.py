"""Whether convolutions on an NVIDIA GPU are better off with their channels last.

    Conv [batch, channels, height, width] of float16    =>    the same in NHWC, by the provider's option `prefer_nhwc`

Tensor cores read images channels last. With the option, ONNX Runtime's CUDA provider gives convolutions, poolings and
the like that layout when it opens the model, and puts a Transpose before and behind what has no such kernel. Sources:
ONNX Runtime, CUDA execution provider, prefer_nhwc (since 1.20), and pull request 17200, which measured it; which
operators have such kernels is in the table, under com.ms.internal.nhwc. TensorRT chooses layouts itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_support import refusal_of
from qgraph.capabilities import Table

__all__ = ["CHANNELS_LAST", "prefers_channels_last"]

CHANNELS_LAST: Mapping[str, str] = {"prefer_nhwc": "1"}
"""Options of the CUDA provider."""
_DOMAIN = "com.ms.internal.nhwc"
_ON_IMAGES = (
    "AveragePool", "Conv", "ConvTranspose", "DepthToSpace", "GlobalAveragePool", "GlobalMaxPool", "GridSample",
    "InstanceNormalization", "LRN", "MaxPool", "Resize", "SpaceToDepth",
)  # fmt: skip
"""Operators that know which axis is that of the channels."""
_IMAGE_AXES = 4


def prefers_channels_last(model: ir.Model, table: Table) -> bool:
    """Tell whether a model is one of float16 convolutions of images, most of whose neighbours have such kernels too.

    Args:
        model: is not changed.
        table: of the CUDA provider.
    """
    kinds = [node.op_type for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, *_ON_IMAGES)]
    has_kernel = {kind: _has_kernel(kind, table) for kind in set(kinds)}
    convolutions = [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "Conv", "ConvTranspose")]
    if not convolutions or not all(_is_half(node) and has_kernel[node.op_type] for node in convolutions):
        return False
    return sum(not has_kernel[kind] for kind in kinds) < len(convolutions)


def _has_kernel(op_type: str, table: Table) -> bool:
    return refusal_of(f"{_DOMAIN}.{op_type}", [ir.DataType.FLOAT16], table) is None


def _is_half(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return weight is not None and weight.dtype == ir.DataType.FLOAT16 and _axes(weight) == _IMAGE_AXES


def _axes(value: ir.Value) -> int:
    return 0 if value.shape is None else len(value.shape)
