"""From a module of Relax operators to scheduled code: one order of TVM's passes for CPUs, one for GPUs.

    main(inputs, weights)    =>    main_transform_params(weights) -> prepared,  main(inputs, prepared)

What depends on the weights alone (dequantizing, packing, transposing) becomes a function of its own, run once when the
library is loaded: files hold weights as small as they were, and running them costs nothing of that.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

from qgraph.codegen.tvm_float_schedule import scheduled_float
from qgraph.codegen.tvm_gpu_schedule import default_rules
from qgraph.codegen.tvm_packing import Lanes, packed_layers
from qgraph.errors import UserError

__all__ = ["OPTIONS", "PREPARE", "compiled", "compiled_for_gpu", "fused_for_cpu", "fused_for_gpu", "lanes_of"]

PREPARE = "main_transform_params"
"""The function that makes of the stored weights what `main` takes."""
OPTIONS = {"s_tir.LoopPartition": {"partition_const_loop": True}}
"""Of TVM's passes: what rows leave over is code of its own, so that the rest asks nothing."""
_NARROW_REGISTERS = 16
_INTRINSICS = "tvm.s_tir.tensor_intrin"
_SIZES = "shape_func"
"""The functions that compute sizes from others, each a row of stores into slots that none of them reads."""


def lanes_of(target: Any) -> Lanes:
    """Return the vector registers of a CPU target."""
    from tvm.target.codegen import llvm_get_vector_width

    bits = int(llvm_get_vector_width(target))
    wide = bits >= 512 or "aarch64" in str(target) or "arm64" in str(target)
    return Lanes(max(bits, 128) // 32, 32 if wide else _NARROW_REGISTERS)


def fused_for_cpu(module: Any, target: Any) -> Any:
    """Return the module as functions of fused loops, not scheduled yet."""
    import tvm
    from tvm import relax

    passes = [
        relax.transform.Normalize(),
        relax.transform.CanonicalizeBindings(),
        relax.transform.LegalizeOps(packed_layers(lanes_of(target))),
        *_common(),
    ]
    with _reasoned(), target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(passes)(_channels_last(module))


def _channels_last(module: Any) -> Any:
    """Return the module with the channels of images innermost, or as it is where TVM does not bring that about."""
    from tvm import relax

    plain = relax.transform.DecomposeOpsForInference()(module)
    try:
        return relax.transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "HWIO"]})(plain)
    except (RuntimeError, ValueError, AttributeError):
        return plain


@contextlib.contextmanager
def _reasoned() -> Iterator[None]:
    """Say in one line what TVM's passes do not compile."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # TVM raises errors of every kind
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        reason = lines[-1].strip()[:200] if lines else type(error).__name__
        raise UserError(
            f"TVM imports this model, but cannot compile it: {reason}. Take another target, such as cpu-fp32"
        ) from error


def _common() -> list[Any]:
    from tvm import relax

    return [
        relax.transform.LiftTransformParams(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]


def compiled(fused: Any, target: Any) -> Any:
    """Schedule what is not scheduled yet, and return the executable."""
    import tvm
    from tvm import relax

    with _reasoned(), tvm.transform.PassContext(opt_level=3, config=OPTIONS):
        scheduled = scheduled_float(fused, lanes_of(target))
        return tvm.compile(scheduled, target=target, relax_pipeline=_repeatable(relax.get_pipeline("default")))


def _repeatable(passes: Any) -> Any:
    """Return TVM's own passes, and behind them one that brings what computes sizes into the order of their slots.

    TVM orders these by addresses, so that the bytes of a library for open sizes would differ from run to run.
    """
    import tvm
    from tvm import tirx

    def ordered(module: Any, context: Any) -> Any:
        del context
        lowered = passes(module)
        for name, function in lowered.functions_items():
            if name.name_hint.startswith(_SIZES) and isinstance(function.body, tirx.SeqStmt):
                lowered.update_func(name, function.with_body(tirx.SeqStmt(sorted(function.body, key=_slot))))
        return lowered

    return tvm.transform.module_pass(ordered, opt_level=0, name="OrderSizes")


def _slot(statement: Any) -> int:
    return int(statement.indices[0])


def fused_for_gpu(module: Any, target: Any) -> Any:
    """Return the module as functions of fused loops, not scheduled yet."""
    import tvm
    from tvm import relax

    passes = [relax.transform.DecomposeOpsForInference(), relax.transform.LegalizeOps(), *_common()]
    with _reasoned(), target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(passes)(module)


def _import_metal_intrinsics() -> None:
    """Import the intrinsics that the schedules for Metal need, without those of every other processor.

    Their package imports all of these, and TVM parses each as it is imported: half a minute, of which Metal's own take
    a second. They are imported below an empty package of that name, which goes afterwards; a later import of a module
    that is there already does not ask for its package.
    """
    if _INTRINSICS in sys.modules or f"{_INTRINSICS}.metal" in sys.modules:
        return
    found = importlib.util.find_spec(_INTRINSICS)
    if found is None:
        return
    package = types.ModuleType(_INTRINSICS)
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules[_INTRINSICS] = package
    try:
        importlib.import_module(f"{_INTRINSICS}.metal")
    finally:
        del sys.modules[_INTRINSICS]


def compiled_for_gpu(fused: Any, target: Any) -> Any:
    """Give every function the default schedule of its kind, and return the executable."""
    import tvm
    from tvm import relax
    from tvm.s_tir import dlight

    with _reasoned(), target, tvm.transform.PassContext(opt_level=3):
        if target.kind.name == "metal":
            _import_metal_intrinsics()
        scheduled = dlight.ApplyDefaultSchedule(*default_rules())(fused)
        return tvm.compile(scheduled, target=target, relax_pipeline=_repeatable(relax.get_default_pipeline(target)))
