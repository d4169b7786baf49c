"""The source's side of comparing tensors: which it has, how large they are, and what they hold on some samples.

Made once, it serves for every result that is compared with the same source on the same samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.probes import Probe, kinds, raw_outputs, size_outputs
from qgraph.errors import UserError
from qgraph.pipeline import Feeds, Samples
from qgraph.runtime.session import first_line

__all__ = ["WatchedSource", "model_file", "run_probe", "sizes", "stated_size", "without_dropout"]


class WatchedSource:
    """A model whose inner tensors results are compared with. Everything is found out when it is first asked for.

    Args:
        source: a file, a folder that holds one as model.onnx, or a model in memory, which is not changed.
        samples: feeds; at least one.
        threads: of the sessions; 0 lets the runtime choose.
        keep: bytes of tensors to keep for the next result; where all of them need more, each result runs the source.

    Attributes:
        source: as given.
        samples: as given.
    """

    def __init__(self, source: Path | ir.Model, samples: Samples, *, threads: int = 0, keep: int = 0) -> None:
        self.source = source
        self.samples = samples
        self._threads = threads
        self._keep = keep
        self._kept: list[dict[str, np.ndarray]] | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.source.graph.name if isinstance(self.source, ir.Model) else self.source)

    @functools.cached_property
    def model(self) -> ir.Model:
        """The model with an Identity for each Dropout."""
        source = self.source
        return without_dropout(source if isinstance(source, ir.Model) else qgraph.ir.load(model_file(source)))

    @functools.cached_property
    def largest(self) -> Feeds:
        """The feed of most elements; the first one where no axis is dynamic."""
        if all(value.shape is not None and value.shape.is_static() for value in self.model.graph.inputs):
            return next(iter(self.samples))
        return max(self.samples, key=lambda feed: sum(array.size for array in feed.values()))

    @functools.cached_property
    def tensors(self) -> list[ir.Value]:
        """The float tensors that the main graph's nodes compute, in order."""
        nodes = [node for node in self.model.graph if node.op_type != "Constant"]
        values = [value for node in nodes for value in node.outputs if value.name]
        known = kinds(self.model, [str(value.name) for value in values], frozenset(self.largest))
        return [value for value in values if known[str(value.name)].dtype is not None]

    def bytes_of(self, values: Sequence[ir.Value]) -> list[int]:
        """Return the bytes of each tensor for the largest feed."""
        sizes = self._sizes
        return [sizes[str(value.name)] * (8 if value.dtype == ir.DataType.DOUBLE else 4) for value in values]

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        found = sizes(self.model, self.tensors, self.largest, self._threads)
        return {str(value.name): size for value, size in zip(self.tensors, found, strict=True)}

    def giving(self, names: Sequence[str]) -> Iterator[list[np.ndarray]]:
        """Yield some tensors, sample by sample, without running where they were kept.

        Raises:
            UserError: the model cannot run a sample.
        """
        if self._kept is None and sum(self.bytes_of(self.tensors)) * len(self.samples) <= self._keep:
            every = [str(value.name) for value in self.tensors]
            self._kept = [dict(zip(every, arrays, strict=True)) for arrays in self._run(every)]
        if self._kept is None:
            yield from self._run(names)
        else:
            yield from ([arrays[name] for name in names] for arrays in self._kept)

    def _run(self, names: Sequence[str]) -> Iterator[list[np.ndarray]]:
        probe = Probe(self.model, raw_outputs(names), frozenset(self.largest), threads=self._threads)
        for feed in self.samples:
            yield run_probe(probe, feed, "the source")


def model_file(path: Path) -> Path:
    """Return the model of an artifact, or the file itself.

    Raises:
        UserError: the folder holds none.
    """
    if not path.is_dir():
        return path
    if not (path / "model.onnx").is_file():
        raise UserError(f"{path} holds no model.onnx: its target deploys no ONNX model whose layers can be compared")
    return path / "model.onnx"


def without_dropout(model: ir.Model) -> ir.Model:
    """Return the model with an Identity for each Dropout; the model itself if there is none."""
    if not any(_is_idle_dropout(node) for node in qgraph.ir.walk(model)):
        return model
    model = model.clone()
    for node in list(qgraph.ir.walk(model)):
        if _is_idle_dropout(node):
            qgraph.ir.replace_node(node, ir.node("Identity", [node.inputs[0]], name=node.name))
    return model


def _is_idle_dropout(node: ir.Node) -> bool:
    return qgraph.ir.is_op(node, "Dropout") and not any(mask.uses() for mask in node.outputs[1:])


def run_probe(probe: Probe, feed: Feeds, who: str) -> list[np.ndarray]:
    """Run a sample.

    Raises:
        UserError: the model cannot; `who` names it.
    """
    try:
        return probe.run(feed)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{who} cannot run the samples: {first_line(error)}") from error


def sizes(model: ir.Model, values: Sequence[ir.Value], feed: Feeds, threads: int) -> list[int]:
    """Return the number of elements of each tensor for one feed; the tensors themselves are not kept.

    What the shapes that the model states do not tell is counted by running it.
    """
    axes = {
        dim.value: size
        for value in model.graph.inputs
        if value.shape is not None and value.name in feed and len(value.shape) == feed[value.name].ndim
        for dim, size in zip(value.shape, feed[value.name].shape, strict=True)
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    }
    stated = {value: stated_size(value, axes) for value in values}
    names = [value.name or "" for value in values if stated[value] is None]
    counted: dict[str, int] = {}
    if names:
        counts = run_probe(Probe(model, size_outputs(names), frozenset(feed), threads=threads), feed, "the source")
        counted = dict(zip(names, map(int, counts), strict=True))
    return [counted[value.name or ""] if (size := stated[value]) is None else size for value in values]


def stated_size(value: ir.Value, axes: Mapping[str, int]) -> int | None:
    """Return the number of elements as the model states it, with the sizes of dynamic axes by name; None if unknown."""
    if value.shape is None:
        return None
    known = [dim if isinstance(dim, int) else axes.get(dim.value or "") for dim in value.shape]
    found = [size for size in known if size is not None]
    return math.prod(found) if len(found) == len(known) else None
