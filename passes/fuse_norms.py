"""Normalizations over the last axis as one operator.

    d = x - ReduceMean(x)
    d / Sqrt(ReduceMean(d * d) + epsilon) * g + b        =>    LayerNormalization(x, g, b)
    x / Sqrt(ReduceMean(x * x) + epsilon) * g            =>    RMSNormalization(x, g)

A division may be a product with a reciprocal, a square a power. g and b are constants with one number for each element
of the last axis; without b there is no bias. This is how exporters write LayerNorm below opset 17, and RMSNorm at all.
LayerNormalization is of opset 17. RMSNormalization is of opset 23; a model of opset 21 or 22 is raised, which changes
no other operator. Sources: Ba et al., "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer
Normalization" (2019).

It does not fire where somebody else reads a part of it, over other axes than the last, without g, and where the type
is not known to be float32: halves are often widened in between. With `table`, it does not where the runtime lacks the
operator; for RMSNormalization a model of any opset is raised where no other node loses its kernel by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.shapes import Shapes, shapes_of
from qgraph.passes import _opsets
from qgraph.passes._kernels import TABLE_HELP, lacking, raised
from qgraph.passes._rules import Rule, number, rewrite
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["FuseNorms"]

_NORM_SINCE = 17
_RMS_SINCE = 23


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Fuse the parts of LayerNorm and RMSNorm into one operator each."""

    name: ClassVar[str] = "fuse-norms"
    table: str = field(default="", metadata={"help": TABLE_HELP})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Fuse; `skipped` has what might be a norm in a model whose opset, or whose runtime, has no such operator."""
        suspects = [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "Sqrt")]
        if not suspects:
            return Report()
        skipped = _opsets.too_old(model, "LayerNormalization", _NORM_SINCE, suspects)
        if skipped:
            return Report(skipped=skipped)
        reason = lacking("LayerNormalization", [ir.DataType.FLOAT], self.table, version=model.graph.opset_imports[""])
        if reason is not None:
            return Report(skipped=[Skipped(qgraph.ir.node_label(node), reason) for node in suspects])
        shapes = context.analyse(shapes_of, model)
        layer = rewrite(model, [Rule(form, partial(_layer, shapes)) for form in _layer_forms()])
        rms, skipped = self._root_mean_squares(model, context)
        counts = {"LayerNormalization": layer, "RMSNormalization": rms}
        return Report(layer + rms, skipped, [f"{count} {name} fused" for name, count in counts.items() if count])

    def _root_mean_squares(self, model: ir.Model, context: Context) -> tuple[int, list[Skipped]]:
        """Fuse RMSNorm; return how often, and what might be one in a model that cannot have the operator."""
        rules = [Rule(form, partial(_rms, context.analyse(shapes_of, model))) for form in _rms_forms()]
        if self.table:
            reason = raised(model, _RMS_SINCE, "RMSNormalization", self.table, rules)
            if reason is not None:
                left = [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "Sqrt")]
                return 0, [Skipped(qgraph.ir.node_label(node), reason) for node in left if reason]
            context.forget()
            rules = [Rule(form, partial(_rms, context.analyse(shapes_of, model))) for form in _rms_forms()]
        elif model.graph.opset_imports[""] < _opsets.COMPATIBLE:
            return 0, []
        count = rewrite(model, rules)
        if count:
            _opsets.raise_to(model, _RMS_SINCE)
        return count, []


def _layer_forms() -> Sequence[Callable[..., Any]]:
    """Return the patterns, the ones with a bias first: those without match a part of them."""

    def scaled(op: Any, x: Any, axes: Any, axes2: Any, two: Any, epsilon: Any, g: Any) -> Any:
        d = op.Sub(x, op.ReduceMean(x, axes, _outputs=["mean"]))
        return op.Mul(_divided(op, d, d, axes2, two, epsilon), g)

    def biased(op: Any, x: Any, axes: Any, axes2: Any, two: Any, epsilon: Any, g: Any, b: Any) -> Any:
        return op.Add(scaled(op, x, axes, axes2, two, epsilon, g), b)

    return [biased, scaled]


def _rms_forms() -> Sequence[Callable[..., Any]]:
    def scaled(op: Any, x: Any, axes2: Any, two: Any, epsilon: Any, g: Any, one: Any) -> Any:
        return op.Mul(_divided(op, x, x, axes2, two, epsilon, one), g)

    return [scaled]


def _divided(op: Any, x: Any, d: Any, axes: Any, two: Any, epsilon: Any, one: Any = None) -> Any:
    """Return x / Sqrt(ReduceMean(d ** 2) + epsilon)."""
    from onnxscript.rewriter import pattern

    square = pattern.OrValue([op.Mul(d, d), op.Pow(d, two)])
    root = op.Sqrt(op.Add(op.ReduceMean(square, axes, _outputs=["variance"]), epsilon))
    reciprocal = [op.Reciprocal(root)] if one is None else [op.Reciprocal(root), op.Div(one, root)]
    inverse = pattern.OrValue(reciprocal) if len(reciprocal) > 1 else reciprocal[0]
    return pattern.OrValue([op.Div(x, root), op.Mul(x, inverse)])


def _layer(
    shapes: Shapes, x: ir.Value, mean: ir.Value, variance: ir.Value, epsilon: ir.Value, g: ir.Value,
    b: ir.Value | None = None, two: ir.Value | None = None, **_: Any,
) -> ir.Node | None:  # fmt: skip
    if not (_over_last(mean, shapes) and _over_last(variance, shapes) and _is_square(two)):
        return None
    size = _size(x, shapes)
    small = number(epsilon)
    if size is None or small is None or not _is_row(g, size) or (b is not None and not _is_row(b, size)):
        return None
    return ir.node("LayerNormalization", [x, g] if b is None else [x, g, b], {"axis": -1, "epsilon": small})


def _rms(
    shapes: Shapes, x: ir.Value, variance: ir.Value, epsilon: ir.Value, g: ir.Value,
    two: ir.Value | None = None, one: ir.Value | None = None, **_: Any,
) -> ir.Node | None:  # fmt: skip
    size, small = _size(x, shapes), number(epsilon)
    if size is None or small is None or not _is_row(g, size) or not _over_last(variance, shapes) or not _is_square(two):
        return None
    if one is not None and number(one) != 1.0:
        return None
    return ir.node("RMSNormalization", [x, g], {"axis": -1, "epsilon": small})


def _is_square(two: ir.Value | None) -> bool:
    return two is None or number(two) == 2.0


def _size(x: ir.Value, shapes: Shapes) -> int | None:
    dims = shapes.dims(x)
    known = dims is not None and len(dims) > 0 and shapes.dtype(x) == ir.DataType.FLOAT
    return dims[-1] if known and dims is not None and isinstance(dims[-1], int) else None


def _is_row(value: ir.Value, size: int) -> bool:
    tensor = value.const_value
    return tensor is not None and not value.is_graph_input() and tuple(tensor.shape.numpy()) == (size,)


def _over_last(value: ir.Value, shapes: Shapes) -> bool:
    """Tell whether a ReduceMean runs over the last axis and keeps it."""
    node = value.producer()
    if node is None or not node.attributes.get_int("keepdims", 1) or len(node.inputs) < 2 or node.inputs[0] is None:
        return False
    axes, dims = shapes.array(node.inputs[1]), shapes.dims(node.inputs[0])
    return axes is not None and dims is not None and np.asarray(axes).reshape(-1).tolist() in ([-1], [len(dims) - 1])
