"""A width for each weight, under a bound on the average.

    MatMul(x, W)    =>    MatMul(x, W), noted: 8 bits in groups of 128

Nothing is rounded here: the widths, and how many inputs share a scale, are noted in the metadata of the nodes that read
each weight, and `rtn`, `hqq` or `gptq` behind this pass take them before their own `bits` and `group`:

    mixed-bits{budget=4.25},gptq          mixed-bits{like=4g32},rtn

The cost of each choice is measured (`qgraph.analysis.sensitivity`), and the choices of the least total cost within the
budget are taken, embedding and output layer included. The budget is the average number of bits per weight of all that
is stored: codes in the width that a runtime executes (3 bits take 4, 5 and 6 take 8), scales and zero points;
`count=information` counts codes in their own width. With `like`, the budget is what a uniform scheme would take.

It does not fire on weights that are no linear layer's or that `exclude` names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qgraph.analysis.linear_layers import LinearLayer, LinearLayers, linear_layers, matches
from qgraph.analysis.sensitivity import sensitivities
from qgraph.errors import UserError
from qgraph.numerics.allocation import allocate_bits
from qgraph.numerics.packing import container
from qgraph.numerics.weights import WeightScheme
from qgraph.passes._weight_options import set_bits
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["MixedBits"]


@dataclass(frozen=True)
class MixedBits(Pass):
    """Choose the width of each weight for the least error under a bound on the average."""

    name: ClassVar[str] = "mixed-bits"
    budget: float = field(default=4.25, metadata={"help": "average bits per weight, scales and zero points included"})
    like: str = field(
        default="", metadata={"help": "instead of the budget: what a uniform scheme takes, such as 4g32 (bits, group)"}
    )
    choices: tuple[int, ...] = field(default=(2, 4, 8), metadata={"help": "widths to choose from: 2, 3, 4, 5, 6, 8"})
    groups: tuple[int, ...] = field(
        default=(32, 64, 128), metadata={"help": "how many inputs may share a scale: sizes to choose from"}
    )
    symmetric: bool = field(default=False, metadata={"help": "the quantizer behind it has no zero points"})
    metric: Literal["kl", "hessian"] = field(
        default="kl", metadata={"help": "cost: divergence of the model's output, or share of each layer's own output"}
    )
    count: Literal["disk", "information"] = field(
        default="disk", metadata={"help": "count codes in the width that runtimes execute, or in their own"}
    )
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Note widths; `figures` has the cost of every choice and what was chosen, by layer.

        Raises:
            UserError: the options do not go together, the budget is below the least choice, there are no calibration
                samples, or the model does not run on one.
        """
        schemes = self._schemes()
        weights, skipped = self._weights(context.analyse(linear_layers, model))
        if not weights:
            return Report(skipped=skipped)
        sizes = np.array([[self._bits(layers[0], scheme) for scheme in schemes] for layers in weights.values()])
        elements = np.array([layers[0].inputs * layers[0].outputs for layers in weights.values()])
        budget = self._budget(weights, int(elements.sum()))
        least = sizes.min(axis=1).sum() / elements.sum()
        if least > budget:
            raise UserError(
                f"mixed-bits: {budget:g} bits per weight are too few: the smallest choices take {least:.2f}, with "
                "scales and zero points. Raise the budget, or allow fewer bits or longer groups."
            )
        found = sensitivities(model, context, weights, schemes, metric=self.metric, who=self.name)
        errors = np.array([one.errors for one in found])
        chosen = [schemes[index] for index in allocate_bits(errors, sizes, float(budget * elements.sum()))]
        for one, scheme in zip(found, chosen, strict=True):
            for layer in one.layers:
                set_bits(layer.node, scheme.bits, scheme.group)
        figures = {
            one.name: {
                "bits": scheme.bits,
                "group": scheme.group,
                "errors": {
                    _label(each): float(f"{error:.4g}") for each, error in zip(schemes, one.errors, strict=True)
                },
            }
            for one, scheme in zip(found, chosen, strict=True)
        }
        taken = sum(row[schemes.index(scheme)] for row, scheme in zip(sizes, chosen, strict=True))
        notes = [f"{taken / elements.sum():.2f} bits per weight of {budget:.4g}: {_counted(chosen)}"]
        changed = sum(len(layers) for layers in weights.values())
        return Report(changed=changed, skipped=skipped, notes=notes, figures={"sensitivity": figures})

    def _budget(self, weights: Mapping[ir.Value, Sequence[LinearLayer]], elements: int) -> float:
        """Return the average bits per weight to keep to."""
        if not self.like:
            return self.budget
        bits, separator, group = self.like.partition("g")
        try:
            if not separator:
                raise ValueError("it has no 'g'")
            uniform = WeightScheme(bits=int(bits), group=int(group), symmetric=self.symmetric)
        except ValueError as error:
            raise UserError(f"mixed-bits: like='{self.like}' is not bits and group, as in 4g32: {error}") from error
        return sum(self._bits(layers[0], uniform) for layers in weights.values()) / elements

    def _schemes(self) -> list[WeightScheme]:
        try:
            return [
                WeightScheme(bits=bits, group=group, symmetric=self.symmetric)
                for bits in sorted(set(self.choices))
                for group in sorted(set(self.groups))
            ]
        except ValueError as error:
            raise UserError(f"mixed-bits: {error}") from error

    def _weights(self, found: LinearLayers) -> tuple[Mapping[ir.Value, Sequence[LinearLayer]], list[Skipped]]:
        kept: dict[ir.Value, Sequence[LinearLayer]] = {}
        skipped = list(found.skipped)
        for weight, layers in found.by_weight.items():
            if any(matches(layer.name, self.exclude) for layer in layers):
                skipped += [Skipped(layer.name, "it is excluded") for layer in layers]
            else:
                kept[weight] = layers
        return kept, skipped

    def _bits(self, layer: LinearLayer, scheme: WeightScheme) -> float:
        """Return the bits that a weight takes in a scheme."""
        width = container(scheme).bits if self.count == "disk" else scheme.bits
        groups = scheme.groups(layer.inputs)
        dtype = layer.weight.dtype or ir.DataType.FLOAT
        per_group = 8 * dtype.itemsize + (0 if self.symmetric else width)
        return float(layer.outputs * (layer.inputs * width + groups * per_group))


def _label(scheme: WeightScheme) -> str:
    return f"{scheme.bits}g{scheme.group}"


def _counted(schemes: Sequence[WeightScheme]) -> str:
    counts = Counter((scheme.bits, scheme.group) for scheme in schemes)
    parts = [f"{count} weights at {bits} bits in groups of {group}" for (bits, group), count in sorted(counts.items())]
    return ", ".join(parts)
