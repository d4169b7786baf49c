"""Convolutions and matrix products.

Where many outputs share an input, the elements that they see are first laid side by side with the zero point taken
off, a few rows at a time, so that each output is the dot product of two runs of memory:

    for a few pixels: patch = what the window covers, minus the zero point    (0 outside of the image)
    for each filter, for each of these pixels: dot(filter, patch)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.codegen.c_graph import IntegerGraph, refusal
from qgraph.codegen.c_kernel import Kernel

__all__ = ["ROW_TYPE", "centred", "minus", "packed", "rows_at_once", "zero_point_of"]

_MOST_ROWS = 16
_MOST_ELEMENTS = 8192
"""Rows laid side by side at a time: no more than these, and no more elements in all."""
ROW_TYPE = np.dtype(np.int16)


def rows_at_once(rows: int, length: int) -> int:
    """Return how many of some rows of a length to lay side by side."""
    return max(1, min(rows, _MOST_ROWS, _MOST_ELEMENTS // max(length, 1)))


def zero_point_of(graph: IntegerGraph, node: ir.Node, position: int) -> int:
    """Return the zero point that an input of a node holds, 0 if it is left out.

    Raises:
        UserError: it differs within the tensor.
    """
    numbers = graph.integers(node, position, [0])
    if len(set(numbers)) != 1:
        raise refusal(node, f"its zero point (input {position}) must be one for the whole tensor")
    return numbers[0]


def minus(element: str, zero_point: int) -> str:
    """Return an element less its zero point."""
    return f"{element} - {zero_point}" if zero_point >= 0 else f"{element} + {-zero_point}"


def centred(element: str, zero_point: int) -> str:
    """Return an element less its zero point, as an operand."""
    return f"({minus(element, zero_point)})" if zero_point else element


def packed(kernel: Kernel, source: ir.Value, weight: np.ndarray) -> tuple[str, str]:
    """Return the name of the constant that holds weights, and the function for dot products with them."""
    dtype = np.dtype(np.int8 if -128 <= weight.min(initial=0) <= weight.max(initial=0) <= 127 else np.int16)
    return kernel.constants.name(source.name or "weight", weight, dtype), kernel.helper(f"dot_{8 * dtype.itemsize}")
