"""Channels in front of a depthwise convolution made alike in range, for activations with one scale for a whole tensor.

    y = Conv<group = C>(HardSwish(x), W)    =>    y = Conv<group = C>(Mul(HardSwish(x), 1 / s), W s)

    y = Conv<group = C>(Relu(Conv(x, V, b)), W)    =>    y = Conv<group = C>(Relu(Conv(x, V / s, b / s)), W s)

Exact in real numbers; s > 0 for each channel is its largest magnitude on the calibration samples, as a share of that of
the whole tensor, with some `room`, since what was seen of one channel bounds it less surely. A depthwise convolution
adds no channels up: what one scale for all of them leaves of a small channel is all that its outputs have. Its weights
have a scale for each channel, and lose nothing by taking s. `equalize` does the same where factors pass everything on
the way; this pass takes a Mul where they do not, which TensorRT fuses with the function before it and the quantizer
behind it.

It does not fire where channels lose less than `bits` on average to the largest one, without saying so; nor, with the
reason in the report, on weights that are computed, not float32 or read by others too, and on tensors that cannot be
calibrated. What was scaled once is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.calibration import calibrate
from qgraph.analysis.channel_tracer import Source
from qgraph.analysis.scale_folding import rescale
from qgraph.numerics.schemes import UINT8
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["ScaleDepthwise"]

_SUFFIX = "alike"
_DONE = "qgraph.channels_alike"
"""Metadata of a convolution whose input was scaled."""
_SMALLEST = 2.0**-10
"""Of a factor: what is smaller still would make weights of nothing but noise large."""
_FUNCTIONS = ("LeakyRelu", "Relu")
"""Functions f with f(x / s) = f(x) / s for each positive s."""


@dataclass(frozen=True)
class ScaleDepthwise(Pass):
    """Scale the channels that depthwise convolutions read, so that one scale for the tensor suits them all."""

    name: ClassVar[str] = "scale-depthwise"
    bits: float = field(
        default=3.0, metadata={"help": "what channels must lose to the largest one, on average, for a change"}
    )
    room: float = field(
        default=2.0, metadata={"help": "how much larger than on the samples a small channel may get, as a multiple"}
    )

    def __post_init__(self) -> None:
        if not self.room >= 1.0:
            raise ValueError(f"room is {self.room:g}: give 1 or more, since less would cut off what was seen")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Scale; `skipped` has the depthwise convolutions that could not be looked at.

        Raises:
            UserError: there are no calibration samples, or the model does not run on one.
        """
        skipped, readers = [], {}
        for node in model.graph:
            if not _is_depthwise(node) or _DONE in node.metadata_props:
                continue
            reason = _unfit(node)
            if reason is None:
                readers[node] = node.inputs[0]
            else:
                skipped.append(Skipped(qgraph.ir.node_label(node), reason))
        if not readers:
            return Report(skipped=skipped)
        names = tuple(dict.fromkeys(value.name or "" for value in readers.values() if value is not None))
        found = context.analyse(calibrate, model, names, "minmax", UINT8, tuple((name, 1) for name in names))
        changed, muls = 0, 0
        for node, value in readers.items():
            assert value is not None
            if value.name in found.unavailable:
                reason = f"'{value.name}' is not calibrated because {found.unavailable[value.name]}"
                skipped.append(Skipped(qgraph.ir.node_label(node), reason))
                continue
            one = found[value.name or ""]
            factors = self._factors(np.maximum(-one.low, one.high))
            if factors is not None:
                changed += 1
                muls += _scale(model, node, factors)
        many = "s" * (changed > 1)
        notes = [f"channels of {changed} depthwise convolution{many} made alike in range, {muls} behind a Mul"]
        return Report(changed, skipped, notes if changed else [])

    def _factors(self, sizes: np.ndarray) -> np.ndarray | None:
        """Return s for each channel, or None where little would be gained; a channel of zeros keeps its size."""
        largest = float(sizes.max(initial=0.0))
        if largest == 0.0:
            return None
        shares = np.where(sizes > 0.0, np.maximum(sizes / largest, _SMALLEST), 1.0)
        lost = float(-np.log2(shares).mean())
        return np.minimum(self.room * shares, 1.0) if lost >= self.bits else None


def _is_depthwise(node: ir.Node) -> bool:
    group = node.attributes.get_int("group", 1) if qgraph.ir.is_op(node, "Conv") else 1
    weight = node.inputs[1] if group > 1 else None
    shape = None if weight is None else weight.shape
    return shape is not None and len(shape) > 2 and shape[1] == 1 and isinstance(shape[0], int)


def _unfit(node: ir.Node) -> str | None:
    weight = node.inputs[1]
    if not _is_own(weight):
        return "its weight is computed, not float32, or read by others too"
    shape = None if weight is None else weight.shape
    if shape is None or shape[0] != node.attributes.get_int("group", 1):
        return "it makes several channels of each"
    return None


def _is_own(value: ir.Value | None) -> bool:
    """Tell whether a value is a float32 initializer with one reader."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.is_graph_output():
        return False
    return value.dtype == ir.DataType.FLOAT and len(value.uses()) == 1


def _scale(model: ir.Model, node: ir.Node, factors: np.ndarray) -> bool:
    """Divide what a convolution reads by the factors and multiply its weight; tell whether that took a Mul."""
    made = _made_by(node.inputs[0])
    if made is None:
        _divide(model, node, factors)
    else:
        _rescale_channels(model, made, 1, 1.0 / factors)
        if len(made.inputs) > 2 and made.inputs[2] is not None:
            _rescale_channels(model, made, 2, 1.0 / factors)
    _rescale_channels(model, node, 1, factors)
    node.metadata_props[_DONE] = "1"
    return made is None


def _made_by(value: ir.Value | None) -> ir.Node | None:
    """Return the convolution whose weight can take the factors instead of a Mul."""
    while value is not None and not value.is_graph_output() and len(value.uses()) == 1:
        node = value.producer()
        if node is None or any(use.node.graph is not node.graph for use in value.uses()):
            return None
        if qgraph.ir.is_op(node, "Conv"):
            return node if all(one is None or _is_own(one) for one in node.inputs[1:]) else None
        if not qgraph.ir.is_op(node, *_FUNCTIONS):
            return None
        value = node.inputs[0]
    return None


def _rescale_channels(model: ir.Model, node: ir.Node, index: int, factors: np.ndarray) -> None:
    value = node.inputs[index]
    assert value is not None
    assert value.shape is not None
    channels = np.arange(len(factors)).reshape([-1, *[1] * (len(value.shape) - 1)])
    rescale(model, Source(node, index, channels), factors, _SUFFIX)


def _divide(model: ir.Model, node: ir.Node, factors: np.ndarray) -> None:
    value = node.inputs[0]
    assert value is not None
    assert node.inputs[1] is not None
    assert node.inputs[1].shape is not None
    spatial = len(node.inputs[1].shape) - 2
    array = (1.0 / factors).astype(np.float32).reshape([-1, *[1] * spatial])
    factor = qgraph.ir.initializer(model.graph, f"{value.name}_{_SUFFIX}_factors", array)
    mul = ir.node("Mul", [value, factor], name=qgraph.ir.fresh_name(model.graph, f"{value.name}_{_SUFFIX}"))
    scaled = mul.outputs[0]
    scaled.name, scaled.type, scaled.shape = mul.name, value.type, value.shape
    qgraph.ir.insert_before(node, mul)
    node.replace_input_with(0, scaled)
