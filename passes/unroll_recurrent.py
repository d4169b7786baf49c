"""Recurrent layers step by step, in plain operators.

    y, h = RNN(x, W, R, B)    of n steps
    =>
    x_1, ..., x_n = Split(MatMul(x, Wᵀ) + b)
    h_1 = Tanh(x_1),  h_2 = Tanh(x_2 + MatMul(h_1, Rᵀ)),  ...                y = Unsqueeze(Concat(h_1, ..., h_n))

LSTM and GRU likewise, by the formulas of the operators' reference (https://onnx.ai/onnx/operators/), in every direction
and either layout. The axis of the steps stays, of size one, so that a state is what MatMul, Concat and the outputs want
and nothing is squeezed. An initial state of zeros, or of none, leaves out what it would be multiplied with.

A layer stays, with the reason in the report, when the number of steps is not known or above `steps`, when weights are
computed, when its sequences are of several lengths, and when it has peepholes, a clip, a coupled input gate or an
activation that is no operator with the same defaults.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_tracer import constant_tensor
from qgraph.passes._plain_operators import Emitter, UnfitError, rewrite, static_sizes
from qgraph.passes._recurrent_cells import BIAS, Cell, Layer, State, given, is_zero
from qgraph.pipeline import Context, Pass, Report

__all__ = ["UnrollRecurrent"]

_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
_PLAIN = {name.lower(): name for name in ("Relu", "Sigmoid", "Softplus", "Softsign", "Tanh")}
_WITH_PARAMETERS = {name.lower(): name for name in ("Elu", "HardSigmoid", "LeakyRelu")}
"""Operators whose parameters have the defaults of the activation of that name; not so ThresholdedRelu."""
_SEQUENCE_LENS, _INITIAL_H, _INITIAL_C, _PEEPHOLES = 4, 5, 6, 7
"""Places of the inputs."""


@dataclass(frozen=True)
class UnrollRecurrent(Pass):
    """Write LSTM, GRU and RNN of a known number of steps as the operators of every step."""

    name: ClassVar[str] = "unroll-recurrent"
    steps: int = dataclasses.field(default=64, metadata={"help": "layers of more steps stay as they are"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Unroll; `skipped` has every recurrent layer that stays."""
        del context
        unroll = functools.partial(_unroll, most=self.steps)
        return rewrite(model, dict.fromkeys(_DEFAULTS, unroll), "unrolled")


_STEPS = {"LSTM": Cell.lstm, "GRU": Cell.gru, "RNN": Cell.rnn}


def _unroll(node: ir.Node, emit: Emitter, most: int) -> Sequence[ir.Value | None]:
    layer = _layer(node, most)
    inner = [emit.within(name) for name in ("forward", "backward")] if len(layer.reverse) > 1 else [emit]
    initial = zip(layer.initial(_INITIAL_H, emit), layer.initial(_INITIAL_C, emit), strict=True)
    ends = [_steps(Cell(layer, place, inner[place]), h, c) for place, (h, c) in enumerate(initial)]
    read = [bool(output.uses()) or output.is_graph_output() for output in node.outputs]
    results: list[ir.Value | None] = [None] * len(read)
    if read[0]:
        joined = [one.join(states, layer.axis) for one, (states, _, _) in zip(inner, ends, strict=True)]
        axes = emit.integers("axes", [layer.axis + 1])
        results[0] = emit.join([emit("Unsqueeze", one, axes) for one in joined], layer.axis + 1)
    last_states = [h for _, h, _ in ends], [c for _, _, c in ends if c is not None]
    for index, last in enumerate(last_states[: len(read) - 1], start=1):
        if read[index]:
            results[index] = emit.join(last, layer.axis)
    return results


def _steps(cell: Cell, h: State, c: State) -> tuple[list[ir.Value], ir.Value, State]:
    """Emit the steps of one direction; return the states h in the order of the input, and the last h and c."""
    order = -1 if cell.layer.reverse[cell.direction] else 1
    states: list[ir.Value] = []
    for number, x in list(enumerate(cell.projected()))[::order]:
        h, c = _STEPS[cell.layer.node.op_type](cell, cell.emit.within(f"step{number}"), x, h, c)
        states.append(h)
    return states[::order], states[-1], c


# --- which layers ----------------------------------------------------------------------------------------------------


def _layer(node: ir.Node, most: int) -> Layer:
    axis = node.attributes.get_int("layout", 0)
    (steps,) = static_sizes(node.inputs[0], [axis], "the number of its steps is")
    if not 0 < steps <= most:
        raise UnfitError(f"it has {steps} steps (steps={most} are allowed)")
    _require_plain(node, steps)
    recurrence = constant_tensor(node.inputs[2])
    bias = given(node, BIAS)
    if recurrence is None or constant_tensor(node.inputs[1]) is None:
        raise UnfitError("its weights are computed")
    if bias is not None and constant_tensor(bias) is None:
        raise UnfitError("its bias is computed")
    reverse = _DIRECTIONS[node.attributes.get_string("direction", "forward")]
    hidden = int(recurrence.shape.numpy()[2])
    return Layer(node, steps, axis, hidden, reverse, _activations(node, len(reverse)))


def _require_plain(node: ir.Node, steps: int) -> None:
    peepholes, lengths = given(node, _PEEPHOLES), given(node, _SEQUENCE_LENS)
    if "clip" in node.attributes:
        raise UnfitError("it clips what goes into its activations")
    if node.attributes.get_int("input_forget", 0):
        raise UnfitError("its input and forget gates are coupled")
    if peepholes is not None and not is_zero(peepholes):
        raise UnfitError("it has peepholes")
    if lengths is not None:
        array = qgraph.ir.constant(lengths)
        if array is None or (array != steps).any():
            raise UnfitError("its sequences may be of several lengths")


def _activations(node: ir.Node, directions: int) -> tuple[tuple[str, ...], ...]:
    """Return the operators that are the activations of each direction."""
    defaults = _DEFAULTS[node.op_type]
    names = node.attributes.get_strings("activations", ()) or defaults * directions
    if len(names) != len(defaults) * directions:
        raise UnfitError(f"it has {len(names)} activations")
    has_parameters = any(node.attributes.get_floats(name, ()) for name in ("activation_alpha", "activation_beta"))
    known = _PLAIN if has_parameters else _PLAIN | _WITH_PARAMETERS
    for name in names:
        if name.lower() not in known:
            raise UnfitError(f"its activation {name} is no operator, or has parameters of its own")
    found = [known[name.lower()] for name in names]
    return tuple(tuple(found[place : place + len(defaults)]) for place in range(0, len(found), len(defaults)))
