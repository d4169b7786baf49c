"""Gradients of ONNX graphs, as ONNX graphs.

    y = Relu(MatMul(x, W))    =>    dW = MatMul(Transpose(x), Mul(v, Cast(Greater(y, 0))))

For outputs y and a cotangent v in the shape of each, d(sum v * y) / d(value) of inputs, constants and values between:
reverse mode, one backward pass for all values. The result is a plain model that runs wherever ONNX runs.

Covered: convolutions and pooling (`gradient_convolutions`); MatMul, Gemm, normalizations, Softmax, Attention without a
cache (`gradient_layers`); reductions, and what moves, selects or repeats elements (`gradient_moves`); element-wise
arithmetic and activations, and pairs of QuantizeLinear and DequantizeLinear, straight through
(`gradient_elementwise`). Shape arithmetic, comparisons and rounding have no gradient and are passed by.

Not covered: recurrent cells, Einsum, interpolating Resize, products with vectors, operators of other domains, nodes
with subgraphs (If, Loop, Scan) and all that lies inside them, and opsets before 16. `uncovered` names such nodes;
gradients of what lies before them lack what goes through them, and are listed as incomplete.

Reference: Griewank, Walther, Evaluating Derivatives, 2008, section 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.gradient_convolutions import CONVOLUTIONS
from qgraph.analysis.gradient_elementwise import ELEMENTWISE, FLAT
from qgraph.analysis.gradient_layers import LAYERS
from qgraph.analysis.gradient_moves import MOVES, REDUCTIONS
from qgraph.analysis.gradient_tape import Call, Rule, Tape, UncoveredError
from qgraph.analysis.probes import main_values
from qgraph.errors import UserError

__all__ = ["FIRST_OPSET", "RULES", "Gradients", "differentiate", "gradient_model", "uncovered"]

FIRST_OPSET = 16
"""The first whose ScatterElements adds."""
RULES: Mapping[str, Rule] = {**CONVOLUTIONS, **ELEMENTWISE, **LAYERS, **MOVES, **REDUCTIONS}
"""Operator -> what its cotangents make of those of its inputs."""

_SETTINGS: Mapping[str, Sequence[int]] = {"Dropout": (1, 2), "Resize": (1, 2)}
"""Operator -> inputs that are real numbers and say what to do, rather than what to do it with."""
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """A model with its backward pass behind it.

    Attributes:
        model: a copy, which shares its weights with the original; for `differentiate`, with the outputs of that.
        tape: appends further nodes to it.
        cotangents: output -> the new input that takes its v.
        values: value -> its gradient, in the same shape and type.
        uncovered: nodes without a gradient that matters here -> the reason.
        incomplete: the values whose gradient lacks what goes through such nodes.
    """

    model: ir.Model
    tape: Tape
    cotangents: Mapping[str, ir.Value]
    values: Mapping[str, ir.Value]
    uncovered: Mapping[ir.Node, str]
    incomplete: frozenset[str]


def gradient_model(model: ir.Model, of: Sequence[str], wrt: Sequence[str]) -> Gradients:
    """Return a model that gives gradients alone.

    Args:
        model: is not changed.
        of: outputs, or other float values of the main graph.
        wrt: float values of the main graph: inputs, constants, results of nodes.

    Returns:
        a model with the inputs of the original and one cotangent for each of `of`; its outputs are the gradients, in
        the order of `wrt`, under the names that `values` gives.

    Raises:
        UserError: the opset is too old, or the gradient of some of `wrt` is incomplete.
        ValueError: there is no such value.
    """
    found = differentiate(model, of, wrt)
    if found.incomplete:
        node, reason = next(iter(found.uncovered.items()))
        raise UserError(f"there is no gradient of '{min(found.incomplete)}': {qgraph.ir.node_label(node)}: {reason}")
    graph = found.model.graph
    graph.outputs.clear()
    graph.outputs.extend(found.values[name] for name in dict.fromkeys(wrt))
    ir.passes.common.RemoveUnusedNodesPass()(found.model)
    return found


def uncovered(model: ir.Model, of: Sequence[str] | None = None, wrt: Sequence[str] | None = None) -> dict[str, str]:
    """Return the nodes without a gradient on the way from `wrt` (inputs, constants) to `of` (outputs) -> why."""
    outputs = [value.name or "" for value in model.graph.outputs if value.dtype in (None, *_FLOATS)]
    values = main_values(model)
    sources = [name for name, value in values.items() if value.producer() is None and value.dtype in (None, *_FLOATS)]
    found = differentiate(model, outputs if of is None else of, sources if wrt is None else wrt)
    return {qgraph.ir.node_label(node): reason for node, reason in found.uncovered.items()}


def differentiate(model: ir.Model, of: Sequence[str], wrt: Sequence[str]) -> Gradients:
    """Append the backward pass to a copy of a model; what is not covered is listed and left out.

    Args:
        model: is not changed.
        of: as for `gradient_model`.
        wrt: likewise.

    Raises:
        UserError: the opset is too old.
        ValueError: there is no such value.
    """
    opset = model.graph.opset_imports.get("", 0)
    if opset < FIRST_OPSET:
        raise UserError(f"gradients need opset {FIRST_OPSET}, and the model has {opset}: put convert-opset before it")
    copy = model.clone()
    values = main_values(copy)
    for name in (*of, *wrt):
        if name not in values:
            raise ValueError(f"the model has no value '{name}'")
    return _Backward(copy, [values[name] for name in of], [values[name] for name in wrt]).run()


class _Backward:
    def __init__(self, model: ir.Model, of: Sequence[ir.Value], wrt: Sequence[ir.Value]) -> None:
        self._model = model
        self._nodes = list(model.graph)
        self._tape = Tape(model)
        self._of = of
        self._wrt = list(dict.fromkeys(wrt))
        self._reads = {node: _read(node) for node in self._nodes}
        self._active = self._between()
        self._parts: dict[ir.Value, list[ir.Value]] = {}
        self._totals: dict[ir.Value, ir.Value] = {}
        self._uncovered: dict[ir.Node, str] = {}

    def run(self) -> Gradients:
        cotangents = {}
        for value in dict.fromkeys(self._of):
            cotangents[value.name or ""] = self._seed(value)
            self._parts.setdefault(value, []).append(cotangents[value.name or ""])
        for node in reversed(self._nodes):
            if any(value in self._active for value in node.outputs):
                self._step(node)
        gradients = {value.name or "": self._total(value) or self._nothing(value) for value in self._wrt}
        lost = self._before(self._uncovered)
        incomplete = frozenset(value.name or "" for value in self._wrt if value in lost)
        return Gradients(self._model, self._tape, cotangents, gradients, self._uncovered, incomplete)

    # --- what matters -------------------------------------------------------------------------------------------------

    def _between(self) -> set[ir.Value]:
        """Return the values that depend on one of `wrt`, and that one of `of` depends on, through real numbers."""
        after = set(self._wrt)
        for node in self._nodes:
            if node.op_type not in FLAT and any(value in after for value in self._reads[node]):
                after.update(value for value in node.outputs if self._is_real(value))
        needed = set(self._of)
        for node in reversed(self._nodes):
            if node.op_type not in FLAT and any(value in needed for value in node.outputs):
                needed.update(value for value in self._reads[node] if value in after)
        return after & needed

    def _is_real(self, value: ir.Value) -> bool:
        return self._tape.dtype(value) in _FLOATS or qgraph.ir.is_op(value.producer(), "QuantizeLinear")

    def _before(self, nodes: Iterable[ir.Node]) -> set[ir.Value]:
        """Return the values that matter through one of `nodes`."""
        chosen = set(nodes)
        found: set[ir.Value] = set()
        for node in reversed(self._nodes):
            on_the_way = any(value in found for value in node.outputs) and node.op_type not in FLAT
            if node in chosen or on_the_way:
                found.update(value for value in self._reads[node] if value in self._active)
        return found

    # --- going back ---------------------------------------------------------------------------------------------------

    def _seed(self, value: ir.Value) -> ir.Value:
        graph = self._model.graph
        seed = ir.Value(
            name=qgraph.ir.fresh_name(graph, f"{value.name}_cotangent"),
            type=ir.TensorType(self._tape.dtype(value)),
            shape=value.shape,
        )
        graph.inputs.append(seed)
        return seed

    def _total(self, value: ir.Value) -> ir.Value | None:
        """Return the cotangent of a value once all its readers have been passed."""
        if value not in self._totals and value in self._parts:
            total, *others = self._parts.pop(value)
            for other in others:
                total = self._tape.add(total, other)
            self._totals[value] = total
        return self._totals.get(value)

    def _nothing(self, value: ir.Value) -> ir.Value:
        return self._tape.zeros(self._tape.shape(value), value)

    def _step(self, node: ir.Node) -> None:
        cotangents = [self._total(value) if value in self._active else None for value in node.outputs]
        if all(one is None for one in cotangents):
            return
        settings = _SETTINGS.get(node.op_type, ())
        wanted = frozenset(i for i, value in enumerate(node.inputs) if value in self._active and i not in settings)
        reason = self._reason(node)
        if reason is None:
            try:
                found = RULES[node.op_type](Call(self._tape, node, cotangents, wanted))
                lacking = wanted - set(found)
                reason = f"it has no derivative by its input {min(lacking)}" if lacking else None
            except UncoveredError as error:
                reason = str(error)
        if reason is not None:
            self._uncovered[node] = reason
            return
        for index in sorted(wanted):
            value = node.inputs[index]
            assert value is not None
            self._parts.setdefault(value, []).append(found[index])

    def _reason(self, node: ir.Node) -> str | None:
        """Return why a node has no gradient whatever its inputs are, or None."""
        if qgraph.ir.inner_graphs(node):
            return f"{node.op_type} has subgraphs"
        if node.domain not in ("", "ai.onnx"):
            return f"{node.op_type} is of domain '{node.domain}'"
        return None if node.op_type in RULES else f"there is no rule for {node.op_type}"


def _read(node: ir.Node) -> list[ir.Value]:
    """Return what a node reads, what its subgraphs take from outside included."""
    settings = _SETTINGS.get(node.op_type, ())
    found = [value for index, value in enumerate(node.inputs) if value is not None and index not in settings]
    for graph in qgraph.ir.inner_graphs(node):
        inside = [*graph.all_nodes()]
        found += [value for inner in inside for value in inner.inputs if value is not None]
        found += [value for value in graph.outputs if value is not None]
    return found
