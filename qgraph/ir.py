"""The model in memory: a thin facade over onnx_ir for what every pass needs.

Loading maps weights instead of reading them; saving streams lazy tensors to the file one by one. Nothing here
assumes that a model fits in one protobuf.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qgraph.errors import UserError

__all__ = [
    "all_graphs",
    "check",
    "constant",
    "count_nodes",
    "forget_names",
    "fresh_name",
    "initializer",
    "insert_before",
    "is_op",
    "load",
    "node_label",
    "replace_node",
    "save",
    "walk",
    "weight_bytes",
]

EXTERNAL_ABOVE = 256 * 1024 * 1024
"""Models with more weight bytes than this are saved with their weights in a file beside the graph."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load an ONNX model; weights stay memory-mapped until something reads them.

    Raises:
        UserError: the file is missing, is not ONNX, is truncated, or its external data are missing or lie
            outside its folder.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        return ir.load(path)
    except Exception as error:
        raise UserError(f"{path} is not a valid ONNX model: {error}") from error


def save(model: ir.Model, path: str | os.PathLike[str], *, external_above: int = EXTERNAL_ABOVE) -> None:
    """Save `model` to `path`; above `external_above` bytes of weights, these go to `path` + '.data' beside it.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    try:
        if weight_bytes(model) > external_above:
            ir.save(model, path, external_data=path.name + ".data")
        else:
            ir.save(model, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def weight_bytes(model: ir.Model) -> int:
    """Return the number of bytes of all initializers, those of subgraphs included."""
    return sum(
        value.const_value.nbytes
        for graph in all_graphs(model)
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the main graph and every subgraph (of If, Loop, Scan), outer before inner; not model-local functions."""
    yield model.graph
    yield from model.graph.subgraphs()


def walk(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node of the main graph and of its subgraphs, in topological order, a node before its subgraphs.

    Nodes may be replaced or removed while walking.
    """
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def count_nodes(model: ir.Model) -> int:
    """Return the number of nodes of the main graph, its subgraphs and the model-local functions."""
    return sum(1 for _ in walk(model)) + sum(
        1 for function in model.functions.values() for _ in ir.traversal.RecursiveGraphIterator(function)
    )


def node_label(node: ir.Node) -> str:
    """Return the node's name, or its operator and first output when it has none."""
    if node.name:
        return node.name
    return f"{node.op_type}->{node.outputs[0].name}" if node.outputs else node.op_type


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Tell whether `node` is one of the operators `op_types` of `domain`."""
    return node is not None and node.op_type in op_types and (node.domain or "") in (domain, domain or "ai.onnx")


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a constant value (an initializer that is no graph input, or a Constant node's output).

    Returns None for None, for values computed at run time and for initializers that a caller may override because
    they are graph inputs too.
    """
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def fresh_name(graph: ir.Graph, base: str) -> str:
    """Return `base`, or `base` with the first number that makes it unlike every value's name in `graph`.

    Names are also kept apart from those of enclosing and nested graphs by passing the main graph.
    """
    taken = graph.meta.get("qgraph.names")
    if taken is None:
        taken = {value.name for node in graph.all_nodes() for value in node.outputs}
        taken |= {value.name for value in graph.inputs}
        for inner in (graph, *graph.subgraphs()):
            taken |= set(inner.initializers)
            taken |= {value.name for value in inner.inputs}
        graph.meta["qgraph.names"] = taken
    name, number = base, 1
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    taken.add(name)
    return name


def forget_names(model: ir.Model) -> None:
    """Drop what `fresh_name` remembers, after somebody else may have named values."""
    model.graph.meta.pop("qgraph.names", None)


def initializer(graph: ir.Graph, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Add an initializer under `name`, or the nearest free name, and return its value.

    Args:
        graph: the main graph; subgraphs see its initializers too.
        name: the wished name; nothing is ever overwritten.
        array: the data, or a (lazy) tensor.
    """
    unique = fresh_name(graph, name)
    tensor = ir.tensor(array, name=unique) if isinstance(array, np.ndarray) else array
    tensor.name = unique
    value = ir.Value(
        name=unique, shape=ir.Shape(tuple(tensor.shape.numpy())), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def insert_before(node: ir.Node, *new: ir.Node) -> None:
    """Insert nodes before `node` in its graph, in the order given."""
    graph = node.graph
    if graph is None:
        raise ValueError(f"{node_label(node)} is in no graph")
    graph.insert_before(node, new)


def replace_node(old: ir.Node, new: ir.Node | list[ir.Node], outputs: list[ir.Value] | None = None) -> None:
    """Put `new` in the place of `old`; its outputs (default: the last new node's) take over names and consumers.

    Graph outputs keep their names, types and shapes.
    """
    nodes = new if isinstance(new, list) else [new]
    replacements = list(nodes[-1].outputs) if outputs is None else outputs
    graph = old.graph
    if graph is None:
        raise ValueError(f"{node_label(old)} is in no graph")
    graph.insert_before(old, nodes)
    for before, after in zip(old.outputs, replacements, strict=False):
        if after.type is None:
            after.type = before.type
        if after.shape is None:
            after.shape = before.shape
        name = before.name
        before.name = None
        after.name = name
        before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def check(model: ir.Model) -> str | None:
    """Return what is wrong with the structure of `model`, or None.

    Checks in time linear in the graph: every value that is read is defined before, in this graph or an enclosing
    one; names of values and nodes' outputs are unique; every operator's domain is imported; graph outputs exist.
    Types and shapes are not checked.
    """
    domains = {domain or "" for domain in model.graph.opset_imports} | {""}
    return _check_graph(model.graph, set(), domains)


def _check_graph(graph: ir.Graph, visible: set[ir.Value], domains: set[str]) -> str | None:
    defined = visible | set(graph.inputs) | set(graph.initializers.values())
    names: set[str | None] = {value.name for value in graph.inputs} | set(graph.initializers)
    for node in graph:
        domain = node.domain if node.domain != "ai.onnx" else ""
        if domain not in domains:
            return (
                f"node '{node_label(node)}' ({node.op_type}) is of domain '{domain}', which the model does not import"
            )
        for value in node.inputs:
            if value is not None and value not in defined:
                return (
                    f"node '{node_label(node)}' ({node.op_type}) reads '{value.name}', which nothing before it defines"
                )
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            inner_graphs = (
                [attribute.as_graph()]
                if attribute.type == ir.AttributeType.GRAPH
                else list(attribute.as_graphs())
                if attribute.type == ir.AttributeType.GRAPHS
                else []
            )
            for inner in inner_graphs:
                problem = _check_graph(inner, defined, domains)
                if problem is not None:
                    return problem
        for value in node.outputs:
            if value.name and value.name in names:
                return f"the name '{value.name}' is defined twice (node '{node_label(node)}', {node.op_type})"
            names.add(value.name)
            defined.add(value)
    for value in graph.outputs:
        if value not in defined:
            return f"graph output '{value.name}' is not produced by any node"
    return None
