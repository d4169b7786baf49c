"""The integer functions of domain `qgraph`: their names, and the types and shapes of what they return.

`qgraph.numerics.requantize` and `qgraph.numerics.integer_math` define what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qgraph.analysis.shape_facts import Fact, Facts, broadcast, dims_of, rule

__all__ = ["DOMAIN", "FUNCTIONS", "REQUANTIZE", "result_type"]

DOMAIN = "qgraph"
REQUANTIZE = "Requantize"
_ZERO_POINT = 3
_RESULTS: Mapping[str, ir.DataType] = {
    "IntegerSqrt": ir.DataType.INT64,
    "LayerNormalize": ir.DataType.INT32,
    "RMSNormalize": ir.DataType.INT32,
    "RoundedDivide": ir.DataType.INT64,
    "Softmax": ir.DataType.INT32,
    "TableInterpolate": ir.DataType.INT32,
}
FUNCTIONS = (REQUANTIZE, *_RESULTS)


def result_type(name: str, inputs: Sequence[ir.Value | None]) -> ir.DataType | None:
    """Return the type of what the function `name` returns: Requantize has that of its zero point."""
    if name != REQUANTIZE:
        return _RESULTS[name]
    zero_point = inputs[_ZERO_POINT]
    return None if zero_point is None else zero_point.dtype


@rule(REQUANTIZE, domain=DOMAIN)
def _requantize(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[_ZERO_POINT]), dims_of(node, facts))]


@rule("RoundedDivide", domain=DOMAIN)
def _rounded_divide(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(_RESULTS[node.op_type], broadcast(dims_of(node, facts), dims_of(node, facts, 1)))]


@rule(*(name for name in _RESULTS if name != "RoundedDivide"), domain=DOMAIN)
def _like_first_input(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(_RESULTS[node.op_type], dims_of(node, facts))]
