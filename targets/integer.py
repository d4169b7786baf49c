"""Integer arithmetic only, for microcontrollers, NPUs and FPGAs, with semantics that any implementation can be held to.

    model.onnx    standard ONNX; between QuantizeLinear at the inputs and DequantizeLinear at the outputs nothing is
                  floating point; `qgraph.Requantize` and its like are model-local functions of integer operators
    c/            with --emit c: C99 without floating point, an example and a Makefile
    tvm/          with --emit so: a library compiled by TVM, without floating-point instructions

Everything is quantized (`full-qdq`: 8 bits, 16 where 8 would hurt) and then written in integers (`integer-requantize`).
`check` proves from the types of the tensors that nothing else is floating point; what has no integer form is a
boundary, named with its reason in report and manifest, and with --strict an error.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_units import FLOATS
from qgraph.passes.integer_requantize import BOUNDARY_KEY
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.runtime.session import open_session
from qgraph.targets.base import Kernels, Session, Target

__all__ = ["Integer"]

_PREPARE = (
    "inline-functions,lift-constants,convert-opset{version=21},fold-constants,remove-identity,fold-batch-norm,"
    "deduplicate-initializers,merge-duplicates,remove-unused,infer-shapes"
)
_MOVES = frozenset({
    "Cast", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "DequantizeLinear", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "If", "Pad", "QuantizeLinear", "Reshape", "Resize", "Shape", "Size",
    "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Integer(Target):
    """A graph of integer operators."""

    name: ClassVar[str] = "integer"
    summary: ClassVar[str] = "integer arithmetic only, exact to the bit: standard ONNX, and C or a TVM library from it"
    needs_calibration: ClassVar[bool] = True

    def prepare_passes(self) -> Pipeline:
        """Return the clean-up passes, and those that write operators as others with an integer form."""
        return Pipeline.parse(_PREPARE)

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return the quantization of everything."""
        del model, context
        return Pipeline.parse("full-qdq")

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in integers."""
        return Pipeline.parse("integer-requantize,merge-duplicates,remove-unused")

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return the nodes that compute in float and are no marked boundary."""
        return [
            Skipped(qgraph.ir.node_label(node), "it computes in float, and is no boundary that was told")
            for node in qgraph.ir.walk(model)
            if _is_float(node) and not _is_edge(node) and BOUNDARY_KEY not in node.metadata_props
        ]

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open model.onnx in ONNX Runtime, which executes the functions by their bodies.

        Raises:
            UserError: it is not installed.
        """
        session: Session = open_session(folder / "model.onnx", threads=threads)
        return session

    def kernels(self, folder: Path) -> Kernels:
        """Count the nodes of the integer graph, functions as one node each, and the boundaries."""
        model = qgraph.ir.load(folder / "model.onnx")
        nodes = list(qgraph.ir.walk(model))
        boundaries = [node for node in nodes if BOUNDARY_KEY in node.metadata_props]
        others = [node for node in nodes if BOUNDARY_KEY not in node.metadata_props]
        return Kernels(
            integer=_count(node for node in others if node.op_type not in _MOVES),
            floating=_count(boundaries),
            other=_count(node for node in others if node.op_type in _MOVES),
            left_in_float=[
                Skipped(qgraph.ir.node_label(node), node.metadata_props[BOUNDARY_KEY]) for node in boundaries
            ],
        )


def _count(nodes: Iterable[ir.Node]) -> Counter[str]:
    return Counter(node.op_type for node in nodes)


def _is_float(node: ir.Node) -> bool:
    return any(value is not None and value.dtype in FLOATS for value in (*node.inputs, *node.outputs))


def _is_edge(node: ir.Node) -> bool:
    """Tell whether a node leads from float to integers or back."""
    return qgraph.ir.is_op(node, "QuantizeLinear", "DequantizeLinear")
