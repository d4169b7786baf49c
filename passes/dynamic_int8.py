"""8-bit weights, and activations quantized as they come.

    y = MatMul(x, W) + b     =>    y = DynamicQuantizeMatMul(x, W8, scales, , b)
    where x has more readers =>    x8, s, z = DynamicQuantizeLinear(x), once
                                   y = MatMulIntegerToFloat(x8, W8, s, scales, z, , b)
    y = Gemm(x, W, b)        =>    the same, W laid out [in, out]
    y = LSTM(x, W, R, ...)   =>    y = DynamicQuantizeLSTM(x, W8, R8, ...)
    y = Gather(T, i)         =>    y = GatherBlockQuantized(T8, i, scales)      T [rows, columns], along the rows

Weights are symmetric int8, with one scale for each output column; x is uint8 with one scale and zero point for the
tensor, found at run time, so no calibration is needed. The operators are ONNX Runtime's own (com.microsoft).

    n = LayerNormalization(Add(r, MatMul(x, W) + b))
    =>
    n = LayerNormalization(Sub(r, DynamicQuantizeMatMul(x, -W8, scales, , -b)))

The same to the last bit, but ONNX Runtime leaves it: Add and LayerNormalization it fuses to SkipLayerNormalization,
which takes more than twice the time of the two on a CPU.

Left in float: products of two activations, weights that are computed, left factors, of another type than float32, of
more than two dimensions, smaller than `min_elements` or read by somebody who stays in float, what ONNX Runtime has no
kernel for, convolutions, GRU and RNN, what `exclude` names, what the metadata of its node say is to stay in float. A
second run finds nothing.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.numerics.quantize import Parameters, minmax_parameters, mse_parameters, quantize
from qgraph.numerics.schemes import INT8_WEIGHT, UINT8_WEIGHT, Scheme
from qgraph.passes._integer_layers import (
    BLOCKS,
    Layer,
    UnfitError,
    dims_of,
    is_candidate,
    layer_of,
    subtracted,
    without_shared,
)
from qgraph.passes._kernels import lacking
from qgraph.passes._weight_options import FLOAT_KEY, chosen_bits
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["DynamicInt8"]

_MICROSOFT = "com.microsoft"
_TABLE = "onnxruntime-cpu"
"""Whose kernels these are."""
_OPERATORS = {
    "Gather": "com.microsoft.GatherBlockQuantized",
    "Gemm": "com.microsoft.DynamicQuantizeMatMul",
    "LSTM": "com.microsoft.DynamicQuantizeLSTM",
    "MatMul": "com.microsoft.DynamicQuantizeMatMul",
}
"""What layers become; MatMulIntegerToFloat has kernels for the same types as DynamicQuantizeMatMul."""
_WEIGHTED_INPUTS = {"Gather": 2, "Gemm": 2, "LSTM": 3, "MatMul": 2}
"""Inputs that a layer and what it becomes have in common."""
_LAZY_ABOVE = 1 << 20
"""Weights of more elements are quantized when the file is written."""
_LSTM_INPUTS = 8
_LSTM_ATTRIBUTES = (
    "activation_alpha",
    "activation_beta",
    "activations",
    "clip",
    "direction",
    "hidden_size",
    "input_forget",
)


@dataclass(frozen=True)
class DynamicInt8(Pass):
    """Store weights in 8 bits and multiply in integers, with activations quantized at run time."""

    name: ClassVar[str] = "dynamic-int8"
    per_channel: bool = field(default=True, metadata={"help": "one scale for each output column, not for the tensor"})
    method: Literal["minmax", "mse"] = field(default="minmax", metadata={"help": "how weight scales are found"})
    reduce_range: bool = field(default=False, metadata={"help": "7-bit weights, for x86 processors without VNNI"})
    embeddings: bool = field(default=True, metadata={"help": "store the tables of Gather in 8 bits too"})
    min_elements: int = field(default=4096, metadata={"help": "smaller weights stay in float"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Quantize; `skipped` has every node with a weight or a product that stays in float."""
        layers: list[Layer] = []
        skipped: list[Skipped] = []
        for node in filter(is_candidate, qgraph.ir.walk(model)):
            label = qgraph.ir.node_label(node)
            try:
                layer = layer_of(node, self.min_elements)
            except UnfitError as reason:
                skipped.append(Skipped(label, str(reason)))
                continue
            if any(fnmatch.fnmatchcase(label, pattern) for pattern in self.exclude):
                skipped.append(Skipped(label, "it is excluded"))
            elif chosen_bits([node], 8) is None:
                skipped.append(Skipped(label, node.metadata_props.get(FLOAT_KEY, "its weight is to stay in float")))
            elif node.op_type == "Gather" and not self.embeddings:
                continue
            elif (without := _no_kernel(layer)) is not None:
                skipped.append(Skipped(label, without))
            elif (weight := _not_finite(layer)) is not None:
                skipped.append(Skipped(label, f"its weight '{weight}' holds NaN or infinity"))
            else:
                layers.append(layer)
        layers, shared = without_shared(layers)
        layers = subtracted(layers)
        skipped += shared
        if not layers:
            return Report(skipped=skipped)
        context.keep_reference(model)
        rewriter = _Rewriter(self, model)
        counts = Counter(layer.node.op_type for layer in layers)
        rewriter.run(layers)
        model.graph.opset_imports.setdefault(_MICROSOFT, 1)
        notes = [f"{count} {op_type} in 8 bits" for op_type, count in sorted(counts.items())]
        return Report(changed=len(layers), skipped=skipped, notes=notes)


