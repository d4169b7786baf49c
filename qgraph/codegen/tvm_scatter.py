"""Operators that put elements at computed places, and the one that puts them in order.

A tensor expression says where an element comes from, so these are turned around: for each place the last update that
is meant for it, and for each rank the element that has it.
"""

from __future__ import annotations

import numpy as np

from qgraph.codegen.tvm_site import Element, Operand, Site, Tensor, constant, dims, rule

__all__: list[str] = []


@rule("ScatterElements")
def _scatter_elements(site: Site) -> Operand:
    from tvm import te, tirx

    _require_plain(site)
    shape, axis, updated = site.shape(), site.axis(), site.shape(1)

    def latest(indices: Tensor) -> Tensor:
        k = te.reduce_axis((0, updated[axis]), name="k")

        def element(*index: Element) -> Element:
            at = [tirx.min(one, size - 1) for one, size in zip(index, updated, strict=True)]
            meant = _counted(indices(*at[:axis], k, *at[axis + 1 :]), shape[axis]) == index[axis]
            inside = [one < size for one, size in zip(index, updated, strict=True)]
            inside[axis] = meant
            return te.max(tirx.Select(tirx.all(*inside), k.var, constant(-1, "int32")), axis=k)

        return te.compute(shape, element, name="latest")

    def described(x: Tensor, last: Tensor, updates: Tensor) -> Tensor:
        def element(*index: Element) -> Element:
            here = last(*index)
            at = [tirx.min(one, size - 1) for one, size in zip(index, updated, strict=True)]
            at[axis] = tirx.max(here, constant(0, "int32"))
            return tirx.Select(here >= 0, updates(*at), x(*index))

        return te.compute(shape, element, name="scattered")

    return site.compute(described, site[0], site.compute(latest, site[1]), site[2])


@rule("ScatterND")
def _scatter_nd(site: Site) -> Operand:
    from tvm import te, tirx

    _require_plain(site)
    shape, (*tuples, depth) = site.shape(), site.shape(1)
    flat = site.reshaped(site[1], (int(np.prod(tuples, dtype=int)), depth))
    updates = site.reshaped(site[2], (dims(flat)[0], *shape[depth:]))

    def latest(indices: Tensor) -> Tensor:
        k = te.reduce_axis((0, dims(flat)[0]), name="k")

        def element(*index: Element) -> Element:
            meant = [_counted(indices(k, axis), shape[axis]) == one for axis, one in enumerate(index)]
            return te.max(tirx.Select(tirx.all(*meant), k.var, constant(-1, "int32")), axis=k)

        return te.compute(shape[:depth], element, name="latest")

    def described(x: Tensor, last: Tensor, new: Tensor) -> Tensor:
        def element(*index: Element) -> Element:
            here = last(*index[:depth])
            put = new(tirx.max(here, constant(0, "int32")), *index[depth:])
            return tirx.Select(here >= 0, put, x(*index))

        return te.compute(shape, element, name="scattered")

    return site.compute(described, site[0], site.compute(latest, flat), updates)


def _require_plain(site: Site) -> None:
    if site.attributes.get("reduction", "none") != "none":
        raise site.refuse("it combines what it puts with what is there (reduction)")


def _counted(index: Element, size: int) -> Element:
    """Return an index counted from the front."""
    from tvm import tirx

    wide = index.astype("int32")
    return tirx.Select(wide < 0, wide + size, wide)


@rule("TopK")
def _top_k(site: Site) -> list[Operand]:
    from tvm import te, tirx

    shape, axis, (count,) = site.shape(), site.axis(default=-1), site.integers(1)
    left = (*shape[:axis], count, *shape[axis + 1 :])
    largest = bool(site.attributes.get("largest", 1))

    def ranks(x: Tensor) -> Tensor:
        k = te.reduce_axis((0, shape[axis]), name="k")

        def element(*index: Element) -> Element:
            here, other = x(*index), x(*index[:axis], k, *index[axis + 1 :])
            before = other > here if largest else other < here
            first = tirx.any(before, tirx.all(other == here, k.var < index[axis]))
            return te.sum(tirx.Select(first, constant(1, "int32"), constant(0, "int32")), axis=k)

        return te.compute(shape, element, name="ranks")

    def places(rank: Tensor) -> Tensor:
        k = te.reduce_axis((0, shape[axis]), name="k")

        def element(*index: Element) -> Element:
            has = rank(*index[:axis], k, *index[axis + 1 :]) == index[axis]
            return te.max(tirx.Select(has, k.var.astype("int64"), constant(-1, "int64")), axis=k)

        return te.compute(left, element, name="places")

    def values(x: Tensor, place: Tensor) -> Tensor:
        def element(*index: Element) -> Element:
            at = tirx.max(place(*index), constant(0, "int64"))
            return x(*index[:axis], at, *index[axis + 1 :])

        return te.compute(left, element, name="ordered")

    found = site.compute(places, site.compute(ranks, site[0]))
    return [site.compute(values, site[0], found), found]
