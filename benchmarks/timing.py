"""Latency by turns, and the time and memory of whole processes.

Sessions that spin for work disturb one another, so spinning is off; sessions run in turn in one process; the least
of three runs counts for a feed and the median over feeds for a session. Ratios taken so repeat within 2 %.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["THREADS", "Process", "in_turn", "machine", "run_process", "session"]

THREADS = 2
RUNS = 3
SHORTEST = 2e-3
"""Feeds are repeated within a run until it lasts about this many seconds, so that clocks and wake-ups do not count."""

_LAUNCHER = """
import json, os, signal, subprocess, sys, threading, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[3:], stdout=subprocess.DEVNULL, stderr=open(sys.argv[1], "w"))
alarm = threading.Timer(float(sys.argv[2]), os.kill, (child.pid, signal.SIGKILL))
alarm.start()
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - start
alarm.cancel()
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss / 1024]))
"""


@dataclass(frozen=True)
class Process:
    """How a process ended, and what it took: wall-clock seconds and peak resident MiB, its children included."""

    status: int
    seconds: float
    peak_mib: float
    errors: str


def run_process(command: Sequence[str], log: Path, *, threads: int = THREADS, limit: float = 900) -> Process:
    """Run `command` to its end, or kill it after `limit` seconds; what it writes to standard error goes to `log`.

    Its working directory is that of `log`, since some tools drop files where they stand.

    A tiny launcher stands between, because a new process inherits the peak memory of the one that starts it.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, str(log), str(limit), *command]
    done = subprocess.run(launcher, check=True, capture_output=True, text=True, env=environment, cwd=log.parent)
    status, seconds, peak = json.loads(done.stdout)
    return Process(status, seconds, peak, log.read_text(errors="replace").strip())


def session(model: Path, threads: int = THREADS, provider: str = "CPUExecutionProvider") -> Any:
    """Open `model` in ONNX Runtime with spinning off; what `provider` has no kernel for runs on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        str(model), options, providers=list(dict.fromkeys((provider, "CPUExecutionProvider")))
    )


def in_turn(sessions: Mapping[str, Any], feeds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, list[float]]:
    """Return the seconds that each session takes for each of the feeds."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for index, feed in enumerate(feeds):
        repeats = {name: max(1, round(SHORTEST / _once(one, feed, 1))) for name, one in sessions.items()}
        best = dict.fromkeys(sessions, float("inf"))
        for turn in range(RUNS):
            order = list(sessions.items())
            shift = (index + turn) % len(order)
            for name, one in order[shift:] + order[:shift]:
                best[name] = min(best[name], _once(one, feed, repeats[name]))
        for name, least in best.items():
            seconds[name].append(least)
    return seconds


def _once(one: Any, feed: Mapping[str, np.ndarray], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        one.run(None, feed)
    return (time.perf_counter() - start) / repeats


def machine() -> dict[str, Any]:
    """Return what the figures were taken on: processor, cores, system and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "int8_dot_product": "avx512_vnni" in _cpu_flags() or "avx_vnni" in _cpu_flags(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in ("onnxruntime", "onnx", "onnx-ir", "numpy", "qgraph-compiler")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_info(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _processor() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    return _cpu_info("flags").split()
