"""Lowering rules: LSTM, GRU and RNN, whose gates MIL has in another order.

ONNX    LSTM: input, output, forget, cell    GRU: update, reset, hidden    W [directions, gates * H, I]
MIL     LSTM: input, forget, output, cell    GRU: reset, output, hidden    weight_ih [gates * H, I]
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qgraph.coreml.site import Rule, Site, UnfitError

__all__ = ["RULES"]

_GATES = {"LSTM": (0, 2, 1, 3), "GRU": (1, 0, 2), "RNN": (0,)}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_SEQUENCE_LENGTHS, _INITIAL_H, _INITIAL_C, _PEEPHOLES = 4, 5, 6, 7


def _recurrent(site: Site, kind: str) -> list[Any]:
    op = site.node.op_type
    _refuse(site)
    direction = site.text("direction", "forward")
    directions = 2 if direction == "bidirectional" else 1
    hidden = site.shape(2)[2]
    parameters: dict[str, Any] = {"direction": direction, "output_sequence": True}
    for index in range(directions):
        ending = "_back" if index else ""
        for name, array in _weights(site, op, index, hidden).items():
            parameters[f"{name}{ending}"] = site.constant(array)
    batch = site.shape(0)[1]
    parameters["initial_h"] = _state(site, _INITIAL_H, batch, directions * hidden)
    if op == "LSTM":
        parameters["initial_c"] = _state(site, _INITIAL_C, batch, directions * hidden)
    if op == "GRU":
        parameters["reset_after"] = True
    steps, *last = site.emit(kind, x=site[0], **parameters)
    results = [_by_direction(site, steps, directions, hidden)]
    results += [_by_direction(site, one, directions, hidden) for one in last]
    return results[: len(site.node.outputs)]


def _refuse(site: Site) -> None:
    op = site.node.op_type
    activations = list(site.node.attributes.get_strings("activations", _ACTIVATIONS[op]))
    directions = 2 if site.text("direction", "forward") == "bidirectional" else 1
    if activations not in (_ACTIVATIONS[op], _ACTIVATIONS[op] * directions):
        raise UnfitError(f"of {op} there is the one with the activations {', '.join(_ACTIVATIONS[op])} only")
    if (
        site.has(_SEQUENCE_LENGTHS)
        or site.has(_PEEPHOLES)
        or site.integer("layout", 0)
        or "clip" in site.node.attributes
    ):
        raise UnfitError("sequences of several lengths, peepholes, a clip and layout=1 have no form here")
    if site.integer("input_forget", 0):
        raise UnfitError("coupled input and forget gates have no form in MIL")
    if op != "LSTM" and directions == 2:
        raise UnfitError(f"{op} in both directions has no form in MIL: put unroll-recurrent before")
    if op == "GRU" and not site.integer("linear_before_reset", 0):
        raise UnfitError("the reset gate is applied before the product: put unroll-recurrent before")


def _weights(site: Site, op: str, direction: int, hidden: int) -> dict[str, np.ndarray]:
    """Return the weights of one direction, gates in MIL's order."""

    def ordered(array: np.ndarray) -> np.ndarray:
        gates = array.reshape(len(_GATES[op]), hidden, *array.shape[1:])
        return np.ascontiguousarray(gates[list(_GATES[op])].reshape(array.shape))

    found = {"weight_ih": ordered(site.array(1)[direction]), "weight_hh": ordered(site.array(2)[direction])}
    if not site.has(3):
        return found
    both = site.array(3)[direction].reshape(2, -1)
    if op != "GRU":
        return {**found, "bias": ordered(both[0] + both[1])}
    return {**found, "input_bias": ordered(both[0]), "bias": ordered(both[1])}


def _state(site: Site, index: int, batch: int, width: int) -> Any:
    """Return an initial state [directions, batch, H] as [batch, directions * H]."""
    if not site.has(index):
        return site.constant(np.zeros((batch, width), site.type().numpy))
    moved = site.emit("transpose", x=site[index], perm=[1, 0, 2])
    return site.reshape(moved, (batch, width))


def _by_direction(site: Site, value: Any, directions: int, hidden: int) -> Any:
    """Return [..., batch, directions * H] as [..., directions, batch, H]."""
    shape: Sequence[int] = [int(size) for size in value.shape]
    split = site.reshape(value, (*shape[:-1], directions, hidden))
    order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2, len(shape)]
    return site.emit("transpose", x=split, perm=order)


RULES: Mapping[str, Rule] = {
    "LSTM": functools.partial(_recurrent, kind="lstm"),
    "GRU": functools.partial(_recurrent, kind="gru"),
    "RNN": functools.partial(_recurrent, kind="rnn"),
}
