"""Random small float networks, for property tests of what quantizes or rewrites whole networks.

Images [2, channels, height, width] or tokens [2, length, width] go through a random series of layers, functions,
residual sums, joins and movements; one to three of the tensors at the end are outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir

FUNCTIONS = ("Relu", "Sigmoid", "Tanh", "HardSwish", "Elu", "Erf", "Exp", "Abs", "Softplus", "LeakyRelu", "Neg", "Gelu")
MOST_ELEMENTS = 1500


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value of the network with its shape."""

    value: ir.Value
    shape: tuple[int, ...]


class Network:
    """A network that grows by one operation at a time."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="random"), ir_version=10)
        image = self.between(0, 1)
        shape = (2, self.between(1, 6), self.between(3, 7), self.between(3, 7))
        self.tensors = [self._input("x", shape if image else (2, self.between(2, 6), self.between(2, 12)))]

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(self.random.integers(len(options)))]

    def between(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high, endpoint=True))

    def _input(self, name: str, shape: tuple[int, ...]) -> Tensor:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self.model.graph.inputs.append(value)
        return Tensor(value, shape)

    def constant(self, array: Any, dtype: Any = np.float32) -> ir.Value:
        return qgraph.ir.initializer(self.model.graph, "c", np.asarray(array, dtype))

    def weight(self, *shape: int) -> ir.Value:
        size = float(np.sqrt(max(np.prod(shape[1:]), 1)))
        return self.constant(self.random.normal(size=shape) / size)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        dtype: ir.DataType | None = None,
        *,
        count: int = 1,
        **attributes: Any,
    ) -> Tensor:
        """Append a node, and return the first of its outputs; the others are of whole numbers."""
        node = ir.node(op_type, inputs, attributes, num_outputs=count)
        output, *others = node.outputs
        for other in others:
            other.name, other.dtype = qgraph.ir.fresh_name(self.model.graph, "other"), ir.DataType.INT64
            other.shape = ir.Shape(shape)
        output.name = qgraph.ir.fresh_name(self.model.graph, op_type.lower())
        output.shape, output.dtype = ir.Shape(shape), dtype or ir.DataType.FLOAT
        self.model.graph.append(node)
        return Tensor(output, tuple(shape))

    def like(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape, the same one if there is no other."""
        return self.choice([tensor for tensor in self.tensors if tensor.shape == x.shape])

    def grow(self) -> None:
        source = self.choice(self.tensors[-3:])
        result = self.choice(OPERATIONS)(self, source)
        if result is not None and np.prod(result.shape) <= MOST_ELEMENTS:
            self.tensors.append(result)


Operation = Callable[[Network, Tensor], Tensor | None]


