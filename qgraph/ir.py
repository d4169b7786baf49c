"""The model in memory: a thin facade over onnx_ir for what every pass needs.

Loading maps weights instead of reading them; saving streams lazy tensors to the file one by one. Nothing here
assumes that a model fits in one protobuf.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qgraph import onnx_file, signatures
from qgraph.errors import UserError, nearest
from qgraph.onnx_file import MappedTensor, forget_pages

__all__ = [
    "all_graphs",
    "bypass",
    "check",
    "constant",
    "count_nodes",
    "data_files",
    "discard",
    "forget_names",
    "forget_pages",
    "fresh_name",
    "initializer",
    "inner_graphs",
    "insert_before",
    "is_op",
    "lazy",
    "load",
    "node_label",
    "only_consumer",
    "parameter_count",
    "replace_node",
    "save",
    "set_input_shape",
    "walk",
    "weight_bytes",
]

EXTERNAL_ABOVE = 256 * 1024 * 1024
"""Models with more weight bytes than this are saved with their weights in a file beside the graph."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load an ONNX model; weights stay in their file, mapped, until something reads them.

    IR versions from 3 and every opset that the installed onnx knows. Nodes out of order are sorted, and names in
    subgraphs that hide a name outside are changed.

    Raises:
        UserError: the file is missing, is not ONNX, is truncated or inconsistent, is of a version that is not known,
            or its external data are missing, truncated or lie outside its folder.
    """
    path = Path(path)
    model = onnx_file.read(path)
    _rename_hidden(model.graph, model.graph, set())
    forget_names(model)
    problem = check(model)
    if problem is not None:
        try:
            model.graph.sort()
        except ValueError:
            problem = f"its nodes form a cycle: {problem}"
        else:
            problem = check(model)
    problem = problem or next(signatures.problems(model), None)
    if problem is not None:
        raise UserError(f"{path} is invalid: {problem}")
    return model


def _rename_hidden(graph: ir.Graph, main: ir.Graph, outside: set[str]) -> None:
    """Rename what a subgraph defines under a name of an enclosing graph, so that values may be moved between them."""
    nested = [inner for node in graph for inner in inner_graphs(node)]
    if not nested and not outside:
        return
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.name in outside:
            value.name = fresh_name(main, value.name)
    own = {value.name for value in values if value.name} - outside
    outside |= own
    for inner in nested:
        _rename_hidden(inner, main, outside)
    outside -= own


def save(model: ir.Model, path: str | os.PathLike[str], *, external_above: int = EXTERNAL_ABOVE) -> None:
    """Save `model` to `path`; above `external_above` bytes of weights, these go to `path` + '.data' beside it.

    Tensors are computed and written one by one. The files appear whole or not at all, and may replace those that
    the model was loaded from.

    Raises:
        UserError: a file cannot be written, for instance because the disk is full.
    """
    onnx_file.write(model, Path(path), external_above)


def data_files(model: ir.Model) -> list[Path]:
    """Return the files beside the model file that hold weights of `model` as it was loaded, sorted."""
    tensors = (value.const_value for graph in all_graphs(model) for value in graph.initializers.values())
    return sorted({tensor.path for tensor in tensors if isinstance(tensor, MappedTensor) and tensor.external})


def set_input_shape(model: ir.Model, name: str, dims: Sequence[int]) -> None:
    """Fix the shape of a graph input, such as [1, 3, 224, 224].

    A symbolic dimension that gets a size gets it in every input and output of the graph. What was known of
    intermediate shapes in terms of it is forgotten, for `infer-shapes` to find again.

    Raises:
        UserError: there is no such input, it is no tensor, its rank differs, or it already has another size.
    """
    inputs = {value.name or "": value for value in model.graph.inputs if value.const_value is None}
    if name not in inputs:
        raise UserError(f"the model has no input '{name}'.{nearest(name, inputs)} It has: {', '.join(inputs)}.")
    value = inputs[name]
    if not isinstance(value.type, ir.TensorType):
        raise UserError(f"input '{name}' is not a tensor, so it has no shape to fix")
    if any(dim < 0 for dim in dims):
        raise UserError(f"the shape {_text(dims)} for input '{name}' has a negative size")
    known: Sequence[int | ir.SymbolicDim] = (
        list(value.shape) if value.shape is not None else [ir.SymbolicDim(None)] * len(dims)
    )
    if len(known) != len(dims):
        raise UserError(
            f"input '{name}' has {len(known)} dimensions {_text(known)}, but the shape {_text(dims)} has {len(dims)}"
        )
    sizes: dict[str, int] = {}
    for before, after in zip(known, dims, strict=True):
        fixed = before if isinstance(before, int) else sizes.get(before.value or "")
        if fixed is not None and fixed != after:
            raise UserError(f"input '{name}' is {_text(known)} in the model, which {_text(dims)} contradicts")
        if not isinstance(before, int) and before.value:
            sizes[before.value] = after
    value.shape = ir.Shape(dims)
    _substitute(model, sizes)


def _text(dims: Sequence[int | ir.SymbolicDim]) -> str:
    return f"[{','.join(str(dim) for dim in dims)}]"


def _substitute(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Put sizes for symbols into every shape; a dimension that only contains such a symbol becomes unknown."""
    if not sizes:
        return
    contains = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sizes))})(?!\w)")

    def dimension(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dim, int) or dim.value is None:
            return dim
        if dim.value in sizes:
            return sizes[dim.value]
        return ir.SymbolicDim(None) if contains.search(dim.value) else dim

    for graph in all_graphs(model):
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None and not value.shape.is_static():
                value.shape = ir.Shape([dimension(dim) for dim in value.shape])


