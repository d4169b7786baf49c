"""How each layer of a model runs fastest on the CPU: in float, dynamic or static integers, by the table of costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.cost import cost
from qgraph.analysis.integer_plan import IntegerPlan, integer_plan
from qgraph.analysis.integer_rules import Kind, data_inputs
from qgraph.pipeline import Pipeline
from qgraph.targets.cpu_costs import better_in_float, graph_cost, kernel_cost

__all__ = ["Mode", "choose", "gains_by_static", "static_form"]

_STATIC_FORM = "matmul-add-to-gemm,average-pool-to-conv,align-channels"
_PADDED_FORM = "matmul-add-to-gemm,average-pool-to-conv,align-channels{inputs=true}"
_MUCH_FASTER = 1.25
_NOMINAL_ROWS = 16
"""Rows of a product whose shapes are not known."""

Mode = Literal["float", "dynamic", "static"]
_KERNELS: Mapping[Mode, str] = {"float": "product-float", "dynamic": "product-dynamic", "static": "product-int8"}


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product [rows, width] x [width, columns] with a constant right operand."""

    rows: int
    width: int
    columns: int

    def nanoseconds(self, mode: Mode, *, comes_in_integers: bool) -> float:
        """Return the cost by the measured table, with that of the conversion before it.

        A static product takes integers as they come; the others want them back in float first.

        Args:
            mode: of its arithmetic.
            comes_in_integers: whether an integer layer makes the left operand.
        """
        weight, elements = self.width * self.columns, self.rows * self.width
        work = kernel_cost(
            _KERNELS[mode],
            multiply_add=self.rows * weight,
            weight=weight,
            input=elements,
            output=self.rows * self.columns,
        )
        if comes_in_integers == (mode == "static"):
            return work
        needed = mode == "static" or comes_in_integers
        return work + (kernel_cost("quantize" if mode == "static" else "dequantize", element=elements) if needed else 0)


def static_form(model: ir.Model) -> tuple[Pipeline, ir.Model, dict[ir.Node, Mode]]:
    """Return the passes that give `model` the form that static kernels handle best, the model in it, and the modes.

    Images are padded to four channels where that makes the integer convolution that reads them worth while.
    """
    form, formed, modes = _formed(model, _STATIC_FORM)
    if not any(qgraph.ir.is_op(node, "Conv") for node in model.graph):
        return form, formed, modes
    padding, padded, padded_modes = _formed(model, _PADDED_FORM)
    if len(padding) == 0 or _static_cost(padded, padded_modes) >= _static_cost(formed, modes):
        return form, formed, modes
    return padding, padded, padded_modes


def _formed(model: ir.Model, passes: str) -> tuple[Pipeline, ir.Model, dict[ir.Node, Mode]]:
    formed = model.clone()
    form = Pipeline([one for one in Pipeline.parse(passes) if Pipeline([one]).run(formed).changed])
    modes = choose(formed)
    slow = better_in_float(formed.graph, lambda node: _not_static(modes.get(node)))
    return form, formed, {**modes, **dict.fromkeys(slow, "float")}


def _static_cost(model: ir.Model, modes: Mapping[ir.Node, Mode]) -> float:
    return graph_cost(model.graph, integer_plan(model.graph, lambda node: _not_static(modes.get(node))), dynamic=True)


def _not_static(mode: Mode | None) -> str | None:
    return None if mode in (None, "static") else "it is not static"


def gains_by_static(model: ir.Model, modes: Mapping[ir.Node, Mode], least: float) -> bool:
    """Tell whether there is something to quantize statically, and whether float would take `least` times as long."""
    plan = integer_plan(model.graph, lambda node: _not_static(modes.get(node)))
    if not any(kind in (Kind.CONVOLUTION, Kind.PRODUCT) for kind in plan.nodes.values()):
        return False
    without = integer_plan(model.graph, lambda _: "it is not static")
    costs = [graph_cost(model.graph, one, dynamic=True) for one in (plan, without)]
    return least <= 1.0 or costs[1] > least * costs[0]


def choose(model: ir.Model) -> dict[ir.Node, Mode]:
    """Decide for each product with a constant weight; what is decided against static changes what follows it."""
    multiply_adds = {one.name: one.multiply_adds for one in cost(model).nodes}
    against: dict[ir.Node, Mode] = {}
    while True:
        plan = integer_plan(model.graph, lambda node: "it is not static" if node in against else None)
        layers = [node for node in plan.nodes if _is_layer(plan, node)]
        modes = {node: _mode(plan, node, multiply_adds.get(qgraph.ir.node_label(node))) for node in layers}
        changed = {node: mode for node, mode in modes.items() if mode != "static"}
        if not changed:
            return {**modes, **against}
        against.update(changed)


def _is_layer(plan: IntegerPlan, node: ir.Node) -> bool:
    return plan.nodes[node] is Kind.PRODUCT and len(data_inputs(node)) == 1


def _comes_in_integers(plan: IntegerPlan, value: ir.Value) -> bool:
    """Tell whether an integer layer makes `value`, looking through what only moves elements."""
    node = value.producer()
    while node is not None and plan.nodes.get(node) in (Kind.MOVER, Kind.CLAMP):
        node = data_inputs(node)[0][1].producer()
    return node in plan.nodes


def _mode(plan: IntegerPlan, node: ir.Node, multiply_adds: int | None) -> Mode:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    dims = weight.shape.numpy()
    width, columns = dims[::-1] if node.attributes.get_int("transB", 0) else dims
    rows = _NOMINAL_ROWS if multiply_adds is None else max(1, multiply_adds // max(1, width * columns))
    product = Product(rows, width, columns)
    integers = _comes_in_integers(plan, data_inputs(node)[0][1])
    modes: tuple[Mode, ...] = ("float", "dynamic", "static")
    costs = {mode: product.nanoseconds(mode, comes_in_integers=integers) for mode in modes}
    otherwise: Mode = "dynamic" if costs["dynamic"] <= costs["float"] else "float"
    bar = costs[otherwise] if integers else costs[otherwise] / _MUCH_FASTER
    return "static" if costs["static"] <= bar else otherwise
