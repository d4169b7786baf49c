"""Which nodes of a graph convolve with a constant kernel, as the linear layers over patches that they are.

    y = Conv(x, W, b)              W [N, C/groups, ...]     matrix [N, K], K = C/groups * elements of the kernel
    y = ConvTranspose(x, W, b)     W [C, N, ...]            matrix [N, K], K = C * elements; groups=1 only

`Convolution` has the interface of `linear_layers.LinearLayer`, so that what rounds the one rounds the other. Its rows
are patches of what it reads (`qgraph.numerics.patches`): `groups` sets of them, each for its share of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.linear_layers import LinearLayer, LinearLayers, UnfitError, collect, linear_layers
from qgraph.numerics.patches import Window
from qgraph.pipeline import Context, Skipped

__all__ = ["OPERATORS", "Convolution", "convolutions", "weighted_layers"]

OPERATORS = ("Conv", "ConvTranspose")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, eq=False)
class Convolution(LinearLayer):
    """A convolution with a constant kernel.

    Attributes:
        window: how the kernel moves over x.
        shape: of the weight.
    """

    window: Window
    shape: tuple[int, ...]

    @property
    def groups(self) -> int:
        """The number of parts that the outputs are cut into, each with inputs of its own."""
        return self.window.groups

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel of x is a group of its own."""
        return self.groups > 1 and self.transposed and self.shape[1] == 1

    def matrix(self) -> np.ndarray:
        """Read the weight now: float32 [N, K], contiguous."""
        tensor = self.weight.const_value
        assert tensor is not None
        array = tensor.numpy()
        array = array if self.transposed else array.swapaxes(0, 1)
        return np.ascontiguousarray(array, dtype=np.float32).reshape(self.outputs, self.inputs)

    def stored(self, matrix: np.ndarray) -> np.ndarray:
        """Return a matrix [N, K] in the layout of the weight."""
        if self.transposed:
            return matrix.reshape(self.shape)
        return np.ascontiguousarray(matrix.reshape(self.outputs, -1, *self.shape[2:]).swapaxes(0, 1))


def weighted_layers(model: ir.Model, context: Context | None = None, operators: tuple[str, ...] = ()) -> LinearLayers:
    """Find the linear layers of the main graph and, for the `operators` among Conv and ConvTranspose, convolutions.

    Layers come in topological order; those that read the same weight are together in `by_weight`. A weight that is
    read by a convolution and by a product too (in another layout) is left alone by both.
    """
    linear = linear_layers(model, context)
    wanted = tuple(one for one in operators if one in OPERATORS)
    if not wanted:
        return linear
    conv = convolutions(model, context)
    places = {node: place for place, node in enumerate(model.graph)}
    found = [layer for layer in conv.layers if layer.node.op_type in wanted]
    layers = sorted([*linear.layers, *found], key=lambda layer: places[layer.node])
    by_weight: dict[ir.Value, list[LinearLayer]] = {}
    for layer in layers:
        by_weight.setdefault(layer.weight, []).append(layer)
    taken = {layer.name for layer in conv.layers} | {one.node for one in conv.skipped}
    left = [layer for layer in conv.layers if layer.node.op_type not in wanted]
    skipped = [one for one in linear.skipped if one.node not in taken]
    skipped += [*conv.skipped, *(Skipped(layer.name, f"{layer.node.op_type} is not among 'ops'") for layer in left)]
    return LinearLayers(tuple(layers), tuple(skipped), by_weight)


def convolutions(model: ir.Model, context: Context | None = None) -> LinearLayers:
    """Find the convolutions of the main graph.

    Left alone, each with its reason: weights that are computed, are also inputs or outputs of the model, are no
    float16, bfloat16 or float32, or that a node reads which is no convolution of the same kind and geometry of weight;
    ConvTranspose in groups, or with a given output shape; nodes inside subgraphs.

    Args:
        model: is not changed.
        context: not used; `Context.analyse` passes it.
    """
    del context
    return collect(model, _is_candidate, _convolution, _without_foreign_readers)


def _is_candidate(node: ir.Node) -> bool:
    return qgraph.ir.is_op(node, *OPERATORS)


def _without_foreign_readers(found: Sequence[Convolution]) -> tuple[list[Convolution], list[Skipped]]:
    """Leave out layers whose weight also serves a node that sees another matrix in it."""
    nodes = {layer.node: layer for layer in found}
    kept, skipped = list[Convolution](), list[Skipped]()
    for layer in found:
        foreign = next((use.node for use in layer.weight.uses() if not _alike(nodes.get(use.node), layer)), None)
        if foreign is None:
            kept.append(layer)
        else:
            reason = f"its weight is read by '{qgraph.ir.node_label(foreign)}' too, which uses it in another way"
            skipped.append(Skipped(layer.name, reason))
    return kept, skipped


def _alike(other: Convolution | None, layer: Convolution) -> bool:
    return other is not None and (other.groups, other.transposed) == (layer.groups, layer.transposed)


def _convolution(node: ir.Node, label: str) -> Convolution:
    x, weight = node.inputs[:2]
    if x is None or weight is None:
        raise UnfitError("it has no input")
    if weight.const_value is None:
        compressed = qgraph.ir.is_op(weight.producer(), "DequantizeLinear")
        raise UnfitError("its weight is compressed already" if compressed else "its weight is computed")
    if x.const_value is not None:
        raise UnfitError("both its factors are constants")
    if weight.is_graph_input():
        raise UnfitError("its weight is also an input of the model, which a caller may replace")
    if weight.is_graph_output():
        raise UnfitError("its weight is an output of the model")
    if weight.const_value.dtype not in _FLOATS:
        raise UnfitError(f"its weight is {weight.const_value.dtype.name.lower()}")
    shape = tuple(weight.const_value.shape.numpy())
    if len(shape) < 3 or math.prod(shape) == 0:
        raise UnfitError(f"its weight has the shape {list(shape)}")
    window = _window(node, shape)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    transposed = node.op_type == "Conv"
    return Convolution(
        node,
        weight,
        x,
        "convolution",
        transposed=transposed,
        bias=bias if bias is not None and bias.const_value is not None else None,
        name=label,
        inputs=math.prod(shape) // (shape[0] if transposed else shape[1]),
        outputs=shape[0] if transposed else shape[1],
        window=window,
        shape=shape,
    )


def _window(node: ir.Node, shape: tuple[int, ...]) -> Window:
    axes = len(shape) - 2
    attributes = node.attributes
    ones, zeros = (1,) * axes, (0,) * axes
    transposed = node.op_type == "ConvTranspose"
    groups = attributes.get_int("group", 1)
    automatic = attributes.get_string("auto_pad", "NOTSET")
    pads = tuple(attributes.get_ints("pads", zeros * 2)) if automatic == "NOTSET" else zeros * 2
    if transposed:
        if groups > 1:
            raise UnfitError("it is transposed and in groups: no axis of its weight is that of its outputs")
        if automatic not in ("NOTSET", "VALID") or "output_shape" in attributes:
            raise UnfitError("it is transposed, and its output's shape is given in the place of its pads")
        more = attributes.get_ints("output_padding", zeros)
        pads = pads[:axes] + tuple(pad - one for pad, one in zip(pads[axes:], more, strict=True))
    return Window(
        kernel=shape[2:],
        strides=tuple(attributes.get_ints("strides", ones)),
        dilations=tuple(attributes.get_ints("dilations", ones)),
        pads=pads,
        groups=groups,
        same={"SAME_UPPER": "upper", "SAME_LOWER": "lower"}.get(automatic, ""),
        transposed=transposed,
    )