def convolution(n: Network, x: Tensor) -> Tensor | None:
    if len(x.shape) != 4:
        return None
    batch, channels, *sizes = x.shape
    groups = n.choice([1, 1, channels])
    outputs, kernel = groups * n.between(1, 4 if groups == 1 else 1), n.between(1, min(3, *sizes))
    pads, stride = n.between(0, kernel - 1), n.between(1, 2)
    places = [(size + 2 * pads - kernel) // stride + 1 for size in sizes]
    inputs = [x.value, n.weight(outputs, channels // groups, kernel, kernel)]
    inputs += [n.weight(outputs)] if n.between(0, 1) else []
    shape = (batch, outputs, *places)
    result = n.node("Conv", inputs, shape, group=groups, pads=[pads] * 4, strides=[stride] * 2)
    if n.between(0, 3) == 0:
        result = n.node(n.choice(["Mul", "Add", "Sub"]), [result.value, n.weight(outputs, 1, 1)], shape)
    return clamped(n, result)


def clamped(n: Network, x: Tensor) -> Tensor:
    kind = n.between(0, 3)
    if kind == 0:
        return n.node("Relu", [x.value], x.shape)
    return n.node("Clip", [x.value, n.constant(-0.5), n.constant(1.0)], x.shape) if kind == 1 else x


def product(n: Network, x: Tensor) -> Tensor | None:
    outputs = n.between(1, 8)
    result = n.node("MatMul", [x.value, n.weight(x.shape[-1], outputs)], (*x.shape[:-1], outputs))
    if n.between(0, 1):
        result = n.node("Add", [result.value, n.weight(outputs)], result.shape)
    return clamped(n, result)


def classifier(n: Network, x: Tensor) -> Tensor | None:
    width, outputs = int(np.prod(x.shape[1:])), n.between(1, 6)
    flat = n.node("Flatten", [x.value], (x.shape[0], width))
    return n.node("Gemm", [flat.value, n.weight(outputs, width), n.weight(outputs)], (x.shape[0], outputs), transB=1)


def attention(n: Network, x: Tensor) -> Tensor | None:
    if len(x.shape) != 3:
        return None
    batch, length, width = x.shape
    turned = n.node("Transpose", [x.value], (batch, width, length), perm=[0, 2, 1])
    scores = n.node("MatMul", [x.value, turned.value], (batch, length, length))
    scaled = n.node("Mul", [scores.value, n.constant(0.35)], scores.shape)
    shares = n.node("Softmax", [scaled.value], scores.shape)
    return n.node("MatMul", [shares.value, x.value], x.shape)


def function(n: Network, x: Tensor) -> Tensor | None:
    return n.node(n.choice(FUNCTIONS), [x.value], x.shape)


def gate(n: Network, x: Tensor) -> Tensor | None:
    gated = n.node("Sigmoid", [x.value], x.shape)
    return n.node("Mul", [x.value, gated.value], x.shape)


def arithmetic(n: Network, x: Tensor) -> Tensor | None:
    op_type = n.choice(["Add", "Add", "Sub", "Mul", "Max", "Min"])
    return n.node(op_type, [x.value, n.like(x).value], x.shape)


def with_constant(n: Network, x: Tensor) -> Tensor | None:
    return n.node(n.choice(["Add", "Mul", "Sub"]), [x.value, n.weight(x.shape[-1])], x.shape)


def quotient(n: Network, x: Tensor) -> Tensor | None:
    below = n.node("Softplus", [n.like(x).value], x.shape)
    more = n.node("Add", [below.value, n.constant(0.5)], x.shape)
    return n.node("Div", [x.value, more.value], x.shape)


def choice_of_two(n: Network, x: Tensor) -> Tensor | None:
    truth = n.node("Greater", [x.value, n.constant(0.2)], x.shape, ir.DataType.BOOL)
    return n.node("Where", [truth.value, x.value, n.like(x).value], x.shape)


def comparison(n: Network, x: Tensor) -> Tensor | None:
    op_type, other = n.choice(["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]), n.like(x)
    truth = n.node(op_type, [x.value, other.value], x.shape, ir.DataType.BOOL)
    return n.node("Where", [truth.value, x.value, other.value], x.shape)


def order(n: Network, x: Tensor) -> Tensor | None:
    axis = n.between(1, len(x.shape) - 1)
    count = n.between(1, x.shape[axis])
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    attributes = {"axis": axis, "largest": n.between(0, 1)}
    return n.node("TopK", [x.value, n.constant([count], np.int64)], shape, count=2, **attributes)


def scattering(n: Network, x: Tensor) -> Tensor | None:
    axis = n.between(1, len(x.shape) - 1)
    places = n.random.permutation(x.shape[axis]).reshape(-1, *[1] * (len(x.shape) - axis - 1))
    indices = n.constant(np.broadcast_to(places, x.shape), np.int64)
    other = n.node("Neg", [n.like(x).value], x.shape)
    return n.node("ScatterElements", [x.value, indices, other.value], x.shape, axis=axis)


def running_sum(n: Network, x: Tensor) -> Tensor | None:
    axis = n.constant(n.between(1, len(x.shape) - 1), np.int64)
    return n.node("CumSum", [x.value, axis], x.shape, reverse=n.between(0, 1), exclusive=n.between(0, 1))


def normalization(n: Network, x: Tensor) -> Tensor | None:
    inputs = [x.value, n.weight(x.shape[-1]), n.weight(x.shape[-1])]
    return n.node("LayerNormalization", inputs[: n.between(2, 3)], x.shape)


def softmax(n: Network, x: Tensor) -> Tensor | None:
    return n.node("Softmax", [x.value], x.shape, axis=n.between(-1, len(x.shape) - 1))


def pool(n: Network, x: Tensor) -> Tensor | None:
    if len(x.shape) != 4:
        return None
    kernel, pads = [n.between(1, min(3, size)) for size in x.shape[2:]], n.between(0, 1)
    pads = pads if min(kernel) > 1 else 0
    shape = (*x.shape[:2], *(size + 2 * pads - width + 1 for size, width in zip(x.shape[2:], kernel, strict=True)))
    attributes = {"kernel_shape": kernel, "pads": [pads] * 4}
    return n.node(n.choice(["MaxPool", "AveragePool"]), [x.value], shape, **attributes)


def reduction(n: Network, x: Tensor) -> Tensor | None:
    axis = n.between(1, len(x.shape) - 1)
    shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    op_type = n.choice(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"])
    return n.node(op_type, [x.value, n.constant([axis], np.int64)], shape)


def concatenation(n: Network, x: Tensor) -> Tensor | None:
    axis = n.between(1, len(x.shape) - 1)
    shape = (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return n.node("Concat", [x.value, n.like(x).value], shape, axis=axis)


def transposition(n: Network, x: Tensor) -> Tensor | None:
    order = [0, *(1 + n.random.permutation(len(x.shape) - 1)).tolist()]
    return n.node("Transpose", [x.value], [x.shape[axis] for axis in order], perm=order)


def part(n: Network, x: Tensor) -> Tensor | None:
    axis = n.between(1, len(x.shape) - 1)
    first = n.between(0, x.shape[axis] - 1)
    ends = [n.constant([number], np.int64) for number in (first, x.shape[axis], axis)]
    return n.node("Slice", [x.value, *ends], (*x.shape[:axis], x.shape[axis] - first, *x.shape[axis + 1 :]))


def padding(n: Network, x: Tensor) -> Tensor | None:
    pads = [0] + [n.between(0, 1) for _ in x.shape[1:]]
    number = n.constant(n.choice([0.0, -1.0, 100.0]))
    shape = [size + pad for size, pad in zip(x.shape, pads, strict=True)]
    return n.node("Pad", [x.value, n.constant([*pads, *[0] * len(pads)], np.int64), number], shape)


OPERATIONS: tuple[Operation, ...] = (
    convolution, convolution, convolution, convolution, product, product, product, product, classifier, attention,
    function, function, gate, arithmetic, arithmetic, with_constant, quotient, choice_of_two, normalization, softmax,
    pool, reduction, concatenation, transposition, part, padding, comparison, order, scattering, running_sum,
)  # fmt: skip


def random_network(seed: int) -> ir.Model:
    """Return a network of up to ten operations whose every node leads to an output."""
    network = Network(seed)
    for _ in range(network.between(2, 10)):
        network.grow()
    made = network.tensors[1:]
    if not made:
        return random_network(seed + (1 << 32))
    ends = {made[-1].value: None} | {network.choice(made).value: None for _ in range(network.between(0, 2))}
    network.model.graph.outputs.extend(ends)
    return network.model
