"""Running a model on calibration samples to watch tensors inside it, within a bound of memory.

ONNX Runtime keeps every watched tensor until the end of a run. When they do not fit into `Context.calibration_memory`
together, the graph is run in slices: several sessions, each cut down to what its tensors need, one after the other over
all samples. A tensor that exceeds the bound on its own is a slice of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qgraph.analysis import probes, reductions
from qgraph.analysis.probes import Kind, Probe
from qgraph.analysis.reductions import Observation, Request
from qgraph.errors import UserError
from qgraph.pipeline import Context, Feeds, Samples

__all__ = ["Watch"]


class Watch:
    """Goes over the calibration samples and yields (tensor, observation), slice by slice, feed by feed.

    Empty tensors yield nothing.

    Args:
        model: is not changed.
        context: its samples, threads, memory bound and progress are used.
        requests: at most one a tensor.

    Attributes:
        unavailable: tensors that cannot be watched, with the reason; complete when the iteration has ended.

    Raises (while iterating):
        UserError: there are no samples, the model does not run on one, or its outputs are not finite.
        ValueError: a request names no value of the model.
    """

    def __init__(self, model: ir.Model, context: Context, requests: Iterable[Request]) -> None:
        self.unavailable: dict[str, str] = {}
        self._model = model
        self._context = context
        self._requests = {request.tensor: request for request in requests}

    def __iter__(self) -> Iterator[tuple[str, Observation]]:
        self.unavailable.clear()
        samples = self._context.samples("static quantization")
        first = next(iter(samples), None)
        if first is None:
            raise UserError("the calibration set is empty: give at least one sample")
        fed = frozenset(first)
        names, kinds = self._watchable(fed)
        sizes = _Sizes(self._model, {name: kinds[name] for name in names}, first)
        bound = self._context.calibration_memory
        slices = _pack(names, sizes.bytes(first), bound)
        done, total = 0, len(slices) * len(samples)
        for part in slices:
            sessions = _Sessions(self._model, self._requests, kinds, fed, self._context.threads)
            for index, feed in zip(_places(samples), samples, strict=True):
                self._context.progress("calibrate", done, total)
                for group in _pack(part, sizes.bytes(feed), bound):
                    yield from self._checked(sessions.observe(group, index, feed), index, feed)
                done += 1
        self._context.progress("calibrate", total, total)

    def _watchable(self, fed: frozenset[str]) -> tuple[list[str], dict[str, Kind]]:
        """Return the tensors that can be watched, in topological order; note why the others cannot."""
        values, inner = probes.main_values(self._model), probes.inner_values(self._model)
        for name in self._requests:
            if name in values:
                continue
            if name not in inner:
                raise ValueError(f"the model has no value '{name}'")
            self.unavailable[name] = f"it lies inside a subgraph of {probes.describe(inner[name])}"
        order = [name for name in values if name in self._requests]
        kinds = probes.kinds(self._model, order, fed)
        for name in order:
            reason = _unfit(kinds[name], self._requests[name].axis)
            if reason:
                self.unavailable[name] = reason
        return [name for name in order if name not in self.unavailable], kinds

    def _checked(
        self, observed: Mapping[str, Observation], index: int, feed: Feeds
    ) -> Iterator[tuple[str, Observation]]:
        fresh = {name: one for name, one in observed.items() if name not in self.unavailable}
        suspects = [name for name, one in fresh.items() if one.suspect]
        if suspects:
            self.unavailable.update(_explain(self._model, suspects, index, feed, self._context))
        for name, one in fresh.items():
            if name not in self.unavailable:
                yield name, one


def _unfit(kind: Kind, axis: int | None) -> str:
    if kind.dtype is None:
        return f"it does not hold real numbers ({kind.text})"
    if axis is None:
        return ""
    if kind.shape is None:
        return "its rank is not known, so that it has no certain channels"
    rank = len(kind.shape)
    return "" if -rank <= axis < rank else f"it has {rank} dimensions, and so no axis {axis}"


class _Sessions:
    """The sessions that watch the tensors of a slice: one, unless a feed is too large to watch them all at once."""

    def __init__(
        self,
        model: ir.Model,
        requests: Mapping[str, Request],
        kinds: Mapping[str, Kind],
        fed: frozenset[str],
        threads: int,
    ) -> None:
        self._model = model
        self._requests = requests
        self._kinds = kinds
        self._fed = fed
        self._threads = threads
        self._reducing: dict[tuple[str, ...], Probe] = {}
        self._raw: dict[tuple[str, ...], Probe] = {}

    def observe(self, names: Sequence[str], index: int, feed: Feeds) -> dict[str, Observation]:
        """Run one feed and return what was observed of each tensor that is not empty."""
        key = tuple(names)
        requests = [self._requests[name] for name in names]
        if key not in self._reducing:
            add = reductions.reduced_outputs(requests, self._kinds)
            self._reducing[key] = Probe(self._model, add, self._fed, threads=self._threads)
        try:
            outputs = self._reducing[key].run(feed)
        except Exception:  # noqa: BLE001 - the runtime's errors have no common base; some reduce no empty tensor
            return self._observe_raw(key, index, feed)
        return {request.tensor: one for request, one in reductions.read(requests, outputs)}

    def _observe_raw(self, names: tuple[str, ...], index: int, feed: Feeds) -> dict[str, Observation]:
        if names not in self._raw:
            self._raw[names] = Probe(self._model, probes.raw_outputs(names), self._fed, threads=self._threads)
        arrays = _run(self._raw[names], index, feed)
        return {
            name: reductions.reduce(array, self._requests[name])
            for name, array in zip(names, arrays, strict=True)
            if array.size
        }


def _run(probe: Probe, index: int, feed: Feeds) -> list[np.ndarray]:
    try:
        return probe.run(feed)
    except Exception as error:
        raise UserError(f"the model does not run on calibration sample {index}: {probes.first_line(error)}") from error


class _Sizes:
    """How many bytes the watched tensors of a feed need."""

    def __init__(self, model: ir.Model, kinds: Mapping[str, Kind], first: Feeds) -> None:
        self._kinds = kinds
        self._inputs = {value.name: value.shape for value in model.graph.inputs if value.name}
        self._first = _elements_fed(first)
        axes = self._axes(first)
        unknown = [name for name, kind in kinds.items() if _elements(kind, axes) is None]
        self._measured: dict[str, int] = {}
        if unknown:
            counts = _run(Probe(model, probes.size_outputs(unknown), frozenset(first)), 0, first)
            self._measured = {name: int(count) for name, count in zip(unknown, counts, strict=True)}

    def bytes(self, feed: Feeds) -> dict[str, int]:
        """Return the bytes by tensor; what only the first feed has shown is taken to grow as the input's square."""
        axes = self._axes(feed)
        growth = max(1.0, _elements_fed(feed) / max(1, self._first)) ** 2
        result = {}
        for name, kind in self._kinds.items():
            count = _elements(kind, axes)
            if count is None:
                count = math.ceil(self._measured[name] * growth)
            # Anything but float32 is watched through a float32 copy.
            copy = 0.0 if kind.dtype is None or kind.dtype == ir.DataType.FLOAT else kind.dtype.itemsize
            result[name] = math.ceil(count * (4.0 + copy))
        return result

    def _axes(self, feed: Feeds) -> dict[str, int]:
        axes: dict[str, int] = {}
        for name, array in feed.items():
            for dim, size in zip(self._inputs.get(name) or (), array.shape, strict=False):
                if isinstance(dim, ir.SymbolicDim) and dim.value:
                    axes[dim.value] = size
        return axes


