"""The contract of a target: what a device and its runtime execute, and how a model gets there."""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.errors import UserError
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.runtime.placement import Placement

__all__ = ["Kernels", "Runs", "Session", "Step", "Target", "cleaned_up", "float64_edges", "repeated_outputs"]


def cleaned_up(*then: str, opset: int = 21) -> Pipeline:
    """Return the passes that clean up what exporters write and keep what float32 holds, and those that a target adds.

    Targets begin alike, so that a build for several of them shares what comes behind.

    Args:
        then: texts of pipelines.
        opset: up to which the model is converted.
    """
    passes = (
        f"inline-functions,lift-constants,convert-opset{{version={opset}}},fold-constants,to-fp32,"
        "remove-identity,fold-batch-norm,deduplicate-initializers,merge-duplicates,remove-unused"
    )
    return Pipeline.parse(",".join((passes, *then)))


def repeated_outputs(model: ir.Model) -> list[Skipped]:
    """Return the values that are an output more than once, for runtimes that know outputs by their names."""
    times = Counter(value.name or "" for value in model.graph.outputs)
    why = "it is an output {} times, which this runtime gives once: put an Identity behind it for each"
    return [Skipped(name, why.format(count)) for name, count in times.items() if count > 1]


def float64_edges(model: ir.Model, runtime: str) -> list[Skipped]:
    """Return the inputs and outputs that are float64, for runtimes that have none: what is between, passes narrow."""
    why = f"it is a float64 {{}} of the model, and {runtime} has no float64: export the model with float32 there"
    edges = [("input", value) for value in model.graph.inputs] + [("output", value) for value in model.graph.outputs]
    return [Skipped(value.name or "", why.format(edge)) for edge, value in edges if value.dtype == ir.DataType.DOUBLE]


