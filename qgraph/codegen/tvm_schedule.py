"""From operators to loops: operators are fused, sums of products vectorized, large loops spread over threads.

No tuning: one schedule, the same for every shape. Nothing is computed in another order that could matter (sums of
integers that do not overflow have none), and no stored intermediate is written into its reader: TVM's simplifier would
multiply sums out, which may overflow.
"""

from __future__ import annotations

import math
from typing import Any

from qgraph.codegen.tvm_layers import IN_LANES

__all__ = ["scheduled"]

_PARALLEL_FROM = 1 << 16
"""Steps of a loop nest from which on spreading it over threads gains more than it costs."""
_MOST_ROWS = 8
"""Vectors of sums that are kept in registers."""
_VECTOR_FROM = 8
_FREE, _SUMMED = 0, 2
"""TVM's `IterVar` types of loops over outputs and over what is summed."""
_VECTORIZED = 2
"""TVM's `ForKind` of a vectorized loop."""


def scheduled(module: Any, target: Any) -> Any:
    """Return a `tvm.IRModule` with fused and scheduled functions."""
    import tvm
    from tvm import relax, s_tir, tirx

    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    with target:
        fused = tvm.transform.Sequential(passes)(module)
    for name, function in list(fused.functions.items()):
        if isinstance(function, tirx.PrimFunc):
            schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
            for block in schedule.get_child_blocks(schedule.get_sblock("root")):
                _schedule(schedule, block)
            fused[name] = schedule.mod["main"]
    return fused


def _schedule(schedule: Any, block: Any) -> None:
    description = schedule.get(block)
    loops = schedule.get_loops(block)
    if not loops:
        return  # a scalar: TVM gives its block a variable without a loop
    kinds = [variable.iter_type for variable in description.iter_vars]
    free = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _FREE]
    summed = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _SUMMED]
    # Two loops are left inside, for vectors and what shares them. Threads come first: once the start of a sum is a
    # block of its own, TVM no longer sees that the loops around it may be spread.
    outer = free[:-2] if summed else free[:-1]
    if outer and math.prod(_extent(schedule, loop) for loop in loops) >= _PARALLEL_FROM:
        schedule.parallel(schedule.fuse(*outer))
    if description.name_hint == IN_LANES:
        _keep_sums_in_registers(schedule, block, free[-2], free[-1], summed)
    elif summed and description.name_hint == "accumulators" and _extent(schedule, free[-1]) >= _VECTOR_FROM:
        schedule.reorder(*summed, free[-1])
        schedule.decompose_reduction(block, summed[0])


def _keep_sums_in_registers(schedule: Any, block: Any, row: Any, lane: Any, summed: list[Any]) -> None:
    """Sum for several places at once, each a vector of outputs: ... rows, lanes, sums => ... rows/n, sums, n, lanes."""
    size = _extent(schedule, row)
    together = max(count for count in range(1, _MOST_ROWS + 1) if size % count == 0)
    outer, inner = schedule.split(row, [None, together])
    schedule.reorder(outer, *summed, inner, lane)
    stored = schedule.cache_write(block, 0, "local")
    schedule.reverse_compute_at(stored, outer)
    _unroll(schedule, block)
    _unroll(schedule, stored)
    _unroll(schedule, schedule.decompose_reduction(block, summed[0]))


def _unroll(schedule: Any, block: Any) -> None:
    *_, rows, lanes = schedule.get_loops(block)
    if schedule.get(lanes).kind != _VECTORIZED:
        schedule.vectorize(lanes)
        schedule.unroll(rows)


def _extent(schedule: Any, loop: Any) -> int:
    return int(schedule.get(loop).extent)
