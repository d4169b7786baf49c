"""What TensorRT asks of a model with explicit quantization, rule by rule, and which nodes break which.

    x -> Q(zero point 3) -> D -> Conv        breaks 'zero point'

Some rules keep a model from being imported at all, others from running in 8 bits where it says so. Each is named and
has its source: the developer guide's chapter on quantized types, the ONNX importer, or its list of operators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Skipped

__all__ = ["LAYERS", "RULES", "Rule", "broken_rules"]

_GUIDE = "NVIDIA TensorRT, Working with Quantized Types, explicit quantization"
_PLACEMENT = f"{_GUIDE}, Q/DQ layer-placement recommendations"
_IMPORTER = "onnx-tensorrt, onnxOpImporters.cpp, QuantDequantLinearHelper"
_OPERATORS = "onnx-tensorrt, docs/operators.md"

_OUTPUT_AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}
LAYERS = (*_OUTPUT_AXES, "Gemm")
"""What TensorRT calls weighted operations."""
_FUSED_BEHIND = ("BatchNormalization", "Clip", "LeakyRelu", "Relu", "Sigmoid", "Tanh")
_INTEGERS = ("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")
_LOW_BIT = ("DynamicQuantize", "GatherBlockQuantized", "MatMul", "QAttention", "QGemm", "QLinear", "QMoE", "QOrdered")
_FLOAT8_OPSET, _AXIS_OPSET = 19, 13
_TYPES = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule: `faults` tells what is wrong with a node, nothing where it keeps the rule or the rule is not about it."""

    name: str
    source: str
    faults: Callable[[ir.Node], Iterable[str]]


def broken_rules(model: ir.Model) -> list[Skipped]:
    """Return every node that breaks a rule, with the reason and, in brackets, the name of the rule."""
    found = []
    for node in qgraph.ir.walk(model):
        for rule in RULES:
            found += [Skipped(qgraph.ir.node_label(node), f"{fault} ({rule.name})") for fault in rule.faults(node)]
    return [*found, *_of_the_whole(model)]


# --- quantizers -------------------------------------------------------------------------------------------------------


