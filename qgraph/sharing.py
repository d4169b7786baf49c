"""What compilations of one model have in common is made once.

                      +-- awq -- gptq -- matmul-nbits                     cpu-int4
    source -- prepare +              `-- to-fp16 -- matmul-nbits          cuda-int4
                      +-- full-qdq -- integer-requantize                  integer

A `Line` takes a model through the passes of one compilation. Behind every pass the model has a key: of the source with
its external data, the samples, the seed, the versions of everything, and of all passes so far with their options. A
line that comes to a key at which another has been goes on from a copy of the model there, so that the artifact is the
same, to the byte. With a `Cache`, what took long is found again by other processes. Ranges of activations are shared
between equal models, and so is the source with its outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph
from qgraph import spec
from qgraph.analysis.calibration import calibrate
from qgraph.analysis.finished_layers import fingerprint, likeness
from qgraph.analysis.tensor_statistics import statistics
from qgraph.cache import Cache, key_of
from qgraph.errors import UserError
from qgraph.manifest import sha256
from qgraph.pipeline import Context, IrPass, Pass, Pipeline, Report, Rewrite, Samples
from qgraph.runtime.benchmark import machine
from qgraph.runtime.recorded import Recorded
from qgraph.runtime.watched_source import WatchedSource
from qgraph.stored_states import State, read_outputs, read_state, write_outputs, write_state

__all__ = ["BusyError", "Line", "Sharing", "joined", "keys_behind"]

_STATES = 16
"""States of the model that are kept in memory; they share most of their weights."""
_WATCHED = 4
"""Sources whose inner tensors are kept."""
_WORTH_COPYING = 0.1
_WORTH_WRITING = 0.5
"""Seconds of work behind which a state is kept, in memory and on disk. What is kept decides on nothing but time."""
_BY_NAME = (calibrate, statistics)
"""Analyses whose results name tensors, so that they hold for a copy of the model."""


class BusyError(Exception):
    """Another process runs the next pass over the same model."""


class Sharing:
    """What several compilations share.

    Args:
        cache: where to find what other processes have made, and to keep it for them; None for memory only.
        memory: keep states in memory, for compilations to come.
        claims: run no pass that another process with this option runs over the same model.
    """

    def __init__(self, cache: Cache | None = None, *, memory: bool = True, claims: bool = False) -> None:
        self.cache = cache
        self.claims = claims
        self._memory = memory
        self._states: OrderedDict[str, State] = OrderedDict()
        self._watched: OrderedDict[tuple[Any, ...], WatchedSource] = OrderedDict()
        self._facts: dict[tuple[Any, ...], Any] = {}
        self._digests: dict[int, str] = {}
        self._held: list[object] = []

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return what `make` gives, called once for a key; always called where nothing is kept in memory."""
        if not self._memory:
            return make()
        if key not in self._facts:
            self._facts[key] = make()
        return self._facts[key]

    def token(self, thing: object) -> object:
        """Return what tells a thing from others in a key: itself, or its identity, in which case it is held."""
        if thing is None or isinstance(thing, str | Path):
            return thing
        self._held.append(thing)
        return id(thing)

    def root(self, source: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], context: Context) -> str:
        """Return the key of a source as it was loaded.

        Args:
            source: has its `sha256`, external data included.
            shapes: that were fixed.
            context: seed, threads, memory bound and samples count, since results may depend on them.
        """
        samples = context.calibration
        digest = "" if samples is None else self._digest(samples)
        fixed = sorted((name, tuple(sizes)) for name, sizes in shapes.items())
        numbers = (context.seed, context.threads, context.calibration_memory, context.opset)
        return key_of("source", source["sha256"], fixed, digest, numbers, *_versions())

    def find(self, key: str) -> State | None:
        """Return the state of a key, or None where nobody has been, or nothing was kept."""
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key]
        found = self.cache.find(key) if self.cache is not None else None
        if found is None or self.cache is None:
            return None
        try:
            return read_state(*found)
        except (OSError, ValueError, KeyError, TypeError, UserError) as error:
            self.cache.tell(f"{found[0]} in the cache is damaged and made anew: {error}")
            self.cache.drop(key)
            return None

    def furthest(self, keys: Sequence[str | None]) -> tuple[int, State] | None:
        """Return how many of the keys behind one another lead to the furthest state that there is, and the state."""
        for count in range(len(keys), 0, -1):
            key = keys[count - 1]
            state = self.find(key) if key is not None else None
            if state is not None:
                return count, state
        return None

    def leave(self, key: str, model: ir.Model, context: Context, reports: Sequence[Report], seconds: float) -> None:
        """Keep a state behind so many seconds of work, where that is worth it."""
        if seconds >= _WORTH_COPYING:
            self.remember(key, model, context, reports)
        if seconds >= _WORTH_WRITING:
            self.store(key, model, context, reports)

    def remember(self, key: str, model: ir.Model, context: Context, reports: Sequence[Report]) -> None:
        """Keep a state in memory, if any are."""
        if not self._memory:
            return
        self._states[key] = State.of(model.clone(), context, reports)
        while len(self._states) > _STATES:
            self._states.popitem(last=False)

    def store(self, key: str, model: ir.Model, context: Context, reports: Sequence[Report]) -> bool:
        """Keep a state on disk, if there is a cache; tell whether it is there now."""
        if self.cache is None:
            return False
        return self.cache.keep(key, functools.partial(write_state, State.of(model, context, reports)))

    def recorded(self, root: str, samples: Samples, recorded: Recorded) -> Recorded:
        """Give a recording of a source what an earlier one has kept on disk for the same samples."""
        found = None if self.cache is None else self.cache.find(self._outputs_key(root, samples))
        if found is not None:
            recorded.keep(read_outputs(*found))
        return recorded

    def keep_outputs(self, root: str, samples: Samples, recorded: Recorded) -> None:
        """Keep on disk what a recording has, once it has gone over all samples."""
        outputs = recorded.outputs
        if self.cache is not None and outputs is not None:
            self.cache.keep(self._outputs_key(root, samples), functools.partial(write_outputs, outputs))

    def watched(self, watched: WatchedSource) -> WatchedSource:
        """Return one that stands for a like source with the same samples, if there is one, else this."""
        if not self._memory:
            return watched
        source = watched.source
        key = (likeness(source) if isinstance(source, ir.Model) else source, _fingerprint(watched.samples))
        found = self._watched.setdefault(key, watched)
        self._watched.move_to_end(key)
        while len(self._watched) > _WATCHED:
            self._watched.popitem(last=False)
        return found

    def _outputs_key(self, root: str, samples: Samples) -> str:
        return key_of("outputs", root, self._digest(samples))

    def _digest(self, samples: Samples) -> str:
        """Return the hash of samples, which are gone through once."""
        if id(samples) not in self._digests:
            self._held.append(samples)
            self._digests[id(samples)] = _fingerprint(samples)
        return self._digests[id(samples)]