def _elements_fed(feed: Feeds) -> int:
    return sum(array.size for array in feed.values())


def _elements(kind: Kind, axes: Mapping[str, int]) -> int | None:
    if kind.shape is None:
        return None
    count = 1
    for dim in kind.shape:
        size = axes.get(dim) if isinstance(dim, str) else dim
        if size is None:
            return None
        count *= size
    return count


def _pack(names: Sequence[str], sizes: Mapping[str, int], bound: int) -> list[list[str]]:
    """Cut `names` into runs whose bytes together do not exceed `bound`."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        if not groups or sizes[name] > room:
            groups.append([])
            room = bound
        groups[-1].append(name)
        room -= sizes[name]
    return groups


def _explain(model: ir.Model, suspects: Sequence[str], index: int, feed: Feeds, context: Context) -> dict[str, str]:
    """Return why the tensors among `suspects` that really hold NaN or infinity cannot be watched.

    A model may well make infinities and take them in again, as attention masks do. They are an error only if they
    reach its outputs.

    Raises:
        UserError: they do, or the feed itself holds them.
    """
    for name, array in feed.items():
        if _fault(array):
            raise UserError(f"calibration sample {index}: input '{name}' holds {_fault(array)}. Mend or leave it out.")
    values = probes.main_values(model)
    faults = dict(_faults(model, values, index, feed, context))
    told = {name: _told(values[name], faults) for name in suspects if name in faults}
    reached = [value.name for value in model.graph.outputs if value.name in faults]
    if told and reached:
        name, story = next(iter(told.items()))
        raise UserError(
            f"calibration sample {index}: tensor '{name}' {story}. Output '{reached[0]}' is not finite either. "
            "Mend the sample, or the weights that lead there."
        )
    return {name: f"it {story} on calibration sample {index}" for name, story in told.items()}


def _told(value: ir.Value, faults: Mapping[str, str]) -> str:
    """Return what `value` holds and which node made the first of it, in topological order (that of `faults`)."""
    before, queue = {value}, [value]
    while queue:
        node = queue.pop().producer()
        fresh = {one for one in node.inputs if one is not None} - before if node is not None else set()
        before |= fresh
        queue += fresh
    names = {one.name: one for one in before}
    origin = names[next(name for name in faults if name in names)]
    maker = origin.producer()
    made = f"made first by {probes.describe(maker)}" if maker is not None else "which stands in a constant"
    return f"holds {faults[str(value.name)]}, {made} in '{origin.name}'"


def _faults(
    model: ir.Model, values: Mapping[str, ir.Value], index: int, feed: Feeds, context: Context
) -> Iterator[tuple[str, str]]:
    """Run one feed and yield the tensors that are not finite, in topological order, with what they hold."""
    fed = frozenset(feed)
    kinds = probes.kinds(model, [name for name in values if name not in fed], fed)
    kinds = {name: kind for name, kind in kinds.items() if kind.dtype is not None}
    sizes = _Sizes(model, kinds, feed).bytes(feed)
    for names in _pack(list(kinds), sizes, context.calibration_memory):
        probe = Probe(model, probes.raw_outputs(names), fed, threads=context.threads, optimise=False)
        for name, array in zip(names, _run(probe, index, feed), strict=True):
            if _fault(array):
                yield name, _fault(array)


def _places(samples: Samples) -> Sequence[int]:
    """Return where each sample lies in the data it comes from, of which others may have been held back."""
    indices = getattr(samples, "indices", None)
    return indices if isinstance(indices, tuple) else range(len(samples))


def _fault(array: np.ndarray) -> str:
    if not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
        return ""
    return "NaN" if np.isnan(array).any() else "infinity"
