"""ONNX Runtime's TensorRT provider, with explicit quantization.

    tensorrt-int8    int8 activations, for each tensor, and int8 weights, for each output, where `qdq` places them by
                     TensorRT's rules; the rest in float16 as TensorRT sees fit; what depthwise convolutions read is
                     scaled first, so that its channels are alike in range (`scale-depthwise`)
    tensorrt-fp8     the same in float8e4m3fn (compute capability 8.9 and above); the model itself says that the rest is
                     float16

`check` proves the rules (`qgraph.analysis.tensorrt_rules`), and the manifest holds the options of the session. TensorRT
builds an engine for the shapes that it first meets, and anew when they leave its range; for dynamic axes, name the
range with the options `min_shapes`, `opt_shapes` and `max_shapes`, such as

    tensorrt-int8{min_shapes=[ids:1x8],opt_shapes=[ids:8x64],max_shapes=[ids:32x256]}

With precision flags TensorRT chooses the types of what is not quantized; without, it builds a strongly typed network,
of which the model says every type. 8-bit floats need the latter: ONNX Runtime has no flag for them.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import Kind
from qgraph.analysis.kernel_arithmetic import Arithmetic
from qgraph.analysis.tensorrt_plan import tensorrt_plan
from qgraph.analysis.tensorrt_rules import LAYERS, broken_rules
from qgraph.errors import UserError
from qgraph.passes.qdq import FLOAT_KEY
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.targets.base import Kernels, Step
from qgraph.targets.nvidia import CUDA, TENSORRT, NvidiaTarget

__all__ = ["FUSE", "TensorrtFp8", "TensorrtInt8", "TensorrtTarget"]

_INT8 = "qdq{activations=int8,symmetric=true,placement=tensorrt}"
_ALIKE = "scale-depthwise"
"""One scale for a tensor, without a zero point, leaves small channels few of 255 steps; depthwise layers need them."""
_FLOAT8 = "qdq{weights=float8e4m3fn,activations=float8e4m3fn,symmetric=true,placement=tensorrt}"
FUSE = "fuse-gelu{table=tensorrt},fuse-norms{table=tensorrt}"
"""What TensorRT has layers for; it computes norms in float32 then."""
_BIASES = "WeightBiasQuantization"
"""Makes int32 of float biases before TensorRT is asked, which imports none (ONNX Runtime, pull request 22969)."""
_RULES = ("Level2_RuleBasedTransformer", "QDQSelectorActionTransformer")
"""Take 8-bit floats for integers where what TensorRT leaves runs on the CPU: drop a Relu, fuse what has no kernel."""
_WEIGHT_PASSES = ("awq", "gptq", "hqq", "mixed-bits", "rtn")
_BITS = 8
_SHAPE = re.compile(r"(.+):(\d+(?:x\d+)*)")
_PROFILE = ("min_shapes", "opt_shapes", "max_shapes")
_LADDER = (
    Step("activation ranges", ("qdq.method=percentile", "qdq.method=mse"), "activations"),
    Step("equalization", ("equalize < qdq",)),
    Step("bias correction", ("bias-correction{method=fast} > qdq", "bias-correction{method=full} > qdq")),
)


def _shapes_field(which: str) -> tuple[str, ...]:
    told = f"{which} shapes of inputs with dynamic axes, NAME:1x3x224x224"
    return dataclasses.field(default=(), metadata={"help": told})


@dataclasses.dataclass(frozen=True)
class TensorrtTarget(NvidiaTarget):
    """A precision in TensorRT."""

    wanted: ClassVar[Sequence[str]] = (TENSORRT, CUDA)
    disabled: ClassVar[Sequence[str]] = (_BIASES,)
    flags: ClassVar[Mapping[str, str]] = {}
    """Options that say which types and kernels TensorRT may choose."""
    min_shapes: tuple[str, ...] = _shapes_field("least")
    opt_shapes: tuple[str, ...] = _shapes_field("usual")
    max_shapes: tuple[str, ...] = _shapes_field("largest")

    def __post_init__(self) -> None:
        profile = {name: getattr(self, name) for name in _PROFILE}
        for name, shapes in profile.items():
            for one in shapes:
                if _SHAPE.fullmatch(one) is None:
                    raise ValueError(f"{name} has '{one}': write NAME:1x3x224x224")
        inputs = [sorted(map(_input_of, shapes)) for shapes in profile.values()]
        if inputs[0] != inputs[1] or inputs[1] != inputs[2]:
            raise ValueError("min_shapes, opt_shapes and max_shapes go together: name the same inputs in all three")
        for least, usual, most in zip(*(sorted(shapes, key=_input_of) for shapes in profile.values()), strict=True):
            sizes = [_sizes(one) for one in (least, usual, most)]
            if len({len(one) for one in sizes}) > 1 or any(
                list(axis) != sorted(axis) for axis in zip(*sizes, strict=True)
            ):
                told = " <= ".join(one.rpartition(":")[2] for one in (least, usual, most))
                raise ValueError(
                    f"the shapes of '{_input_of(least)}' must grow from min_shapes to max_shapes, not {told}"
                )

    def refuse_passes(self, compress: Pipeline) -> None:
        """Raise a UserError for weights that are rounded without what they multiply, or to other than 8 bits."""
        for one in compress:
            if one.name not in _WEIGHT_PASSES:
                continue
            bits = getattr(one, "bits", _BITS)
            if bits != _BITS:
                why = f"multiplies 8-bit numbers, and {one.name} would round weights to {bits} bits"
                raise UserError(f"{self.name} {why}: use --target cuda-int4, whose kernels read weights of few bits")
            if not any(other.name == "qdq" for other in compress):
                why = f"multiplies in 8 bits where activations have 8 bits too, and {one.name} rounds weights alone"
                raise UserError(f"{self.name} {why}: leave --passes out, or use --target cuda-int8")

    def options(self) -> Mapping[str, Mapping[str, str]]:
        """Return the options of the TensorRT provider."""
        profile = {f"trt_profile_{name}": ",".join(getattr(self, name)) for name in _PROFILE if getattr(self, name)}
        return {TENSORRT: {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1", **self.flags, **profile}}

    def counted(self, model: ir.Model) -> Kernels:
        """Count layers by what they multiply, as the model says it; TensorRT picks its kernels on the device itself."""
        counts = {name: Counter[str]() for name in ("integer", "low-bit", "float", "none")}
        left = []
        for node in qgraph.ir.walk(model):
            kind = self.computes(node) or "none"
            counts[kind][node.op_type] += 1
            if kind == "float":
                why = node.metadata_props.get(FLOAT_KEY, "what it multiplies is not quantized")
                left.append(Skipped(qgraph.ir.node_label(node), why))
        return Kernels(counts["integer"], counts["float"], counts["none"], left, counts["low-bit"])

    def computes(self, node: ir.Node) -> Arithmetic | None:
        """Return what a layer multiplies; None for what is no layer."""
        if not qgraph.ir.is_op(node, *LAYERS):
            return None
        sources = [None if value is None else value.producer() for value in node.inputs[:2]]
        if len(sources) < 2 or not all(qgraph.ir.is_op(one, "DequantizeLinear") for one in sources):
            return "float"
        stored = sources[1].inputs[0] if sources[1] is not None else None
        return "integer" if stored is not None and stored.dtype == ir.DataType.INT8 else "low-bit"

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return what breaks TensorRT's rules, profiles that fit no input, and layers that would run on the CPU."""
        return [*broken_rules(model), *self._unfit_profile(model), *self.without_kernels(model)]

    def _unfit_profile(self, model: ir.Model) -> list[Skipped]:
        """Return the shapes that name no input, or do not fit its fixed axes."""
        inputs = {value.name: value for value in model.graph.inputs}
        found = []
        for one in (*self.min_shapes, *self.opt_shapes, *self.max_shapes):
            name, text = _input_of(one), one.rpartition(":")[2]
            value = inputs.get(name)
            if value is None:
                known = ", ".join(str(one) for one in inputs)
                found.append(Skipped(name, f"a profile names it, and it is no input (the model has: {known})"))
            elif value.shape is not None and not _fits(_sizes(one), list(value.shape)):
                shape = "x".join(map(str, value.shape))
                found.append(Skipped(name, f"its shape is {shape}, which {text} does not fit"))
        return list(dict.fromkeys([*found, *self._without_range(model)]))

    def _without_range(self, model: ir.Model) -> Iterator[Skipped]:
        """Yield the inputs with dynamic axes that a profile leaves out; ONNX Runtime fails at the first run then."""
        named = {_input_of(one) for one in self.min_shapes}
        for value in model.graph.inputs if named else ():
            if value.name in named or value.const_value is not None or value.shape is None or value.shape.is_static():
                continue
            shape = "x".join(map(str, value.shape))
            yield Skipped(
                value.name or "", f"its shape is {shape}, and no profile names it: name all such inputs or none"
            )


