"""Static quantization to 8 bits, with ONNX's own QuantizeLinear (Q) and DequantizeLinear (D).

    x -> Conv(W, b) -> Relu -> MaxPool -> y -> Softmax
    =>
    x -> Q -> D -> Conv(D(W8), D(b32)) -> Q -> MaxPool -> D -> y -> Softmax

The ranges of activations come from calibration. Weights are symmetric, biases are int32 at the product of the scales
of what they are added to. A Relu or Clip goes where the saturation of the quantizer after it does the same, and
clamps the integers elsewhere. Operators that only move elements (MaxPool, Reshape, Slice, Pad ...) move integers. The
inputs of a Concat get its scale where nobody else reads them.

A weight that was rounded before (gptq, adaround), to int8 or int4 with one scale for each output channel, stays as it
is. With `weights=int4`, others are rounded to 4 bits, but for those that the metadata of their node give another width.

    x - c                =>    D(Q(x)) + D(-c)
    x / c                =>    D(Q(x)) * D(1 / c)
    HardSigmoid(x)       =>    D'(Q(x)) + D(beta) -> Q      D' has alpha times the scale; Q saturates at 0 and 1
    Gather(table, i)     =>    D(Gather(table8, i))

TensorRT has other rules (`placement=tensorrt`; see `qgraph.analysis.tensorrt_plan`): only what layers, residual Adds
and poolings between layers read is quantized, behind the Relu of the layer before, symmetric; biases stay in float.

    x -> Conv(W, b) -> Relu -> MaxPool -> Conv
    =>
    x -> Q -> D -> Conv(D(W8), b) -> Relu -> MaxPool -> Q -> D -> Conv

There, activations and weights may be float8e4m3fn as well.

What stays in float, each with the reason in the report: layers whose weights are not constant, what `exclude` names,
what the table of the runtime (ONNX Runtime's CPU provider, or TensorRT) has no kernels for once it is quantized,
operators of which no layer in integers is the neighbour on both sides, so that quantizing them would cost more than
it saves, what comes after the last layer, tensors that cannot be calibrated, and nodes inside subgraphs (If, Loop,
Scan), whose tensors calibration does not see. What is quantized already is left alone; a second run changes nothing.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.calibration import calibrate
from qgraph.analysis.integer_plan import Allowed, IntegerPlan, integer_plan
from qgraph.analysis.integer_rules import OPERATORS, QUANTIZED_ALREADY, Kind
from qgraph.analysis.tensorrt_plan import tensorrt_plan
from qgraph.errors import UserError, nearest
from qgraph.numerics.schemes import FLOAT8, INT8_WEIGHT, UINT8_WEIGHT, Scheme
from qgraph.passes._qdq_kernels import TABLES, Asked
from qgraph.passes._qdq_nodes import rewrite
from qgraph.passes._qdq_values import Schemes
from qgraph.passes._weight_options import FLOAT_KEY, chosen_bits, forget_bits
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["FLOAT_KEY", "Qdq"]

_FIRST_OPSET = 13
"""The first whose DequantizeLinear knows channels, and whose movers all take integers."""
_OPSETS = {"float8e4m3fn": 19, "int4": 21}
_TENSORRT = (("int8", "int8"), ("float8e4m3fn", "float8e4m3fn"))
_LARGEST = 1e15
"""What reaches further is a mask rather than a number; its scale times that of a weight would overflow."""

Ranges = dict[ir.Value, tuple[float, float]]


@dataclass(frozen=True)
class Qdq(Pass):
    """Quantize weights and activations to 8 bits, with ranges from calibration."""

    name: ClassVar[str] = "qdq"
    per_channel: bool = field(default=True, metadata={"help": "one weight scale for each output channel"})
    weights: Literal["int8", "uint8", "int4", "float8e4m3fn"] = field(
        default="int8", metadata={"help": "integers, or floats, of weights"}
    )
    clip: Literal["auto", "minmax", "mse"] = field(
        default="auto",
        metadata={"help": "ranges of weights: full ones, or those of least squared error; auto: mse for 4 bits"},
    )
    activations: Literal["uint8", "int8", "float8e4m3fn"] = field(
        default="uint8", metadata={"help": "integers, or floats, of activations"}
    )
    symmetric: bool = field(default=False, metadata={"help": "activations around zero, without a zero point"})
    placement: Literal["onnxruntime", "tensorrt"] = field(
        default="onnxruntime", metadata={"help": "whose rules say where quantizers stand"}
    )
    reduce_range: bool = field(default=False, metadata={"help": "7-bit weights, for x86 processors without VNNI"})
    method: Literal["minmax", "moving-average", "percentile", "entropy", "mse"] = field(
        default="minmax", metadata={"help": "how the ranges of activations are chosen"}
    )
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})
    reason: str = field(default="it is excluded", metadata={"help": "what to say of the nodes that 'exclude' names"})
    ops: tuple[str, ...] = field(default=(), metadata={"help": "the only operators to quantize; all when empty"})

    def __post_init__(self) -> None:
        for op in self.ops:
            if op not in OPERATORS:
                raise ValueError(f"{op} cannot be quantized.{nearest(op, OPERATORS)} What can: {', '.join(OPERATORS)}")
        forms = (self.activations, self.weights)
        if self.placement == "tensorrt" and (forms not in _TENSORRT or not self.symmetric or self.reduce_range):
            raise ValueError(
                "placement=tensorrt takes symmetric=true with activations=int8, or activations and weights=float8e4m3fn"
            )
        if self.placement != "tensorrt" and "float8e4m3fn" in forms:
            raise ValueError("float8e4m3fn needs placement=tensorrt: ONNX Runtime's own kernels multiply integers")

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Quantize; `skipped` has every node that might have been expected to run in integers and does not."""
        needed = _OPSETS.get(self.weights, _FIRST_OPSET)
        opset = model.graph.opset_imports.get("", 0)
        if opset < needed:
            raise UserError(f"qdq needs opset {needed}, and the model has {opset}: put convert-opset before it")
        asked = Asked(TABLES[self.placement], self.activations, self.weights, opset)
        plan, ranges = self._plan(model, context, asked)
        reasons = {node: reason for node, reason in plan.reasons.items() if reason != QUANTIZED_ALREADY}
        if plan.nodes:
            context.keep_reference(model)
            for node, reason in reasons.items():
                node.metadata_props[FLOAT_KEY] = reason
            rewrite(model.graph, plan, ranges, self._schemes())
            forget_bits(plan.nodes)
        skipped = [Skipped(qgraph.ir.node_label(node), reason) for node, reason in reasons.items()]
        return Report(len(plan.nodes), [*skipped, *_inside_subgraphs(model)], self._notes(plan, model))

    def _schemes(self) -> Schemes:
        weight = {"uint8": UINT8_WEIGHT, "float8e4m3fn": FLOAT8}.get(self.weights, INT8_WEIGHT)
        activation = Scheme(signed=self.activations == "int8", symmetric=self.symmetric)
        return Schemes(
            activation=FLOAT8 if self.activations == "float8e4m3fn" else activation,
            weight=Scheme(7, signed=weight.signed, narrow=weight.narrow) if self.reduce_range else weight,
            per_channel=self.per_channel,
            four_bits=self.weights == "int4",
            clip="mse" if self.clip == "mse" or (self.clip == "auto" and self.weights == "int4") else "minmax",
            inputs_only=self.placement == "tensorrt",
        )

    def _plan(self, model: ir.Model, context: Context, asked: Asked) -> tuple[IntegerPlan, Ranges]:
        """Plan, calibrate, and plan again without what could not be calibrated until everything is."""
        found: Ranges = {}
        banned: dict[ir.Node, str] = {}

        def allowed(node: ir.Node) -> str | None:
            return self._excluded(node) or banned.get(node) or asked.against(node)

        while True:
            plan = self._planned(model.graph, allowed)
            wanted = [value for values in plan.observed.values() for value in values if value not in found]
            unfit = self._observe(model, context, plan, wanted, found)
            if not unfit:
                return plan, {group: _joint(found[value] for value in plan.observed[group]) for group in plan.observed}
            reasons = {plan.group[value]: reason for value, reason in unfit.items()}
            for node in plan.nodes:
                groups = [plan.group[value] for value in (*node.inputs, *node.outputs) if value and value in plan.group]
                banned.update((node, reasons[group]) for group in groups if group in reasons)

    def _planned(self, graph: ir.Graph, allowed: Allowed) -> IntegerPlan:
        if self.placement == "tensorrt":
            return tensorrt_plan(graph, allowed, float8=self.activations == "float8e4m3fn")
        return integer_plan(graph, allowed)

    def _observe(
        self, model: ir.Model, context: Context, plan: IntegerPlan, wanted: Iterable[ir.Value], found: Ranges
    ) -> dict[ir.Value, str]:
        """Add the ranges of `wanted` to `found`, and return why others have none."""
        computed = []
        for value in wanted:
            node = value.producer()
            if node is not None and plan.nodes.get(node) is Kind.TABLE:
                table = qgraph.ir.constant(node.inputs[0])
                assert table is not None
                found[value] = (float(table.min()), float(table.max()))
            else:
                computed.append(value)
        if not computed:
            return {}
        names = tuple(value.name or "" for value in computed)
        calibration = context.analyse(calibrate, model, names, self.method, self._schemes().activation)
        unfit = {}
        for value, name in zip(computed, names, strict=True):
            if name in calibration.unavailable:
                unfit[value] = f"'{name}' is not calibrated because {calibration.unavailable[name]}"
                continue
            low, high = float(calibration[name].low), float(calibration[name].high)
            found[value] = (low, high)
            if max(-low, high) > _LARGEST:
                unfit[value] = f"'{name}' reaches from {low:.3g} to {high:.3g}, as masks do"
        return unfit

    def _excluded(self, node: ir.Node) -> str | None:
        label = qgraph.ir.node_label(node)
        if chosen_bits([node], 8) is None:
            return node.metadata_props.get(FLOAT_KEY, "its weight is to stay in float")
        if any(fnmatch.fnmatchcase(label, pattern) for pattern in self.exclude):
            return self.reason
        return f"{node.op_type} is not among 'ops'" if self.ops and node.op_type not in self.ops else None

    def _notes(self, plan: IntegerPlan, model: ir.Model) -> list[str]:
        layers = Counter(node.op_type for node, kind in plan.nodes.items() if kind in (Kind.CONVOLUTION, Kind.PRODUCT))
        form = "8-bit floats" if self.weights == "float8e4m3fn" else "integers"
        notes = [f"{count} {op_type} in {form}" for op_type, count in sorted(layers.items())]
        labels = [qgraph.ir.node_label(node) for node in qgraph.ir.walk(model)] + [
            qgraph.ir.node_label(node) for node in plan.nodes
        ]
        unused = [pattern for pattern in self.exclude if not fnmatch.filter(labels, pattern)]
        return notes + [f"exclude: no node is called '{pattern}'" for pattern in unused]


def _joint(ranges: Iterable[tuple[float, float]]) -> tuple[float, float]:
    lows, highs = zip(*ranges, strict=True)
    return min(lows), max(highs)


def _inside_subgraphs(model: ir.Model) -> list[Skipped]:
    reason = "it is inside a subgraph, which calibration does not see"
    nodes = [node for graph in model.graph.subgraphs() for node in graph]
    layers = [node for node in nodes if qgraph.ir.is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul")]
    return [Skipped(qgraph.ir.node_label(node), reason) for node in layers]
