"""What the passes share that write one operator as several plainer ones.

    y = Fancy(x)    =>    y = Plain(Plainer(x), constant)    the same numbers, in the place of the old node

A rewriting looks at a node first and raises `UnfitError` where the node must stay; only then does it emit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_forms import UNFIT_KEY
from qgraph.passes._opsets import version_of
from qgraph.pipeline import Report, Skipped

__all__ = ["Emitter", "PlainAlready", "Rewriting", "UnfitError", "rewrite", "static_sizes"]

_OLDEST_OPSET = 18
"""From here on Split, Pad, ReduceSum and the other reductions are what they are today."""


class UnfitError(Exception):
    """The reason why a node stays as it is."""


class PlainAlready(UnfitError):  # noqa: N818 - nothing is wrong with such a node
    """A node needs no rewriting; reports do not tell of it."""


class Emitter:
    """Nodes in the making, which will take the place of one node.

    `infer-shapes` finds the types and shapes of what is in between.
    """

    def __init__(self, node: ir.Node, main: ir.Graph) -> None:
        self.nodes: list[ir.Node] = []
        self._main = main
        self._base = next(output.name for output in node.outputs if output.name) or node.op_type
        self._integers: dict[tuple[int, ...], ir.Value] = {}

    def within(self, part: str) -> Emitter:
        """Return an emitter of nodes for the same place, which carry `part` in their names."""
        inner = object.__new__(Emitter)
        inner.nodes, inner._main, inner._integers = self.nodes, self._main, self._integers
        inner._base = f"{self._base}_{part}"
        return inner

    def constant(self, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """Return a new initializer."""
        return qgraph.ir.initializer(self._main, f"{self._base}_{name}", array)

    def integers(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """Return an initializer of int64, one-dimensional; the same for the same numbers."""
        key = tuple(numbers)
        if key not in self._integers:
            self._integers[key] = self.constant(name, np.asarray(key, dtype=np.int64))
        return self._integers[key]

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        """Emit a Split along `axis`; nothing if there is only one part."""
        if len(sizes) == 1:
            return [value]
        return self._emit("Split", [value, self.integers("sizes", sizes)], {"axis": axis}, len(sizes))

    def join(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """Emit a Concat along `axis`; nothing if there is only one value."""
        return values[0] if len(values) == 1 else self("Concat", *values, axis=axis)

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Emit a node with one output, and return that."""
        return self._emit(op_type, inputs, attributes, 1)[0]

    def several(self, op_type: str, inputs: Sequence[ir.Value | None], count: int) -> list[ir.Value]:
        """Emit a node with `count` outputs, and return these."""
        return self._emit(op_type, inputs, {}, count)

    def _emit(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], count: int
    ) -> list[ir.Value]:
        name = qgraph.ir.fresh_name(self._main, f"{self._base}_{op_type.lower()}")
        node = ir.node(op_type, inputs, attributes, num_outputs=count, name=name)
        for place, output in enumerate(node.outputs):
            output.name = name if count == 1 else qgraph.ir.fresh_name(self._main, f"{name}_{place}")
        self.nodes.append(node)
        return list(node.outputs)


Rewriting: TypeAlias = Callable[[ir.Node, Emitter], Sequence[ir.Value | None]]
"""Emits what a node is written as, and returns its outputs; None for one that nobody reads.

Raises UnfitError, before it emits anything, with the reason why a node stays.
"""


def rewrite(model: ir.Model, rewritings: Mapping[str, Rewriting], as_what: str, *, domain: str = "") -> Report:
    """Rewrite every node whose operator has a rewriting.

    Args:
        model: is changed.
        rewritings: by operator.
        as_what: how the report says what became of the nodes, such as "unrolled".
        domain: of the operators.

    Returns:
        The report; `skipped` has every such node that stays.
    """
    skipped: list[Skipped] = []
    counts: Counter[str] = Counter()
    version = version_of(model.graph.opset_imports) or 0
    for node in qgraph.ir.walk(model):
        if not qgraph.ir.is_op(node, *rewritings, domain=domain):
            continue
        try:
            if version < _OLDEST_OPSET:
                raise UnfitError(f"the model is of opset {version}, and this takes {_OLDEST_OPSET}: convert-opset")
            emit = Emitter(node, model.graph)
            outputs = rewritings[node.op_type](node, emit)
        except PlainAlready:
            continue
        except UnfitError as error:
            node.metadata_props[UNFIT_KEY] = str(error)
            skipped.append(Skipped(qgraph.ir.node_label(node), f"{node.op_type} stays: {error}"))
            continue
        emit.nodes[-1].name = node.name or emit.nodes[-1].name
        qgraph.ir.replace_node(node, emit.nodes, outputs)
        counts[node.op_type] += 1
    notes = [f"{count} {op_type} {as_what}" for op_type, count in counts.items()]
    return Report(changed=counts.total(), notes=notes, skipped=skipped)


def static_sizes(value: ir.Value | None, axes: Sequence[int] | slice, what: str) -> list[int]:
    """Return the sizes of `value` along `axes`.

    Raises:
        UnfitError: the shape, or one of these sizes, is not known; `what` says of which.
    """
    dims = list(value.shape) if value is not None and value.shape is not None else None
    if dims is None:
        raise UnfitError("the shape of its input is not known")
    chosen = dims[axes] if isinstance(axes, slice) else [dims[axis] for axis in axes]
    sizes = [dim for dim in chosen if isinstance(dim, int)]
    if len(sizes) < len(chosen):
        raise UnfitError(f"{what} not known before it runs")
    return sizes
