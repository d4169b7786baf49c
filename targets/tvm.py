"""TVM: a compiled library, weights beside it, and two runners that need nothing but TVM's runtime.

    model.so, params.bin, model.json, run.py, run.cc, Makefile    for processors and NVIDIA GPUs
    lib0.o, devc.o                                                instead of model.so where nothing here links for it
    source/kernels.cu, .metal                                     the generated code of GPUs
    stand-in/model.so                                             the same module for this machine's processor, where
                                                                  the device is not here: what sessions run then
    tuning/                                                       with trials: what was measured (see `trials`)

Float: `--passes` compresses weights, which stay as small in params.bin; the library widens them once when it is loaded.
Operators that TVM's importer does not know are written as plainer ones (`to-plain-operators`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_support import unsupported
from qgraph.capabilities import table
from qgraph.codegen import tvm_artifact, tvm_float_build, tvm_machines
from qgraph.codegen.tvm_import import imported, refused
from qgraph.codegen.tvm_kernels import Limits, check_kernels, sources
from qgraph.codegen.tvm_session import ModelSession
from qgraph.codegen.tvm_tuning import Log, tuned
from qgraph.errors import UserError
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.targets.base import Session, Target, cleaned_up, float64_edges, repeated_outputs

__all__ = ["TvmCpu", "TvmCuda", "TvmMetal"]

_LOWER = "to-plain-operators,infer-shapes,fold-constants,remove-unused"
_STAND_IN = "stand-in"
_PYTHON = ("NonZero", "Unique")
"""Operators that TVM computes in Python: relax.run.nonzero and relax.run.unique, see tvm/relax/op/set.py."""


@dataclasses.dataclass(frozen=True)
class _Tvm(Target):
    extra: ClassVar[str] = "tvm"

    def prepare_passes(self) -> Pipeline:
        """Return the clean-up passes, and those that write operators as others that the importer knows."""
        return cleaned_up("infer-shapes,unroll-recurrent,infer-shapes,fold-constants,remove-unused")

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return no passes: the code computes in float."""
        del model, context
        return Pipeline()

    def lower_passes(self) -> Pipeline:
        """Return the passes that leave only what the importer knows."""
        return Pipeline.parse(_LOWER)

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return the nodes of operators that TVM's importer does not know, or else the one that it stops at.

        Raises:
            UserError: TVM is not installed.
        """
        return repeated_outputs(model) or unsupported(model, table("tvm")) or _in_python(model) or refused(model)

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Run the library, or where its device is not here, the same module compiled for this processor.

        Raises:
            UserError: TVM is not installed, or the files are not usable here.
        """
        inner = folder / _STAND_IN / tvm_artifact.LIBRARY
        if inner.is_file() and self.stand_in():
            return ModelSession(folder, library=inner, device="cpu", threads=threads)
        return ModelSession(folder, threads=threads)

    def _write(self, model: ir.Model, folder: Path, *, device: str, target: str, library: str) -> list[str]:
        imported_model = imported(model)
        entries = tvm_artifact.write_parameters(imported_model.parameters, folder / tvm_artifact.PARAMETERS)
        tvm_artifact.write_runners(model, folder, entries, device=device, target=target, library=library)
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _in_python(model: ir.Model) -> list[Skipped]:
    """Return the nodes that compiled code would hand to TVM's Python package, which no runner has."""
    why = "{} runs in TVM's Python package, which is not part of its runtime"
    nodes = (node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, *_PYTHON))
    return [Skipped(qgraph.ir.node_label(node), why.format(node.op_type)) for node in nodes]


def _write_library(executable: Any, folder: Path, *, here: bool) -> str:
    """Write the library, or its objects where nothing here links for the machine; return the file to load."""
    parts = tvm_artifact.objects(executable, folder)
    if here:
        tvm_artifact.link(parts, folder / tvm_artifact.LIBRARY)
        for part in parts:
            part.unlink()
    return tvm_artifact.LIBRARY


def _write_stand_in(fused: Any, folder: Path) -> None:
    inner = folder / _STAND_IN
    inner.mkdir()
    _write_library(tvm_float_build.compiled(fused, tvm_machines.cpu_target()), inner, here=True)


