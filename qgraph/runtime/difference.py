"""Error layer by layer: the same samples run through source and result, and every tensor that both have is compared.

A tensor X of the source stands in the result for

1. the value whose metadata say `qgraph.source: X`, or else the value of the same name;
2. and, where that value is quantized, for what that stands for: it is what the next layers read, and holds what the
   saturation of the quantizer does in the place of a Relu or Clip.

The SQNR of a tensor tells how far the error has grown up to there; its loss tells how much of that is new: by how much
it lies below the least SQNR of the compared tensors that its node reads, directly or through tensors that only one
side has.

The tensors are made outputs of the two models, in slices that fit a memory bound; their sizes are counted first, by
the source itself. Dropout counts as absent, whatever its training flag says: that is how runtimes infer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_meaning import meaning
from qgraph.analysis.probes import AddOutputs, Probe, main_values
from qgraph.analysis.quantization_sensitivity import Sensitivities
from qgraph.errors import UserError
from qgraph.pipeline import Progress, Samples
from qgraph.runtime.metrics import ErrorSums, round_figure
from qgraph.runtime.watched_source import WatchedSource, model_file, run_probe, without_dropout

__all__ = ["Difference", "Observe", "TensorError", "Unmatched", "difference"]

Observe = Callable[[str, np.ndarray, np.ndarray], None]
"""Takes a tensor's name, its value in the source for one feed, and that in the result."""
SOURCE_KEY = "qgraph.source"
_FLOATS = frozenset({"bfloat16", "float16", "float32", "float64"})


@dataclasses.dataclass(frozen=True)
class TensorError:
    """How far a tensor inside the result is from the source's.

    Attributes:
        name: of the tensor in the source.
        node: that makes it there.
        op_type: of that node.
        sqnr_db: as in `qgraph.runtime.metrics`; None where the source's is all zero, or the tensors are equal.
        exact: whether they are equal.
        cosine: None where undefined.
        max_abs_error: None where nothing is finite.
        loss_db: by how much `sqnr_db` lies below that of what the node reads; None where all of that is exact.
        broken: number of values that are finite in the source and not in the result.
    """

    name: str
    node: str
    op_type: str
    sqnr_db: float | None
    exact: bool = False
    cosine: float | None = None
    max_abs_error: float | None = None
    loss_db: float | None = None
    broken: int = 0


class Unmatched(NamedTuple):
    """A float tensor of the source that was not compared, and why."""

    name: str
    op_type: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Difference:
    """The error of every tensor that both models have.

    Attributes:
        samples: number of feeds that were run.
        tensors: in the order of the source's graph.
        unmatched: the other float tensors of the source.
        sensitivities: what rounding each quantized tensor does to the outputs; None where that was not told.
        no_sensitivities: why not.
    """

    samples: int
    tensors: tuple[TensorError, ...]
    unmatched: tuple[Unmatched, ...] = ()
    sensitivities: Sensitivities | None = None
    no_sensitivities: str = ""

    def worst_first(self) -> list[TensorError]:
        """Return the tensors by rising SQNR: broken ones first, then undefined ones, exact ones last."""
        return sorted(self.tensors, key=_badness)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "samples": self.samples,
            "tensors": [dataclasses.asdict(one) for one in self.tensors],
            "unmatched": [one._asdict() for one in self.unmatched],
            "sensitivities": None if self.sensitivities is None else self.sensitivities.to_json(),
            "no_sensitivities": self.no_sensitivities,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Difference:
        """Read what `to_json` wrote."""
        found = document.get("sensitivities")
        return cls(
            document["samples"],
            tuple(TensorError(**one) for one in document["tensors"]),
            tuple(Unmatched(**one) for one in document["unmatched"]),
            None if found is None else Sensitivities.from_json(found),
            document.get("no_sensitivities", ""),
        )


def _badness(one: TensorError) -> tuple[int, float]:
    if one.broken:
        return 0, 0.0
    if one.exact:
        return 2, math.inf
    return 1, -math.inf if one.sqnr_db is None else one.sqnr_db


