"""Rules of shape inference for the integer functions of domain "qgraph"."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qgraph.analysis.shape_facts import Fact, Facts, broadcast, dims_of, input_of, rule

__all__: list[str] = []

_DOMAIN = "qgraph"


@rule("Requantize", domain=_DOMAIN)
def _requantize(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    shape = broadcast(dims_of(node, facts), dims_of(node, facts, 1))
    return [Fact(facts.dtype(input_of(node, 3)), shape)]


@rule("RoundedDivide", domain=_DOMAIN)
def _divide(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(ir.DataType.INT64, broadcast(dims_of(node, facts), dims_of(node, facts, 1)))]


@rule("IntegerSqrt", domain=_DOMAIN)
def _sqrt(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(ir.DataType.INT64, dims_of(node, facts))]


@rule("TableInterpolate", "Softmax", "LayerNormalize", "RMSNormalize", domain=_DOMAIN)
def _int32_of_the_same_shape(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(ir.DataType.INT32, dims_of(node, facts))]
