"""What can be pruned as a whole: attention heads, neurons of feed-forward layers, channels of convolutions.

A unit is an index of an atom of the coupled dimensions (`qgraph.analysis.coupling`): cutting it makes every constant
that has the atom smaller. Which kind a unit is follows from the graph alone:

    head       products of two activations run side by side over the atom
    channel    the atom counts the outputs of a convolution, of which not every one has a kernel of its own
    neuron     the atom counts the outputs of a product with a constant
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from qgraph.analysis.convolutions import Convolution, weighted_layers
from qgraph.analysis.coupling import Coupling, Site, coupling
from qgraph.analysis.dimensions import Atom
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.pipeline import Context, Skipped

__all__ = ["Kind", "Prunable", "Slot", "Units", "prunable"]

Kind = Literal["head", "neuron", "channel"]


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """A layer that makes units, or reads them.

    Attributes:
        layer: the layer.
        unit: int64: for each row (of a layer that makes units) or column (of one that reads them) of its matrix
            [N, K], the unit that it belongs to; -1 for none.
    """

    layer: LinearLayer
    unit: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
    """Units that are pruned one by one.

    Attributes:
        atom: whose indices they are.
        kind: what they are.
        name: of the first layer that makes them.
        makers: the layers whose outputs they are.
        readers: the layers whose inputs they are.
        sites: all axes of constants that get smaller.
        width: outputs of a maker that belong to one unit.
    """

    atom: Atom
    kind: Kind
    name: str
    makers: Sequence[Slot]
    readers: Sequence[Slot]
    sites: Sequence[Site]
    width: int

    @property
    def count(self) -> int:
        """The number of units."""
        return self.atom.size


@dataclasses.dataclass(frozen=True, eq=False)
class Prunable:
    """What `prunable` found.

    Attributes:
        coupling: of the model.
        units: in topological order of their first makers.
        frozen: layers whose outputs cannot be pruned, each with the reason; kind by kind.
    """

    coupling: Coupling
    units: Sequence[Units]
    frozen: Sequence[tuple[Kind, Skipped]]


def prunable(model: ir.Model, context: Context) -> Prunable:
    """Find the units of a model; for `Context.analyse`."""
    found = context.analyse(coupling, model)
    layers = [
        layer
        for layer in weighted_layers(model, context, ("Conv", "ConvTranspose")).layers
        if layer.kind != "embedding"
    ]
    heads = {atom for axis in found.heads for atom in _widest(found, found.dimensions.atoms(axis))}
    inner = {atom for axis in (*found.heads, *found.inner) for atom in found.dimensions.atoms(axis)} - heads
    makers: dict[Atom, list[Slot]] = {}
    readers: dict[Atom, list[Slot]] = {}
    frozen: list[tuple[Kind, Skipped]] = [("head", one) for one in found.lost]
    for layer in layers:
        axes = _axes(layer)
        for axis, side in zip(axes, (makers, readers), strict=False):
            for atom in found.atoms(layer.weight, axis):
                side.setdefault(atom, []).append(Slot(layer, _units(found, layer, axis, atom)))
    units = []
    for atom, slots in makers.items():
        if atom in inner or atom.size < 2:
            continue
        kind: Kind = "head" if atom in heads else _kind(slots)
        if atom.frozen:
            frozen.append((kind, Skipped(slots[0].layer.name, atom.frozen)))
            continue
        width = int(np.count_nonzero(slots[0].unit == 0))
        units.append(Units(atom, kind, slots[0].layer.name, slots, readers.get(atom, []), found.sites(atom), width))
    places = {node: place for place, node in enumerate(model.graph)}
    units.sort(key=lambda one: (places.get(one.makers[0].layer.node, 0), one.atom.number))
    return Prunable(found, units, frozen)


def _widest(found: Coupling, atoms: Sequence[Atom]) -> list[Atom]:
    """Return the atom with the most constants: of grouped heads, the groups, which keys and values have too."""
    with_sites = [atom for atom in atoms if found.sites(atom)]
    return [max(with_sites, key=lambda atom: len(found.sites(atom)))] if with_sites else []


def _kind(slots: Sequence[Slot]) -> Kind:
    return "channel" if any(slot.layer.kind == "convolution" for slot in slots) else "neuron"


def _axes(layer: LinearLayer) -> tuple[int, ...]:
    """Return the axes of the stored weight that count rows and columns; none for a convolution in groups.

    Its axes are those of its groups too: it is cut along with its neighbours.
    """
    if isinstance(layer, Convolution) and layer.groups > 1:
        return ()
    return (0, 1) if layer.transposed else (1, 0)


def _units(found: Coupling, layer: LinearLayer, axis: int, atom: Atom) -> np.ndarray:
    """Return the unit of every row or column of a layer's matrix."""
    place = found.axis(layer.weight, axis)
    assert place is not None
    terms = [_units_of_term(term, atom) for term in found.dimensions.resolved(place).terms]
    unit = np.concatenate(terms)
    # An input channel of a convolution has a column for each element of its kernel.
    return unit if axis == _axes(layer)[0] else np.repeat(unit, layer.inputs // len(unit))


def _units_of_term(term: Sequence[Atom], atom: Atom) -> np.ndarray:
    """Return which index of an atom each index of a product belongs to; -1 where the atom is not in it."""
    sizes = [one.size for one in term]
    if atom not in term:
        return np.full(math.prod(sizes), -1, np.int64)
    position = list(term).index(atom)
    every = np.repeat(np.arange(atom.size), math.prod(sizes[position + 1 :]))
    return np.tile(every, math.prod(sizes[:position]))
