"""Magnitudes before a logarithm as squares of their roots, which integers with one scale hold better.

    m = Sqrt(ReduceSum(x * x));  y = Log(Transpose(m) ** 2 + e)
    =>
    r = Sqrt(Sqrt(ReduceSum(x * x)));  t = Transpose(r);  y = Log((t * t) ** 2 + e)

A logarithm asks for a small relative error of numbers of any size. Steps of one size give the root of a number twice
the range in decibels: at 16 bits, what lies 80 dB below the largest magnitude is known to 0.3 % rather than 15 %. The
functions behind it stay one function of one tensor, and the root of the root is one unit for integers.

Fires for the magnitudes that `qgraph.analysis.integer_patterns` knows, where nothing but moved elements lie between
them and functions of single elements that lead to a Log. The values are kept but for the rounding of floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.elementwise import ELEMENTWISE
from qgraph.analysis.integer_patterns import is_magnitude
from qgraph.pipeline import Context, Pass, Report

__all__ = ["RootMagnitudes"]

_MOVES = ("Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class RootMagnitudes(Pass):
    """Write magnitudes before a logarithm as squares of their roots, which integers hold better."""

    name: ClassVar[str] = "root-magnitudes"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite; what does not fire is not told: nothing is wrong with it."""
        del context
        graph = model.graph
        found = [(node, last) for node in graph if (last := _before_logarithm(node)) is not None]
        for node, last in found:
            _root(graph, node, last)
        return Report(len(found), notes=[f"{len(found)} magnitudes as squares of their roots"] if found else [])


def _before_logarithm(node: ir.Node) -> ir.Value | None:
    """Return where a magnitude lies in the end that only functions read which lead to a logarithm."""
    if not is_magnitude(node):
        return None
    value = node.outputs[0]
    while (after := qgraph.ir.only_consumer(value)) is not None and qgraph.ir.is_op(after, *_MOVES):
        value = after.outputs[0]
    readers = {use.node for use in value.uses()}
    if value.is_graph_output() or not all(_is_function(one, node) and one.op_type != "Sqrt" for one in readers):
        return None
    return value if _reaches_logarithm(readers, node) else None


def _is_function(node: ir.Node, like: ir.Node) -> bool:
    return node.graph is like.graph and qgraph.ir.is_op(node, *ELEMENTWISE)


def _reaches_logarithm(start: set[ir.Node], like: ir.Node) -> bool:
    seen, stack = set(start), list(start)
    while stack:
        node = stack.pop()
        if node.op_type == "Log":
            return True
        after = {use.node for value in node.outputs for use in value.uses()}
        fresh = {one for one in after if one not in seen and _is_function(one, like)}
        seen |= fresh
        stack += fresh
    return False


def _root(graph: ir.Graph, magnitude: ir.Node, last: ir.Value) -> None:
    """Take the root behind a magnitude, and square it where it lies in the end."""
    value = magnitude.outputs[0]
    uses = [(use.node, use.idx) for use in last.uses()]
    root = _like(graph, ir.node("Sqrt", [value]), value, "root")
    graph.insert_after(magnitude, root)
    if last is not value:
        value.replace_all_uses_with(root.outputs[0])
        root.replace_input_with(0, value)
    moved = root.outputs[0] if last is value else last
    square = _like(graph, ir.node("Mul", [moved, moved]), last, "square")
    maker = moved.producer()
    assert maker is not None
    graph.insert_after(maker, square)
    for node, index in uses:
        node.replace_input_with(index, square.outputs[0])


def _like(graph: ir.Graph, node: ir.Node, value: ir.Value, part: str) -> ir.Node:
    """Name a node after a value, and give its output the type and shape of that."""
    node.name = qgraph.ir.fresh_name(graph, f"{value.name}_{part}")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = node.name, value.type, value.shape
    return node
