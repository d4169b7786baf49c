"""The machines that TVM compiles for, as its targets; and which of them this machine is."""

from __future__ import annotations

from typing import Any

from qgraph.codegen.tvm_lowering import require_tvm
from qgraph.errors import UserError

__all__ = ["cpu_target", "cuda_target", "device_is_here", "metal_target", "runs_here"]

_METAL_HOST = "arm64-apple-macos13"
_CUDA_THREADS, _METAL_THREADS = 1024, 256


def cpu_target(triple: str = "", cpu: str = "") -> Any:
    """Return the target of a processor.

    Args:
        triple: as LLVM writes it, such as aarch64-linux-gnu; this machine's when empty.
        cpu: LLVM's name, with features behind it, such as cortex-a76 or generic+dotprod; this machine's processor
            where both are empty.

    Raises:
        UserError: TVM is not installed, or knows no such machine.
    """
    tvm = require_tvm()
    name, *features = cpu.split("+")
    options: dict[str, Any] = {"kind": "llvm"}
    if triple:
        options["mtriple"] = triple
    if name or not triple:
        options["mcpu"] = name or tvm.get_global_func("target.llvm_get_system_cpu")()
    if features:
        options["mattr"] = [f"+{one}" for one in features]
    target = _target(options)
    if triple:
        _require_triple(target, triple)
    if name and name not in ("generic", *_processors(target)):
        raise UserError(f"LLVM knows no processor '{name}' for {triple or 'this machine'}")
    return target


def _require_triple(target: Any, triple: str) -> None:
    """Raise a UserError for a machine that LLVM does not know: asked for its processors, it would crash."""
    from tvm.target import codegen

    try:
        codegen.llvm_get_vector_width(target)
    except RuntimeError as error:
        raise UserError(f"LLVM knows no machine '{triple}': write a triple such as aarch64-linux-gnu") from error


def _processors(target: Any) -> list[str]:
    from tvm.target import codegen

    return [str(one) for one in codegen.llvm_get_cpu_archlist(target)]


def cuda_target(arch: str) -> Any:
    """Return the target of an NVIDIA GPU beside a processor like this machine's.

    Raises:
        UserError: TVM is not installed, or knows no such GPU.
    """
    require_tvm()
    if not (arch.startswith("sm_") and arch[3:].rstrip("af").isdigit()):
        raise UserError(f"arch={arch}: a GPU is called sm_80, sm_90 and so on")
    return _target({
        "kind": "cuda", "arch": arch, "max_threads_per_block": _CUDA_THREADS, "max_shared_memory_per_block": 49152,
        "host": {"kind": "llvm"},
    })  # fmt: skip


def metal_target() -> Any:
    """Return the target of an Apple GPU beside an Apple processor.

    Raises:
        UserError: TVM is not installed.
    """
    require_tvm()
    host = {"kind": "llvm", "mtriple": _METAL_HOST}
    return _target({"kind": "metal", "max_threads_per_block": _METAL_THREADS, "host": host})


def _target(options: dict[str, Any]) -> Any:
    tvm = require_tvm()
    try:
        return tvm.target.Target(options)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"TVM knows no machine {options}: {reason}") from error


def runs_here(target: Any) -> bool:
    """Tell whether this machine executes what is compiled for a processor: the same system, and all that it uses."""
    from tvm.target import codegen

    tvm = require_tvm()
    own = cpu_target()
    here = str(tvm.get_global_func("target.llvm_get_system_triple")())
    triple = str(target.attrs.get("mtriple", "") or here)
    if _system(triple) != _system(here):
        return False
    used, offered = (set(map(str, codegen.llvm_get_cpu_features(one))) for one in (target, own))
    return used <= offered


def _system(triple: str) -> tuple[str, str]:
    """Return architecture and system of a triple, such as ("x86_64", "linux")."""
    architecture, *rest = triple.split("-")
    return architecture, next((part for part in rest if part.startswith(("linux", "macos", "darwin", "windows"))), "")


def device_is_here(kind: str) -> bool:
    """Tell whether this machine has a GPU of a kind that TVM can use."""
    try:
        return bool(require_tvm().device(kind).exist)
    except (ValueError, RuntimeError):
        return False
