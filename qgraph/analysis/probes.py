"""Copies of a graph that give other outputs than the model: tensors inside it, their sizes, or reductions of them.

Weights that lie in a file beside the model are mapped from there by ONNX Runtime, others are handed over as arrays. So
models of more than 2 GB work, nothing is written to disk, and the graph that is serialized has a few bytes for each
node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

import qgraph.ir
from qgraph.errors import UserError
from qgraph.lazy_tensors import evaluated
from qgraph.onnx_file import MappedTensor
from qgraph.pipeline import Feeds

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "AddOutputs",
    "Kind",
    "Probe",
    "describe",
    "first_line",
    "inner_values",
    "kinds",
    "main_values",
    "raw_outputs",
    "size_outputs",
]

AddOutputs = Callable[[ir.Model, Mapping[str, ir.Value]], list[ir.Value]]
"""Adds nodes to the copy of a model, whose values it gets by name, and returns the values to put out."""

_INLINE_BELOW = 1024
_FATAL_ONLY = 4
_FLOAT8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
_NUMBERS = {
    "float": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "double": ir.DataType.DOUBLE,
}


class Kind(NamedTuple):
    """What is known of a value before the model runs.

    Attributes:
        dtype: its element type when that is a floating-point number, else None.
        text: its type in words.
        shape: None when not even the rank is known; an axis is a number, the name of a dynamic one, or None.
    """

    dtype: ir.DataType | None
    text: str
    shape: tuple[int | str | None, ...] | None


def main_values(model: ir.Model) -> dict[str, ir.Value]:
    """Return the named values of the main graph in topological order: inputs, initializers, outputs of nodes."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return {value.name: value for value in values if value.name}


def inner_values(model: ir.Model) -> dict[str, ir.Node]:
    """Return the names of the values inside subgraphs, each with the node of the main graph that holds it."""
    found: dict[str, ir.Node] = {}
    for outer in model.graph:
        for graph in _graphs(outer):
            for node in ir.traversal.RecursiveGraphIterator(graph):
                found.update({value.name: outer for value in node.outputs if value.name})
    return found


def _graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def raw_outputs(names: Sequence[str]) -> AddOutputs:
    """Put out the tensors `names` themselves."""

    def add(model: ir.Model, values: Mapping[str, ir.Value]) -> list[ir.Value]:
        del model
        return [values[name] for name in names]

    return add


def size_outputs(names: Sequence[str]) -> AddOutputs:
    """Put out the number of elements of each of the tensors `names`, int64."""

    def add(model: ir.Model, values: Mapping[str, ir.Value]) -> list[ir.Value]:
        nodes = [ir.node("Size", [values[name]]) for name in names]
        for number, node in enumerate(nodes):
            node.outputs[0].name = f"qgraph.size.{number}"
        model.graph.extend(nodes)
        return [node.outputs[0] for node in nodes]

    return add


