"""Which operators can run in integers, what they do to scales, and when they cannot.

    CONVOLUTION   has a constant weight; its result must be quantized, or its runtime's kernel is a float one
    PRODUCT       matrix product; its result may be quantized or float
    ARITHMETIC    reads quantized values of any scale and makes one of another scale (Add, Concat, average pooling ...)
    MOVER         only moves or selects elements: works on the integers themselves, at the scale of its input
    CLAMP         Relu and Clip: a mover that the saturation of a quantizer can replace
    TABLE         looks up rows of a constant table, which is stored in integers

The operators are those for which ONNX Runtime's CPU provider has integer kernels, or works on integers unchanged.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.numerics.quantize import dequantize, quantize
from qgraph.numerics.schemes import UINT8

__all__ = [
    "CONSTANT_FORMS",
    "OPERATORS",
    "QUANTIZED_ALREADY",
    "Kind",
    "data_inputs",
    "is_constant",
    "is_stored",
    "kind_of",
    "obstacle",
    "output_axis",
]

SMALLEST_TABLE = 1 << 14
"""Tables of fewer elements are not worth a DequantizeLinear."""
_LARGEST = 1e15
"""Numbers beyond this have scales whose products overflow."""
LEAST_CONSTANT_SQNR = 35.0
"""Decibels that a constant operand of Add or Mul must keep at 8 bits with one scale."""
CONSTANT_FORMS: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "Sub": ("Add", np.negative),
    "Div": ("Mul", np.reciprocal),
}
"""x - c as x + (-c), x / c as x * (1 / c): only these have integer kernels."""
QUANTIZED_ALREADY = "what it reads is quantized already"


class Kind(enum.Enum):
    """What an operator does to scales."""

    CONVOLUTION = enum.auto()
    PRODUCT = enum.auto()
    ARITHMETIC = enum.auto()
    MOVER = enum.auto()
    CLAMP = enum.auto()
    TABLE = enum.auto()


Check = Callable[[ir.Node], str | None]
"""Returns why a node cannot run in integers, or None."""


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What an operator is.

    Attributes:
        kind: what it does to scales.
        check: why one of its nodes cannot run in integers.
        operands: how many of its inputs are data; -1 stands for all.
    """

    kind: Kind
    check: Check | None = None
    operands: int = 1


def is_constant(value: ir.Value | None) -> bool:
    """Tell whether a value is known before the model runs."""
    if value is None or value.is_graph_input():
        return False
    return value.const_value is not None or qgraph.ir.is_op(value.producer(), "Constant")


def is_stored(value: ir.Value | None) -> bool:
    """Tell whether a value is constant, or stands for integers that are: a weight that was rounded before."""
    node = None if value is None else value.producer()
    if node is None or not qgraph.ir.is_op(node, "DequantizeLinear"):
        return is_constant(value)
    return all(is_constant(one) for one in node.inputs if one is not None)


def output_axis(node: ir.Node) -> int:
    """Return the axis of the weight of a Conv, Gemm or MatMul that counts output channels."""
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 0 if node.op_type == "Conv" else 1


def kind_of(node: ir.Node) -> Kind | None:
    """Return what the operator of `node` does to scales, or None if it cannot run in integers."""
    if not qgraph.ir.is_op(node, *_RULES):
        return None
    return Kind.TABLE if node.op_type == "Gather" and is_constant(node.inputs[0]) else _RULES[node.op_type].kind


