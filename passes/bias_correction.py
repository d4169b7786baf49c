"""The mean error that quantization left in a layer's output, taken away by its bias.

    y = Conv(D(Q(x)), D(W8), D(b32))    =>    y = Conv(D(Q(x)), D(W8), D(b32 + round(shift / scale)))

shift is the mean of exact minus quantized output, channel by channel, over calibration samples. Gemm, ConvTranspose
and a MatMul with an Add of a constant likewise; float biases are shifted as they are, and a Conv, ConvTranspose or Gemm
without a bias gets one.

    fast    exact and quantized layer read the same exact input: what the layer itself got wrong. One run
    full    layer by layer in the quantized model, whose layers before are corrected already: what reached it, too. The
            means are those behind the Relu, Clip, HardSwish or HardSigmoid that alone reads y, where there is one

The exact output is that of the model before the first pass that lost something, so this pass stands behind those. It
does not fire where nothing was lost, on a MatMul without an Add (one would cost time), on nodes inside subgraphs, and
where the error is chance: on channels whose mean error lies within its own standard error, and on layers where the
shift would not help a sample that it was not taken from. A second run finds nothing left; what `full` has done it
leaves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.linear_layers import matches
from qgraph.analysis.paired_layers import PairedLayer, paired_layers
from qgraph.analysis.paired_means import local_errors
from qgraph.analysis.paired_stream import sequential_errors
from qgraph.numerics.bias_correction import Errors, bias_shift
from qgraph.passes._bias_values import add_to_bias
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["BiasCorrection"]

_MARK = "qgraph.bias"
"""Metadata of a node whose bias was looked at together with what comes before it."""


@dataclass(frozen=True)
class BiasCorrection(Pass):
    """Shift biases by the mean error that quantization left in their layers' outputs."""

    name: ClassVar[str] = "bias-correction"
    method: Literal["fast", "full"] = field(
        default="fast", metadata={"help": "each layer by itself, or with what reaches it from the layers before"}
    )
    significance: float = field(
        default=1.0, metadata={"help": "standard errors of a mean error that count as chance; 0 trusts every mean"}
    )
    samples: int = field(default=128, metadata={"help": "calibration samples to use at most; 0 for all"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def __post_init__(self) -> None:
        if not self.significance >= 0.0:
            raise ValueError(f"significance is {self.significance}, but must not be negative")
        if self.samples < 0:
            raise ValueError(f"samples is {self.samples}, but must not be negative")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Correct; `figures` has the shift that each layer's channels need before and after, as root mean squares.

        Raises:
            UserError: there are no calibration samples, or the model does not run on one.
        """
        if context.reference is None:
            return Report(notes=["no pass before lost anything: there is nothing to correct"])
        layers, skipped = self._layers(model, context.reference)
        if not layers:
            return Report(skipped=skipped)
        work = _Corrections(model.graph, self.significance)
        if self.method == "full":
            sequential_errors(model, context.reference, layers, context, work.correct, who=self.name, most=self.samples)
            for layer in layers:
                layer.last.metadata_props[_MARK] = "full"
        else:
            found = local_errors(context.reference, layers, context, who=self.name, most=self.samples)
            for layer, errors in found.items():
                work.correct(layer, errors)
        notes = [f"{len(work.changed)} of {len(layers)} biases corrected"] if work.changed else []
        return Report(len(work.changed), [*skipped, *work.skipped], notes, {"shifts": work.figures})

    def _layers(self, model: ir.Model, reference: ir.Model) -> tuple[list[PairedLayer], list[Skipped]]:
        found, skipped = paired_layers(model, reference)
        layers = []
        for layer in found:
            if matches(layer.name, self.exclude):
                skipped.append(Skipped(layer.name, "it is excluded"))
            elif self.method == "fast" and not layer.is_quantized:
                continue
            elif _MARK in layer.last.metadata_props:
                skipped.append(Skipped(layer.name, "method=full corrected it, for what comes before it too"))
            else:
                layers.append(layer)
        return layers, skipped


class _Corrections:
    """Corrects one layer after the other.

    Attributes:
        changed: the layers whose bias is another now.
        skipped: those that were left alone, with the reason.
        figures: the shift that each layer needs before and after.
    """

    def __init__(self, graph: ir.Graph, significance: float) -> None:
        self._graph = graph
        self._significance = significance
        self.changed: list[PairedLayer] = []
        self.skipped: list[Skipped] = []
        self.figures: dict[str, Sequence[float]] = {}

    def correct(self, layer: PairedLayer, errors: Errors) -> np.ndarray:
        """Shift a layer's bias and return by how much."""
        rows, weights = errors.arrays()
        nothing = np.zeros(layer.channels)
        if not rows.size:
            self.skipped.append(Skipped(layer.name, "its output was empty on every sample"))
            return nothing
        if not np.isfinite(rows).all():
            self.skipped.append(Skipped(layer.name, "its output holds NaN or infinity"))
            return nothing
        mean = bias_shift(rows, weights, 0.0)
        shift = bias_shift(rows, weights, self._significance)
        assert mean is not None
        if shift is None and mean.any():
            self.skipped.append(Skipped(layer.name, "what some samples want would not help the others"))
        added = nothing if shift is None else add_to_bias(self._graph, layer, shift)
        if added.any():
            self.changed.append(layer)
        self.figures[qgraph.ir.node_label(layer.node)] = [_size(mean), _size(mean - added)]
        return added


def _size(errors: np.ndarray) -> float:
    """Return the root mean square, to four figures."""
    return float(f"{np.sqrt(np.mean(np.square(errors))):.4g}")
