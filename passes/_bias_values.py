"""Adding to the bias of a layer, in whatever form it has one: integers, floats, or none yet."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.paired_layers import PairedLayer
from qgraph.numerics.quantize import BIAS_LIMIT

__all__ = ["FLOAT_BIAS_KEY", "add_to_bias"]

FLOAT_BIAS_KEY = "qgraph.float_bias"
"""Metadata of a layer that runs in integers, with a bias in float: why."""

_LEAST_STEP = 0.75
"""Of a shift, in integers. Half a step is left by rounding: it must not be corrected again."""
_LEAST_SHARE = 2.0**-13
"""Of a shift, of the largest bias: below it lies what float32 leaves."""


def add_to_bias(graph: ir.Graph, layer: PairedLayer, shift: np.ndarray) -> np.ndarray:
    """Add to a layer's bias, which no other layer shares afterwards.

    Args:
        graph: the main graph.
        layer: of the quantized model.
        shift: float64 (channels,), for the layer's output.

    Returns:
        what was added in effect: integers can only be shifted by whole steps.
    """
    bias = layer.last.inputs[layer.bias] if layer.bias < len(layer.last.inputs) else None
    rounded = None if bias is None else bias.producer()
    if bias is None:
        return _add_bias(graph, layer, shift)
    if rounded is not None and qgraph.ir.is_op(rounded, "DequantizeLinear"):
        return _shift_integers(graph, layer, rounded, shift)
    return _shift_reals(graph, layer, bias, shift)


def _shift_integers(graph: ir.Graph, layer: PairedLayer, rounded: ir.Node, shift: np.ndarray) -> np.ndarray:
    integers, scales = (qgraph.ir.constant(value) for value in rounded.inputs[:2])
    if integers is None or scales is None:
        return np.zeros(shift.shape)
    scale = scales.astype(np.float64).reshape(-1)
    before = integers if integers.size == len(shift) else np.broadcast_to(integers.reshape(-1), shift.shape)
    steps = _whole_steps(shift / scale).reshape(before.shape)
    after = _saturated(before.astype(np.int64), steps, integers.dtype)
    moved = (after - before).reshape(-1)
    if not moved.any():
        return np.zeros(shift.shape)
    source = rounded.inputs[0]
    assert source is not None
    array = after.astype(integers.dtype)
    if _is_own(source) and len(rounded.outputs[0].uses()) == 1:
        source.const_value = ir.tensor(array, name=source.name)
        source.shape = ir.Shape(array.shape)
    else:
        stored = qgraph.ir.initializer(graph, f"{source.name}_corrected", array)
        _insert_dequantize(graph, layer, [stored, *rounded.inputs[1:]], rounded.attributes.get_int("axis", 1))
    return np.asarray(moved * scale)


def _saturated(before: np.ndarray, steps: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return integers moved by whole steps, as far as there is room."""
    limits = np.iinfo(dtype)
    low, high = (-BIAS_LIMIT, BIAS_LIMIT) if dtype == np.int32 else (limits.min, limits.max)
    moved = np.clip(before + steps, np.minimum(before, low), np.maximum(before, high))
    return np.asarray(moved, np.int64)


def _whole_steps(steps: np.ndarray) -> np.ndarray:
    limited = np.clip(np.rint(steps), -BIAS_LIMIT, BIAS_LIMIT)
    return np.asarray(np.where(np.abs(steps) < _LEAST_STEP, 0.0, limited), np.int64)


def _shift_reals(graph: ir.Graph, layer: PairedLayer, bias: ir.Value, shift: np.ndarray) -> np.ndarray:
    array = qgraph.ir.constant(bias)
    factor = layer.last.attributes.get_float("beta", 1.0) if layer.last.op_type == "Gemm" else 1.0
    if array is None or factor == 0.0:
        return np.zeros(shift.shape)
    floor = _LEAST_SHARE * np.abs(array * factor + shift).max(initial=0.0)
    kept = np.where(np.abs(shift) <= floor, 0.0, shift)
    if not kept.any():
        return kept
    after = (array + kept / factor).astype(array.dtype)
    if _is_own(bias):
        bias.const_value = ir.tensor(after, name=bias.name)
        bias.shape = ir.Shape(after.shape)
        return kept
    layer.last.replace_input_with(layer.bias, qgraph.ir.initializer(graph, f"{bias.name}_corrected", after))
    if bias.is_initializer() and not bias.uses() and not bias.is_graph_output():
        graph.initializers.pop(bias.name or "", None)
    return kept


def _add_bias(graph: ir.Graph, layer: PairedLayer, shift: np.ndarray) -> np.ndarray:
    """Give a layer without a bias one: int32 at the product of its scales where it runs in integers."""
    node = layer.last
    base = f"{node.name or node.op_type}_bias"
    scale = _product_of_scales(layer)
    if scale is None:
        if not shift.any():
            return shift
        node.resize_inputs(3)
        node.replace_input_with(2, qgraph.ir.initializer(graph, base, shift.astype(np.float32)))
        return shift
    steps = _whole_steps(shift / scale)
    if not steps.any():
        return np.zeros(shift.shape)
    node.resize_inputs(3)
    parameters = (
        qgraph.ir.initializer(graph, f"{base}_scale", scale),
        qgraph.ir.initializer(graph, f"{base}_zero_point", np.zeros(scale.shape, np.int32)),
    )
    stored = qgraph.ir.initializer(graph, f"{base}_q", steps.astype(np.int32))
    _insert_dequantize(graph, layer, [stored, *parameters], 0)
    return np.asarray(steps * scale.astype(np.float64))


def _product_of_scales(layer: PairedLayer) -> np.ndarray | None:
    """Return the scale of an int32 bias, () or (channels,), or None where the bias is to be in float."""
    if FLOAT_BIAS_KEY in layer.node.metadata_props:
        return None
    scales = []
    for value in layer.node.inputs[:2]:
        rounded = None if value is None else value.producer()
        if rounded is None or not qgraph.ir.is_op(rounded, "DequantizeLinear"):
            return None
        array = qgraph.ir.constant(rounded.inputs[1])
        if array is None or bool(rounded.attributes.get_int("block_size", 0)):
            return None
        scales.append(array.astype(np.float32))
    product = scales[0].reshape(()) * scales[1] if scales[0].size == 1 else None
    if product is None or product.ndim > 1:
        return None
    if product.ndim == 1 and product.size < layer.channels:  # of a ConvTranspose, whose groups share scales
        product = np.tile(product, layer.channels // product.size)
    return np.asarray(product, np.float32)


def _insert_dequantize(graph: ir.Graph, layer: PairedLayer, inputs: list[ir.Value | None], axis: int) -> None:
    stored, scale = inputs[:2]
    assert stored is not None
    attributes = {} if scale is None or not scale.shape else {"axis": axis}
    name = qgraph.ir.fresh_name(graph, f"{(stored.name or 'bias').removesuffix('_q')}_dq")
    node = ir.node("DequantizeLinear", inputs, attributes, name=name)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, ir.DataType.FLOAT, stored.shape
    qgraph.ir.insert_before(layer.last, node)
    layer.last.replace_input_with(layer.bias, node.outputs[0])


def _is_own(value: ir.Value) -> bool:
    """Tell whether a value is an initializer that one node reads, and nobody outside sees."""
    return (
        value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_input() and not value.is_graph_output()
    )
