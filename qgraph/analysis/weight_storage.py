"""How a float weight gives its place to a compressed one; `qgraph.analysis.compressed_weights` says to what.

The tensors are computed when the file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.compressed_weights import (
    FLOAT8,
    NAME_KEY,
    SCHEME_KEY,
    SIGNED,
    UNSIGNED,
    format_scheme,
    weight_readers,
)
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.errors import UserError
from qgraph.lazy_tensors import joint_tensors
from qgraph.numerics.packing import onnx_float8, onnx_int, to_container, widen
from qgraph.numerics.weights import QuantizedWeight, WeightScheme

__all__ = ["store"]

_NEEDED_OPSET = 21
_NEEDED_IR = 10
_TWO_BITS_OPSET = 25
_TWO_BITS_IR = 12


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
    if scheme.format in FLOAT8:
        return FLOAT8[scheme.format]
    if scheme.format in ("mxfp4", "nvfp4", "nf4"):
        return ir.DataType.INT8
    bits = next(width for width in (2, 4, 8) if width >= scheme.bits and (two_bits or width > 2))
    return (UNSIGNED if _has_zero_points(scheme) else SIGNED)[bits]


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
    if scheme.format in FLOAT8:
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
    for reader in weight_readers(weight):
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
