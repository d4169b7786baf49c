"""What the rules of coupled dimensions share; see `qgraph.analysis.coupling_rules`."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qgraph.analysis.coupling import Coupling, Cut, at
from qgraph.analysis.dimensions import Axis

__all__ = ["Rule", "axis_of", "edit_attribute", "elementwise", "first", "freeze_all", "input_of", "unary"]

Rule = Callable[[ir.Node, Coupling], None]
"""Joins the axes of what a node reads and gives, freezes what must not be cut, and adds edits."""


def freeze_all(node: ir.Node, found: Coupling, reason: str) -> None:
    """Freeze all that a node reads and gives."""
    for value in (*node.inputs, *node.outputs):
        found.freeze_value(value, reason)


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, None if it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def axis_of(node: ir.Node, default: int, rank: int) -> int:
    """Return the attribute `axis`, counted from the first."""
    return node.attributes.get_int("axis", default) % max(rank, 1)


def edit_attribute(node: ir.Node, found: Coupling, name: str, axis: Axis) -> None:
    """Let an attribute that states the size of an axis follow it."""

    def edit(model: ir.Model, cut: Cut) -> None:
        del model
        if cut.indices(axis) is not None:
            node.attributes[name] = ir.AttrInt64(name, cut.size(axis))

    found.edits.append(edit)


def elementwise(node: ir.Node, found: Coupling) -> None:
    """All inputs are broadcast to the output."""
    for value in node.inputs:
        if value is not None:
            found.same(value, node.outputs[0], node)


def first(node: ir.Node, found: Coupling) -> None:
    """The first input and output have the same axes; the others are not about axes."""
    assert node.inputs[0] is not None
    found.same(node.inputs[0], node.outputs[0], node)
    for output in node.outputs[1:]:
        found.freeze_value(output, f"it is a side output of {at(node)}")


def unary(node: ir.Node, found: Coupling) -> None:
    """Like `first`, and the other inputs are settings."""
    first(node, found)
    for parameter in node.inputs[1:]:
        found.freeze_value(parameter, f"it is a parameter of {at(node)}")
