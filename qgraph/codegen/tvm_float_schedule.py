"""From float operators to loops on a CPU, without tuning.

    sums of products   [... rows, channels] sum    =>    parallel ..., rows/r, channels/t, sum, unrolled r, vector t
                       r x t sums stay in registers; what follows in the same function is done where they are stored
    along rows         softmax, norms: rows in parallel, all steps of a row in turn, sums of a row in lanes
    the rest           inlined into one another, outer loops in parallel, the innermost a vector

A rule that does not fit leaves the function to the next one. `decisions` of a sum can be sampled instead of computed:
that is the space which tuning searches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qgraph.codegen.tvm_packing import SUM, TILE_KEY, Lanes

__all__ = ["is_tunable", "schedule", "scheduled_float", "varied"]

_SPATIAL, _SUMMED = 0, 2
"""TVM's `IterVar` types of loops over outputs and over what is summed."""
_VECTORIZED = 2
"""TVM's `ForKind` of a vectorized loop."""
_PARALLEL_FROM = 1 << 14
"""Steps of a loop nest from which on spreading it over threads gains more than it costs."""
_MOST_INLINED = 16
"""Blocks of a function beyond which each stores what it computes: inlining what has many readers multiplies work."""
_LANES_FROM = 2
"""Vectors in a row from which on its sum is taken in lanes."""

Choose = Callable[[Any, Sequence[int], int], int]
"""Chooses among candidates, given the schedule, the candidates and the place of the default."""


def _default(schedule: Any, candidates: Sequence[int], place: int) -> int:
    """Return what is chosen without tuning."""
    del schedule
    return candidates[place]


def scheduled_float(module: Any, lanes: Lanes) -> Any:
    """Return a fused `tvm.IRModule` with every function scheduled that is not yet."""
    from tvm import tirx

    done = module.clone()
    for name, function in list(module.functions.items()):
        if isinstance(function, tirx.PrimFunc) and not _is_scheduled(function):
            done[name] = schedule(function, lanes)
    return done


def _is_scheduled(function: Any) -> bool:
    return bool(function.attrs and function.attrs.get("tirx.is_scheduled"))


def is_tunable(function: Any) -> bool:
    """Tell whether a function has a sum whose schedule has choices: all its sizes are known."""
    import tvm
    from tvm import s_tir, tirx

    attempt = s_tir.Schedule(tvm.IRModule({"main": function}))
    handles = attempt.get_child_blocks(attempt.get_sblock("root"))
    sums = [block for block in map(attempt.get, handles) if block.name_hint == SUM]
    return len(sums) == 1 and all(isinstance(one.dom.extent, tirx.IntImm) for one in sums[0].iter_vars)


def schedule(function: Any, lanes: Lanes, choose: Choose = _default) -> Any:
    """Return a `tirx.PrimFunc` with loops that are parallel, vectorized and unrolled."""
    import tvm
    from tvm import s_tir

    for rule in (_sums_of_products, _rows, _loops):
        attempt = s_tir.Schedule(tvm.IRModule({"main": function}))
        try:
            if rule(attempt, lanes, choose):
                return attempt.mod["main"].with_attr({"tirx.is_scheduled": True})
        except s_tir.schedule.ScheduleError:
            continue
    return function


def varied(function: Any, lanes: Lanes, most: int) -> Iterator[Any]:
    """Yield up to `most` schedules of a tunable function, each with its trace: the default first.

    The same for the same function: choices are gone through in order, not drawn.
    """
    import tvm
    from tvm import s_tir

    counts: list[int] = []

    def default(schedule: Any, candidates: Sequence[int], place: int) -> int:
        counts.append(len(candidates))
        return _default(schedule, candidates, place)

    first = s_tir.Schedule(tvm.IRModule({"main": function}))
    _sums_of_products(first, lanes, default)
    yield first
    for choice in itertools.islice(itertools.product(*map(range, reversed(counts))), max(0, most - 1)):
        attempt = s_tir.Schedule(tvm.IRModule({"main": function}))
        _sums_of_products(attempt, lanes, _Decided(list(choice)))
        yield attempt


