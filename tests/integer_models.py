"""Random small models of integer operators and integer functions, for property tests of whatever runs them.

Every model is of static shapes, of one rounding, and proven not to overflow by the sizes drawn here: tensors are of
8 bits with any zero point, or of 16 bits with zero point 0, and int32 lies only between an operator and the
Requantize that follows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.numerics.requantize import ROUNDINGS, fixed_point
from qgraph.passes._integer_functions import call

Array = np.ndarray
U8, I8, I16, I32 = (np.dtype(dtype) for dtype in (np.uint8, np.int8, np.int16, np.int32))
MOST_ELEMENTS = 2000
MOST_TERMS = 256


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value with what is known of it."""

    value: ir.Value
    shape: tuple[int, ...]
    dtype: np.dtype
    zero_point: int = 0

    @property
    def is_narrow(self) -> bool:
        return self.dtype in (U8, I8)


class Builder:
    """A model that grows by one operation at a time.

    Args:
        seed: of all that is random.
        bare: the share of accumulators that are outputs of the model as they are.
    """

    def __init__(self, seed: int, bare: float = 0.0) -> None:
        self.bare = bare
        self.random = np.random.default_rng(seed)
        self.model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="random"), ir_version=10)
        self.rounding = self.choice(list(ROUNDINGS))
        self.tensors: list[Tensor] = []
        self.ends: list[Tensor] = []

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(self.random.integers(len(options)))]

    def between(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high, endpoint=True))

    def any_zero_point(self, dtype: np.dtype) -> int:
        limits = np.iinfo(dtype)
        return 0 if dtype == I16 else self.choice([0, limits.min, self.between(limits.min, limits.max)])

    def input(self, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        value = ir.Value(name=f"x{len(self.tensors)}", shape=ir.Shape(shape))
        value.dtype = ir.DataType.from_numpy(dtype)
        self.model.graph.inputs.append(value)
        return Tensor(value, shape, dtype, self.any_zero_point(dtype))

    def constant(self, array: Any, dtype: Any = np.int64) -> ir.Value:
        return qgraph.ir.initializer(self.model.graph, "k", np.asarray(array, dtype))

    def numbers(self, shape: tuple[int, ...], low: int, high: int, dtype: Any) -> ir.Value:
        return self.constant(self.random.integers(low, high, shape, endpoint=True), dtype)

    def append(self, node: ir.Node, shape: tuple[int, ...], dtype: np.dtype, zero_point: int = 0) -> Tensor:
        value = node.outputs[0]
        value.name = qgraph.ir.fresh_name(self.model.graph, node.op_type.lower())
        value.shape, value.dtype = ir.Shape(shape), ir.DataType.from_numpy(dtype)
        self.model.graph.append(node)
        return Tensor(value, shape, dtype, zero_point)

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], shape: tuple[int, ...], like: Tensor, **attributes: Any
    ) -> Tensor:
        """Append a node whose result is of the type and zero point of `like`."""
        return self.append(ir.node(op_type, inputs, attributes), shape, like.dtype, like.zero_point)

    def int32(
        self, op_type: str, inputs: Sequence[ir.Value | None], shape: tuple[int, ...], **attributes: Any
    ) -> Tensor:
        return self.append(ir.node(op_type, inputs, attributes), shape, I32)

    def function(self, name: str, x: Tensor, *parameters: ir.Value) -> Tensor:
        return self.append(call(self.model, name, [x.value, *parameters]), x.shape, I32)

    def wide(self, x: Tensor) -> Tensor:
        """Return `x` less its zero point, in int32."""
        cast = self.int32("Cast", [x.value], x.shape, to=ir.DataType.INT32)
        if x.zero_point == 0:
            return cast
        return self.int32("Sub", [cast.value, self.constant(x.zero_point, I32)], x.shape)

    def requantize(self, x: Tensor, size: float, dtype: np.dtype | None = None, axis: int | None = None) -> Tensor:
        """Bring int32 of about `size` to 8 or 16 bits, with a scale of its own for each index along `axis`."""
        if self.bare and self.random.random() < self.bare:
            return x
        dtype = self.choice([U8, I8, U8, I8, I16]) if dtype is None else dtype
        limits = np.iinfo(dtype)
        channels = [1] * len(x.shape) if axis is None else [n if i == axis else 1 for i, n in enumerate(x.shape)]
        channels = channels[axis:] if axis is not None else []
        spread = (limits.max - limits.min) / 2 * 2.0 ** self.random.uniform(-1.5, 0.5, channels) / max(size, 1.0)
        if self.between(0, 9) == 0:
            spread = 2.0 ** np.round(np.log2(spread))
        multiplier, shift = fixed_point(spread)
        zero_point = self.any_zero_point(dtype) if dtype in (U8, I8) else 0
        low = self.choice([limits.min, limits.min, zero_point])
        high = self.choice([limits.max, limits.max, max(low, limits.max - self.between(0, 60))])
        scalars = [self.constant(number, dtype) for number in (zero_point, low, high)]
        parameters = [x.value, self.constant(multiplier, I32), self.constant(shift, I32), *scalars]
        node = call(self.model, "Requantize", parameters, self.rounding)
        return self.append(node, x.shape, np.dtype(dtype), zero_point)

    def grow(self, operations: Sequence[Operation]) -> bool:
        """Apply a random operation to a random tensor; tell whether it fitted."""
        source = self.choice(self.tensors[-4:])
        result = self.choice(operations)(self, source)
        if result is None or np.prod(result.shape) > MOST_ELEMENTS:
            return False
        # Nothing else takes accumulators, which are proven not to overflow for one operation.
        (self.ends if result.dtype == I32 else self.tensors).append(result)
        return True


