"""Tensors that live at the same time never overlap, and what is planned is near the least that is possible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qgraph.codegen.arena import ALIGNMENT, Buffer, peak, plan


def random_buffers(seed: int) -> list[Buffer]:
    random = np.random.default_rng(seed)
    starts = random.integers(0, 40, 60)
    return [
        Buffer(i, int(random.integers(0, 5000)), int(start), int(start + random.integers(0, 8)))
        for i, start in enumerate(starts)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_buffers_that_live_together_do_not_overlap(seed: int):
    buffers = random_buffers(seed)
    planned = plan(buffers)
    for one, other in itertools.combinations(buffers, 2):
        if one.first <= other.last and other.first <= one.last:
            start, stop = planned.offsets[one.key], planned.offsets[other.key]
            assert start + one.size <= stop or stop + other.size <= start
    assert all(offset % ALIGNMENT == 0 for offset in planned.offsets.values())
    assert peak(buffers) <= planned.size <= 1.25 * peak(buffers)


def test_a_gap_that_fits_best_is_taken():
    buffers = [Buffer("a", 64, 0, 2), Buffer("b", 32, 0, 1), Buffer("c", 16, 0, 2), Buffer("d", 32, 2, 3)]
    assert plan(buffers) == plan(buffers)
    assert plan(buffers).offsets == {"a": 0, "b": 64, "d": 64, "c": 96}
    assert plan(buffers).size == 112


def test_a_chain_needs_two_tensors_at_a_time():
    assert plan([Buffer(i, 160, i, i + 1) for i in range(10)]).size == 320
    assert plan([]).size == 0
