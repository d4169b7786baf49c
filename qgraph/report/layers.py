"""What the page shows of the inside of an artifact: errors layer by layer, and histograms with the chosen ranges.

One bounded run: source and result on a few samples, with the tensors of the worst layers kept as they come by. Where a
pass has kept the model as it was before the first loss, that model is the source: passes that move factors between
layers (equalization, smoothing) change what tensors hold, and nothing is lost by that.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.probes import main_values
from qgraph.errors import UserError
from qgraph.pipeline import Feeds, Progress, Samples
from qgraph.report.stored_weights import Grid, layer_of, read_grid, stored_weight
from qgraph.runtime.difference import SOURCE_KEY, TensorError, difference
from qgraph.runtime.watched_source import WatchedSource

__all__ = ["BINS", "KEPT_SOURCE", "LayerFacts", "Picture", "adds_error", "few", "look_inside", "worst_first"]

BINS = 80
PICTURED = 8
"""Tensors whose histograms are shown."""
_KEPT = 96 << 20
"""Bytes of tensors that are kept while the samples run..."""
_WHOLE = 1 << 20
"""... whole up to this many bytes..."""
_SAMPLED = 1 << 15
"""... and otherwise this many values."""
_MEMORY = 256 << 20
KEPT_SOURCE = _MEMORY // 2
"""Bytes of the source's tensors that are kept for the next result."""
_MOST_SAMPLES = 4
_SECONDS = 0.002
"""Of running the source alone; comparing every tensor takes many times as long."""
_PASSED_ON_DB = 0.05


@dataclasses.dataclass(frozen=True)
class Picture:
    """A histogram of a tensor, and the range that its integers reach.

    Attributes:
        tensor: of the layer that it belongs to, as `TensorError.name`.
        name: of what is shown: the tensor itself, or the weight of its layer.
        kind: `activation`, in real numbers, or `weight`, in steps from zero of each channel's scale.
        counts: of equally wide bins from `low` to `high`.
        low: left edge of the first bin.
        high: right edge of the last bin.
        range_low: least number that the integers stand for; None where they have no fixed range.
        range_high: the greatest one.
        dtype: of the integers, such as `uint8`; '' where there are none.
        scale: one step; None where several channels have scales of their own.
        channels: number of scales.
        beyond: share of the values that are cut off, by more than half a step; None without a range.
        remark: why there is no range, or ''.
    """

    tensor: str
    name: str
    kind: str
    counts: tuple[int, ...]
    low: float
    high: float
    range_low: float | None = None
    range_high: float | None = None
    dtype: str = ""
    scale: float | None = None
    channels: int = 1
    beyond: float | None = None
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class LayerFacts:
    """Errors layer by layer.

    Attributes:
        tensors: in the order of the graph; empty where they were not taken.
        pictures: of the worst tensors, worst first.
        samples: that source and result ran on.
        remark: why nothing was taken, or ''.
    """

    tensors: tuple[TensorError, ...] = ()
    pictures: tuple[Picture, ...] = ()
    samples: int = 0
    remark: str = ""

    def told(self) -> str:
        """Return in one line how many tensors were compared and which is the worst."""
        compared = f"{len(self.tensors)} tensors on {self.samples} sample{'s' * (self.samples != 1)}"
        broken = next((one for one in self.tensors if one.broken), None)
        if broken is not None:
            return f"{compared}   NaN or infinite from '{broken.node}' ({broken.op_type}) on"
        worst = next(iter(worst_first(self.tensors)), None)
        if worst is None:
            return f"{compared}   all equal"
        return f"{compared}   worst: '{worst.node}' ({worst.op_type}) {worst.sqnr_db:.1f} dB"

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> LayerFacts:
        """Read what `dataclasses.asdict` gave, through JSON."""
        return cls(
            tuple(TensorError(**one) for one in document["tensors"]),
            tuple(Picture(**{**one, "counts": tuple(one["counts"])}) for one in document["pictures"]),
            document["samples"],
            document["remark"],
        )


