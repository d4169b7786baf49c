"""Layers that a quantized model and the model before the loss both have, and where the bias of each is added.

    quantized   x -> Q -> D -> Conv(D(W8), D(b32)) -> y          reference   x -> Conv(W, b) -> y

y is the layer's own output: where `qdq` leaves a Relu to the quantizer that follows, it is still the unclamped one,
although it has the name of what the Relu made. Of a MatMul, it is the output of the Add of a constant behind it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

import onnx_ir as ir

import qgraph.ir
from qgraph.numerics.bias_correction import Activation
from qgraph.pipeline import Skipped

__all__ = ["PairedLayer", "fixed_values", "paired_layers"]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, eq=False)
class PairedLayer:
    """A layer with a constant weight.

    Attributes:
        node: in the quantized model.
        last: `node`, or the Add behind a MatMul; its output is what the bias shifts.
        bias: which input of `last` the bias is, be it there or not.
        twin: the layer in the reference.
        twin_last: what `last` is there.
        axis: of the output's channels: 1, or -1 for a MatMul.
        rank: of the output; None where it is not known.
        channels: how many there are.
        activation: what alone reads the output in the reference, where that is known.
    """

    node: ir.Node
    last: ir.Node
    bias: int
    twin: ir.Node
    twin_last: ir.Node
    axis: int
    rank: int | None
    channels: int
    activation: Activation | None

    @property
    def name(self) -> str:
        """What reports call it."""
        return qgraph.ir.node_label(self.node)

    @property
    def output(self) -> ir.Value:
        """What it computes in the quantized model."""
        return self.last.outputs[0]

    @property
    def exact_outputs(self) -> list[ir.Value]:
        """What the layer computes in the reference, and what its activation, if there is one, makes of it."""
        output = self.twin_last.outputs[0]
        node = qgraph.ir.only_consumer(output)
        return [output] if self.activation is None or node is None else [output, node.outputs[0]]

    @property
    def is_quantized(self) -> bool:
        """Whether it reads anything that was rounded."""
        return any(qgraph.ir.is_op(value.producer(), "DequantizeLinear") for value in self.node.inputs if value)


def fixed_values(model: ir.Model) -> set[ir.Value]:
    """Return the values of the main graph that are computed from constants alone."""
    found = {value for value in model.graph.initializers.values() if not value.is_graph_input()}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        constant = found.issuperset(inputs) and not qgraph.ir.inner_graphs(node)
        if qgraph.ir.is_op(node, "Constant") or (inputs and constant):
            found.update(node.outputs)
    return found


def paired_layers(model: ir.Model, reference: ir.Model) -> tuple[list[PairedLayer], list[Skipped]]:
    """Return the layers of the main graph whose output the bias can shift, in order, and why others cannot.

    Layers are recognised by their node's name, and those without a name by their place among such.

    Args:
        model: the quantized one.
        reference: what it was before.
    """
    twins, fixed = _keyed(reference, fixed_values(reference)), fixed_values(model) | fixed_values(reference)
    layers, skipped = list[PairedLayer](), list[Skipped]()
    for key, node in _keyed(model, fixed).items():
        twin = twins.get(key)
        found = "it has no counterpart in the model before the loss" if twin is None else _paired(node, twin, fixed)
        if isinstance(found, PairedLayer):
            layers.append(found)
        else:
            skipped.append(Skipped(qgraph.ir.node_label(node), found))
    return layers, skipped


def _keyed(model: ir.Model, fixed: Container[ir.Value | None]) -> dict[tuple[str, str, int], ir.Node]:
    """Return the layers with constant weights by operator and name, numbered where these do not tell."""
    counts = Counter[tuple[str, str]]()
    found = {}
    for node in model.graph:
        if not qgraph.ir.is_op(node, *_LAYERS) or (node.inputs[0] in fixed) == (node.inputs[1] in fixed):
            continue
        key = (node.op_type, node.name or "")
        found[*key, counts[key]] = node
        counts[key] += 1
    return found


def _paired(node: ir.Node, twin: ir.Node, fixed: Container[ir.Value | None]) -> PairedLayer | str:
    """Return the pair, or why its bias cannot be corrected."""
    if node.inputs[0] in fixed:
        return "its constant is the left factor"
    channels = _channels(twin)
    if channels is None:
        return "its weight is not a matrix"
    told = (node.outputs[0], twin.outputs[0], twin.inputs[1])  # outputs that nothing says the type of have the weight's
    if any(value is not None and value.dtype not in (None, ir.DataType.FLOAT) for value in told):
        return "its output is not float32"
    if node.op_type != "MatMul":
        known = 2 if node.op_type == "Gemm" else len(_dims(twin.inputs[1]) or ())
        return PairedLayer(node, node, 2, twin, twin, 1, known, channels, _activation(twin))
    added, twin_added = (_added(one.outputs[0], channels, fixed) for one in (node, twin))
    if added is None or twin_added is None:
        return "it has no bias, and an Add of one would cost time"
    shapes = [value.shape for value in (twin_added[0].outputs[0], twin.inputs[0]) if value is not None]
    rank = next((len(shape) for shape in shapes if shape is not None), None)
    return PairedLayer(node, *added, twin, twin_added[0], -1, rank, channels, _activation(twin_added[0]))


def _channels(node: ir.Node) -> int | None:
    """Return the number of output channels of a layer of the reference, or None where its weight is no matrix."""
    dims = _dims(node.inputs[1])
    if not dims:
        return None
    if node.op_type == "Conv":
        return dims[0]
    if node.op_type == "ConvTranspose":
        return dims[1] * node.attributes.get_int("group", 1)
    if len(dims) != 2:
        return None
    return dims[0] if node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0)) else dims[1]


def _dims(value: ir.Value | None) -> list[int] | None:
    """Return the shape of a constant, of one behind a DequantizeLinear too, or None if it is not known."""
    if value is None:
        return None
    if value.const_value is not None:
        return list(value.const_value.shape.numpy())
    if value.shape is not None and value.shape.is_static():
        return [dim for dim in value.shape if isinstance(dim, int)]
    node = value.producer()
    return _dims(node.inputs[0]) if qgraph.ir.is_op(node, "DequantizeLinear") and node is not None else None


def _added(product: ir.Value, channels: int, fixed: Container[ir.Value | None]) -> tuple[ir.Node, int] | None:
    """Return the Add of one constant for each column that alone reads a product, and which input the constant is."""
    value = product
    while True:
        node = qgraph.ir.only_consumer(value)
        if not qgraph.ir.is_op(node, "QuantizeLinear", "DequantizeLinear"):
            break
        assert node is not None
        value = node.outputs[0]
    if node is None or not qgraph.ir.is_op(node, "Add") or node.graph is not product.graph:
        return None
    index = 1 if node.inputs[0] is value else 0
    bias = node.inputs[index]
    if bias is None or bias not in fixed:
        return None
    dims = _dims(bias)
    return (node, index) if dims and dims[-1] == channels and all(dim == 1 for dim in dims[:-1]) else None


def _activation(last: ir.Node) -> Activation | None:
    """Return the activation that alone reads a node's output."""
    node = qgraph.ir.only_consumer(last.outputs[0])
    if node is None or node.graph is not last.graph or node.inputs[0] is not last.outputs[0]:
        return None
    if qgraph.ir.is_op(node, "Relu"):
        return Activation("clamp")
    if qgraph.ir.is_op(node, "HardSwish"):
        return Activation("hard-swish")
    if qgraph.ir.is_op(node, "HardSigmoid"):
        factors = (node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5))
        return Activation("hard-sigmoid", *factors)
    return _clamp(node) if qgraph.ir.is_op(node, "Clip") else None


def _clamp(node: ir.Node) -> Activation | None:
    bounds = [-math.inf, math.inf]
    for index, name in ((1, "min"), (2, "max")):
        if name in node.attributes:
            bounds[index - 1] = node.attributes[name].as_float()
        elif index < len(node.inputs) and node.inputs[index] is not None:
            array = qgraph.ir.constant(node.inputs[index])
            if array is None:
                return None
            bounds[index - 1] = float(array.item())
    return Activation("clamp", *bounds)
