"""The integer functions of domain `qgraph` as model-local functions, their bodies in standard operators.

    y = qgraph.Requantize <rounding = "half-up"> (x, multiplier, shift, zero_point, low, high)

What each computes is defined by `qgraph.numerics.requantize` and `qgraph.numerics.integer_math`; a back end matches
the call as one node, and any other runtime computes the same integers by the body.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx.parser
import onnx_ir as ir

from qgraph.analysis.integer_functions import DOMAIN, FUNCTIONS, REQUANTIZE, result_type
from qgraph.numerics.requantize import ROUNDINGS
from qgraph.passes._integer_bodies import BODIES
from qgraph.passes._requantize_bodies import REQUANTIZE_BODY, ROUNDED

__all__ = ["call"]

_VERSION = 1
_OPSET = 21
"""The bodies' own; in a model of a later one they are of that, in which their operators mean the same."""
_IR_VERSION = 10
"""The first whose functions may have overloads: a function's overload is its rounding."""


def call(model: ir.Model, name: str, inputs: Sequence[ir.Value], rounding: str | None = None) -> ir.Node:
    """Return a node that calls an integer function, and add what it calls to the model.

    The node is in no graph yet. Its output has a type, and the shape of the first input where that is known;
    RoundedDivide's has none.

    Args:
        model: gets the function, and the functions that this one calls, unless it has them.
        name: one of `qgraph.analysis.integer_functions.FUNCTIONS`.
        inputs: as the function's definition lists them.
        rounding: of Requantize, one of `ROUNDINGS`; a model may call several.

    Raises:
        ValueError: there is no such function or rounding.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"there is no integer function '{name}' (there are: {', '.join(FUNCTIONS)})")
    if rounding not in (ROUNDINGS if name == REQUANTIZE else (None,)):
        raise ValueError(f"the rounding of {name} is {rounding!r} (Requantize has one of: {', '.join(ROUNDINGS)})")
    overload = rounding or ""
    _add(model, name, overload)
    attributes = {} if rounding is None else {"rounding": rounding}
    node = ir.node(name, inputs, attributes, domain=DOMAIN, overload=overload)
    output = node.outputs[0]
    dtype = result_type(name, inputs)
    if dtype is not None:
        output.dtype = dtype
    if name != "RoundedDivide" and inputs[0].shape is not None:
        output.shape = inputs[0].shape.copy()
    return node


def _add(model: ir.Model, name: str, overload: str) -> None:
    if (DOMAIN, name, overload) in model.functions:
        return
    function = _function(name, overload, max(_OPSET, model.graph.opset_imports.get("", _OPSET)))
    model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(DOMAIN, _VERSION)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    for node in function:
        if node.domain == DOMAIN:
            _add(model, node.op_type, node.overload)


def _function(name: str, overload: str, opset: int) -> ir.Function:
    body = REQUANTIZE_BODY.format(rounded=ROUNDED[overload]) if name == REQUANTIZE else BODIES[name]
    head = f'<domain: "{DOMAIN}", overload: "{overload}", opset_import: ["": {opset}, "{DOMAIN}": {_VERSION}]>'
    return ir.serde.deserialize_function(onnx.parser.parse_function(head + body))
