"""The passes: one to a file, each a frozen dataclass that rewrites a model in place."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AdaRound": "adaround",
    "AlignChannels": "align_channels",
    "Autocast": "autocast",
    "AveragePoolToConv": "average_pool_to_conv",
    "Awq": "awq",
    "BiasCorrection": "bias_correction",
    "ConvertOpset": "convert_opset",
    "CoremlOperators": "coreml_operators",
    "CoremlPartitions": "coreml_partitions",
    "ConvTransposeToConv": "conv_transpose_to_conv",
    "DecomposeNorms": "decompose_norms",
    "DecomposeOperators": "decompose_operators",
    "DeduplicateInitializers": "deduplicate_initializers",
    "DynamicInt8": "dynamic_int8",
    "EinsumToMatmul": "einsum_to_matmul",
    "Equalize": "equalize",
    "FoldBatchNorm": "fold_batch_norm",
    "FoldConstants": "fold_constants",
    "FullQdq": "full_qdq",
    "FuseAttention": "fuse_attention",
    "FuseGelu": "fuse_gelu",
    "FuseNorms": "fuse_norms",
    "FuseRotary": "fuse_rotary",
    "GemmToMatmulAdd": "gemm_to_matmul_add",
    "Gptq": "gptq",
    "GridSampleToGather": "grid_sample_to_gather",
    "GuardFloat": "guard_float",
    "HalfWeights": "half_weights",
    "Hqq": "hqq",
    "InferShapes": "infer_shapes",
    "InlineFunctions": "inline_functions",
    "IntegerRequantize": "integer_requantize",
    "KeepSums": "keep_sums",
    "LiftConstants": "lift_constants",
    "LowRank": "low_rank",
    "MatmulAddToGemm": "matmul_add_to_gemm",
    "MatmulNbits": "matmul_nbits",
    "MergeDuplicates": "merge_duplicates",
    "MixedBits": "mixed_bits",
    "MixedPrecision": "mixed_precision",
    "PackSparse": "pack_sparse",
    "PruneChannels": "prune_channels",
    "PruneHeads": "prune_heads",
    "PruneLayers": "prune_layers",
    "PruneNeurons": "prune_neurons",
    "Qdq": "qdq",
    "RemoveIdentity": "remove_identity",
    "RemoveUnused": "remove_unused",
    "ResizeToMatmul": "resize_to_matmul",
    "Rtn": "rtn",
    "Rotate": "rotate",
    "ScaleDepthwise": "scale_depthwise",
    "SmoothQuant": "smooth_quant",
    "SubtractResiduals": "subtract_residuals",
    "ToBf16": "to_bf16",
    "Sparsify": "sparsify",
    "ToFp16": "to_fp16",
    "ToFp32": "to_fp32",
    "ToPlainOperators": "to_plain_operators",
    "UnrollRecurrent": "unroll_recurrent",
    "WidenWeights": "widen_weights",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qgraph.passes' has no attribute '{name}'")
    return getattr(importlib.import_module(f"qgraph.passes.{_HOMES[name]}"), name)
