"""Whether all that runs an integer graph gives the same bits: ONNX Runtime, C, the reference executor, TVM's library.

python benchmarks/integer_bits.py SUBJECT FOLDER RESULT SAMPLES

A process of its own for each model, since compilers may crash or take too long: RESULT is written after every step.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import data
import integer_subjects
import numpy as np
import onnx_ir as ir
import timing

import qgraph.ir
from qgraph.codegen.c_graph import Port
from qgraph.codegen.c_source import Footprint, emit_c
from qgraph.codegen.tvm_disassembly import float_instructions
from qgraph.codegen.tvm_edges import Edge
from qgraph.codegen.tvm_library import LIBRARY, TvmSession, emit_so
from qgraph.errors import UserError
from qgraph.passes.integer_requantize import BOUNDARY_KEY
from qgraph.pipeline import Pipeline
from qgraph.runtime.reference import ReferenceSession
from qgraph.targets.integer import Integer, code_form

__all__ = ["CSession", "compiled", "differing"]

GCC = ("gcc", "-std=c99", "-O3", "-Wall", "-Werror", "-fno-strict-aliasing", "-shared", "-fPIC")
Run = Callable[[data.Feeds], Sequence[np.ndarray]]
PATIENCE = {"reference": 60.0, "tvm": 120.0, "c": 240.0, "onnxruntime": 240.0}
"""Seconds after which no further sample is run."""


def compiled(model: ir.Model, feeds: Sequence[data.Feeds], compress: str = "full-qdq") -> ir.Model:
    """Return a float model as an integer graph, by the passes of the target `integer`."""
    target = Integer()
    target.prepare_passes().run(model, calibration=feeds)
    Pipeline.parse(compress).run(model, calibration=feeds)
    target.lower_passes().run(model)
    return model


def differing(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> int:
    """Return how many elements of the outputs differ; all of one whose shape or type does."""
    return sum(
        int((one != other).sum()) if one.shape == other.shape and one.dtype == other.dtype else max(one.size, 1)
        for one, other in zip(wanted, found, strict=True)
    )


class CSession:
    """Runs generated C, compiled by gcc, on the model's own inputs and outputs.

    Args:
        model: as `emit_c` wants it.
        folder: gets the sources and the library.

    Raises:
        UserError: there is no C for it.
        subprocess.CalledProcessError: gcc refuses it.
    """

    def __init__(self, model: ir.Model, folder: Path) -> None:
        self.needs: Footprint = emit_c(model, folder)
        library = folder / "model.so"
        subprocess.run([*GCC, "-o", str(library), str(folder / "model.c")], check=True, capture_output=True)
        self._run = ctypes.CDLL(str(library)).model_run
        self._inputs = [_edge(port) for port in self.needs.inputs]
        self._outputs = [_edge(port) for port in self.needs.outputs]

    def run(self, output_names: None, feeds: data.Feeds) -> list[np.ndarray]:
        """Return all outputs for one feed."""
        del output_names
        arrays = [np.ascontiguousarray(edge.quantize(feeds[edge.name])) for edge in self._inputs]
        results = [np.empty(edge.shape, edge.dtype) for edge in self._outputs]
        self._run(*(array.ctypes.data_as(ctypes.c_void_p) for array in (*arrays, *results)))
        return [edge.dequantize(array) for edge, array in zip(self._outputs, results, strict=True)]


def _edge(port: Port) -> Edge:
    return Edge(port.source, port.value.name or "", port.shape, port.dtype.name, port.scale, port.zero_point)


class _Bench:
    def __init__(self, name: str, folder: Path, result: Path, count: int) -> None:
        self._subject = integer_subjects.SUBJECTS[name]
        self._folder, self._result, self._count = folder, result, count
        self._samples: list[data.Feeds] = []
        self._wanted: list[Sequence[np.ndarray]] = []
        self.figures: dict[str, Any] = {"failures": {}}

    def run(self) -> None:
        start = time.perf_counter()
        model = compiled(self._subject.model(), self._subject.calibration())
        boundaries = [node for node in qgraph.ir.walk(model) if BOUNDARY_KEY in node.metadata_props]
        self.figures |= {
            "compile_seconds": time.perf_counter() - start,
            "nodes": len(model.graph),
            "boundaries": [[qgraph.ir.node_label(node), node.metadata_props[BOUNDARY_KEY]] for node in boundaries],
            "unmarked": [list(one) for one in Integer().check(model)],
        }
        self._write()
        path = self._folder / "model.onnx"
        qgraph.ir.save(model, path)
        self._samples = self._subject.samples(self._count)
        self._wanted = self._outputs("onnxruntime", timing.session(path).run)
        self.figures["elements"] = sum(one.size for one in self._wanted[0])
        self._write()
        plain = code_form(model)
        for step, make in (("c", self._c), ("reference", self._reference), ("tvm", self._tvm)):
            try:
                session = make(plain, path)
                self._compare(step, session.run)
            except UserError as error:
                self.figures["failures"][step] = str(error)
            except subprocess.CalledProcessError as error:
                self.figures["failures"][step] = error.stderr.decode(errors="replace")[:300]
            self._write()

    def _c(self, model: ir.Model, path: Path) -> CSession:
        del path
        folder = self._folder / "c"
        folder.mkdir()
        start = time.perf_counter()
        session = CSession(model, folder)
        self.figures["gcc_seconds"] = time.perf_counter() - start
        self.figures |= {"flash": session.needs.flash, "ram": session.needs.ram, "kernels": session.needs.kernels}
        return session

    def _reference(self, model: ir.Model, path: Path) -> ReferenceSession:
        del model
        return ReferenceSession(path)

    def _tvm(self, model: ir.Model, path: Path) -> TvmSession:
        del path
        folder = self._folder / "tvm"
        folder.mkdir()
        start = time.perf_counter()
        emit_so(model, folder)
        self.figures["tvm_seconds"] = time.perf_counter() - start
        self.figures["tvm_float_instructions"] = len(float_instructions(folder / LIBRARY))
        self._write()
        return TvmSession(folder)

    def _outputs(self, step: str, run: Callable[..., Sequence[np.ndarray]]) -> list[Sequence[np.ndarray]]:
        """Run samples until all are done or `PATIENCE` ends."""
        found: list[Sequence[np.ndarray]] = []
        start = time.perf_counter()
        for feeds in self._samples:
            found.append(run(None, feeds))
            if time.perf_counter() - start > PATIENCE[step]:
                break
        self.figures[f"{step}_samples"] = len(found)
        self.figures[f"{step}_ms"] = 1e3 * (time.perf_counter() - start) / len(found)
        return found

    def _compare(self, step: str, run: Callable[..., Sequence[np.ndarray]]) -> None:
        if step == "reference":  # slow beyond any use but as an oracle
            self._samples = self._samples[:10]
        elif step == "tvm":
            self._samples = self._subject.samples(self._count)
        found = self._outputs(step, run)
        pairs = zip(self._wanted, found, strict=False)
        self.figures[f"{step}_differ"] = sum(differing(one, other) for one, other in pairs)
        self.figures[f"{step}_samples"] = min(len(found), len(self._wanted))

    def _write(self) -> None:
        self._result.write_text(json.dumps(self.figures, indent=1))


if __name__ == "__main__":
    _Bench(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])).run()
