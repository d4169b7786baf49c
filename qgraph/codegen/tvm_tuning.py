"""Tuning by TVM's MetaSchedule: the choices of our own schedules, measured on this machine.

    function with a sum, sizes known    =>    rows of register tiles ... sampled, compiled, timed; the fastest is kept

The database (two JSON files) is the log: the same log gives the same code, without measuring anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from qgraph.codegen.tvm_float_build import lanes_of
from qgraph.codegen.tvm_float_schedule import is_tunable, sampled
from qgraph.errors import UserError

__all__ = ["Log", "tuned"]

_FILES = ("database_tuning_record.json", "database_workload.json")
_EACH = 16
"""Most schedules of one function: there are not many more."""


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
        UserError: psutil is not installed, which measuring needs, or the log is damaged.
    """
    if not trials and log is None:
        return fused, None
    if trials and importlib.util.find_spec("psutil") is None:
        raise UserError("tuning needs psutil: pip install psutil")
    with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
        database = _database(Path(scratch), log)
        if trials:
            _measure(fused, target, database, trials, Path(scratch))
        chosen = _applied(fused, target, database)
        texts = tuple((Path(scratch) / name).read_text(encoding="utf-8") for name in _FILES)
    return chosen, Log(texts)


def _database(folder: Path, log: Log | None) -> Any:
    from tvm.s_tir import meta_schedule as ms

    for name, text in zip(_FILES, log.files if log else ("", ""), strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    try:
        return ms.database.JSONDatabase(str(folder / _FILES[1]), str(folder / _FILES[0]))
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"the log of the tuning is damaged: {str(error).strip().splitlines()[-1:]}") from error


def _measure(fused: Any, target: Any, database: Any, trials: int, folder: Path) -> None:
    """Sample schedules of every function with choices and time them, the same number of each."""
    import tvm
    from tvm.s_tir import meta_schedule as ms

    tasks = _tasks(fused)
    each = min(_EACH, max(1, trials // max(1, len(tasks))))
    lanes = lanes_of(target)
    space = ms.space_generator.ScheduleFn(
        lambda schedule: sampled(schedule, lanes), sch_rules=[], postprocs=[], mutator_probs={}
    )
    builder = ms.builder.LocalBuilder(max_workers=1, f_build=_build)
    with _quiet():
        ms.tir_integration.tune_tir(
            tvm.IRModule({name: task["main"].with_attr("global_symbol", name) for name, task in tasks}),
            _counted(target),
            str(folder),
            max_trials_global=each * len(tasks),
            max_trials_per_task=each,
            num_trials_per_iter=each,
            builder=builder,
            database=database,
            cost_model="none",
            task_scheduler="round-robin",
            space=space,
            strategy="replay-func",
            num_tuning_cores=1,
            seed=1,
        )


def _applied(fused: Any, target: Any, database: Any) -> Any:
    from tvm import s_tir

    done = fused.clone()
    for name, task in _tasks(fused):
        record = database.query_tuning_record(task, _counted(target), name)
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


def _counted(target: Any) -> Any:
    """Return the target with a number of cores, which MetaSchedule asks for; it does not change the code."""
    import tvm

    return tvm.target.Target({**dict(target.export()), "num-cores": os.cpu_count() or 1})


def _build(module: Any, target: Any, parameters: Any) -> Any:
    """Compile a candidate as the whole will be; run in a process of its own."""
    import tvm

    from qgraph.codegen.tvm_float_build import OPTIONS

    del parameters
    with tvm.transform.PassContext(opt_level=3, config=OPTIONS):
        return tvm.tirx.build(module, target=target)


@contextlib.contextmanager
def _quiet() -> Any:
    logging.getLogger("tvm.s_tir.meta_schedule").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
