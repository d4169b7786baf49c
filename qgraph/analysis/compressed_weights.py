"""How a compressed weight stands in a graph between passes, and how it is found again.

    y = MatMul(x, W)        W [K, N]    =>    y = MatMul(x, DequantizeLinear(Wq, scale, zero_point, axis=0))
    y = Gemm(x, W)          W [N, K]    =>    y = Gemm(x, DequantizeLinear(Wq, scale, zero_point, axis=1))
    e = Gather(W, ids)      W [N, K]    =>    e = Gather(DequantizeLinear(Wq, scale, zero_point, axis=1), ids)
    y = Conv(x, W)          W [N, ...]  =>    y = Conv(x, DequantizeLinear(Wq, scale, axis=0))      symmetric, by rows

Standard ONNX that any runtime of opset 21 executes: K is cut into blocks (`block_size`) that share a scale. All readers
of a weight read the one DequantizeLinear, so a tied weight stays one. Symmetric integers are stored signed without
zero point, others unsigned with one. Widths that ONNX has no type for take the next one that holds them:

    int2                           INT2, UINT2 from opset 25, else INT4, UINT4
    int3, int4, ternary            INT4, UINT4 (ternary as int2)
    int5, int6, int8               INT8, UINT8
    mxfp4, nvfp4                   INT8, exactly: their levels are halves, and the halves go into the scale
    nf4                            INT8: its levels on a grid of 1/127
    fp8e4m3, fp8e5m2               FLOAT8E4M3FN, FLOAT8E5M2

A Cast may stand between the integers and their DequantizeLinear, for kernels of another width.

The true scheme stands in the DequantizeLinear's metadata (`SCHEME_KEY`), and so do the fused operators that a target
puts in its place. The tensors are computed when the file is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.errors import UserError
from qgraph.lazy_tensors import JointTensor, joint_tensors
from qgraph.numerics.packing import onnx_float8, onnx_int, to_container, widen
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, levels

__all__ = [
    "NAME_KEY",
    "SCHEME_KEY",
    "CompressedWeight",
    "compressed",
    "format_scheme",
    "parse_scheme",
    "producer_of",
    "store",
    "total_bits",
    "weight_facts",
]

SCHEME_KEY = "qgraph.weight"
"""Metadata of a node that reads compressed integers: the scheme, such as `int4g32a`."""
NAME_KEY = "qgraph.weight_name"
"""Metadata of such a node: what the model called the weight."""

_NEEDED_OPSET = 21
_NEEDED_IR = 10
_TWO_BITS_OPSET = 25
_TWO_BITS_IR = 12
_SIGNED = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}
_UNSIGNED = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_FLOAT8 = {"fp8e4m3": ir.DataType.FLOAT8E4M3FN, "fp8e5m2": ir.DataType.FLOAT8E5M2}
_GRIDS = {"mxfp4": 2, "nvfp4": 2, "nf4": 127, "ternary": 1}
"""Steps for 1.0 of the integer grid that the levels of a code book are stored on."""
_FUSED = ("MatMulNBits", "GatherBlockQuantized", "MatMulBnb4")
_PATTERN = re.compile(
    r"(?P<format>int|nf4|fp8e4m3|fp8e5m2|mxfp4|nvfp4|ternary)(?P<bits>\d)?g(?P<group>\d+)(?P<kind>[as]?)"
)


def format_scheme(scheme: WeightScheme) -> str:
    """Write a scheme as text: format and bits, group (0 for a whole row), `s` symmetric or `a` asymmetric integers."""
    if scheme.format != "int":
        return f"{scheme.format}g{scheme.group}"
    return f"int{scheme.bits}g{scheme.group}{'s' if scheme.symmetric else 'a'}"


def parse_scheme(text: str) -> WeightScheme:
    """Read what `format_scheme` wrote.

    Raises:
        UserError: it is something else.
    """
    match = _PATTERN.fullmatch(text)
    if match is not None:
        integers = match["format"] == "int"
        if integers == bool(match["kind"]) and integers == (match["bits"] in tuple("234568")):
            bits = int(match["bits"] or 8)  # a code book knows its bits
            return WeightScheme(match["format"], bits, int(match["group"]), match["kind"] == "s")
    raise UserError(f"'{text}' is no scheme of weights, such as int4g32a: the model's metadata are damaged")


@dataclass(frozen=True, eq=False)
class CompressedWeight:
    """A weight that is stored compressed.

    Attributes:
        name: what the model called it.
        scheme: what its values were quantized to; what they are stored in may be wider.
        node: its first reader: MatMul, Gemm, Gather or a convolution, or the fused operator.
        readers: all of them, in topological order.
        dequantize: the DequantizeLinear that the readers share; None where the operators are fused.
        tensors: the initializers that hold it: integers, scale and, for asymmetric schemes, zero point.
        inputs: K; of a convolution the elements of a patch.
        outputs: N.
        transposed: the integers are laid out [N, K], or [N, ...].
    """

    name: str
    scheme: WeightScheme
    node: ir.Node
    readers: tuple[ir.Node, ...]
    dequantize: ir.Node | None
    tensors: tuple[ir.Value, ...]
    inputs: int
    outputs: int
    transposed: bool

    @property
    def bytes(self) -> int:
        """The number of bytes on disk: integers, scales and zero points, each tensor once."""
        return sum(value.const_value.nbytes for value in self.tensors if value.const_value is not None)

    @property
    def information_bits(self) -> float:
        """Bits that the scheme itself needs, zero points and scales (of the type they have) included."""
        scale = self.tensors[1].dtype
        return total_bits(self.scheme, self.outputs, self.inputs, scale.bitwidth if scale is not None else 32)

    def quantized(self) -> QuantizedWeight:
        """Return integers, scales and zero points: computed now, or read from the file that the model came from.

        Raises:
            ValueError: the weight stands in a fused operator and was loaded from a file.
        """
        produce = producer_of(self.tensors[0])
        if produce is not None:
            return produce()
        if self.dequantize is None:
            raise ValueError(f"'{self.name}' is packed for {self.node.op_type}, which is not read back")
        return _read(self)


def total_bits(scheme: WeightScheme, outputs: int, inputs: int, scale_bits: int = 32) -> float:
    """Return the bits of information of a weight [outputs, inputs]."""
    return scheme.bits_per_weight(inputs, scale_bits) * outputs * inputs


def producer_of(value: ir.Value) -> Callable[[], QuantizedWeight] | None:
    """Return what computes the weight that a tensor of `store` belongs to; None for one that was loaded."""
    tensor = value.const_value
    if not isinstance(tensor, JointTensor):
        return None
    source: Callable[[], QuantizedWeight] | None = tensor.group.source
    return source


def store(
    model: ir.Model,
    layer: LinearLayer,
    scheme: WeightScheme,
    produce: Callable[[], QuantizedWeight],
    *,
    input_scale: np.ndarray | None = None,
) -> None:
    """Put a compressed weight in the place of a float one, for all its readers.

    Args:
        model: is changed.
        layer: one of the layers that read the weight.
        scheme: of what `produce` gives.
        produce: computes the weight [N, K]; is called when the file is written, or by whoever asks for the values.
        input_scale: float32 [K]: what `produce` gives has been divided by it, so it multiplies the activation of
            every reader (what an embedding looked up) in a Mul of its own.

    Raises:
        UserError: the model's opset is below 21, which has no DequantizeLinear for blocks.
    """
    opset = model.graph.opset_imports.get("", 1)
    if opset < _NEEDED_OPSET:
        raise UserError(
            f"compressed weights need opset {_NEEDED_OPSET}, and the model has {opset}: put "
            f"convert-opset{{version={_NEEDED_OPSET}}} before"
        )
    weight = layer.weight
    name = weight.name or layer.name
    if input_scale is not None:
        _scale_inputs(model, weight, name, np.asarray(input_scale, np.float32))
    values = _initializers(model, layer, scheme, produce, two_bits=opset >= _TWO_BITS_OPSET)
    axis, block = _axis(layer, scheme)
    attributes = {"axis": axis, "block_size": block} if block else {"axis": axis}
    node = ir.node("DequantizeLinear", values, attributes, name=qgraph.ir.fresh_name(model.graph, f"{name}_dequantize"))
    node.metadata_props[SCHEME_KEY] = format_scheme(scheme)
    node.metadata_props[NAME_KEY] = name
    output = node.outputs[0]
    output.name = qgraph.ir.fresh_name(model.graph, f"{name}_dequantized")
    output.type, output.shape = weight.type, weight.shape
    graph = weight.graph
    assert graph is not None
    graph.insert_before(_first_reader(graph, weight), node)
    weight.replace_all_uses_with(output)
    graph.initializers.pop(weight.name or "")
    model.ir_version = max(model.ir_version, _TWO_BITS_IR if opset >= _TWO_BITS_OPSET else _NEEDED_IR)


def _initializers(
    model: ir.Model,
    layer: LinearLayer,
    scheme: WeightScheme,
    produce: Callable[[], QuantizedWeight],
    *,
    two_bits: bool,
) -> list[ir.Value]:
    """Add integers, scale and zero point, computed together, as initializers of the graph that holds the weight."""
    weight = layer.weight
    groups = scheme.groups(layer.inputs)
    float_type = weight.dtype
    assert float_type is not None
    integer_type = _data_type(scheme, two_bits=two_bits)
    assert weight.const_value is not None
    size = tuple(weight.const_value.shape.numpy())
    grid: tuple[int, ...] = (layer.outputs, groups) if layer.transposed else (groups, layer.outputs)
    if _axis(layer, scheme)[1] == 0:
        grid = (layer.outputs,)
    specs = [(integer_type, size), (float_type, grid)]
    if _has_zero_points(scheme):
        specs.append((integer_type, grid))

    def compute() -> Sequence[ir.TensorProtocol]:
        quantized = produce()
        arrays = _arrays(quantized, layer, scheme, integer_type.bitwidth)
        return [_tensor(array, dtype, shape) for array, (dtype, shape) in zip(arrays, specs, strict=True)]

    graph = weight.graph
    assert graph is not None
    parts = ("quantized", "scale", "zero_point")
    tensors = joint_tensors(compute, specs, source=produce)
    return [
        _initializer(model.graph, graph, f"{weight.name}_{part}", tensor)
        for part, tensor in zip(parts, tensors, strict=False)
    ]


def _initializer(main: ir.Graph, graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = qgraph.ir.fresh_name(main, name)
    value = ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _has_zero_points(scheme: WeightScheme) -> bool:
    return scheme.format == "int" and not scheme.symmetric


def _data_type(scheme: WeightScheme, *, two_bits: bool) -> ir.DataType:
    if scheme.format in _FLOAT8:
        return _FLOAT8[scheme.format]
    if scheme.format in ("mxfp4", "nvfp4", "nf4"):
        return ir.DataType.INT8
    bits = next(width for width in (2, 4, 8) if width >= scheme.bits and (two_bits or width > 2))
    return (_UNSIGNED if _has_zero_points(scheme) else _SIGNED)[bits]


def _axis(layer: LinearLayer, scheme: WeightScheme) -> tuple[int, int]:
    """Return `axis` and `block_size` of the DequantizeLinear; a whole row as one group needs no blocks.

    Two bits have blocks all the same: ONNX Runtime crashes on two bits with a zero point for each channel.
    """
    along_inputs = 1 if layer.transposed else 0
    if scheme.groups(layer.inputs) > 1:
        return along_inputs, scheme.group
    blocked = scheme.bits <= 2 and layer.kind != "convolution"
    return (along_inputs, layer.inputs) if blocked else (1 - along_inputs, 0)


def _arrays(quantized: QuantizedWeight, layer: LinearLayer, scheme: WeightScheme, bits: int) -> list[np.ndarray]:
    """Return the values to store: integers of `bits`, scale and, where there are some, zero points."""
    if quantized.codes.shape != (layer.outputs, layer.inputs) or quantized.scheme != scheme:
        raise ValueError(f"'{layer.name}' was promised as {scheme} {(layer.outputs, layer.inputs)}")
    if layer.kind == "convolution":
        codes, scale, zeros = onnx_int(widen(to_container(quantized), bits), transposed=True)[:3]
        return [array for array in (layer.stored(codes), scale, zeros) if array is not None]
    if scheme.format in _FLOAT8:
        given = onnx_float8(quantized, transposed=layer.transposed)
    else:
        given = onnx_int(widen(to_container(quantized), bits), transposed=layer.transposed)
    return [array for array in given[:3] if array is not None]


def _tensor(array: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
    return ir.Tensor(np.ascontiguousarray(array).astype(dtype.numpy(), copy=False).reshape(shape), dtype=dtype)


def _scale_inputs(model: ir.Model, weight: ir.Value, name: str, scale: np.ndarray) -> None:
    factor = qgraph.ir.initializer(
        model.graph, f"{name}_input_scale", scale.astype(_numpy(weight)) if weight.dtype is not None else scale
    )
    for reader in _readers(weight):
        if qgraph.ir.is_op(reader, "Gather"):
            old = reader.outputs[0]
            scaled = _mul(model, factor, name)
            scaled.outputs[0].type, scaled.outputs[0].shape = old.type, old.shape
            old.replace_all_uses_with(scaled.outputs[0], replace_graph_outputs=True)
            scaled.replace_input_with(0, old)
            assert reader.graph is not None
            reader.graph.insert_after(reader, scaled)
        else:
            activation = reader.inputs[0]
            assert activation is not None
            scaled = _mul(model, factor, name)
            scaled.replace_input_with(0, activation)
            scaled.outputs[0].type, scaled.outputs[0].shape = activation.type, activation.shape
            qgraph.ir.insert_before(reader, scaled)
            reader.replace_input_with(0, scaled.outputs[0])


def _numpy(value: ir.Value) -> Any:
    assert value.dtype is not None
    return value.dtype.numpy()


def _mul(model: ir.Model, factor: ir.Value, name: str) -> ir.Node:
    node = ir.node("Mul", [None, factor], name=qgraph.ir.fresh_name(model.graph, f"{name}_scale_input"))
    node.outputs[0].name = qgraph.ir.fresh_name(model.graph, f"{name}_scaled_input")
    return node


def _readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a weight, those behind a Transpose in its place, in the order of the uses."""
    found: list[ir.Node] = []
    for use in value.uses():
        behind = [inner.node for inner in use.node.outputs[0].uses()] if qgraph.ir.is_op(use.node, "Transpose") else []
        found += behind or [use.node]
    return list(dict.fromkeys(found))


