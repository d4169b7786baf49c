"""Calibration block by block: what goes into linear layers, while the layers before them are being changed.

    for stage in BlockStream(model, context, layers, who="gptq").stages():
        for rows in stage.rows():              # one calibration sample after the other
            ...                                # rows[x].changed [n, K]: what the layers that read x get now
        stage.change(weight, matrix)           # the layers that follow see the change

The graph is cut into its blocks (`qgraph.analysis.blocks`). Only what crosses from one to the next is kept, for every
sample, on disk if it exceeds `Context.calibration_memory`; only one block's weights are in memory at a time. So the
memory is that of a block, whatever the model's size. The model itself is not changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.blocks import Segment, segments
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.segment_cuts import divided
from qgraph.analysis.segment_runs import CarriedValues, SegmentRun
from qgraph.errors import UserError
from qgraph.pipeline import Context
from qgraph.work_folder import SCRATCH

__all__ = ["BlockStream", "Rows", "Stage"]

_SMALL = 1 << 20
"""Bytes of the weights of a segment that runs in no time."""
_LARGEST = 1e17
"""Rows of larger numbers would overflow in sums of their squares, of a few thousand at once in float32."""


class Rows(NamedTuple):
    """What one sample sends into the layers that read a value: float32 [n, K] each; for convolutions, x as it is.

    Attributes:
        changed: with the changes made so far.
        original: in the model as it was; None unless the stream was asked for it.
    """

    changed: np.ndarray
    original: np.ndarray | None


class Stage:
    """Layers whose inputs are taken before any of them is changed.

    Attributes:
        layers: by the value that they read, in topological order.
    """

    def __init__(self, stream: BlockStream, segment: Segment, layers: Mapping[ir.Value, Sequence[LinearLayer]]) -> None:
        self.layers = layers
        self._stream = stream
        self._segment = segment

    def rows(self, also: Sequence[ir.Value] = ()) -> Iterator[dict[ir.Value, Rows]]:
        """Run the graph up to here on one sample after the other and yield what goes into the layers.

        Args:
            also: other values, each with one row for every row of the layers, that are known where these run; as they
                are where the layers are convolutions.

        Raises:
            UserError: the graph does not run on a sample, or NaN or infinity goes into a layer.
        """
        return self._stream._rows(self._segment, self.layers, also)  # noqa: SLF001 - of this module

    def knows(self, value: ir.Value) -> bool:
        """Tell whether `rows` can give a value too: whether it comes into the segment, or is made in it."""
        return value in self._segment.reads or value.producer() in self._segment.nodes

    def change(self, weight: ir.Value, matrix: np.ndarray) -> None:
        """Let the layers that read `weight` use `matrix`, float32 [N, K], from here on."""
        layer = next(one for some in self.layers.values() for one in some if one.weight is weight)
        self._stream.change(layer, matrix)

    def replace(self, constant: ir.Value, array: np.ndarray) -> None:
        """Let all that read a constant (a bias) see another array, of its shape, from here on."""
        self._stream.replace(constant, array)


class BlockStream:
    """Goes over the layers of a model in the order in which they run.

    Args:
        model: is not changed, and must not be while the stream runs.
        context: its samples, threads, memory bound, progress and work folder are used.
        layers: those of interest; embeddings among them are passed over.
        who: the name that progress and errors show.
        sequential: "layer" lets each layer's input be taken after all layers before it were changed, those of its own
            block too; "block" takes the inputs of all layers of a block at once, in fewer runs.
        originals: carry what the unchanged model computes as well, for twice the runs and twice the space.
    """

    def __init__(
        self,
        model: ir.Model,
        context: Context,
        layers: Sequence[LinearLayer],
        *,
        who: str,
        sequential: Literal["layer", "block"] = "layer",
        originals: bool = False,
    ) -> None:
        self._model = model
        self._context = context
        self._who = who
        self._originals = originals
        self._chain = segments(model, context).chain
        wanted = [layer for layer in layers if layer.kind != "embedding"]
        if sequential == "layer" and any(_is_convolution(layer) for layer in wanted):
            nodes = {layer.node for layer in wanted}
            self._chain = [piece for segment in self._chain for piece in divided(segment, nodes)]
        self._stages = [self._staged(segment, wanted, sequential) for segment in self._chain]
        self._changes: dict[ir.Value, np.ndarray] = {}
        self._last = {value: index for index, segment in enumerate(self._chain) for value in segment.reads}
        self._places = {node: index for index, segment in enumerate(self._chain) for node in segment.nodes}
        self._opened: dict[tuple[int, CarriedValues], SegmentRun] = {}
        self._done = 0

    @property
    def count(self) -> int:
        """The number of stages."""
        return sum(map(len, self._stages))

    @staticmethod
    def _staged(
        segment: Segment, layers: Sequence[LinearLayer], sequential: str
    ) -> list[dict[ir.Value, list[LinearLayer]]]:
        """Return the layers of each stage, by what they read: products and convolutions in stages of their own."""
        nodes = set(segment.nodes)
        groups: dict[tuple[ir.Value, bool], list[LinearLayer]] = {}
        for layer in layers:
            if layer.node in nodes:
                groups.setdefault((layer.x, _is_convolution(layer)), []).append(layer)
        if sequential == "block":
            kinds = [{x: group for (x, one), group in groups.items() if one is kind} for kind in (False, True)]
            return [some for some in kinds if some]
        return [{x: group} for (x, _), group in groups.items()]

    def stages(self) -> Iterator[Stage]:
        """Yield the stages; go over `rows` of one, as often as needed, before asking for the next.

        Raises:
            UserError: there are no samples, the graph does not run on one, or the disk is full.
        """
        samples = self._context.samples(f"'{self._who}'")
        if not len(samples):
            raise UserError("the calibration set is empty: give at least one sample")
        last = max((index for index, stages in enumerate(self._stages) if stages), default=-1)
        folder = self._context.work_folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        # Beside the results, where there is room for a model of this size.
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            self._open(Path(scratch))
            self._total = (self.count + last) * len(samples)
            for index in range(last + 1):
                segment = self._chain[index]
                for layers in self._stages[index]:
                    yield Stage(self, segment, layers)
                if index < last:
                    self._carry_on(segment)
                self._forget(index, segment)
            self._context.progress(self._who, self._total, self._total)

    def _open(self, folder: Path) -> None:
        half = self._context.calibration_memory // (2 if self._originals else 1)
        self._changed = CarriedValues(folder / "changed", half)
        self._original = CarriedValues(folder / "original", half) if self._originals else None
        samples = self._context.samples(f"'{self._who}'")
        for number, feed in enumerate(samples):
            for value in self._last:
                if value.name in feed and value.is_graph_input():
                    for store in self._stores():
                        store.put(value, number, feed[value.name])

    def _stores(self) -> list[CarriedValues]:
        return [self._changed] if self._original is None else [self._changed, self._original]

    def _rows(
        self, segment: Segment, layers: Mapping[ir.Value, Sequence[LinearLayer]], also: Sequence[ir.Value]
    ) -> Iterator[dict[ir.Value, Rows]]:
        readers = {x: group[0].name for x, group in layers.items()} | {value: str(value.name) for value in also}
        runs = self._runs(segment, [value for value in readers if value not in segment.reads])
        whole = any(_is_convolution(layer) for group in layers.values() for layer in group)
        for number in range(self._changed.samples):
            self._step()
            arrays = [run(number) for run in runs]
            found: dict[ir.Value, Rows] = {}
            for value, reader in readers.items():
                sides = [
                    side[value] if value in side else store.get(value, number)
                    for side, store in zip(arrays, self._stores(), strict=True)
                ]
                rows = [_checked(side if whole else side.reshape(-1, side.shape[-1]), reader, number) for side in sides]
                found[value] = Rows(rows[0], rows[1] if self._original is not None else None)
            yield found

    def _carry_on(self, segment: Segment) -> None:
        """Run a segment, as changed, and keep what it gives."""
        runs = self._runs(segment, segment.gives)
        for number in range(self._changed.samples):
            self._step()
            for run, store in zip(runs, self._stores(), strict=True):
                found = run(number)
                for value in segment.gives:
                    store.put(value, number, found[value])

    def _runs(self, segment: Segment, outputs: Sequence[ir.Value]) -> list[SegmentRun]:
        return [self._run(segment, outputs, store) for store in self._stores()]

    def _run(self, segment: Segment, outputs: Sequence[ir.Value], store: CarriedValues) -> SegmentRun:
        place = self._places[segment.nodes[0]]
        changes = self._changes if store is self._changed else {}
        affected = any(place in self._readers(weight) for weight in changes)
        if affected or not outputs or segment.weight_bytes > _SMALL:
            return SegmentRun(self._model, segment, outputs, store, changes=changes, threads=self._context.threads)
        wanted = dict.fromkeys([*segment.gives, *(x for stage in self._stages[place] for x in stage)])
        made = [value for value in wanted if value not in segment.reads]
        if not set(outputs) <= set(made):
            return SegmentRun(self._model, segment, outputs, store, threads=self._context.threads)
        # Opening a session takes longer than a small segment runs: one serves for all stages.
        if (place, store) not in self._opened:
            self._opened[place, store] = SegmentRun(self._model, segment, made, store, threads=self._context.threads)
        return self._opened[place, store]

    def _forget(self, index: int, segment: Segment) -> None:
        for value in segment.reads:
            if self._last[value] == index:
                for store in self._stores():
                    store.drop(value)
        for store in self._stores():
            self._opened.pop((index, store), None)
        for weight in list(self._changes):
            if max(self._readers(weight), default=-1) <= index:
                del self._changes[weight]
        qgraph.ir.forget_pages()

    def _readers(self, weight: ir.Value) -> set[int]:
        """Return the segments that read a weight, or what a node (a Transpose) makes of it."""
        nodes = [use.node for use in weight.uses()]
        nodes += [use.node for node in nodes for output in node.outputs for use in output.uses()]
        return {self._places[node] for node in nodes if node in self._places}

    def change(self, layer: LinearLayer, matrix: np.ndarray) -> None:
        """Let all readers of a layer's weight use `matrix`, float32 [N, K], from where the stream is now.

        Before the first stage that may be an embedding's.
        """
        tensor = layer.weight.const_value
        assert tensor is not None
        self._changes[layer.weight] = layer.stored(matrix).astype(tensor.dtype.numpy())

    def replace(self, constant: ir.Value, array: np.ndarray) -> None:
        """Let all that read a constant see another array, of its shape, from where the stream is now."""
        tensor = constant.const_value
        assert tensor is not None
        self._changes[constant] = np.asarray(array, tensor.dtype.numpy()).reshape(tensor.shape.numpy())

    def _step(self) -> None:
        self._context.progress(self._who, min(self._done, self._total), self._total)
        self._done += 1


def _is_convolution(layer: LinearLayer) -> bool:
    return layer.kind == "convolution"


def _checked(array: np.ndarray, reader: str, number: int) -> np.ndarray:
    """Return an array in float32, contiguous, if it can be squared."""
    rows = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(rows).all():
        raise UserError(
            f"calibration sample {number}: what goes into '{reader}' holds NaN or infinity. "
            "Mend the sample, or the weights that lead there."
        )
    largest = max(rows.max(initial=0.0), -rows.min(initial=0.0))
    if largest > _LARGEST:
        raise UserError(
            f"calibration sample {number}: what goes into '{reader}' reaches {largest:.3g}, too large for sums of "
            "squares in float32. Mend the sample, or the weights that lead there."
        )
    return rows