@dataclasses.dataclass
class _Decided:
    """Chooses as it was told, the last place first."""

    places: list[int]

    def __call__(self, schedule: Any, candidates: Sequence[int], place: int) -> int:
        del schedule, place
        return candidates[self.places.pop()]


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block of a function, with what is known of it."""

    name: str
    handle: Any
    kinds: tuple[int, ...]

    @property
    def sums(self) -> bool:
        return _SUMMED in self.kinds


def _blocks(s: Any) -> list[_Block]:
    found = []
    for handle in s.get_child_blocks(s.get_sblock("root")):
        block = s.get(handle)
        found.append(_Block(block.name_hint, handle, tuple(int(one.iter_type) for one in block.iter_vars)))
    return found


# --- sums of products -------------------------------------------------------------------------------------------------


def _sums_of_products(s: Any, lanes: Lanes, choose: Choose) -> bool:
    """Schedule a function with one large sum: convolutions, products, pooling."""
    blocks = _blocks(s)
    places = [place for place, block in enumerate(blocks) if block.sums]
    if len(places) != 1 or blocks[places[0]].kinds[-1] == _SPATIAL:
        return False
    place = places[0]
    main = blocks[place].handle
    loops = s.get_loops(main)
    free = sum(kind == _SPATIAL for kind in blocks[place].kinds)
    if free < 2 or len(loops) != len(blocks[place].kinds):
        return False
    notes = s.get(main).annotations
    tile = int(notes[TILE_KEY]) if TILE_KEY in notes else _channels(s, loops[free - 1], lanes)
    if tile is None:
        return False
    for other in blocks[place + 1 : -1]:
        s.compute_inline(other.handle)
    outer, row, channel, summed = loops[: free - 2], loops[free - 2], loops[free - 1], loops[free:]
    channel_outer, channel = s.split(channel, [None, tile])
    row_outer, row = s.split(row, [None, _rows_together(s, row, lanes.rows(tile), choose)])
    s.reorder(*outer, channel_outer, row_outer, *summed, row, channel)
    channels_first = choose(s, (1, 0), 0)
    order = [*outer[:1], channel_outer, *outer[1:]] if channels_first else [*outer, channel_outer]
    s.reorder(*order, row_outer)
    steps = _steps(s, [*order, row_outer, *summed, row, channel])
    stored = s.cache_write(main, 0, "local")
    if outer:
        around = s.fuse(*order)
    else:
        around = row_outer = s.fuse(channel_outer, row_outer)
    # Unit loops stay: `_in_registers` takes the last two for row and channel, also where these are only one.
    s.reverse_compute_at(stored, row_outer, preserve_unit_loops=True)
    if place + 1 < len(blocks):
        s.reverse_compute_inline(blocks[-1].handle)
    if steps >= _PARALLEL_FROM:
        s.parallel(around)
    _in_registers(s, stored, tile)
    _in_registers(s, main, tile)
    first = s.decompose_reduction(main, summed[0])
    if int(s.get(s.get_loops(first)[-1]).kind) != _VECTORIZED:
        _in_registers(s, first, tile)
    for before in blocks[:place]:
        _spread(s, before.handle, lanes)
    return True


def _channels(s: Any, loop: Any, lanes: Lanes) -> int | None:
    """Return how many of the innermost outputs are summed together, where nothing was packed for it."""
    size = _extent(s, loop)
    return None if size is None or size < lanes.floats // 2 else lanes.tile(size)


def _rows_together(s: Any, row: Any, most: int, choose: Choose) -> int:
    """Return how many places share a loaded vector of weights: one that divides them, or leaves little over."""
    size = _extent(s, row)
    if size is None:
        return most
    waste = {count: -(-size // count) * count / size for count in range(1, most + 1)}
    best = max(
        waste, key=lambda count: (min(count, most * 2 // 3) / waste[count] / (1 if size % count == 0 else 1.2), -count)
    )
    candidates = [count for count in waste if waste[count] <= 1.3]
    return choose(s, candidates, candidates.index(best)) if best in candidates else best


def _steps(s: Any, loops: Sequence[Any]) -> float:
    sizes = [_extent(s, loop) for loop in loops]
    return math.inf if None in sizes else math.prod(size for size in sizes if size is not None)


def _in_registers(s: Any, block: Any, tile: int) -> None:
    """Unroll rows, and make vectors of channels: of a power of two, as TVM's vectors of other sizes go wrong."""
    *_, row, channel = s.get_loops(block)
    lanes = tile & -tile
    if lanes < tile:
        outer, channel = s.split(channel, [None, lanes])
        s.unroll(outer)
    if lanes > 1:
        s.vectorize(channel)
    s.unroll(row)


