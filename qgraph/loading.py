"""How every compilation begins: the model with its shapes fixed, and samples for the passes and for verification.

A share of the calibration samples is held back from the passes, to verify on, unless the user gives data for that.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.index_limits import index_limits
from qgraph.manifest import sha256
from qgraph.pipeline import Feeds, Samples
from qgraph.report.units import bytes_text, count_text
from qgraph.samples import open_samples, signature, split

__all__ = ["Data", "Loaded", "load", "source_facts"]

HELD_BACK = 0.2


@dataclasses.dataclass(frozen=True)
class Data:
    """Where samples come from, and how to read them.

    Attributes:
        source: a .npz file, a folder of .npz files or of images, a text file, `module:callable`, or feeds.
        rename: array name -> input name.
        preprocess: name of an image preset.
        tokenizer: a tokenizer.json or `bytes`, for text.
        window: tokens to a sample of text; without it, a line is a sample unless the model keeps a cache.
        labels: name of the array that holds class labels.
    """

    source: str | Path | Iterable[Feeds]
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    preprocess: str | None = None
    tokenizer: str | Path | None = None
    labels: str | None = None
    window: int | None = None

    @classmethod
    def of(cls, data: Data | str | Path | Iterable[Feeds]) -> Data:
        """Wrap a bare source."""
        return data if isinstance(data, Data) else cls(data)

    def open(self, inputs: Any) -> Any:
        """Open the samples for a model whose inputs are `inputs`, and check that they fit.

        Raises:
            UserError: the source cannot be read, is empty, or does not fit the inputs.
        """
        return open_samples(
            self.source,
            inputs,
            preprocess=self.preprocess,
            tokenizer=Path(self.tokenizer) if self.tokenizer is not None else None,
            rename=self.rename,
            window=self.window,
        )


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A source and its data.

    Attributes:
        path: of the source.
        model: with fixed shapes; is not to be changed.
        shapes: input -> dimensions, that were fixed.
        calibration: samples for the passes, or None.
        given: samples to verify on, or None for random ones.
        held_back: samples of the calibration data that the passes do not see, or None.
        data_kind: what the verification samples are, in words.
        labels: of the verification samples, or None.
        facts: see `source_facts`.
        limits: see `index_limits`.
        weight_bytes: of all weights.
    """

    path: Path
    model: ir.Model
    shapes: Mapping[str, Sequence[int]]
    calibration: Samples | None
    given: Samples | None
    held_back: Samples | None
    data_kind: str
    labels: np.ndarray | None
    facts: Mapping[str, Any]
    limits: dict[str, int]
    weight_bytes: int

    def told(self) -> str:
        """Return one line: name, parameters, nodes, opset and bytes."""
        parameters = sum(
            value.const_value.size
            for graph in qgraph.ir.all_graphs(self.model)
            for value in graph.initializers.values()
            if value.const_value is not None
        )
        opset = self.model.graph.opset_imports.get("", "?")
        nodes = qgraph.ir.count_nodes(self.model)
        return (
            f"{self.facts['name']}   {count_text(parameters)} parameters, {nodes} nodes, opset {opset}, "
            f"{bytes_text(self.facts['bytes'])}"
        )


def load(
    source: Path,
    shapes: Mapping[str, Sequence[int]],
    calibration: Data | str | Path | Iterable[Feeds] | None,
    verify_data: Data | str | Path | Iterable[Feeds] | None,
    *,
    otherwise: Samples | None,
    seed: int,
) -> Loaded:
    """Load a model and open its data.

    Args:
        source: an ONNX file.
        shapes: input -> dimensions, to fix dynamic axes.
        calibration: samples for the passes, of which a share is held back.
        verify_data: samples to verify on instead of those.
        otherwise: calibration samples where `calibration` is None.
        seed: chooses those that are held back.

    Raises:
        UserError: the model, a shape or the data is at fault.
    """
    model = qgraph.ir.load(source)
    for name, dims in shapes.items():
        qgraph.ir.set_input_shape(model, name, dims)
    inputs = signature(model)
    calibrating, given, held_back, labels = otherwise, None, None, None
    kind = "random inputs"
    if calibration is not None:
        data = Data.of(calibration)
        opened = data.open(inputs)
        calibrating, given = split(opened, HELD_BACK, seed)
        held_back = given if len(opened) > 1 else None
        kind = "held-back samples" if len(opened) > 1 else "calibration sample, none held back"
        labels = given.labels(data.labels)
    if verify_data is not None:
        data = Data.of(verify_data)
        given, kind = data.open(inputs), "samples of the verification data"
        labels = given.labels(data.labels)
    facts = source_facts(source, model)
    limits, weights = index_limits(model), qgraph.ir.weight_bytes(model)
    return Loaded(source, model, shapes, calibrating, given, held_back, kind, labels, facts, limits, weights)


def source_facts(source: Path, model: ir.Model) -> dict[str, Any]:
    """Return name, bytes and hash of a model as loaded from `source`.

    With external data, the bytes are those of all files, and the hash is that of the files' hashes.
    """
    files = [source, *qgraph.ir.data_files(model)]
    hashes = [sha256(path) for path in files]
    digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return {"name": source.name, "bytes": sum(path.stat().st_size for path in files), "sha256": digest}
