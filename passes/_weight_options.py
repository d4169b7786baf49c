"""Widths and groups chosen layer by layer, handed from the pass that chooses them to the pass that quantizes.

`mixed-bits` writes the width of a layer's weight, and how many inputs share a scale, into the metadata of every node
that reads it; `rtn`, `gptq` and `hqq` ask here for those of a layer before they take their own `bits` and `group`.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

import qgraph.ir
from qgraph.errors import UserError

__all__ = ["BITS", "FLOAT_KEY", "GROUP", "chosen_bits", "chosen_group", "forget_bits", "set_bits"]

BITS = "qgraph.bits"
"""Key in a node's metadata: the width of the weight that it reads, in bits; 16 and above: it stays in float."""

FLOAT_KEY = "qgraph.float"
"""Key in a node's metadata: why it stays in float."""

GROUP = "qgraph.group"
"""Key in a node's metadata: how many inputs of the weight share a scale; 0: a whole row."""

_FLOAT = 16


def set_bits(node: ir.Node, bits: int, group: int | None = None) -> None:
    """Note that the weight which `node` multiplies, or gathers from, shall have `bits` bits, in groups of `group`."""
    node.metadata_props[BITS] = str(bits)
    if group is not None:
        node.metadata_props[GROUP] = str(group)


def chosen_bits(nodes: Iterable[ir.Node], default: int) -> int | None:
    """Return the width for a weight that `nodes` read: the one noted, else `default`; None if it shall stay in float.

    Where the nodes differ (a tied weight of which only some readers were noted), the widest counts.

    Raises:
        UserError: what is noted is no positive whole number.
    """
    noted = [_read(node, BITS) for node in nodes if BITS in node.metadata_props]
    if 0 in noted:
        raise UserError(f"a node has the metadata {BITS}='0', which is no bit width")
    bits = max(noted, default=default)
    return None if bits >= _FLOAT else bits


def chosen_group(nodes: Iterable[ir.Node], default: int) -> int:
    """Return how many inputs of a weight that `nodes` read share a scale: what is noted first, else `default`.

    Raises:
        UserError: what is noted is no whole number.
    """
    return next((_read(node, GROUP) for node in nodes if GROUP in node.metadata_props), default)


def forget_bits(nodes: Iterable[ir.Node]) -> None:
    """Drop the notes once the weight is quantized, so that they do not reach the written file."""
    for node in nodes:
        for key in (BITS, GROUP):
            node.metadata_props.pop(key, None)


def _read(node: ir.Node, key: str) -> int:
    text = node.metadata_props[key]
    if not text.isdecimal():
        raise UserError(f"node '{qgraph.ir.node_label(node)}' has the metadata {key}='{text}', which is no number")
    return int(text)
