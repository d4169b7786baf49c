"""What runs where of a Core ML package: its operations, and what ONNX Runtime's CoreML provider makes of model.onnx.

Core ML itself decides on the device between processor, GPU and Neural Engine, operation by operation, and tells nobody
beforehand; what can be told is what each operation computes in, and what it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_arithmetic import Arithmetic
from qgraph.coreml.data_types import MilType
from qgraph.coreml.names import Names
from qgraph.coreml.program import Operation, TensorSpec, read_package
from qgraph.coreml.provider import ProviderSplit, provider_split
from qgraph.coreml.structure import compressed_names, reads
from qgraph.runtime.placement import PlacedNode, Placement

__all__ = ["package_placement"]

_PROVIDER = "Core ML"
_STORED = ("const", "constexpr_")
_MOVES = frozenset({
    "band_part", "cast", "concat", "cond", "depth_to_space", "expand_dims", "fill", "fill_like", "gather",
    "gather_along_axis", "gather_nd", "identity", "max_pool", "pad", "pixel_shuffle", "reshape", "reshape_like",
    "reverse", "scatter", "scatter_along_axis", "scatter_nd", "select", "shape", "slice_by_index", "slice_by_size",
    "space_to_depth", "split", "squeeze", "stack", "tile", "topk", "transpose", "while_loop",
})  # fmt: skip
_TYPES = {MilType.FLOAT16: "float16", MilType.FLOAT32: "float32"}


def package_placement(package: Path, model: ir.Model | None) -> Placement:
    """Return the operations of a package, in order, without those that only say how weights are stored.

    Args:
        package: the folder.
        model: the same model for ONNX Runtime's provider; None where there is none.

    Raises:
        UserError: the package cannot be read.
    """
    block = read_package(package).block
    operations = list(block.walk())
    split = None if model is None else provider_split(model)
    sources = {} if model is None else dict(_named(model))
    left = {} if split is None else {qgraph.ir.node_label(node): why for node, why in split.reasons.items()}
    stored = compressed_names(operations)
    types = {spec.name: _type(spec) for one in operations for spec in one.outputs if _holds_data(one, spec)}
    nodes = []
    for one in operations:
        if one.type.startswith(_STORED):
            continue
        name = one.outputs[0].name if one.outputs else one.type
        taken = tuple(types[argument] for argument in reads(one) if argument in types and argument not in stored)
        given = tuple(map(_type, one.outputs))
        source = sources.get(name.removesuffix(f"_{one.type}"), "")
        why = left.get(source)
        remark = "" if why is None else f"of model.onnx, the provider leaves it to the CPU: {why}"
        kind = _arithmetic(one, (*taken, *given), compressed=any(argument in stored for argument in reads(one)))
        nodes.append(
            PlacedNode(name, one.type, _PROVIDER, kind, taken, given, (source,) if source else (name,), remark)
        )
    return Placement(tuple(nodes), _told(split))


def _told(split: ProviderSplit | None) -> str:
    told = "Core ML, which chooses processor, GPU or Neural Engine on the device"
    return told if split is None else f"{told}; model.onnx by ONNX Runtime's table: {split.told()}"


def _named(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Yield how the names of the operations that a node becomes begin, after its first output, and its label."""
    for node in model.graph:
        if node.outputs and node.outputs[0].name:
            yield Names().fresh(node.outputs[0].name), qgraph.ir.node_label(node)


def _arithmetic(operation: Operation, types: tuple[str, ...], *, compressed: bool) -> Arithmetic:
    if compressed:
        return "low-bit"
    if operation.type in _MOVES or not any(one.startswith("float") for one in types):
        return "none"
    return "float"


def _holds_data(operation: Operation, spec: TensorSpec) -> bool:
    """Tell whether an output is data, and no constant that only says what to do."""
    return operation.type != "const" or spec.type.is_float


def _type(spec: TensorSpec) -> str:
    return _TYPES.get(spec.type, spec.type.value)
