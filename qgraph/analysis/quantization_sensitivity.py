"""Which quantized tensors hurt: the SQNR of each one's own error, and of what that error does to the outputs.

    own SQNR       10 log10( ||x||^2 / ||e||^2 )         e = D(Q(x)) - x, or a constant's dequantized form minus it
    output SQNR    10 log10( ||y||^2 / ||J e||^2 )       J: the derivative of the outputs by the tensor

All tensors, weights and activations alike, come from one pass over the samples (`perturbation_effects`). The errors'
effects on the outputs add up, so that the SQNR of all together, and of all but some, is predicted too. Branches count
as far as they read the rounded form; a weight with several readers has one effect through all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import onnx_ir as ir

from qgraph.analysis.perturbation_effects import Effects, decibels, effects
from qgraph.analysis.quantized_tensors import QuantizedTensor, quantized_tensors
from qgraph.errors import UserError
from qgraph.pipeline import Context

__all__ = ["NodeSensitivity", "Sensitivities", "TensorSensitivity", "sensitivities_of", "tensor_sensitivities"]

Method = Literal["gradient", "measured", "none"]


@dataclasses.dataclass(frozen=True)
class TensorSensitivity:
    """What rounding one tensor does.

    Attributes:
        tensor: its name in the float model.
        kind: of the tensor.
        readers: nodes of the float model that get the rounded form.
        bits: of its integers.
        own_sqnr_db: of its own error; None where there is none, or the tensor is all zero.
        output_sqnr_db: of what the error does to the outputs; None where that is nothing, or not known.
        share: its part of the noise power of all tensors at the outputs, each on its own; 0 where it is not known.
        method: where the effect is from: the gradients, measuring, or nowhere.
    """

    tensor: str
    kind: Literal["weight", "activation"]
    readers: tuple[str, ...]
    bits: int
    own_sqnr_db: float | None
    output_sqnr_db: float | None
    share: float
    method: Method


class NodeSensitivity(NamedTuple):
    """What rounding the weights and the input activations of one node does to the outputs, in dB; None for nothing.

    An activation that several nodes read counts for each in equal parts.
    """

    node: str
    weight_db: float | None
    activation_db: float | None
    output_db: float | None


@dataclasses.dataclass(frozen=True)
class Sensitivities:
    """The sensitivities of all quantized tensors.

    Attributes:
        samples: number of feeds that were run.
        tensors: in the order of the graph.
        output_sqnr_db: predicted, for all tensors together; None where there is no error.
        notes: what could not be told, and why.
        effects: what the figures are from; None for what `from_json` read.
    """

    samples: int
    tensors: tuple[TensorSensitivity, ...]
    output_sqnr_db: float | None
    notes: tuple[str, ...] = ()
    effects: Effects | None = dataclasses.field(default=None, compare=False, repr=False)

    def worst_first(self) -> list[TensorSensitivity]:
        """Return the tensors by falling effect on the outputs; those without a figure last."""
        return sorted(self.tensors, key=lambda one: (one.method == "none", -one.share))

    def predicted(self, without: Iterable[str] = ()) -> float | None:
        """Return the SQNR of the outputs in dB if the tensors `without` were exact; None if there were no error."""
        left_out = set(without)
        kept = [index for index, one in enumerate(self.tensors) if one.tensor not in left_out]
        if self.effects is not None:
            return self.effects.sqnr_db(self.effects.names[index] for index in kept)
        return decibels(1.0, sum(_power(self.tensors[index].output_sqnr_db) for index in kept))

    def nodes(self) -> list[NodeSensitivity]:
        """Return the nodes that read rounded tensors, the worst first."""
        weights: dict[str, float] = {}
        activations: dict[str, float] = {}
        for one in self.tensors:
            into = weights if one.kind == "weight" else activations
            part = 1 if one.kind == "weight" else max(1, len(one.readers))
            for node in one.readers:
                into[node] = into.get(node, 0.0) + _power(one.output_sqnr_db) / part
        both = {node: weights.get(node, 0.0) + activations.get(node, 0.0) for node in (weights | activations)}
        return [
            NodeSensitivity(
                node,
                decibels(1.0, weights.get(node, 0.0)),
                decibels(1.0, activations.get(node, 0.0)),
                decibels(1.0, both[node]),
            )
            for node in sorted(both, key=lambda node: (-both[node], node))
        ]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "samples": self.samples,
            "output_sqnr_db": self.output_sqnr_db,
            "tensors": [dataclasses.asdict(one) | {"readers": list(one.readers)} for one in self.tensors],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Sensitivities:
        """Read what `to_json` wrote."""
        tensors = tuple(TensorSensitivity(**{**one, "readers": tuple(one["readers"])}) for one in document["tensors"])
        return cls(document["samples"], tensors, document["output_sqnr_db"], tuple(document["notes"]))


def _power(sqnr_db: float | None) -> float:
    return 0.0 if sqnr_db is None else float(10 ** (-sqnr_db / 10))


def tensor_sensitivities(reference: ir.Model, quantized: ir.Model, context: Context) -> Sensitivities:
    """Return the sensitivity of every tensor that `quantized` rounds.

    Args:
        reference: the float model, with the same names; opset 16 or later. Not changed.
        quantized: made of it, with QuantizeLinear and DequantizeLinear. Not changed.
        context: its calibration samples, seed, threads, memory bound and progress are used.

    Raises:
        UserError: nothing is quantized, there are no samples, the float model does not run on one, or is of an older
            opset.
    """
    found, notes = quantized_tensors(reference, quantized)
    if not found:
        raise UserError("no tensor is quantized by QuantizeLinear or DequantizeLinear, so that none has a sensitivity")
    return sensitivities_of(reference, found, context, notes)


def sensitivities_of(
    reference: ir.Model, tensors: Iterable[QuantizedTensor], context: Context, notes: Iterable[str] = ()
) -> Sensitivities:
    """Return the sensitivities of tensors whose errors are known; the other arguments as for `tensor_sensitivities`."""
    chosen = {f"{number} {one.tensor}": one for number, one in enumerate(tensors)}
    found = effects(reference, context, {name: one.perturbation for name, one in chosen.items()})
    powers = {name: found.power([name]) for name in chosen}
    total = sum(powers.values())
    rows = tuple(
        TensorSensitivity(
            tensor=one.tensor,
            kind=one.kind,
            readers=one.readers,
            bits=one.bits,
            own_sqnr_db=_rounded(decibels(float(found.signal[index]), float(found.noise[index]))),
            output_sqnr_db=_rounded(decibels(1.0, powers[name])),
            share=float(f"{powers[name] / total:.4g}") if total else 0.0,
            method="none" if name in found.unknown else "measured" if name in found.measured else "gradient",
        )
        for index, (name, one) in enumerate(chosen.items())
    )
    unknown = [f"'{chosen[name].tensor}': {reason}" for name, reason in found.unknown.items()]
    return Sensitivities(found.samples, rows, _rounded(found.sqnr_db(chosen)), (*notes, *unknown), found)


def _rounded(figure: float | None) -> float | None:
    return None if figure is None else round(figure, 2)
