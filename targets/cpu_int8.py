"""8-bit integers in ONNX Runtime on the CPU.

`cpu-int8` decides for every layer between integers with calibrated ranges (static), integers quantized at run time
(dynamic) and float:

    convolutions                          static, or float where that is faster: the first and last layers often, tiny
                                          networks altogether (`cpu_costs.better_in_float`); there is no dynamic
                                          integer convolution worth running
    products after integer layers         static or dynamic, whichever the table of costs says is faster
    products fed by float operators       dynamic (or float where small): its ranges follow the data, which is what a
                                          transformer needs; static only where the table says that it is much faster
    LSTM, embeddings                      dynamic, where `dynamic-int8` finds them worth it

The table, `cpu_costs.toml`, was measured once by benchmarks/measure_kernel_costs.py and is read, never timed anew, so
that builds repeat. `tune` times the candidates instead.

Before static quantization, what integer kernels handle badly is written in a form that they handle well, with the same
values: linear layers as Gemm, average pooling as convolution, channels in multiples that kernels like.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir

import qgraph.ir
from qgraph import spec
from qgraph.analysis.integer_plan import integer_plan
from qgraph.analysis.integer_rules import Kind
from qgraph.pipeline import Context, Feeds, Pass, Pipeline, Skipped
from qgraph.runtime.benchmark import compare
from qgraph.runtime.placement import Placement
from qgraph.runtime.processor import is_arm, lacks_integer_dot_products
from qgraph.runtime.session import input_signature, random_feeds
from qgraph.targets.base import Session, Step, cleaned_up
from qgraph.targets.cpu import FUSE_ATTENTION, OnnxRuntimeCpu
from qgraph.targets.cpu_modes import Mode, choose, gains_by_static, static_form
from qgraph.targets.cpu_saturation import saturating

__all__ = ["CpuInt8"]

_LADDER = (
    Step("activation ranges", ("qdq.method=percentile", "qdq.method=mse", "qdq.method=entropy"), "activations"),
    Step("equalization", ("equalize < qdq",)),
    Step("smoothing", ("smooth-quant{activations=static} < qdq",), "activations"),
    Step("bias correction", ("bias-correction{method=fast} > qdq", "bias-correction{method=full} > qdq")),
    Step(
        "learned rounding",
        ("gptq{bits=BITS,group=0,symmetric=true,min_elements=0,ops=[Conv,Gemm,MatMul]} < qdq",),
        "weights",
    ),
    Step("adaround", ("adaround{bits=BITS} < qdq",), "weights"),
)
"""What a search tries, the cheapest first; none of it costs time when the model runs."""
_FASTER = "float is faster here, by the target's table of kernel costs"
_FASTER_OTHERWISE = "it is faster in float, or quantized as it comes, by the target's table of kernel costs"
_TUNE_SECONDS = 1.0
_TUNE_FEEDS = 4
_LITTLE = 1.1
"""How many times faster static layers must make a graph of dynamic ones to be worth asking for calibration data."""


_PROCESSORS: Mapping[str, Mapping[str, Mapping[str, spec.Value]]] = {
    "avx2": {"qdq": {"reduce_range": True}, "dynamic-int8": {"reduce_range": True}},
    "neon": {"qdq": {"activations": "int8"}},
}
"""Options of passes for processors that differ from the default, x86 with VNNI."""
_MAY_SATURATE = (
    "this processor has no VNNI, and sums of products of bytes may saturate: the model is for processors that have it; "
    "compile with --cpu avx2 for this one"
)


@dataclasses.dataclass(frozen=True)
class CpuInt8(OnnxRuntimeCpu):
    """8-bit integers on the CPU, static, dynamic or float as each layer runs fastest."""

    name: ClassVar[str] = "cpu-int8"
    summary: ClassVar[str] = "8-bit integer kernels of ONNX Runtime on the CPU, static or dynamic as each layer wants"
    cpu: Literal["", "vnni", "avx2", "neon"] = dataclasses.field(
        default="",
        metadata={"help": "processor to compile for; avx2: without VNNI, weights of 7 bits; neon: int8 activations"},
    )

    def prepare_passes(self) -> Pipeline:
        """Return the clean-up passes, and attention as one operator."""
        return cleaned_up(f"{FUSE_ATTENTION},remove-unused")

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return static quantization for what the table wants static, and dynamic quantization for the rest.

        Without calibration data, a model of dynamic layers that gains little by static ones goes without.
        """
        return self._for_processor(self._as_each_layer_wants(model, context))

    def _as_each_layer_wants(self, model: ir.Model, context: Context) -> Pipeline:
        form, formed, modes = static_form(model)
        optional = context.calibration is None and "dynamic" in modes.values()
        if gains_by_static(formed, modes, 1.0 if not optional else _LITTLE):
            return form + _compress(formed, context, modes, static=True)
        modes = choose(model)
        dynamic = {node: "dynamic" if mode == "static" else mode for node, mode in modes.items()}
        return _compress(model, context, dynamic, static=False) or _nothing(model)

    def lower_passes(self) -> Pipeline:
        """Keep the runtime from quantizing what was left in float, and clean up."""
        return Pipeline.parse("guard-float,subtract-residuals,widen-weights,remove-unused")

    def ladder(self, compress: Pipeline) -> Sequence[Step]:
        """Return what brings static integers nearer to float at the same speed, and smoothing for dynamic ones."""
        static = next((one for one in compress if one.name == "qdq"), None)
        if static is None:
            return [Step("smoothing", ("smooth-quant < dynamic-int8",))] if len(compress) else []
        bits = "4" if getattr(static, "weights", "int8") == "int4" else "7" if self.cpu == "avx2" else "8"
        per_channel = getattr(static, "per_channel", True)  # learned rounding has a scale for each output
        return [
            dataclasses.replace(step, ways=tuple(way.replace("BITS", bits) for way in step.ways))
            for step in _LADDER
            if per_channel or step.mends != "weights"
        ]

    def smaller(self, compress: Pipeline) -> Sequence[tuple[str, Pipeline]]:
        """Return static integers for all that can be, where some was left in float or dynamic for its speed."""
        static = self._for_processor(Pipeline.parse("qdq"))
        return [] if static == compress else [("all that can be in static integers", static)]

    def tune(self, model: ir.Model, context: Context, default: Pipeline) -> Pipeline:
        """Return the fastest of the default, all static, all dynamic and all float, timed here in turn."""
        candidates = {"default": default, "dynamic": _compress(model, context, {}, static=False), "float": Pipeline()}
        if context.calibration is not None:
            candidates["static"] = Pipeline.parse("qdq")
        candidates = {name: self._for_processor(pipeline) for name, pipeline in candidates.items()}
        sessions: dict[str, Session] = {}
        with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
            for name, pipeline in candidates.items():
                copy = model.clone()
                (pipeline + self.lower_passes()).run(copy, context=dataclasses.replace(context, _analyses={}))
                folder = Path(scratch) / name
                folder.mkdir()
                self.lower(copy, folder)
                sessions[name] = self.session(folder, threads=context.threads)
            timed = compare(sessions, _feeds(sessions["default"], context), seconds=_TUNE_SECONDS)
        fastest = min(timed.candidates, key=lambda one: one.seconds)
        return candidates[fastest.name]

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return what computes in bfloat16, and layers whose sums would saturate where the processor has no VNNI."""
        return [*super().check(model), *(saturating(model) if self.cpu == "avx2" else [])]

    def stand_in(self) -> str:
        """Return a note where this is another kind of processor than that of the option `cpu`."""
        if self.cpu == "neon" and not is_arm():
            return "an x86 processor (same operators; not run on Arm here)"
        if self.cpu == "vnni" and lacks_integer_dot_products():
            return "a processor without VNNI, where products of bytes may saturate"
        return ""

    def placement(self, folder: Path) -> Placement | None:
        """Return the placement here; None for processors of another kind, where the runtime fuses otherwise."""
        return None if self.cpu == "neon" and not is_arm() else super().placement(folder)

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open model.onnx in ONNX Runtime; warns where products of bytes may saturate on this processor.

        Raises:
            UserError: it is not installed.
        """
        if self.cpu != "avx2" and lacks_integer_dot_products() and saturating(qgraph.ir.load(folder / "model.onnx")):
            warnings.warn(_MAY_SATURATE, stacklevel=2)
        return super().session(folder, threads=threads)

    def _for_processor(self, pipeline: Pipeline) -> Pipeline:
        """Return the pipeline with the integers that the processor of the option `cpu` multiplies rightly and fast."""
        chosen = _PROCESSORS.get(self.cpu, {})
        specs = [spec.to_spec(one) for one in pipeline]
        return Pipeline.from_specs([spec.Spec(one.name, {**one.options, **chosen.get(one.name, {})}) for one in specs])