# --- along rows -------------------------------------------------------------------------------------------------------


def _rows(s: Any, lanes: Lanes, choose: Choose) -> bool:
    """Schedule what sums along the innermost axis and goes on with that: softmax, norms, means."""
    del choose
    blocks = _blocks(s)
    if not any(block.sums for block in blocks) or any(not block.kinds for block in blocks):
        return False
    shared = min(_leading(block.kinds) if block.sums else len(block.kinds) - 1 for block in blocks)
    if shared == 0:
        return False
    last = blocks[-1]
    partial = {block.handle: _in_lanes(s, block, lanes) for block in blocks if block.sums and block is not last}
    loops = s.get_loops(last.handle)
    around = s.fuse(*loops[:shared]) if shared > 1 else loops[0]
    s.parallel(around)
    if not last.sums:
        _vector(s, last.handle, lanes)
    for block in reversed(blocks[:-1]):
        s.compute_at(block.handle, around, preserve_unit_loops=True)
        if partial.get(block.handle) is not None:
            s.compute_at(partial[block.handle], around, preserve_unit_loops=True)
        if not block.sums:
            _vector(s, block.handle, lanes)
    return True


def _leading(kinds: Sequence[int]) -> int:
    return next((place for place, kind in enumerate(kinds) if kind != _SPATIAL), len(kinds))


def _in_lanes(s: Any, block: _Block, lanes: Lanes) -> Any:
    """Split a sum along a row into one for each lane, and the sum of these; return the former, or None."""
    *_, loop = s.get_loops(block.handle)
    size = _extent(s, loop)
    if block.kinds.count(_SUMMED) != 1 or size is None or size % lanes.floats or size < _LANES_FROM * lanes.floats:
        return None
    _, lane = s.split(loop, [None, lanes.floats])
    partial = s.rfactor(lane, factor_axis=len(block.kinds) - 1)
    *_, outer, inner = s.get_loops(partial)
    del outer
    if int(s.get(inner).kind) != _VECTORIZED:
        s.vectorize(inner)
    return partial


# --- the rest ---------------------------------------------------------------------------------------------------------


def _loops(s: Any, lanes: Lanes, choose: Choose) -> bool:
    """Inline what only computes elements, and spread the loops of everything else."""
    from tvm import s_tir

    del choose
    blocks = _blocks(s)
    for block in blocks[:-1] if len(blocks) <= _MOST_INLINED else ():
        if not block.sums:
            try:
                s.compute_inline(block.handle)
            except s_tir.schedule.ScheduleError:
                continue
    for block in _blocks(s):
        _spread(s, block.handle, lanes)
    return True


def _spread(s: Any, block: Any, lanes: Lanes) -> None:
    """Spread the outer loops of a block over threads, and let its innermost one be a vector where it may."""
    from tvm import s_tir

    loops = s.get_loops(block)
    kinds = [int(one.iter_type) for one in s.get(block).iter_vars]
    if not loops or len(kinds) != len(loops):
        return
    steps, free = _steps(s, loops), _leading(kinds)
    outer = loops[:free] if _SUMMED in kinds else loops[: len(loops) - 1]
    if _SUMMED not in kinds:
        _vector(s, block, lanes)
    if outer and steps >= _PARALLEL_FROM:
        try:
            s.parallel(s.fuse(*outer) if len(outer) > 1 else outer[0])
        except s_tir.schedule.ScheduleError:
            return


def _vector(s: Any, block: Any, lanes: Lanes) -> None:
    *_, loop = s.get_loops(block)
    size = _extent(s, loop)
    if size is None or size < lanes.floats // 2:
        return
    if size > 2 * lanes.floats:
        fit = next((count for count in (2 * lanes.floats, lanes.floats, lanes.floats // 2) if size % count == 0), None)
        if fit is None:
            return
        _, loop = s.split(loop, [None, fit])
    s.vectorize(loop)


def _extent(s: Any, loop: Any) -> int | None:
    from tvm import tirx

    extent = s.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None
