"""What the command line does beyond `compile` and `verify`, each in one call: run, bench, inspect and diff."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.cost import ModelCost, cost
from qgraph.analysis.quantization_sensitivity import Sensitivities, tensor_sensitivities
from qgraph.analysis.weight_facts import weight_facts
from qgraph.artifact import Artifact, open_artifact
from qgraph.compiler import Data
from qgraph.errors import UserError
from qgraph.feeds import InputSpec, signature
from qgraph.float_form import float_form
from qgraph.pipeline import Context, Feeds, Samples
from qgraph.report.data import deployable_bytes
from qgraph.runtime.benchmark import Benchmark, compare, peak_memory
from qgraph.runtime.difference import Difference, difference
from qgraph.runtime.placement import Placement
from qgraph.runtime.session import TensorSpec, first_line, open_session, random_feeds
from qgraph.target_options import read_target
from qgraph.targets.base import Session, Target

__all__ = ["Inspection", "Measured", "OutputArray", "Outputs", "bench", "diff", "inspect", "run"]

AnyData = Data | str | Path | Iterable[Feeds]
BENCH_FEEDS = 16
_PLAIN = "cpu-fp32"
_COPY = re.compile(rf"{re.escape(tempfile.gettempdir())}/qgraph-\w+/\w+\.onnx")
"""A copy of the user's model, as a runtime was given it."""
DIFF_FEEDS = 64
"""Samples from which sensitivities are told, at most."""


@dataclasses.dataclass(frozen=True)
class OutputArray:
    """What an output looks like over all samples."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a run gave.

    Attributes:
        samples: number of feeds that were run.
        seconds: that running them took.
        arrays: the outputs as they are written.
        path: where they were written, or None.
        values: output name -> array; the samples lie along the first axis.
        stand_in: what it ran on, where that is not the target's own device or runtime; '' where it is.
    """

    samples: int
    seconds: float
    arrays: tuple[OutputArray, ...]
    path: Path | None
    values: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    stand_in: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, without the outputs themselves."""
        return {
            "samples": self.samples,
            "seconds": self.seconds,
            "outputs": [dataclasses.asdict(one) for one in self.arrays],
            "path": None if self.path is None else str(self.path),
            **({"stand_in": self.stand_in} if self.stand_in else {}),
        }


@dataclasses.dataclass(frozen=True)
class Measured:
    """Timings.

    Attributes:
        benchmark: the timings themselves.
        sizes: bytes of every candidate on disk.
        stand_in: what ran instead of the artifact's own device or runtime; '' where that was timed.
    """

    benchmark: Benchmark
    sizes: Mapping[str, int]
    stand_in: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**self.benchmark.to_json(), "sizes": dict(self.sizes), "stand_in": self.stand_in}


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a model holds and takes.

    Attributes:
        path: of the model or artifact.
        bytes: on disk, weights in other files included; of an artifact, those of the files that are deployed.
        cost: operators, weights and multiply-adds; None of an artifact without an ONNX model.
        manifest: of an artifact, else None.
        weights: the compressed weights, as the manifest has them; None where there are none.
        before: the cost of the model that it is held against; None where there is none.
        placement: what runs where, if that was asked for.
    """

    path: Path
    bytes: int
    cost: ModelCost | None
    manifest: Mapping[str, Any] | None = None
    weights: Mapping[str, Any] | None = None
    before: ModelCost | None = None
    placement: Placement | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        manifest = None if self.manifest is None else dict(self.manifest)
        counted = {} if self.cost is None else self.cost.to_json()
        found = {"path": str(self.path), "bytes": self.bytes, **counted, "manifest": manifest}
        if self.before is not None:
            found["before"] = self.before.to_json()
        if self.placement is not None:
            found["placement"] = self.placement.to_json()
        return {**found, "compressed_weights": self.weights}


def run(
    artifact: str | Path,
    data: AnyData,
    *,
    output: Path | None = None,
    force: bool = False,
    context: Context | None = None,
) -> Outputs:
    """Run an artifact on samples.

    Args:
        artifact: the folder.
        data: samples, in any form that calibration data may have.
        output: a .npz file for the outputs; outputs of several samples are joined along their first axis.
        force: replace a file that stands at `output`.
        context: threads and progress.

    Raises:
        UserError: the artifact is damaged, a sample does not fit, the outputs of the samples cannot be joined, or
            the file cannot be written.
    """
    context = context or Context()
    if output is not None and output.exists() and not force:
        raise UserError(f"{output} exists. Pass --force to replace it, or another file with -o.")
    opened = open_artifact(artifact)
    samples = Data.of(data).open(_inputs(opened))
    session = opened.session(threads=context.threads)
    start = time.perf_counter()
    results = []
    for number, feed in enumerate(samples, start=1):
        results.append(_run_one(session, feed, number))
        context.progress("run", number, len(samples))
    seconds = time.perf_counter() - start
    values = _joined(opened.manifest["outputs"], results)
    if output is not None:
        _write_npz(output, values)
    arrays = tuple(OutputArray(name, array.dtype.name, array.shape) for name, array in values.items())
    return Outputs(len(results), seconds, arrays, output, values, opened.target.stand_in())


