"""The placement of a model in ONNX Runtime: read off the graph that it really runs, and off the profile of a run."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

import qgraph.ir
from qgraph import capabilities
from qgraph.analysis.expected_placement import multiplies_in_integers
from qgraph.analysis.kernel_arithmetic import COMPUTE, MOVES, arithmetic, family
from qgraph.analysis.kernel_constraints import type_name
from qgraph.capabilities import Table, operator_name
from qgraph.pipeline import Feeds
from qgraph.runtime.placement import DEQUANTIZED, PlacedNode, Placement
from qgraph.runtime.session import CPU_PROVIDER, open_session

__all__ = ["CPU_TABLE", "Executed", "executed_nodes", "named", "read_placement"]

CPU_TABLE = "onnxruntime-cpu"
_NCHWC = "com.microsoft.nchwc"
_CAST = "InsertedPrecisionFreeCast_"
_FOLLOWING = ("Add", "Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh")
"""What the runtime takes into a float convolution before it."""
_DECORATION = re.compile(rf"^{_CAST}|(_token_\d+|_nchwc|/duplicated|_quant)+$")
"""What the runtime adds to the name of a node or value when it makes another node of it."""
_KERNEL_TIME = "_kernel_time"


class Executed(NamedTuple):
    """A node of which a run has told.

    Attributes:
        name: as in the placement; '' for one that the runtime has no name for.
        op_type: of the kernel, without its domain.
        provider: that ran it.
        types: of the tensors that it read, then of those that it wrote.
    """

    name: str
    op_type: str
    provider: str
    types: tuple[str, ...]


def read_placement(model: Path, *, provider: str = CPU_PROVIDER) -> Placement:
    """Return the placement of a model where one provider runs all of it.

    Args:
        model: an ONNX file.
        provider: of ONNX Runtime.

    Raises:
        UserError: ONNX Runtime is not installed, or refuses the model.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
        optimised = Path(scratch) / "optimised.onnx"
        model = named(model, Path(scratch))
        open_session(model, optimised_path=optimised, providers=[provider])
        runs, source = qgraph.ir.load(optimised), qgraph.ir.load(model)
        types = _types(runs)
        covered = _covered(runs, source)
        table = capabilities.table(CPU_TABLE)
        nodes = [_placed(node, provider, types, covered, table) for node in qgraph.ir.walk(runs)]
    return Placement(tuple(nodes), f"ONNX Runtime {onnxruntime.__version__}")


def named(model: Path, scratch: Path) -> Path:
    """Return a model whose nodes all have names, by which alone those that run can be told: a copy if need be."""
    loaded = qgraph.ir.load(model)
    unnamed = [node for node in qgraph.ir.walk(loaded) if not node.name]
    if not unnamed:
        return model
    for node in unnamed:
        node.name = qgraph.ir.fresh_name(loaded.graph, qgraph.ir.node_label(node))
    qgraph.ir.save(loaded, scratch / "named.onnx")
    return scratch / "named.onnx"


def _placed(
    node: ir.Node,
    provider: str,
    types: Mapping[ir.Value, str],
    covered: Mapping[ir.Node, Sequence[ir.Node]],
    table: Table,
) -> PlacedNode:
    kernel = operator_name(node.domain, node.op_type)
    inputs = tuple(types.get(value, "") for value in node.inputs if value is not None)
    outputs = tuple(types.get(value, "") for value in node.outputs if value.name)
    kind = arithmetic(kernel, (*inputs, *outputs), multiplies_in_integers(node, table))
    sources = tuple(map(qgraph.ir.node_label, covered.get(node, ())))
    remark = _why_float(node) if kind == "float" and kernel in COMPUTE else ""
    return PlacedNode(node.name or "", kernel, provider, kind, inputs, outputs, sources, remark)


def _why_float(node: ir.Node) -> str:
    if node.op_type.endswith("Attention"):
        return "it multiplies activations with activations"
    if any(_is_dequantized(value) for value in node.inputs[:2]):
        return DEQUANTIZED
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is not None and qgraph.ir.constant(weight) is None:
        return "its weight is computed, or both its operands are activations"
    return "its weight is stored in float"


def _is_dequantized(value: ir.Value | None) -> bool:
    """Tell whether a constant stands behind a DequantizeLinear, transposed or not."""
    node = value.producer() if value is not None else None
    if node is not None and qgraph.ir.is_op(node, "Transpose") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or not qgraph.ir.is_op(node, "DequantizeLinear"):
        return False
    return qgraph.ir.constant(node.inputs[0]) is not None


def _types(model: ir.Model) -> dict[ir.Value, str]:
    """Return the types of values; the runtime writes none of those that stay in its blocked form, which are float."""
    types: dict[ir.Value, str] = {}
    for graph in qgraph.ir.all_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            types[value] = _type_of(value)
    for node in qgraph.ir.walk(model):
        taken = [types.get(value, "") for value in node.inputs if value is not None]
        for value in node.outputs:
            types[value] = _type_of(value) or _type_after(node, taken)
    return types


