"""How many multiply-adds of a model's products with weights are left when units are cut.

    Conv 64 -> 32 channels, of which 48 and 24 stay:    48 / 64 * 24 / 32 of its multiply-adds

A layer gets cheaper with each axis of its weight that loses indices, whatever couples it with other layers. Dynamic
axes count as in `qgraph.analysis.cost`; what products of two activations take is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.convolutions import weighted_layers
from qgraph.analysis.cost import cost
from qgraph.analysis.coupling import Coupling
from qgraph.analysis.dimensions import Atom, Axis
from qgraph.pipeline import Context

__all__ = ["CutMultiplyAdds"]


class CutMultiplyAdds:
    """Counts multiply-adds before a cut.

    Args:
        model: as it stands.
        found: its coupling.
        context: caches analyses.
    """

    def __init__(self, model: ir.Model, found: Coupling, context: Context) -> None:
        self._dimensions = found.dimensions
        taken = {one.name: one.multiply_adds or 0 for one in cost(model).nodes if not one.graph}
        self._layers: list[tuple[int, list[Axis]]] = []
        for layer in weighted_layers(model, context, ("Conv", "ConvTranspose")).layers:
            axes = [found.dimensions.resolved(axis) for axis in found.of(layer.weight) or () if axis is not None]
            self._layers.append((taken.get(qgraph.ir.node_label(layer.node), 0), axes))

    @property
    def total(self) -> float:
        """Of all layers as they are."""
        return float(sum(count for count, _ in self._layers))

    def left(self, stay: Mapping[Atom, int]) -> float:
        """Return the multiply-adds of all layers when so many indices of atoms stay; of other atoms, all."""
        return sum(count * math.prod(_share(axis, stay) for axis in axes) for count, axes in self._layers)

    def of_one(self, atom: Atom) -> float:
        """Return the multiply-adds that go with one index of an atom."""
        return self.total - self.left({atom: atom.size - 1})


def _share(axis: Axis, stay: Mapping[Atom, int]) -> float:
    """Return the share of the indices of an axis that stays."""
    return sum(math.prod(stay.get(atom, atom.size) for atom in term) for term in axis.terms) / axis.size
