"""Running a graph segment by segment: one segment on every sample, then the next, so that memory holds one at a time.

What crosses from a segment to the next is kept in memory as far as there is room, and otherwise in files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.blocks import Segment
from qgraph.analysis.probes import Probe, first_line, raw_outputs
from qgraph.errors import UserError, is_disk_full
from qgraph.pipeline import Feeds

__all__ = ["CarriedValues", "SegmentRun"]


class SegmentRun:
    """A session of one segment, which gives some of its values.

    Args:
        model: that the segment is of; not changed.
        segment: reads values that `store` holds for every sample.
        outputs: what it shall give.
        store: where what it reads is kept.
        changes: arrays to compute with in the place of weights, in their shapes.
        threads: 0 lets the runtime choose.
    """

    def __init__(
        self,
        model: ir.Model,
        segment: Segment,
        outputs: Sequence[ir.Value],
        store: CarriedValues,
        *,
        changes: Mapping[ir.Value, np.ndarray] | None = None,
        threads: int = 0,
    ) -> None:
        self._segment = segment
        self._outputs = outputs
        self._store = store
        self._probe: Probe | None = None
        if outputs:
            part = _extracted(model, segment, outputs, store, changes or {})
            names = [str(value.name) for value in outputs]
            fed = frozenset(str(value.name) for value in segment.reads)
            self._probe = Probe(part, raw_outputs(names), fed, threads=threads, owned=True)

    def __call__(self, number: int) -> dict[ir.Value, np.ndarray]:
        """Run one sample.

        Raises:
            UserError: the runtime refuses it.
        """
        if self._probe is None:
            return {}
        feed: Feeds = {str(value.name): self._store.get(value, number) for value in self._segment.reads}
        try:
            arrays = self._probe.run(feed)
        except Exception as error:
            raise UserError(f"the model does not run on sample {number}: {first_line(error)}") from error
        return dict(zip(self._outputs, arrays, strict=True))


def _extracted(
    model: ir.Model,
    segment: Segment,
    outputs: Sequence[ir.Value],
    store: CarriedValues,
    changes: Mapping[ir.Value, np.ndarray],
) -> ir.Model:
    """Copy what computes `outputs` from what the segment reads; weights are shared, not copied."""
    nodes = _nodes(model, segment, outputs)
    constants = {value: None for node in nodes for value in _read(model, node) if value.is_initializer()} | {
        value: None for value in outputs if value.is_initializer()
    }
    # A view of the segment: a search through the whole graph for each would be quadratic.
    graph = ir.GraphView(
        list(segment.reads),
        list(outputs),
        nodes=nodes,
        initializers=tuple(value for value in constants if value not in segment.reads),
        opset_imports=model.graph.opset_imports,
        name=model.graph.name,
    ).clone()
    for value, source in zip(graph.inputs, segment.reads, strict=True):
        array = store.get(source, 0)
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        value.shape = ir.Shape([None] * array.ndim)
    for weight, array in changes.items():
        copied = graph.initializers.get(weight.name or "")
        if copied is not None:
            copied.const_value = ir.tensor(array, name=weight.name)
    return ir.Model(graph, ir_version=model.ir_version, functions=tuple(model.functions.values()))


def _nodes(model: ir.Model, segment: Segment, outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """Return what computes `outputs` from what the segment reads, in the order of the graph."""
    found: dict[ir.Node, None] = {}
    stops = set(segment.reads)
    stack = [(node, False) for node in map(ir.Value.producer, outputs) if node is not None]
    while stack:
        node, ready = stack.pop()
        if ready:
            found[node] = None
        elif node not in found:
            stack.append((node, True))
            before = [value.producer() for value in _read(model, node) if value not in stops]
            stack += [(one, False) for one in before if one is not None and one not in found]
    if found.keys() <= set(segment.nodes):
        return [node for node in segment.nodes if node in found]
    return list(found)


def _read(model: ir.Model, node: ir.Node) -> list[ir.Value]:
    """Return the values of the main graph that a node reads, its subgraphs included."""
    values = list(node.inputs)
    for graph in qgraph.ir.inner_graphs(node):
        values += [value for inner in graph.all_nodes() for value in inner.inputs]
        values.extend(graph.outputs)
    return [value for value in values if value is not None and value.graph is model.graph]


class CarriedValues:
    """Arrays by value and sample; the first that fit are kept in memory, the others in files.

    Args:
        folder: for the files; made when the first is written.
        room: bytes to keep in memory.
    """

    def __init__(self, folder: Path, room: int) -> None:
        self.samples = 0
        self._folder = folder
        self._room = room
        self._held: dict[ir.Value, dict[int, _Kept]] = {}
        self._written = 0

    def put(self, value: ir.Value, number: int, array: np.ndarray) -> None:
        """Keep the array that `value` has on sample `number`; what is the same on several samples is kept once.

        Raises:
            UserError: the disk is full.
        """
        self.samples = max(self.samples, number + 1)
        held = self._held.setdefault(value, {})
        if array.dtype == np.object_:
            array = array.astype(np.str_)  # texts, which runtimes take in either form
        # As bytes: bfloat16 has no buffer of its own.
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        digest = hashlib.blake2b(flat.data, digest_size=16).digest()
        twin = next((one for one in held.values() if one.digest == digest and one.shape == array.shape), None)
        held[number] = twin if twin is not None else self._kept(array, digest)

    def _kept(self, array: np.ndarray, digest: bytes) -> _Kept:
        if array.nbytes <= self._room:
            self._room -= array.nbytes
            return _Kept(array, digest, array.shape, array.nbytes)
        path = self._folder / f"{self._written}.npy"
        self._written += 1
        try:
            self._folder.mkdir(exist_ok=True)
            np.save(path, array)
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise UserError(
                f"the disk is full: {self._folder.parent} has no room for the activations of the samples. "
                "Free some, or give fewer samples."
            ) from error
        return _Kept(path, digest, array.shape, 0)

    def get(self, value: ir.Value, number: int) -> np.ndarray:
        """Return an array that was kept, read-only in spirit."""
        place = self._held[value][number].place
        return place if isinstance(place, np.ndarray) else np.load(place, mmap_mode="r")

    def drop(self, value: ir.Value) -> None:
        """Forget a value on all samples."""
        for one in {id(kept): kept for kept in self._held.pop(value, {}).values()}.values():
            self._room += one.bytes
            if isinstance(one.place, Path):
                one.place.unlink()


class _Kept(NamedTuple):
    """Where an array is, and what it is known by; `bytes` counts what it takes of the memory."""

    place: np.ndarray | Path
    digest: bytes
    shape: tuple[int, ...]
    bytes: int
