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
puts in its place. `qgraph.analysis.weight_storage` puts weights there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.errors import UserError
from qgraph.lazy_tensors import JointTensor
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, levels

__all__ = [
    "FLOAT8",
    "NAME_KEY",
    "SCHEME_KEY",
    "SIGNED",
    "UNSIGNED",
    "CompressedWeight",
    "compressed",
    "format_scheme",
    "parse_scheme",
    "producer_of",
    "total_bits",
    "weight_readers",
]

SCHEME_KEY = "qgraph.weight"
"""Metadata of a node that reads compressed integers: the scheme, such as `int4g32a`."""
NAME_KEY = "qgraph.weight_name"
"""Metadata of such a node: what the model called the weight."""

# Bits, or the name of a float, -> the type that holds them.
SIGNED = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}
UNSIGNED = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
FLOAT8 = {"fp8e4m3": ir.DataType.FLOAT8E4M3FN, "fp8e5m2": ir.DataType.FLOAT8E5M2}
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


def weight_readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a weight, those behind a Transpose in its place, in the order of the uses."""
    found: list[ir.Node] = []
    for use in value.uses():
        behind = [inner.node for inner in use.node.outputs[0].uses()] if qgraph.ir.is_op(use.node, "Transpose") else []
        found += behind or [use.node]
    return list(dict.fromkeys(found))


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
    readers = weight_readers(node.outputs[0])
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
    is_integer = integers.dtype in (*SIGNED.values(), *UNSIGNED.values())
    if not is_integer or len(integers.shape) != 2 or len(scale.shape) != (2 if block else 1):
        return None
    if not block and integers.dtype.bitwidth == 8:
        return None
    symmetric = integers.dtype in SIGNED.values() and len(tensors) == 2
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
        lowest = scheme.centre if weight.tensors[0].dtype in SIGNED.values() else 0
        zero_point = np.full(grid, lowest, np.uint8)
        if len(arrays) > 2:
            zero_point = (canonical(arrays[2], grid).astype(np.int16) + lowest).astype(np.uint8)
        return QuantizedWeight((values.astype(np.int16) + lowest).astype(np.uint8), scale, zero_point, scheme)
    steps = levels(scheme) * _GRIDS.get(scheme.format, 1)
    book = steps if scheme.format in FLOAT8 else np.rint(steps)
    codes = np.searchsorted(book, values.astype(np.float32)).astype(np.uint8)
    return QuantizedWeight(codes, scale, None, scheme)
