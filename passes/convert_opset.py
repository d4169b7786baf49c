"""One opset for all that comes after.

    Clip<min=0, max=6>(x)              opset 7     =>    Clip(x, min, max)
    Upsample<scales=[1,1,2,2]>(x)      opset 7     =>    Resize<asymmetric, floor>(x, , scales)
    Softmax<axis=1>(x[1,1000,1,1])     opset 7     =>    Softmax<axis=1>(x)
    Softmax<axis=1>(x[n,c,h,w])        opset 12    =>    Reshape(Softmax<axis=-1>(Flatten(x)), Shape(x))

Up from opset 7, in place, without writing the model anywhere. A model of a later opset than `version` stays as it is.
Values stay the same as ONNX Runtime computes them. What cannot be converted stops the pass with the node's name:
Scan of opset 8, BatchNormalization with statistics for every element or read in training mode, a Dropout mask that
is read, Resize of opset 10 with computed scales in nearest mode, operators that onnx does not know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx.defs
import onnx_ir as ir

from qgraph.passes import _opsets
from qgraph.pipeline import Context, Pass, Report

__all__ = ["ConvertOpset"]

_LOWEST_TARGET = 13
"""From here on axes, limits and sizes are inputs; the adapters lead there."""


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Convert the model up to an opset."""

    name: ClassVar[str] = "convert-opset"
    version: int = field(default=21, metadata={"help": "opset to convert to; a later one is left"})

    def __post_init__(self) -> None:
        newest = onnx.defs.onnx_opset_version()
        if not _LOWEST_TARGET <= self.version <= newest:
            raise ValueError(f"version is {self.version}, but must be from {_LOWEST_TARGET} to {newest}")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Convert; `changed` counts the nodes that were adapted, and the opset itself as one.

        Raises:
            UserError: a node cannot be converted; the message names it and says why.
        """
        del context
        before = _opsets.version_of(model.graph.opset_imports)
        adapted = _opsets.convert(model, self.version)
        after = _opsets.version_of(model.graph.opset_imports)
        if before == after:
            notes = [f"opset {before} stays"] if before is not None and before > self.version else []
            return Report(changed=adapted, notes=notes)
        return Report(changed=adapted + 1, notes=[f"opset {before} to {after}"], figures={"nodes adapted": adapted})