def adds_error(one: TensorError) -> bool:
    """Tell whether a tensor's node adds to the error, rather than pass on what it reads."""
    if one.sqnr_db is None or one.exact:
        return False
    return one.loss_db is None or one.loss_db >= _PASSED_ON_DB


def worst_first(tensors: Sequence[TensorError]) -> list[TensorError]:
    """Return the tensors that add to the error by rising SQNR."""
    return sorted(filter(adds_error, tensors), key=lambda one: one.sqnr_db or 0.0)


def few(samples: Samples, seconds: float | None) -> list[Feeds]:
    """Return the first samples: up to four where the source takes no time for one, else one.

    Args:
        samples: to choose from.
        seconds: that the source takes for one; None where that is not known.
    """
    count = 1 if seconds is None else max(1, min(_MOST_SAMPLES, int(_SECONDS / max(seconds, 1e-9))))
    return list(itertools.islice(samples, count))


def look_inside(
    source: Path | ir.Model | WatchedSource,
    result: Path,
    samples: Samples,
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> LayerFacts:
    """Compare the tensors inside source and result, and draw histograms of the worst.

    Args:
        source: the model as it was given, or as it was before the first loss (then weights can be compared too).
        result: the artifact's folder.
        samples: few.
        threads: of the sessions.
        progress: called as `progress("layers", done, total)`.

    Returns:
        The facts; with a remark instead where they cannot be taken.
    """
    kept = _Kept()

    def report(step: str, done: int, total: int) -> None:
        del step
        if progress is not None:
            progress("layers", done, total)

    try:
        after = qgraph.ir.load(result / "model.onnx")
        found = difference(
            source, after, samples, memory=_MEMORY, threads=threads, progress=report, observe=kept.observe
        )
        given = source.source if isinstance(source, WatchedSource) else source
        before = given if isinstance(given, ir.Model) else None
        pictures = tuple(_pictures(before, after, worst_first(found.tensors), kept))
    except UserError as error:
        return LayerFacts(remark=str(error))
    except Exception as error:  # noqa: BLE001 - no drawing is worth the artifact, which is complete by now
        return LayerFacts(remark=f"Not taken, by a fault of qgraph: {type(error).__name__}: {error}")
    return LayerFacts(found.tensors, pictures, found.samples)


class _Kept:
    """The source's tensors: whole where they are small, else every n-th value and the ends."""

    def __init__(self) -> None:
        self.arrays: dict[str, list[np.ndarray]] = {}
        self._room = _KEPT

    def observe(self, name: str, before: np.ndarray, after: np.ndarray) -> None:
        del after
        flat = before.reshape(-1)
        if before.nbytes > min(self._room, _WHOLE):
            ends = (np.fmin.reduce(flat), np.fmax.reduce(flat))
            flat = np.append(flat[:: -(-flat.size // _SAMPLED)], ends).astype(flat.dtype)
        if flat.nbytes <= self._room:
            self._room -= flat.nbytes
            self.arrays.setdefault(name, []).append(flat)

    def values(self, name: str) -> np.ndarray:
        """Return all that was kept of a tensor, without what is not finite, (n,)."""
        arrays = self.arrays.get(name, ())
        flat = np.concatenate(arrays) if arrays else np.zeros(0, np.float32)
        return flat[np.isfinite(flat)]


def _pictures(before: ir.Model | None, after: ir.Model, worst: Sequence[TensorError], kept: _Kept) -> Iterator[Picture]:
    standing = _standing(after)
    origin = {} if before is None else main_values(before)
    shown = 0
    drawn: set[str] = set()
    for one in worst:
        value = standing.get(one.name)
        activation = _activation(one.name, value, kept.values(one.name))
        weight = _weight(one.name, origin.get(one.name), value)
        new = [picture for picture in (activation, weight) if picture is not None and picture.name not in drawn]
        drawn.update(picture.name for picture in new)
        yield from new
        shown += bool(new)
        if shown == PICTURED:
            return


def _standing(after: ir.Model) -> dict[str, ir.Value]:
    """Return the result's value for each tensor of the source: of its name, or named by its metadata."""
    values = main_values(after)
    told = {value.metadata_props[SOURCE_KEY]: value for value in values.values() if SOURCE_KEY in value.metadata_props}
    return values | told


def _activation(name: str, value: ir.Value | None, values: np.ndarray) -> Picture | None:
    if not values.size:
        return None
    grid = _grid_of(value)
    if grid is None or grid.scale.size != 1:
        remark = "range chosen anew for every sample" if _is_dynamic(value) else "stays in float"
        counts, low, high = _histogram(values, float(values.min()), float(values.max()))
        return Picture(name, name, "activation", counts, low, high, remark=remark)
    step, zero = float(grid.scale.reshape(-1)[0]), float(grid.zero.reshape(-1)[0])
    range_low, range_high = (grid.lowest - zero) * step, (grid.highest - zero) * step
    counts, low, high = _histogram(values, min(range_low, float(values.min())), max(range_high, float(values.max())))
    beyond = np.mean((values < range_low - step / 2) | (values > range_high + step / 2))
    return Picture(
        name, name, "activation", counts, low, high, range_low, range_high, grid.dtype, step, beyond=float(beyond)
    )  # fmt: skip


def _is_dynamic(value: ir.Value | None) -> bool:
    dynamic = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul")
    return value is not None and any(node.op_type in dynamic for node in value.consumers())


def _grid_of(value: ir.Value | None) -> Grid | None:
    """Return the integers that a float value comes from or goes to, if their scale is a constant."""
    if value is None:
        return None
    maker = value.producer()
    nodes = [maker, *value.consumers()]
    for node in nodes:
        if node is None or not qgraph.ir.is_op(node, "QuantizeLinear", "DequantizeLinear"):
            continue
        if node is not maker and (node.op_type == "DequantizeLinear" or node.inputs[0] is not value):
            continue
        integers = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        if integers is not None and (grid := read_grid(node, integers)) is not None:
            return grid
    return None


def _histogram(values: np.ndarray, low: float, high: float) -> tuple[tuple[int, ...], float, float]:
    if high <= low:
        low, high = low - 0.5, low + 0.5
    counts, _ = np.histogram(values, BINS, (low, high))
    return tuple(map(int, counts)), float(low), float(high)


def _weight(tensor: str, origin: ir.Value | None, value: ir.Value | None) -> Picture | None:
    """Return the picture of the weight of the layer that makes a tensor, in steps of its channels' scales."""
    layer = layer_of(value)
    stored = None if layer is None else stored_weight(layer)
    if stored is None:
        return None
    source = layer_of(origin)
    kept = None if source is None else source.inputs[1]
    real = qgraph.ir.constant(kept)
    compared = real is not None and real.shape == stored.codes.shape
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = real.astype(np.float32) / stored.scale if compared and real is not None else stored.codes - stored.zero
    steps = exact[np.isfinite(exact)]
    if not steps.size:
        return None
    range_low, range_high = float((stored.lowest - stored.zero).min()), float((stored.highest - stored.zero).max())
    counts, low, high = _histogram(steps, min(range_low, float(steps.min())), max(range_high, float(steps.max())))
    beyond = None
    if compared:
        cut = (exact < stored.lowest - stored.zero - 0.5) | (exact > stored.highest - stored.zero + 0.5)
        beyond = float(np.mean(cut))
    return Picture(
        tensor,
        (kept.name if compared and kept is not None else None) or stored.name,
        "weight",
        counts,
        low,
        high,
        range_low,
        range_high,
        stored.dtype,
        float(stored.scale.reshape(-1)[0]) if stored.scales == 1 else None,
        stored.scales,
        beyond,
        remark="" if compared else "as stored, after rounding",
    )