def weight_bytes(model: ir.Model) -> int:
    """Return the number of bytes of all initializers, those of subgraphs included."""
    return sum(
        value.const_value.nbytes
        for graph in all_graphs(model)
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def parameter_count(model: ir.Model) -> int:
    """Return the number of elements of the initializers of the main graph, packed ones as they are stored."""
    return sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the main graph and every subgraph (of If, Loop, Scan), outer before inner; not model-local functions."""
    yield model.graph
    yield from model.graph.subgraphs()


def inner_graphs(node: ir.Node) -> list[ir.Graph]:
    """Return the graphs that the attributes of an If, Loop, Scan or the like hold."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs


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


def only_consumer(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads `value`, once; None if it is read elsewhere too or is a graph output."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


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
    """Return `base`, or `base` with the first number that makes it unlike every value's and node's name in `graph`.

    Names are also kept apart from those of enclosing and nested graphs by passing the main graph.
    """
    taken = graph.meta.get("qgraph.names")
    if taken is None:
        taken = {value.name for node in graph.all_nodes() for value in node.outputs}
        taken |= {node.name for node in graph.all_nodes()}
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


def replace_node(old: ir.Node, new: ir.Node | list[ir.Node], outputs: Sequence[ir.Value | None] | None = None) -> None:
    """Put `new` in the place of `old`; its outputs (default: the last new node's) take over names and consumers.

    An output that nobody reads may have None in its place. Graph outputs keep their names, types and shapes.
    """
    nodes = new if isinstance(new, list) else [new]
    replacements = nodes[-1].outputs if outputs is None else outputs
    graph = old.graph
    if graph is None:
        raise ValueError(f"{node_label(old)} is in no graph")
    graph.insert_before(old, nodes)
    for before, after in zip(old.outputs, replacements, strict=False):
        if after is None:
            continue
        if after.type is None:
            after.type = before.type
        if after.shape is None:
            after.shape = before.shape
        name = before.name
        before.name = None
        after.name = name
        before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def bypass(node: ir.Node, value: ir.Value) -> bool:
    """Let `value` take the place of the only used output of `node`, and remove the node; tell whether it was possible.

    A graph output keeps its name, type and shape: `value` takes them over. This is not possible, and nothing is
    changed, if `value` is an input, an initializer, another graph output, or of an enclosing graph.
    """
    output = node.outputs[0]
    if output.is_graph_output():
        producer = value.producer()
        if producer is None or producer.graph is not node.graph or value.is_graph_output():
            return False
        name, output.name = output.name, None
        value.name, value.type, value.shape = name, output.type or value.type, output.shape or value.shape
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    discard(node)
    return True


def discard(node: ir.Node) -> None:
    """Remove a node whose outputs nobody reads, and what its subgraphs read from outside."""
    for graph in inner_graphs(node):
        for inner in graph.all_nodes():
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
    if node.graph is None:
        raise ValueError(f"{node_label(node)} is in no graph")
    node.graph.remove(node, safe=True)


def lazy(function: Callable[[], np.ndarray], dtype: ir.DataType, shape: Sequence[int]) -> ir.LazyTensor:
    """Return a tensor that `function` computes when it is read or written, each time anew."""

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(function()), dtype=dtype)

    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape))