class _Pair(NamedTuple):
    source: ir.Value
    name: str
    result: str


def difference(
    source: Path | ir.Model | WatchedSource,
    result: Path | ir.Model,
    samples: Samples,
    *,
    memory: int = 1 << 30,
    threads: int = 0,
    progress: Progress | None = None,
    observe: Observe | None = None,
) -> Difference:
    """Compare the inner tensors of two models.

    Args:
        source: the model as it was given, or as it was before the first loss (`Context.reference`).
        result: the compiled ONNX model. Either is a file, a folder that holds one as model.onnx, or a model in memory,
            which is not changed; a source that serves for several results is a `WatchedSource`.
        samples: feeds; those of such a source.
        memory: bound in bytes on the tensors held at once; one tensor alone may be larger.
        threads: of the sessions; 0 lets the runtime choose.
        progress: called as `progress("diff", done, total)`.
        observe: called with every compared tensor of every feed.

    Raises:
        UserError: there are no samples, a model cannot be opened or run, the result is no ONNX model, or the two have
            nothing in common.
    """
    if not len(samples):
        raise UserError("there are no samples to compare on")
    before = source if isinstance(source, WatchedSource) else WatchedSource(source, samples, threads=threads)
    after = without_dropout(result if isinstance(result, ir.Model) else qgraph.ir.load(model_file(result)))
    pairs, unmatched = _match(before.tensors, after)
    if not pairs:
        other = result.graph.name if isinstance(result, ir.Model) else result
        raise UserError(
            f"no tensor of {before.name} has its counterpart in {other}: give a model and what was compiled from it"
        )
    slices = list(_slices(pairs, before.bytes_of([pair.source for pair in pairs]), memory))
    sums: dict[str, ErrorSums] = {}
    for number, some in enumerate(slices):
        given = before.giving([pair.name for pair in some])
        probe = Probe(after, _real_outputs(_results(some)), frozenset(before.largest), threads=threads)
        steps = _Steps(progress, number * len(samples), len(slices) * len(samples))
        sums.update(_compare(some, given, probe, samples, steps, observe))
    unmatched += [
        Unmatched(pair.name, _op(pair.source), "the result's tensor has another shape or type")
        for pair in pairs
        if pair.name not in sums
    ]
    return Difference(len(samples), tuple(_errors(before.model, sums)), tuple(unmatched))


class _Steps(NamedTuple):
    progress: Progress | None
    done: int
    total: int

    def __call__(self, more: int) -> None:
        if self.progress is not None:
            self.progress("diff", self.done + more, self.total)


def _op(value: ir.Value) -> str:
    node = value.producer()
    return "" if node is None else node.op_type


def _match(floats: Sequence[ir.Value], after: ir.Model) -> tuple[list[_Pair], list[Unmatched]]:
    values = main_values(after)
    told = {value.metadata_props[SOURCE_KEY]: value for value in values.values() if SOURCE_KEY in value.metadata_props}
    pairs, unmatched = [], []
    for value in floats:
        name = value.name or ""
        standing = told.get(name, values.get(name))
        if standing is None:
            unmatched.append(Unmatched(name, _op(value), "the result has no such tensor: fused or removed"))
        else:
            pairs.append(_Pair(value, name, _dequantized(standing).name or ""))
    return pairs, unmatched


def _dequantized(value: ir.Value) -> ir.Value:
    """Return what later layers read of a value: its dequantized form, or its integers where these are moved first."""
    integers = None
    for quantize in value.consumers():
        if quantize.op_type == "QuantizeLinear" and quantize.inputs[0] is value:
            integers = integers or quantize.outputs[0]
            for dequantize in quantize.outputs[0].consumers():
                if dequantize.op_type == "DequantizeLinear":
                    return dequantize.outputs[0]
    return value if integers is None else integers


