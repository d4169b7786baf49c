"""Shapes of what computes: elementwise operators, reductions, products, convolutions, quantization.

Source: the operator reference of ONNX, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qgraph.analysis import symbols
from qgraph.analysis.shape_facts import (
    Data,
    Dims,
    Fact,
    Facts,
    PartialDims,
    UnknownShapeError,
    agreed,
    axis_in,
    broadcast,
    dims_of,
    input_of,
    int_of,
    ints_of,
    is_never_negative,
    positive_ints,
    rule,
)
from qgraph.analysis.symbols import Dim

__all__: list[str] = []


# fmt: off
_LIKE_FIRST_INPUT = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Celu", "Clip", "Cos",
    "Cosh", "CumProd", "CumSum", "Elu", "Erf", "Exp", "Floor", "Gelu", "GroupNormalization", "HardSigmoid",
    "HardSwish", "Hardmax", "InstanceNormalization", "LRN", "LeakyRelu", "Log", "LogSoftmax", "LpNormalization",
    "MeanVarianceNormalization", "Mish", "Neg", "PRelu", "RMSNormalization", "Reciprocal", "Relu",
    "ReverseSequence", "RotaryEmbedding", "Round", "ScaledTanh", "Scatter", "ScatterElements", "ScatterND",
    "Selu", "Shrink", "Sigmoid", "Sign", "SimplifiedLayerNormalization", "Sin", "Sinh", "Softmax", "Softplus",
    "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "TensorScatter", "ThresholdedRelu", "Trilu",
)
_ARITHMETIC = (
    "Add", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Max", "Mean", "Min",
    "Mod", "Mul", "Pow", "Sub", "Sum",
)
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
# fmt: on


@rule(*_LIKE_FIRST_INPUT)
def _same(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[0]), dims_of(node, facts))]


_LIKE_FIRST_CONTRIBUTED = ("FastGelu", "BiasGelu", "QuickGelu", "Gelu", "SimplifiedLayerNormalization")
_SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


@rule(*_LIKE_FIRST_CONTRIBUTED, *_SKIP_NORMS, domain="com.microsoft")
def _same_contributed(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[0]), dims_of(node, facts))]


@rule("Identity")
def _identity(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[0]), dims_of(node, facts), facts.data(node.inputs[0]))]


@rule("IsNaN", "IsInf", "Not")
def _test(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(ir.DataType.BOOL, dims_of(node, facts))]


@rule("Dropout")
def _dropout(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = dims_of(node, facts)
    # The mask is boolean from opset 10 on only.
    return [Fact(facts.dtype(node.inputs[0]), dims, facts.data(node.inputs[0])), Fact(None, dims)]


@rule("Cast")
def _cast(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    to = ir.DataType(int_of(node, "to", 0))
    data = facts.data(node.inputs[0]) if to in (ir.DataType.INT64, ir.DataType.INT32) else None
    return [Fact(to, dims_of(node, facts), data)]


@rule("CastLike")
def _cast_like(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[1]), dims_of(node, facts))]


def _divide(one: Dim, other: Dim) -> Dim | None:
    if isinstance(one, int) and isinstance(other, int) and other:
        return abs(one) // abs(other) * (1 if (one < 0) == (other < 0) else -1)
    return symbols.floordiv(one, other) if is_never_negative(one) and is_never_negative(other) else None


def _equal(one: Dim, other: Dim) -> Dim | None:
    if one == other:
        return 1
    if isinstance(one, int) and isinstance(other, int):
        return 0
    number = one if isinstance(one, int) else other
    expression = other if isinstance(one, int) else one
    return 0 if isinstance(number, int) and number < 0 and is_never_negative(expression) else None


_ON_ELEMENTS: Mapping[str, Callable[[Dim, Dim], Dim | None]] = {
    "Add": symbols.add,
    "Sub": symbols.sub,
    "Mul": symbols.mul,
    "Div": _divide,
    "Equal": _equal,
    "Min": symbols.minimum,
    "Max": symbols.maximum,
}


def _aligned(*data: Data) -> list[tuple[Dim | None, ...]] | None:
    """Return the elements of several tensors, broadcast to one length; None if they do not fit."""
    length = max(len(one.elements) for one in data)
    if any(len(one.elements) not in (1, length) for one in data):
        return None
    return [one.elements * length if len(one.elements) == 1 else one.elements for one in data]


def _elements(node: ir.Node, facts: Facts) -> Data | None:
    function = _ON_ELEMENTS.get(node.op_type)
    if function is None or len(node.inputs) != 2:
        return None
    one, other = facts.data(node.inputs[0]), facts.data(node.inputs[1])
    aligned = _aligned(one, other) if one is not None and other is not None else None
    if one is None or other is None or aligned is None:
        return None
    pairs = zip(*aligned, strict=True)
    elements = tuple(None if left is None or right is None else function(left, right) for left, right in pairs)
    return Data(elements, one.scalar and other.scalar)


@rule(
    *[
        "Add",
        "BitShift",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Div",
        "Max",
        "Mean",
        "Min",
        "Mod",
        "Mul",
        "Pow",
        "Sub",
        "Sum",
    ]
)
def _arithmetic(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = broadcast(*(dims_of(node, facts, index) for index in range(len(node.inputs))))
    return [Fact(facts.dtype(node.inputs[0]), dims, _elements(node, facts))]


@rule(*["And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Or", "Xor"])
def _comparison(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(ir.DataType.BOOL, broadcast(dims_of(node, facts), dims_of(node, facts, 1)), _elements(node, facts))]


@rule("Where")
def _where(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = broadcast(*(dims_of(node, facts, index) for index in range(3)))
    known = [facts.data(value) for value in node.inputs]
    data = [one for one in known if one is not None]
    aligned = _aligned(*data) if len(data) == 3 else None
    elements = None
    if aligned is not None:
        chosen = (
            (one if test else other) if isinstance(test, int) else None
            for test, one, other in zip(*aligned, strict=True)
        )
        elements = Data(tuple(chosen), all(one.scalar for one in data))
    return [Fact(facts.dtype(node.inputs[1]), dims, elements)]


# --- reductions ------------------------------------------------------------------------------------------------------


@rule(
    *(f"Reduce{name}" for name in ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"])
)
def _reduce(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims, dtype = dims_of(node, facts), facts.dtype(node.inputs[0])
    keep = bool(int_of(node, "keepdims", 1))
    try:
        axes = ints_of(node, facts, "axes", 1)
    except UnknownShapeError:
        if not keep:
            raise
        return [Fact(dtype, (None,) * len(dims))]
    if not axes:
        if int_of(node, "noop_with_empty_axes", 0):
            return [Fact(dtype, dims, facts.data(node.inputs[0]))]
        axes = tuple(range(len(dims)))
    gone = {axis_in(axis, len(dims)) for axis in axes}
    left = tuple(1 if axis in gone else dim for axis, dim in enumerate(dims) if keep or axis not in gone)
    return [Fact(dtype, left, _reduced(node, facts, scalar=not left) if len(gone) == len(dims) else None)]


def _reduced(node: ir.Node, facts: Facts, *, scalar: bool) -> Data | None:
    data = facts.data(node.inputs[0])
    if data is None or node.op_type != "ReduceProd":
        return None
    known = [element for element in data.elements if element is not None]
    return Data((symbols.product(known),), scalar) if len(known) == len(data.elements) else None


@rule("ArgMax", "ArgMin")
def _arg(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = dims_of(node, facts)
    axis = axis_in(int_of(node, "axis", 0), len(dims))
    kept = (1,) if int_of(node, "keepdims", 1) else ()
    return [Fact(ir.DataType.INT64, (*dims[:axis], *kept, *dims[axis + 1 :]))]


@rule("TopK")
def _top_k(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = dims_of(node, facts)
    axis = axis_in(int_of(node, "axis", -1), len(dims))
    attribute, data = node.attributes.get("k"), facts.data(input_of(node, 1))
    k = attribute.as_int() if attribute is not None else data.elements[0] if data is not None else None
    left = (*dims[:axis], k, *dims[axis + 1 :])
    return [Fact(facts.dtype(node.inputs[0]), left), Fact(ir.DataType.INT64, left)]


@rule("LayerNormalization")
def _layer_norm(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = dims_of(node, facts)
    axis = axis_in(int_of(node, "axis", -1), len(dims))
    statistics = Fact(ir.DataType(int_of(node, "stash_type", 1)), (*dims[:axis], *(1,) * (len(dims) - axis)))
    return [Fact(facts.dtype(node.inputs[0]), dims), statistics, statistics]


@rule("BatchNormalization")
def _batch_norm(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    statistics = Fact(facts.dtype(input_of(node, 3)), dims_of(node, facts, 1))
    return [Fact(facts.dtype(node.inputs[0]), dims_of(node, facts)), *[statistics] * 4]


# --- products, convolutions and pooling ------------------------------------------------------------------------------


def _product(one: Dims, other: Dims) -> PartialDims:
    if not one or not other:
        raise UnknownShapeError("a factor is a scalar")
    rows, columns = one[-2:-1], other[-1:] if len(other) > 1 else ()
    return (*broadcast(one[:-2], other[:-2]), *rows, *columns)


@rule("MatMul")
def _matmul(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[0]), _product(dims_of(node, facts), dims_of(node, facts, 1)))]


@rule("MatMulInteger")
def _matmul_integer(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(ir.DataType.INT32, _product(dims_of(node, facts), dims_of(node, facts, 1)))]


@rule("QLinearMatMul")
def _qlinear_matmul(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[7]), _product(dims_of(node, facts), dims_of(node, facts, 3)))]


@rule("MatMulIntegerToFloat", domain="com.microsoft")
def _matmul_integer_to_float(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[2]), _product(dims_of(node, facts), dims_of(node, facts, 1)))]


@rule("DynamicQuantizeMatMul", domain="com.microsoft")
def _dynamic_quantize_matmul(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[0]), _product(dims_of(node, facts), dims_of(node, facts, 1)))]


@rule("MatMulNBits", "MatMulBnb4", domain="com.microsoft")
def _matmul_n_bits(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[0]), (*dims_of(node, facts)[:-1], int_of(node, "N", 0)))]


@rule("GatherBlockQuantized", domain="com.microsoft")
def _gather_block_quantized(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    table, indices = dims_of(node, facts), dims_of(node, facts, 1)
    if len(table) != 2 or int_of(node, "gather_axis", 0) != 0:
        raise UnknownShapeError("it looks up along another axis than the first of a matrix")
    packed = facts.dtype(node.inputs[0]) == ir.DataType.UINT8
    width = table[1]
    if packed and isinstance(width, int):
        width = width * 8 // int_of(node, "bits", 4)
    return [Fact(facts.dtype(node.inputs[2]), (*indices, width))]


@rule("QAttention", domain="com.microsoft")
def _qattention(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    width = symbols.floordiv(dims_of(node, facts, 1)[1], 3)
    return [Fact(facts.dtype(node.inputs[3]), (*dims_of(node, facts)[:-1], width))]


@rule("MultiHeadAttention", "GroupQueryAttention", domain="com.microsoft")
def _unpacked_attention(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    """Query, key and value apart, [batch, rows, heads * size], without a cache: as wide as the values of all heads."""
    query, value = dims_of(node, facts), dims_of(node, facts, 2)
    if len(query) != 3 or len(value) != 3 or len(node.outputs) > 1:
        raise UnknownShapeError("its heads are packed, or it keeps a cache")
    heads, groups = int_of(node, "num_heads", 1), int_of(node, "kv_num_heads", int_of(node, "num_heads", 1))
    width = symbols.floordiv(symbols.mul(value[-1], heads), groups)
    return [Fact(facts.dtype(node.inputs[0]), (*query[:-1], width))]


@rule("Gemm")
def _gemm(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    one, other = dims_of(node, facts), dims_of(node, facts, 1)
    rows = one[1] if int_of(node, "transA", 0) else one[0]
    columns = other[0] if int_of(node, "transB", 0) else other[1]
    return [Fact(facts.dtype(node.inputs[0]), (rows, columns))]


@rule("Einsum")
def _einsum(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    left, arrow, right = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    if "." in left or not arrow:
        raise UnknownShapeError("its equation has no explicit result")
    sizes: dict[str, Dim] = {}
    for index, letters in enumerate(left.split(",")):
        for letter, dim in zip(letters, dims_of(node, facts, index), strict=True):
            sizes[letter] = agreed([dim, sizes.get(letter, dim)])
    return [Fact(facts.dtype(node.inputs[0]), tuple(sizes[letter] for letter in right))]


@rule("Conv", "ConvInteger", "QLinearConv")
def _conv(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    weight_at = 3 if node.op_type == "QLinearConv" else 1
    dims, weight = dims_of(node, facts), dims_of(node, facts, weight_at)
    dtype = {"Conv": facts.dtype(node.inputs[0]), "ConvInteger": ir.DataType.INT32}.get(node.op_type)
    if node.op_type == "QLinearConv":
        dtype = facts.dtype(node.inputs[7])
    windows = _windows(node, dims[2:], weight[2:])
    return [Fact(dtype, (dims[0], weight[0], *windows))]


@rule("MaxPool", "AveragePool", "LpPool")
def _pool(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = dims_of(node, facts)
    kernel = positive_ints(node, "kernel_shape", len(dims) - 2)
    left = (*dims[:2], *_windows(node, dims[2:], kernel))
    return [Fact(facts.dtype(node.inputs[0]), left), Fact(ir.DataType.INT64, left)]


def _windows(node: ir.Node, sizes: Dims, kernel: Dims) -> list[Dim | None]:
    """Return how many windows fit along each axis."""
    rank = len(sizes)
    strides, dilations = positive_ints(node, "strides", rank), positive_ints(node, "dilations", rank)
    pads = node.attributes.get_ints("pads", [0] * 2 * rank)
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    ceil = bool(int_of(node, "ceil_mode", 0))
    counts: list[Dim | None] = []
    for axis, (size, width) in enumerate(zip(sizes, kernel, strict=True)):
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            counts.append(symbols.floordiv(symbols.add(size, strides[axis] - 1), strides[axis]))
            continue
        padding = 0 if mode == "VALID" else pads[axis] + pads[axis + rank]
        reach = symbols.add(symbols.mul(symbols.sub(width, 1), dilations[axis]), 1)
        counts.append(_fitting(symbols.sub(symbols.add(size, padding), reach), strides[axis], ceil=ceil))
    return counts


def _fitting(room: Dim, stride: int, *, ceil: bool) -> Dim | None:
    if isinstance(room, int) and room < 0:
        raise UnknownShapeError("its kernel is larger than its input")
    if ceil and not (isinstance(room, int) and room % stride == 0):
        return None  # implementations differ on whether a window may start in the padding
    quotient = symbols.floordiv(room, stride)
    return None if quotient is None else symbols.add(quotient, 1)


@rule("ConvTranspose")
def _conv_transpose(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims, weight = dims_of(node, facts), dims_of(node, facts, 1)
    rank = len(dims) - 2
    strides, dilations = positive_ints(node, "strides", rank), positive_ints(node, "dilations", rank)
    pads = node.attributes.get_ints("pads", [0] * 2 * rank)
    extra = node.attributes.get_ints("output_padding", [0] * rank)
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    given = node.attributes.get("output_shape")
    sizes: list[Dim] = []
    for axis in range(rank):
        stretched = symbols.mul(dims[axis + 2], strides[axis])
        reach = symbols.add(symbols.mul(symbols.sub(weight[axis + 2], 1), dilations[axis]), 1)
        padding = 0 if mode == "VALID" else pads[axis] + pads[axis + rank]
        full = symbols.add(symbols.add(symbols.sub(stretched, strides[axis]), reach), extra[axis] - padding)
        sizes.append(stretched if mode.startswith("SAME") else full)
    channels = symbols.mul(weight[1], int_of(node, "group", 1))
    last = tuple(given.as_ints())[-rank:] if given is not None else tuple(sizes)
    return [Fact(facts.dtype(node.inputs[0]), (dims[0], channels, *last))]


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = dims_of(node, facts)
    return [Fact(facts.dtype(node.inputs[0]), (*dims[:2], *(1,) * (len(dims) - 2)))]


@rule("LSTM", "GRU", "RNN")
def _recurrent(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    x, r = dims_of(node, facts), dims_of(node, facts, 2)
    directions, hidden, dtype = r[0], r[2], facts.dtype(node.inputs[0])
    if int_of(node, "layout", 0):
        batch, length = x[:2]
        states = Fact(dtype, (batch, directions, hidden))
        return [Fact(dtype, (batch, length, directions, hidden)), states, states]
    length, batch = x[:2]
    states = Fact(dtype, (directions, batch, hidden))
    return [Fact(dtype, (length, directions, batch, hidden)), states, states]


# --- quantization ----------------------------------------------------------------------------------------------------


@rule("QuantizeLinear")
def _quantize(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    asked = int_of(node, "output_dtype", 0)
    zero_point = input_of(node, 2)
    default = facts.dtype(zero_point) if zero_point is not None else ir.DataType.UINT8
    return [Fact(ir.DataType(asked) if asked else default, dims_of(node, facts))]


@rule("DequantizeLinear")
def _dequantize(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    asked = int_of(node, "output_dtype", 0)
    return [Fact(ir.DataType(asked) if asked else facts.dtype(node.inputs[1]), dims_of(node, facts))]


@rule("DynamicQuantizeLinear")
def _dynamic_quantize(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(ir.DataType.UINT8, dims_of(node, facts)), Fact(ir.DataType.FLOAT, ()), Fact(ir.DataType.UINT8, ())]
