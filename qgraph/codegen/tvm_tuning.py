"""Tuning: the choices of our own schedules gone through and measured on this machine.

    function with a sum, sizes known    =>    rows of register tiles, order of loops: compiled, timed, the fastest kept

What was measured is a database of TVM's MetaSchedule (two JSON files of workloads and traces), the log: the same log
gives the same code, without measuring anything.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qgraph.codegen.tvm_float_build import OPTIONS, lanes_of
from qgraph.codegen.tvm_float_schedule import is_tunable, varied
from qgraph.errors import UserError

__all__ = ["Log", "tuned"]

_FILES = ("database_tuning_record.json", "database_workload.json")
_NUMBER, _REPEATS = 20, 5
"""Runs of a measurement, and measurements, of which the least counts."""


@dataclasses.dataclass(frozen=True)
class Log:
    """What a tuning measured: the texts of a MetaSchedule database."""

    files: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Log:
        """Read a folder.

        Raises:
            UserError: it holds no such log.
        """
        try:
            return cls(tuple((folder / name).read_text(encoding="utf-8") for name in _FILES))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"log={folder} is no folder of a tuning ({' and '.join(_FILES)}): {error}") from error

    def write(self, folder: Path) -> None:
        """Write the files into a new folder."""
        folder.mkdir()
        for name, text in zip(_FILES, self.files, strict=True):
            (folder / name).write_text(text, encoding="utf-8")


def tuned(fused: Any, target: Any, *, trials: int, log: Log | None) -> tuple[Any, Log | None]:
    """Return the module with the functions scheduled that the log, or new measurements, have a schedule for.

    Args:
        fused: of functions that are not scheduled.
        target: a CPU; this machine where anything is measured.
        trials: schedules to measure altogether.
        log: of an earlier tuning, to start from.

    Raises:
        UserError: the log is damaged.
    """
    if not trials and log is None:
        return fused, None
    with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
        database = _database(Path(scratch), log)
        if trials:
            _measure(fused, target, database, trials)
        chosen = _applied(fused, target, database)
        texts = tuple((Path(scratch) / name).read_text(encoding="utf-8") for name in _FILES)
    return chosen, Log(texts)


def _database(folder: Path, log: Log | None) -> Any:
    from tvm.s_tir.meta_schedule.database import JSONDatabase

    for name, text in zip(_FILES, log.files if log else ("", ""), strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    try:
        return JSONDatabase(str(folder / _FILES[1]), str(folder / _FILES[0]))
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"the log of the tuning is damaged: {str(error).strip().splitlines()[-1:]}") from error


def _measure(fused: Any, target: Any, database: Any, trials: int) -> None:
    """Time schedules of every function with choices, the same number of each, and note them."""
    from tvm.s_tir.meta_schedule.arg_info import ArgInfo
    from tvm.s_tir.meta_schedule.database import TuningRecord

    tasks = _tasks(fused)
    each = max(1, trials // max(1, len(tasks)))
    for _, task in tasks:
        workload = database.commit_workload(task)
        arguments = ArgInfo.from_prim_func(task["main"])
        for schedule in varied(task["main"], lanes_of(target), each):
            seconds = _seconds(schedule.mod, target, arguments)
            database.commit_tuning_record(TuningRecord(schedule.trace, workload, seconds, target, arguments))


def _seconds(module: Any, target: Any, tensors: Sequence[Any]) -> list[float]:
    """Return the times of a candidate, compiled as the whole will be, on arguments of ones."""
    import numpy as np
    import tvm

    with tvm.transform.PassContext(opt_level=3, config=OPTIONS):
        library = tvm.compile(module, target=target)
    arguments = [tvm.runtime.tensor(np.ones([int(size) for size in one.shape], str(one.dtype))) for one in tensors]
    found = library.mod.time_evaluator("main", tvm.cpu(), number=_NUMBER, repeat=_REPEATS)(*arguments)
    return [float(min(found.results))]


def _applied(fused: Any, target: Any, database: Any) -> Any:
    from tvm import s_tir

    done = fused.clone()
    for name, task in _tasks(fused):
        record = database.query_tuning_record(task, target, name)
        if record is not None:
            schedule = s_tir.Schedule(task)
            record.trace.apply_to_schedule(schedule, remove_postproc=False)
            scheduled = schedule.mod["main"].with_attr({"tirx.is_scheduled": True}).without_attr("global_symbol")
            done[fused.get_global_var(name)] = scheduled
    return done


def _tasks(fused: Any) -> list[tuple[str, Any]]:
    """Return name and module of every function that has choices."""
    import tvm
    from tvm import tirx

    found = []
    for variable in sorted(fused.get_global_vars(), key=lambda one: str(one.name_hint)):
        function = fused[variable]
        if isinstance(function, tirx.PrimFunc) and is_tunable(function):
            named = function.with_attr({"global_symbol": "main", "tirx.noalias": True})
            found.append((str(variable.name_hint), tvm.IRModule({"main": named})))
    return found
