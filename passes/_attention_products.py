"""The two products of attention around a Softmax, and what stands between them.

    scores = MatMul(q, k) * scale + mask;  y = MatMul(Softmax(scores), v)

Heads that share keys and values may lie below one another in both, which makes fewer, larger matrices:

    q [batch, heads, rows, size], as [batch, groups, heads / groups * rows, size]
    scores [batch, groups, heads / groups * rows, keys], as [batch, heads, rows, keys]; then the same with v
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis import symbols
from qgraph.analysis.shapes import Shapes
from qgraph.passes._attention_block import NoMatchError, known_dims
from qgraph.passes._rules import number

__all__ = ["ProductFinder", "Products", "constant_factor"]


@dataclass(frozen=True)
class Products:
    """What is multiplied, and with what result."""

    queries: ir.Value | None
    keys: ir.Value | None
    values: ir.Value | None
    context: ir.Value
    """[batch, heads, queries, size]"""
    masks: Sequence[ir.Value]
    scale: float
    groups: int | None
    """In how many groups the heads lie below one another; None where they do not."""
    guarded: bool = False
    """Whether NaN among the weights becomes zero."""


class ProductFinder:
    """Finds the products around a Softmax."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    def find(self, softmax: ir.Node) -> Products | None:
        """Return the products, or None for a Softmax that does not weigh anything.

        Raises:
            NoMatchError: it does, but not as attention does.
        """
        probabilities, guarded = _guard(softmax)
        weigh, groups = self._weighed(probabilities)
        if weigh is None:
            return None
        if qgraph.ir.only_consumer(probabilities) is None:
            raise NoMatchError("its probabilities are used elsewhere too")
        rank = len(known_dims(self._shapes, softmax.inputs[0]))
        if rank != 4 or softmax.attributes.get_int("axis", -1) not in (-1, 3):
            raise NoMatchError("its input is not [batch, heads, queries, keys], normalized over the keys")
        products = self._scores(softmax.inputs[0])
        if products.groups != groups:
            raise NoMatchError("heads that share keys lie otherwise for the keys than for the values")
        context = weigh.outputs[0]
        if groups is not None:
            spread = qgraph.ir.only_consumer(context)
            if spread is None or self._unstacked(spread) != groups:
                raise NoMatchError("heads that share values are not laid side by side again")
            context = spread.outputs[0]
        return replace(products, values=weigh.inputs[1], context=context, guarded=guarded)

    def _weighed(self, probabilities: ir.Value) -> tuple[ir.Node | None, int | None]:
        """Return the product of probabilities and values, and in how many groups the heads lie in it."""
        for use in probabilities.uses():
            if _is_product(use.node, probabilities):
                return use.node, None
            groups = self._stacked(use.node)
            weigh = qgraph.ir.only_consumer(use.node.outputs[0]) if groups is not None else None
            if weigh is not None and _is_product(weigh, use.node.outputs[0]):
                return weigh, groups
        return None, None

    def _scores(self, value: ir.Value | None) -> Products:
        """Follow the Softmax's input up to the product of queries and keys."""
        masks: list[ir.Value] = []
        scale = 1.0
        groups: int | None = None
        while value is not None:
            node = value.producer()
            if node is None or qgraph.ir.only_consumer(value) is None:
                break
            if qgraph.ir.is_op(node, "MatMul"):
                queries = node.inputs[0] if groups is None else self._side_by_side(node.inputs[0], groups)
                return Products(queries, node.inputs[1], None, value, masks, scale, groups)
            scaled = constant_factor(node)
            if scaled is not None:
                value, factor = scaled
                scale *= factor
            elif groups is None and (groups := self._unstacked(node)) is not None:
                value = node.inputs[0]
            elif qgraph.ir.is_op(node, "Add") and scale == 1.0 and groups is None:
                scores = next((one for one in node.inputs if one is not None and _leads_to_product(one)), None)
                if scores is None:
                    break
                masks += [one for one in node.inputs if one is not None and one is not scores]
                value = scores
            else:
                break
        raise NoMatchError("what it normalizes is not a product of queries and keys, scaled and masked by addition")

    def _side_by_side(self, queries: ir.Value | None, groups: int) -> ir.Value | None:
        node = queries.producer() if queries is not None else None
        if node is None or self._stacked(node) != groups:
            raise NoMatchError("heads that share keys are not laid below one another for the product alone")
        return node.inputs[0]

    def _stacked(self, node: ir.Node) -> int | None:
        """Return in how many groups a Reshape lays heads below one another, or None for another node."""
        return self._groups(node, node.inputs[0], node.outputs[0]) if node.inputs else None

    def _unstacked(self, node: ir.Node) -> int | None:
        """Return in how many groups heads lie that a Reshape lays side by side, or None for another node."""
        return self._groups(node, node.outputs[0], node.inputs[0]) if node.inputs else None

    def _groups(self, node: ir.Node, heads: ir.Value | None, groups: ir.Value | None) -> int | None:
        if not qgraph.ir.is_op(node, "Reshape") or heads is None or groups is None:
            return None
        wide, tall = self._shapes.dims(heads), self._shapes.dims(groups)
        if wide is None or tall is None or len(wide) != 4 or len(tall) != 4 or (wide[0], wide[3]) != (tall[0], tall[3]):
            return None
        count, fewer = wide[1], tall[1]
        if not isinstance(count, int) or not isinstance(fewer, int) or not 0 < fewer < count or count % fewer:
            return None
        return fewer if symbols.mul(wide[2], count // fewer) == tall[2] else None


def constant_factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Return x and c for c * x, x * c or x / c with a constant c that is one number."""
    if not qgraph.ir.is_op(node, "Mul", "Div"):
        return None
    left, right = node.inputs
    factor = number(right)
    if factor is not None and left is not None and factor != 0.0:
        return left, factor if node.op_type == "Mul" else 1.0 / factor
    factor = number(left)
    if factor is not None and right is not None and node.op_type == "Mul":
        return right, factor
    return None


def _guard(softmax: ir.Node) -> tuple[ir.Value, bool]:
    """Return the probabilities, behind the Where that replaces NaN by zero if there is one."""
    plain = softmax.outputs[0]
    readers = [use.node for use in plain.uses()]
    where = next((node for node in readers if qgraph.ir.is_op(node, "Where")), None)
    test = next((node for node in readers if qgraph.ir.is_op(node, "IsNaN")), None)
    if where is None or test is None or len(readers) != 2 or plain.is_graph_output():
        return plain, False
    zero = number(where.inputs[1])
    if where.inputs[0] is not test.outputs[0] or where.inputs[2] is not plain or zero != 0.0:
        return plain, False
    if qgraph.ir.only_consumer(test.outputs[0]) is not where:
        return plain, False
    return where.outputs[0], True


def _leads_to_product(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None:
        if qgraph.ir.is_op(node, "MatMul"):
            return True
        scaled = constant_factor(node)
        passed = qgraph.ir.is_op(node, "Add", "Reshape")
        above = scaled[0] if scaled is not None else node.inputs[0] if passed else None
        node = above.producer() if above is not None else None
    return False


def _is_product(node: ir.Node, left: ir.Value) -> bool:
    return qgraph.ir.is_op(node, "MatMul") and node.inputs[0] is left
