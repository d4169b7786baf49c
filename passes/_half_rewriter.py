"""Nodes, and the constants that they read, rewritten to a narrower type, with a Cast wherever that meets the wider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.lazy_tensors import Joint, JointTensor, joint_tensors
from qgraph.passes._half_types import BFLOAT16, Half, Kept, half_places, is_wide, rounded, rounded_scales

__all__ = ["rewrite"]

_LAZY_ABOVE = 1 << 16
"""Weights of more elements are rounded when the file is written."""


def rewrite(model: ir.Model, kept: Kept, nodes: Sequence[ir.Node], half: Half, *, keep_io: bool) -> int:
    """Convert `nodes`, of the main graph; return how many had anything to convert.

    Args:
        model: is changed.
        kept: what stays in float32, and which constants are cut off.
        nodes: the others that have to do with float32.
        half: the type.
        keep_io: inputs and outputs of the model stay float32.
    """
    return _Rewriter(model, kept, nodes, half, keep_io=keep_io).run()


class _Rewriter:
    def __init__(self, model: ir.Model, kept: Kept, nodes: Sequence[ir.Node], half: Half, *, keep_io: bool) -> None:
        self._graph = model.graph
        self._format = half
        self._type = ir.TensorType(half.dtype)
        self._kept = kept
        self._nodes = nodes
        self._keep_io = keep_io
        self._opsets = model.graph.opset_imports
        self._half = {node: self._find_places(node) for node in nodes}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._narrowed: dict[ir.Value, None] = {}

    def run(self) -> int:
        """Convert the nodes; return how many had anything to convert."""
        if not self._keep_io:
            given = [value for value in self._graph.inputs if value.const_value is None]
            self._narrowed.update((value, None) for value in given if is_wide(value, self._format))
            for value in self._narrowed:
                value.type = self._type
        weights = self._weights()
        changed = sum([self._convert(node, weights) for node in self._nodes])
        if changed:
            self._cut_in_float()
        self._widen_what_others_read()
        return changed

    def _weights(self) -> dict[ir.Value, ir.Value]:
        """Return float32 initializer -> its form in 16 bits, for those that converted nodes read."""
        readers = {
            value: None
            for node in self._nodes
            for value, fits in zip(node.inputs, self._half[node][0], strict=True)
            if fits and value is not None and _is_constant(value) and is_wide(value, self._format)
        }
        found: dict[ir.Value, ir.Value] = {}
        groups: dict[Joint, list[ir.Value]] = {}
        for value in readers:
            if isinstance(value.const_value, JointTensor):
                groups.setdefault(value.const_value.group, []).append(value)
            else:
                found[value] = self._rounded(value)
        members = [value for value in self._graph.initializers.values() if isinstance(value.const_value, JointTensor)]
        for group, values in groups.items():
            if all(self._read_in_half_only(value) for value in values):
                self._round_group(group, [one for one in members if _group(one) is group])
                found |= {value: value for value in values}
        return found

    def _read_in_half_only(self, value: ir.Value) -> bool:
        return (
            not value.is_graph_output()
            and not value.is_graph_input()
            and all(use.node in self._half and self._half[use.node][0][use.idx] for use in value.uses())
        )

    def _rounded(self, value: ir.Value) -> ir.Value:
        """Return a constant in 16 bits: in its own place if nobody else reads it, else beside it."""
        tensor = value.const_value
        assert tensor is not None
        cut = value in self._kept.masks

        def compute() -> np.ndarray:
            return rounded(np.asarray(tensor.numpy()), self._format, cut=cut)

        lazy = tensor.size > _LAZY_ABOVE
        data = qgraph.ir.lazy(compute, self._format.dtype, tensor.shape.numpy()) if lazy else ir.tensor(compute())
        if self._read_in_half_only(value):
            data.name = value.name
            value.const_value, value.type = data, self._type
            return value
        return qgraph.ir.initializer(self._graph, f"{value.name}_{self._format.ending}", data)

    def _find_places(self, node: ir.Node) -> tuple[list[bool], list[bool]]:
        """Tell which inputs and outputs become 16 bits wide, before anything has."""
        if qgraph.ir.is_op(node, "Cast"):
            return [False], [is_wide(node.outputs[0], self._format)]
        places = half_places(node, self._opsets, self._format)
        assert places is not None
        return places

    def _convert(self, node: ir.Node, weights: Mapping[ir.Value, ir.Value]) -> bool:
        inputs, outputs = self._half[node]
        for index, (value, fits) in enumerate(zip(list(node.inputs), inputs, strict=True)):
            if value is None:
                continue
            if fits and value in weights:
                node.replace_input_with(index, weights[value])
            elif fits and is_wide(value, self._format):
                node.replace_input_with(index, self._cast(value, self._format.dtype))
            elif not fits and value in self._narrowed and not qgraph.ir.is_op(node, "Cast"):
                node.replace_input_with(index, self._cast(value, self._format.wide))
        for value, fits in zip(node.outputs, outputs, strict=True):
            if fits and is_wide(value, self._format):
                self._narrow(value)
        if any(outputs):
            self._convert_attributes(node)
        return any(outputs) or any(inputs)

    def _convert_attributes(self, node: ir.Node) -> None:
        if qgraph.ir.is_op(node, "Attention") and self._format is BFLOAT16:
            # Its sums of exponentials would have 8 bits otherwise.
            node.attributes.setdefault("softmax_precision", ir.AttrInt64("softmax_precision", int(self._format.wide)))
        elif qgraph.ir.is_op(node, "Cast"):
            node.attributes["to"] = ir.AttrInt64("to", int(self._format.dtype))
        elif qgraph.ir.is_op(node, "ConstantOfShape"):
            tensor = (
                node.attributes["value"].as_tensor()
                if "value" in node.attributes
                else ir.tensor(np.zeros(1, np.float32))
            )
            array = rounded(np.asarray(tensor.numpy()), self._format, cut=True)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))

    def _narrow(self, value: ir.Value) -> None:
        """Make an output of 16 bits; a graph output keeps name and type behind a Cast."""
        value.type = self._type
        self._narrowed[value] = None
        if not value.is_graph_output() or not self._keep_io:
            return
        name = value.name
        value.name = qgraph.ir.fresh_name(self._graph, f"{name}_{self._format.ending}")
        widened = self._cast(value, self._format.wide)
        widened.name = name
        for index, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[index] = widened

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """Return a value in the other type, behind a Cast right after whatever makes it."""
        if (value, to) not in self._casts:
            ending = self._format.ending if to == self._format.dtype else self._format.wide_ending
            label = qgraph.ir.fresh_name(self._graph, f"{value.name}_to_{ending}")
            node = ir.node("Cast", [value], {"to": int(to)}, name=label)
            output = node.outputs[0]
            output.name = qgraph.ir.fresh_name(self._graph, f"{value.name}_{ending}")
            output.type, output.shape = ir.TensorType(to), value.shape
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(producer, node)
            self._casts[value, to] = output
        return self._casts[value, to]

    def _widen_what_others_read(self) -> None:
        """Give the nodes that stay in float32, and subgraphs, float32 again where a value has become one of 16 bits."""
        for value in list(self._narrowed):
            for use in list(value.uses()):
                if use.node not in self._half and not qgraph.ir.is_op(use.node, "Cast"):
                    use.node.replace_input_with(use.idx, self._cast(value, self._format.wide))

    def _round_group(self, group: Joint, members: Sequence[ir.Value]) -> None:
        """Round the float32 tensors that are computed together; they stay together."""
        tensors = [value.const_value for value in members if isinstance(value.const_value, JointTensor)]
        old = {tensor.index: (tensor.dtype, tuple(tensor.shape.numpy())) for tensor in tensors}
        readers = [use.node for value in members for use in value.uses()]
        readers += [use.node for node in readers for value in node.outputs for use in value.uses()]
        labels = list(dict.fromkeys(qgraph.ir.node_label(node) for node in readers))
        # A tensor that no initializer holds any more keeps its place.
        nothing: tuple[ir.DataType, tuple[int, ...]] = (ir.DataType.UINT8, ())
        specs = [old.get(index, nothing) for index in range(max(old) + 1)]
        halves = [(self._format.dtype if dtype == self._format.wide else dtype, shape) for dtype, shape in specs]
        half = self._format

        def compute() -> Sequence[ir.TensorProtocol]:
            return [
                ir.tensor(rounded_scales(np.asarray(part.numpy()), half, labels)) if part.dtype == half.wide else part
                for part in group.compute()
            ]

        new = joint_tensors(compute, halves, source=group.source)
        for value, tensor in zip(members, tensors, strict=True):
            value.const_value = new[tensor.index]
            value.const_value.name = value.name
            value.type = ir.TensorType(halves[tensor.index][0])

    def _cut_in_float(self) -> None:
        """Cut off the masks that nodes in float32 read, where what they make would be rounded to infinity."""
        if self._format.mask > -self._format.largest:
            return  # masks are much smaller in this type, so that those in float32 must stay what they are
        for value in sorted(self._kept.masks, key=lambda one: one.name or ""):
            tensor = value.const_value
            readers = [use for use in value.uses() if use.node in self._kept.reasons and use.node.graph is self._graph]
            if tensor is None or not is_wide(value, self._format) or not readers:
                continue
            array = np.asarray(np.clip(tensor.numpy(), self._format.mask, self._format.largest))
            cut = qgraph.ir.initializer(self._graph, f"{value.name}_cut", array)
            for node, index in readers:
                node.replace_input_with(index, cut)
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del self._graph.initializers[value.name or ""]
        for node in self._kept.reasons:
            if (
                qgraph.ir.is_op(node, "ConstantOfShape")
                and "value" in node.attributes
                and is_wide(node.outputs[0], self._format)
            ):
                array = np.asarray(node.attributes["value"].as_tensor().numpy())
                array = np.clip(array, self._format.mask, self._format.largest)
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))


def _is_constant(value: ir.Value) -> bool:
    """Tell whether a value is stored, and no default of an input, for which a caller may give something else."""
    return value.const_value is not None and not value.is_graph_input()


def _group(value: ir.Value) -> Joint | None:
    return value.const_value.group if isinstance(value.const_value, JointTensor) else None
