"""The parts of a graph that become integer arithmetic as a whole: one rounding for each, at its end.

    Conv -> Mul(c) -> Add(b) -> Relu            LAYER      an accumulator, then one rescaling that also clamps
    MatMul(a, b) -> Div(8)                      MATMUL     the same between two activations
    Add(Add(a, b), c)                           SUM        any number of addends
    x -> Div -> Erf -> Add -> Mul(x) -> Mul     TABLE      whatever is a function of one tensor, element by element
    ReduceMean(x * x) ... x / sqrt(...)         NORM       RMS normalization written out; LayerNormalization

Between units lie the tensors that integers must stand for; inside them nothing is rounded. A unit is found in a float
graph, where quantization is still to be put around it, and again in the graph that has DequantizeLinear before and
QuantizeLinear behind it.

What belongs to no unit (operators without an integer form, what subgraphs hold) is refused, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.elementwise import ELEMENTWISE
from qgraph.analysis.integer_forms import FLOATS, UNFIT_KEY, Form, Unit, computes_floats, is_float, real_outputs
from qgraph.analysis.integer_patterns import PATTERNS
from qgraph.analysis.integer_rules import is_constant, is_stored
from qgraph.analysis.integer_single import COMPARISONS, JOINERS, MOVERS, cast, comparison, joiner, mover
from qgraph.analysis.integer_tails import clamp_behind, follow_factors, follow_layer

__all__ = ["FLOATS", "MOVERS", "Form", "Unit", "Units", "computes_floats", "integer_units", "is_float", "layer_weight"]


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of a graph in topological order, and the nodes that belong to none, with the reason."""

    units: Sequence[Unit]
    refused: Mapping[ir.Node, str]


_REDUCTIONS = ("CumSum", "ReduceSum", "ReduceMean", "GlobalAveragePool")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MATRIX = 2


def layer_weight(node: ir.Node) -> tuple[int, ir.Value] | None:
    """Return position and value of the constant weight of a linear layer, or None if it has none."""
    for index in (1, 0) if node.op_type == "MatMul" else (1,):
        value = node.inputs[index]
        if value is not None and is_stored(value):
            return index, value
    return None


def integer_units(graph: ir.Graph) -> Units:
    """Cut the main graph into units.

    Args:
        graph: types must be known (`infer-shapes`); QuantizeLinear and DequantizeLinear bound units and are none.
    """
    ends: set[ir.Value] = set()
    while True:
        cutter = _Cutter(graph, ends)
        found = cutter.run()
        crossed = cutter.crossed()
        if not crossed:
            return found
        ends |= crossed