Operation = Callable[[Builder, Tensor], Tensor | None]


def convolution(b: Builder, x: Tensor) -> Tensor | None:
    """ConvInteger, a bias and Requantize; grouped, strided, dilated and padded at random."""
    if not x.is_narrow or len(x.shape) not in (3, 4):
        return None
    batch, channels, *sizes = x.shape
    groups = b.choice([group for group in range(1, channels + 1) if channels % group == 0])
    outputs = groups * (b.between(1, 2) if groups > 1 else b.between(1, 6))
    kernel = [b.between(1, min(3, size)) for size in sizes]
    if channels // groups * np.prod(kernel) > MOST_TERMS:
        return None
    attributes, places = windows(b, sizes, kernel)
    weight = b.numbers((outputs, channels // groups, *kernel), -127, 127, I8)
    zero_point = [b.constant(x.zero_point, x.dtype)] if x.zero_point or b.between(0, 1) else []
    if groups > 1 or b.between(0, 1):
        attributes["group"] = groups
    shape = (batch, outputs, *places)
    total = b.int32("ConvInteger", [x.value, weight, *zero_point], shape, **attributes)
    if b.between(0, 3):
        bias = b.numbers((outputs, *[1] * len(sizes)), -(1 << 14), 1 << 14, I32)
        total = b.int32("Add", [total.value, bias], shape)
    terms = channels // groups * float(np.prod(kernel))
    return b.requantize(total, 100 * 73 * terms**0.5, axis=b.choice([None, 1]))


def windows(b: Builder, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    rank = len(sizes)
    strides, pads = [b.between(1, 2) for _ in sizes], [0] * 2 * rank
    dilations = [b.between(1, 2) if 2 * width - 1 <= size else 1 for size, width in zip(sizes, kernel, strict=True)]
    reach = [(width - 1) * dilation + 1 for width, dilation in zip(kernel, dilations, strict=True)]
    if b.between(0, 1):
        pads = [b.between(0, width - 1) for width in [*kernel, *kernel]]
    attributes: dict[str, Any] = {
        "kernel_shape": list(kernel),
        "strides": strides,
        "pads": pads,
        "dilations": dilations,
    }
    places = [
        (size + pads[axis] + pads[axis + rank] - reach[axis]) // strides[axis] + 1 for axis, size in enumerate(sizes)
    ]
    return attributes, places


def average_pool(b: Builder, x: Tensor) -> Tensor | None:
    """A depthwise convolution with ones, which Requantize divides."""
    if not x.is_narrow or len(x.shape) not in (3, 4):
        return None
    batch, channels, *sizes = x.shape
    kernel = [b.between(1, min(3, size)) for size in sizes]
    attributes, places = windows(b, sizes, kernel)
    weight = b.constant(np.ones((channels, 1, *kernel)), I8)
    inputs = [x.value, weight, b.constant(x.zero_point, x.dtype)]
    total = b.int32("ConvInteger", inputs, (batch, channels, *places), group=channels, **attributes)
    return b.requantize(total, 128 * float(np.prod(kernel)), x.dtype)


def max_pool(b: Builder, x: Tensor) -> Tensor | None:
    if not x.is_narrow or len(x.shape) not in (3, 4):
        return None
    kernel = [b.between(1, min(3, size)) for size in x.shape[2:]]
    attributes, places = windows(b, x.shape[2:], kernel)
    return b.node("MaxPool", [x.value], (*x.shape[:2], *places), x, **attributes)


def global_sum(b: Builder, x: Tensor) -> Tensor | None:
    """ReduceSum over some axes and Requantize: a mean."""
    if len(x.shape) < 2:
        return None
    axes = tuple(range(b.between(1, len(x.shape) - 1), len(x.shape)))
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    total = b.int32("ReduceSum", [b.wide(x).value, b.constant(axes)], shape)
    return b.requantize(total, float(np.iinfo(x.dtype).max) * float(np.prod([x.shape[axis] for axis in axes])) ** 0.5)


def product(b: Builder, x: Tensor) -> Tensor | None:
    """MatMulInteger by a constant, a bias and Requantize."""
    if not x.is_narrow or len(x.shape) < 2 or x.shape[-1] > MOST_TERMS:
        return None
    outputs = b.between(1, 8)
    inputs = [x.value, b.numbers((x.shape[-1], outputs), -127, 127, I8), b.constant(x.zero_point, x.dtype)]
    total = b.int32("MatMulInteger", inputs, (*x.shape[:-1], outputs))
    if b.between(0, 1):
        total = b.int32("Add", [total.value, b.numbers((outputs,), -(1 << 14), 1 << 14, I32)], total.shape)
    return b.requantize(total, 100 * 73 * x.shape[-1] ** 0.5, axis=b.choice([None, len(x.shape) - 1]))


def attention_product(b: Builder, x: Tensor) -> Tensor | None:
    """MatMulInteger of a tensor by its own transpose: both with zero points."""
    if not x.is_narrow or len(x.shape) < 2 or x.shape[-1] > MOST_TERMS:
        return None
    order = [*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2]
    turned = b.node("Transpose", [x.value], tuple(x.shape[axis] for axis in order), x, perm=order)
    zero_point = b.constant(x.zero_point, x.dtype)
    shape = (*x.shape[:-1], x.shape[-2])
    total = b.int32("MatMulInteger", [x.value, turned.value, zero_point, zero_point], shape)
    return b.requantize(total, 100 * 100 * x.shape[-1] ** 0.5)


def table(b: Builder, x: Tensor) -> Tensor | None:
    """Any function of an 8-bit number, looked up."""
    if not x.is_narrow:
        return None
    dtype = b.choice([U8, I8, I16])
    index = b.int32("Cast", [x.value], x.shape, to=ir.DataType.INT32)
    if x.dtype == I8:
        index = b.int32("Add", [index.value, b.constant(128, I32)], x.shape)
    limits = np.iinfo(dtype)
    entries = b.numbers((256,), limits.min, limits.max, dtype)
    like = Tensor(x.value, x.shape, dtype, b.any_zero_point(dtype))
    return b.node("Gather", [entries, index.value], x.shape, like)


def interpolated_table(b: Builder, x: Tensor) -> Tensor | None:
    if x.dtype != I16:
        return None
    entries = np.rint(np.tanh(np.linspace(-4, 4, 513)) * 127 * 128) * b.choice([1, -1, 200])
    return b.requantize(
        b.function("TableInterpolate", x, b.constant(entries, I32)), 127 if entries.max() < 1e5 else 25000
    )


def sum_of_two(b: Builder, x: Tensor) -> Tensor | None:
    return _two(b, x, "Add")


def difference_of_two(b: Builder, x: Tensor) -> Tensor | None:
    return _two(b, x, "Sub")


def _two(b: Builder, x: Tensor, op_type: str) -> Tensor | None:
    """Two tensors brought to one scale in int32, added and brought down."""
    other = b.choice([tensor for tensor in b.tensors if tensor.shape == x.shape])
    sides = [_rescaled(b, tensor) for tensor in (x, other)]
    total = b.int32(op_type, [side.value for side in sides], x.shape)
    return b.requantize(total, 1 << 20)


def _rescaled(b: Builder, x: Tensor) -> Tensor:
    multiplier, shift = fixed_point(2.0**20 / np.iinfo(x.dtype).max * b.random.uniform(0.3, 1.0))
    limits = np.iinfo(I32)
    scalars = [b.constant(number, I32) for number in (multiplier, shift, 0, limits.min, limits.max)]
    return b.append(call(b.model, "Requantize", [b.wide(x).value, *scalars], b.rounding), x.shape, I32)


def product_of_two(b: Builder, x: Tensor) -> Tensor | None:
    other = b.choice([tensor for tensor in b.tensors if tensor.shape == x.shape])
    if x.dtype == other.dtype == I16:
        return None
    total = b.int32("Mul", [b.wide(x).value, b.wide(other).value], x.shape)
    return b.requantize(total, np.iinfo(x.dtype).max / 2 * np.iinfo(other.dtype).max)


def concatenation(b: Builder, x: Tensor) -> Tensor | None:
    axis = b.between(0, len(x.shape) - 1)
    fits = [tensor for tensor in b.tensors if tensor.dtype == x.dtype and _beside(tensor.shape, x.shape, axis)]
    parts = [x, *(b.choice(fits) for _ in range(b.between(1, 2)))]
    shape = tuple(sum(part.shape[axis] for part in parts) if i == axis else n for i, n in enumerate(x.shape))
    return b.node("Concat", [part.value for part in parts], shape, x, axis=axis)


def _beside(one: tuple[int, ...], other: tuple[int, ...], axis: int) -> bool:
    return len(one) == len(other) and one[:axis] + one[axis + 1 :] == other[:axis] + other[axis + 1 :]


def softmax(b: Builder, x: Tensor) -> Tensor | None:
    steps = b.between(4, 64)
    entries = np.rint((1 << 15) * np.exp(-np.arange(steps + 1) * b.random.uniform(6, 11) / steps))
    divisor = b.between(1, 1 + np.iinfo(x.dtype).max * 2 // steps)
    one = b.choice([255, 32767, 1 << 15])
    parameters = [b.constant(entries, I32), b.constant(divisor, I32), b.constant(one, I32)]
    return b.requantize(b.function("Softmax", b.wide(x), *parameters), one)


def layer_norm(b: Builder, x: Tensor) -> Tensor | None:
    return _normalized(b, x, "LayerNormalize")


def rms_norm(b: Builder, x: Tensor) -> Tensor | None:
    return _normalized(b, x, "RMSNormalize")


def _normalized(b: Builder, x: Tensor, name: str) -> Tensor:
    fraction, epsilon, one = 1 << b.between(0, 8), b.between(0, 1 << 10), b.choice([1 << 7, 1 << 12])
    return b.requantize(b.function(name, b.wide(x), *map(b.constant, (fraction, epsilon, one))), 2 * one)


def change_of_type(b: Builder, x: Tensor) -> Tensor | None:
    return b.requantize(b.wide(x), float(np.iinfo(x.dtype).max))


def transposition(b: Builder, x: Tensor) -> Tensor | None:
    order = b.random.permutation(len(x.shape)).tolist()
    return b.node("Transpose", [x.value], tuple(x.shape[axis] for axis in order), x, perm=order)


def reshape(b: Builder, x: Tensor) -> Tensor | None:
    axis = b.between(0, len(x.shape) - 1)
    size = x.shape[axis]
    first = b.choice([part for part in range(1, size + 1) if size % part == 0])
    split = (*x.shape[:axis], first, size // first, *x.shape[axis + 1 :])
    joined = (*x.shape[: axis - 1], x.shape[axis - 1] * size, *x.shape[axis + 1 :])
    shape = split if len(x.shape) < 4 and (axis == 0 or b.between(0, 1)) else joined if axis else x.shape
    return b.node("Reshape", [x.value, b.constant(shape)], shape, x)


def cut(b: Builder, x: Tensor) -> Tensor | None:
    """Slice, with a step that may be negative."""
    axis = b.between(0, len(x.shape) - 1)
    step = b.choice([1, 2, -1])
    start, end = (0, b.between(1, x.shape[axis])) if step > 0 else (-1, -x.shape[axis] - 1)
    size = len(range(x.shape[axis])[start : end if step > 0 else None : step])
    shape = tuple(size if i == axis else n for i, n in enumerate(x.shape))
    return b.node("Slice", [x.value, *(b.constant([number]) for number in (start, end, axis, step))], shape, x)


def picked(b: Builder, x: Tensor) -> Tensor | None:
    """Gather of some indices along an axis."""
    axis = b.between(0, len(x.shape) - 1)
    count = b.between(1, 6)
    indices = b.numbers((count,), -x.shape[axis], x.shape[axis] - 1, np.int64)
    shape = tuple(count if i == axis else n for i, n in enumerate(x.shape))
    return b.node("Gather", [x.value, indices], shape, x, axis=axis)


def padding(b: Builder, x: Tensor) -> Tensor | None:
    if not x.is_narrow:
        return None
    mode = b.choice(["constant", "edge", "reflect"])
    pads = [b.between(0, min(2, size - 1)) for size in (*x.shape, *x.shape)]
    shape = tuple(n + pads[i] + pads[i + len(x.shape)] for i, n in enumerate(x.shape))
    value = [b.constant(x.zero_point, x.dtype)] if mode == "constant" else []
    return b.node("Pad", [x.value, b.constant(pads), *value], shape, x, mode=mode)


def repetition(b: Builder, x: Tensor) -> Tensor | None:
    repeats = [b.between(1, 2) for _ in x.shape]
    shape = tuple(np.multiply(x.shape, repeats).tolist())
    return b.node("Tile", [x.value, b.constant(repeats)], shape, x)


def enlargement(b: Builder, x: Tensor) -> Tensor | None:
    """Resize to the nearest by whole numbers."""
    if not x.is_narrow or len(x.shape) != 4:
        return None
    scales = [1, 1, b.between(1, 3), b.between(1, 3)]
    shape = tuple(np.multiply(x.shape, scales).tolist())
    return b.node(
        "Resize",
        [x.value, None, b.constant(scales, np.float32)],
        shape,
        x,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def limits(b: Builder, x: Tensor) -> Tensor | None:
    """Clip, Max or Min with constants."""
    if not x.is_narrow:
        return None
    low, high = sorted(b.between(np.iinfo(x.dtype).min, np.iinfo(x.dtype).max) for _ in range(2))
    bounds = [b.constant(number, x.dtype) for number in (low, high)]
    op_type = b.choice(["Clip", "Max", "Min"])
    return b.node(op_type, [x.value, *(bounds if op_type == "Clip" else bounds[:1])], x.shape, x)


def choice_of_two(b: Builder, x: Tensor) -> Tensor | None:
    """Where one of two tensors is chosen by a comparison."""
    fits = [tensor for tensor in b.tensors if (tensor.shape, tensor.dtype) == (x.shape, x.dtype)]
    if not x.is_narrow:
        return None
    other = b.choice(fits)
    comparison = b.choice(["Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual"])
    limit = b.constant(b.between(np.iinfo(x.dtype).min, np.iinfo(x.dtype).max), x.dtype)
    test = b.append(ir.node(comparison, [x.value, limit]), x.shape, np.dtype(bool))
    return b.node("Where", [test.value, x.value, other.value], x.shape, x)


def greatest(b: Builder, x: Tensor) -> Tensor | None:
    """ReduceMax or ReduceMin along an axis, which stays."""
    if not x.is_narrow:
        return None
    axis = b.between(0, len(x.shape) - 1)
    shape = tuple(1 if i == axis else n for i, n in enumerate(x.shape))
    return b.node(b.choice(["ReduceMax", "ReduceMin"]), [x.value, b.constant([axis])], shape, x)


def order(b: Builder, x: Tensor) -> Tensor | None:
    """TopK: the elements, and where they were."""
    axis = b.between(0, len(x.shape) - 1)
    count = b.between(1, x.shape[axis])
    attributes = {"axis": axis, "largest": b.between(0, 1)}
    node = ir.node("TopK", [x.value, b.constant([count])], attributes, num_outputs=2)
    shape = tuple(count if i == axis else n for i, n in enumerate(x.shape))
    places = node.outputs[1]
    places.name = qgraph.ir.fresh_name(b.model.graph, "places")
    places.shape, places.dtype = ir.Shape(shape), ir.DataType.INT64
    b.ends.append(Tensor(places, shape, np.dtype(np.int64)))
    return b.append(node, shape, x.dtype, x.zero_point)


def scattered_elements(b: Builder, x: Tensor) -> Tensor | None:
    """ScatterElements of one tensor into another along an axis; the last of several at one place stays."""
    other = b.choice([tensor for tensor in b.tensors if (tensor.shape, tensor.dtype) == (x.shape, x.dtype)])
    axis = b.between(0, len(x.shape) - 1)
    indices = b.numbers(x.shape, -x.shape[axis], x.shape[axis] - 1, np.int64)
    return b.node("ScatterElements", [x.value, indices, other.value], x.shape, x, axis=axis)


def scattered_parts(b: Builder, x: Tensor) -> Tensor | None:
    """ScatterND of a tensor's parts at other places of it."""
    places = b.numbers((x.shape[0], 1), -x.shape[0], x.shape[0] - 1, np.int64)
    return b.node("ScatterND", [x.value, places, x.value], x.shape, x)


def running_sum(b: Builder, x: Tensor) -> Tensor | None:
    axis = b.between(0, len(x.shape) - 1)
    attributes = {"exclusive": b.between(0, 1), "reverse": b.between(0, 1)}
    total = b.int32("CumSum", [b.wide(x).value, b.constant(axis)], x.shape, **attributes)
    return b.requantize(total, float(np.iinfo(x.dtype).max) * x.shape[axis] ** 0.5)


OPERATIONS: Mapping[str, Operation] = {
    operation.__name__: operation
    for operation in (
        convolution, average_pool, max_pool, global_sum, product, attention_product, table, interpolated_table,
        sum_of_two, difference_of_two, product_of_two, concatenation, softmax, layer_norm, rms_norm, change_of_type,
        transposition, reshape, cut, picked, padding, repetition, enlargement, limits, choice_of_two, greatest,
        order, scattered_elements, scattered_parts, running_sum,
    )
}  # fmt: skip
"""By name, for tests of what does not know them all."""


def random_integer_model(seed: int, operations: Sequence[str] = tuple(OPERATIONS), bare: float = 0.0) -> ir.Model:
    """Return a model of one or two inputs and three to ten operations; what nothing reads are its outputs.

    Args:
        seed: the same seed and operations give the same model.
        operations: the names of those that may occur, of `OPERATIONS`.
        bare: the share of accumulators that are outputs as they are, which spares the many nodes of Requantize's body.
    """
    b = Builder(seed, bare)
    rank = b.choice([2, 3, 4, 4])
    shape = (b.between(1, 2), *(b.between(1, 6 if axis == 0 else 9) for axis in range(rank - 1)))
    b.tensors.extend(b.input(shape, b.choice([U8, I8, U8, I8, I16])) for _ in range(b.between(1, 2)))
    wanted = b.between(3, 10)
    known = [OPERATIONS[name] for name in operations]
    for _ in range(10 * wanted):
        wanted -= b.grow(known)
        if not wanted:
            break
    _finish(b)
    return b.model


def _finish(b: Builder) -> None:
    """Make outputs of the tensors that nothing reads, and drop the rest."""
    ends = [tensor for tensor in [*b.tensors, *b.ends] if not tensor.value.uses()]
    outputs = [tensor.value for tensor in ends if not tensor.value.is_graph_input()] or [
        b.node("Identity", [b.tensors[0].value], b.tensors[0].shape, b.tensors[0]).value
    ]
    b.model.graph.outputs.extend(outputs)
    for node in reversed(list(b.model.graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            b.model.graph.remove(node, safe=True)
    for name in [name for name, value in b.model.graph.initializers.items() if not value.uses()]:
        del b.model.graph.initializers[name]


def random_integer_feeds(model: ir.Model, seed: int) -> dict[str, Array]:
    """Return arrays over the whole range of each input's type, the ends of it more often than chance has it."""
    random = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        limits = np.iinfo(value.dtype.numpy())
        shape = tuple(value.shape.numpy())
        numbers = random.integers(limits.min, limits.max, shape, endpoint=True)
        numbers = np.where(random.random(shape) < 0.1, random.choice([limits.min, limits.max], shape), numbers)
        feeds[value.name] = numbers.astype(limits.dtype)
    return feeds
