"""Errors of tensors inside a graph: what they are, and which readers get them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.gradient_tape import Tape
from qgraph.analysis.probes import Probe, first_line, main_values
from qgraph.errors import UserError
from qgraph.pipeline import Feeds

__all__ = ["Error", "Perturbation", "Rounding", "perturbed_uses", "power", "rounded", "run", "stored"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rounding:
    """What QuantizeLinear and DequantizeLinear do to a tensor.

    Attributes:
        scale: () or, per channel, (channels,).
        zero_point: in the integer type, of the same shape; its type says where numbers saturate.
        axis: of the channels.
        low: the least integer; of the type, where None.
        high: the largest integer; of the type, where None.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int = 1
    low: int | None = None
    high: int | None = None

    def bounds(self) -> tuple[int, int]:
        """Return the least and the largest integer."""
        info = np.iinfo(self.zero_point.dtype)
        return int(info.min) if self.low is None else self.low, int(info.max) if self.high is None else self.high


Error: TypeAlias = np.ndarray | Rounding | Callable[[np.ndarray], np.ndarray]
"""The error itself, what makes it, or a function from the tensor to its error."""


@dataclasses.dataclass(frozen=True, eq=False)
class Perturbation:
    """An error of a tensor.

    Attributes:
        value: a float value of the main graph.
        error: of the value's shape.
        spared: readers that get the exact tensor: label of the node and index of its input.
        spares_output: where the tensor is an output of the model, that stays exact.
    """

    value: str
    error: Error
    spared: frozenset[tuple[str, int]] = frozenset()
    spares_output: bool = False


def perturbed_uses(model: ir.Model, one: Perturbation) -> list[tuple[ir.Node, int]]:
    """Return the readers of a tensor that get its error, as node and index of the input, in the order of the graph.

    Raises:
        ValueError: the model has no such value.
    """
    values = main_values(model)
    if one.value not in values:
        raise ValueError(f"the model has no value '{one.value}'")
    uses = {(use.node, use.idx) for use in values[one.value].uses()}
    return [
        (node, index)
        for node in qgraph.ir.walk(model)
        for index in range(len(node.inputs))
        if (node, index) in uses and (qgraph.ir.node_label(node), index) not in one.spared
    ]


def stored(tape: Tape, x: ir.Value, error: np.ndarray) -> ir.Value:
    """Return an error as a constant of the type of `x`."""
    return tape.constant(error.astype(tape.dtype(x).numpy()))


def rounded(tape: Tape, x: ir.Value, error: Rounding) -> ir.Value:
    """Return (clip(round(x / scale), low - zero point, high - zero point)) * scale - x.

    Written out: where QuantizeLinear meets DequantizeLinear, a runtime may move them.
    """
    kind = tape.dtype(x).numpy()
    scale = tape.constant(_laid_out(np.asarray(error.scale, kind), error.axis, x, tape))
    zero = _laid_out(np.asarray(error.zero_point, np.float32), error.axis, x, tape)
    low, high = (tape.constant(np.asarray(np.float32(bound) - zero, kind)) for bound in error.bounds())
    steps = tape.op("Round", tape.div(x, scale))
    one = zero.ndim == 0
    clipped = tape.op("Clip", steps, low, high) if one else tape.op("Min", tape.op("Max", steps, low), high)
    return tape.sub(tape.mul(clipped, scale), x)


def _laid_out(entries: np.ndarray, axis: int, x: ir.Value, tape: Tape) -> np.ndarray:
    """Return scales or zero points in a shape that broadcasts against `x`."""
    if entries.size == 1:
        return np.asarray(entries).reshape(())
    rank = tape.rank(x)
    return entries.reshape([-1 if one == axis % rank else 1 for one in range(rank)])


def run(probe: Probe, feed: Feeds, number: int) -> list[np.ndarray]:
    """Run calibration sample `number`; what goes wrong is a `UserError` that names it."""
    try:
        return probe.run(feed)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"the model does not run on calibration sample {number}: {first_line(error)}") from error


def power(array: np.ndarray) -> float:
    """Return the sum of squares of what is finite."""
    wide = array.astype(np.float64).reshape(-1)
    finite = wide[np.isfinite(wide)]
    return float(np.sum(finite * finite))
