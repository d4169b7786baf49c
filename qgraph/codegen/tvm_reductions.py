"""Reductions along axes: sums, extremes, where an extreme lies, running sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qgraph.codegen.tvm_site import Element, Operand, Site, Tensor, constant, rule

__all__: list[str] = []


@rule("ReduceSum", "ReduceMax", "ReduceMin")
def _reduce(site: Site) -> Operand:
    from tvm import te

    shape = site.shape()
    axes = site.integers(1) if site.optional(1) is not None else tuple(site.attributes.get("axes", ()))
    if not axes and site.attributes.get("noop_with_empty_axes", 0):
        return site[0]
    reduced = sorted({axis % len(shape) for axis in axes} or range(len(shape)))
    combine = {"ReduceSum": te.sum, "ReduceMax": te.max, "ReduceMin": te.min}[site.node.op_type]
    keep = bool(site.attributes.get("keepdims", 1))

    def described(x: Tensor) -> Tensor:
        over = {axis: te.reduce_axis((0, shape[axis]), name=f"r{axis}") for axis in reduced}

        def element(*index: Element) -> Element:
            return combine(x(*_spread(index, over, len(shape), keep)), axis=list(over.values()))

        return te.compute(_left(shape, reduced, keep), element, name="reduced")

    return site.compute(described, site[0]) if reduced else site[0]


@rule("ArgMax", "ArgMin")
def _arg(site: Site) -> Operand:
    from tvm import te, tirx

    shape = site.shape()
    axis, keep = site.axis(), bool(site.attributes.get("keepdims", 1))
    last = bool(site.attributes.get("select_last_index", 0))
    largest = site.node.op_type == "ArgMax"

    def better(found: Sequence[Element], other: Sequence[Element]) -> Sequence[Element]:
        one, two = (other[1], found[1]) if largest else (found[1], other[1])
        wins = one >= two if last else one > two
        wins = tirx.any(found[0] < 0, wins)
        return tirx.Select(wins, other[0], found[0]), tirx.Select(wins, other[1], found[1])

    def described(x: Tensor) -> Tensor:
        # A reduction starts from index -1, which gives way to anything.
        reducer = te.comm_reducer(better, lambda i, v: (constant(-1, i), constant(0, v)), name="place")
        over = te.reduce_axis((0, shape[axis]), name="k")

        def element(*index: Element) -> Element:
            at = _spread(index, {axis: over}, len(shape), keep)
            return reducer((over.var.astype("int64"), x(*at)), axis=over)

        return te.compute(_left(shape, [axis], keep), element, name="places")[0]

    return site.compute(described, site[0])


def _left(shape: Sequence[int], reduced: Sequence[int], keep: bool) -> tuple[int, ...]:
    return tuple(1 if axis in reduced else size for axis, size in enumerate(shape) if keep or axis not in reduced)


def _spread(index: Sequence[Element], over: dict[int, Any], rank: int, keep: bool) -> list[Any]:
    """Return the index of an input's element: `over` along the reduced axes, `index` of the output elsewhere."""
    rest = iter(axis_index for axis, axis_index in enumerate(index) if not keep or axis not in over)
    return [over[axis] if axis in over else next(rest) for axis in range(rank)]


@rule("CumSum")
def _cumulative_sum(site: Site) -> Operand:
    from tvm import te, tirx

    shape = site.shape()
    axis = int(site.array(1).item()) % len(shape)
    exclusive, reverse = bool(site.attributes.get("exclusive", 0)), bool(site.attributes.get("reverse", 0))
    zero = np.zeros((), site.dtype()).item()

    def described(x: Tensor) -> Tensor:
        k = te.reduce_axis((0, shape[axis]), name="k")

        def element(*index: Element) -> Element:
            ahead, behind = (index[axis], k) if reverse else (k, index[axis])
            counts = ahead < behind if exclusive else ahead <= behind
            one = x(*index[:axis], k, *index[axis + 1 :])
            return te.sum(tirx.Select(counts, one, constant(zero, x.dtype)), axis=k)

        return te.compute(shape, element, name="sums")

    return site.compute(described, site[0])
