"""What `qdq` does to a node of each kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.compressed_weights import NAME_KEY, SCHEME_KEY, format_scheme
from qgraph.analysis.integer_plan import IntegerPlan
from qgraph.analysis.integer_rules import CONSTANT_FORMS, Kind, data_inputs, output_axis
from qgraph.numerics.quantize import (
    Parameters,
    minmax_parameters,
    mse_parameters,
    quantize,
    quantize_bias,
    weight_scale_for_bias,
)
from qgraph.numerics.schemes import Scheme
from qgraph.numerics.weights import WeightScheme
from qgraph.passes._bias_values import FLOAT_BIAS_KEY
from qgraph.passes._qdq_values import QuantizedValues, Schemes
from qgraph.passes._weight_options import chosen_bits

__all__ = ["rewrite"]

_LAZY_ABOVE = 1 << 20
"""Weights of more elements are quantized when the file is written."""
_HUGE = 1e30
_FOUR, _EIGHT = 4, 8
_FOUR_BITS = WeightScheme("int", _FOUR, 0, symmetric=True)


def rewrite(
    graph: ir.Graph, plan: IntegerPlan, ranges: Mapping[ir.Value, tuple[float, float]], schemes: Schemes
) -> None:
    """Quantize what a plan says.

    Args:
        graph: the main graph.
        plan: what runs in integers.
        ranges: least and largest number of each group of the plan.
        schemes: how to quantize.
    """
    _Rewriter(QuantizedValues(graph, plan.group, ranges, schemes.activation), plan, schemes).run()


class _Rewriter:
    def __init__(self, values: QuantizedValues, plan: IntegerPlan, schemes: Schemes) -> None:
        self._values = values
        self._plan = plan
        self._schemes = schemes
        self._weights: dict[tuple[ir.Value, int, float], tuple[ir.Value, np.ndarray]] = {}

    def run(self) -> None:
        if self._schemes.inputs_only:
            for node, kind in self._plan.nodes.items():
                (self._read if kind is Kind.ARITHMETIC else self.multiply)(node)
                if kind is not Kind.ARITHMETIC:
                    node.metadata_props[FLOAT_BIAS_KEY] = "TensorRT imports no int32"
            self._values.drop_replaced()
            return
        made = [value for value in self._plan.quantized if self._plan.comes_in_integers(value)]
        readers = {value: [use for use in value.uses() if use.node not in self._plan.nodes] for value in made}
        outputs = [(index, value) for index, value in enumerate(self._values.graph.outputs) if value in readers]
        for node, kind in list(self._plan.nodes.items()):
            _REWRITES[kind](self, node)
        for value, uses in readers.items():
            for node, index in uses:
                node.replace_input_with(index, self._values.real(value))
        for index, value in outputs:
            self._values.become_output(index, value)
        self._values.drop_replaced()

    def _read(self, node: ir.Node) -> None:
        """Let a node read those of its inputs quantized that the plan names."""
        for index, value in enumerate(node.inputs):
            if value is not None and value in self._values:
                node.replace_input_with(index, self._values.real(value))

    # --- operators that keep the scale --------------------------------------------------------------------------------

    def move(self, node: ir.Node) -> None:
        """Let a node move integers, or what ONNX Runtime makes integers of."""
        source = _input(node, 0)
        if self._schemes.activation.signed:
            # On x86, ONNX Runtime turns signed activations into unsigned ones, but only where Q meets D.
            node.replace_input_with(0, self._values.real(source))
            return
        node.replace_input_with(0, self._values.integers(source))
        if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
            node.resize_inputs(max(3, len(node.inputs)))
            node.replace_input_with(2, self._values.stored_parameters(source)[1])
        self._make_integers(node)

    def look_up(self, node: ir.Node) -> None:
        """Let a Gather look up rows of integers."""
        table = _input(node, 0)
        parameters = self._values.parameters(node.outputs[0])
        scheme = self._schemes.activation
        integers = _stored(table, lambda array: quantize(array, scheme, parameters).values, self._values.dtype)
        self._values.replace_constant(node, 0, self._values.store(f"{table.name}_q", integers))
        self._make_integers(node)

    def _make_integers(self, node: ir.Node) -> None:
        for value in node.outputs:
            if value in self._values:
                self._values.become_integers(value)

    def clamp(self, node: ir.Node) -> None:
        """Leave the clamping to the saturation of the quantizer before, or clamp the integers."""
        source, result = _input(node, 0), node.outputs[0]
        bounds = self._saturation(result, *_clamp_bounds(node))
        if bounds is not None and self._schemes.activation.signed:
            node.replace_input_with(0, self._values.real(source))  # see `move`
            return
        if qgraph.ir.only_consumer(source) is node and not self._is_copy(source):
            self._values.take_over(result, by=source)
        self._values.define(result, self._clamped(self._values.integers(source), result, bounds))
        self._remove(node)

    def _is_copy(self, value: ir.Value) -> bool:
        node = value.producer()
        kinds = (Kind.MOVER, Kind.CLAMP, Kind.TABLE)
        return node is not None and node in self._plan.nodes and self._plan.nodes[node] in kinds

    def _saturation(self, meaning: ir.Value, low: float, high: float) -> np.ndarray | None:
        """Return low and high as integers of the scale of `meaning`, or None if no integer lies outside."""
        scheme = self._schemes.activation
        ends = np.clip(np.asarray([low, high]), -_HUGE, _HUGE)
        bounds = quantize(ends, scheme, self._values.parameters(meaning)).values
        return None if (bounds == [scheme.qmin, scheme.qmax]).all() else bounds

    def _clamped(self, integers: ir.Value, meaning: ir.Value, bounds: np.ndarray | None) -> ir.Value:
        """Return the quantized form of `meaning` from unclamped integers of its scale."""
        if bounds is None:
            return integers
        name = self._values.name(meaning)
        limits = [self._values.store(f"{name}_{end}", np.asarray(bounds[i])) for i, end in enumerate(("low", "high"))]
        node = self._values.node("Clip", [integers, *limits], f"{name}_clipped_q", meaning, self._values.dtype)
        self._values.insert_after(integers, node)
        return node.outputs[0]

    def _remove(self, node: ir.Node) -> None:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
        self._values.graph.remove(node)

    # --- layers with weights ------------------------------------------------------------------------------------------

    def multiply(self, node: ir.Node) -> None:
        """Let a convolution or a product read a quantized value, weight and bias."""
        operands = data_inputs(node)
        if len(operands) == 1:
            self._quantize_weight(node, operands[0][1])
        for index, value in operands:
            node.replace_input_with(index, self._values.real(value))

    def _quantize_weight(self, node: ir.Node, source: ir.Value) -> None:
        weight, scale = self._weight(_input(node, 1), node)
        if _has_bias(node) and not self._schemes.inputs_only:
            bias = quantize_bias(_bias(node), float(self._values.parameters(source).scale), scale)
            name = _input(node, 2).name or "bias"
            stored = self._values.constant(name, bias.values, bias, 0 if bias.scale.ndim else None)
            self._values.replace_constant(node, 2, stored)
        if weight is not node.inputs[1]:
            self._values.replace_constant(node, 1, weight)
        if node.op_type == "Gemm":
            node.attributes.pop("alpha", None)
            if not self._schemes.inputs_only:
                node.attributes.pop("beta", None)

    def _weight(self, weight: ir.Value, node: ir.Node) -> tuple[ir.Value, np.ndarray]:
        """Return a dequantized weight and its scales; a weight with several readers is stored once."""
        axis, factor = output_axis(node), _factor(node)
        key = (weight, axis, factor)
        if key not in self._weights:
            readers = self._readers(weight, axis, factor)
            rounded = weight.producer()
            if rounded is not None and qgraph.ir.is_op(rounded, "DequantizeLinear"):
                self._weights[key] = self._rounded_weight(weight, rounded, readers)
            else:
                self._weights[key] = self._rounded_now(weight, axis, factor, readers)
        return self._weights[key]

    def _rounded_now(
        self, weight: ir.Value, axis: int, factor: float, readers: Sequence[ir.Node]
    ) -> tuple[ir.Value, np.ndarray]:
        array = _array(weight) * np.float32(factor)
        scheme = self._scheme(weight)
        scheme = scheme.per_channel(array.ndim, axis) if self._schemes.per_channel else scheme
        scale, zero_point = (minmax_parameters if self._schemes.clip == "minmax" else mse_parameters)(array, scheme)
        parameters = Parameters(self._raised(scale, readers), zero_point)
        dtype = ir.DataType.INT4 if scheme.bits == _FOUR else ir.DataType.from_numpy(scheme.dtype)

        def integers(array: np.ndarray) -> np.ndarray:
            codes = quantize(array * np.float32(factor), scheme, parameters).values
            return codes.astype(dtype.numpy(), copy=False)

        name = weight.name or "weight"
        value = self._values.constant(name, _stored(weight, integers, dtype), parameters, axis if scale.ndim else None)
        node = value.producer()
        if scheme.bits == _FOUR and scale.ndim and node is not None:
            node.metadata_props.update({SCHEME_KEY: format_scheme(_FOUR_BITS), NAME_KEY: name})
        return value, parameters.scale

    def _rounded_weight(
        self, weight: ir.Value, rounded: ir.Node, readers: Sequence[ir.Node]
    ) -> tuple[ir.Value, np.ndarray]:
        """Keep a weight that was rounded before, but for channels so small that their bias would not fit."""
        scale = _array(_input(rounded, 1))
        raised = self._raised(scale, readers)
        if not np.array_equal(raised, scale):
            stored = _input(rounded, 0)
            axis = rounded.attributes.get_int("axis", 1) if scale.ndim else 0
            rank = len(_shape(stored))
            ratio = (scale / raised).reshape([-1 if one == axis % rank and scale.ndim else 1 for one in range(rank)])

            def integers(codes: np.ndarray) -> np.ndarray:
                return np.asarray(np.rint(codes.astype(np.float32) * ratio), codes.dtype)

            dtype = stored.dtype or ir.DataType.INT8
            name = (stored.name or "weight").removesuffix("_quantized")
            values = self._values.store(f"{name}_raised", _stored(stored, integers, dtype))
            self._values.replace_constant(rounded, 0, values)
            self._values.replace_constant(rounded, 1, self._values.store(f"{name}_raised_scale", raised))
        return weight, raised

    def _raised(self, scale: np.ndarray, readers: Sequence[ir.Node]) -> np.ndarray:
        """Return weight scales at which the biases of all readers fit into int32."""
        for reader in readers:
            input_scale = float(self._values.parameters(data_inputs(reader)[0][1]).scale)
            scale = weight_scale_for_bias(scale, input_scale, _bias(reader))
        return scale

    def _scheme(self, weight: ir.Value) -> Scheme:
        """Return the scheme of a weight: 4 bits where these are wanted, and its readers note nothing else."""
        width = chosen_bits([use.node for use in weight.uses()], _FOUR if self._schemes.four_bits else _EIGHT)
        return Scheme(_FOUR) if self._schemes.four_bits and width == _FOUR else self._schemes.weight

    def _readers(self, weight: ir.Value, axis: int, factor: float) -> list[ir.Node]:
        """Return the planned layers with a bias in integers that use a weight in this way."""
        if self._schemes.inputs_only:
            return []
        nodes = [use.node for use in weight.uses() if use.node in self._plan.nodes and use.idx == 1]
        return [node for node in nodes if _has_bias(node) and (output_axis(node), _factor(node)) == (axis, factor)]

    # --- operators on activations -------------------------------------------------------------------------------------

    def compute(self, node: ir.Node) -> None:
        """Let a node read quantized values and quantized constants."""
        if node.op_type == "HardSigmoid":
            self._hard_sigmoid(node)
            return
        change = CONSTANT_FORMS.get(node.op_type)
        for index, value in data_inputs(node):
            node.replace_input_with(index, self._values.real(value))
        for index, constant in enumerate(node.inputs):
            array = qgraph.ir.constant(constant)
            if array is None or constant is None or array.dtype != np.float32:
                continue
            operand = array if change is None else change[1](array)
            self._values.replace_constant(node, index, self._values.operand(constant.name or "constant", operand))
        if change is not None:
            node.op_type = change[0]

    def _hard_sigmoid(self, node: ir.Node) -> None:
        """HardSigmoid(x) = clamp(alpha * x + beta); the product only changes what the integers of x mean."""
        source, result = _input(node, 0), node.outputs[0]
        alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
        name, scale = self._values.name(source), self._values.parameters(source).scale
        steeper = self._values.store(f"{name}_line_scale", np.asarray(scale * np.float32(alpha)))
        integers = self._values.integers(source)
        inputs = [integers, steeper, self._values.stored_parameters(source)[1]]
        product = self._values.node("DequantizeLinear", inputs, f"{name}_product", source)
        offset = self._values.operand(f"{name}_offset", np.asarray(beta, np.float32))
        line = self._values.node("Add", [product.outputs[0], offset], f"{name}_line", source)
        qgraph.ir.insert_before(node, product, line)
        quantized = self._values.quantized_from(line.outputs[0], result)
        self._values.define(result, self._clamped(quantized, result, self._saturation(result, 0.0, 1.0)))
        self._values.take_over(result, by=line.outputs[0])
        self._remove(node)


_REWRITES: Mapping[Kind, Callable[[_Rewriter, ir.Node], None]] = {
    Kind.CONVOLUTION: _Rewriter.multiply,
    Kind.PRODUCT: _Rewriter.multiply,
    Kind.ARITHMETIC: _Rewriter.compute,
    Kind.MOVER: _Rewriter.move,
    Kind.CLAMP: _Rewriter.clamp,
    Kind.TABLE: _Rewriter.look_up,
}


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"'{qgraph.ir.node_label(node)}' has no input {index}")
    return value


def _array(value: ir.Value) -> np.ndarray:
    array = qgraph.ir.constant(value)
    if array is None:
        raise ValueError(f"'{value.name}' is not constant")
    return array


def _factor(node: ir.Node) -> float:
    """Return what the weight is multiplied by."""
    return node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0


def _shape(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of a constant, or of a weight that was rounded before."""
    node = value.producer()
    stored = _input(node, 0) if node is not None and qgraph.ir.is_op(node, "DequantizeLinear") else value
    return tuple(stored.const_value.shape.numpy()) if stored.const_value is not None else _array(stored).shape


def _has_bias(node: ir.Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] is not None


def _bias(node: ir.Node) -> np.ndarray:
    """Return the bias of a layer, one number for each output channel."""
    channels = _shape(_input(node, 1))[output_axis(node)]
    factor = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    return np.broadcast_to(_array(_input(node, 2)).reshape(-1) * np.float32(factor), (channels,))


def _stored(
    constant: ir.Value, compute: Callable[[np.ndarray], np.ndarray], dtype: ir.DataType
) -> np.ndarray | ir.TensorProtocol:
    """Return what `compute` makes of a constant, at once or, if that is large, when it is written."""
    tensor = constant.const_value
    if tensor is None or tensor.size <= _LAZY_ABOVE:
        return ir.tensor(compute(_array(constant)), dtype=dtype)
    return qgraph.ir.lazy(lambda: compute(np.asarray(tensor.numpy())), dtype, tensor.shape.numpy())


def _clamp_bounds(node: ir.Node) -> tuple[float, float]:
    if node.op_type == "Relu":
        return 0.0, math.inf
    low, high = (qgraph.ir.constant(node.inputs[i]) if i < len(node.inputs) else None for i in (1, 2))
    return -math.inf if low is None else float(low.item()), math.inf if high is None else float(high.item())
