"""The passes of a build's targets run ahead in processes beside it, which leave models in the cache for it.

    workers         load -> prepare -> compress -> lower          one target each at a time, into the cache
    the build       load -> (all of that, from the cache) -> write -> verify -> bench -> publish

So what is verified and timed is so in the build itself, one after the other, when the workers have ended; the bytes are
the same, and whatever goes wrong in a worker is found again, and told, by the build. Two workers never run the same
pass over the same model: the second one goes on with another target and comes back.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from qgraph.build_recipe import BuildRecipe, TargetRecipe
from qgraph.cache import Cache
from qgraph.compiler import run_passes
from qgraph.pipeline import Context
from qgraph.search_executors import Worker, serve
from qgraph.sharing import BusyError, Sharing
from qgraph.stages import Event

__all__ = ["run_ahead", "work"]

_COMMAND: list[str] = [sys.executable, "-P", "-c", "from qgraph.build_workers import work; work()"]
_WAIT = 0.5
"""Seconds before a target is tried again whose next pass another worker runs."""
_DONE, _BUSY = "done", "busy"


@dataclasses.dataclass(frozen=True)
class _Parcel:
    """What all jobs share: how the context is set up, and where things are."""

    source: Path
    recipe: BuildRecipe
    context: dict[str, Any]
    cache: Path

    KEPT: ClassVar[tuple[str, ...]] = ("seed", "threads", "calibration_memory", "opset", "work_folder")


def run_ahead(
    source: Path,
    recipe: BuildRecipe,
    context: Context,
    cache: Cache,
    *,
    workers: int,
    observer: Callable[[Event], None] | None = None,
) -> None:
    """Run the passes of the targets in processes, and keep in `cache` what took long.

    Targets whose bounds are searched for, and data or passes that only this process has, are left to the build.

    Args:
        source: the model.
        recipe: its data and targets.
        context: as the build uses it.
        cache: of the build.
        workers: how many processes.
        observer: called when the passes of a target have ended.
    """
    jobs = deque(one for one in recipe.targets if not (one.tolerance or one.budget) or one.plan is not None)
    kept = {name: getattr(context, name) for name in _Parcel.KEPT}
    parcel = _Parcel(source, dataclasses.replace(recipe, targets=()), kept, cache.folder)
    try:
        packed = pickle.dumps(parcel)
        pickle.dumps(jobs)
    except (pickle.PicklingError, TypeError, AttributeError):
        return
    running: list[Worker] = []

    def serve_jobs() -> None:
        worker = Worker(_COMMAND, packed, dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        running.append(worker)
        while True:
            try:
                one = jobs.popleft()
            except IndexError:
                return
            start = time.perf_counter()
            answer = worker.ask(one)
            if answer == _BUSY:
                jobs.append(one)
                time.sleep(_WAIT)
            elif answer is None:  # it died; the build finds out why
                return
            elif observer is not None:
                observer(Event("ahead", f"{one.name}: {answer}", time.perf_counter() - start))

    count = min(workers, len(jobs))
    pool = ThreadPoolExecutor(max(1, count), thread_name_prefix="qgraph-build")
    try:
        for future in [pool.submit(serve_jobs) for _ in range(count)]:
            future.result()
    finally:
        jobs.clear()
        for worker in running:
            worker.end()
        pool.shutdown(wait=True)


def work() -> None:
    """Be a worker: read the parcel and jobs from standard input, and write what became of them to standard output."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints must not get between the answers
    serve(source, sink, _set_up)


def _set_up(parcel: _Parcel) -> Callable[[TargetRecipe], str]:
    sharing = Sharing(Cache(parcel.cache), claims=True)
    context = Context(**parcel.context)

    def make(one: TargetRecipe) -> str:
        try:
            run_passes(
                parcel.source,
                one.target,
                calibration=parcel.recipe.calibration,
                verify_data=parcel.recipe.verify_data,
                passes=one.passes,
                recipe=one.plan,
                settings=one.settings,
                shapes=parcel.recipe.shapes,
                context=context,
                sharing=sharing,
            )
        except BusyError:
            return _BUSY
        except Exception as error:  # noqa: BLE001 - the build meets the same, and tells it
            return f"left to the build ({type(error).__name__})"
        return _DONE

    return make