@dataclasses.dataclass(frozen=True)
class TensorrtInt8(TensorrtTarget):
    """8-bit integers in TensorRT."""

    name: ClassVar[str] = "tensorrt-int8"
    summary: ClassVar[str] = "8-bit integers by TensorRT's rules of explicit quantization, the rest in float16"
    needs_calibration: ClassVar[bool] = True
    flags: ClassVar[Mapping[str, str]] = {"trt_fp16_enable": "1", "trt_int8_enable": "1"}

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return static quantization by TensorRT's rules, behind depthwise convolutions' channels of one range.

        Raises:
            UserError: there is no layer that it could quantize.
        """
        del context
        _require_layers(model, self.name, float8=False)
        return Pipeline.parse(f"{_ALIKE},{_INT8}" if _has_grouped(model) else _INT8)

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in what TensorRT computes as one layer."""
        return Pipeline.parse(f"{FUSE},remove-unused")

    def ladder(self, compress: Pipeline) -> Sequence[Step]:
        """Return other ranges of activations, equalization, and corrected biases."""
        return _LADDER if any(one.name == "qdq" for one in compress) else ()


@dataclasses.dataclass(frozen=True)
class TensorrtFp8(TensorrtTarget):
    """8-bit floats in TensorRT."""

    name: ClassVar[str] = "tensorrt-fp8"
    summary: ClassVar[str] = "float8e4m3fn by TensorRT's rules of explicit quantization, the rest in float16"
    needs_calibration: ClassVar[bool] = True
    opset: ClassVar[int] = 19
    disabled: ClassVar[Sequence[str]] = (_BIASES, *_RULES)

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return static quantization to 8-bit floats by TensorRT's rules.

        Raises:
            UserError: there is no layer that it could quantize.
        """
        del context
        _require_layers(model, self.name, float8=True)
        return Pipeline.parse(_FLOAT8)

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in float16 where it is not 8 bits."""
        return Pipeline.parse(f"{FUSE},to-fp16{{quantizers=true}},remove-unused")


