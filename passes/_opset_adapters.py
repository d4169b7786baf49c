"""What changes in a node when its operator's definition does: one function for each step of each operator.

An adapter gets a node as it was defined before a version and leaves it as that version defines it; it is listed under
the operator and that version in `ADAPTERS`. Steps that only add types, or attributes and inputs whose default means
what was meant before, need none. Source: the changelog of operators, https://onnx.ai/onnx/repo-docs/Changelog.html;
for what it leaves open (Upsample, Resize of opset 10), what ONNX Runtime computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.symbols import Dim

__all__ = ["ADAPTERS", "Adapter", "Builder"]


class Builder(Protocol):
    """What adapters may ask for."""

    def constant(self, node: ir.Node, array: np.ndarray, name: str) -> ir.Value:
        """Return a constant that `node` may read."""

    def value_of(self, value: ir.Value | None) -> np.ndarray | None:
        """Return the elements of a small constant."""

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type."""

    def dims(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """Return the shape."""

    def fresh(self, name: str) -> str:
        """Return a name that is free."""

    def refuse(self, node: ir.Node, reason: str) -> NoReturn:
        """Raise the error that the node cannot be converted."""


Adapter: TypeAlias = Callable[[ir.Node, Builder], None]


def _to_inputs(node: ir.Node, build: Builder, *names: str) -> None:
    """Turn integer attributes into inputs, in this order after those that are there."""
    given = [node.attributes.pop(name, None) for name in names]
    while given and given[-1] is None:
        given.pop()
    place = len(node.inputs)
    node.resize_inputs(place + len(given))
    for offset, (name, attribute) in enumerate(zip(names, given, strict=False)):
        if attribute is not None:
            numbers = np.atleast_1d(np.array(attribute.value, dtype=np.int64))
            node.replace_input_with(place + offset, build.constant(node, numbers, name))


def _inputs_from(*names: str) -> Adapter:
    return lambda node, build: _to_inputs(node, build, *names)


def _drop_outputs(node: ir.Node, build: Builder, reason: str) -> None:
    """Remove all outputs but the first; refuse if one is read."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        build.refuse(node, reason)
    node.resize_outputs(1)


def _batch_norm_9(node: ir.Node, build: Builder) -> None:
    if node.attributes.get_int("spatial", 1) == 0:
        build.refuse(node, "spatial=0, statistics for every element, exists no more")
    node.attributes.pop("spatial", None)


def _batch_norm_14(node: ir.Node, build: Builder) -> None:
    _drop_outputs(node, build, "it is in training mode, and its statistics are read")


def _upsample_9(node: ir.Node, build: Builder) -> None:
    scales = node.attributes.pop("scales")
    node.resize_inputs(2)
    node.replace_input_with(1, build.constant(node, np.array(scales.as_floats(), dtype=np.float32), "scales"))


def _upsample_10(node: ir.Node, build: Builder) -> None:
    del build
    node.op_type = "Resize"
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")


def _resize_11(node: ir.Node, build: Builder) -> None:
    """Read (X, scales) as (X, roi, scales); coordinates are scaled without an offset."""
    scales = node.inputs[1]
    if node.attributes.get_string("mode", "nearest") == "nearest" and "nearest_mode" not in node.attributes:
        node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", _nearest_mode(node, build))
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)


def _nearest_mode(node: ir.Node, build: Builder) -> str:
    """Return how Resize of opset 10 rounds: down when it enlarges, up when it shrinks."""
    scales = build.value_of(node.inputs[1])
    if scales is None:
        build.refuse(node, "its scales are computed, so whether it rounds up or down is not known")
    if np.any(scales < 1) and np.any(scales > 1):
        build.refuse(node, "it enlarges along one axis and shrinks along another")
    return "ceil" if np.any(scales < 1) else "floor"


def _scan_9(node: ir.Node, build: Builder) -> None:
    build.refuse(node, "Scan of opset 8 has a batch axis and sequence lengths, which exist no more")


def _dropout_12(node: ir.Node, build: Builder) -> None:
    """The mask was all false at inference as runtimes computed it, and no boolean before 10; now it is all true."""
    _drop_outputs(node, build, "its mask is read, which means something else now")
    ratio = node.attributes.pop("ratio", None)
    if ratio is not None:
        node.resize_inputs(2)
        node.replace_input_with(1, build.constant(node, np.array(ratio.as_float(), dtype=np.float32), "ratio"))


def _scalar(node: ir.Node, build: Builder, number: float, name: str) -> ir.Value:
    """Return a constant of the type of the node's first input."""
    dtype = build.dtype(node.inputs[0])
    if dtype is None:
        build.refuse(node, f"the type of its input '{node.inputs[0].name if node.inputs[0] else ''}' is not known")
    return build.constant(node, np.array(number, dtype=dtype.numpy()), name)


def _clip_11(node: ir.Node, build: Builder) -> None:
    low, high = node.attributes.pop("min", None), node.attributes.pop("max", None)
    node.resize_inputs(3 if high is not None else 2 if low is not None else 1)
    if low is not None:
        node.replace_input_with(1, _scalar(node, build, low.as_float(), "min"))
    if high is not None:
        node.replace_input_with(2, _scalar(node, build, high.as_float(), "max"))


def _pad_11(node: ir.Node, build: Builder) -> None:
    value = node.attributes.pop("value", None)
    _to_inputs(node, build, "pads")
    if value is not None and value.as_float() != 0:
        node.resize_inputs(3)
        node.replace_input_with(2, _scalar(node, build, value.as_float(), "value"))


def _scatter_11(node: ir.Node, build: Builder) -> None:
    del build
    node.op_type = "ScatterElements"


def _softmax_13(node: ir.Node, build: Builder) -> None:
    """Before, everything from `axis` on was one axis: Softmax of a matrix. Now it is one axis only."""
    axis = node.attributes.get_int("axis", 1)
    dims = build.dims(node.inputs[0])
    if dims is not None and axis < 0:
        axis += len(dims)
    if axis == -1 or (dims is not None and axis == len(dims) - 1):
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
    elif dims is not None and all(dim == 1 for dim in dims[axis + 1 :]):
        node.attributes["axis"] = ir.AttrInt64("axis", axis)
    else:
        _as_matrix(node, build, axis)


def _as_matrix(node: ir.Node, build: Builder, axis: int) -> None:
    """Flatten the input from `axis` on, compute along rows, and give the result its shape back."""
    data, output = node.inputs[0], node.outputs[0]
    flat = ir.node("Flatten", [data], {"axis": axis})
    rows = ir.node(node.op_type, flat.outputs, {"axis": -1}, name=node.name)
    shape = ir.node("Shape", [data])
    back = ir.node("Reshape", [rows.outputs[0], shape.outputs[0]])
    for new, what in ((flat, "flat"), (rows, "rows"), (shape, "shape")):
        new.outputs[0].name = build.fresh(f"{output.name}_{what}")
    qgraph.ir.replace_node(node, [flat, rows, shape, back])


def _split_18(node: ir.Node, build: Builder) -> None:
    del build
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _roi_align_16(node: ir.Node, build: Builder) -> None:
    del build
    mode = ir.AttrString("coordinate_transformation_mode", "output_half_pixel")
    node.attributes["coordinate_transformation_mode"] = mode


def _dft_20(node: ir.Node, build: Builder) -> None:
    axis = node.attributes.pop("axis", None)
    node.resize_inputs(3)
    number = np.array(axis.as_int() if axis is not None else 1, dtype=np.int64)
    node.replace_input_with(2, build.constant(node, number, "axis"))


def _grid_sample_20(node: ir.Node, build: Builder) -> None:
    del build
    mode = node.attributes.get_string("mode", "bilinear")
    node.attributes["mode"] = ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


def _group_norm_21(node: ir.Node, build: Builder) -> None:
    """Repeat scale and bias, which were one number a group, for every channel."""
    dims = build.dims(node.inputs[0])
    groups = node.attributes.get_int("num_groups", 0)
    channels = dims[1] if dims is not None and len(dims) > 1 else None
    if not isinstance(channels, int) or groups < 1 or channels % groups:
        build.refuse(node, "its number of channels is not known")
    for place in (1, 2):
        array = build.value_of(node.inputs[place])
        if array is None:
            build.refuse(node, "its scale or bias is computed, or very large")
        if array.size == groups:
            node.replace_input_with(place, build.constant(node, np.repeat(array, channels // groups), "group_norm"))


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

_BY_OPERATOR: Mapping[str, Sequence[tuple[int, Adapter]]] = {
    "BatchNormalization": [(9, _batch_norm_9), (14, _batch_norm_14)],
    "Clip": [(11, _clip_11)],
    "DFT": [(20, _dft_20)],
    "Dropout": [(12, _dropout_12)],
    "GridSample": [(20, _grid_sample_20)],
    "GroupNormalization": [(21, _group_norm_21)],
    "Hardmax": [(13, _softmax_13)],
    "LogSoftmax": [(13, _softmax_13)],
    "Pad": [(11, _pad_11)],
    "ReduceSum": [(13, _inputs_from("axes"))],
    "Resize": [(11, _resize_11)],
    "RoiAlign": [(16, _roi_align_16)],
    "Scan": [(9, _scan_9)],
    "Scatter": [(11, _scatter_11)],
    "Slice": [(10, _inputs_from("starts", "ends", "axes"))],
    "Softmax": [(13, _softmax_13)],
    "Split": [(13, _inputs_from("split")), (18, _split_18)],
    "Squeeze": [(13, _inputs_from("axes"))],
    "TopK": [(10, _inputs_from("k"))],
    "Unsqueeze": [(13, _inputs_from("axes"))],
    "Upsample": [(9, _upsample_9), (10, _upsample_10)],
}

ADAPTERS: Mapping[str, Sequence[tuple[int, Adapter]]] = {
    **_BY_OPERATOR,
    **{f"Reduce{name}": [(18, _inputs_from("axes"))] for name in _REDUCTIONS},
}
"""Operator -> the versions that changed what a node means, in order, each with its adapter."""