def _type_after(node: ir.Node, taken: Sequence[str]) -> str:
    """Return the type that a node gives where the runtime does not write it."""
    if node.domain == _NCHWC:
        return "float32"
    if node.op_type == "DequantizeLinear" and len(taken) > 1:
        return taken[1]
    return next(filter(None, taken), "")


def _type_of(value: ir.Value) -> str:
    if value.const_value is not None:
        return type_name(ir.TensorType(value.const_value.dtype)) or ""
    return type_name(value.type) or ""


def _covered(runs: ir.Model, source: ir.Model) -> dict[ir.Node, list[ir.Node]]:
    """Return for each node that runs those of the source that it stands for.

    A node that runs computes a value of the source's name, or has a name that was made of one; it stands for the node
    that is named there and all before it, up to what other nodes that run stand for. A convolution stands for what
    follows it too, where that runs nowhere else: additions and activations.
    """
    nodes = {node.name: node for node in qgraph.ir.walk(source) if node.name}
    makers = {value.name: node for node in qgraph.ir.walk(source) for value in node.outputs if value.name}
    anchors = {node: list(_anchors(node, nodes, makers)) for node in qgraph.ir.walk(runs)}
    taken = {one for found in anchors.values() for one in found}
    for node in reversed(anchors):
        if not anchors[node] and operator_name(node.domain, node.op_type) not in MOVES:
            anchors[node] = [one for one in _asked_for(node, anchors, makers) if one not in taken]
            taken.update(anchors[node])
    for node, found in anchors.items():
        if family(operator_name(node.domain, node.op_type)) == "Conv":
            found += list(_following(found, taken))
            taken.update(found)
    order = {node: index for index, node in enumerate(qgraph.ir.walk(source))}
    return {node: sorted(_behind(found, taken), key=order.__getitem__) for node, found in anchors.items() if found}


def _anchors(node: ir.Node, nodes: Mapping[str, ir.Node], makers: Mapping[str, ir.Node]) -> Iterator[ir.Node]:
    if _is_layout(node) or (node.op_type == "Cast" and (node.name or "").startswith(_CAST)):
        return
    values = [makers[name] for value in node.outputs if (name := (value.name or "").removeprefix(_CAST)) in makers]
    if values:
        yield from dict.fromkeys(values)
        return
    name = node.name or ""
    while name:
        found = nodes.get(name) or makers.get(name)
        if found is not None:
            yield found
            return
        shorter = _DECORATION.sub("", name)
        if shorter == name:
            return
        name = shorter


def _is_layout(node: ir.Node) -> bool:
    return node.domain == _NCHWC and node.op_type.startswith("Reorder")


def _asked_for(
    node: ir.Node, anchors: Mapping[ir.Node, Sequence[ir.Node]], makers: Mapping[str, ir.Node]
) -> Iterator[ir.Node]:
    """Yield the nodes of the source whose values a node must compute, by what reads its own."""
    for value in node.outputs:
        for use in value.uses():
            reader = use.node
            if _is_layout(reader):
                yield from (makers[one.name] for one in reader.outputs if one.name and one.name in makers)
            for anchor in anchors[reader]:
                wanted = anchor.inputs[use.idx] if use.idx < len(anchor.inputs) else None
                maker = wanted.producer() if wanted is not None else None
                if maker is not None:
                    yield maker


def _following(found: Sequence[ir.Node], taken: set[ir.Node]) -> Iterator[ir.Node]:
    """Yield the additions and activations behind a layer that no other kernel stands for."""
    node = found[0] if len(found) == 1 else None
    while node is not None:
        uses = node.outputs[0].uses()
        node = next(iter(uses)).node if len(uses) == 1 else None
        if node in taken or not qgraph.ir.is_op(node, *_FOLLOWING):
            return
        if node is not None:
            yield node


def _behind(found: Iterable[ir.Node], taken: set[ir.Node]) -> set[ir.Node]:
    """Return nodes and what they read, up to those in `taken`."""
    reached = set(found)
    waiting = list(reached)
    while waiting:
        for value in waiting.pop().inputs:
            node = value.producer() if value is not None else None
            if node is not None and node not in taken and node not in reached:
                reached.add(node)
                waiting.append(node)
    return reached


def executed_nodes(model: Path, feeds: Feeds, *, provider: str = CPU_PROVIDER) -> list[Executed]:
    """Run a model once, and return what its profile tells of each node, in the order of the run.

    Raises:
        UserError: ONNX Runtime is not installed, or refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
        session = open_session(model, providers=[provider], profile=Path(scratch) / "profile")
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [_executed(event) for event in events if event["name"].endswith(_KERNEL_TIME) and event["cat"] == "Node"]


def _executed(event: Mapping[str, object]) -> Executed:
    told = event["args"]
    assert isinstance(told, dict)
    shapes = [*told.get("input_type_shape", ()), *told.get("output_type_shape", ())]
    words = tuple(_profile_type(word) for one in shapes for word in one)
    name = str(event["name"]).removesuffix(_KERNEL_TIME)
    return Executed(name, str(told["op_name"]), str(told["provider"]), words)


def _profile_type(word: str) -> str:
    """Return a type of the profile as tables call it."""
    return {"float": "float32", "double": "float64"}.get(word, word)
