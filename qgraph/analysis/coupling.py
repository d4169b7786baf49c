"""Which dimensions of which tensors have to shrink together, from the graph alone.

    y = Conv(x, W)        the axis 0 of W is the channels of y, its axis 1 those of x
    z = y + r             the channels of y and r are the same
    Reshape, Concat, ...  products and sums of them (`qgraph.analysis.dimensions`)

Every axis of every tensor is written in atoms. Cutting an index of an atom means to cut it from every constant that has
the atom, and to change the sizes that the graph states: `Coupling.edits` knows where. What an operator does to its axes
stands in the rules of `coupling_rules`; whatever they cannot follow is frozen, with the reason, and so is all that is
the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.dimensions import Atom, Axis, Dimensions
from qgraph.analysis.shape_facts import Data
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.pipeline import Context, Skipped

__all__ = ["Coupling", "Cut", "Edit", "Site", "coupling"]


@dataclasses.dataclass(frozen=True)
class Site:
    """An axis of a constant.

    Attributes:
        value: the constant.
        axis: which of its axes.
    """

    value: ir.Value
    axis: int


class Cut:
    """Which indices stay, and what that makes of sizes.

    Args:
        dimensions: of the coupling.
        keep: atom -> the indices of it that stay, in rising order.
    """

    def __init__(self, dimensions: Dimensions, keep: Mapping[Atom, np.ndarray]) -> None:
        self._dimensions = dimensions
        self._keep = keep

    def indices(self, axis: Axis | None) -> np.ndarray | None:
        """Return the indices of an axis that stay, or None where all do."""
        return None if axis is None else self._dimensions.cut(axis, self._keep)

    def size(self, axis: Axis) -> int:
        """Return how many indices of an axis stay."""
        indices = self.indices(axis)
        return axis.size if indices is None else len(indices)


Edit = Callable[[ir.Model, Cut], None]
"""Changes what a node says of sizes, in attributes or constants, to what is left."""


class Coupling:
    """The axes of a model's tensors, in atoms.

    Attributes:
        dimensions: knows the atoms.
        axes: value -> its axes; None for one whose size is known only when the model runs.
        edits: what has to change beside the constants.
        heads: axes that count attention heads: those over which products of two activations run side by side.
        inner: axes within a head: those that such products sum over, or give.
        lost: attention whose heads could not be followed, each with the reason.
        shapes: of the model.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.dimensions = Dimensions()
        self.axes: dict[ir.Value, tuple[Axis | None, ...]] = {}
        self.edits: list[Edit] = []
        self.heads: list[Axis] = []
        self.inner: list[Axis] = []
        self.lost: list[Skipped] = []
        self.shapes = shapes
        self._sites: dict[Atom, list[Site]] | None = None

    def axis(self, value: ir.Value, index: int) -> Axis | None:
        """Return an axis of a value."""
        axes = self.of(value)
        return None if axes is None else axes[index]

    def atoms(self, value: ir.Value, index: int) -> list[Atom]:
        """Return the atoms of an axis of a value, each once; none where its size is not known."""
        axis = self.axis(value, index)
        return [] if axis is None else self.dimensions.atoms(axis)

    def sites(self, atom: Atom) -> Sequence[Site]:
        """Return the axes of constants that an atom is in, in the order of the graph; call it when all is coupled."""
        if self._sites is None:
            self._sites = {}
            for value, axes in self.axes.items():
                if not is_weight(value):
                    continue
                for index, axis in enumerate(axes):
                    for one in [] if axis is None else self.dimensions.atoms(axis):
                        self._sites.setdefault(one, []).append(Site(value, index))
        return self._sites.get(atom, [])

    # --- for the rules ------------------------------------------------------------------------------------------------

    def of(self, value: ir.Value | None) -> tuple[Axis | None, ...] | None:
        """Return the axes of a value, made when they are first asked for; None where its rank is not known."""
        if value is None:
            return None
        if value not in self.axes:
            dims = self.shapes.dims(value)
            if dims is None:
                return None
            made = [self.dimensions.axis(dim) if isinstance(dim, int) and dim > 0 else None for dim in dims]
            self.axes[value] = tuple(made)
        return self.axes[value]

    def join(self, one: Axis | None, other: Axis | None, node: ir.Node) -> None:
        """Say that two axes are the same."""
        if one is not None and other is not None:
            self.dimensions.unify(one, other, at(node))
        else:
            known = one if one is not None else other
            if known is not None:
                self.dimensions.freeze(known, f"its size is not certain at {at(node)}")

    def freeze(self, axis: Axis | None, reason: str) -> None:
        """Say that an axis cannot be cut."""
        if axis is not None:
            self.dimensions.freeze(axis, reason)

    def note_heads(self, heads: Sequence[Axis | None], inner: Sequence[Axis | None]) -> None:
        """Keep which axes count heads, and which lie within one."""
        self.heads += [axis for axis in heads if axis is not None]
        self.inner += [axis for axis in inner if axis is not None]

    def freeze_value(self, value: ir.Value | None, reason: str) -> None:
        """Say that no axis of a value can be cut."""
        for axis in self.of(value) or ():
            self.freeze(axis, reason)

    def same(self, one: ir.Value, other: ir.Value, node: ir.Node) -> None:
        """Say that two values have the same axes, aligned at the last, as broadcasting does: an axis of size 1 is any.

        A size that only one side knows is none that could be cut.
        """
        ones, others = self.of(one), self.of(other)
        if ones is None or others is None:
            for value in (one, other):
                self.freeze_value(value, f"the shapes at {at(node)} are not known")
            return
        for left, right in zip(reversed(ones), reversed(others), strict=False):
            if 1 in (_size(left), _size(right)) or (left is None and right is None):
                continue
            self.join(left, right, node)

    def data(self, value: ir.Value | None) -> Data | None:
        """Return the elements of a small integer tensor."""
        return self.shapes.data(value)

    def static(self, value: ir.Value | None) -> list[int] | None:
        """Return the elements of a small integer tensor if all are known."""
        data = self.data(value)
        if data is None or not all(isinstance(element, int) for element in data.elements):
            return None
        return [int(element) for element in data.elements if isinstance(element, int)]


def _size(axis: Axis | None) -> int | None:
    return None if axis is None else axis.size


def at(node: ir.Node) -> str:
    """Return "'NAME' (OPERATOR)"."""
    return f"'{qgraph.ir.node_label(node)}' ({node.op_type})"


def is_weight(value: ir.Value) -> bool:
    """Tell whether a value is a floating-point or integer constant of the main graph that can be cut."""
    return value.const_value is not None and value.producer() is None


def coupling(model: ir.Model, context: Context) -> Coupling:
    """Find which dimensions of the model have to shrink together; for `Context.analyse`.

    Frozen are all dimensions of inputs and outputs of the model, of what subgraphs read, and of what an operator
    reads or gives for which there is no rule.
    """
    from qgraph.analysis import coupling_rules

    found = Coupling(context.analyse(shapes_of, model))
    for value in model.graph.inputs:
        found.freeze_value(value, f"'{value.name}' is an input of the model")
    for value in model.graph.initializers.values():
        if value.dtype is not None and value.dtype.is_floating_point():
            found.of(value)
        else:
            found.freeze_value(value, f"'{value.name}' holds no weights")
    for node in model.graph:
        coupling_rules.apply(node, found)
    for value in model.graph.outputs:
        found.freeze_value(value, f"'{value.name}' is an output of the model")
    return found