def data_inputs(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Return position and value of the inputs of a node that are data and not constant, weights left out."""
    operands = _RULES[node.op_type].operands
    inputs = node.inputs if operands < 0 else node.inputs[:operands]
    return [(i, value) for i, value in enumerate(inputs) if value is not None and not is_stored(value)]


def obstacle(node: ir.Node) -> str | None:
    """Return why `node`, of an operator in `OPERATORS`, cannot run in integers, or None."""
    operands = [value for _, value in data_inputs(node)]
    if not operands and kind_of(node) is not Kind.TABLE:
        return "it reads only constants"
    for value in (*operands, *node.outputs):
        if value.dtype not in (None, ir.DataType.FLOAT):
            return f"'{value.name}' is {value.dtype.name.lower()}, not float32"
    if any(qgraph.ir.is_op(value.producer(), "DequantizeLinear") for value in operands):
        return QUANTIZED_ALREADY
    check = _RULES[node.op_type].check
    return check(node) if check else None


# --- checks -----------------------------------------------------------------------------------------------------------


def _weight(node: ir.Node, position: int = 1) -> str | None:
    weight = node.inputs[position]
    rounded = None if weight is None else weight.producer()
    if rounded is not None and qgraph.ir.is_op(rounded, "DequantizeLinear"):
        return _rounded_weight(node, rounded)
    array = qgraph.ir.constant(weight)
    if array is None:
        return "its weight is computed at run time, or is an input of the model"
    if array.dtype != np.float32:
        return f"its weight is {array.dtype}, not float32"
    if not np.isfinite(array).all():
        return "its weight holds NaN or infinity"
    largest = float(np.abs(array).max(initial=0.0))
    return f"its weight reaches {largest:.3g}, too far for the scale of its bias" if largest > _LARGEST else None


def _rounded_weight(node: ir.Node, rounded: ir.Node) -> str | None:
    """Return why the integers of a weight that was rounded before cannot be multiplied as they are, or None."""
    integers, scale, *zero_point = rounded.inputs
    if integers is None or scale is None or not is_stored(rounded.outputs[0]):
        return QUANTIZED_ALREADY
    if integers.dtype not in (ir.DataType.INT8, ir.DataType.INT4):
        return f"its weight is stored as {'?' if integers.dtype is None else integers.dtype.name.lower()}, not as int8"
    if rounded.attributes.get_int("block_size", 0):
        return "its weight has a scale for every group of inputs, which the integer kernel cannot follow"
    if any(one is not None and np.any(qgraph.ir.constant(one)) for one in zero_point):
        return "its weight has zero points, which the integer kernel cannot follow"
    axis = rounded.attributes.get_int("axis", 1)
    rank = len(_dims(rounded.outputs[0]))
    if len(scale.shape or ()) > 0 and axis % max(rank, 1) != output_axis(node):
        return "its weight has its scales along the inputs, which the integer kernel cannot follow"
    if scale.dtype != ir.DataType.FLOAT:
        return "the scales of its weight are not float32"
    if np.any(np.asarray(qgraph.ir.constant(scale)) <= 0):
        return "its weight has scales that are not positive, which its bias cannot follow"
    if node.op_type == "Gemm" and node.attributes.get_float("alpha", 1.0) != 1.0:
        return "its weight was rounded before, and it has an alpha"
    return None


def _bias(node: ir.Node, channels: int) -> str | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    array = qgraph.ir.constant(bias)
    if array is None:
        return "its bias is computed at run time"
    if array.size not in (1, channels):
        return "its bias is not one number for each output channel"
    return None if np.isfinite(array).all() else "its bias holds NaN or infinity"


def _conv(node: ir.Node) -> str | None:
    return _weight(node) or _bias(node, _dims(node.inputs[1])[0])


def _gemm(node: ir.Node) -> str | None:
    if node.attributes.get_int("transA", 0):
        return "it transposes its left operand (transA), which the integer kernel cannot"
    return _weight(node) or _bias(node, _dims(node.inputs[1])[output_axis(node)])


def _matmul(node: ir.Node) -> str | None:
    left, right = node.inputs
    if is_constant(left):
        return "its left operand is constant, and the integer kernel wants that on the right"
    if right is None or not (is_stored(right) or qgraph.ir.is_op(right.producer(), "DequantizeLinear")):
        return None
    return _weight(node) or (None if len(_dims(right)) == 2 else "its weight is not a matrix")


def _table(node: ir.Node) -> str | None:
    """A Gather from activations moves them; one from a constant matrix stores that in integers."""
    data = node.inputs[0]
    if not is_constant(data):
        return None
    reason = _weight(node, 0)
    if reason:
        return reason
    if len(_dims(data)) != 2 or node.attributes.get_int("axis", 0) not in (0, -2):
        return "its table is not looked up by rows"
    small = math.prod(_dims(data)) < SMALLEST_TABLE
    return "its table is too small to gain anything" if small else None


def _one_output(node: ir.Node) -> str | None:
    used = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    return "its second output is used" if used else None


def _pad(node: ir.Node) -> str | None:
    if node.attributes.get_string("mode", "constant") != "constant":
        return None
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    if fill is None:
        return None
    array = qgraph.ir.constant(fill)
    return None if array is not None and not np.any(array) else "it pads with something else than zero"


def _resize(node: ir.Node) -> str | None:
    if node.attributes.get_string("mode", "nearest") != "nearest":
        return "interpolating integers would round them down"
    if node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return "it may fill in a number from outside"
    return None


def _clip(node: ir.Node) -> str | None:
    arrays = [qgraph.ir.constant(value) for value in node.inputs[1:] if value is not None]
    if any(array is None for array in arrays):
        return "its bounds are computed at run time"
    bounds = [float(array.item()) for array in arrays if array is not None]
    return None if not any(math.isnan(bound) for bound in bounds) else "its bounds are not numbers"


def _constant_operands(node: ir.Node) -> str | None:
    for value in node.inputs[:2]:
        array = qgraph.ir.constant(value)
        if array is not None and not _fits_eight_bits(array):
            return f"its constant '{value.name if value is not None else ''}' does not fit into 8 bits at one scale"
    return None


def _constant_right(node: ir.Node) -> str | None:
    array = qgraph.ir.constant(node.inputs[1])
    if array is None or is_constant(node.inputs[0]):
        return f"there is an integer kernel for {node.op_type} only with a constant on the right"
    if node.op_type == "Div" and not np.all(array):
        return "it divides by zero"
    _, change = CONSTANT_FORMS[node.op_type]
    return None if _fits_eight_bits(change(array)) else "its constant does not fit into 8 bits at one scale"


def _fits_eight_bits(array: np.ndarray) -> bool:
    if not np.isfinite(array).all() or array.size == 0:
        return False
    error = np.sum(np.square(dequantize(quantize(array, UINT8)) - array, dtype=np.float64))
    signal = np.sum(np.square(array, dtype=np.float64))
    return bool(error * 10 ** (LEAST_CONSTANT_SQNR / 10) <= signal)


def _dims(value: ir.Value | None) -> tuple[int, ...]:
    """Return the shape of a constant, or of a weight that was rounded before; () for others."""
    node = None if value is None else value.producer()
    stored = node.inputs[0] if node is not None and qgraph.ir.is_op(node, "DequantizeLinear") else value
    if stored is None or not is_constant(stored):
        return ()
    if stored.const_value is not None:
        return tuple(stored.const_value.shape.numpy())
    array = qgraph.ir.constant(stored)
    return () if array is None else array.shape


_MOVERS: Mapping[str, Check | None] = {
    "DepthToSpace": None,
    "Expand": None,
    "Flatten": None,
    "Identity": None,
    "MaxPool": _one_output,
    "Pad": _pad,
    "Reshape": None,
    "Resize": _resize,
    "Slice": None,
    "SpaceToDepth": None,
    "Split": None,
    "Squeeze": None,
    "Tile": None,
    "Transpose": None,
    "Unsqueeze": None,
}

_RULES: Mapping[str, _Rule] = {
    "Conv": _Rule(Kind.CONVOLUTION, _conv),
    "Gemm": _Rule(Kind.PRODUCT, _gemm),
    "MatMul": _Rule(Kind.PRODUCT, _matmul, operands=2),
    "Add": _Rule(Kind.ARITHMETIC, _constant_operands, operands=2),
    "Sub": _Rule(Kind.ARITHMETIC, _constant_right, operands=2),
    "Mul": _Rule(Kind.ARITHMETIC, _constant_operands, operands=2),
    "Div": _Rule(Kind.ARITHMETIC, _constant_right, operands=2),
    "Concat": _Rule(Kind.ARITHMETIC, operands=-1),
    "AveragePool": _Rule(Kind.ARITHMETIC),
    "GlobalAveragePool": _Rule(Kind.ARITHMETIC),
    "LeakyRelu": _Rule(Kind.ARITHMETIC),
    "Sigmoid": _Rule(Kind.ARITHMETIC),
    "HardSigmoid": _Rule(Kind.ARITHMETIC),
    "HardSwish": _Rule(Kind.ARITHMETIC),
    "Softmax": _Rule(Kind.ARITHMETIC),
    "Relu": _Rule(Kind.CLAMP),
    "Clip": _Rule(Kind.CLAMP, _clip),
    "Gather": _Rule(Kind.MOVER, _table),
    **{op: _Rule(Kind.MOVER, check) for op, check in _MOVERS.items()},
}

OPERATORS: tuple[str, ...] = tuple(_RULES)
"""The operators that may run in integers."""
