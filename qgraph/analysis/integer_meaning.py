"""What the integers inside an integer graph stand for, noted in the metadata of their tensors.

qgraph.source        the tensor of the float model
qgraph.scale         real = (integer - zero point) * scale
qgraph.zero_point
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph.analysis.quantized_tensors import SOURCE_KEY

__all__ = ["meaning", "note_meaning"]

_SCALE, _ZERO_POINT = "qgraph.scale", "qgraph.zero_point"


def note_meaning(value: ir.Value, source: str, scale: float, zero_point: int) -> None:
    """Note what a tensor of integers stands for, unless something is noted."""
    if SOURCE_KEY not in value.metadata_props:
        value.metadata_props.update({SOURCE_KEY: source, _SCALE: repr(scale), _ZERO_POINT: str(zero_point)})


def meaning(value: ir.Value) -> tuple[float, int] | None:
    """Return scale and zero point of a tensor of integers, or None where nothing is noted."""
    props = value.metadata_props
    return (float(props[_SCALE]), int(props[_ZERO_POINT])) if _SCALE in props and _ZERO_POINT in props else None