def _first_reader(graph: ir.Graph, value: ir.Value) -> ir.Node:
    """Return the first node of `graph` that reads `value`, itself or in a subgraph."""
    readers = {use.node for use in value.uses()}
    if len(readers) == 1 and (reader := next(iter(readers))).graph is graph:
        return reader
    return next(
        node
        for node in graph
        if node in readers or any(not readers.isdisjoint(inner.all_nodes()) for inner in qgraph.ir.inner_graphs(node))
    )


def compressed(model: ir.Model) -> Iterator[CompressedWeight]:
    """Yield the compressed weights of a model, in the order of the nodes that first read each.

    Found by the metadata that `store` left, which files keep; also after a target has put fused operators in the
    place of DequantizeLinear. Matrices that others have stored in blocks, or in less than 8 bits, behind a
    DequantizeLinear are found as well. A weight that several operators share comes once.

    Raises:
        UserError: a node's metadata name no scheme.
    """
    fused: dict[ir.Value, list[ir.Node]] = {}
    order: list[tuple[ir.Node, ir.Value | None]] = []
    for node in qgraph.ir.walk(model):
        if qgraph.ir.is_op(node, "DequantizeLinear"):
            if _scheme_of(node) is not None:
                order.append((node, None))
        elif node.op_type in _FUSED and SCHEME_KEY in node.metadata_props:
            packed = _storage(node)
            if packed not in fused:
                order.append((node, packed))
            fused.setdefault(packed, []).append(node)
    for node, integers in order:
        yield _standing(node) if integers is None else _packed(node, integers, fused[integers])


