"""Widths chosen layer by layer, handed from the pass that chooses them to the pass that quantizes.

`mixed-bits` writes the width of a layer's weight into the metadata of every node that reads it; `rtn`, `gptq` and
`hqq` ask here for the width of a layer before they take their own `bits`.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

import qgraph.ir
from qgraph.errors import UserError

__all__ = ["BITS", "chosen_bits", "forget_bits", "set_bits"]

BITS = "qgraph.bits"
"""Key in a node's metadata: the width of the weight that it reads, in bits; 16 and above: it stays in float."""

_FLOAT = 16


def set_bits(node: ir.Node, bits: int) -> None:
    """Note that the weight which `node` multiplies, or gathers from, shall have `bits` bits."""
    node.metadata_props[BITS] = str(bits)


def chosen_bits(nodes: Iterable[ir.Node], default: int) -> int | None:
    """Return the width for a weight that `nodes` read: the one noted, else `default`; None if it shall stay in float.

    Where the nodes differ (a tied weight of which only some readers were noted), the widest counts.

    Raises:
        UserError: what is noted is no positive whole number.
    """
    noted = [_read(node) for node in nodes if BITS in node.metadata_props]
    bits = max(noted, default=default)
    return None if bits >= _FLOAT else bits


def forget_bits(nodes: Iterable[ir.Node]) -> None:
    """Drop the notes once the weight is quantized, so that they do not reach the written file."""
    for node in nodes:
        node.metadata_props.pop(BITS, None)


def _read(node: ir.Node) -> int:
    text = node.metadata_props[BITS]
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"node '{qgraph.ir.node_label(node)}' has the metadata {BITS}='{text}', which is no bit width")
    return int(text)
