"""float32 to float16, but for what would overflow.

    y = MatMul(x, W)                         =>    y = MatMul(x16, W16)            W16 rounded once, when written
    y = x / Sqrt(ReduceMean(x * x) + eps)    =>    y16 = Cast(x32 / Sqrt(ReduceMean(x32 * x32) + eps)), x32 = Cast(x)
    s = Where(mask, s, -3.4e38)              =>    s16 = Where(mask, s16, -16384)
    x (input)                                =>    x16 = Cast(x)                   unless keep_io=false

float16 ends at 65504 and holds whole numbers exactly up to 2048. What stays in float32, each with its reason: sums and
powers and what normalizes with them; angles computed from positions (rotary embeddings); nodes with constants beyond
65504 and what reads them, or with single ones below 6e-5; what came within half of 65504 on the calibration samples,
where there are some; operators that have no float16; subgraphs, and what they read. A mask's large negative constants
become -16384. Casts stand where float16 and float32 meet, one for each value. Compressed weights keep their integers
and get float16 scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.calibration import calibrate
from qgraph.analysis.shapes import Shapes
from qgraph.lazy_tensors import Joint, JointTensor, joint_tensors
from qgraph.passes._annotate import annotate
from qgraph.passes._float16_safety import LARGEST, MASK, Kept, half_places, is_float, keep
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["ToFp16"]

_LAZY_ABOVE = 1 << 16
"""Weights of more elements are rounded when the file is written."""
_PRODUCTS = ("Attention", "Conv", "ConvTranspose", "Gemm", "GroupQueryAttention", "MatMul", "MatMulBnb4", "MatMulNBits",
             "MultiHeadAttention")  # fmt: skip
"""A graph without one of these gains nothing."""
_HALF = ir.TensorType(ir.DataType.FLOAT16)


@dataclass(frozen=True)
class ToFp16(Pass):
    """Compute and store in float16 what float16 can hold."""

    name: ClassVar[str] = "to-fp16"
    keep_io: bool = field(default=True, metadata={"help": "inputs and outputs of the model stay float32"})
    measure: bool = field(default=True, metadata={"help": "look at the calibration samples, where there are some"})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Convert; `skipped` has the nodes that stay in float32."""
        graph, opsets = model.graph, model.graph.opset_imports
        if not any(node.op_type in _PRODUCTS for node in graph):
            return Report()
        annotate(model, Shapes(model).run())
        touching = [node for node in graph if any(is_float(value) for value in (*node.inputs, *node.outputs))]
        if not touching:
            return Report()
        ranges = _measured(model, context) if self.measure and context.calibration is not None else {}
        kept = keep(graph, opsets, ranges)
        nodes = [node for node in touching if node not in kept.reasons]
        rewriter = _Rewriter(model, kept, nodes, keep_io=self.keep_io)
        changed = rewriter.run()
        skipped = [Skipped(qgraph.ir.node_label(node), kept.reasons[node]) for node in touching if node in kept.reasons]
        if not changed:
            return Report(skipped=skipped)
        notes = [f"{changed} nodes in float16", *_left(skipped)]
        if kept.masks:
            notes.append(f"{len(kept.masks)} mask{'s' * (len(kept.masks) > 1)} cut off at {MASK:.0f}")
        return Report(changed=changed, skipped=skipped, notes=notes)


def _left(skipped: Sequence[Skipped]) -> list[str]:
    if not skipped:
        return []
    reasons = Counter(_kind(one.reason) for one in skipped)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
    return [f"{len(skipped)} in float32 ({told})"]


def _kind(reason: str) -> str:
    kinds = {
        "sum": "with sums",
        "power": "with powers",
        "positions": "with angles",
        "samples": "too large on the samples",
        "constant": "with constants out of range",
        "subgraphs": "with subgraphs",
    }
    return next((kind for word, kind in kinds.items() if word in reason), "of other kinds")


def _measured(model: ir.Model, context: Context) -> Mapping[str, tuple[float, float]]:
    """Return value name -> the least and the largest number on the calibration samples."""
    names = tuple(value.name for node in model.graph for value in node.outputs if is_float(value) and value.name)
    ranges = calibrate(model, context, names)
    return {name: (float(one.low.min()), float(one.high.max())) for name, one in ranges.items()}