@dataclasses.dataclass
class _SharedContext(Context):
    """A context whose ranges of activations are those of all lines that have asked for them of an equal model."""

    sharing: Sharing = dataclasses.field(default_factory=Sharing)

    def analyse(self, analysis: Callable[..., Any], model: ir.Model, *arguments: Any) -> Any:
        """Return the analysis, from another line where one has asked for just this."""
        make = functools.partial(super().analyse, analysis, model, *arguments)
        if analysis not in _BY_NAME or self.calibration is None:
            return make()
        numbers = (self.threads, self.calibration_memory)
        return self.sharing.once((analysis, fingerprint(model, self, "ranges"), numbers, arguments), make)


class Line:
    """Takes a model through the passes of one compilation, part by part.

    Attributes:
        model: as it is now; another object after `run`.
        context: of the passes.

    Args:
        model: is changed.
        context: is used as it is where nothing is shared, else a copy.
        sharing: None shares nothing.
        root: key of the model as it is.
    """

    def __init__(self, model: ir.Model, context: Context, sharing: Sharing | None = None, root: str = "") -> None:
        self.model = model
        self.context = context
        self._sharing = sharing
        self._key: str | None = root
        self._reports: tuple[Report, ...] = ()
        self._uncopied = self._unwritten = 0.0
        if sharing is not None:
            fields = [one.name for one in dataclasses.fields(Context) if one.init and not one.name.startswith("_")]
            values = {name: getattr(context, name) for name in fields}
            self.context = _SharedContext(**{**values, "promises": list(context.promises)}, sharing=sharing)

    @property
    def sharing(self) -> Sharing | None:
        """What it shares; None for nothing."""
        return self._sharing

    @property
    def key(self) -> str | None:
        """Of the model as it is now; None behind a pass that has no text."""
        return self._key

    @property
    def reports(self) -> tuple[Report, ...]:
        """Of all passes since the source, where something is shared."""
        return self._reports

    def run(self, pipeline: Pipeline, *, after_pass: Callable[[Report], None] | None = None) -> Report:
        """Run the passes, or take up the model where another line has been; return the report of all.

        Args:
            pipeline: the passes to come.
            after_pass: called with the report of each of them.

        Raises:
            UserError: the model or an option is at fault.
            PassError: a pass is at fault.
            BusyError: see `Sharing`.
        """
        if self._sharing is None:
            return pipeline.run(self.model, context=self.context, after_pass=after_pass)
        if self._sharing.claims and len(pipeline) > 1:
            parts = [self.run(Pipeline([one]), after_pass=after_pass) for one in pipeline]
            return joined(parts[-1], self._reports[-len(parts) :])
        before, tell = len(self._reports), after_pass or _ignore
        keys = keys_behind(self._key, pipeline.passes)
        known = self._take_up(keys)
        reports = self._reports[before:]
        for report in reports:
            tell(report)

        def after(report: Report) -> None:
            self._passed(keys[len(self._reports) - before], report)
            tell(report)

        with self._claimed(keys[known:]):
            summed = Pipeline(pipeline.passes[known:]).run(self.model, context=self.context, after_pass=after)
        return joined(summed, self._reports[before:])

    @contextlib.contextmanager
    def _claimed(self, keys: Sequence[str | None]) -> Iterator[None]:
        assert self._sharing is not None
        cache = self._sharing.cache if self._sharing.claims else None
        if cache is None or not keys or keys[0] is None:
            yield
            return
        with cache.claim(keys[0]) as had:
            if not had or cache.holds(keys[0]):  # or somebody has ended just now
                raise BusyError
            yield

    def _take_up(self, keys: Sequence[str | None]) -> int:
        """Go on from the furthest place on the way where somebody has been; return how many passes that saves."""
        assert self._sharing is not None
        found = self._sharing.furthest(keys)
        if found is None:
            return 0
        count, state = found
        self.model = state.model.clone()
        self.context.reference, self.context.promises = state.reference, list(state.promises)
        self.context.forget()
        self._reports = state.reports
        self._key = keys[count - 1]
        self._uncopied = self._unwritten = 0.0
        return count

    def _passed(self, key: str | None, report: Report) -> None:
        assert self._sharing is not None
        self._key, self._reports = key, (*self._reports, report)
        self._uncopied += report.seconds
        self._unwritten += report.seconds
        if key is None:
            return
        if self._uncopied >= _WORTH_COPYING:
            self._sharing.remember(key, self.model, self.context, self._reports)
            self._uncopied = 0.0
        if self._unwritten >= _WORTH_WRITING and self._sharing.store(key, self.model, self.context, self._reports):
            self._unwritten = 0.0


