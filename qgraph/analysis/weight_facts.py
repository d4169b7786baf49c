"""What the compressed weights of a model are, hold and take, for manifests and reports."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qgraph.analysis.compressed_weights import compressed, format_scheme

__all__ = ["weight_facts"]


def weight_facts(model: ir.Model) -> dict[str, Any] | None:
    """Return, as JSON values, what the compressed weights of a model are, hold and take; None where there are none.

    Bits of information are those that a weight's own scheme needs; bytes are those of the tensors that hold it, which
    may be wider.
    """
    entries = [
        {
            "name": one.name,
            "scheme": format_scheme(one.scheme),
            "operators": list(dict.fromkeys(reader.op_type for reader in one.readers)),
            "shape": [one.outputs, one.inputs],
            **_sizes(one.outputs * one.inputs, round(one.information_bits), one.bytes),
        }
        for one in compressed(model)
    ]
    if not entries:
        return None
    sums = [sum(one[key] for one in entries) for key in ("parameters", "information_bits", "bytes")]
    return {**_sizes(*sums), "tensors": entries}


def _sizes(parameters: int, bits: int, stored: int) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "information_bits": bits,
        "bytes": stored,
        "bits_per_weight": round(bits / parameters, 4),
        "stored_bits_per_weight": round(8 * stored / parameters, 4),
    }
