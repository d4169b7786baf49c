"""The parts that `low-rank` puts in the place of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.convolutions import Convolution
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.numerics.low_rank import factors, tucker

__all__ = ["Part", "Parts", "add_beside", "replace_layer", "spatial_parts", "tucker_parts", "two_parts"]


@dataclass(frozen=True)
class Part:
    """One product of several: its weight, float32, as the operator reads it, and the attributes that are its own."""

    weight: np.ndarray
    attributes: Mapping[str, Any] = field(default_factory=dict)


Parts = Sequence[Part]
"""In the order in which they run."""


def two_parts(layer: LinearLayer, first: np.ndarray, second: np.ndarray) -> Parts:
    """Return two products for a layer: [r, K] and [N, r]; the second of a convolution has one element."""
    if not isinstance(layer, Convolution):
        return Part(np.ascontiguousarray(first.T)), Part(np.ascontiguousarray(second.T))
    taps = layer.shape[2:]
    kernel = second.reshape(*second.shape, *(1 for _ in taps))
    return Part(first.reshape(len(first), -1, *taps), _window(layer)), Part(kernel, _plain(len(taps)))


def spatial_parts(layer: Convolution, rank: int) -> Parts:
    """Return a convolution down, k x 1, and one across, 1 x k."""
    outputs, inputs, height, width = layer.shape
    kernel = layer.matrix().reshape(layer.shape)
    both = factors(kernel.transpose(0, 3, 1, 2).reshape(outputs * width, inputs * height), None, rank)
    down = both.first.reshape(rank, inputs, height, 1)
    across = both.second.reshape(outputs, width, rank).transpose(0, 2, 1).reshape(outputs, rank, 1, width)
    window = _window(layer)
    pads = window.get("pads") or [0] * 4
    strides, dilations = window.get("strides") or [1, 1], window.get("dilations") or [1, 1]
    halves: list[dict[str, Any]] = [{}, {}]
    for axis, half in enumerate(halves):
        keep = [1 - axis, axis]
        half["kernel_shape"] = [height, 1] if axis == 0 else [1, width]
        half["strides"] = [strides[0], 1] if axis == 0 else [1, strides[1]]
        half["dilations"] = [dilations[0], 1] if axis == 0 else [1, dilations[1]]
        if window.get("auto_pad") in (None, "NOTSET"):
            half["pads"] = [pad * keep[place % 2] for place, pad in enumerate(pads)]
        else:
            half["auto_pad"] = window["auto_pad"]
    return Part(np.ascontiguousarray(down), halves[0]), Part(np.ascontiguousarray(across), halves[1])


def tucker_parts(layer: Convolution, rank: int) -> Parts:
    """Return a convolution of one element, the core, and another of one element."""
    kernel = layer.matrix().reshape(layer.shape)
    ranks = min(rank, layer.shape[1]), min(rank, layer.shape[0])
    first, core, last = tucker(kernel, ranks)
    ones = tuple(1 for _ in layer.shape[2:])
    return (
        Part(first.reshape(*first.shape, *ones), _plain(len(ones))),
        Part(core, _window(layer)),
        Part(last.reshape(*last.shape, *ones), _plain(len(ones))),
    )


def _window(layer: LinearLayer) -> dict[str, Any]:
    """Return the attributes of a convolution that say how it moves."""
    names = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")
    given = layer.node.attributes
    found = {name: given[name].value for name in names if name in given}
    return {name: list(value) if not isinstance(value, str) else value for name, value in found.items()}


def _plain(axes: int) -> dict[str, Any]:
    return {"kernel_shape": [1] * axes}


def replace_layer(model: ir.Model, layer: LinearLayer, parts: Parts) -> None:
    """Put parts in the place of a layer; its bias goes to the last."""
    node = layer.node
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    nodes: list[ir.Node] = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        weight = qgraph.ir.initializer(model.graph, f"{layer.weight.name}_{number}", part.weight.astype(_numpy(layer)))
        inputs = [x, weight, *(node.inputs[2:3] if last else ())]
        attributes = {**part.attributes, **_own(node, first=number == 0, last=last)}
        name = qgraph.ir.fresh_name(model.graph, f"{layer.name}_{number}")
        new = ir.node(node.op_type, inputs, attributes, name=name)
        x = new.outputs[0]
        x.name, x.type = (f"{result.name}_{number}", result.type) if not last else (None, result.type)
        if not last:
            x.name = qgraph.ir.fresh_name(model.graph, f"{result.name}_{number}")
        nodes.append(new)
    nodes[-1].metadata_props.update(node.metadata_props)
    qgraph.ir.replace_node(node, nodes, [nodes[-1].outputs[0]])
    if not layer.weight.uses() and not layer.weight.is_graph_output():
        model.graph.initializers.pop(layer.weight.name or "", None)


def _own(node: ir.Node, *, first: bool, last: bool) -> dict[str, Any]:
    """Return the attributes of a Gemm that belong to its first or to its last part."""
    if node.op_type != "Gemm":
        return {}
    found: dict[str, Any] = {}
    if first:
        found |= {"alpha": node.attributes.get_float("alpha", 1.0), "transA": node.attributes.get_int("transA", 0)}
    if last:
        found |= {"beta": node.attributes.get_float("beta", 1.0)}
    return found


def _numpy(layer: LinearLayer) -> Any:
    assert layer.weight.dtype is not None
    return layer.weight.dtype.numpy()


def add_beside(model: ir.Model, node: ir.Node, first: np.ndarray, second: np.ndarray) -> None:
    """Add the product of an activation with two thin matrices, [r, K] and [N, r], to what a layer gives."""
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    graph = model.graph
    dtype = result.dtype.numpy() if result.dtype is not None else np.dtype(np.float32)
    base = qgraph.ir.node_label(node)
    thin = [
        qgraph.ir.initializer(graph, f"{base}_error_{place}", np.ascontiguousarray(matrix.T).astype(dtype))
        for place, matrix in enumerate((first, second))
    ]
    inner = ir.node("MatMul", [x, thin[0]], name=qgraph.ir.fresh_name(graph, f"{base}_error_0"))
    outer = ir.node("MatMul", [inner.outputs[0], thin[1]], name=qgraph.ir.fresh_name(graph, f"{base}_error_1"))
    total = ir.node("Add", [result, outer.outputs[0]], name=qgraph.ir.fresh_name(graph, f"{base}_with_error"))
    for one in (inner, outer, total):
        one.outputs[0].name, one.outputs[0].type = one.name, result.type
    total.outputs[0].shape = result.shape
    result.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, result)
    assert node.graph is not None
    node.graph.insert_after(node, [inner, outer, total])
    if total.outputs[0].is_graph_output():
        total.outputs[0].name, result.name = result.name, qgraph.ir.fresh_name(graph, f"{result.name}_rounded")