class Session(Protocol):
    """Something that runs a model the way an ONNX Runtime session does."""

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[Any]:
        """Run one feed and return the outputs (all of them when `output_names` is None)."""
        ...


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What really runs on the target, after its runtime has fused and partitioned the graph.

    Attributes:
        integer: number of kernels, by operator, whose arithmetic is in integers.
        floating: number of compute kernels, by operator, that stay in float although the target has integer ones.
        other: number of the rest (data movement, conversions), by operator.
        left_in_float: nodes of the compute kernels in `floating`, each with the reason.
        low_bit: number of kernels, by operator, that read weights of few bits and compute in float.
    """

    integer: Mapping[str, int]
    floating: Mapping[str, int]
    other: Mapping[str, int]
    left_in_float: Sequence[Skipped] = ()
    low_bit: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, placement: Placement, reasons: Mapping[str, str]) -> Kernels:
        """Return a placement as counts.

        Args:
            placement: of all nodes.
            reasons: label of a node of the model -> why it was left in float, where a pass has said so.
        """
        counts = {kind: Counter[str]() for kind in ("integer", "low-bit", "float", "other")}
        left = []
        for node in placement.nodes:
            kind = node.arithmetic
            if kind == "none" or (kind == "float" and not node.remark):
                kind = "other"
            counts[kind][node.kernel.rpartition(".")[2]] += 1
            if kind == "float":
                told = next((label for label in node.sources if label in reasons), None)
                label = (told or node.name or node.kernel).removesuffix("_nchwc")
                left.append(Skipped(label, node.remark if told is None else reasons[told]))
        return cls(counts["integer"], counts["float"], counts["other"], left, counts["low-bit"])

    def summary(self) -> str:
        """Return one line such as "24 QLinearConv, 1 QGemm in integers; 2 Softmax in float"."""
        parts = [f"{_counted(self.integer)} in integers"]
        if self.low_bit:
            parts.append(f"{_counted(self.low_bit)} with weights of few bits")
        return "; ".join([*parts, f"{_counted(self.floating)} in float"])


def _counted(kernels: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {op}" for op, count in sorted(kernels.items())) or "nothing"


@dataclasses.dataclass(frozen=True)
class Runs:
    """What is known of how an artifact runs; all but `told` as the target's method of that name gives it.

    Attributes:
        told: where nodes run, in one line for people, or ''.
        providers: with the options that this model wants besides; None where `Target.providers` says it all.
    """

    kernels: Kernels | None
    placement: Placement | None
    footprint: Mapping[str, Any] | None
    runtime: Mapping[str, Any] | None
    told: str = ""
    providers: Sequence[tuple[str, Mapping[str, str]]] | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """Something that may bring a compressed model nearer to its source: a rung of the ladder that a search climbs.

    Attributes:
        name: in few words, such as "bias correction".
        ways: changes of the compress part, of which the best is kept if it helps. Each is written in one of the forms

                qdq.method=mse                     an option of a pass that is there
                equalize < qdq                     a pass before the first one of that name
                bias-correction{method=full} > qdq the same behind it

            A pass that is there already is put anew where it stands. A change that finds no such pass is left out.
        mends: what it can help: the rounding of weights, of activations, or, where it is '', of both. Steps that mend
            what does next to no harm are left out.
    """

    name: str
    ways: tuple[str, ...]
    mends: Literal["weights", "activations", ""] = ""


class Target(abc.ABC):
    """A device, a runtime and a precision. Derive a frozen dataclass without required fields."""

    name: ClassVar[str]
    """`device-precision`, as the command line calls it."""
    summary: ClassVar[str]
    """One line for `qgraph targets`."""
    extra: ClassVar[str] = "cpu"
    """The optional dependency (`pip install qgraph-compiler[EXTRA]`) that brings the runtime."""
    needs_calibration: ClassVar[bool] = False
    """Whether its default pipeline needs calibration data for every model."""
    opset: ClassVar[int] = 21
    """The default-domain opset that models are converted up to."""
    disabled: ClassVar[Sequence[str]] = ()
    """Optimizers of ONNX Runtime that would undo what the target promises."""

    @abc.abstractmethod
    def prepare_passes(self) -> Pipeline:
        """Return the passes that clean up what exporters write."""

    @abc.abstractmethod
    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return the passes that make the prepared `model` smaller and faster; may look at the model.

        Must depend on nothing but the model, the context and the target's own tables, so that builds repeat.
        """

    @abc.abstractmethod
    def lower_passes(self) -> Pipeline:
        """Return the passes that bring the compressed model to what the runtime executes best."""

    def refuse_passes(self, compress: Pipeline) -> None:
        """Raise a UserError for a compress part of the user's that cannot end in anything that runs here.

        For what is told better before passes run than by `check` behind them; the default refuses nothing.
        """
        del compress

    def tune(self, model: ir.Model, context: Context, default: Pipeline) -> Pipeline:
        """Return the fastest compress part for the prepared `model` by timing candidates on this machine.

        The default, for targets that know no candidates, keeps `default`. The model must not be changed.
        """
        del model, context
        return default

    def ladder(self, compress: Pipeline) -> Sequence[Step]:
        """Return what a search may try on the compress part to meet a tolerance, the cheapest first.

        What comes last, higher precision for the worst nodes, every search tries where something is quantized; the
        default is nothing else. Must depend on nothing but `compress`.
        """
        del compress
        return ()

    def smaller(self, compress: Pipeline) -> Sequence[tuple[str, Pipeline]]:
        """Return other compress parts, each with a name in few words, for a size that `compress` does not keep to.

        The least loss first; for targets that choose what is fastest, and leave in float what is not.
        """
        del compress
        return ()

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return the nodes of a lowered model that will not run on this target, each with its reason."""
        del model
        return []

    def lower(self, model: ir.Model, folder: Path) -> list[str]:
        """Write the deployable files into `folder` and return their names; the default is one ONNX model."""
        qgraph.ir.save(model, folder / "model.onnx")
        return sorted(path.name for path in folder.iterdir())

    def providers(self) -> Sequence[tuple[str, Mapping[str, str]]] | None:
        """Return the providers of ONNX Runtime that run model.onnx, with their options, the most wanted first.

        The manifest keeps them, so that a server opens the artifact without this module, with those that it has. None
        where nothing but `session` can open it. Options may hold no paths.
        """
        return None

    @abc.abstractmethod
    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open the files that `lower` wrote.

        Raises:
            UserError: the runtime is not installed; the message names the extra.
        """

    @property
    def emits(self) -> tuple[str, ...]:
        """The forms of code that it writes beside the model, as `emitting` was told."""
        return ()

    def emitting(self, forms: Sequence[str]) -> Target:
        """Return the target that writes code too, in the forms of `--emit`.

        Raises:
            UserError: it writes none, or not in such a form.
        """
        if not forms:
            return self
        raise UserError(f"{self.name} writes no code ({', '.join(forms)}): --emit is for the target integer")

    def footprint(self, folder: Path) -> Mapping[str, Any] | None:
        """Return what the code in `folder` needs on a device, as JSON values; None where there is none."""
        del folder
        return None

    def runtime(self, folder: Path) -> Mapping[str, Any] | None:
        """Return how the runtime is to be opened for the files in `folder`, as JSON values that do not vary.

        Providers and their options, and what is known of where nodes run; None for a runtime without such options.
        """
        del folder
        return None

    def stand_in(self) -> str:
        """Return what sessions run on where the target's own device or runtime is not here; '' where it is."""
        return ""

    def lacks(self) -> str:
        """Return why artifacts do not run on the target's own provider here, and what to do; '' where they do.

        Asked where the runtime that the extra brings is installed; for what can be wrong all the same.
        """
        return ""

    def placement(self, folder: Path) -> Placement | None:
        """Return what runs where, node by node, after the runtime's own optimisation.

        None where it cannot be known here: the runtime or the device is not here, or tells nothing.
        """
        del folder
        return None

    def kernels(self, folder: Path) -> Kernels | None:
        """Return what really runs after the runtime's own optimisation, or None where it cannot be known here."""
        del folder
        return None

    def runs(self, folder: Path, *, whole: bool = True) -> Runs:
        """Return all that is known of how the files in `folder` run; for targets that find it out in one go.

        Args:
            folder: holds what `lower` wrote.
            whole: whether the model fits into a session here; else nothing is asked that needs one.
        """
        kernels = self.kernels(folder) if whole else None
        placement = self.placement(folder) if whole else None
        return Runs(kernels, placement, self.footprint(folder), self.runtime(folder))
