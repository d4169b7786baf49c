"""Cutting indices of atoms out of a model: its constants get smaller, and what states their sizes follows.

    W [64, 32, 3, 3], b [64], V [10, 64]    =>    W [48, 32, 3, 3], b [48], V [10, 48]        48 of the 64 stay

`qgraph.analysis.coupling` says what belongs together. The shapes that the model states for values in between are
dropped where they change: shape inference finds them again.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.coupling import Coupling, Cut, is_weight
from qgraph.analysis.dimensions import Atom

__all__ = ["cut"]

_LAZY_ABOVE = 1 << 16
"""Constants of more elements are cut when they are read or written."""


def cut(model: ir.Model, found: Coupling, keep: Mapping[Atom, np.ndarray]) -> int:
    """Cut a model down to the indices that stay; what the coupling says of it is not true any more afterwards.

    Args:
        model: is changed.
        found: its coupling, as it stands.
        keep: atom -> the indices that stay, in rising order.

    Returns:
        the number of constants that got smaller.

    Raises:
        ValueError: an atom is frozen, nothing of it would stay, or indices are out of range or not rising.
    """
    for atom, indices in keep.items():
        if atom.frozen:
            raise ValueError(f"{atom} cannot be cut: {atom.frozen}")
        given = np.asarray(indices)
        if not given.size or given[0] < 0 or given[-1] >= atom.size or (np.diff(given) <= 0).any():
            raise ValueError(f"of {atom}, indices that rise from 0 to {atom.size - 1} can stay, at least one: {given}")
    what = Cut(found.dimensions, keep)
    for edit in found.edits:
        edit(model, what)
    changed = 0
    for value, axes in found.axes.items():
        kept = [what.indices(axis) for axis in axes]
        if all(indices is None for indices in kept):
            continue
        if is_weight(value) and value.const_value is not None:
            value.const_value = _taken(value.const_value, kept)
            value.shape = ir.Shape(value.const_value.shape.numpy())
            changed += 1
        elif value.shape is not None:
            value.shape = ir.Shape(
                [dim if indices is None else len(indices) for dim, indices in zip(value.shape, kept, strict=True)]
            )
    return changed


def _taken(tensor: ir.TensorProtocol, kept: list[np.ndarray | None]) -> ir.TensorProtocol:
    def compute() -> np.ndarray:
        array = tensor.numpy()
        for axis, indices in enumerate(kept):
            if indices is not None:
                array = np.take(array, indices, axis)
        return np.ascontiguousarray(array)

    if tensor.size <= _LAZY_ABOVE:
        return ir.tensor(compute(), dtype=tensor.dtype, name=tensor.name)
    shape = [
        size if indices is None else len(indices) for size, indices in zip(tensor.shape.numpy(), kept, strict=True)
    ]
    lazy = qgraph.ir.lazy(compute, tensor.dtype, shape)
    lazy.name = tensor.name
    return lazy
