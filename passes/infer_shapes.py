"""Types and shapes of everything, symbolic sizes included.

    y = MatMul(x[batch,seq,384], W[384,1536])    =>    y: float[batch,seq,1536]

Shapes follow from the graph's inputs and the weights; see `qgraph.analysis.shapes`. What a file says of a size in
between is kept only where nothing else is known of it. Graph inputs and outputs keep their declared symbols; a
graph output gets the sizes that are found to be numbers.
Nothing fails: a value that stays without a shape is reported with its reason, and passes that need it skip it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes
from qgraph.passes._annotate import annotate
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["InferShapes"]


@dataclass(frozen=True)
class InferShapes(Pass):
    """Find the types and shapes of all values, as far as they can be known without running the model."""

    name: ClassVar[str] = "infer-shapes"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Set types and shapes; `skipped` has the nodes with an output whose rank is not known."""
        del context
        shapes = Shapes(model).run()
        changed = annotate(model, shapes)
        outputs = [(node, value) for node in qgraph.ir.walk(model) for value in node.outputs if value.name]
        unknown = {node: value for node, value in outputs if value.shape is None}
        skipped = [
            Skipped(qgraph.ir.node_label(node), f"no shape: {shapes.reasons.get(value, 'it is not reached')}")
            for node, value in unknown.items()
        ]
        known = len(outputs) - sum(value.shape is None for _, value in outputs)
        static = sum(value.shape is not None and value.shape.is_static() for _, value in outputs)
        notes = [f"{known} of {len(outputs)} shapes known"] if known < len(outputs) else []
        return Report(
            changed=changed,
            skipped=skipped,
            notes=notes,
            figures={"values": len(outputs), "shapes": known, "static": static},
        )
