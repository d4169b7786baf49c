"""Newer opsets: bringing a model to one, node by node, in place, and telling where a pass needs one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NoReturn

import numpy as np
import onnx.defs
import onnx.helper
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes
from qgraph.analysis.symbols import Dim
from qgraph.errors import UserError
from qgraph.passes._opset_adapters import ADAPTERS, Adapter
from qgraph.pipeline import Skipped

__all__ = ["COMPATIBLE", "OLDEST", "convert", "raise_to", "too_old", "version_of"]

OLDEST = 7
"""Elementwise operators broadcast differently before; converting from there would be guesswork."""
COMPATIBLE = 21
"""From here to opset 23, no operator changes."""


def version_of(opset_imports: Mapping[str, int]) -> int | None:
    """Return the version of the default domain, or None if it is not imported."""
    return opset_imports.get("", opset_imports.get("ai.onnx"))


def too_old(
    model: ir.Model, operator: str, since: int, nodes: Sequence[ir.Node], *, least: int | None = None
) -> list[Skipped]:
    """Return why a pass leaves `nodes` alone where the model's opset has no such operator; nothing where it has.

    Args:
        model: is not changed.
        operator: that the pass would write.
        since: opset in which it appeared.
        nodes: that might have become part of one.
        least: opset from which the model can be raised to `since`, by `raise_to`; `since` itself where it cannot.
    """
    opset = model.graph.opset_imports.get("", 0)
    if opset >= (least or since):
        return []
    to = "" if least is None else f"to {least} "
    reason = f"the model is of opset {opset}, and {operator} of opset {since}: convert it {to}first"
    return [Skipped(qgraph.ir.node_label(node), reason) for node in nodes]


def raise_to(model: ir.Model, version: int) -> None:
    """Declare that a model is of opset `version`, 23 at most, or later; it is of `COMPATIBLE` at least."""
    model.graph.opset_imports[""] = max(model.graph.opset_imports[""], version)


def convert(model: ir.Model, version: int) -> int:
    """Convert the graph, its subgraphs and its functions up to `version`; return the number of nodes adapted.

    Raises:
        UserError: a node cannot be converted, or its operator is unknown; the message names it.
    """
    adapted = _convert_graph(model, model.graph, model.graph.opset_imports, version)
    for function in model.functions.values():
        adapted += _convert_graph(model, function.graph, function.opset_imports, version)
    domains = {**model.graph.opset_imports}
    known = [onnx.helper.make_opsetid(domain, number) for domain, number in domains.items() if domain in _COUNTED]
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(known))
    return adapted


_COUNTED = {"", "ai.onnx", "ai.onnx.ml"}


def _convert_graph(model: ir.Model, graph: ir.Graph, imports: dict[str, int], version: int) -> int:
    current = version_of(imports)
    if current is None or current >= version:
        return 0
    if current < OLDEST:
        raise UserError(
            f"the model is written for opset {current}, and conversion starts at {OLDEST}: export it for a later one"
        )
    converter = _Converter(model, graph, current, version)
    adapted = sum([converter.node(node) for node in ir.traversal.RecursiveGraphIterator(graph)])
    imports.pop("ai.onnx", None)
    imports[""] = version
    return adapted


class _Converter:
    """Converts the nodes of the main graph or of a function; the `Builder` of the adapters."""

    def __init__(self, model: ir.Model, graph: ir.Graph, current: int, version: int) -> None:
        self._model = model
        self._graph = graph
        self._current = current
        self._version = version
        self._shapes: Shapes | None = None
        self._constants: dict[Hashable, ir.Value] = {}
        self._at = current

    def node(self, node: ir.Node) -> bool:
        """Convert a node; tell whether anything but its version changed."""
        if node.domain == "ai.onnx":
            node.domain = ""
        if node.domain != "" or node.graph is None:
            return False
        self._at = self._current
        if not _exists(node.op_type, self._current):
            self.refuse(node, f"opset {self._current} has no such operator")
        steps = self._steps(node)
        if steps and any(attribute.is_ref() for attribute in node.attributes.values()):
            self.refuse(node, "it takes attributes from its function; run inline-functions before")
        while steps:
            self._at, adapter = steps[0]
            adapter(node, self)
            steps = self._steps(node) if node.graph is not None else []
        return self._at > self._current

    def _steps(self, node: ir.Node) -> list[tuple[int, Adapter]]:
        return [step for step in ADAPTERS.get(node.op_type, ()) if self._at < step[0] <= self._version]

    def constant(self, node: ir.Node, array: np.ndarray, name: str) -> ir.Value:
        """Return an initializer, the same for the same array; in functions, which have none, a Constant node."""
        if self._graph is not self._model.graph:
            made = ir.node("Constant", [], {"value": ir.tensor(array)})
            qgraph.ir.insert_before(node, made)
            return made.outputs[0]
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            label = f"{node.name or node.outputs[0].name}_{name}"
            self._constants[key] = qgraph.ir.initializer(self._model.graph, label, array)
        return self._constants[key]

    def value_of(self, value: ir.Value | None) -> np.ndarray | None:
        """Return the elements of a small constant."""
        return self._known().array(value)

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type."""
        if value is None:
            return None
        return value.dtype if value.dtype is not None else self._known().dtype(value)

    def dims(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """Return the shape."""
        return self._known().dims(value) if value is not None else None

    def _known(self) -> Shapes:
        if self._shapes is None:
            self._shapes = Shapes(self._model).run()
        return self._shapes

    def fresh(self, name: str) -> str:
        """Return a name that is free in the model."""
        return qgraph.ir.fresh_name(self._model.graph, name)

    def refuse(self, node: ir.Node, reason: str) -> NoReturn:
        """Raise the error that the node cannot be converted.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"node '{qgraph.ir.node_label(node)}' ({node.op_type}) cannot be converted from opset {self._current} to "
            f"{self._version}: {reason}. Export the model for a later opset."
        )


def _exists(op_type: str, version: int) -> bool:
    try:
        onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return False
    return True
