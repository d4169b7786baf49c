"""Where the jobs of a search run: in this process, in processes beside it, or on a Ray cluster.

All three take jobs and give futures. Nothing but jobs and what was made of them travels; what all jobs share, the
workplace, goes to every worker once.

    Here         one job after the other, when its result is asked for
    Processes    workers that are started as `python -c ...`, so that nothing of the caller's own script runs in them,
                 and that do not hear Ctrl-C, so that the search can end them itself
    Ray          tasks on a cluster, `ray://HOST:PORT`, or on a cluster of this machine alone, `ray://local`

A worker that dies is replaced and its job tried once more; a second death is the job's failure, by its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import queue
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

import onnx_ir as ir

import qgraph.ir
from qgraph import registry, spec
from qgraph.errors import UserError, nearest
from qgraph.pipeline import Context, Feeds, Pipeline, Samples
from qgraph.runtime.recorded import replay
from qgraph.search_workshop import Job, Made, Workplace, Workshop

__all__ = ["Executor", "Here", "Processes", "Ray", "Worker", "in_order", "parse_executor", "portable", "serve"]

_TRIES = 2
_PICKLE = 5
_LOCAL_RAY = "local"


class Executor(Protocol):
    """Takes jobs.

    Attributes:
        workers: how many jobs run at once.
    """

    workers: int

    def submit(self, job: Job) -> Future[Made]:
        """Take a job; the future's result tells what went wrong, too."""
        ...

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        ...


def in_order(executor: Executor, jobs: Iterable[Job]) -> Iterator[tuple[Job, Made]]:
    """Yield jobs with what was made of them, in the order of `jobs`, while up to `workers` of them run.

    What is asked for no more is still made, but nobody waits for it: jobs are only ever begun as far ahead as there are
    workers.
    """
    waiting: list[tuple[Job, Future[Made]]] = []
    remaining = iter(jobs)
    while True:
        while len(waiting) < executor.workers and (job := next(remaining, None)) is not None:
            waiting.append((job, executor.submit(job)))
        if not waiting:
            return
        job, future = waiting.pop(0)
        yield job, future.result()


def parse_executor(text: str) -> str | None:
    """Return the address of a Ray cluster, or None for processes of this machine.

    Raises:
        UserError: there is no such executor.
    """
    if text in ("", "process", "processes"):
        return None
    if text == "ray":
        return f"ray://{_LOCAL_RAY}"
    if text.startswith("ray://") and len(text) > len("ray://"):
        return text
    names = ("processes", "ray://HOST:PORT", "ray://local")
    raise UserError(f"there is no executor '{text}'.{nearest(text, names)} There are: {', '.join(names)}.")


class Here:
    """Runs jobs in this process."""

    workers = 1

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop

    def submit(self, job: Job) -> Future[Made]:
        """Do the job."""
        future: Future[Made] = Future()
        future.set_result(_attempt(self._shop.make, job))
        return future

    def close(self) -> None:
        """There is nothing to end."""


