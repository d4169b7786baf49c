"""Whole blocks of a repeated network removed.

    x -> [block] -> [block] -> [block] -> y    =>    x -> [block] -> [block] -> y

The blocks are found from the graph alone, as what repeats most (`qgraph.analysis.blocks`): the layers of a transformer,
say, in whatever way they are written. What goes into a block then goes past it, to whoever read what came out. With
calibration data, the block whose removal changes the model's outputs least goes first, then the next with that one gone
(`output`); or the one that changes least what goes through it (`activation`: one less the cosine of what goes in and
out, Men et al. 2024, "ShortGPT", section 3.1).

It does not fire where nothing repeats, where what goes in and what comes out differ in shape, or where a block makes an
output of the model (a cache).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.blocks import Segment, segments
from qgraph.analysis.probes import Probe, first_line, main_values, raw_outputs
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.errors import UserError
from qgraph.pipeline import Context, Feeds, Pass, Report, Skipped

__all__ = ["PruneLayers"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MOST_FEEDS = 16
_MOST_TRIALS = 1000


class _Block(NamedTuple):
    """A block: where it lies among the others, and the pairs of what goes past it when it is removed."""

    number: int
    name: str
    detour: tuple[tuple[str, str], ...]
    """(what comes out, what goes in), by name."""


@dataclass(frozen=True)
class PruneLayers(Pass):
    """Remove the blocks of a repeated network that change its outputs least."""

    name: ClassVar[str] = "prune-layers"
    ratio: float = field(default=0.25, metadata={"help": "share of the blocks that is removed, above 0 and below 1"})
    keep: int = field(default=0, metadata={"help": "instead of the ratio: how many blocks stay"})
    importance: Literal["auto", "output", "activation", "random"] = field(
        default="auto", metadata={"help": "which blocks matter; auto: output, or activation where there are very many"}
    )
    exclude: tuple[int, ...] = field(default=(), metadata={"help": "numbers of blocks that stay, from 0"})

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"the ratio {self.ratio:g} is not between 0 and 1: it is the share of blocks removed")
        if self.keep < 0 or any(number < 0 for number in self.exclude):
            raise ValueError("keep and the numbers of excluded blocks must not be negative")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Remove blocks; `figures` has those that went, in the order in which they were chosen.

        Raises:
            UserError: there are no calibration samples for an importance that needs them, or the model does not run.
        """
        blocks, skipped = _blocks(model, context)
        free = [block for block in blocks if block.number not in self.exclude]
        count = min(len(blocks) - self.keep if self.keep else int(len(blocks) * self.ratio + 0.5), len(free))
        if not blocks or count <= 0:
            if blocks:
                skipped.append(Skipped(blocks[0].name, f"{len(blocks)} blocks are too few to remove any"))
            return Report(skipped=skipped)
        gone = self._chosen(model, context, free, count)
        context.keep_reference(model)
        _bypass(model, gone)
        notes = [f"{len(gone)} of {len(blocks)} blocks removed: {', '.join(str(one.number) for one in gone)}"]
        if self.importance != self._importance(len(free), count) == "activation":
            notes.append(f"ranked by activation: {_trials(len(free), count)} trials of the whole model are too many")
        return Report(len(gone), skipped, notes, {"removed": [one.number for one in gone]})

    def _chosen(self, model: ir.Model, context: Context, blocks: Sequence[_Block], count: int) -> list[_Block]:
        if self.importance == "random":
            order = np.random.default_rng(context.seed).permutation(len(blocks))[:count]
            return [blocks[index] for index in sorted(order)]
        samples = context.samples(f"'{self.name}'")
        feeds = [feed for feed, _ in zip(samples, range(_MOST_FEEDS), strict=False)]
        if not feeds:
            raise UserError("the calibration set is empty: give at least one sample")
        if self._importance(len(blocks), count) == "activation":
            influence = _influences(model, context, blocks, feeds)
            order = np.argsort(influence, kind="stable")[:count]
            return [blocks[index] for index in order]
        return self._greedy(model, context, list(blocks), feeds, count)

    def _importance(self, blocks: int, count: int) -> str:
        """Return what `auto` is: every trial runs the whole model, and a deep one would take for ever."""
        if self.importance != "auto":
            return self.importance
        return "output" if _trials(blocks, count) <= _MOST_TRIALS else "activation"

    def _greedy(
        self, model: ir.Model, context: Context, blocks: list[_Block], feeds: Sequence[Feeds], count: int
    ) -> list[_Block]:
        exact = _outputs(model, context, feeds)
        gone: list[_Block] = []
        total = _trials(len(blocks), count)
        tried = 0
        while len(gone) < count:
            errors = []
            for block in blocks:
                context.progress(self.name, tried, total)
                copy = model.clone()
                _bypass(copy, [*gone, block])
                errors.append(_distance(exact, _outputs(copy, context, feeds)))
                tried += 1
            gone.append(blocks.pop(int(np.argmin(errors))))
        context.progress(self.name, total, total)
        return gone


def _trials(blocks: int, count: int) -> int:
    return sum(blocks - done for done in range(count))


