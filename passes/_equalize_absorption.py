"""High biases moved through a Relu that lets their channels always through.

    x -> Conv(W1, b1) -> Relu -> Conv(W2, b2)    =>    x -> Conv(W1, b1 - c) -> Relu -> Conv(W2, b2 + sum of W2 c)

c is below the least number that calibration has shown before the Relu, by a tenth of what the channel spans, where that
is above zero: Relu(x - c) = Relu(x) - c for every x that is not below c. So the result is exact for the samples and for
what reaches a little further than they do, and the activation spans c less.

Not where the layer behind pads its input with zeros: a border would then count as -c. Source: Nagel et al. (2019),
section 4.1.3, which takes c from the statistics of a batch normalization instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_groups import ChannelGroups, Layer
from qgraph.numerics.equalization import channel_sum
from qgraph.passes._equalize_noise import Seen
from qgraph.pipeline import Skipped

__all__ = ["absorb"]

_BELOW = 0.1
"""How far below the least number that was seen others may come, as a share of what the channel spans."""
_WORTH = 1e-2
"""Of a channel's largest number: less is not worth a change."""
_FEWEST = 32
"""Numbers of a channel: the least of fewer says little of others."""
_SUFFIX = "absorbed"


def absorb(model: ir.Model, groups: ChannelGroups, seen: dict[ir.Value, Seen]) -> tuple[int, list[Skipped]]:
    """Move high biases; return the number of layers that lose one, and where they stay, each with the reason.

    Args:
        model: is changed.
        groups: of the model.
        seen: what calibration has shown; is brought up to what it would show now.
    """
    layers = {layer.node: layer for layer in groups.layers}
    moved, skipped = 0, list[Skipped]()
    for layer in groups.layers:
        result = layer.node.outputs[0]
        one, relu = seen.get(result), qgraph.ir.only_consumer(result)
        if one is None or not qgraph.ir.is_op(relu, "Relu") or relu is None:
            continue
        always = one.low - _BELOW * (one.high - one.low)
        shift = np.where(always > _WORTH * np.maximum(one.high, 1e-30), always, 0.0)
        if not shift.any():
            continue
        readers, reason = _readers(relu.outputs[0], layers)
        if reason is None and _bias(layer) is None:
            reason = "its bias cannot be rewritten"
        if reason is None and one.drawn < _FEWEST:
            reason = f"the samples show {one.drawn} numbers of a channel, fewer than {_FEWEST}"
        if reason is not None:
            skipped.append(Skipped(qgraph.ir.node_label(layer.node), f"its high bias stays: {reason}"))
            continue
        _add(model, layer, -shift)
        for reader in readers:
            _add(model, reader, _carried(reader, shift))
        for value in (result, relu.outputs[0]):
            if value in seen:
                seen[value] = _lowered(seen[value], shift)
        moved += 1
    return moved, skipped


def _lowered(seen: Seen, shift: np.ndarray) -> Seen:
    square = seen.square - 2.0 * shift * seen.mean + shift**2
    low, high, mean = (one - shift for one in (seen.low, seen.high, seen.mean))
    return Seen(low, high, mean, np.maximum(square, 0.0), seen.passing, seen.drawn)


def _readers(value: ir.Value, layers: Mapping[ir.Node, Layer]) -> tuple[list[Layer], str | None]:
    """Return the layers that read a value, or why their biases cannot take what it loses."""
    if value.is_graph_output():
        return [], f"'{value.name}' is an output of the model"
    readers = []
    for use in value.uses():
        label = qgraph.ir.node_label(use.node)
        reader = layers.get(use.node)
        if reader is None or use.idx != 0 or use.node.op_type not in ("Conv", "Gemm"):
            return [], f"'{label}' ({use.node.op_type}) reads it too"
        if _pads(use.node):
            return [], f"'{label}' pads it with zeros"
        if _bias(reader) is None:
            return [], f"the bias of '{label}' cannot be rewritten"
        readers.append(reader)
    return readers, None


def _pads(node: ir.Node) -> bool:
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    return any(node.attributes.get_ints("pads", ())) or automatic not in ("NOTSET", "VALID")


def _bias(layer: Layer) -> np.ndarray | None:
    """Return the bias of each output channel, float64; None if it is no constant of its own for each."""
    node, count = layer.node, int(layer.outputs.max()) + 1
    if node.op_type == "MatMul" or any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return None
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(count)
    array = qgraph.ir.constant(value)
    return None if array is None or array.size != count else np.asarray(array, np.float64).reshape(-1)


def _carried(reader: Layer, shift: np.ndarray) -> np.ndarray:
    """Return what a layer makes of an input that is `shift` everywhere."""
    weight = np.asarray(qgraph.ir.constant(reader.weight.value), np.float64)
    outputs = reader.outputs.reshape([1] * (weight.ndim - reader.outputs.ndim) + [*reader.outputs.shape])
    return channel_sum(weight * shift[reader.inputs], outputs, int(outputs.max()) + 1)


def _add(model: ir.Model, layer: Layer, shift: np.ndarray) -> None:
    """Add to the bias of a layer."""
    node, bias, weight = layer.node, _bias(layer), qgraph.ir.constant(layer.weight.value)
    assert bias is not None
    assert weight is not None
    old = node.inputs[2] if len(node.inputs) > 2 else None
    name = f"{old.name if old is not None else f'{node.outputs[0].name}_bias'}".removesuffix(f"_{_SUFFIX}")
    node.resize_inputs(3)
    new = qgraph.ir.initializer(model.graph, f"{name}_{_SUFFIX}", (bias + shift).astype(weight.dtype))
    node.replace_input_with(2, new)
    if old is not None and not old.uses() and not old.is_graph_output() and old.name and old.is_initializer():
        model.graph.initializers.pop(old.name, None)
