"""Matrix products that come out the same, bit by bit, on any number of threads.

A BLAS divides a product among its threads, and the order of its sums follows that division. Here a product is cut into
tiles of a fixed width, and every tile is computed by one thread. OpenBLAS, which comes with numpy, is told to use one
thread meanwhile. With another BLAS the tiles are the same, but what it does with a tile is up to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

__all__ = ["each", "gram", "mirror", "product", "steady"]

_WIDTH = 512
"""Columns of a tile."""
_SMALL = 1 << 21
"""Multiplications of a product that is not worth handing to other threads."""

_lock = threading.Lock()
_users = 0
_allowed = 0


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Keep numpy's BLAS to one thread per product in here; `product` and `gram` bring the others to use.

    Holds for the whole process until the last of those who have entered leaves.
    """
    global _users, _allowed  # a property of the process
    with _lock:
        _users += 1
        if _users == 1:
            _allowed = _threads()
            _limit(1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _limit(_allowed)


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return left @ right for matrices; call it inside `steady`."""
    columns = right.shape[1]
    if columns <= _WIDTH or left.size * columns < _SMALL:
        return np.asarray(left @ right)
    result = np.empty((left.shape[0], columns), np.result_type(left, right))

    def compute(start: int) -> None:
        part = slice(start, start + _WIDTH)
        np.matmul(left, right[:, part], out=result[:, part])

    each(compute, range(0, columns, _WIDTH))
    return result


def gram(rows: np.ndarray) -> np.ndarray:
    """Return rows^T @ rows, [n, n]; what lies above the tiles on the diagonal is zero. Call it inside `steady`."""
    count = rows.shape[1]
    result = np.zeros((count, count), rows.dtype)

    def compute(start: int) -> None:
        part = slice(start, start + _WIDTH)
        np.matmul(rows[:, start:].T, rows[:, part], out=result[start:, part])

    each(compute, range(0, count, _WIDTH))
    return result


def mirror(matrix: np.ndarray) -> None:
    """Fill what `gram` has left zero, or a sum of its results."""
    for start in range(0, len(matrix), _WIDTH):
        stop = start + _WIDTH
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T


def each(compute: Callable[[int], None], starts: Iterable[int]) -> None:
    """Call a function for independent parts, on as many threads as the BLAS may use; call it inside `steady`."""
    if _allowed > 1:
        for _ in _pool(_allowed).map(compute, starts):
            pass
    else:
        for start in starts:
            compute(start)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="qgraph-product")


def _threads() -> int:
    """Return how many threads the BLAS may use; that is how users limit them."""
    get = _function("get_num_threads")
    return int(get()) if get else os.cpu_count() or 1


def _limit(threads: int) -> None:
    set_threads = _function("set_num_threads")
    if set_threads:
        set_threads(threads)


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """Return a function of the OpenBLAS that numpy has brought along, or None."""
    package = Path(np.__file__).parent
    folders = (package.parent / "numpy.libs", package / ".dylibs")
    for path in (path for folder in folders for path in sorted(folder.glob("*openblas*"))):
        library = ctypes.CDLL(str(path))
        for symbol in (f"scipy_openblas_{name}64_", f"openblas_{name}64_", f"openblas_{name}"):
            with contextlib.suppress(AttributeError):
                return getattr(library, symbol)  # type: ignore[no-any-return]  # a function of the library
    return None
