"""A session that never holds a whole model: segment after segment, each on all samples.

    run(None, feeds)      the first call runs all samples; each call returns the outputs of the next one

For comparing models that are larger than the memory meant for them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.blocks import Segment, segments
from qgraph.analysis.segment_runs import CarriedValues, SegmentRun
from qgraph.errors import UserError
from qgraph.pipeline import Context, Samples
from qgraph.work_folder import SCRATCH

__all__ = ["Argument", "SlicedSession"]


class Argument(NamedTuple):
    """An input or output: its name, its type such as `tensor(float)`, and its shape."""

    name: str
    type: str
    shape: list[int | str | None]


def _argument(value: ir.Value) -> Argument:
    dtype = value.dtype.name.lower() if value.dtype is not None else "undefined"
    dims = value.shape if value.shape is not None else ()
    return Argument(str(value.name), f"tensor({dtype})", [d if isinstance(d, int) else d.value for d in dims])


class SlicedSession:
    """Runs a model on samples that are known beforehand, one segment at a time.

    Args:
        model: is not changed; its weights stay in their file.
        samples: what `run` will be called with, in this order.
        context: threads; its work folder takes what does not fit into memory.
        room: bytes of weights in a segment (one node, or one repeated block, may have more), and of values between
            segments that are kept in memory.
    """

    def __init__(self, model: ir.Model, samples: Samples, context: Context, *, room: int) -> None:
        self._model = model
        self._samples = samples
        self._context = context
        self._room = room
        self._results: Generator[list[Any], None, None] | None = None
        self._given = 0

    def get_inputs(self) -> list[Argument]:
        """Return the inputs that a feed must hold, as ONNX Runtime describes them."""
        graph = self._model.graph
        return [_argument(value) for value in graph.inputs if value.name not in graph.initializers]

    def get_outputs(self) -> list[Argument]:
        """Return the outputs, as ONNX Runtime describes them."""
        return [_argument(value) for value in self._model.graph.outputs]

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[Any]:
        """Return all outputs for the next sample.

        Raises:
            UserError: the model does not run on a sample, or the disk is full.
            ValueError: some outputs alone are asked for.
        """
        del feeds
        if output_names is not None:
            raise ValueError("a model that runs in slices gives all of its outputs")
        self._results = self._results or self._run()
        outputs = next(self._results)
        self._given += 1
        if self._given == len(self._samples):
            self._results.close()  # what was carried goes now, not when somebody collects the rubbish
        return outputs

    def _run(self) -> Generator[list[Any], None, None]:
        outputs = list(self._model.graph.outputs)
        folder = self._context.work_folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        chain = segments(self._model, Context(calibration_memory=self._room)).chain
        made = {value for segment in chain for node in segment.nodes for value in node.outputs}
        stray = [value for value in outputs if value not in made]
        if stray:
            raise UserError(f"output '{stray[0].name}' depends on no input of the model, which cannot run in slices")
        last = {value: index for index, segment in enumerate(chain) for value in segment.reads}
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            store = CarriedValues(Path(scratch) / "values", self._room)
            for number, feed in enumerate(self._samples):
                for value in last:
                    if value.is_graph_input() and value.name in feed:
                        store.put(value, number, feed[value.name])
            for index, segment in enumerate(chain):
                self._run_segment(segment, outputs, store)
                for value in segment.reads:
                    if last[value] == index and value not in outputs:
                        store.drop(value)
                qgraph.ir.forget_pages()
            for number in range(store.samples):
                yield [np.array(store.get(value, number)) for value in outputs]

    def _run_segment(self, segment: Segment, outputs: Sequence[ir.Value], store: CarriedValues) -> None:
        made = {value for node in segment.nodes for value in node.outputs}
        wanted = list(dict.fromkeys([*segment.gives, *(value for value in outputs if value in made)]))
        run = SegmentRun(self._model, segment, wanted, store, threads=self._context.threads)
        for number in range(store.samples):
            for value, array in run(number).items():
                store.put(value, number, array)