class _Rewriter:
    def __init__(self, model: ir.Model, kept: Kept, nodes: Sequence[ir.Node], *, keep_io: bool) -> None:
        self._graph = model.graph
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
            self._narrowed.update((value, None) for value in self._graph.inputs if is_float(value))
            for value in self._narrowed:
                value.type = _HALF
        weights = self._weights()
        changed = sum([self._convert(node, weights) for node in self._nodes])
        self._widen_what_others_read()
        return changed

    def _weights(self) -> dict[ir.Value, ir.Value]:
        """Return float32 initializer -> its float16 form, for those that converted nodes read."""
        readers = {
            value: None
            for node in self._nodes
            for value, fits in zip(node.inputs, self._half[node][0], strict=True)
            if fits and value is not None and value.const_value is not None and is_float(value)
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
                _round_group(group, [one for one in members if _group(one) is group])
                found |= {value: value for value in values}
        return found

    def _read_in_half_only(self, value: ir.Value) -> bool:
        return (
            not value.is_graph_output()
            and not value.is_graph_input()
            and all(use.node in self._half and self._half[use.node][0][use.idx] for use in value.uses())
        )

    def _rounded(self, value: ir.Value) -> ir.Value:
        """Return a constant in float16: in its own place if nobody else reads it, else beside it."""
        tensor = value.const_value
        assert tensor is not None
        cut = value in self._kept.masks

        def rounded() -> np.ndarray:
            array = np.asarray(tensor.numpy())
            array = np.where(np.isfinite(array), np.maximum(array, MASK), array) if cut else array
            with np.errstate(over="ignore"):
                return array.astype(np.float16)

        lazy = tensor.size > _LAZY_ABOVE
        data = qgraph.ir.lazy(rounded, ir.DataType.FLOAT16, tensor.shape.numpy()) if lazy else ir.tensor(rounded())
        if self._read_in_half_only(value):
            data.name = value.name
            value.const_value, value.type = data, _HALF
            return value
        return qgraph.ir.initializer(self._graph, f"{value.name}_fp16", data)

    def _find_places(self, node: ir.Node) -> tuple[list[bool], list[bool]]:
        """Tell which inputs and outputs become float16, before anything has."""
        if qgraph.ir.is_op(node, "Cast"):
            return [False], [is_float(node.outputs[0])]
        places = half_places(node, self._opsets)
        assert places is not None
        return places

    def _convert(self, node: ir.Node, weights: Mapping[ir.Value, ir.Value]) -> bool:
        inputs, outputs = self._half[node]
        for index, (value, fits) in enumerate(zip(list(node.inputs), inputs, strict=True)):
            if value is None:
                continue
            if fits and value in weights:
                node.replace_input_with(index, weights[value])
            elif fits and is_float(value):
                node.replace_input_with(index, self._cast(value, ir.DataType.FLOAT16))
            elif not fits and value in self._narrowed and not qgraph.ir.is_op(node, "Cast"):
                node.replace_input_with(index, self._cast(value, ir.DataType.FLOAT))
        for value, fits in zip(node.outputs, outputs, strict=True):
            if fits and is_float(value):
                self._narrow(value)
        if any(outputs):
            self._convert_attributes(node)
        return any(outputs) or any(inputs)

    def _convert_attributes(self, node: ir.Node) -> None:
        if qgraph.ir.is_op(node, "Cast"):
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
        elif qgraph.ir.is_op(node, "ConstantOfShape"):
            tensor = (
                node.attributes["value"].as_tensor()
                if "value" in node.attributes
                else ir.tensor(np.zeros(1, np.float32))
            )
            array = np.asarray(tensor.numpy())
            array = np.where(np.isfinite(array), np.clip(array, MASK, LARGEST), array)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array.astype(np.float16)))

    def _narrow(self, value: ir.Value) -> None:
        """Make an output float16; a graph output keeps name and type behind a Cast."""
        value.type = _HALF
        self._narrowed[value] = None
        if not value.is_graph_output() or not self._keep_io:
            return
        name = value.name
        value.name = qgraph.ir.fresh_name(self._graph, f"{name}_fp16")
        widened = self._cast(value, ir.DataType.FLOAT)
        widened.name = name
        for index, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[index] = widened

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """Return a value in the other type, behind a Cast right after whatever makes it."""
        if (value, to) not in self._casts:
            ending = "fp16" if to == ir.DataType.FLOAT16 else "fp32"
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
        """Give the nodes that stay in float32, and subgraphs, float32 again where a value has become float16."""
        for value in list(self._narrowed):
            for use in list(value.uses()):
                if use.node not in self._half and not qgraph.ir.is_op(use.node, "Cast"):
                    use.node.replace_input_with(use.idx, self._cast(value, ir.DataType.FLOAT))


def _group(value: ir.Value) -> Joint | None:
    return value.const_value.group if isinstance(value.const_value, JointTensor) else None


def _round_group(group: Joint, members: Sequence[ir.Value]) -> None:
    """Round the float32 tensors that are computed together; they stay together."""
    tensors = [value.const_value for value in members if isinstance(value.const_value, JointTensor)]
    old = {tensor.index: (tensor.dtype, tuple(tensor.shape.numpy())) for tensor in tensors}

    def compute() -> Sequence[ir.TensorProtocol]:
        return [_half_tensor(tensor) for tensor in group.compute()]

    # A tensor that no initializer holds any more keeps its place.
    nothing: tuple[ir.DataType, tuple[int, ...]] = (ir.DataType.UINT8, ())
    specs = [old.get(index, nothing) for index in range(max(old) + 1)]
    halves = [(ir.DataType.FLOAT16 if dtype == ir.DataType.FLOAT else dtype, shape) for dtype, shape in specs]
    new = joint_tensors(compute, halves, source=group.source)
    for value, tensor in zip(members, tensors, strict=True):
        value.const_value = new[tensor.index]
        value.const_value.name = value.name
        value.type = ir.TensorType(halves[tensor.index][0])


def _half_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype != ir.DataType.FLOAT:
        return tensor
    return ir.tensor(np.asarray(tensor.numpy()).astype(np.float16))