class _Cutter:
    """Goes over the nodes once; a node may take those behind it along, and functions of one tensor grow backwards.

    Args:
        graph: the main graph.
        ends: tensors through which no function of one tensor grows.
    """

    def __init__(self, graph: ir.Graph, ends: Set[ir.Value]) -> None:
        self._graph = graph
        self._ends = ends
        self._made: dict[ir.Value, Unit] = {}
        self._units: list[Unit] = []
        self._refused: dict[ir.Node, str] = {}
        self._taken: set[ir.Node] = set()
        self._root: dict[ir.Value, ir.Value] = {}
        self._order = {node: index for index, node in enumerate(graph)}

    def run(self) -> Units:
        for node in self._graph:
            if node not in self._taken and _touches_floats(node):
                self._visit(node)
        self._make_tables()
        self._units.sort(key=lambda unit: self._order[unit.nodes[-1]])
        return Units(self._units, self._refused)

    def _visit(self, node: ir.Node) -> None:
        if qgraph.ir.is_op(node, "QuantizeLinear", "DequantizeLinear"):
            return
        if node.domain not in ("", "ai.onnx"):
            self._refused[node] = f"{node.domain}.{node.op_type} is not an operator of ONNX"
            return
        other = _other_floats(node)
        if other is not None:
            self._refused[node] = f"it computes in {other.name.lower()}: only float32 has an integer form"
            return
        for pattern in PATTERNS:
            found = pattern(node)
            if found is not None and not self._taken.intersection(found.nodes):
                self._add(
                    Unit(Form(found.form), found.nodes[-1], self._sorted(found.nodes), found.sources, (found.result,))
                )
                return
        if self._grow(node):
            return
        unit = self._unit(node)
        if isinstance(unit, str):
            self._refused[node] = unit
        else:
            self._add(unit)

    def _add(self, unit: Unit) -> None:
        self._units.append(unit)
        self._taken.update(unit.nodes)

    # --- functions of one tensor --------------------------------------------------------------------------------------

    def _grow(self, node: ir.Node) -> bool:
        """Let a node join a function of one tensor, if it computes its result from one alone, element by element."""
        if node.op_type not in ELEMENTWISE or len(node.outputs) != 1:
            return False
        roots = set()
        for value in node.inputs:
            if value is None or _is_scalar(value):
                continue
            if is_constant(value):
                return False
            inside = value in self._root and value not in self._ends
            root = self._root[value] if inside else value
            if not inside and not is_float(value):
                return False
            roots.add(root)
        if len(roots) != 1 or (node.op_type == "Cast" and not _counts_elements(node)):
            return False
        self._root[node.outputs[0]] = roots.pop()
        self._taken.add(node)
        return True

    def _make_tables(self) -> None:
        """Make a unit of every function whose values somebody else reads."""
        wanted = {value for unit in self._units for value in (*unit.inputs, *unit.terms)}
        for value, root in self._root.items():
            readers = [use.node for use in value.uses()]
            outside = any(reader.graph is not self._graph or reader in self._refused for reader in readers)
            bounded = any(qgraph.ir.is_op(reader, "QuantizeLinear") for reader in readers)
            discrete = not is_float(value) and any(reader.outputs[0] not in self._root for reader in readers)
            if value in wanted or value.is_graph_output() or outside or bounded or discrete:
                path = self._path(root, value)
                unit = Unit(Form.TABLE, path[-1], path, (root,), (value,))
                self._units.append(unit)
                if value in wanted or value.is_graph_output() or outside or discrete:
                    self._made[value] = unit

    def crossed(self) -> set[ir.Value]:
        """Return the results of functions that others pass through: integers stand there, so those start from them."""
        tables = [unit for unit in self._units if unit.form is Form.TABLE]
        read = {value for unit in tables for node in unit.nodes for value in node.inputs if value not in unit.inputs}
        return {value for value in self._made if value in read}

    def _path(self, root: ir.Value, value: ir.Value) -> tuple[ir.Node, ...]:
        found: dict[ir.Node, None] = {}
        stack = [value]
        while stack:
            node = stack.pop().producer()
            if node is None or node in found:
                continue
            found[node] = None
            inner = (one for one in node.inputs if one is not None and one in self._root)
            stack += [one for one in inner if one is not root and one not in self._ends]
        return self._sorted(found)

    def _sorted(self, nodes: Iterable[ir.Node]) -> tuple[ir.Node, ...]:
        return tuple(sorted(nodes, key=self._order.__getitem__))

    # --- the other forms ----------------------------------------------------------------------------------------------

    def _unit(self, node: ir.Node) -> Unit | str:
        op_type = node.op_type
        if op_type in _LAYERS:
            return self._layer(node)
        if op_type in ("Add", "Sub"):
            return self._sum(node)
        if op_type in ("Mul", "Div"):
            return self._product(node)
        if op_type in MOVERS:
            return mover(node)
        if op_type in JOINERS:
            return joiner(node)
        if op_type in COMPARISONS:
            return comparison(node)
        if op_type == "Cast":
            return cast(node)
        single = {"AveragePool": Form.POOL, **dict.fromkeys(_REDUCTIONS, Form.REDUCE), "Softmax": Form.SOFTMAX,
                  "LayerNormalization": Form.NORM, "RMSNormalization": Form.NORM}  # fmt: skip
        form = single.get(op_type)
        if form is None:
            why = node.metadata_props.get(UNFIT_KEY)
            return f"{op_type} has no integer form" + (f" as it is used here: {why}" if why else "")
        if form is Form.NORM and any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            return "its mean or deviation is read"
        source = node.inputs[0]
        if source is None or is_constant(source):
            return "it reads only constants"
        return Unit(form, node, (node,), (source,), real_outputs(node)[:1])

    def _layer(self, node: ir.Node) -> Unit | str:
        weight = layer_weight(node)
        if weight is None:
            if node.op_type != "MatMul":
                return f"{node.op_type} with a computed weight has no integer form"
            left, right = node.inputs
            assert left is not None
            assert right is not None
            tail, nodes = follow_layer(node, per_channel=False)
            return Unit(Form.MATMUL, node, nodes, (left, right), tuple(nodes[-1].outputs), tail)
        index, _ = weight
        source = node.inputs[1 - index] if node.op_type == "MatMul" else node.inputs[0]
        if source is None or is_constant(source):
            return "it reads only constants"
        if node.op_type == "ConvTranspose":
            return "ConvTranspose has an integer form only where it was written as Conv (shapes must be known)"
        if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) != 0:
            return "it transposes its left operand (transA)"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and qgraph.ir.constant(bias) is None and not is_stored(bias):
            return "its bias is computed at run time"
        tail, nodes = follow_layer(node, per_channel=index == 1)
        return Unit(Form.LAYER, node, nodes, (source,), tuple(nodes[-1].outputs), tail)

    def _sum(self, node: ir.Node) -> Unit | str:
        """Collect the addends of a sum of sums, of which `node` is the first; each other one reads the one before."""
        left, right = node.inputs
        assert left is not None
        assert right is not None
        terms = [(left, 1), (right, 1 if node.op_type == "Add" else -1)]
        nodes = [node]
        while (after := self._next_sum(nodes[-1])) is not None:
            position = 0 if after.inputs[0] is nodes[-1].outputs[0] else 1
            rest = after.inputs[1 - position]
            assert rest is not None
            negative = after.op_type == "Sub"
            terms = [(value, -sign if negative and position == 1 else sign) for value, sign in terms]
            terms.append((rest, -1 if negative and position == 0 else 1))
            nodes.append(after)
        dynamic = tuple(dict.fromkeys(value for value, _ in terms if not is_stored(value)))
        if not dynamic:
            return "it reads only constants"
        values, signs = zip(*terms, strict=True)
        tail, rest_nodes = follow_factors(nodes[-1])
        inside = (*nodes, *rest_nodes)
        return Unit(Form.SUM, nodes[-1], inside, dynamic, tuple(inside[-1].outputs), tail, signs, values)

    def _next_sum(self, node: ir.Node) -> ir.Node | None:
        after = qgraph.ir.only_consumer(node.outputs[0])
        if after is None or after in self._taken or after.graph is not self._graph:
            return None
        return after if qgraph.ir.is_op(after, "Add", "Sub") else None

    def _product(self, node: ir.Node) -> Unit | str:
        left, right = node.inputs
        assert left is not None
        assert right is not None
        dynamic = tuple(dict.fromkeys(value for value in (left, right) if not is_stored(value)))
        if not dynamic:
            return "it reads only constants"
        form = Form.PRODUCT
        if node.op_type == "Div":
            if is_stored(right) and not np.all(_array(right)):
                return "it divides by zero"
            form = Form.PRODUCT if is_stored(right) else Form.QUOTIENT
        tail, rest = clamp_behind(node)
        nodes = (node, *rest)
        return Unit(form, node, nodes, dynamic, tuple(nodes[-1].outputs), tail, terms=(left, right))


def _touches_floats(node: ir.Node) -> bool:
    values = (*node.inputs, *node.outputs)
    return any(value is not None and (value.dtype in FLOATS) for value in values)


def _other_floats(node: ir.Node) -> ir.DataType | None:
    """Return the type of floats other than float32 that a node reads or makes, if any."""
    kinds = (value.dtype for value in (*node.inputs, *node.outputs) if value is not None)
    return next((kind for kind in kinds if kind in FLOATS and kind is not ir.DataType.FLOAT), None)


def _is_scalar(value: ir.Value) -> bool:
    array = qgraph.ir.constant(value)
    return array is not None and array.size == 1 and array.ndim <= 1


def _counts_elements(node: ir.Node) -> bool:
    """Tell whether a Cast makes truth values, floats, or whole numbers of elements rather than of sizes.

    Sizes that are computed in float must stay exact; these are numbers, or lists of numbers.
    """
    value = node.outputs[0]
    sizes = value.shape is None or len(value.shape) < _MATRIX
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.BOOL) or not sizes


def _array(value: ir.Value) -> np.ndarray:
    array = qgraph.ir.constant(value)
    return np.ones(()) if array is None else array
