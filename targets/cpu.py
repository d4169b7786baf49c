"""ONNX Runtime on the CPU.

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
import functools
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir

import qgraph.ir
from qgraph import spec
from qgraph.analysis.cost import cost
from qgraph.analysis.integer_plan import IntegerPlan, integer_plan
from qgraph.analysis.integer_rules import Kind, data_inputs
from qgraph.passes.qdq import FLOAT_KEY
from qgraph.pipeline import Context, Feeds, Pass, Pipeline, Skipped
from qgraph.runtime.benchmark import compare
from qgraph.runtime.placement import Placement
from qgraph.runtime.placement_reading import read_placement
from qgraph.runtime.processor import is_arm, lacks_integer_dot_products
from qgraph.runtime.session import CPU_PROVIDER, input_signature, open_session, random_feeds
from qgraph.targets.base import Kernels, Session, Step, Target, cleaned_up
from qgraph.targets.cpu_costs import better_in_float, graph_cost, kernel_cost
from qgraph.targets.cpu_saturation import saturating

__all__ = ["CpuFp32", "CpuInt8", "Product"]

_FUSE = "fuse-gelu,fuse-norms,fuse-rotary,fuse-attention"
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
_STATIC_FORM = "matmul-add-to-gemm,average-pool-to-conv,align-channels"
_PADDED_FORM = "matmul-add-to-gemm,average-pool-to-conv,align-channels{inputs=true}"
_FASTER = "float is faster here, by the target's table of kernel costs"
_FASTER_OTHERWISE = "it is faster in float, or quantized as it comes, by the target's table of kernel costs"
_MUCH_FASTER = 1.25
_LITTLE = 1.1
"""How many times faster static layers must make a graph of dynamic ones to be worth asking for calibration data."""
_NOMINAL_ROWS = 16
"""Rows of a product whose shapes are not known."""
_TUNE_SECONDS = 1.0
_TUNE_FEEDS = 4

_PROCESSORS: Mapping[str, Mapping[str, Mapping[str, spec.Value]]] = {
    "avx2": {"qdq": {"reduce_range": True}, "dynamic-int8": {"reduce_range": True}},
    "neon": {"qdq": {"activations": "int8"}},
}
"""Options of passes for processors that differ from the default, x86 with VNNI."""
_MAY_SATURATE = (
    "this processor has no VNNI, and sums of products of bytes may saturate: the model is for processors that have it; "
    "compile with --cpu avx2 for this one"
)

Mode = Literal["float", "dynamic", "static"]
_KERNELS: Mapping[Mode, str] = {"float": "product-float", "dynamic": "product-dynamic", "static": "product-int8"}


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product [rows, width] x [width, columns] with a constant right operand."""

    rows: int
    width: int
    columns: int

    def nanoseconds(self, mode: Mode, *, comes_in_integers: bool) -> float:
        """Return the cost by the measured table, with that of the conversion before it.

        A static product takes integers as they come; the others want them back in float first.

        Args:
            mode: of its arithmetic.
            comes_in_integers: whether an integer layer makes the left operand.
        """
        weight, elements = self.width * self.columns, self.rows * self.width
        work = kernel_cost(
            _KERNELS[mode],
            multiply_add=self.rows * weight,
            weight=weight,
            input=elements,
            output=self.rows * self.columns,
        )
        if comes_in_integers == (mode == "static"):
            return work
        needed = mode == "static" or comes_in_integers
        return work + (kernel_cost("quantize" if mode == "static" else "dequantize", element=elements) if needed else 0)


