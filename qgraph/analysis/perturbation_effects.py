"""What small errors in tensors inside a graph do to its outputs, all of them in one pass over the samples.

For an error e of a tensor, the outputs y change by J e. With a random cotangent v of independent signs,

    E_v[ (g e)^2 ] = ||J e||^2,    g = J^T v

and g comes for every tensor from the same backward pass (`qgraph.analysis.gradients`). The products s = g e add up over
tensors as the changes J e do, so that their sums tell the effect of any set of errors together.

An error of a constant that a node multiplies (weights, tables, biases) is followed as what it changes in that node's
output, so that samples of a batch are told apart. Several outputs count alike, each relative to its own power. Where a
node on the way has no gradient, the error is put in and the change measured, on few samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from scipy.linalg import hadamard

import qgraph.ir
from qgraph.analysis.gradients import Gradients, differentiate
from qgraph.analysis.perturbation_measures import measure
from qgraph.analysis.perturbations import Error, Perturbation, Rounding, perturbed_uses, power, rounded, run, stored
from qgraph.analysis.probes import Probe, main_values, raw_outputs, size_outputs
from qgraph.analysis.shapes import Shapes
from qgraph.analysis.symbols import Dim
from qgraph.errors import UserError
from qgraph.pipeline import Context, Feeds

__all__ = ["Effects", "decibels", "effects"]

DRAWS = 128
"""Cotangents to draw at least: the standard error of a figure is then half a decibel."""
_MOST_REPEATS = 16
"""Backward passes of one sample at most."""
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True, eq=False)
class Effects:
    """The effects of perturbations.

    Attributes:
        names: of the perturbations.
        signal: sum of squares of each tensor over the samples.
        noise: sum of squares of each error.
        draws: [cotangents, perturbations]; relative to the outputs: a sum of squares of 1 is noise as strong as they.
        measured: perturbations that were put in and measured -> noise power relative to the outputs'.
        unknown: perturbations without a figure -> why.
        samples: number of samples.
    """

    names: tuple[str, ...]
    signal: np.ndarray
    noise: np.ndarray
    draws: np.ndarray
    measured: Mapping[str, float]
    unknown: Mapping[str, str]
    samples: int

    def power(self, names: Iterable[str]) -> float:
        """Return the noise power at the outputs, relative to theirs, of several perturbations together."""
        chosen = list(dict.fromkeys(names))
        places = [self.names.index(name) for name in chosen]
        together = self.draws[:, places].sum(axis=1)
        return float(np.sum(together * together)) + sum(self.measured.get(name, 0.0) for name in chosen)

    def sqnr_db(self, names: Iterable[str]) -> float | None:
        """Return the SQNR at the outputs under several perturbations together; None where there is no error."""
        return decibels(1.0, self.power(names))

    def with_copies(self, copies: Mapping[str, tuple[str, np.ndarray]]) -> Effects:
        """Return the effects with more, taken to be like known ones but for the size of the error.

        Args:
            copies: name -> the perturbation that it is like, and the error.
        """
        places = [self.names.index(like) for like, _ in copies.values()]
        noise = np.array([power(error) for _, error in copies.values()])
        ratios = np.divide(noise, self.noise[places], out=np.zeros_like(noise), where=self.noise[places] > 0)
        measured = {
            name: self.measured[like] * float(ratio)
            for (name, (like, _)), ratio in zip(copies.items(), ratios, strict=True)
            if like in self.measured
        }
        return dataclasses.replace(
            self,
            names=(*self.names, *copies),
            signal=np.concatenate([self.signal, self.signal[places]]),
            noise=np.concatenate([self.noise, noise]),
            draws=np.concatenate([self.draws, self.draws[:, places] * np.sqrt(ratios)], axis=1),
            measured={**self.measured, **measured},
        )


def decibels(signal: float, noise: float) -> float | None:
    """Return the ratio of two powers in dB; None where one is zero."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def effects(
    model: ir.Model, context: Context, perturbations: Mapping[str, Perturbation | Error], *, draws: int = DRAWS
) -> Effects:
    """Return what errors of tensors do to the float outputs of `model`, to first order.

    Args:
        model: is not changed; opset 16 or later.
        context: its calibration samples, seed, threads, memory bound and progress are used.
        perturbations: by any name; an error alone is that of the value of this name.
        draws: of cotangents at least, over all samples.

    Raises:
        UserError: there are no samples, the model does not run on one, gives no real numbers, or is of an older opset.
        ValueError: there is no such value.
    """
    samples = context.samples("the sensitivity analysis")
    first = next(iter(samples), None)
    if first is None:
        raise UserError("the calibration set is empty: give at least one sample")
    made = {
        name: one if isinstance(one, Perturbation) else Perturbation(name, one) for name, one in perturbations.items()
    }
    known = Shapes(model).run()
    named = dict.fromkeys(model.graph.outputs)  # one may be listed twice
    outputs = [str(value.name) for value in named if known.dtype(value) in _FLOATS]
    if not outputs:
        raise UserError("the model gives out no real numbers whose error could be told")
    forward = Probe(model, raw_outputs(outputs), frozenset(first), threads=context.threads)
    batch = _Batch.of(model, known, forward, first, context.calibration_memory)
    powers = _output_powers(forward, samples)
    scales = np.divide(1.0, np.sqrt(powers * (powers > 0).sum()), out=np.zeros_like(powers), where=powers > 0)
    session = _Session(model, made, outputs, batch, frozenset(first), context.threads)
    repeats = _repeats(-(-draws // sum(batch.rows(feed) for feed in samples)))
    rows: list[np.ndarray] = []
    for number, feed in enumerate(samples):
        context.progress("sensitivity", number, len(samples))
        for part, piece in enumerate(batch.pieces(feed)):
            shapes = [array.shape for array in run(forward, piece, number)]
            for repeat, signs in enumerate(_signs(shapes, repeats, (context.seed, number, part), batch)):
                cotangents = [one * scale for one, scale in zip(signs, scales, strict=True)]
                rows.append(session.run(piece, cotangents, number, first=not repeat) / math.sqrt(repeats))
    context.progress("sensitivity", len(samples), len(samples))
    measured, unknown = measure(model, context, {name: made[name] for name in session.left_out}, outputs)
    return Effects(tuple(made), session.signal, session.noise, np.concatenate(rows), measured, unknown, len(samples))


def _repeats(wanted: int) -> int:
    """Return the least power of two that is enough, within reason."""
    return min(1 << max(0, wanted - 1).bit_length(), _MOST_REPEATS)


def _signs(
    shapes: Sequence[tuple[int, ...]], repeats: int, seed: tuple[int, ...], batch: _Batch
) -> Iterator[list[np.ndarray]]:
    """Yield cotangents of signs: random ones, times the rows of a Hadamard matrix.

    The products of one sample's error with all of them have exactly the squares' sum that is wanted where the outputs
    have no more elements than there are cotangents, and vary less where they have more.
    """
    random = np.random.default_rng(seed)
    signs = [2.0 * random.integers(0, 2, shape) - 1.0 for shape in shapes]
    columns, start = [], 0
    for shape in shapes:
        inner = shape if batch.size is None else shape[1:]
        count = math.prod(inner)
        columns.append((start + np.arange(count)).reshape(inner) % repeats)
        start += count
    for row in hadamard(repeats, dtype=np.float64):
        yield [one * row[places] for one, places in zip(signs, columns, strict=True)]


def _output_powers(forward: Probe, samples: Iterable[Feeds]) -> np.ndarray:
    """Return the sum of squares of each output over all samples."""
    powers = [[power(array) for array in run(forward, feed, n)] for n, feed in enumerate(samples)]
    return np.asarray(np.sum(powers, axis=0))


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Batch:
    """The axis of independent samples inside feeds.

    Attributes:
        size: the symbol of the first axis of all inputs and outputs; None where there is no such axis.
        at_once: rows that fit the memory bound together.
    """

    size: Dim | None
    at_once: int

    @classmethod
    def of(cls, model: ir.Model, known: Shapes, forward: Probe, feed: Feeds, bound: int) -> _Batch:
        inputs = [value for value in model.graph.inputs if value.name in feed]
        leads = {dims[0] if (dims := known.dims(value)) else None for value in (*inputs, *model.graph.outputs)}
        size = next(iter(leads)) if len(leads) == 1 else None
        if size is None or isinstance(size, int) or not _independent(forward, feed):
            return cls(None, 1)
        values = [value for value in main_values(model).values() if value.producer() is not None]
        names = [str(value.name) for value in values if known.dtype(value) in _FLOATS]
        counts = run(Probe(model, size_outputs(names), frozenset(feed)), feed, 0)
        rows = len(next(iter(feed.values())))
        # Forward and backward, and what is computed on the way.
        needed = 3 * 4 * sum(int(count) for count in counts) / max(rows, 1)
        return cls(size, max(1, int(bound / max(needed, 1))))

    def rows(self, feed: Feeds) -> int:
        return 1 if self.size is None else len(next(iter(feed.values())))

    def pieces(self, feed: Feeds) -> Iterator[Feeds]:
        rows = self.rows(feed)
        for start in range(0, rows, self.at_once):
            yield {name: array[start : start + self.at_once] for name, array in feed.items()} if rows > 1 else feed


def _independent(forward: Probe, feed: Feeds) -> bool:
    """Tell whether the first row of the outputs follows from the first row of the inputs."""
    if len({len(array) for array in feed.values()}) > 1:
        return False
    try:
        alone = forward.run({name: array[:1] for name, array in feed.items()})
    except Exception:  # noqa: BLE001 - the runtime's errors have no common base
        return False
    return all(
        len(one) == 1 and np.allclose(one, other[:1], rtol=1e-2, atol=1e-3 * float(np.abs(other).max(initial=0.0)))
        for one, other in zip(alone, forward.run(feed), strict=True)
    )


# --- where errors enter -----------------------------------------------------------------------------------------------

_LINEAR = {
    "Add": (0, 1),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gather": (0,),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "Mul": (0, 1),
    "Sub": (0, 1),
}
"""Operator -> the inputs in which it is linear, the others being fixed."""


class _Site(NamedTuple):
    """Where the cotangents are taken: of the outputs of linear nodes, (output, input), or of the tensor as it is read.

    The tensor is read through Identities where some of its readers are spared.
    """

    linear: tuple[tuple[str, int], ...]
    read: tuple[str, ...]

    @property
    def places(self) -> list[str]:
        return [*(name for name, _ in self.linear), *self.read]


def _sites(model: ir.Model, perturbations: Mapping[str, Perturbation]) -> dict[str, _Site]:
    """Return where each error enters, and put Identities where readers must be told apart."""
    values = main_values(model)
    uses = {name: perturbed_uses(model, one) for name, one in perturbations.items()}
    whole = {name: len(uses[name]) == len(values[one.value].uses()) for name, one in perturbations.items()}
    return {name: _site(model, one, uses[name], whole=whole[name]) for name, one in perturbations.items()}


def _site(model: ir.Model, one: Perturbation, uses: Sequence[tuple[ir.Node, int]], *, whole: bool) -> _Site:
    value = main_values(model)[one.value]
    exposed = value.is_graph_output() and not one.spares_output
    linear = all(node.graph is model.graph and _is_linear(node, index) for node, index in uses)
    if isinstance(one.error, np.ndarray) and not exposed and linear:
        return _Site(tuple((str(node.outputs[0].name), index) for node, index in uses), ())
    if whole and exposed == value.is_graph_output():
        return _Site((), (one.value,))
    apart: dict[ir.Value, ir.Value] = {}
    for node, index in uses:
        before = node.inputs[index]
        assert before is not None
        if before not in apart:
            apart[before] = _identity(model, before)
        node.replace_input_with(index, apart[before])
    return _Site((), tuple(str(read.name) for read in apart.values()))


def _identity(model: ir.Model, value: ir.Value) -> ir.Value:
    node = ir.node("Identity", [value], name=qgraph.ir.fresh_name(model.graph, f"{value.name}_apart"))
    result = node.outputs[0]
    result.name, result.type = qgraph.ir.fresh_name(model.graph, f"{value.name}_as_read"), value.type
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    return result


def _is_linear(node: ir.Node, index: int) -> bool:
    return qgraph.ir.is_op(node, *_LINEAR) and index in _LINEAR[node.op_type]


class _Session:
    """Gives g e for each perturbation, and gathers the powers of tensors and errors.

    Attributes:
        left_out: perturbations whose gradient is incomplete.
        signal: sum of squares of each tensor.
        noise: sum of squares of each error.
    """

    def __init__(
        self,
        model: ir.Model,
        perturbations: Mapping[str, Perturbation],
        outputs: Sequence[str],
        batch: _Batch,
        fed: frozenset[str],
        threads: int,
    ) -> None:
        copy = model.clone()
        sites = _sites(copy, perturbations)
        found = differentiate(copy, outputs, [place for site in sites.values() for place in site.places])
        self.left_out = [
            name for name, site in sites.items() if any(place in found.incomplete for place in site.places)
        ]
        self.signal, self.noise = np.zeros(len(perturbations)), np.zeros(len(perturbations))
        self._batch = batch
        self._errors = [one.error for one in perturbations.values()]
        self._seeds = [(str(value.name), found.tape.dtype(value).numpy()) for value in found.cotangents.values()]
        writer = _Writer(found, batch)
        asked: list[ir.Value] = []
        self._asked: list[tuple[int, int]] = []
        for index, (name, one) in enumerate(perturbations.items()):
            if isinstance(one.error, np.ndarray):
                tensor = main_values(model)[one.value].const_value
                self.signal[index] = 0.0 if tensor is None else power(np.asarray(tensor.numpy()))
                self.noise[index] = power(one.error)
            if name not in self.left_out:
                some = writer.outputs(sites[name], one.error)
                asked += some
                self._asked.append((index, len(some)))
        names = [str(value.name) for value in asked]
        fed = fed | {name for name, _ in self._seeds}
        self._probe = Probe(found.model, raw_outputs(names), fed, threads=threads) if names else None

    def run(self, feed: Feeds, cotangents: Sequence[np.ndarray], number: int, *, first: bool) -> np.ndarray:
        """Return g e [rows, perturbations]; the powers are counted the `first` time that a feed is run."""
        rows = self._batch.rows(feed)
        products = np.zeros((rows, len(self._errors)))
        if self._probe is None:
            return products
        seeds = {name: one.astype(kind) for (name, kind), one in zip(self._seeds, cotangents, strict=True)}
        arrays = iter(run(self._probe, {**feed, **seeds}, number))
        for index, count in self._asked:
            some = [next(arrays).astype(np.float64) for _ in range(count)]
            error = self._errors[index]
            if count == 2 and callable(error):
                x, gradient = some
                made = np.asarray(error(x), np.float64)
                some = [_by_rows(gradient * made, rows), np.asarray(power(x)), np.asarray(power(made))]
            # What is not told apart by rows stands in the first.
            products[: some[0].size, index] = some[0].reshape(-1)
            if first and len(some) > 1:
                self.signal[index] += float(some[1])
                self.noise[index] += float(some[2])
        return products


def _by_rows(product: np.ndarray, rows: int) -> np.ndarray:
    by_rows = product.ndim > 0 and len(product) == rows
    return np.asarray(product.reshape(rows, -1).sum(axis=1) if by_rows else product.sum())


class _Writer:
    """Appends what a session of effects puts out."""

    def __init__(self, found: Gradients, batch: _Batch) -> None:
        self._found = found
        self._tape = found.tape
        self._batch = batch
        self._values = main_values(found.model)

    def outputs(self, site: _Site, error: Error) -> list[ir.Value]:
        """Return g e; of what is not constant also the sums of squares; x and g themselves for a function."""
        tape = self._tape
        if isinstance(error, np.ndarray):
            parts = [self._linear(name, index, error) for name, index in site.linear]
            if site.read:
                made = stored(tape, self._values[site.read[0]], error)
                parts.append(self._summed(self._gradient(site), made, site.read[0]))
            return [self._added(parts) if parts else tape.constant(np.zeros((), np.float32))]
        if not site.read:
            return [tape.constant(np.zeros((), np.float32))]
        x, gradient = self._values[site.read[0]], self._gradient(site)
        if not isinstance(error, Rounding):
            return [tape.op("Identity", x), tape.op("Identity", gradient)]
        made = rounded(tape, x, error)
        product = self._summed(gradient, made, site.read[0])
        return [product, self._total(x, "ReduceSumSquare"), self._total(made, "ReduceSumSquare")]

    def _gradient(self, site: _Site) -> ir.Value:
        return self._added([self._found.values[name] for name in site.read])

    def _added(self, parts: Sequence[ir.Value]) -> ir.Value:
        total, *others = parts
        for other in others:
            total = self._tape.add(total, other)
        return total

    def _linear(self, name: str, index: int, error: np.ndarray) -> ir.Value:
        """Return the cotangent of a node's output times what an error of one of its inputs makes of that."""
        node = self._values[name].producer()
        assert node is not None
        tape, made = self._tape, stored(self._tape, self._values[name], error)
        inputs: list[ir.Value | None] = list(node.inputs)
        inputs[index] = made
        if node.op_type in ("Conv", "ConvTranspose") and index == 2:
            made = tape.reshape(made, [1, -1, *[1] * (tape.rank(node.outputs[0]) - 2)])
        elif node.op_type == "Gemm" and index == 2:
            made = tape.scale(made, float(node.attributes.get_float("beta", 1.0)))
        elif node.op_type == "Sub":
            made = tape.op("Neg", made) if index else made
        elif node.op_type != "Add":
            kept = inputs[:2] if node.op_type in ("Conv", "ConvTranspose", "Gemm") else inputs
            made = tape.op(node.op_type, *kept, dtype=tape.dtype(node.outputs[0]), attributes=dict(node.attributes))
        return self._summed(self._found.values[name], made, name)

    def _summed(self, gradient: ir.Value, error: ir.Value, name: str) -> ir.Value:
        """Return the sum of products by row of the batch, if the value has rows."""
        product = self._tape.mul(self._single(gradient), self._single(error))
        dims = self._tape.dims(self._values[name])
        if self._batch.size is None or not dims or dims[0] != self._batch.size:
            return self._total(product)
        return self._tape.sum(product, list(range(1, len(dims))), keep=False) if len(dims) > 1 else product

    def _total(self, value: ir.Value, op_type: str = "ReduceSum") -> ir.Value:
        return self._tape.op(op_type, self._single(value), keepdims=0)

    def _single(self, value: ir.Value) -> ir.Value:
        """Return a value in float32, which such sums need."""
        single = ir.DataType.FLOAT
        same = self._tape.dtype(value) == single
        return value if same else self._tape.op("Cast", value, dtype=single, to=int(single))