def check(model: ir.Model) -> str | None:
    """Return what is wrong with the structure of `model`, or None.

    Checks in time linear in the graph: every value that is read is defined before, in this graph or an enclosing
    one, and its name means no other value there; names are unique in their graph; every operator's domain is
    imported; initializers have data; graph outputs exist. Types and shapes are not checked.
    """
    return next(_problems(model), None)


def _problems(model: ir.Model) -> Iterator[str]:
    yield from _Checker(model.graph.opset_imports).graph(model.graph)
    for function in model.functions.values():
        yield from _Checker(function.opset_imports).graph(function.graph)


class _Checker:
    """Walks a graph and its subgraphs, knowing what every name means at the place where it is."""

    def __init__(self, opset_imports: Mapping[str, int]) -> None:
        self.domains = {"" if domain == "ai.onnx" else domain for domain in opset_imports}
        self.scope: dict[str, ir.Value] = {}

    def graph(self, graph: ir.Graph) -> Iterator[str]:
        outside: dict[str, ir.Value | None] = {}
        for value in graph.inputs:
            yield from self.define(value, outside, "as an input of the graph")
        for value in graph.initializers.values():
            if value.const_value is None:
                yield f"the initializer '{value.name}' has no data"
            if not self.means(value):
                yield from self.define(value, outside, "as an initializer")
        for node in graph:
            yield from self.node(node)
            for value in node.outputs:
                yield from self.define(value, outside, f"by {_described(node)}")
        for value in graph.outputs:
            if not self.means(value):
                yield f"graph output '{value.name}' is not produced by any node"
        self.leave(outside)

    def node(self, node: ir.Node) -> Iterator[str]:
        if not all(_is_text(text) for text in (node.op_type, node.name or "", node.domain)):
            yield f"the name or operator of node {node.name or node.op_type!r} is no text"
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain not in self.domains:
            yield f"{_described(node)} is of domain '{domain}', which the model does not import"
        for value in node.inputs:
            if value is None or self.means(value):
                continue
            if value.name in self.scope:
                yield f"{_described(node)} reads '{value.name}', which here means another value of that name"
            else:
                yield f"{_described(node)} reads '{value.name}', which nothing before it defines"
        for graph in inner_graphs(node):
            yield from self.graph(graph)

    def means(self, value: ir.Value) -> bool:
        return self.scope.get(value.name or "") is value

    def define(self, value: ir.Value, outside: dict[str, ir.Value | None], where: str) -> Iterator[str]:
        """Note what the name means from here on, and in `outside` what it meant before this graph."""
        if not value.name:
            return
        if not _is_text(value.name):
            yield f"the name {value.name!r} is no text ({where})"
        if value.name in outside:
            yield f"the name '{value.name}' is defined twice (again {where})"
        outside[value.name] = self.scope.get(value.name)
        self.scope[value.name] = value

    def leave(self, outside: Mapping[str, ir.Value | None]) -> None:
        for name, before in outside.items():
            if before is None:
                del self.scope[name]
            else:
                self.scope[name] = before


def _is_text(name: object) -> bool:
    """Tell whether a name is text: protobuf hands on bytes where a file holds no valid UTF-8."""
    return isinstance(name, str)


def _described(node: ir.Node) -> str:
    return f"node '{node_label(node)}' ({node.op_type})"
