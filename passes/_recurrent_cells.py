"""The cells of recurrent layers: what the steps of one direction share, and the operators of each step.

    H = f(x + H Rᵀ)    =>    Tanh(Add(x, MatMul(H, Rᵀ)))

Source: LSTM, GRU and RNN in the operators' reference, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_tracer import constant_tensor
from qgraph.passes._plain_operators import Emitter

__all__ = ["BIAS", "Cell", "Layer", "State", "given", "is_zero"]

BIAS = 3
"""The place of the biases among the inputs."""
State: TypeAlias = ir.Value | None
"""What a step leaves to the next; None stands for zeros."""


def given(node: ir.Node, index: int) -> ir.Value | None:
    """Return an optional input."""
    return node.inputs[index] if len(node.inputs) > index else None


def is_zero(value: ir.Value) -> bool:
    """Tell whether a value is a constant of zeros."""
    array = qgraph.ir.constant(value)
    return array is not None and not array.any()


@dataclass(frozen=True)
class Layer:
    """A recurrent layer that can be unrolled.

    Attributes:
        node: LSTM, GRU or RNN.
        steps: their number.
        axis: that of the steps in the input; states have it too, of size one, as outputs have the directions there.
        hidden: the size of a state.
        reverse: for each direction, whether it goes from the last step to the first.
        activations: for each direction, the operators f, g, h of the reference.
    """

    node: ir.Node
    steps: int
    axis: int
    hidden: int
    reverse: tuple[bool, ...]
    activations: tuple[tuple[str, ...], ...]

    def initial(self, index: int, emit: Emitter) -> Sequence[ir.Value | None]:
        """Return the initial state of each direction; None for one of zeros."""
        value = given(self.node, index)
        if value is None or is_zero(value):
            return [None] * len(self.reverse)
        return emit.split(value, [1] * len(self.reverse), self.axis)


@dataclass(frozen=True)
class Cell:
    """One direction of a layer: what its steps share, and how each is written."""

    layer: Layer
    direction: int
    emit: Emitter

    def weight(self, index: int, gates: slice) -> ir.TensorProtocol:
        """Return some gates of W or R (`index` 1 or 2), transposed: [in, gates * hidden]."""
        tensor = constant_tensor(self.layer.node.inputs[index])
        assert tensor is not None
        hidden, direction = self.layer.hidden, self.direction
        _, rows, columns = (int(dim) for dim in tensor.shape.numpy())
        first, last, _ = gates.indices(rows // hidden)
        chosen = slice(first * hidden, last * hidden)

        def transposed() -> np.ndarray:
            return np.asarray(tensor.numpy()[direction, chosen]).T

        return qgraph.ir.lazy(transposed, tensor.dtype, [columns, (last - first) * hidden])

    @functools.cached_property
    def biases(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What is added to the products with W and with R, each [gates * hidden]; None for nothing."""
        array = qgraph.ir.constant(given(self.layer.node, BIAS))
        if array is None:
            return None
        of_input, of_state = np.split(array[self.direction], 2)
        inner = of_state.copy()
        # Everything can be added to the input at once, but for what a reset gate multiplies.
        inner[: 2 * self.layer.hidden if self.resets_after else None] = 0
        return of_input + (of_state - inner), inner

    @property
    def resets_after(self) -> bool:
        """Whether the reset gate multiplies the product with the state, not the state."""
        node = self.layer.node
        return node.op_type == "GRU" and node.attributes.get_int("linear_before_reset", 0) != 0

    @functools.cached_property
    def recurrence(self) -> ir.Value:
        """Rᵀ of all gates."""
        return self.emit.constant("recurrence", self.weight(2, slice(None)))

    @functools.cached_property
    def gate_recurrence(self) -> ir.Value:
        """Rᵀ of a GRU's update and reset gates."""
        return self.emit.constant("gate_recurrence", self.weight(2, slice(0, 2)))

    @functools.cached_property
    def candidate_recurrence(self) -> ir.Value:
        """Rᵀ of a GRU's new state."""
        return self.emit.constant("candidate_recurrence", self.weight(2, slice(2, 3)))

    @functools.cached_property
    def inner_bias(self) -> ir.Value | None:
        """What a GRU adds before its reset gate multiplies; None for nothing."""
        if self.biases is None or not self.biases[1].any():
            return None
        return self.emit.constant("inner_bias", self.biases[1][2 * self.layer.hidden :])

    def projected(self) -> list[ir.Value]:
        """Emit what every step takes from the input."""
        product = self.emit(
            "MatMul", self.layer.node.inputs[0], self.emit.constant("weight", self.weight(1, slice(None)))
        )
        if self.biases is not None and self.biases[0].any():
            product = self.emit("Add", product, self.emit.constant("bias", self.biases[0]))
        return self.emit.split(product, [1] * self.layer.steps, self.layer.axis)

    def activated(self, emit: Emitter, place: int, value: ir.Value) -> ir.Value:
        """Emit activation f, g or h."""
        return emit(self.layer.activations[self.direction][place], value)

    def rnn(self, emit: Emitter, x: ir.Value, h: State, c: State) -> tuple[ir.Value, State]:
        """H = f(x + H Rᵀ)."""
        total = x if h is None else emit("Add", x, emit("MatMul", h, self.recurrence))
        return self.activated(emit, 0, total), c

    def lstm(self, emit: Emitter, x: ir.Value, h: State, c: State) -> tuple[ir.Value, State]:
        """i, o, f = f(...), C = f C + i g(...), H = o h(C)."""
        hidden = self.layer.hidden
        total = x if h is None else emit("Add", x, emit("MatMul", h, self.recurrence))
        gates, candidate = emit.split(total, [3 * hidden, hidden], axis=2)
        enter, leave, keep = emit.split(self.activated(emit, 0, gates), [hidden] * 3, axis=2)
        entering = emit("Mul", enter, self.activated(emit, 1, candidate))
        cell = entering if c is None else emit("Add", emit("Mul", keep, c), entering)
        return emit("Mul", leave, self.activated(emit, 2, cell)), cell

    def gru(self, emit: Emitter, x: ir.Value, h: State, c: State) -> tuple[ir.Value, State]:
        """z, r = f(...), n = g(...), H = (1 - z) n + z H, written n + z (H - n)."""
        hidden = self.layer.hidden
        gates, candidate = emit.split(x, [2 * hidden, hidden], axis=2)
        recurrent: State = self.inner_bias
        if h is not None and self.resets_after:
            from_h, recurrent = emit.split(emit("MatMul", h, self.recurrence), [2 * hidden, hidden], axis=2)
            recurrent = recurrent if self.inner_bias is None else emit("Add", recurrent, self.inner_bias)
            gates = emit("Add", gates, from_h)
        elif h is not None:
            gates = emit("Add", gates, emit("MatMul", h, self.gate_recurrence))
        update, reset = emit.split(self.activated(emit, 0, gates), [hidden] * 2, axis=2)
        if recurrent is not None:
            recurrent = emit("Mul", reset, recurrent)
        elif h is not None:
            recurrent = emit("MatMul", emit("Mul", reset, h), self.candidate_recurrence)
        total = candidate if recurrent is None else emit("Add", candidate, recurrent)
        new = self.activated(emit, 1, total)
        if h is None:
            return emit("Sub", new, emit("Mul", update, new)), c
        return emit("Add", new, emit("Mul", update, emit("Sub", h, new))), c
