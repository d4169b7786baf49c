"""Lowering rules: elements looked up, and put in places, by index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import qgraph.ir
from qgraph.coreml.data_types import MilType
from qgraph.coreml.site import Rule, Site, UnfitError

__all__ = ["RULES"]

_UPDATES = {"none": "update", "add": "add", "mul": "mul", "max": "max", "min": "min"}


def _indices(site: Site, index: int, size: int) -> Any:
    """Return indices; constant ones from 0 on, since not every device counts from the end."""
    found = qgraph.ir.constant(site.value(index))
    if found is None:
        return site[index]
    return site.constant(np.where(found < 0, found + size, found).astype(np.int32))


def _looked_up(site: Site, kind: str, **parameters: Any) -> Any:
    """Look up in the first input; booleans, which MIL does not look up, as whole numbers."""
    if site.type() is not MilType.BOOL:
        return site.emit(kind, x=site[0], **parameters)
    numbers = site.emit(kind, x=site.emit("cast", x=site[0], dtype="int32"), **parameters)
    return site.emit("not_equal", x=numbers, y=np.int32(0))


def _gather(site: Site) -> Any:
    axis = site.axis(0)
    return _looked_up(site, "gather", indices=_indices(site, 1, site.shape(0)[axis]), axis=axis)


def _gather_elements(site: Site) -> Any:
    axis = site.axis(0)
    return _looked_up(site, "gather_along_axis", indices=_indices(site, 1, site.shape(0)[axis]), axis=axis)


def _gather_nd(site: Site) -> Any:
    return _looked_up(site, "gather_nd", indices=site[1], batch_dims=site.integer("batch_dims", 0))


def _scatter_nd(site: Site) -> Any:
    mode = _UPDATES[site.text("reduction", "none")]
    return site.emit("scatter_nd", data=site[0], indices=site[1], updates=site[2], mode=mode)


def _scatter_elements(site: Site) -> Any:
    axis = site.axis(0)
    pairs = zip(site.shape(0), site.shape(1), strict=True)
    sizes = [(whole, part) for place, (whole, part) in enumerate(pairs) if place != axis]
    if any(whole != part for whole, part in sizes):
        raise UnfitError("its indices are shorter than its data along another axis than their own")
    indices = _indices(site, 1, site.shape(0)[axis])
    mode = _UPDATES[site.text("reduction", "none")]
    return site.emit("scatter_along_axis", data=site[0], indices=indices, updates=site[2], axis=axis, mode=mode)


def _one_hot(site: Site) -> Any:
    off, on = site.array(2)
    axis = site.integer("axis", -1)
    if site.type() is not MilType.INT32:
        raise UnfitError("its indices are no whole numbers of 32 or 64 bits")
    kind = site.type(2).numpy.type
    return site.emit("one_hot", indices=site[0], one_hot_vector_size=int(site.array(1).item()), axis=axis,
                     on_value=kind(on), off_value=kind(off))  # fmt: skip


RULES: Mapping[str, Rule] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "OneHot": _one_hot,
}