def _zero_point(node: ir.Node) -> Iterator[str]:
    if not qgraph.ir.is_op(node, "QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 3:
        return
    value = node.inputs[2]
    array = qgraph.ir.constant(value)
    if value is not None and array is None:
        yield "its zero point is computed"
    elif array is not None and np.any(array.astype(np.float32)):
        yield f"its zero point is {_first(array)}, and TensorRT's quantization is symmetric: it must be 0"


def _type(node: ir.Node) -> Iterator[str]:
    if qgraph.ir.is_op(node, "QuantizeLinear"):
        dtype = node.outputs[0].dtype or _type_of_zero_point(node)
    elif qgraph.ir.is_op(node, "DequantizeLinear") and not _is_bias(node):
        dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    else:
        return
    if dtype is not None and dtype not in _TYPES:
        yield f"it is of {dtype.name.lower()}, and TensorRT quantizes to int8, float8e4m3fn and int4"


def _scale(node: ir.Node) -> Iterator[str]:
    if not qgraph.ir.is_op(node, "QuantizeLinear", "DequantizeLinear"):
        return
    array = qgraph.ir.constant(node.inputs[1])
    if array is None:
        yield "its scale is computed"
    elif not (array.astype(np.float32) > 0).all():
        yield "it has a scale that is not positive"


def _per_tensor(node: ir.Node) -> Iterator[str]:
    if qgraph.ir.is_op(node, "QuantizeLinear") and _size(node.inputs[1]) != 1 and not _is_stored(node.inputs[0]):
        yield "it quantizes activations with several scales: only weights may have one for each channel"


def _in_pairs(node: ir.Node) -> Iterator[str]:
    if not qgraph.ir.is_op(node, "QuantizeLinear"):
        return
    others = [use.node for use in node.outputs[0].uses() if not qgraph.ir.is_op(use.node, "DequantizeLinear")]
    if others or node.outputs[0].is_graph_output():
        who = f"'{qgraph.ir.node_label(others[0])}'" if others else "an output of the model"
        yield f"what it makes is read as integers by {who}: TensorRT takes quantized tensors only behind Q and D"


def _from_integers(node: ir.Node) -> Iterator[str]:
    if not qgraph.ir.is_op(node, "DequantizeLinear") or node.inputs[0] is None or _is_stored(node.inputs[0]):
        return
    if not qgraph.ir.is_op(node.inputs[0].producer(), "QuantizeLinear"):
        yield "it dequantizes what no QuantizeLinear made"


# --- layers -----------------------------------------------------------------------------------------------------------


def _channel_axis(node: ir.Node) -> Iterator[str]:
    weight = _dequantizer(node, 1) if qgraph.ir.is_op(node, *LAYERS) else None
    if weight is None or _size(weight.inputs[1]) == 1 or weight.attributes.get_int("block_size", 0) != 0:
        return
    stored = weight.inputs[0]
    rank = len(stored.shape) if stored is not None and stored.shape is not None else 0
    if rank and weight.attributes.get_int("axis", 1) % rank != _output_axis(node) % rank:
        yield f"the scales of its weight lie along axis {weight.attributes.get_int('axis', 1) % rank}, not its outputs"


def _no_bias(node: ir.Node) -> Iterator[str]:
    if qgraph.ir.is_op(node, "Conv", "ConvTranspose", "Gemm") and _dequantizer(node, 2) is not None:
        yield "its bias is quantized, and TensorRT imports no int32: leave it in float"


def _all_inputs(node: ir.Node) -> Iterator[str]:
    if not qgraph.ir.is_op(node, *LAYERS):
        return
    data, weight = _dequantizer(node, 0), _dequantizer(node, 1)
    low_bit = weight is not None and weight.inputs[0] is not None and weight.inputs[0].dtype == ir.DataType.INT4
    if (data is None) != (weight is None) and not low_bit:
        yield f"only its {'weight' if data is None else 'input'} is quantized: it multiplies in float"


def _behind_the_activation(node: ir.Node) -> Iterator[str]:
    if not qgraph.ir.is_op(node, *_FUSED_BEHIND):
        return
    quantize = _producer(_producer(node, 0), 0)
    layer = _producer(quantize, 0)
    if quantize is None or layer is None or not qgraph.ir.is_op(quantize, "QuantizeLinear"):
        return
    if qgraph.ir.is_op(layer, *LAYERS) and len(quantize.outputs[0].uses()) == 1:
        yield f"a quantizer stands between it and '{qgraph.ir.node_label(layer)}', which it would be fused with"


def _residual(node: ir.Node) -> Iterator[str]:
    """A convolution takes an Add into its epilogue in 8 bits if what is added is quantized."""
    if not qgraph.ir.is_op(node, "Add") or len(node.inputs) != 2 or any(_is_stored(value) for value in node.inputs):
        return
    sums = [_is_quantized_sum(value) for value in node.inputs]
    quantized = [_dequantizer(node, index) is not None for index in (0, 1)]
    if any(sums) and not any(quantized):
        yield "the residual that it adds to a quantized convolution is not quantized"


def _one_scale(node: ir.Node) -> Iterator[str]:
    """What only moves 8-bit numbers can do so at one scale."""
    if not qgraph.ir.is_op(node, "Concat", "MaxPool"):
        return
    before = [_dequantizer(node, index) for index in range(len(node.inputs))]
    behind = [use.node for use in node.outputs[0].uses()]
    if None in before or not behind or not all(qgraph.ir.is_op(one, "QuantizeLinear") for one in behind):
        return
    scales = [qgraph.ir.constant(one.inputs[1]) for one in (*before, *behind) if one is not None]
    if len({array.tobytes() for array in scales if array is not None}) > 1:
        yield "what it reads and what it makes have different scales, so that it converts between them"


def _imported(node: ir.Node) -> Iterator[str]:
    low_bit = node.domain == "com.microsoft" and node.op_type.startswith(_LOW_BIT)
    if low_bit or qgraph.ir.is_op(node, *_INTEGERS):
        yield f"TensorRT imports no {node.op_type}"


RULES: Sequence[Rule] = (
    Rule("zero point", _IMPORTER, _zero_point),
    Rule("quantized type", _IMPORTER, _type),
    Rule("scale", _IMPORTER, _scale),
    Rule("activations per tensor", _IMPORTER, _per_tensor),
    Rule("Q and D in pairs", _OPERATORS, _in_pairs),
    Rule("Q before D", _OPERATORS, _from_integers),
    Rule("channel axis", _IMPORTER, _channel_axis),
    Rule("bias in float", _IMPORTER, _no_bias),
    Rule("all inputs of a layer", _PLACEMENT, _all_inputs),
    Rule("Q behind the activation", _PLACEMENT, _behind_the_activation),
    Rule("residual", _PLACEMENT, _residual),
    Rule("one scale", f"{_GUIDE}, Q/DQ limitations", _one_scale),
    Rule("operators", _OPERATORS, _imported),
)
"""Every rule about one node; those about the whole model are 'opset' and 'one quantized type' (the guide)."""


def _of_the_whole(model: ir.Model) -> Iterator[Skipped]:
    opset = model.graph.opset_imports.get("", 0)
    first: dict[ir.DataType, ir.Node] = {}
    for node in qgraph.ir.walk(model):
        dtype = node.outputs[0].dtype or _type_of_zero_point(node) if qgraph.ir.is_op(node, "QuantizeLinear") else None
        if dtype is not None:
            first.setdefault(dtype, node)
    if not first:
        return
    needed = _FLOAT8_OPSET if ir.DataType.FLOAT8E4M3FN in first else _AXIS_OPSET
    if opset < needed:
        label = qgraph.ir.node_label(next(iter(first.values())))
        yield Skipped(label, f"it needs opset {needed}, and the model has {opset} (opset)")
    if {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN} <= set(first):
        label = qgraph.ir.node_label(first[ir.DataType.FLOAT8E4M3FN])
        yield Skipped(label, "it quantizes to float8e4m3fn, and others to int8 (one quantized type)")


def _producer(node: ir.Node | None, index: int) -> ir.Node | None:
    value = node.inputs[index] if node is not None and index < len(node.inputs) else None
    return None if value is None else value.producer()


def _dequantizer(node: ir.Node, index: int) -> ir.Node | None:
    producer = _producer(node, index)
    return producer if qgraph.ir.is_op(producer, "DequantizeLinear") else None


def _is_quantized_sum(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    if value is None or producer is None or not qgraph.ir.is_op(producer, "Conv"):
        return False
    return _dequantizer(producer, 0) is not None and qgraph.ir.only_consumer(value) is not None


def _is_bias(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.INT32


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and (value.const_value is not None or qgraph.ir.is_op(value.producer(), "Constant"))


def _output_axis(node: ir.Node) -> int:
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return _OUTPUT_AXES[node.op_type]


def _size(value: ir.Value | None) -> int:
    array = qgraph.ir.constant(value)
    return 1 if array is None else array.size


def _type_of_zero_point(node: ir.Node) -> ir.DataType | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is not None:
        return value.dtype
    return ir.DataType(node.attributes.get_int("output_dtype", ir.DataType.UINT8.value))


def _first(array: np.ndarray) -> str:
    nonzero = array[array != 0] if array.ndim else array
    return f"{np.ravel(nonzero)[0]:g}"
