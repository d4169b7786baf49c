"""What a unit of integer arithmetic is: see `qgraph.analysis.integer_units`."""

from __future__ import annotations

import dataclasses
import enum

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import is_constant
from qgraph.analysis.integer_tails import Tail

__all__ = ["FLOATS", "UNFIT_KEY", "Form", "Unit", "computes_floats", "is_float", "real_outputs"]

UNFIT_KEY = "qgraph.unfit"
"""Key in a node's metadata: why no pass could write it as plainer operators."""
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class Form(enum.Enum):
    """What a unit computes, and so how integers do it."""

    LAYER = "layer"
    MATMUL = "product of activations"
    SUM = "sum"
    PRODUCT = "product"
    QUOTIENT = "quotient"
    TABLE = "function of one tensor"
    MOVE = "movement"
    JOIN = "several tensors brought to one scale"
    POOL = "average pooling"
    REDUCE = "reduction"
    SOFTMAX = "softmax"
    NORM = "normalization"
    HYPOT = "root of a sum of squares"
    CAST = "integers as numbers"
    COMPARE = "comparison"


@dataclasses.dataclass(eq=False)
class Unit:
    """One part of the graph.

    Attributes:
        form: what it computes.
        main: the node that names it.
        nodes: its nodes in topological order, the main one among them.
        inputs: the tensors that it reads and that integers must stand for, or, for CAST, the integers.
        outputs: the tensors that it makes, of which the first is what it rounds to.
        tail: what is done before rounding (LAYER, MATMUL, SUM, PRODUCT).
        signs: of the addends of a SUM, in the order of `terms`.
        terms: the addends of a SUM: tensors and constants; the operands of a PRODUCT, QUOTIENT or COMPARE.
    """

    form: Form
    main: ir.Node
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    tail: Tail = dataclasses.field(default_factory=Tail)
    signs: tuple[int, ...] = ()
    terms: tuple[ir.Value, ...] = ()

    @property
    def label(self) -> str:
        """The name of the main node."""
        return qgraph.ir.node_label(self.main)


def is_float(value: ir.Value | None) -> bool:
    """Tell whether a value holds floating-point numbers, or something of which nothing is known."""
    return value is not None and (value.dtype is None or value.dtype in FLOATS)


def computes_floats(node: ir.Node) -> bool:
    """Tell whether a node reads or makes floats, but for the constant scales of ONNX Runtime's quantized operators."""
    values = (*node.inputs, *node.outputs)
    if node.op_type.startswith(("QLinear", "QGemm")):
        values = tuple(value for value in values if not is_constant(value))
    return any(value is not None and value.dtype in FLOATS for value in values)


def real_outputs(node: ir.Node) -> tuple[ir.Value, ...]:
    """Return the outputs that a node has."""
    return tuple(value for value in node.outputs if value.name)