def _has_grouped(model: ir.Model) -> bool:
    return any(qgraph.ir.is_op(node, "Conv") and node.attributes.get_int("group", 1) > 1 for node in model.graph)


def _require_layers(model: ir.Model, target: str, *, float8: bool) -> None:
    """Raise a UserError that names the commonest reason where nothing would be quantized."""
    plan = tensorrt_plan(model.graph, lambda _: None, float8=float8)
    if any(kind in (Kind.CONVOLUTION, Kind.PRODUCT) for kind in plan.nodes.values()):
        return
    reasons = list(plan.reasons.items())
    if not reasons:
        inside = [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "Conv", "Gemm", "MatMul")]
        why = (
            f"its {len(inside)} layers are inside subgraphs, which calibration does not see"
            if inside
            else ("it has no convolution and no linear layer")
        )
    else:
        node, reason = reasons[0]
        why = f"none of its {len(reasons)} layers fits: '{qgraph.ir.node_label(node)}': {reason}"
    raise UserError(f"{target} cannot run this model: {why}. Use --target cuda-fp16.")


def _input_of(shape: str) -> str:
    return shape.rpartition(":")[0]


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in shape.rpartition(":")[2].split("x")]


def _fits(sizes: Sequence[int], shape: Sequence[int | ir.SymbolicDim]) -> bool:
    return len(sizes) == len(shape) and all(
        not isinstance(axis, int) or axis == size for size, axis in zip(sizes, shape, strict=True)
    )