def _storage(node: ir.Node) -> ir.Value:
    """Return the initializer that holds the integers of a fused operator, behind a Reshape perhaps."""
    value = node.inputs[0 if node.op_type == "GatherBlockQuantized" else 1]
    assert value is not None
    producer = value.producer()
    stored = producer.inputs[0] if producer is not None and qgraph.ir.is_op(producer, "Reshape") else value
    assert stored is not None
    return stored


def _standing(node: ir.Node) -> CompressedWeight:
    scheme = _scheme_of(node)
    assert scheme is not None
    along_inputs = _along_inputs(node)
    tensors = _tensors(node)
    assert tensors[0].const_value is not None
    dims = tensors[0].const_value.shape.numpy()
    outputs = dims[1 - along_inputs]
    readers = _readers(node.outputs[0])
    return CompressedWeight(
        name=node.metadata_props.get(NAME_KEY, tensors[0].name or ""),
        scheme=scheme,
        node=readers[0] if readers else node,
        readers=tuple(readers),
        dequantize=node,
        tensors=tensors,
        inputs=math.prod(dims) // outputs if outputs else 0,
        outputs=outputs,
        transposed=along_inputs == 1,
    )


def _tensors(node: ir.Node) -> tuple[ir.Value, ...]:
    """Return the initializers of a DequantizeLinear; the integers may come through a Cast to another width."""
    found = [value for value in node.inputs if value is not None]
    producer = found[0].producer()
    if producer is not None and qgraph.ir.is_op(producer, "Cast") and producer.inputs[0] is not None:
        found[0] = producer.inputs[0]
    return tuple(found)