class _OnnxRuntimeCpu(Target):
    def providers(self) -> Sequence[tuple[str, Mapping[str, str]]]:
        """Return the CPU provider."""
        return [(CPU_PROVIDER, {})]

    def prepare_passes(self) -> Pipeline:
        """Return the clean-up passes, which keep every value."""
        return cleaned_up()

    def lower_passes(self) -> Pipeline:
        """Return the last clean-up."""
        return Pipeline.parse("remove-unused")

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open model.onnx in ONNX Runtime.

        Raises:
            UserError: it is not installed.
        """
        session: Session = open_session(folder / "model.onnx", threads=threads)
        return session

    def placement(self, folder: Path) -> Placement | None:
        """Return the placement in the graph as ONNX Runtime has fused it for the CPU.

        Raises:
            UserError: it is not installed.
        """
        return _read(folder / "model.onnx", (folder / "model.onnx").stat().st_mtime_ns)

    def kernels(self, folder: Path) -> Kernels | None:
        """Count what the placement says."""
        placement = self.placement(folder)
        return None if placement is None else Kernels.of(placement, _reasons(qgraph.ir.load(folder / "model.onnx")))


@functools.lru_cache(maxsize=2)
def _read(model: Path, changed: int) -> Placement:
    """Read a placement once for all who ask for it; `changed` is when the file was written."""
    del changed
    return read_placement(model)


def _reasons(model: ir.Model) -> dict[str, str]:
    """Return why layers stay in float, by their labels."""
    return {
        qgraph.ir.node_label(node): node.metadata_props[FLOAT_KEY]
        for node in qgraph.ir.walk(model)
        if FLOAT_KEY in node.metadata_props
    }


@dataclasses.dataclass(frozen=True)
class CpuFp32(_OnnxRuntimeCpu):
    """Float on the CPU: cleaned up, nothing quantized; sparse weights are unpacked at load."""

    name: ClassVar[str] = "cpu-fp32"
    summary: ClassVar[str] = "float32 in ONNX Runtime on the CPU: for pruning and other passes without quantization"

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return no passes."""
        del model, context
        return Pipeline()

    def lower_passes(self) -> Pipeline:
        """Fuse what the runtime computes faster in one operator, store sparse weights in fewer bytes, and clean up."""
        return Pipeline.parse(f"{_FUSE},absorb-biases,keep-sums,pack-sparse,remove-unused")