def _inputs(artifact: Artifact) -> Sequence[InputSpec]:
    """Return the inputs as samples are checked against."""
    model = artifact.path / "model.onnx"
    if model.is_file():
        return signature(qgraph.ir.load(model))
    return tuple(
        InputSpec(one["name"], one["dtype"], tuple(axis if isinstance(axis, int) else None for axis in one["shape"]))
        for one in artifact.manifest["inputs"]
    )


def _run_one(session: Session, feed: Feeds, number: int) -> list[Any]:
    try:
        return session.run(None, feed)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"sample {number} cannot be run: {first_line(error)}") from error


def _joined(names: Sequence[str], results: Sequence[Sequence[Any]]) -> dict[str, np.ndarray]:
    values = {}
    for name, pieces in zip(names, zip(*results, strict=True), strict=True):
        arrays = [np.asarray(piece) for piece in pieces]
        if len({array.shape[1:] for array in arrays}) > 1:
            shapes = ", ".join(sorted({"x".join(map(str, array.shape)) for array in arrays})[:3])
            raise UserError(
                f"output '{name}' has another shape for every sample ({shapes}): run samples of one shape at a time"
            )
        values[name] = np.concatenate(arrays) if arrays[0].ndim else np.stack(arrays)
    return values


def _write_npz(path: Path, values: Mapping[str, np.ndarray]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **values)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}. Choose another file with -o.") from None


def bench(
    artifact: str | Path,
    *,
    against: str | Path | None = None,
    data: AnyData | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seconds: float = 5.0,
    context: Context | None = None,
) -> Measured:
    """Time an artifact, in turn with the model that it is compared with, and measure memory and size.

    Args:
        artifact: the folder.
        against: an ONNX model or another artifact; by default the source, if it lies beside the artifact.
        data: samples to run; random ones when None.
        shapes: input -> dimensions of random samples.
        seconds: about how long measuring may take.
        context: seed and threads.

    Raises:
        UserError: a file is missing or damaged, or the samples do not fit.
    """
    context = context or Context()
    opened = open_artifact(artifact)
    rival = Path(against) if against is not None else _source_of(opened)
    paths = {**({"before": rival} if rival is not None else {}), "after": opened.path}
    openers = {name: functools.partial(_open, path, context.threads) for name, path in paths.items()}
    sessions = {name: opener() for name, opener in openers.items()}
    feeds = _bench_feeds(opened, data, shapes, context.seed)
    timed = compare(sessions, feeds, seconds=seconds, threads=context.threads)
    peaks = {name: peak_memory(opener, feeds[0]) for name, opener in openers.items()}
    sizes = {name: _bytes(path) for name, path in paths.items()}
    return Measured(timed.with_memory(peaks), sizes, opened.target.stand_in())


def _source_of(artifact: Artifact) -> Path | None:
    return artifact.source if artifact.source.is_file() else None


def _open(path: Path, threads: int) -> Session:
    return open_artifact(path).session(threads=threads) if path.is_dir() else open_session(path, threads=threads)


def _bench_feeds(
    artifact: Artifact, data: AnyData | None, shapes: Mapping[str, Sequence[int]] | None, seed: int
) -> list[Feeds]:
    if data is None:
        inputs = [TensorSpec(**one) for one in artifact.manifest["inputs"]]
        return random_feeds(inputs, seed, shapes)
    samples = iter(Data.of(data).open(_inputs(artifact)))
    return [feed for feed, _ in zip(samples, range(BENCH_FEEDS), strict=False)]


def _bytes(path: Path) -> int:
    if path.is_dir():
        return deployable_bytes(open_artifact(path).manifest)
    return sum(file.stat().st_size for file in (path, *qgraph.ir.data_files(qgraph.ir.load(path))))


