"""What a runtime with fused integer kernels will make of each node, told before it runs, from a capability table.

    DequantizeLinear -> Conv -> QuantizeLinear      =>    an integer kernel, if the table has that fusion
    DequantizeLinear in blocks -> MatMul            =>    MatMulNBits, likewise
    MatMulNBits, DynamicQuantizeMatMul, ...         =>    what the table's probes have shown of them
    anything else                                   =>    what its data types say

The rules are those of ONNX Runtime's optimiser as its fused forms show them: a layer becomes an integer one where all
that it reads comes out of DequantizeLinear and all its readers are QuantizeLinear, in types of which the table has a
fusion. A Relu or Clip in between goes if the quantized type cannot hold what it would cut off. DequantizeLinear is
moved down, and QuantizeLinear up, through what only moves elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_arithmetic import COMPUTE, Arithmetic, arithmetic, block_form, family, nbits_form
from qgraph.analysis.kernel_constraints import KnownShapes
from qgraph.analysis.value_types import value_types
from qgraph.capabilities import Fusion, Table, operator_name

__all__ = ["Expected", "combined", "expected_placement", "multiplies_in_integers"]

_PASSED = ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Operators through which the runtime moves DequantizeLinear and QuantizeLinear."""
_CUTS = ("Clip", "Relu")
_WEIGHTED = ("Conv", "Gemm", "MatMul")
_KINDS: tuple[Arithmetic, ...] = ("integer", "low-bit", "float")
_DEFAULT_LEVEL = 4
"""The accuracy level of a MatMulNBits that the runtime makes."""
_BITS = {"int2": 2, "int4": 4, "int8": 8}
_NBITS = "com.microsoft.MatMulNBits"


class Expected(NamedTuple):
    """What will run in the place of a node.

    Attributes:
        kernel: without what it does besides: see `kernel_arithmetic.family`; '' where no claim is made.
        arithmetic: see `kernel_arithmetic`.
    """

    kernel: str
    arithmetic: Arithmetic


def expected_placement(model: ir.Model, table: Table, shapes: KnownShapes) -> dict[ir.Node, Expected]:
    """Return what is expected of every node, those of subgraphs included.

    Args:
        model: as it is handed to the runtime; not changed.
        table: of the runtime, with its fusions.
        shapes: of the values of `model`.
    """
    fusions = {(one.pattern, one.when): one for one in table.fusions}
    types = value_types(model, shapes)
    return {node: _expected(node, table, fusions, types) for node in qgraph.ir.walk(model)}


def combined(expected: Iterable[Expected]) -> Expected:
    """Return what is expected of a kernel that stands for several nodes: integers before floats before nothing.

    Of floats, layers come first: a kernel is named after them.
    """
    found = list(expected)
    for kind in _KINDS:
        kernels = [one.kernel for one in found if one.arithmetic == kind]
        if kernels:
            return Expected(next((name for name in kernels if name in COMPUTE), kernels[0]), kind)
    return Expected("", "none")


def multiplies_in_integers(node: ir.Node, table: Table) -> bool | None:
    """Return whether a MatMulNBits computes in integers, by a table's probes; None for other operators."""
    if operator_name(node.domain, node.op_type) != _NBITS:
        return None
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
    return _is_integer_form((bits, block, node.attributes.get_int("accuracy_level", 0)), table)


def _is_integer_form(numbers: Sequence[int], table: Table) -> bool:
    form = nbits_form(numbers)
    return any(one.arithmetic == "integers" for one in table.fusions if (one.pattern, one.when) == (_NBITS, form))


def _expected(
    node: ir.Node, table: Table, fusions: Mapping[tuple[str, tuple[str, ...]], Fusion], known: Mapping[ir.Value, str]
) -> Expected:
    name = operator_name(node.domain, node.op_type)
    types = [known.get(value, "") for value in (*node.inputs, *node.outputs) if value is not None]
    if not any(types):
        types = ["float32"]  # nothing is known of it, and most values are floats
    blocks = _joined_blocks(node, fusions, known)
    if blocks is not None:
        return Expected(_NBITS, arithmetic(_NBITS, types, _is_integer_form((*blocks, _DEFAULT_LEVEL), table)))
    fused = _fusion(node, fusions, known)
    if fused is not None and fused.kernel:
        kernel = fused.kernel.split(" + ")[0]
        return Expected(family(kernel), arithmetic(kernel, types))
    if name in _CUTS and _is_dropped(node):
        return Expected("", "none")
    kind = arithmetic(name, types, multiplies_in_integers(node, table))
    if kind == "float" and fused is not None and fused.arithmetic == "integers":
        kind = "integer"  # it stays as it is, but reads what was quantized
    return Expected(family(name), kind)


