"""How fast code from the integer graph is, beside float code and ONNX Runtime: one thread, all in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import integer_bits
import integer_subjects
import numpy as np
import onnx_ir as ir
import pruning
import timing

import qgraph.compiler
import qgraph.ir
from qgraph.codegen.tvm_library import TvmSession, emit_so
from qgraph.codegen.tvm_schedule import scheduled
from qgraph.targets.cpu import CpuFp32
from qgraph.targets.integer import code_form

__all__ = ["MODELS", "claims", "measure"]

Figures = dict[str, Any]
MODELS = ("digits_cnn", "resnet20")
TVM_INTEGER, TVM_FLOAT, TVM_PLAIN = "TVM, integers", "TVM, float32", "TVM, float32, its own defaults"
GENERATED = "generated C, gcc -O3"
ORT_FLOAT, ORT_INTEGER, ORT_INT8 = "ONNX Runtime, float32", "ONNX Runtime, integer graph", "ONNX Runtime, cpu-int8"


class _FloatLibrary:
    """A float model that TVM imports and compiles itself.

    Args:
        model: of one shape, with one input.
        ours: whether it gets the schedule of our integer code, or what TVM does by default.
    """

    def __init__(self, model: ir.Model, *, ours: bool) -> None:
        import tvm
        from tvm import relax
        from tvm.relax.frontend.onnx import from_onnx

        (graph_input,) = model.graph.inputs
        self._name = graph_input.name
        module = from_onnx(ir.to_proto(model), keep_params_in_input=False)
        target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.get_global_func("target.llvm_get_system_cpu")()})
        built = tvm.compile(scheduled(module, target) if ours else module, target=target)
        tvm.get_global_func("runtime.config_threadpool")(1, 1)
        self._tensor = tvm.runtime.tensor
        self._main = relax.VirtualMachine(built, tvm.cpu())["main"]

    def run(self, output_names: None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for one feed."""
        del output_names
        found = self._main(self._tensor(feeds[self._name]))
        return [found.numpy()] if hasattr(found, "numpy") else [one.numpy() for one in found]


def measure(name: str, *, samples: int) -> list[Figures]:
    """Return the milliseconds of one sample for everything that runs the model, and the ratio to TVM's float code."""
    subject = integer_subjects.SUBJECTS[name]
    feeds, calibration = subject.samples(samples), subject.calibration()
    with tempfile.TemporaryDirectory(prefix="qgraph-integer-") as scratch:
        sessions = _sessions(subject, calibration, Path(scratch))
        _refuse_wrong(sessions, feeds[0])
        seconds = timing.in_turn(sessions, feeds)
    medians = {runs: float(np.median(one)) for runs, one in seconds.items()}
    return [
        {
            "name": name,
            "runs": runs,
            "ms": 1e3 * median,
            "times float": medians[TVM_FLOAT] / median,
            "times ONNX Runtime float": medians[ORT_FLOAT] / median,
        }
        for runs, median in medians.items()
    ]


def _sessions(subject: integer_subjects.Subject, feeds: Sequence[Any], folder: Path) -> dict[str, Any]:
    floats = subject.model()
    CpuFp32().prepare_passes().run(floats)
    qgraph.ir.save(floats, folder / "float.onnx")
    integers = integer_bits.compiled(subject.model(), feeds)
    qgraph.ir.save(integers, folder / "integer.onnx")
    made = qgraph.compiler.compile(
        subject.task.model(), "cpu-int8", output=folder / "cpu-int8", calibration=feeds, shapes=dict(subject.shapes)
    )
    code = code_form(integers)
    for inner in ("c", "tvm"):
        (folder / inner).mkdir()
    emit_so(code, folder / "tvm")
    return {
        TVM_INTEGER: TvmSession(folder / "tvm", threads=1),
        TVM_FLOAT: _FloatLibrary(floats, ours=True),
        TVM_PLAIN: _FloatLibrary(floats, ours=False),
        GENERATED: integer_bits.CSession(code, folder / "c"),
        ORT_FLOAT: timing.session(folder / "float.onnx", threads=1),
        ORT_INTEGER: timing.session(folder / "integer.onnx", threads=1),
        ORT_INT8: timing.session(made.path / "model.onnx", threads=1),
    }


def _refuse_wrong(sessions: Mapping[str, Any], feed: Mapping[str, np.ndarray]) -> None:
    """Refuse to time what computes something else.

    Raises:
        RuntimeError: float code is not near, or integer code not equal.
    """
    results = {runs: one.run(None, feed)[0] for runs, one in sessions.items()}
    for runs in (TVM_FLOAT, TVM_PLAIN):
        if not np.allclose(results[runs], results[ORT_FLOAT], rtol=1e-3, atol=1e-3):
            raise RuntimeError(f"{runs} computes something else than {ORT_FLOAT}")
    for runs in (TVM_INTEGER, GENERATED):
        if not np.array_equal(results[runs], results[ORT_INTEGER]):
            raise RuntimeError(f"{runs} computes something else than {ORT_INTEGER}")


def claims(rows: Sequence[Figures]) -> list[Figures]:
    """Return how the integer library compares; the issue asks to measure, and sets no bound."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        ms = {row["runs"]: row["ms"] for row in rows if row["name"] == name}
        ratios = {runs: one / ms[TVM_INTEGER] for runs, one in ms.items()}
        text = (
            f"{ratios[TVM_FLOAT]:.2f} times TVM's float library (by TVM's defaults {ratios[TVM_PLAIN]:.2f}), "
            f"{ratios[ORT_FLOAT]:.2f} times ONNX Runtime's float32, {ratios[ORT_INT8]:.2f} times its cpu-int8"
        )
        what = f"{name}, speed of TVM's integer library"
        found.append(pruning.claim(what, "measured in one run, no bound", text, reached=True))
    return found