def inspect(
    path: str | Path,
    against: str | Path | None = None,
    *,
    placement: bool = False,
    target: str | Target | None = None,
) -> Inspection:
    """Count what a model or an artifact holds and takes.

    Args:
        path: of either.
        against: a model, or an artifact, whose cost is given too: what the first was made from.
        placement: tell too what runs where, node by node.
        target: whose runtime to ask for the placement: the artifact's own if not given, of a model `cpu-fp32`. A model
            is asked about as it is written; no pass is applied.

    Raises:
        UserError: it is no ONNX model and no artifact with one, or the target cannot tell the placement.
    """
    path = Path(path)
    before = None if against is None else inspect(against).cost
    artifact = open_artifact(path) if path.is_dir() else None
    file = path if artifact is None else path / "model.onnx"
    if not file.is_file() and artifact is not None:
        if placement and target is None and against is None:
            placed = _told(artifact.target, artifact.path)
            return Inspection(path, _bytes(path), None, artifact.manifest, placement=placed)
        raise UserError(
            f"{path} holds no model.onnx: its target deploys no ONNX model to look into (--placement alone tells what "
            "runs where)"
        )
    model = qgraph.ir.load(file)
    found = Inspection(path, _bytes(path), cost(model), weights=weight_facts(model), before=before)
    if artifact is not None:
        found = dataclasses.replace(found, manifest=artifact.manifest)
    if not placement:
        return found
    return dataclasses.replace(found, placement=_placement(model, file, artifact, target))


def _placement(model: ir.Model, path: Path, artifact: Artifact | None, target: str | Target | None) -> Placement:
    """Return what runs where, on the runtime of a target.

    Raises:
        UserError: the target cannot tell.
    """
    if target is None:
        chosen = artifact.target if artifact is not None else read_target(_PLAIN)
    else:
        chosen = read_target(target) if isinstance(target, str) else target
    if artifact is not None and chosen == artifact.target:
        return _told(chosen, artifact.path)
    with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
        try:
            chosen.lower(model, Path(scratch))
            return _told(chosen, Path(scratch))
        except UserError as error:  # is about the user's file, of which the runtime saw a copy
            raise UserError(_COPY.sub(lambda _: str(path), str(error))) from error


def _told(chosen: Target, folder: Path) -> Placement:
    found = chosen.placement(folder)
    if found is None:
        raise UserError(
            f"{chosen.name} cannot tell here what runs where: its runtime or device is not here, or does not say. "
            f"--target {_PLAIN} asks ONNX Runtime's CPU provider."
        )
    return found


def diff(
    model: str | Path,
    artifact: str | Path,
    data: AnyData,
    *,
    context: Context | None = None,
) -> Difference:
    """Compare every inner tensor that a model and its artifact both have, and tell which quantized tensors hurt.

    Args:
        model: the source.
        artifact: the folder, or another ONNX model.
        data: samples to run.
        context: seed, threads, memory bound and progress.

    Raises:
        UserError: a file is missing or damaged, or the samples do not fit.
    """
    context = context or Context()
    source, result = Path(model), Path(artifact)
    opened = open_artifact(result) if result.is_dir() else None
    result = result if opened is None else opened.path
    samples = Data.of(data).open(signature(qgraph.ir.load(source)))
    found = difference(
        source,
        result,
        samples,
        memory=context.calibration_memory,
        threads=context.threads,
        progress=context.progress,
    )
    try:
        return dataclasses.replace(found, sensitivities=_sensitivities(source, result, opened, samples, context))
    except UserError as error:
        return dataclasses.replace(found, no_sensitivities=str(error))


def _sensitivities(
    source: Path, result: Path, artifact: Artifact | None, samples: Samples, context: Context
) -> Sensitivities:
    """Return what rounding each tensor does.

    Raises:
        UserError: it cannot be told, and why.
    """
    quantized = qgraph.ir.load(result / "model.onnx" if result.is_dir() else result)
    if not any(node.op_type == "DequantizeLinear" for node in quantized.graph):
        raise UserError("no tensor is quantized by QuantizeLinear or DequantizeLinear")
    feeds = [feed for feed, _ in zip(samples, range(DIFF_FEEDS), strict=False)]
    context = dataclasses.replace(context, calibration=feeds, _analyses={})
    reference, notes = float_form(source, artifact, context)
    if qgraph.ir.weight_bytes(reference) > context.calibration_memory:
        raise UserError("the weights are larger than the memory for samples: raise --calib-memory")
    found = tensor_sensitivities(reference, quantized, context)
    return dataclasses.replace(found, notes=(*notes, *found.notes))