def _feeds(session: Session, context: Context) -> list[Feeds]:
    if context.calibration is None:
        return random_feeds(input_signature(session), context.seed, count=_TUNE_FEEDS)
    return [feeds for _, feeds in zip(range(_TUNE_FEEDS), context.calibration, strict=False)]


def _compress(model: ir.Model, context: Context, modes: Mapping[ir.Node, Mode], *, static: bool) -> Pipeline:
    in_float, dynamic = _names(modes, "float"), _names(modes, "dynamic")
    passes: list[Pass] = []
    if static:
        passes.append(_excluding("qdq", [*in_float, *dynamic], reason=_FASTER_OTHERWISE if dynamic else _FASTER))
    if dynamic or _has_dynamic(model) or (not static and _has_products(model, in_float)):
        if context.calibration is not None and (dynamic or not static):
            passes.append(_excluding("smooth-quant", in_float))
        passes.append(_excluding("dynamic-int8", in_float))
    return Pipeline(passes)


def _nothing(model: ir.Model) -> Pipeline:
    """Return the pipeline that quantizes nothing and says why, if there is anything of which to say it."""
    plan = integer_plan(model.graph, lambda _: None)
    layers = any(kind in (Kind.CONVOLUTION, Kind.PRODUCT) for kind in plan.nodes.values())
    return Pipeline.from_specs([spec.Spec("qdq", {"exclude": ["*"], "reason": _FASTER})]) if layers else Pipeline()


