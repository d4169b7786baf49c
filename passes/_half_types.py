"""The floating-point types that a model may be narrowed to, and which operators take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.defs
import onnx_ir as ir

import qgraph.ir
from qgraph.errors import UserError

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "FLOAT32",
    "Half",
    "Kept",
    "Ranges",
    "half_places",
    "is_float",
    "is_wide",
    "rounded",
    "rounded_scales",
    "undefined",
    "without_tensors",
]

Ranges = Mapping[str, tuple[float, float]]
"""Value name -> the least and the largest number that were measured; may be empty."""

_WORST_SCALES = 0.05
"""The largest relative error, root mean square, that rounding the scales of a weight may cause."""
_MICROSOFT = frozenset({
    "Attention", "BiasGelu", "FastGelu", "FusedMatMul", "GatherBlockQuantized", "Gelu", "GroupQueryAttention",
    "MatMulBnb4", "MatMulNBits", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
})  # fmt: skip
"""Operators of ONNX Runtime whose float inputs and outputs may all be of 16 bits."""
_SIMPLIFIED = "SimplifiedLayerNormalization"


@dataclass(frozen=True)
class Half:
    """A floating-point type of half as many bits as another.

    Attributes:
        dtype: of its tensors.
        name: as people write it.
        ending: of the names of values that become of this type.
        largest: the largest finite number.
        mask: what stands for a mask's -3.4e38.
        whole: whole numbers are exact up to here.
        opset: the first whose Cast knows it.
        wide: the type that is narrowed to it.
        wide_ending: of the names of values that become of that type again.
    """

    dtype: ir.DataType
    name: str
    ending: str
    largest: float
    mask: float
    whole: int
    opset: int
    wide: ir.DataType = ir.DataType.FLOAT
    wide_ending: str = "fp32"


FLOAT16 = Half(ir.DataType.FLOAT16, "float16", "fp16", 65504.0, -16384.0, 2048, 1)
"""After a Softmax its mask is as much zero as -3.4e38, and three of them can be added."""
BFLOAT16 = Half(ir.DataType.BFLOAT16, "bfloat16", "bf16", 255 * 2.0**120, -255 * 2.0**120, 256, 13)
"""-3.4e38 itself would be rounded to minus infinity."""
FLOAT32 = Half(
    ir.DataType.FLOAT, "float32", "fp32", 3.4028234663852886e38, -(2.0**127), 1 << 24, 1, ir.DataType.DOUBLE, "fp64"
)


@dataclass
class Kept:
    """The nodes that stay in float32, each with its reason, and the constants whose masks are to be cut off."""

    reasons: dict[ir.Node, str] = field(default_factory=dict)
    masks: set[ir.Value] = field(default_factory=set)

    def add(self, node: ir.Node, reason: str) -> None:
        """Keep a node; the first reason counts."""
        self.reasons.setdefault(node, reason)


def is_float(value: ir.Value | None) -> bool:
    """Tell whether a value is a tensor of float32."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def is_wide(value: ir.Value | None, half: Half) -> bool:
    """Tell whether a value is a tensor of the type that is narrowed to `half`."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == half.wide


def half_places(node: ir.Node, opsets: Mapping[str, int], half: Half) -> tuple[list[bool], list[bool]] | None:
    """Return for every input and every output whether it may be `half` where it was wider; None if nothing may be.

    Some inputs (the scales of a Resize) are float32 by definition, whatever the others are.
    """
    if node.domain == "com.microsoft" and node.op_type in _MICROSOFT:
        return [True] * len(node.inputs), [True] * len(node.outputs)
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == _SIMPLIFIED:
        return [True] * len(node.inputs), [True] * len(node.outputs)
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get("", 1), "")
    except onnx.defs.SchemaError:
        return None
    allowed = {one.type_param_str: set(one.allowed_type_strs) for one in schema.type_constraints}
    places = []
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        row = []
        for index, value in enumerate(values):
            text = formals[min(index, len(formals) - 1)].type_str
            if not is_wide(value, half) or text == "tensor(float)":
                row.append(False)
            elif f"tensor({half.dtype.name.lower()})" in allowed.get(text, ()):
                row.append(True)
            else:
                return None
        places.append(row)
    return places[0], places[1]


def without_tensors(node: ir.Node) -> str | None:
    """Return why the types of a node's values cannot change: they are not known, or no tensors."""
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.name and value.const_value is None and not isinstance(value.type, ir.TensorType):
            return f"the type of '{value.name}' is not known" if value.type is None else "it handles sequences"
    return None


def undefined(node: ir.Node, opsets: Mapping[str, int], half: Half, *, quantizers: bool = False) -> str | None:
    """Return why a node cannot be of 16 bits whatever its numbers are, or None.

    Args:
        node: of the main graph.
        opsets: that the model imports.
        half: the type.
        quantizers: whether what quantizes and dequantizes activations may be.
    """
    if qgraph.ir.inner_graphs(node):
        return "it has subgraphs, which stay in float32"
    reason = without_tensors(node)
    if reason is not None:
        return reason
    if qgraph.ir.is_op(node, "Cast"):
        before = node.inputs[0]
        if before is not None and before.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return "it widens to float32 on purpose"
        return None
    if qgraph.ir.is_op(node, "DynamicQuantizeLinear") or "dtype" in node.attributes:
        return f"{node.op_type} gives numbers of a type of its own"
    if qgraph.ir.is_op(node, "QuantizeLinear") and not quantizers:
        return f"{node.op_type} gives numbers of a type of its own"
    dequantized = node.inputs[0] if qgraph.ir.is_op(node, "DequantizeLinear") else None
    if dequantized is not None and dequantized.const_value is None and not quantizers:
        return "it dequantizes activations"
    if qgraph.ir.is_op(node, "Constant"):
        return "it is a Constant node: 'lift-constants' makes it an initializer"
    if half_places(node, opsets, half) is not None:
        return None
    first = _first_opset(node, opsets.get("", 1), half)
    return f"it is not defined for {half.name}" + (f" before opset {first}" if first is not None else "")


def _first_opset(node: ir.Node, opset: int, half: Half) -> int | None:
    """Return the first opset after `opset` in which the operator is defined for `half`, or None."""
    newer = range(opset + 1, onnx.defs.onnx_opset_version() + 1)
    return next((version for version in newer if half_places(node, {"": version}, half) is not None), None)


def rounded(array: np.ndarray, half: Half, *, cut: bool = False) -> np.ndarray:
    """Return an array of `half`; with `cut`, finite numbers are cut off at its mask and its largest number first."""
    if cut:
        array = np.where(np.isfinite(array), np.clip(array, half.mask, half.largest), array)
    with np.errstate(over="ignore"):
        return array.astype(half.dtype.numpy())


def rounded_scales(scales: np.ndarray, half: Half, nodes: Sequence[str]) -> np.ndarray:
    """Return the scales of a compressed weight in `half`.

    Args:
        scales: float32.
        half: the type.
        nodes: names of those who read the weight.

    Raises:
        UserError: they overflow, or rounding loses so much that the weight would be another.
    """
    result = rounded(scales, half)
    error = np.linalg.norm(result.astype(np.float64) - scales)
    if error <= _WORST_SCALES * np.linalg.norm(scales.astype(np.float64)):
        return result
    names = ",".join(f'"{node}"' for node in nodes)
    raise UserError(
        f"{half.name} cannot hold the scales of the weight that '{nodes[-1]}' reads (the largest is "
        f"{float(np.abs(scales).max()):.3g}): leave it in float32 with exclude=[{names}]"
    )
