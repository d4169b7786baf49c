"""What a graph costs on the CPU, and which layers had better stay in float: from a table of measured kernels.

The table (cpu_costs.toml) has nanoseconds for each kernel by what it is made of; benchmarks/measure_kernel_costs.py
measures it anew, nothing is timed on the spot. Costs are good for comparing one form of a graph with another, not as
predictions: dynamic axes count as 1 where they come first and as 16 elsewhere, and values of unknown shape cost
nothing.

Layers that integers slow down are mostly the first ones, whose few channels suit no integer kernel, and the last ones,
which are small; in a tiny network it may be all of them.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from importlib import resources

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_plan import IntegerPlan, integer_candidates, integer_plan
from qgraph.analysis.integer_rules import Kind, data_inputs, is_constant

__all__ = ["better_in_float", "graph_cost", "kernel_cost", "node_cost", "table"]

FIRST_AXIS = 1
_CLEAR = 1.05
"""How many times faster float must be before a whole graph stays as large as it is, or integers to be few."""
_FEW = 0.5
"""Integer layers for each float one that are too few to be kept for a small gain."""
_LEAST_GAIN = 0.99
"""What is left of the cost when a layer in float is worth its larger file."""
_EDGE = 16
"""How many of the first, and of the last, layers are tried together."""
_TRIALS = 64
"""How many single layers are tried at most."""
OTHER_AXES = 16
_BLOCK = 16
"""Channels that the float convolutions of this processor family handle at once."""
_QUAD = 4
"""Input channels that an integer product adds up at once."""
_LIGHT = frozenset({"Add", "Sub", "Mul", "Div", "Concat", "Clip", "LeakyRelu", "Max", "Min", "Where", "Pad", "Slice"})
_SPECIAL = frozenset({"Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Exp", "Erf", "Gelu", "Softmax", "Elu", "Resize"})
_FREE = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Constant", "Shape", "Dropout"})
_PRODUCTS = ("Gemm", "MatMul")


@functools.cache
def table() -> Mapping[str, Mapping[str, float]]:
    """Return kernel -> part -> nanoseconds."""
    text = resources.files("qgraph.targets").joinpath("cpu_costs.toml").read_text(encoding="utf-8")
    return {kernel: parts for kernel, parts in tomllib.loads(text).items() if isinstance(parts, dict)}


def better_in_float(graph: ir.Graph, allowed: Callable[[ir.Node], str | None]) -> set[ir.Node]:
    """Return the layers that had better not run in integers, for the sake of speed.

    Args:
        graph: the main graph, with shapes.
        allowed: names the nodes that stay in float in any case.
    """
    search = _Search(graph, allowed)
    layers = search.layers()
    search.try_all(layers[: end + 1] for end in range(min(_EDGE, len(layers))))
    layers = search.layers()
    search.try_all(layers[-end:] for end in range(1, min(_EDGE, len(layers)) + 1))
    slow = [node for node in search.layers() if search.may_be_slow(node)]
    slow.sort(key=lambda node: node_cost(node, "float") - node_cost(node, "int8"))
    for node in slow[:_TRIALS]:
        search.try_all([[node]])
    layers = search.layers()
    few = len(layers) < _FEW * len(search.excluded)
    limit = search.cost * _CLEAR if few else search.cost / _CLEAR
    return search.excluded | set(layers) if search.cost_without(layers) < limit else search.excluded


class _Search:
    """Goes from plan to plan, each costing less."""

    def __init__(self, graph: ir.Graph, allowed: Callable[[ir.Node], str | None]) -> None:
        self._graph = graph
        self._allowed = allowed
        self._candidates = integer_candidates(graph)
        self._node_cost = functools.cache(node_cost)
        self.excluded: set[ir.Node] = set()
        self.plan = self._plan(self.excluded)
        self.cost = self._cost(self.plan)

    def _cost(self, plan: IntegerPlan) -> float:
        return graph_cost(self._graph, plan, cost_of=self._node_cost)

    def _plan(self, excluded: set[ir.Node]) -> IntegerPlan:
        def allowed(node: ir.Node) -> str | None:
            return "it is faster in float" if node in excluded else self._allowed(node)

        return integer_plan(self._graph, allowed, self._candidates)

    def layers(self) -> list[ir.Node]:
        """Return the convolutions and products that run in integers, in topological order."""
        return _layers(self.plan)

    def may_be_slow(self, node: ir.Node) -> bool:
        """Tell whether a layer is slower in integers, or stands where integers begin or end."""
        if self._node_cost(node, "int8") > self._node_cost(node, "float"):
            return True
        begins = any(not self.plan.comes_in_integers(value) for _, value in data_inputs(node))
        return begins or not any(use.node in self.plan.nodes for use in node.outputs[0].uses())

    def cost_without(self, nodes: Iterable[ir.Node]) -> float:
        """Return what the graph costs when `nodes` stay in float too."""
        return self._cost(self._plan(self.excluded | set(nodes)))

    def try_all(self, candidates: Iterable[Iterable[ir.Node]]) -> None:
        """Leave those nodes in float that make the graph cheapest, if any do."""
        base = self.excluded
        for nodes in candidates:
            excluded = base | set(nodes)
            plan = self._plan(excluded)
            cost = self._cost(plan)
            if cost < self.cost * _LEAST_GAIN and _layers(plan):
                self.excluded, self.plan, self.cost = excluded, plan, cost


def _layers(plan: IntegerPlan) -> list[ir.Node]:
    return [node for node, kind in plan.nodes.items() if kind in (Kind.CONVOLUTION, Kind.PRODUCT)]


def graph_cost(
    graph: ir.Graph,
    plan: IntegerPlan,
    *,
    dynamic: bool = False,
    cost_of: Callable[[ir.Node, str], float] | None = None,
) -> float:
    """Return the nanoseconds that a run of `graph` takes when the nodes of `plan` run in integers.

    Args:
        graph: the main graph, with shapes.
        plan: what runs in integers.
        dynamic: let other products with constant weights quantize their inputs as they come, where that is faster.
        cost_of: what to take for `node_cost`, such as the same with a memory.
    """
    cost_of = cost_of or node_cost
    total = sum(cost_of(node, "int8" if node in plan.nodes else "float") for node in graph)
    if dynamic:
        products = [node for node in graph if node not in plan.nodes and qgraph.ir.is_op(node, *_PRODUCTS)]
        for node in products:
            if is_constant(node.inputs[1]):
                total += min(0.0, cost_of(node, "dynamic") - cost_of(node, "float"))
    for value in plan.group:
        made = plan.comes_in_integers(value)
        readers = [use.node for use in value.uses()]
        if not made and any(node in plan.nodes for node in readers):
            total += _change("quantize", value) + _stuck_layouts(value, plan)
            total += _pulled_through(value) if all(node in plan.nodes for node in readers) else 0.0
        if made and (value.is_graph_output() or any(node not in plan.nodes for node in readers)):
            total += _change("dequantize", value)
    return total


def _stuck_layouts(value: ir.Value, plan: IntegerPlan) -> float:
    """Return what it costs that ONNX Runtime changes layouts to and fro around sums, if it does.

    Its integer convolutions have channels last. Where what float nodes make is read by a convolution and by a sum, as
    at the start of a residual network, it does not find out that the sums, too, could have channels last. Changes of
    layout run on one thread, so they count twice.
    """
    kinds = {plan.nodes[use.node] for use in value.uses() if use.node in plan.nodes}
    if not {Kind.CONVOLUTION, Kind.ARITHMETIC} <= kinds:
        return 0.0
    sums = [node.outputs[0] for node, kind in plan.nodes.items() if kind is Kind.ARITHMETIC]
    return sum(2 * kernel_cost("transpose-int8", element=2 * _elements(one)) for one in sums)


def _pulled_through(value: ir.Value) -> float:
    """Return what it costs that ONNX Runtime quantizes before a MaxPool what is to be quantized after it.

    The integer MaxPool is slow unless integer convolutions around it let it have channels last.
    """
    node = value.producer()
    if node is None or not qgraph.ir.is_op(node, "MaxPool"):
        return 0.0
    taps = _elements(value) * math.prod(node.attributes.get_ints("kernel_shape"))
    return kernel_cost("max-pool-int8", tap=taps) - kernel_cost("max-pool-float", tap=taps)


def _change(kernel: str, value: ir.Value) -> float:
    """Return what it takes to quantize or dequantize a value, and to lay an image out as the other side wants it."""
    elements = _elements(value)
    image = value.shape is not None and len(value.shape) == 4
    return kernel_cost(kernel, element=elements) + (kernel_cost("transpose-int8", element=elements) if image else 0.0)


def node_cost(node: ir.Node, how: str) -> float:
    """Return the nanoseconds of a node.

    Args:
        node: a node of a graph with shapes.
        how: "float", "int8", or for products "dynamic".
    """
    if not qgraph.ir.is_op(node, node.op_type) or node.op_type in _FREE:
        return 0.0
    if node.op_type == "Conv":
        return _convolution(node, how)
    if node.op_type in _PRODUCTS:
        return _product(node, how)
    elements = max((_elements(value) for value in (*node.inputs, *node.outputs) if value is not None), default=0)
    if node.op_type == "Relu" or (node.op_type == "Clip" and how == "int8"):
        return 0.0 if how == "int8" or _follows_convolution(node) else kernel_cost("arithmetic-float", element=elements)
    kernel = _element_wise_kernel(node.op_type, how)
    return kernel_cost(kernel, element=elements) if kernel else 0.0


def _element_wise_kernel(op_type: str, how: str) -> str | None:
    if op_type in ("MaxPool", "GlobalAveragePool"):  # with channels last
        return f"arithmetic-{how}"
    if op_type == "AveragePool":
        return f"pool-{how}"
    if op_type == "Transpose":
        return f"transpose-{how}"
    if op_type in _SPECIAL:
        return f"lookup-{how}"
    return f"arithmetic-{how}" if op_type in _LIGHT else None


def _follows_convolution(node: ir.Node) -> bool:
    return node.inputs[0] is not None and qgraph.ir.is_op(node.inputs[0].producer(), "Conv", "Gemm")


def _convolution(node: ir.Node, how: str) -> float:
    weight, result = _dims(node.inputs[1]), _dims(node.outputs[0])
    if not weight or not result:
        return 0.0
    filters, group = weight[0], node.attributes.get_int("group", 1)
    channels, taps = weight[1] * group, math.prod(weight[2:])
    pixels = math.prod(result) // max(1, filters)
    parts = {
        "tap": pixels * taps,
        "multiply_add": pixels * taps * filters * weight[1],
        "output": pixels * filters,
    }
    kernel = _float_kernel(channels, group) if how == "float" else _integer_kernel(channels, filters, group)
    cost = kernel_cost(f"{kernel}-{how}", **parts)
    if how == "float" and kernel in ("convolution", "depthwise") and not _stays_blocked(node):
        cost += kernel_cost("reorder", element=_elements(node.inputs[0]))
    return cost


def _float_kernel(channels: int, group: int) -> str:
    if group > 1:
        return ("depthwise" if channels % _QUAD == 0 else "odd-depthwise") if group == channels else "grouped"
    if channels < _BLOCK:
        return "first-convolution"
    return "convolution" if channels % _QUAD == 0 else "odd-convolution"


def _integer_kernel(channels: int, filters: int, group: int) -> str:
    if group > 1:
        return ("depthwise" if channels % _BLOCK == 0 else "odd-depthwise") if group == channels else "grouped"
    if channels < _BLOCK and channels % _QUAD:
        return "first-convolution"
    aligned = channels % _QUAD == 0 and filters % _QUAD == 0 and filters >= _BLOCK
    return "convolution" if aligned else "odd-convolution"


def _stays_blocked(node: ir.Node) -> bool:
    """Tell whether what a float convolution reads comes in the blocked layout of float convolutions."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return qgraph.ir.is_op(producer, "Conv", "Relu", "Clip", "Add", "MaxPool", "AveragePool", "Sigmoid")


def _product(node: ir.Node, how: str) -> float:
    left, right, result = (_dims(value) for value in (node.inputs[0], node.inputs[1], node.outputs[0]))
    if not left or not right or not result:
        return 0.0
    inner = left[-1]
    parts = {
        "multiply_add": math.prod(result) * inner,
        "weight": math.prod(right) if is_constant(node.inputs[1]) else 0,
        "input": math.prod(left),
        "output": math.prod(result),
    }
    return kernel_cost(f"product-{how}", **parts)


def kernel_cost(kernel: str, **parts: float) -> float:
    """Return the nanoseconds of a kernel of the table that does so much of each of its parts."""
    costs = table()[kernel]
    return costs["start"] + sum(costs[part] * amount for part, amount in parts.items())


def _elements(value: ir.Value | None) -> int:
    return math.prod(_dims(value)) if value is not None and _dims(value) else 0


def _dims(value: ir.Value | None) -> tuple[int, ...]:
    """Return the sizes of a value's axes; () where its shape is not known."""
    if value is None or value.shape is None:
        return ()
    return tuple(
        axis if isinstance(axis, int) else OTHER_AXES if place else FIRST_AXIS for place, axis in enumerate(value.shape)
    )