def _blocks(model: ir.Model, context: Context) -> tuple[list[_Block], list[Skipped]]:
    """Return the blocks that can be removed."""
    chain = segments(model, context).chain
    repeated = [one for one in chain if one.repeat is not None]
    if len(repeated) < 2:
        return [], []
    name = f"block {repeated[0].repeat}"
    roles = _roles(repeated)
    if roles is None:
        return [], [Skipped(name, "what goes from block to block is not the same everywhere")]
    outputs = set(model.graph.outputs)
    shapes = context.analyse(shapes_of, model)
    found, skipped = [], []
    for number, block in enumerate(repeated):
        pairs = [(block.nodes[node].outputs[output], block.reads[read]) for read, (node, output) in roles]
        reason = _obstacle(block, pairs, outputs, shapes)
        if reason:
            skipped.append(Skipped(f"block {number}", reason))
        else:
            found.append(_Block(number, f"block {number}", tuple((str(a.name), str(b.name)) for a, b in pairs)))
    return found, skipped


def _roles(blocks: Sequence[Segment]) -> list[tuple[int, tuple[int, int]]] | None:
    """Return which of a block's reads is which result of the block before, by its node and output.

    None if it is not the same for all blocks, or if there is more that goes from one to the next.
    """
    roles: list[tuple[int, tuple[int, int]]] | None = None
    for before, block in itertools.pairwise(blocks):
        if len(before.nodes) != len(block.nodes):
            return None
        places = {
            value: (number, output)
            for number, node in enumerate(before.nodes)
            for output, value in enumerate(node.outputs)
        }
        pairs = [(place, places[value]) for place, value in enumerate(block.reads) if value in places]
        if len(pairs) != len(before.gives) or (roles is not None and pairs != roles):
            return None
        roles = pairs
    return roles or None


def _obstacle(
    block: Segment, pairs: Sequence[tuple[ir.Value, ir.Value]], outputs: set[ir.Value], shapes: Shapes
) -> str:
    made = {value for node in block.nodes for value in node.outputs}
    kept = next((value for value in made & outputs if value not in {given for given, _ in pairs}), None)
    if kept is not None:
        return f"it makes '{kept.name}', an output of the model"
    for given, read in pairs:
        same = shapes.dims(given) == shapes.dims(read) and shapes.dtype(given) == shapes.dtype(read)
        if shapes.dims(given) is None or not same:
            return f"'{given.name}' has not the shape and type of '{read.name}', which would take its place"
    return ""


def _bypass(model: ir.Model, blocks: Sequence[_Block]) -> None:
    """Let what goes into blocks go to whoever reads what comes out; the nodes that nobody reads any more go."""
    values = main_values(model)
    for given, read in (pair for block in sorted(blocks, key=lambda one: -one.number) for pair in block.detour):
        value, source = values[given], values[read]
        node = value.producer()
        if value.is_graph_output():
            identity = ir.node("Identity", [source], name=qgraph.ir.fresh_name(model.graph, f"{given}_past"))
            assert node is not None
            qgraph.ir.insert_before(node, identity)
            source = identity.outputs[0]
            source.type, source.shape = value.type, value.shape
            name, value.name = value.name, None
            source.name = name
        value.replace_all_uses_with(source, replace_graph_outputs=True)
    ir.passes.common.RemoveUnusedNodesPass()(model)


def _outputs(model: ir.Model, context: Context, feeds: Sequence[Feeds]) -> list[list[np.ndarray]]:
    names = [str(value.name) for value in model.graph.outputs if value.dtype in _FLOATS]
    if not names:
        raise UserError("the model gives out no floating-point numbers, so there is nothing to compare")
    probe = Probe(model, raw_outputs(names), frozenset(feeds[0]), threads=context.threads)
    try:
        return [probe.run(feed) for feed in feeds]
    except Exception as error:
        raise UserError(f"the model does not run on a calibration sample: {first_line(error)}") from error


def _distance(exact: Sequence[Sequence[np.ndarray]], other: Sequence[Sequence[np.ndarray]]) -> float:
    """Return the squared error of all outputs relative to their power."""
    error = power = 0.0
    for ones, twos in zip(exact, other, strict=True):
        for one, two in zip(ones, twos, strict=True):
            error += float(np.square(one.astype(np.float64) - two).sum())
            power += float(np.square(one, dtype=np.float64).sum())
    return error / max(power, 1e-300) if np.isfinite(error) else float("inf")


def _influences(model: ir.Model, context: Context, blocks: Sequence[_Block], feeds: Sequence[Feeds]) -> np.ndarray:
    """Return the mean of one less the cosine of what goes in and what comes out, position by position."""
    names = list(dict.fromkeys(name for block in blocks for pair in block.detour[:1] for name in pair))
    probe = Probe(model, raw_outputs(names), frozenset(feeds[0]), threads=context.threads)
    total = np.zeros(len(blocks))
    for feed in feeds:
        arrays = dict(zip(names, probe.run(feed), strict=True))
        for index, block in enumerate(blocks):
            one, other = (arrays[name].astype(np.float64) for name in block.detour[0])
            along = np.einsum("...i,...i->...", one, other)
            sizes = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
            total[index] += 1.0 - float(np.mean(along / np.maximum(sizes, 1e-300)))
    return total / len(feeds)
