"""Channels of neighbouring layers made alike in range, for quantizers with one scale for a whole tensor.

    x -> Conv(W1, b1) -> Relu -> Conv(W2, b2)
    =>
    x -> Conv(W1 / s, b1 / s) -> Relu -> Conv(W2 s, b2)         s > 0 for each channel in between

Exact in real numbers, but for what calibration decides (Clips, high biases). The factors go through whatever passes
positive ones on: Relu, PRelu, LeakyRelu, pooling, Pad with zeros, Concat, Split, channel shuffles, Flatten, Add (all
that it adds, and all that reads it, change together), depthwise and grouped layers, the data side of a gate
(`qgraph.analysis.channel_groups`).

How s is chosen: without calibration data, so that each channel uses as much of the range of the weights that make it
as of those that read it ("range", Nagel et al. 2019, section 4.1). With them, so that the noise of weights and
activations costs least ("noise", `qgraph.numerics.noise_balance`).

    Clip(0, 6)    =>    Relu        where no sample comes near 6 in any channel

Other Clips stay. Through them go the factors of channels that do not reach the bound, kept within what was seen of
them, so that samples are clipped as before; channels that do reach it keep theirs.

A channel that a Relu always lets through loses what it has above zero to the biases behind (`_equalize_absorption`).

It does not fire, with the reason in the report, on what leaves the model, is read inside a subgraph or by an operator
that bends otherwise, or on weights that others read too.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_groups import ChannelGroups, channel_groups
from qgraph.analysis.scale_folding import multiply, rescale
from qgraph.analysis.spatial_rules import clip_bounds
from qgraph.errors import UserError
from qgraph.numerics.equalization import equalize
from qgraph.numerics.noise_balance import noise_of, quietest
from qgraph.passes._equalize_absorption import absorb
from qgraph.passes._equalize_noise import Seen, magnitudes, observe, terms
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["Equalize"]

_SUFFIX = "equalized"
_LARGEST = 2.0**10
"""Of a factor, and of one over it: float32 weights keep clear of over- and underflow."""
_BELOW = 1.1
"""How far above the largest number that was seen a channel may be clipped, as a multiple."""
_BEYOND = 1.5
"""To what multiple of its bound a channel that does not reach it may go."""
_UNCHANGED = 0.02
"""Logarithms of factors that are not worth a rewrite."""
_HUGE = 1e30

Bounds = Mapping[ir.Node, float]
"""Upper bounds of Clips whose lower one is zero."""


@dataclass(frozen=True)
class Equalize(Pass):
    """Scale channels between layers so that tensors with one scale lose less."""

    name: ClassVar[str] = "equalize"
    method: Literal["auto", "range", "noise"] = field(
        default="auto", metadata={"help": "how factors are chosen; auto: noise if there are calibration data"}
    )
    relu6: Literal["measured", "always", "never"] = field(
        default="measured", metadata={"help": "which Clips become Relu: those that no sample reaches, all, or none"}
    )
    bits: int = field(default=8, metadata={"help": "width that the quantizer behind it gives the weights"})
    per_channel: bool = field(default=False, metadata={"help": "one weight scale for each output channel there"})
    least_gain: float = field(default=0.1, metadata={"help": "share of the noise that must go for a change"})
    absorb: bool = field(default=True, metadata={"help": "move high biases through Relu, where samples show them"})
    steps: int = field(default=100, metadata={"help": "steps of the search for the least noise"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Scale; `figures` has the noise before and after, as a share of the signal, for the method "noise".

        Raises:
            UserError: the method is "noise" and there are no calibration samples, the model does not run on one, or
                a weight is NaN or infinite.
        """
        if not 2 <= self.bits <= 16:
            raise UserError(f"equalize: bits is a width of weights, 2 to 16, not {self.bits}")
        if self.method == "noise":
            context.samples("'equalize' with the method noise")
        clips = _clips(model)
        seen = self._seen(model, context, clips)
        relus = self._relus(clips, seen)
        for node in relus:
            _make_relu(node)
        kept = {node: bound for node, bound in clips.items() if node not in relus}
        through = frozenset(kept) if seen else frozenset[ir.Node]()
        groups = channel_groups(model, context, through)
        notes = [f"{len(relus)} Clip as Relu"] if relus else []
        absorbed, left = absorb(model, groups, seen) if self.absorb else (0, [])
        if absorbed:
            notes.append(f"{absorbed} layers without their high bias")
            groups = channel_groups(model, context, through)
        held = {one.node: one.held for one in groups.layers if one.held is not None}
        skipped = [Skipped(qgraph.ir.node_label(node), reason) for node, reason in {**groups.unfit, **held}.items()]
        scales, figures = self._scales(groups, seen, *_limits(groups, kept if seen else {}, seen))
        changed = 0 if scales is None else _fold(model, groups, scales)
        if changed:
            notes.append(f"{changed} layers equalized")
        return Report(changed + len(relus) + absorbed, [*skipped, *left], notes, figures)

    def _seen(self, model: ir.Model, context: Context, clips: Bounds) -> dict[ir.Value, Seen]:
        """Return what calibration shows of all that layers read and make, and of what is clipped."""
        if context.calibration is None:
            return {}
        groups = channel_groups(model, context, frozenset(clips))
        axes: dict[ir.Value, int] = {}
        for layer in groups.layers:
            ends = (layer.node.inputs[0], layer.node.outputs[0])
            axes.update((value, layer.axis) for value in ends if value is not None)
        for node in clips:
            value, axis = node.inputs[0], _channel_axis(groups.values.get(node.outputs[0]))
            if value is not None and axis is not None:
                axes.setdefault(value, axis)
        return observe(model, context, axes) if axes else {}

    def _relus(self, clips: Bounds, seen: Mapping[ir.Value, Seen]) -> list[ir.Node]:
        """Return the Clips that may become Relu."""
        if self.relu6 != "measured":
            return list(clips) if self.relu6 == "always" else []
        found = []
        for node, bound in clips.items():
            one = seen.get(node.inputs[0]) if node.inputs[0] is not None else None
            if one is not None and float(one.high.max(initial=0.0)) * _BELOW <= bound:
                found.append(node)
        return found

    def _scales(
        self, groups: ChannelGroups, seen: Mapping[ir.Value, Seen], lower: np.ndarray, upper: np.ndarray
    ) -> tuple[np.ndarray | None, dict[str, list[float]]]:
        """Return the factors, or None where nothing is gained."""
        if groups.count == 0:
            return None, {}
        if self.method == "range" or not seen:
            scales = equalize(magnitudes(groups), lower, upper)
            return scales if float(np.abs(np.log(scales)).max()) > _UNCHANGED else None, {}
        noise = terms(groups, seen, levels=(1 << (self.bits - 1)) - 1, per_channel=self.per_channel)
        scales = quietest(noise, lower, upper, steps=self.steps)
        before, after = noise_of(noise, np.ones(groups.count)), noise_of(noise, scales)
        gains = after < (1.0 - self.least_gain) * before
        return scales if gains else None, {"noise": [_rounded(before), _rounded(after if gains else before)]}