def _along_inputs(node: ir.Node) -> int:
    """Return the axis of a matrix's DequantizeLinear that the groups run along, if they run along the inputs."""
    axis = node.attributes.get_int("axis", 1) % 2
    return axis if node.attributes.get_int("block_size", 0) else 1 - axis


def _scheme_of(node: ir.Node) -> WeightScheme | None:
    """Return the scheme that a DequantizeLinear's metadata name, or what others wrote in blocks or below 8 bits.

    Whole rows of 8 bits without metadata are left to those who quantize activations too.
    """
    if SCHEME_KEY in node.metadata_props:
        return parse_scheme(node.metadata_props[SCHEME_KEY])
    tensors = [value.const_value for value in _tensors(node)]
    if len(tensors) < 2 or any(tensor is None for tensor in tensors):
        return None
    integers, scale = tensors[0], tensors[1]
    assert integers is not None
    assert scale is not None
    block = node.attributes.get_int("block_size", 0)
    is_integer = integers.dtype in (*_SIGNED.values(), *_UNSIGNED.values())
    if not is_integer or len(integers.shape) != 2 or len(scale.shape) != (2 if block else 1):
        return None
    if not block and integers.dtype.bitwidth == 8:
        return None
    symmetric = integers.dtype in _SIGNED.values() and len(tensors) == 2
    return WeightScheme("int", integers.dtype.bitwidth, block, symmetric)


