"""What operators do to the dimensions of tensors; see `qgraph.analysis.coupling`.

A rule takes a node and the coupling so far, joins axes of inputs and outputs, freezes what must not be cut, and adds
edits for the sizes that the node states in attributes or constant inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.coupling import Coupling, at
from qgraph.analysis.coupling_attention import ATTENTION
from qgraph.analysis.coupling_layers import LAYERS
from qgraph.analysis.coupling_moves import MOVES
from qgraph.analysis.coupling_tools import Rule, elementwise, freeze_all, unary
from qgraph.pipeline import Skipped

__all__ = ["RULES", "apply"]

_UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos",
    "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_BINARY = (
    "Add", "And", "BitwiseAnd", "BitwiseOr", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
_MICROSOFT = "com.microsoft"

RULES: Mapping[tuple[str, str], Rule] = {
    **{("", op): unary for op in _UNARY},
    **{("", op): elementwise for op in _BINARY},
    **ATTENTION,
    **LAYERS,
    **MOVES,
    (_MICROSOFT, "BiasGelu"): elementwise,
    (_MICROSOFT, "FastGelu"): elementwise,
    (_MICROSOFT, "Gelu"): unary,
    (_MICROSOFT, "QuickGelu"): unary,
}
"""Domain and operator -> rule."""


def apply(node: ir.Node, found: Coupling) -> None:
    """Apply the rule of a node's operator; without one, freeze all that it reads and gives."""
    domain = "" if node.domain in ("", "ai.onnx") else node.domain
    rule = RULES.get((domain, node.op_type))
    inner = [value for graph in qgraph.ir.inner_graphs(node) for one in graph.all_nodes() for value in one.inputs]
    for value in inner:
        if value is not None and value.graph is node.graph:
            found.freeze_value(value, f"a subgraph of {at(node)} reads it")
    if rule is None:
        reason = f"{at(node)} is not understood"
        freeze_all(node, found, reason)
        if "Attention" in node.op_type or node.op_type == "Einsum":
            found.lost.append(Skipped(qgraph.ir.node_label(node), reason))
    else:
        rule(node, found)
