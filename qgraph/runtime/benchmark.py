"""Timing sessions against one another in one process.

Sessions run in turn on the same feeds, so that what else the machine does meets all of them alike. For each feed the
least time of several rounds counts (noise only adds), and over the feeds their median. Open the sessions with spinning
off: the idle threads of one otherwise take the cores from the next. Ratios then repeat within a few per cent; the
absolute times are those of this machine.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qgraph.errors import UserError
from qgraph.pipeline import Feeds
from qgraph.runtime.session import first_line
from qgraph.targets.base import Session

__all__ = ["Benchmark", "Machine", "Timing", "compare", "machine", "peak_memory"]

_ROUNDS_AT_LEAST = 3
_SHOWN = 3
"""Inputs whose shapes are told; a decoder with a cache has dozens."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where something was timed: processor, cores that this process may use, operating system, runtime's version."""

    cpu: str
    cores: int
    system: str
    runtime: str


@dataclasses.dataclass(frozen=True)
class Timing:
    """How fast one candidate runs.

    Attributes:
        name: of the candidate.
        seconds: median over the feeds of each feed's least time.
        rows_per_second: rows of all feeds (their first axes) over the sum of their least times.
        feeds: the least time of each feed.
        peak_bytes: what opening and running it adds to a fresh process, where measured.
    """

    name: str
    seconds: float
    rows_per_second: float
    feeds: tuple[float, ...]
    peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Timings of candidates that ran in turn.

    Attributes:
        candidates: in the order given; the first one is the baseline.
        batch: the shape of one feed in words: "8 x 32", or "state 2 x 1 x 128, input 1 x 576" where inputs differ.
        rounds: how often each candidate ran each feed.
        threads: that the sessions were given; 0 when the runtime chose.
        machine: where.
    """

    candidates: tuple[Timing, ...]
    batch: str
    rounds: int
    threads: int
    machine: Machine

    def __getitem__(self, name: str) -> Timing:
        return next(timing for timing in self.candidates if timing.name == name)

    def ratio(self, before: str, after: str) -> float:
        """Return how many times faster `after` is than `before`."""
        return self[before].seconds / self[after].seconds

    def with_memory(self, peaks: Mapping[str, int | None]) -> Benchmark:
        """Return the same timings with the peak memory of candidates by name."""
        return dataclasses.replace(
            self,
            candidates=tuple(dataclasses.replace(one, peak_bytes=peaks.get(one.name)) for one in self.candidates),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what bench.json holds."""
        baseline = self.candidates[0].name
        return {
            **dataclasses.asdict(self),
            "candidates": [
                {**dataclasses.asdict(one), "feeds": list(one.feeds), "times_faster": self.ratio(baseline, one.name)}
                for one in self.candidates
            ],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Benchmark:
        """Read what `to_json` wrote."""
        values = {field.name: document[field.name] for field in dataclasses.fields(cls)}
        timings = tuple(
            Timing(**{**{f.name: one[f.name] for f in dataclasses.fields(Timing)}, "feeds": tuple(one["feeds"])})
            for one in document["candidates"]
        )
        return cls(**{**values, "candidates": timings, "machine": Machine(**document["machine"])})


def compare(
    candidates: Mapping[str, Session],
    feeds: Sequence[Feeds],
    *,
    seconds: float = 1.0,
    rounds: int = 100,
    threads: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Benchmark:
    """Time sessions in turn on the same feeds.

    Each candidate first runs one feed unmeasured. The time allowed decides how many of the feeds take part (spread
    evenly over them, so that three rounds fit) and how many rounds are run; every candidate runs at least one feed
    once, so a slow model may take longer than `seconds`.

    Args:
        candidates: name -> session; the first one is the baseline.
        feeds: each holds a batch.
        seconds: about how long measuring may take in all.
        rounds: at most so many runs of each feed by each candidate.
        threads: that the sessions were opened with, for the record.
        clock: gives seconds.

    Raises:
        UserError: there is nothing to run, or a session refuses a feed.
    """
    if not candidates or not feeds:
        raise UserError("there is nothing to time: give at least one model and one feed")
    for name, session in candidates.items():
        _time(name, session, feeds[0], clock)
    once = sum(_time(name, session, feeds[0], clock) for name, session in candidates.items())
    chosen = _spread(feeds, max(1, int(seconds / (_ROUNDS_AT_LEAST * max(once, 1e-9)))))
    least = {name: [math.inf] * len(chosen) for name in candidates}
    deadline = clock() + seconds
    done = 0
    while done < rounds and (done == 0 or clock() + once * len(chosen) <= deadline):
        # Every other round goes backwards: whoever runs second finds warmer caches or a hotter processor.
        order = list(candidates.items())[:: 1 if done % 2 == 0 else -1]
        for number, feed in enumerate(chosen):
            for name, session in order:
                least[name][number] = min(least[name][number], _time(name, session, feed, clock))
        done += 1
    rows = sum(_rows(feed) for feed in chosen)
    timings = tuple(
        Timing(name, statistics.median(times), rows / sum(times), tuple(times)) for name, times in least.items()
    )
    return Benchmark(timings, _batch(chosen), done, threads, machine())


def _time(name: str, session: Session, feed: Feeds, clock: Callable[[], float]) -> float:
    start = clock()
    try:
        session.run(None, feed)
    except (MemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"'{name}' cannot run the feed: {first_line(error)}") from error
    return max(clock() - start, 1e-9)


def _spread(feeds: Sequence[Feeds], count: int) -> list[Feeds]:
    if count >= len(feeds):
        return list(feeds)
    return [feeds[(2 * i + 1) * len(feeds) // (2 * count)] for i in range(count)]


def _rows(feed: Feeds) -> int:
    return next((int(array.shape[0]) for array in feed.values() if array.ndim), 1)


def _batch(feeds: Sequence[Feeds]) -> str:
    """Describe the feed of middling size: one shape where all its inputs share it, else those of the first inputs."""
    by_size = sorted(feeds, key=lambda feed: sum(array.size for array in feed.values()))
    shapes = {name: " x ".join(map(str, a.shape)) or "scalar" for name, a in by_size[len(feeds) // 2].items()}
    if len(set(shapes.values())) == 1:
        return next(iter(shapes.values()))
    shown = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:_SHOWN])
    return shown if len(shapes) <= _SHOWN else f"{shown} and {len(shapes) - _SHOWN} more inputs"


def machine() -> Machine:
    """Describe the machine that this process runs on."""
    try:
        import onnxruntime

        runtime = f"onnxruntime {onnxruntime.__version__}"
    except ImportError:
        runtime = ""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return Machine(_cpu(), cores, f"{platform.system()} {platform.machine()}", runtime)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "Hardware")))
    return next(named, "") or platform.processor() or platform.machine() or "unknown"


def peak_memory(open_it: Callable[[], Session], feed: Feeds, *, timeout: float = 120.0) -> int | None:
    """Return the bytes that opening a model and running it once adds to a fresh process at its peak.

    Args:
        open_it: opens the session; is pickled, so a module's function or `functools.partial` of one.
        feed: what is run.
        timeout: in seconds.

    Returns:
        None where the system does not tell, or the process does not end well.
    """
    child = (
        "import pickle, sys; from qgraph.runtime import benchmark; benchmark._measure(*pickle.load(sys.stdin.buffer))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", child], input=pickle.dumps((open_it, feed)), capture_output=True, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.decode(errors="replace").strip()
    return int(text) if done.returncode == 0 and text.isdigit() else None


def _measure(open_it: Callable[[], Session], feed: Feeds) -> None:
    """Run in the fresh process; writes the figure to standard output."""
    import onnxruntime  # noqa: F401 - its own memory is not the model's

    before = _peak()
    open_it().run(None, feed)
    after = _peak()
    if before is not None and after is not None:
        sys.stdout.write(str(after - before))


def _peak() -> int | None:
    # ru_maxrss starts at the parent's size on Linux; VmHWM is this process's own.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