def _packed(node: ir.Node, storage: ir.Value, readers: Sequence[ir.Node]) -> CompressedWeight:
    tensors = {storage: None}
    for reader in readers:
        tensors |= dict.fromkeys(_parameters(reader))
    if node.op_type == "GatherBlockQuantized":
        assert storage.shape is not None
        rows, width = storage.shape.numpy()
        inputs, outputs = width * 8 // node.attributes.get_int("bits", 4), rows
    else:
        inputs, outputs = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    return CompressedWeight(
        name=node.metadata_props.get(NAME_KEY, storage.name or ""),
        scheme=parse_scheme(node.metadata_props[SCHEME_KEY]),
        node=node,
        readers=tuple(readers),
        dequantize=None,
        tensors=tuple(tensors),
        inputs=inputs,
        outputs=outputs,
        transposed=True,
    )


def _parameters(node: ir.Node) -> list[ir.Value]:
    """Return scale and zero point of a fused operator: its constants behind the integers, but for a bias."""
    indices = {"MatMulNBits": (2, 3), "GatherBlockQuantized": (2, 3), "MatMulBnb4": (2,)}[node.op_type]
    found = [node.inputs[index] for index in indices if index < len(node.inputs)]
    return [value for value in found if value is not None and value.const_value is not None]


def _read(weight: CompressedWeight) -> QuantizedWeight:
    """Read a weight back from the tensors of its DequantizeLinear."""
    scheme = weight.scheme
    arrays = [np.asarray(value.const_value.numpy()) for value in weight.tensors if value.const_value is not None]
    groups = scheme.groups(weight.inputs)
    size, grid = (weight.outputs, weight.inputs), (weight.outputs, groups)

    def canonical(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        if array.ndim == 1:
            return array.reshape(shape)
        return np.ascontiguousarray(array if weight.transposed else array.swapaxes(0, 1)).reshape(shape)

    scale = canonical(arrays[1], grid).astype(np.float32) * np.float32(_GRIDS.get(scheme.format, 1))
    values = canonical(arrays[0], size)
    if scheme.is_integer:
        lowest = scheme.centre if weight.tensors[0].dtype in _SIGNED.values() else 0
        zero_point = np.full(grid, lowest, np.uint8)
        if len(arrays) > 2:
            zero_point = (canonical(arrays[2], grid).astype(np.int16) + lowest).astype(np.uint8)
        return QuantizedWeight((values.astype(np.int16) + lowest).astype(np.uint8), scale, zero_point, scheme)
    steps = levels(scheme) * _GRIDS.get(scheme.format, 1)
    book = steps if scheme.format in _FLOAT8 else np.rint(steps)
    codes = np.searchsorted(book, values.astype(np.float32)).astype(np.uint8)
    return QuantizedWeight(codes, scale, None, scheme)


def weight_facts(model: ir.Model) -> dict[str, Any] | None:
    """Return, as JSON values, what the compressed weights of a model are, hold and take; None where there are none.

    Bits of information are those that a weight's own scheme needs; bytes are those of the tensors that hold it, which
    may be wider.
    """
    entries = [
        {
            "name": one.name,
            "scheme": format_scheme(one.scheme),
            "operators": list(dict.fromkeys(reader.op_type for reader in one.readers)),
            "shape": [one.outputs, one.inputs],
            **_sizes(one.outputs * one.inputs, round(one.information_bits), one.bytes),
        }
        for one in compressed(model)
    ]
    if not entries:
        return None
    sums = [sum(one[key] for one in entries) for key in ("parameters", "information_bits", "bytes")]
    return {**_sizes(*sums), "tensors": entries}


def _sizes(parameters: int, bits: int, stored: int) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "information_bits": bits,
        "bytes": stored,
        "bits_per_weight": round(bits / parameters, 4),
        "stored_bits_per_weight": round(8 * stored / parameters, 4),
    }