def joined(summed: Report, parts: Sequence[Report]) -> Report:
    """Return the report of a whole pipeline of which only the last passes ran now.

    Args:
        summed: of the passes that ran.
        parts: of all passes.
    """
    return dataclasses.replace(
        summed,
        changed=sum(one.changed for one in parts),
        skipped=tuple(skipped for one in parts for skipped in one.skipped),
        notes=tuple(note for one in parts for note in one.notes),
        nodes_before=parts[0].nodes_before if parts else summed.nodes_before,
        seconds=sum(one.seconds for one in parts),
        parts=tuple(parts),
    )


def _ignore(report: Report) -> None:
    del report


def keys_behind(key: str | None, passes: Sequence[Pass]) -> list[str | None]:
    """Return the keys of a model behind each of some passes, given its own; None from the first on without a text."""
    keys: list[str | None] = []
    for one in passes:
        try:
            text = spec.format_specs(Pipeline([one]).specs())
        except UserError:
            key = None
        key = key and key_of(key, text, *map(_code, _modules(one)))
        keys.append(key)
    return keys


def _modules(one: Pass) -> list[str]:
    """Return the modules that hold the code of a pass, and of what it names."""
    named = one.of if isinstance(one, IrPass) else one.rules if isinstance(one, Rewrite) else ""
    return [type(one).__module__, *filter(None, [named.partition(":")[0]])]


@functools.cache
def _code(module: str) -> str:
    """Return what tells the code of a module from that of another version; ours is in the root's key."""
    if module.startswith("qgraph."):
        return module
    file = getattr(sys.modules.get(module), "__file__", None) or _file_of(module)
    return key_of(module, sha256(Path(file)) if file and Path(file).is_file() else "")


def _file_of(module: str) -> str | None:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # the pass itself tells what is wrong with its name
        return None
    return None if found is None else found.origin


@functools.cache
def _versions() -> tuple[str, ...]:
    """Return what results depend on beside the input: this code, the packages that compute, and the processor."""
    packages = ("numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "scipy", "apache-tvm")
    found = [f"{name} {_version(name)}" for name in packages]
    here = machine()
    return (qgraph.__version__, _own_code(), platform.python_version(), *found, here.cpu, here.system, str(here.cores))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _own_code() -> str:
    """Return the hash of every source file of this package: versions stay the same while one works on it."""
    digest = hashlib.sha256()
    folders = {Path(__file__).parent, *_folders("qgraph.passes"), *_folders("qgraph.targets")}  # they may lie elsewhere
    files = {file for folder in folders for ending in ("py", "toml") for file in folder.rglob(f"*.{ending}")}
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _folders(package: str) -> list[Path]:
    found = importlib.util.find_spec(package)
    return [Path(folder) for folder in (found and found.submodule_search_locations) or ()]


def _fingerprint(samples: Samples) -> str:
    digest = hashlib.sha256()
    for feed in samples:
        for name in sorted(feed):
            digest.update(key_of(name, feed[name].dtype, feed[name].shape).encode())
            digest.update(_bytes(feed[name]))
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> bytes:
    return repr(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()