@dataclasses.dataclass(frozen=True)
class CpuInt8(_OnnxRuntimeCpu):
    """8-bit integers on the CPU, static, dynamic or float as each layer runs fastest."""

    name: ClassVar[str] = "cpu-int8"
    summary: ClassVar[str] = "8-bit integer kernels of ONNX Runtime on the CPU, static or dynamic as each layer wants"
    cpu: Literal["", "vnni", "avx2", "neon"] = dataclasses.field(
        default="",
        metadata={"help": "processor to compile for; avx2: without VNNI, weights of 7 bits; neon: int8 activations"},
    )

    def prepare_passes(self) -> Pipeline:
        """Return the clean-up passes, and attention as one operator."""
        return cleaned_up("fuse-attention,remove-unused")

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return static quantization for what the table wants static, and dynamic quantization for the rest.

        Without calibration data, a model of dynamic layers that gains little by static ones goes without.
        """
        return self._for_processor(self._as_each_layer_wants(model, context))

    def _as_each_layer_wants(self, model: ir.Model, context: Context) -> Pipeline:
        form, formed, modes = _static_form(model)
        optional = context.calibration is None and "dynamic" in modes.values()
        if _gains_by_static(formed, modes, 1.0 if not optional else _LITTLE):
            return form + _compress(formed, context, modes, static=True)
        _, modes = _choose(model)
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
        """Return the layers whose sums would saturate, where the processor has no VNNI."""
        return saturating(model) if self.cpu == "avx2" else []

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


def _static_form(model: ir.Model) -> tuple[Pipeline, ir.Model, dict[ir.Node, Mode]]:
    """Return the passes that give `model` the form that static kernels handle best, the model in it, and the modes.

    Images are padded to four channels where that makes the integer convolution that reads them worth while.
    """
    form, formed, modes = _formed(model, _STATIC_FORM)
    if not any(qgraph.ir.is_op(node, "Conv") for node in model.graph):
        return form, formed, modes
    padding, padded, padded_modes = _formed(model, _PADDED_FORM)
    if len(padding) == 0 or _static_cost(padded, padded_modes) >= _static_cost(formed, modes):
        return form, formed, modes
    return padding, padded, padded_modes


def _formed(model: ir.Model, passes: str) -> tuple[Pipeline, ir.Model, dict[ir.Node, Mode]]:
    formed = model.clone()
    form = Pipeline([one for one in Pipeline.parse(passes) if Pipeline([one]).run(formed).changed])
    _, modes = _choose(formed)
    slow = better_in_float(formed.graph, lambda node: _not_static(modes.get(node)))
    return form, formed, {**modes, **dict.fromkeys(slow, "float")}


def _static_cost(model: ir.Model, modes: Mapping[ir.Node, Mode]) -> float:
    return graph_cost(model.graph, integer_plan(model.graph, lambda node: _not_static(modes.get(node))), dynamic=True)


def _not_static(mode: Mode | None) -> str | None:
    return None if mode in (None, "static") else "it is not static"


def _gains_by_static(model: ir.Model, modes: Mapping[ir.Node, Mode], least: float) -> bool:
    """Tell whether there is something to quantize statically, and whether float would take `least` times as long."""
    plan = integer_plan(model.graph, lambda node: _not_static(modes.get(node)))
    if not any(kind in (Kind.CONVOLUTION, Kind.PRODUCT) for kind in plan.nodes.values()):
        return False
    without = integer_plan(model.graph, lambda _: "it is not static")
    costs = [graph_cost(model.graph, one, dynamic=True) for one in (plan, without)]
    return least <= 1.0 or costs[1] > least * costs[0]


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


def _choose(model: ir.Model) -> tuple[IntegerPlan, dict[ir.Node, Mode]]:
    """Decide for each product with a constant weight; what is decided against static changes what follows it."""
    multiply_adds = {one.name: one.multiply_adds for one in cost(model).nodes}
    against: dict[ir.Node, Mode] = {}
    while True:
        plan = integer_plan(model.graph, lambda node: "it is not static" if node in against else None)
        layers = [node for node in plan.nodes if _is_layer(plan, node)]
        modes = {node: _mode(plan, node, multiply_adds.get(qgraph.ir.node_label(node))) for node in layers}
        changed = {node: mode for node, mode in modes.items() if mode != "static"}
        if not changed:
            return plan, {**modes, **against}
        against.update(changed)


def _is_layer(plan: IntegerPlan, node: ir.Node) -> bool:
    return plan.nodes[node] is Kind.PRODUCT and len(data_inputs(node)) == 1


def _comes_in_integers(plan: IntegerPlan, value: ir.Value) -> bool:
    """Tell whether an integer layer makes `value`, looking through what only moves elements."""
    node = value.producer()
    while node is not None and plan.nodes.get(node) in (Kind.MOVER, Kind.CLAMP):
        node = data_inputs(node)[0][1].producer()
    return node in plan.nodes


def _mode(plan: IntegerPlan, node: ir.Node, multiply_adds: int | None) -> Mode:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    dims = weight.shape.numpy()
    width, columns = dims[::-1] if node.attributes.get_int("transB", 0) else dims
    rows = _NOMINAL_ROWS if multiply_adds is None else max(1, multiply_adds // max(1, width * columns))
    product = Product(rows, width, columns)
    integers = _comes_in_integers(plan, data_inputs(node)[0][1])
    modes: tuple[Mode, ...] = ("float", "dynamic", "static")
    costs = {mode: product.nanoseconds(mode, comes_in_integers=integers) for mode in modes}
    otherwise: Mode = "dynamic" if costs["dynamic"] <= costs["float"] else "float"
    bar = costs[otherwise] if integers else costs[otherwise] / _MUCH_FASTER
    return "static" if costs["static"] <= bar else otherwise