def _joined_blocks(
    node: ir.Node, fusions: Mapping[tuple[str, tuple[str, ...]], Fusion], known: Mapping[ir.Value, str]
) -> tuple[int, int] | None:
    """Return bits and block of a weight that is dequantized block by block, if its product takes it as it is stored."""
    weight = node.inputs[1] if qgraph.ir.is_op(node, "MatMul", "Gemm") and len(node.inputs) > 1 else None
    maker = None if weight is None else weight.producer()
    if maker is None or not qgraph.ir.is_op(maker, "DequantizeLinear"):
        return None
    if node.attributes.get_int("transB", 0) != 0:
        return None
    block, axis = maker.attributes.get_int("block_size", 0), maker.attributes.get_int("axis", 1)
    bits = _BITS.get(known.get(maker.inputs[0], "") if maker.inputs[0] is not None else "")
    if not block or axis != 0 or bits is None:
        return None
    fused = fusions.get(("DequantizeLinear -> MatMul", block_form(bits, block)))
    return (bits, block) if fused is not None and fused.kernel == _NBITS else None


def _fusion(
    node: ir.Node, fusions: Mapping[tuple[str, tuple[str, ...]], Fusion], known: Mapping[ir.Value, str]
) -> Fusion | None:
    """Return the fusion that takes a layer whose inputs are all dequantized."""
    makers = [_dequantizer(value) for value in _data_inputs(node, known)]
    if not makers or None in makers:
        return None
    stored = [known.get(maker.inputs[0], "") for maker in makers if maker is not None and maker.inputs[0] is not None]
    told = f"{stored[0]} activations"
    if node.op_type in _WEIGHTED and len(stored) > 1:
        told += f", {stored[1]} weight"
    if _is_quantized(node.outputs[0]):
        return fusions.get((f"DequantizeLinear -> {node.op_type} -> QuantizeLinear", (told,)))
    return fusions.get((f"DequantizeLinear -> {node.op_type}", (told, "the result is not quantized")))


def _data_inputs(node: ir.Node, known: Mapping[ir.Value, str]) -> list[ir.Value]:
    """Return the inputs that must be dequantized: float ones, but for the bias and bounds."""
    count = 2 if node.op_type in (*_WEIGHTED, "Add", "Mul", "Sub", "Div") else 1
    values: Iterable[ir.Value | None] = node.inputs if node.op_type in ("Concat", "Where") else node.inputs[:count]
    return [value for value in values if value is not None and known.get(value, "") != "bool"]


def _dequantizer(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    while node is not None and qgraph.ir.is_op(node, *_PASSED) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if qgraph.ir.is_op(node, "DequantizeLinear") else None


def _is_quantized(value: ir.Value) -> bool:
    """Tell whether all that is read of a value is quantized, perhaps behind a clamp that has no effect then."""
    readers = list(_readers(value))
    if not readers or value.is_graph_output():
        return False
    if all(qgraph.ir.is_op(node, "QuantizeLinear") for node in readers):
        return True
    if len(readers) != 1:
        return False
    if qgraph.ir.is_op(readers[0], *_PASSED):
        return _is_quantized(readers[0].outputs[0])
    return qgraph.ir.is_op(readers[0], *_CUTS) and _is_dropped(readers[0])


def _is_dropped(cut: ir.Node) -> bool:
    """Tell whether a clamp has no effect, for what it cuts off could not be held by what quantizes its result."""
    readers = list(_readers(cut.outputs[0]))
    if len(readers) != 1 or cut.outputs[0].is_graph_output() or not qgraph.ir.is_op(readers[0], "QuantizeLinear"):
        return False
    return _has_no_effect(cut, readers[0])


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    for use in value.uses():
        yield use.node


def _has_no_effect(cut: ir.Node, quantizer: ir.Node) -> bool:
    """Tell whether what a clamp cuts off cannot be held by the quantized type."""
    scale, zero = (qgraph.ir.constant(value) for value in (quantizer.inputs[1], _third(quantizer)))
    if scale is None or scale.size != 1:
        return False
    limits = np.iinfo(np.uint8 if zero is None else zero.dtype)
    offset = 0 if zero is None else int(zero.reshape(-1)[0])
    step = scale.reshape(-1)[0]  # in the type of the scale, as the runtime multiplies
    lowest, highest = (scale.dtype.type(limit - offset) * step for limit in (limits.min, limits.max))
    least, most = _bounds(cut)
    return bool(lowest >= least and highest <= most)


def _third(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _bounds(cut: ir.Node) -> tuple[float, float]:
    if cut.op_type == "Relu":
        return 0.0, np.inf
    found = [qgraph.ir.constant(value) for value in cut.inputs[1:3]]
    found += [None] * (2 - len(found))
    least, most = (None if array is None else float(array.reshape(-1)[0]) for array in found)
    return -np.inf if least is None else least, np.inf if most is None else most