def _no_kernel(layer: Layer) -> str | None:
    """Return why there is no kernel for what a layer would become."""
    op_type = layer.node.op_type
    stored = ir.DataType.UINT8 if op_type == "Gather" else ir.DataType.INT8
    values = layer.node.inputs[: _WEIGHTED_INPUTS[op_type]]
    types = [
        stored if index in layer.weights else None if value is None else value.dtype
        for index, value in enumerate(values)
    ]
    return lacking(_OPERATORS[op_type], types, _TABLE)


class _Rewriter:
    def __init__(self, options: DynamicInt8, model: ir.Model) -> None:
        self._options = options
        self._model = model
        self._graph = model.graph
        self._weights: dict[tuple[object, ...], list[ir.Value]] = {}
        self._inputs: dict[tuple[ir.Value, ir.Graph], Sequence[ir.Value]] = {}

    def run(self, layers: Sequence[Layer]) -> None:
        products = [layer for layer in layers if layer.node.op_type in ("MatMul", "Gemm")]
        readers = Counter((layer.node.inputs[0], layer.node.graph) for layer in products)
        shared = {layer.node for layer in products if readers[layer.node.inputs[0], layer.node.graph] > 1}
        displaced = [layer.node.inputs[index] for layer in layers for index in layer.weights]
        displaced += [layer.bias for layer in layers]
        for layer in layers:
            if layer.node.op_type == "Gather":
                new = self._embedding(layer)
            elif layer.node.op_type == "LSTM":
                new = self._recurrence(layer)
            else:
                new = self._product(layer, shared=layer.node in shared)
            self._replace(layer, new)
        self._drop(displaced)

    def _product(self, layer: Layer, *, shared: bool) -> ir.Node:
        x, weight = layer.node.inputs[:2]
        assert x is not None
        assert weight is not None
        values, scale = self._matrix(weight, layer)
        bias = self._bias(layer, dims_of(values)[1])
        if not shared:
            return self._new("DynamicQuantizeMatMul", [x, values, scale, None, bias], layer.node)
        integers, input_scale, zero_point = self._quantized_input(x, layer.node)
        inputs = [integers, values, input_scale, scale, zero_point, None, bias]
        return self._new("MatMulIntegerToFloat", inputs, layer.node)

    def _bias(self, layer: Layer, columns: int) -> ir.Value | None:
        """Return the bias as [columns]."""
        if layer.bias is None or (dims_of(layer.bias) == (columns,) and layer.bias_factor == 1.0):
            return layer.bias
        array = qgraph.ir.constant(layer.bias)
        assert array is not None
        spread = np.broadcast_to(array.reshape(-1) * np.float32(layer.bias_factor), (columns,))
        return self._constant(f"{layer.bias.name}_spread", np.ascontiguousarray(spread))

    def _quantized_input(self, x: ir.Value, before: ir.Node) -> Sequence[ir.Value]:
        """Return x in uint8, its scale and its zero point; they are computed before the first node that needs them."""
        graph = before.graph
        assert graph is not None
        key = (x, graph)
        if key not in self._inputs:
            node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
            node.name = qgraph.ir.fresh_name(self._graph, f"{x.name}_quantize")
            types = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            for output, part, dtype in zip(node.outputs, ("uint8", "scale", "zero_point"), types, strict=True):
                output.name = qgraph.ir.fresh_name(self._graph, f"{x.name}_{part}")
                output.type = ir.TensorType(dtype)
            qgraph.ir.insert_before(before, node)
            self._inputs[key] = node.outputs
        return self._inputs[key]

    def _embedding(self, layer: Layer) -> ir.Node:
        table, indices = layer.node.inputs[:2]
        assert table is not None
        block = next(size for size in BLOCKS if dims_of(table)[1] % size == 0)
        scheme = UINT8_WEIGHT.per_group(2, 1, block)
        key = (table, "embedding")
        if key not in self._weights:
            self._weights[key] = self._store(table, f"{table.name}", lambda array: array, scheme)
        values, scale = self._weights[key]
        attributes = {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        return self._new("GatherBlockQuantized", [values, indices, scale], layer.node, attributes)

    def _recurrence(self, layer: Layer) -> ir.Node:
        node = layer.node
        inputs: list[ir.Value | None] = [*node.inputs, *[None] * (_LSTM_INPUTS - len(node.inputs))]
        parameters: list[ir.Value] = []
        for index in layer.weights:
            weight = node.inputs[index]
            assert weight is not None
            key = (weight, "recurrence")
            if key not in self._weights:
                self._weights[key] = self._gates(weight)
            inputs[index], *rest = self._weights[key]
            parameters += rest
        attributes = {name: node.attributes[name] for name in _LSTM_ATTRIBUTES if name in node.attributes}
        new = self._new("DynamicQuantizeLSTM", [*inputs, *parameters], node, outputs=len(node.outputs))
        new.attributes.update({name: ir.Attr(name, one.type, one.value) for name, one in attributes.items()})
        return new

    def _gates(self, weight: ir.Value) -> list[ir.Value]:
        """Return a weight [directions, gates, in] as int8 [directions, in, gates], its scales and its zero points."""
        scheme = self._scheme()
        scheme = Scheme(scheme.bits, narrow=scheme.narrow, block_shape=(1, -1, 1 if self._options.per_channel else -1))
        values, scale = self._store(weight, f"{weight.name}", lambda array: array.transpose(0, 2, 1), scheme)
        zeros = self._constant(f"{weight.name}_zero_point", np.zeros(dims_of(scale), np.int8))
        return [values, scale, zeros]

    def _matrix(self, weight: ir.Value, layer: Layer) -> list[ir.Value]:
        """Return a weight as int8 [in, out] and its scales."""
        key = (weight, layer.transposed, layer.factor)
        if key not in self._weights:
            scheme = self._scheme().per_channel(2, 1) if self._options.per_channel else self._scheme()
            factor = np.float32(layer.factor)

            def layout(array: np.ndarray) -> np.ndarray:
                array = array.T if layer.transposed else array
                return array if factor == 1.0 else array * factor

            self._weights[key] = self._store(weight, f"{weight.name}", layout, scheme)
        return self._weights[key]

    def _scheme(self) -> Scheme:
        return Scheme(bits=7, narrow=True) if self._options.reduce_range else INT8_WEIGHT

    def _store(
        self, weight: ir.Value, name: str, layout: Callable[[np.ndarray], np.ndarray], scheme: Scheme
    ) -> list[ir.Value]:
        """Add the integers and the scales of a weight to the model."""
        tensor = weight.const_value
        assert tensor is not None
        array = layout(tensor.numpy())
        parameters = (mse_parameters if self._options.method == "mse" else minmax_parameters)(array, scheme)
        dtype = ir.DataType.from_numpy(scheme.dtype)
        integers: np.ndarray | ir.LazyTensor
        if array.size > _LAZY_ABOVE:
            integers = qgraph.ir.lazy(lambda: _integers(tensor, layout, scheme, parameters), dtype, array.shape)
        else:
            integers = _integers(tensor, layout, scheme, parameters)
        values = qgraph.ir.initializer(self._graph, f"{name}_{scheme.dtype}", integers)
        scale = qgraph.ir.initializer(self._graph, f"{name}_scale", _kernel_scale(parameters, array.shape, scheme))
        return [values, scale]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return qgraph.ir.initializer(self._graph, name, array)

    def _new(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Node,
        attributes: dict[str, int] | None = None,
        outputs: int = 1,
    ) -> ir.Node:
        while inputs[-1] is None:
            inputs = inputs[:-1]
        return ir.node(op_type, inputs, attributes, domain=_MICROSOFT, num_outputs=outputs, name=like.name)

    def _replace(self, layer: Layer, new: ir.Node) -> None:
        qgraph.ir.replace_node(layer.last, new)
        if layer.node is not layer.last:
            qgraph.ir.discard(layer.node)
        if layer.residual is not None:
            product = new.outputs[0]
            other = next(value for value in layer.residual.inputs if value is not product)
            product.name = qgraph.ir.fresh_name(self._graph, f"{product.name}_negated")  # it is not what it was
            qgraph.ir.replace_node(layer.residual, ir.node("Sub", [other, product], name=layer.residual.name))

    def _drop(self, displaced: Sequence[ir.Value | None]) -> None:
        unread = {value for value in displaced if value is not None and not value.uses()}
        for graph in qgraph.ir.all_graphs(self._model):
            for name in [name for name, value in graph.initializers.items() if value in unread]:
                del graph.initializers[name]


def _not_finite(layer: Layer) -> str | None:
    """Return the name of a weight with elements that no integer can stand for, or None."""
    for index in layer.weights:
        weight = layer.node.inputs[index]
        tensor = weight.const_value if weight is not None else None
        if weight is None or tensor is None or not tensor.size:
            continue
        array = np.asarray(tensor.numpy())
        if not (np.isfinite(array.min()) and np.isfinite(array.max())):  # NaN is its own least and largest
            return weight.name
    return None


def _integers(
    tensor: ir.TensorProtocol, layout: Callable[[np.ndarray], np.ndarray], scheme: Scheme, parameters: Parameters
) -> np.ndarray:
    return np.ascontiguousarray(quantize(layout(tensor.numpy()), scheme, parameters).values)


def _kernel_scale(parameters: Parameters, shape: tuple[int, ...], scheme: Scheme) -> np.ndarray:
    """Return scales as the kernels want them: for a weight of three dimensions [directions, columns or one]."""
    if len(shape) < 3:
        return np.asarray(parameters.scale)
    grid = scheme.grid(shape)
    scale = np.asarray(parameters.scale).reshape(grid[0], grid[2])
    return scale if grid[2] > 1 else scale[:, 0]