def _excluding(name: str, nodes: Collection[str], **others: spec.Value) -> Pass:
    """Return the pass `name` that leaves `nodes` alone; names become patterns that match just them."""
    patterns = ["".join(f"[{char}]" if char in "*?[" else char for char in node) for node in nodes]
    options: dict[str, spec.Value] = {"exclude": sorted(patterns), **others} if patterns else {}
    (one,) = Pipeline.from_specs([spec.Spec(name, options)])
    return one


def _names(modes: Mapping[ir.Node, Mode], mode: Mode) -> list[str]:
    return [qgraph.ir.node_label(node) for node, chosen in modes.items() if chosen == mode]


def _has_dynamic(model: ir.Model) -> bool:
    """Tell whether there is an LSTM, a large table, or a product that only dynamic quantization can reach."""
    for node in qgraph.ir.walk(model):
        if qgraph.ir.is_op(node, "LSTM"):
            return True
        if qgraph.ir.is_op(node, "Gather") and _is_table(node.inputs[0]):
            return True
        if node.graph is not model.graph and qgraph.ir.is_op(node, "MatMul", "Gemm"):
            return True
    return False


def _has_products(model: ir.Model, in_float: Collection[str]) -> bool:
    products = [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, "MatMul", "Gemm", "Attention")]
    return any(qgraph.ir.node_label(node) not in in_float for node in products)


def _is_table(value: ir.Value | None) -> bool:
    stored = None if value is None else value.const_value
    return (
        stored is not None and stored.dtype == ir.DataType.FLOAT and len(stored.shape) == 2 and stored.size >= 1 << 16
    )
