"""GELU as one operator.

    x * (1 + Erf(x / sqrt(2))) * 0.5                                        =>    Gelu(x)
    x * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) * 0.5            =>    Gelu<approximate = tanh>(x)

The factor 0.5 may stand at x, at the sum or at the end; x / sqrt(2) may be a product, x ** 3 one of two products. This
is how exporters write it below opset 20, where Gelu appeared. Source: Hendrycks and Gimpel, "Gaussian Error Linear
Units" (2016).

It does not fire where a constant differs from these by more than a millionth, where somebody else reads a part of it,
and in models below opset 20, of which the report says so. With `table`, it does not where the runtime has no Gelu; a
model of an earlier opset is raised where there is something to fuse and no other node loses its kernel by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.passes import _opsets
from qgraph.passes._kernels import TABLE_HELP, raised
from qgraph.passes._rules import Rule, number, rewrite
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["FuseGelu"]

_GELU_SINCE = 20
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class FuseGelu(Pass):
    """Fuse the parts of GELU, exact or by tanh, into one operator."""

    name: ClassVar[str] = "fuse-gelu"
    table: str = field(default="", metadata={"help": TABLE_HELP})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Fuse; `skipped` has a model whose opset, or whose runtime, has no such operator."""
        suspects = [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "Erf", "Tanh")]
        if not suspects:
            return Report()
        if self.table:
            reason = raised(model, _GELU_SINCE, "Gelu", self.table, _rules())
            if reason is not None:
                return Report(skipped=[Skipped(qgraph.ir.node_label(node), reason) for node in suspects if reason])
            context.forget()
        skipped = _opsets.too_old(model, "Gelu", _GELU_SINCE, suspects)
        if skipped:
            return Report(skipped=skipped)
        count = rewrite(model, _rules())
        return Report(changed=count, notes=[f"{count} Gelu fused"] if count else [])


def _rules() -> Sequence[Rule]:
    return [
        Rule(_placed(place, curve), write)
        for curve, write in ((_erf, _exact), (_tanh, _by_tanh))
        for place in (_half_last, _half_first, _half_within)
    ]


def _placed(place: Callable[..., Any], curve: Callable[..., Any]) -> Callable[..., Any]:
    """Return the pattern of a curve with its factor at a place; onnxscript names variables by the parameters."""
    if curve is _erf:
        return lambda op, x, half, one, root, inverse: place(op, x, half, op.Add(_erf(op, x, root, inverse), one))
    return lambda op, x, half, one, three, cubic, root: place(
        op, x, half, op.Add(_tanh(op, x, three, cubic, root), one)
    )


def _half_last(op: Any, x: Any, half: Any, total: Any) -> Any:
    return op.Mul(op.Mul(x, total), half)


def _half_first(op: Any, x: Any, half: Any, total: Any) -> Any:
    return op.Mul(op.Mul(x, half), total)


def _half_within(op: Any, x: Any, half: Any, total: Any) -> Any:
    return op.Mul(x, op.Mul(total, half))


def _erf(op: Any, x: Any, root: Any, inverse: Any) -> Any:
    from onnxscript.rewriter import pattern

    return op.Erf(pattern.OrValue([op.Div(x, root), op.Mul(x, inverse)]))


def _tanh(op: Any, x: Any, three: Any, cubic: Any, root: Any) -> Any:
    from onnxscript.rewriter import pattern

    cube = pattern.OrValue([op.Pow(x, three), op.Mul(op.Mul(x, x), x)])
    return op.Tanh(op.Mul(op.Add(x, op.Mul(cube, cubic)), root))


def _exact(
    x: ir.Value, half: ir.Value, one: ir.Value, root: ir.Value | None = None, inverse: ir.Value | None = None
) -> ir.Node | None:
    scale = _is(root, math.sqrt(2)) if root is not None else _is(inverse, math.sqrt(0.5))
    return ir.node("Gelu", [x]) if scale and _is(half, 0.5) and _is(one, 1.0) else None


def _by_tanh(
    x: ir.Value, half: ir.Value, one: ir.Value, cubic: ir.Value, root: ir.Value, three: ir.Value | None = None
) -> ir.Node | None:
    fits = _is(half, 0.5) and _is(one, 1.0) and _is(cubic, 0.044715) and _is(root, math.sqrt(2 / math.pi))
    return ir.node("Gelu", [x], {"approximate": "tanh"}) if fits and (three is None or _is(three, 3.0)) else None


def _is(value: ir.Value | None, wanted: float) -> bool:
    found = number(value)
    return found is not None and abs(found - wanted) <= _TOLERANCE * wanted