def _clips(model: ir.Model) -> dict[ir.Node, float]:
    """Return the Clips of the main graph that a Relu could stand for if nothing reached their upper bound."""
    found = {}
    for node in model.graph:
        bounds = clip_bounds(node) if qgraph.ir.is_op(node, "Clip") else None
        if bounds is not None and bounds[0] == 0.0 and 0.0 < bounds[1] < _HUGE:
            found[node] = bounds[1]
    return found


def _make_relu(node: ir.Node) -> None:
    node.op_type = "Relu"
    for index in range(1, len(node.inputs)):
        node.replace_input_with(index, None)
    node.resize_inputs(1)
    node.attributes.clear()


def _limits(groups: ChannelGroups, clips: Bounds, seen: Mapping[ir.Value, Seen]) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest factor of each class, such that samples are clipped as before."""
    lower, upper = np.full(groups.count + 1, 1.0 / _LARGEST), np.full(groups.count + 1, _LARGEST)
    for node, bound in clips.items():
        value, ids = node.inputs[0], groups.values.get(node.outputs[0])
        if value is None or ids is None:
            continue
        one = seen.get(value)
        if one is None or _channel_axis(ids) is None or ids.size != one.high.size:
            lower[ids], upper[ids] = 1.0, 1.0
            continue
        places = ids.reshape(-1)
        reached = one.high > bound
        # A channel of x / s is clipped at `bound` times s.
        np.maximum.at(lower, places, np.where(reached, 1.0, np.minimum(1.0, one.high * _BELOW / bound)))
        np.minimum.at(upper, places, np.where(reached, 1.0, _BEYOND))
    return lower[:-1], upper[:-1]


def _channel_axis(ids: np.ndarray | None) -> int | None:
    """Return the one axis, from the end, along which classes differ."""
    long = [] if ids is None else [axis - ids.ndim for axis, size in enumerate(ids.shape) if size > 1]
    return long[0] if len(long) == 1 else None


def _fold(model: ir.Model, groups: ChannelGroups, scales: np.ndarray) -> int:
    """Put the factors into weights and biases; return the number of layers that change."""
    factors = np.append(scales, 1.0)
    changed = 0
    for layer in groups.layers:
        spread = factors[layer.weight.channels] / factors[layer.made]
        if (spread != 1.0).any():
            multiply(model, layer.weight, spread, _SUFFIX)
            changed += 1
    for source in groups.vectors:
        if (factors[source.channels] != 1.0).any():
            rescale(model, source, 1.0 / scales, _SUFFIX)
    return changed


def _rounded(noise: float) -> float:
    return float(f"{noise:.6g}")