def _real_outputs(names: Sequence[str]) -> AddOutputs:
    """Put out the tensors `names`, dequantized where a QuantizeLinear makes them."""

    def add(model: ir.Model, values: Mapping[str, ir.Value]) -> list[ir.Value]:
        outputs = []
        for number, name in enumerate(names):
            value, node = values[name], values[name].producer()
            if node is not None and qgraph.ir.is_op(node, "QuantizeLinear"):
                axis = node.attributes.get("axis")
                real = ir.node(
                    "DequantizeLinear", [value, *node.inputs[1:3]], {} if axis is None else {"axis": axis.as_int()}
                )
                real.outputs[0].name = f"qgraph.real.{number}"
                model.graph.append(real)
                value = real.outputs[0]
            elif (noted := meaning(value)) is not None:
                value = _stood_for(model.graph, value, *noted, f"qgraph.real.{number}")
            outputs.append(value)
        return outputs

    return add


def _stood_for(graph: ir.Graph, value: ir.Value, scale: float, zero_point: int, name: str) -> ir.Value:
    """Append what dequantizes a tensor inside an integer graph, and return its output."""
    dtype = value.dtype or ir.DataType.INT8
    constants = [
        qgraph.ir.initializer(graph, f"{name}.scale", np.asarray(scale, np.float32)),
        qgraph.ir.initializer(graph, f"{name}.zero_point", np.asarray(zero_point).astype(dtype.numpy())),
    ]
    real = ir.node("DequantizeLinear", [value, *constants])
    real.outputs[0].name = name
    graph.append(real)
    return real.outputs[0]


def _slices(pairs: Sequence[_Pair], held_bytes: Sequence[int], memory: int) -> Iterator[list[_Pair]]:
    """Split the pairs so that both sides' tensors of a slice fit into `memory`."""
    some: list[_Pair] = []
    held = 0
    for pair, one in zip(pairs, held_bytes, strict=True):
        needed = 2 * one
        if some and held + needed > memory:
            yield some
            some, held = [], 0
        some.append(pair)
        held += needed
    if some:
        yield some


def _results(pairs: Sequence[_Pair]) -> list[str]:
    """Return the result's tensors, each once: one may stand for several of the source."""
    return list(dict.fromkeys(pair.result for pair in pairs))


def _compare(
    pairs: Sequence[_Pair],
    given: Iterator[list[np.ndarray]],
    probe: Probe,
    samples: Samples,
    steps: _Steps,
    observe: Observe | None,
) -> dict[str, ErrorSums]:
    sums = {pair.name: ErrorSums() for pair in pairs}
    for number, (feed, ones) in enumerate(zip(samples, given, strict=True)):
        twos = dict(zip(_results(pairs), run_probe(probe, feed, "the result"), strict=True))
        for pair, one in zip(pairs, ones, strict=True):
            if pair.name not in sums:
                continue
            two = twos[pair.result]
            if not isinstance(two, np.ndarray) or two.dtype.name not in _FLOATS or one.shape != two.shape:
                del sums[pair.name]
                continue
            sums[pair.name].add(one, two)
            if observe is not None:
                observe(pair.name, one, two)
        steps(number + 1)
    return sums


def _errors(model: ir.Model, sums: Mapping[str, ErrorSums]) -> Iterator[TensorError]:
    """Yield the errors in the order of the graph, each with what is lost between its node's inputs and itself."""
    reached: dict[ir.Value, float] = {}
    for node in model.graph:
        above = min((reached.get(value, math.inf) for value in node.inputs if value is not None), default=math.inf)
        for value in node.outputs:
            of = sums.get(value.name or "")
            reached[value] = above
            if of is None:
                continue
            sqnr = of.sqnr_db
            if sqnr is not None:
                reached[value] = sqnr
            exact = sqnr == math.inf
            known = sqnr is not None and not exact and above != math.inf
            yield TensorError(
                name=value.name or "",
                node=qgraph.ir.node_label(node),
                op_type=node.op_type,
                sqnr_db=None if exact else sqnr,
                exact=exact and not of.broken,
                cosine=of.cosine,
                max_abs_error=round_figure(of.max_abs, 4) if of.values > of.excluded else None,
                loss_db=round(above - sqnr, 2) if known and sqnr is not None else None,
                broken=of.broken,
            )