@dataclasses.dataclass(frozen=True)
class _Parcel:
    """A workplace as it travels.

    Attributes:
        model: the prepared model: a file, or its bytes.
        target: name and options.
        lower: as text.
        context: fields of the context that are plain values.
        calibration: the calibration samples, or their feeds.
        tuning: like it.
        names: of the outputs.
        outputs: the source's, for the tuning samples.
    """

    model: Path | Mapping[str, bytes]
    target: spec.Spec
    lower: str
    context: Mapping[str, Any]
    calibration: Samples | list[Feeds] | None
    tuning: Samples | list[Feeds]
    names: tuple[str, ...]
    outputs: list[list[Any]]

    @classmethod
    def pack(cls, place: Workplace, folder: Path, *, threads: int, whole: bool) -> _Parcel:
        """Pack a workplace.

        Args:
            place: what to pack.
            folder: where the model can be written.
            threads: that a worker may use.
            whole: with the contents of all files, for another machine.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "prepared.onnx"
        if not path.exists():
            qgraph.ir.save(place.model, path)
        files = {one.name: one.read_bytes() for one in sorted(folder.iterdir())} if whole else None
        context = place.context
        plain = {"seed": context.seed, "calibration_memory": context.calibration_memory, "opset": context.opset}
        return cls(
            model=path if files is None else files,
            target=spec.to_spec(place.target),
            lower=place.lower.to_text(),
            context={**plain, "threads": threads},
            calibration=None if context.calibration is None else _travelling(context.calibration, whole=whole),
            tuning=_travelling(place.tuning, whole=whole),
            names=tuple(str(value.name) for value in place.model.graph.outputs),
            outputs=[place.source.run(None, feeds) for feeds in place.tuning],
        )

    def unpack(self) -> Workplace:
        """Set the workplace up again."""
        target = spec.build(registry.find("target", self.target.name), self.target)
        context = Context(**self.context, calibration=self.calibration)
        source = replay(self.names, self.outputs)
        return Workplace(self._load(), target, Pipeline.parse(self.lower), context, self.tuning, source)

    def _load(self) -> ir.Model:
        if isinstance(self.model, Path):
            return qgraph.ir.load(self.model)
        folder = Path(tempfile.mkdtemp(prefix="qgraph-"))
        for name, content in self.model.items():
            (folder / name).write_bytes(content)
        return qgraph.ir.load(folder / "prepared.onnx")


def _travelling(samples: Samples, *, whole: bool) -> Samples | list[Feeds]:
    """Return samples that pickle; with `whole`, such that they need no file of this machine."""
    if not whole:
        with contextlib.suppress(Exception):
            pickle.dumps(samples, _PICKLE)
            return samples
    return list(samples)


def portable(place: Workplace, pipeline: Pipeline) -> bool:
    """Tell whether another process finds the same passes and target by their names."""
    try:
        same = Pipeline.parse(pipeline.to_text()) == pipeline
        same = same and Pipeline.parse(place.lower.to_text()) == place.lower
        return (
            same and spec.build(registry.find("target", place.target.name), spec.to_spec(place.target)) == place.target
        )
    except UserError:
        return False


def _inexact(made: Made) -> Made:
    """Return what another process has made: with other threads, the last bits of ranges may differ."""
    return dataclasses.replace(made, exact=False)


def _as_text(job: Job) -> Job:
    return dataclasses.replace(job, compress=job.pipeline.to_text())


class Processes:
    """Runs jobs in processes of this machine.

    Args:
        place: what they share.
        workers: how many.
        threads: of each.
        folder: for what they share on disk.
    """

    COMMAND: ClassVar[list[str]] = [sys.executable, "-P", "-c", "from qgraph.search_executors import work; work()"]

    def __init__(self, place: Workplace, workers: int, *, threads: int, folder: Path) -> None:
        self.workers = workers
        self._parcel = pickle.dumps(_Parcel.pack(place, folder, threads=threads, whole=False), _PICKLE)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="qgraph-search")
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        self._all: list[Worker] = []
        self._environment = _environment(threads)
        self._closed = False
        for _ in range(workers):
            self._idle.put(None)

    def submit(self, job: Job) -> Future[Made]:
        """Give the job to the next worker that is free."""
        return self._threads.submit(self._do, _as_text(job))

    def close(self) -> None:
        """End the workers."""
        self._closed = True
        for worker in self._all:
            worker.end()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _do(self, job: Job) -> Made:
        worker = self._idle.get()
        try:
            for _ in range(_TRIES):
                if self._closed:
                    return Made(job.folder, error="the search has ended")
                worker = worker or self._start()
                answer: Made | None = worker.ask(job)
                if answer is not None:
                    return _inexact(answer)
                worker.end()
                status, worker = worker.status, None
            return Made(job.folder, error=f"its worker died {_TRIES} times ({_how(status)})")
        finally:
            self._idle.put(worker)

    def _start(self) -> Worker:
        worker = Worker(self.COMMAND, self._parcel, self._environment)
        self._all.append(worker)
        return worker


def _how(status: int | None) -> str:
    return f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"


def _environment(threads: int) -> dict[str, str]:
    counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(max(1, threads)))
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109 - '' is the folder as text
    return {**os.environ, **counts, "PYTHONPATH": path}


class Worker:
    """A process that answers jobs, one after the other.

    Args:
        command: starts it; ends in `serve`.
        parcel: pickled, what all jobs share.
        environment: of the process.
    """

    def __init__(self, command: list[str], parcel: bytes, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
        self._parcel = parcel

    @property
    def status(self) -> int | None:
        """Its exit status, once it has ended."""
        return self._process.returncode

    def ask(self, job: Any) -> Any:
        """Return the answer to a job, or None if the worker has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            parcel, self._parcel = self._parcel, b""
            self._process.stdin.write(parcel)
            pickle.dump(job, self._process.stdin, _PICKLE)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            return None

    def end(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


def work() -> None:
    """Be a worker: read the workplace and jobs from standard input, and write what was made to standard output."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints must not get between the answers
    serve(source, sink, lambda parcel: functools.partial(_attempt, Workshop(parcel.unpack()).make))


def serve(source: BinaryIO, sink: BinaryIO, set_up: Callable[[Any], Callable[[Any], Any]]) -> None:
    """Answer jobs until there are no more: what comes first is the parcel, of which `set_up` makes who answers."""
    make: Callable[[Any], Any] | None = None
    while True:
        try:
            read = pickle.load(source)
        except EOFError:
            return
        if make is None:
            make = set_up(read)
            continue
        pickle.dump(make(read), sink, _PICKLE)
        sink.flush()


def _attempt(make: Callable[[Job], Made], job: Job) -> Made:
    try:
        return make(job)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - one candidate less; its row tells
        return Made(job.folder, error=f"{type(error).__name__}: {' '.join(str(error).split())}")


_HERE: dict[str, Workshop] = {}
"""On a Ray worker: the workshop of the search that it works for."""


def _ray_task(parcel: _Parcel, key: str, job: Job) -> Made:
    """Do a job on a machine of the cluster, and send the files with the answer."""
    if key not in _HERE:
        _HERE.clear()
        _HERE[key] = Workshop(parcel.unpack())
    with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
        there = dataclasses.replace(job, folder=Path(scratch) / "made")
        made = _attempt(_HERE[key].make, there)
        files = {path.name: path.read_bytes() for path in there.folder.iterdir()} if made.built is not None else None
    return dataclasses.replace(made, folder=job.folder, files=files)


class Ray:
    """Runs jobs as tasks of a Ray cluster, all of whose machines have qgraph installed.

    Args:
        place: what the jobs share.
        address: `ray://HOST:PORT`, or `ray://local` for a cluster of this machine alone.
        workers: how many jobs at once; 0: as many as the cluster has processors.
        folder: for what they share on disk.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, place: Workplace, address: str, *, workers: int, folder: Path) -> None:
        try:
            import ray
        except ImportError:
            raise UserError(f"--executor {address} needs Ray: pip install 'qgraph-compiler[ray]'") from None
        self._ray = ray
        local = address == f"ray://{_LOCAL_RAY}"
        try:
            ray.init(
                address=_LOCAL_RAY if local else address,
                num_cpus=(workers or os.cpu_count() or 1) if local else None,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level="ERROR",
                ignore_reinit_error=True,
            )
        except Exception as error:
            raise UserError(f"--executor {address}: there is no such Ray cluster: {error}") from error
        self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        parcel = _Parcel.pack(place, folder, threads=1, whole=True)
        self._parcel = ray.put(parcel)
        self._key = os.urandom(8).hex()
        self._task = ray.remote(num_cpus=1, max_retries=_TRIES - 1)(_ray_task)

    def submit(self, job: Job) -> Future[Made]:
        """Give the job to the cluster."""
        answer = self._task.remote(self._parcel, self._key, _as_text(job)).future()
        future: Future[Made] = Future()

        def done(one: Future[Made]) -> None:
            error = one.exception()
            if error is None:
                made = _inexact(one.result())
                _unpack_files(made)
                future.set_result(made)
            else:
                future.set_result(Made(job.folder, error=f"its worker died {_TRIES} times ({type(error).__name__})"))

        answer.add_done_callback(done)
        return future

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()


def _unpack_files(made: Made) -> None:
    if made.files is None:
        return
    made.folder.mkdir(parents=True)
    for name, content in made.files.items():
        (made.folder / name).write_bytes(content)
