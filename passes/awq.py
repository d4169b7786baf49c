"""Weights scaled so that the inputs that matter are rounded finer.

    y = MatMul(x, W)    =>    y = MatMul(x / s, diag(s) W)      s = mean |x| ^ a, a searched for each input x

Exact in real numbers; what changes is what a quantizer behind it (`rtn`, `hqq`, `gptq`) makes of the weights: a channel
of large activations gets a larger weight and so a smaller relative error. The division goes into the constants that
make x (`qgraph.analysis.scale_folding`), else into a Mul, where enough of the error goes for that. All layers that read
x share s. The exponent is the one of the least output error of the rounded weights, tr(E H E'), in the inputs that
calibration sends.

It does not fire on a weight that others read too (an output layer tied to the embedding), nor where no exponent is
better than none.

Source: Lin et al., "AWQ" (2023), sections 3.2 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qgraph.analysis.block_stream import BlockStream
from qgraph.analysis.linear_layers import LinearLayer, linear_layers, matches
from qgraph.analysis.scale_folding import Folding, by_input, find_folding, is_shared, scale_input
from qgraph.analysis.shapes import shapes_of
from qgraph.errors import UserError
from qgraph.numerics.awq import AwqScales, search_awq_scales
from qgraph.numerics.hessian import Hessian
from qgraph.numerics.weights import WeightScheme
from qgraph.passes._weight_options import chosen_bits
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["Awq"]

_SUFFIX = "awq"


@dataclass(frozen=True)
class Awq(Pass):
    """Scale the channels of linear layers' inputs for the least error of a quantizer behind it."""

    name: ClassVar[str] = "awq"
    bits: int = field(default=4, metadata={"help": "width that the quantizer behind it gives the weights"})
    group: int = field(default=32, metadata={"help": "inputs that share a scale there; 0 for whole rows"})
    symmetric: bool = field(default=False, metadata={"help": "no zero points there"})
    grid: int = field(default=20, metadata={"help": "exponents between 0 and 1 that are tried"})
    least_gain: float = field(default=0.1, metadata={"help": "share of the error that must go before a Mul is spent"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Scale every input where it helps; `figures` has error before and after, and the exponent, of each.

        Raises:
            UserError: bits and group do not go together, there are no calibration samples, the model does not run on
                one, or a weight is NaN or infinite.
        """
        if self.grid < 1:
            raise UserError(f"awq: grid is a number of exponents, 1 or more, not {self.grid}")
        self._scheme(self.bits)
        found = linear_layers(model)
        groups, skipped = self._groups(found.layers)
        skipped = [*found.skipped, *skipped]
        if not groups:
            return Report(skipped=skipped)
        shapes = context.analyse(shapes_of, model)
        paths = {x: find_folding(x, layers, shapes, found.layers) for x, layers in groups.items()}
        # The model must not change while samples stream through it, and no search depends on another's scales: they
        # multiply whole rows of the other weights, which rounding follows.
        searched = list(self._search(model, context, paths))
        changed, muls, figures = 0, list[str](), dict[str, list[float]]()
        for folding, result in searched:
            name = folding.x.name or ""
            gain = 1.0 - result.after / result.before if result.before > 0.0 else 0.0
            pays = gain > (0.0 if folding.origin is not None else self.least_gain)
            figures[name] = [_rounded(result.before), _rounded(result.after if pays else result.before)]
            if not pays:
                why = "no scaling lowers its error" if folding.origin is not None else self._no_mul(gain, folding)
                skipped += [Skipped(layer.name, why) for layer in folding.layers]
                continue
            scale_input(model, folding, result.scales, suffix=_SUFFIX)
            changed += len(folding.layers)
            if folding.origin is None:
                muls.append(f"a Mul scales '{name}': {folding.reason}")
        scaled = sum(before != after for before, after in figures.values())
        notes = [f"{scaled} of {len(figures)} inputs scaled, {scaled - len(muls)} of them without a Mul"]
        return Report(changed=changed, skipped=skipped, notes=notes + muls, figures={"output_error": figures})

    def _groups(self, layers: Sequence[LinearLayer]) -> tuple[dict[ir.Value, list[LinearLayer]], list[Skipped]]:
        """Return the layers to scale by what they read: those that are left out keep what they read as it is."""
        kept, skipped = list[LinearLayer](), list[Skipped]()
        for layer in layers:
            reason = self._why_not(layer)
            if reason is None:
                kept.append(layer)
            else:
                skipped.append(Skipped(layer.name, reason))
        return by_input(kept), skipped

    def _why_not(self, layer: LinearLayer) -> str | None:
        if matches(layer.name, self.exclude):
            return "it is excluded"
        if layer.kind == "embedding":
            return "it is an embedding: no activation is multiplied with it"
        if chosen_bits([layer.node], self.bits) is None:
            return "it was chosen to stay in float"
        return "its weight is used elsewhere too" if is_shared(layer) else None

    def _no_mul(self, gain: float, folding: Folding) -> str:
        return f"a Mul would take {max(gain, 0.0):.0%} of its error, and is needed: {folding.reason}"

    def _search(
        self, model: ir.Model, context: Context, paths: Mapping[ir.Value, Folding]
    ) -> Iterator[tuple[Folding, AwqScales]]:
        layers = [layer for folding in paths.values() for layer in folding.layers]
        matrices = sum(8 * folding.channels**2 for folding in paths.values())
        together: Literal["layer", "block"] = "block" if matrices <= context.calibration_memory else "layer"
        stream = BlockStream(model, context, layers, who=self.name, sequential=together)
        done: set[ir.Value] = set()
        for stage in stream.stages():
            hessians = {x: Hessian(one[0].inputs) for x, one in stage.layers.items() if x not in done}
            # What several slices of the graph read comes with each of them.
            done |= hessians.keys()
            for rows in stage.rows() if hessians else ():
                for x, hessian in hessians.items():
                    hessian.add(rows[x].changed)
            for x, hessian in hessians.items():
                yield paths[x], self._scales(paths[x], hessian)

    def _scheme(self, bits: int) -> WeightScheme:
        try:
            return WeightScheme(bits=bits, group=self.group, symmetric=self.symmetric)
        except ValueError as error:
            raise UserError(f"awq: {error}") from error

    def _scales(self, folding: Folding, hessian: Hessian) -> AwqScales:
        widths = [chosen_bits([layer.node], self.bits) for layer in folding.layers]
        bits = min(width for width in widths if width is not None)
        scheme = self._scheme(bits)
        weights = [layer.matrix() for layer in folding.layers]
        # Scales that follow the inputs' magnitudes alone: equal where these are, as channels that are tied need.
        magnitudes = _tied_mean(hessian, folding.tied)
        try:
            return search_awq_scales(weights, magnitudes, hessian.matrix, scheme, grid=self.grid, by_weight=False)
        except ValueError as error:
            raise UserError(f"awq: '{folding.layers[0].name}': {error}: mend the model") from error


def _tied_mean(hessian: Hessian, tied: np.ndarray) -> np.ndarray:
    """Return mean |x| of each channel, over all channels that have to take the same scale."""
    total = np.bincount(tied, hessian.mean_abs, tied.size)
    return np.asarray(total[tied] / np.bincount(tied, minlength=tied.size)[tied])


def _rounded(error: float) -> float:
    return float(f"{error:.6g}")