class Probe:
    """A session of a copy of `model` whose outputs are what `add` says; the rest of the graph is cut off.

    Args:
        model: is not changed, unless it is `owned`.
        add: chooses the outputs.
        fed: names of the arrays in the feeds. An initializer that is also an input stays one only if it is fed:
            as a constant it runs faster.
        threads: 0 lets the runtime choose.
        optimise: let the runtime rewrite the graph.
        owned: `model` was made for this and may be changed, which saves the copy.

    Raises:
        UserError: ONNX Runtime is not installed or refuses the model.
    """

    def __init__(
        self,
        model: ir.Model,
        add: AddOutputs,
        fed: frozenset[str],
        *,
        threads: int = 0,
        optimise: bool = True,
        owned: bool = False,
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError("running a model needs ONNX Runtime: pip install 'qgraph-compiler[cpu]'") from None
        copy = model if owned else model.clone()
        copy.ir_version = max(copy.ir_version, 8)  # older ones want every initializer to be an input
        graph = copy.graph
        outputs = add(copy, main_values(copy))
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        kept = [value for value in graph.inputs if value.name not in graph.initializers or value.name in fed]
        graph.inputs.clear()
        graph.inputs.extend(kept)
        common.RemoveUnusedNodesPass()(copy)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # it plans one block for all shapes seen, and doubles the peak
        # The runtime's rules for quantizers take 8-bit floats for integers: they drop a Relu that is needed, and fuse
        # what has no kernel.
        if not optimise or any(value.dtype in _FLOAT8 for value in graph.initializers.values()):
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._weights, folder = _detach_weights(copy)
        if folder:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        options.add_external_initializers(list(self._weights), list(self._weights.values()))
        self._names = [value.name for value in outputs]
        self._inputs = [value.name for value in kept if value.name]
        try:
            self._session: onnxruntime.InferenceSession = onnxruntime.InferenceSession(
                ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise UserError(f"ONNX Runtime cannot open the model to calibrate it: {first_line(error)}") from error

    def run(self, feed: Feeds) -> list[np.ndarray]:
        """Return the outputs for one feed; what the graph does not need of it is left out.

        Raises:
            Exception: whatever the runtime raises.
        """
        outputs: list[np.ndarray] = self._session.run(
            self._names, {name: np.asarray(feed[name]) for name in self._inputs if name in feed}
        )
        return outputs

    def kinds(self) -> list[Kind]:
        """Return what the runtime infers of each output."""
        return [_runtime_kind(argument) for argument in self._session.get_outputs()]


def kinds(model: ir.Model, names: Sequence[str], fed: frozenset[str]) -> dict[str, Kind]:
    """Return what is known of the values `names` of the main graph; ONNX Runtime infers what the model does not say.

    Raises:
        UserError: ONNX Runtime is needed, and not installed or refuses the model.
    """
    values = main_values(model)
    known = {name: _declared_kind(values[name]) for name in names}
    open_ends = [name for name, kind in known.items() if not kind.text or (kind.dtype and kind.shape is None)]
    if open_ends:
        probe = Probe(model, raw_outputs(open_ends), fed, threads=1, optimise=False)
        known.update(zip(open_ends, probe.kinds(), strict=True))
    return known


def _declared_kind(value: ir.Value) -> Kind:
    shape = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    if value.type is None:
        return Kind(None, "", shape)
    if not isinstance(value.type, ir.TensorType):
        return Kind(None, "no tensor", shape)
    dtype = value.type.dtype
    return Kind(dtype if dtype in _NUMBERS.values() else None, dtype.name.lower(), shape)


def _runtime_kind(argument: object) -> Kind:
    text = str(getattr(argument, "type", ""))
    inner = text.removeprefix("tensor(").removesuffix(")")
    shape = getattr(argument, "shape", None)
    # The runtime gives [] for a scalar and for an unknown rank alike.
    return Kind(_NUMBERS.get(inner), inner or "unknown", tuple(shape) if shape else None)


def _detach_weights(model: ir.Model) -> tuple[dict[str, onnxruntime.OrtValue], str]:
    """Take the data of the larger initializers out of the main graph.

    Those that lie in files are mapped from there by the runtime, if all in one folder, which is returned; the runtime
    refuses symbolic links that lead elsewhere, so it is the folder of the file itself. The others are returned by name.
    """
    import onnxruntime

    folders = Counter[Path]()
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, MappedTensor):
            folders[value.const_value.path.resolve().parent] += value.const_value.nbytes
    folder = folders.most_common(1)[0][0] if folders else None
    weights = {}
    held: list[ir.Value] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _INLINE_BELOW or tensor.dtype == ir.DataType.STRING:
            continue
        file = tensor.path.resolve() if isinstance(tensor, MappedTensor) else None
        if isinstance(tensor, MappedTensor) and file is not None and file.parent == folder:
            value.const_value = _reference(tensor, name, file.name, tensor.offset)
            continue
        held.append(value)
    # Those that are computed together are computed once.
    computed = evaluated([value.const_value for value in held if value.const_value is not None])
    for value, tensor in zip(held, computed, strict=True):
        name, array = str(value.name), np.ascontiguousarray(tensor.numpy())
        if array.nbytes != tensor.nbytes:
            value.const_value = tensor  # packed elements of less than a byte
            continue
        bare = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
        weights[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bare, int(tensor.dtype))
        value.const_value = _reference(tensor, name, "weights", 0)
    return weights, "" if folder is None else str(folder)


def _reference(tensor: ir.TensorProtocol, name: str, file: str, offset: int) -> ir.ExternalTensor:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(file, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def describe(node: ir.Node) -> str:
    """Return "node 'NAME' (OPERATOR)"."""
    return f"node '{qgraph.ir.node_label(node)}' ({node.op_type})"