@dataclasses.dataclass(frozen=True)
class TvmCpu(_Tvm):
    """Float code for a processor."""

    name: ClassVar[str] = "tvm-cpu"
    summary: ClassVar[str] = "float32 in a library that TVM compiles, for this or another processor"
    triple: str = dataclasses.field(
        default="", metadata={"help": "machine to compile for, such as aarch64-linux-gnu; this one if empty"}
    )
    cpu: str = dataclasses.field(
        default="", metadata={"help": "LLVM's name of the processor, with features: cortex-a76, generic+dotprod"}
    )
    trials: int = dataclasses.field(
        default=0, metadata={"help": "schedules that are measured on this machine to choose the fastest; 0 for none"}
    )
    log: str = dataclasses.field(
        default="", metadata={"help": "folder of an earlier tuning (an artifact's tuning/), whose choices are taken"}
    )

    def __post_init__(self) -> None:
        if self.trials < 0:
            raise ValueError(f"trials is {self.trials}, but must be 0 or more")

    def lower(self, model: ir.Model, folder: Path) -> list[str]:
        """Compile the model, and write library, weights and runners.

        Raises:
            UserError: TVM, what tuning needs or a C++ compiler is not installed, or there is no such processor.
        """
        target = tvm_machines.cpu_target(self.triple, self.cpu)
        here = tvm_machines.runs_here(target)
        if self.trials and not here:
            raise UserError(f"tune=N measures on this machine, which does not run code for {target}")
        log = Log.read(Path(self.log)) if self.log else None
        module = imported(model).module
        fused = tvm_float_build.fused_for_cpu(module, target)
        scheduled, log = tuned(fused, target, trials=self.trials, log=log)
        library = _write_library(tvm_float_build.compiled(scheduled, target), folder, here=here)
        if not here:
            _write_stand_in(tvm_float_build.fused_for_cpu(module, tvm_machines.cpu_target()), folder)
        if log is not None:
            log.write(folder / "tuning")
        return self._write(model, folder, device="cpu", target=str(target), library=library)

    def stand_in(self) -> str:
        """Return a note where the code is for another processor."""
        if not (self.triple or self.cpu):
            return ""
        if tvm_machines.runs_here(tvm_machines.cpu_target(self.triple, self.cpu)):
            return ""
        return f"this machine's processor (the same module; not run on {self.triple or self.cpu})"


@dataclasses.dataclass(frozen=True)
class _TvmGpu(_Tvm):
    kind: ClassVar[str]
    suffix: ClassVar[str]
    limits: ClassVar[Limits]

    def _target(self) -> Any:
        raise NotImplementedError

    def lower(self, model: ir.Model, folder: Path) -> list[str]:
        """Compile the model, look at its kernels, and write library or objects, sources, weights and runners.

        Raises:
            UserError: TVM or a C++ compiler is not installed, or a kernel does not fit the device.
        """
        target = self._target()
        module = imported(model).module
        executable = tvm_float_build.compiled_for_gpu(tvm_float_build.fused_for_gpu(module, target), target)
        source = sources(executable, self.kind)
        wrong = list(check_kernels(source, self.limits))
        if wrong:
            raise UserError(f"{self.name} cannot run this model: {'; '.join(wrong[:3])}")
        (folder / "source").mkdir()
        (folder / "source" / f"kernels.{self.suffix}").write_text(source, encoding="utf-8")
        library = _write_library(executable, folder, here=self.kind == "cuda")
        _write_stand_in(tvm_float_build.fused_for_gpu(module, tvm_machines.cpu_target()), folder)
        return self._write(model, folder, device=self.kind, target=str(target), library=library)

    def stand_in(self) -> str:
        """Return a note where there is no such GPU."""
        if tvm_machines.device_is_here(self.kind):
            return ""
        return f"this machine's processor (the same module; not run on a device of {self.kind})"


@dataclasses.dataclass(frozen=True)
class TvmCuda(_TvmGpu):
    """Float code for an NVIDIA GPU."""

    name: ClassVar[str] = "tvm-cuda"
    summary: ClassVar[str] = "float32 in a library that TVM compiles for an NVIDIA GPU, default schedules"
    kind: ClassVar[str] = "cuda"
    suffix: ClassVar[str] = "cu"
    limits: ClassVar[Limits] = Limits(1024, 49152)
    arch: str = dataclasses.field(default="sm_80", metadata={"help": "compute capability: sm_80, sm_90 ..."})

    def _target(self) -> Any:
        return tvm_machines.cuda_target(self.arch)


@dataclasses.dataclass(frozen=True)
class TvmMetal(_TvmGpu):
    """Float code for an Apple GPU."""

    name: ClassVar[str] = "tvm-metal"
    summary: ClassVar[str] = "float32 in objects that TVM compiles for an Apple GPU, default schedules"
    kind: ClassVar[str] = "metal"
    suffix: ClassVar[str] = "metal"
    limits: ClassVar[Limits] = Limits(256, 32768)

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return the inputs and outputs of a type that Metal lacks, or what the targets of TVM have in common.

        Raises:
            UserError: TVM is not installed.
        """
        return float64_edges(model, "Metal") or super().check(model)

    def _target(self) -> Any:
        return tvm_machines.metal_target()
