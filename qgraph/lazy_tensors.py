"""Tensors that are computed when a file is written, several at once, with few of them in memory.

    integers, scale, zero_point = joint_tensors(compute, specs)      one call of compute() gives all three

The writer goes through the tensors in their order; those ahead are computed by threads meanwhile. What is written does
not depend on the number of threads.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import onnx_ir as ir

__all__ = ["Joint", "JointTensor", "evaluated", "joint_tensors", "usable_cores"]

IN_FLIGHT = 5 << 23
"""Elements of lazy tensors that are computed or wait to be written at a time, unless a single one has more.

Four layers of 4096 x 4096 in 4 bits: with what they are computed from, less than half a gigabyte on any number of
cores.
"""


class Joint:
    """A computation that gives several tensors.

    Attributes:
        compute: gives them; called anew by whoever needs one of them, and once by the writer if they follow one
            another.
        source: what a pass may look for to compute something else from, such as the function that quantizes.
    """

    def __init__(self, compute: Callable[[], Sequence[ir.TensorProtocol]], source: Any = None) -> None:
        self.compute = compute
        self.source = source


class JointTensor(ir.LazyTensor):
    """One of the tensors that a `Joint` gives."""

    def __init__(self, group: Joint, index: int, dtype: ir.DataType, shape: Sequence[int]) -> None:
        super().__init__(lambda: group.compute()[index], dtype, ir.Shape(shape))
        self.group = group
        self.index = index


def joint_tensors(
    compute: Callable[[], Sequence[ir.TensorProtocol]],
    specs: Sequence[tuple[ir.DataType, Sequence[int]]],
    *,
    source: Any = None,
) -> list[JointTensor]:
    """Return lazy tensors that `compute` gives together.

    Register them as initializers one after the other, so that the writer computes them once.

    Args:
        compute: gives as many tensors as there are `specs`.
        specs: data type and shape of each.
        source: see `Joint`.
    """
    group = Joint(compute, source)
    return [JointTensor(group, index, dtype, shape) for index, (dtype, shape) in enumerate(specs)]


def usable_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def evaluated(
    tensors: Sequence[ir.TensorProtocol], *, threads: int = 0, finished: Callable[[], None] = lambda: None
) -> Generator[ir.TensorProtocol, None, None]:
    """Yield the tensors in their order, lazy ones computed; those ahead are computed in threads meanwhile.

    A tensor that was handed out is forgotten when the next is asked for.

    Args:
        tensors: in the order in which they are written.
        threads: that compute; 0 for one on each core.
        finished: called in the thread that has computed something, for instance to release what was read for it.
    """
    workers = threads or usable_cores()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="qgraph-write")
    window = _Window(pool, workers, finished)
    try:
        for unit in _units(tensors):
            while not window.takes(unit):
                yield from window.next()
            window.add(unit)
        while window.waiting:
            yield from window.next()
    finally:
        # After an error or Ctrl-C nothing else is begun; what runs is waited for, since it reads mapped files.
        pool.shutdown(wait=True, cancel_futures=True)


class _Window:
    """The runs of tensors that are computed or wait to be written, in their order."""

    def __init__(self, pool: ThreadPoolExecutor, workers: int, finished: Callable[[], None]) -> None:
        self.waiting: deque[tuple[list[ir.TensorProtocol], Future[list[ir.TensorProtocol]] | None]] = deque()
        self._pool = pool
        self._workers = workers
        self._finished = finished
        self._sizes: deque[int] = deque()

    def takes(self, unit: Sequence[ir.TensorProtocol]) -> bool:
        """Tell whether a run may be begun: what is stored in a file already always may, it is not read before."""
        if not self._sizes or not isinstance(unit[0], ir.LazyTensor):
            return True
        return len(self._sizes) <= self._workers and sum(self._sizes) + _elements(unit) <= IN_FLIGHT

    def add(self, unit: list[ir.TensorProtocol]) -> None:
        """Begin a run."""
        future = None
        if isinstance(unit[0], ir.LazyTensor):
            future = self._pool.submit(_compute, unit, self._finished)
            self._sizes.append(_elements(unit))
        self.waiting.append((unit, future))

    def next(self) -> Generator[ir.TensorProtocol, None, None]:
        """Yield the tensors of the first run."""
        unit, future = self.waiting.popleft()
        lazy = future is not None
        tensors = unit if future is None else future.result()
        del unit, future
        while tensors:
            yield tensors.pop(0)
        if lazy:
            self._sizes.popleft()


def _elements(unit: Sequence[ir.TensorProtocol]) -> int:
    return sum(tensor.size for tensor in unit)


def _units(tensors: Sequence[ir.TensorProtocol]) -> list[list[ir.TensorProtocol]]:
    """Cut the tensors into runs that one computation gives; a tensor that is not joint is a run of its own."""
    key = itertools.count()
    return [
        list(run)
        for _, run in itertools.groupby(
            tensors, lambda tensor: id(tensor.group) if isinstance(tensor, JointTensor) else -next(key) - 1
        )
    ]


def _compute(unit: Sequence[ir.TensorProtocol], finished: Callable[[], None]) -> list[ir.TensorProtocol]:
    first = unit[0]
    assert isinstance(first, ir.LazyTensor)
    try:
        if isinstance(first, JointTensor):
            results = first.group.compute()
            return [results[tensor.index] for tensor in unit if isinstance(tensor, JointTensor)]
        return [first.raw()]
    finally:
        finished()
