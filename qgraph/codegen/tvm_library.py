"""A library of machine code from an integer graph, compiled by TVM, and a session that runs it.

model.so          the compiled functions, the weights and the order of the calls; needs TVM's runtime to run
signature.json    the tensors at the edges, with their scales and zero points, and the processor
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.codegen.tvm_edges import Signature
from qgraph.codegen.tvm_lowering import build_module, require_tvm
from qgraph.codegen.tvm_schedule import scheduled
from qgraph.errors import UserError, nearest

__all__ = ["LIBRARY", "SIGNATURE", "TvmSession", "emit_so"]

LIBRARY = "model.so"
SIGNATURE = "signature.json"


def emit_so(model: ir.Model, folder: Path, *, target: str | Mapping[str, Any] | None = None) -> list[str]:
    """Compile an integer graph and write the library and its signature.

    Args:
        model: as for `build_module`.
        folder: where to write; exists.
        target: as TVM names it, such as `{"kind": "llvm", "mtriple": "aarch64-linux-gnu"}`; this machine when None.

    Returns:
        The names of the files.

    Raises:
        UserError: TVM or a C++ compiler to link with is not installed, TVM does not know the target, or as
            `build_module`.
    """
    tvm = require_tvm()
    chosen = _target(tvm, target)
    module, signature = build_module(model)
    executable = tvm.compile(scheduled(module, chosen), target=chosen)
    try:
        executable.export_library(str(folder / LIBRARY))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the library cannot be linked: {_last_line(error)}. A C++ compiler for the target must be installed; "
            "the environment variable CXX names another than the system's"
        ) from error
    signature.write(folder / SIGNATURE, target=str(chosen))
    return [LIBRARY, SIGNATURE]


def _target(tvm: Any, wanted: str | Mapping[str, Any] | None) -> Any:
    if wanted is None:
        wanted = {"kind": "llvm", "mcpu": tvm.get_global_func("target.llvm_get_system_cpu")()}
    try:
        target = tvm.target.Target(dict(wanted) if isinstance(wanted, Mapping) else wanted)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"TVM knows no target {wanted}: {_last_line(error)}") from error
    if str(target.kind) != "llvm":
        raise UserError(f"the target {wanted} is of kind '{target.kind}', but libraries are made for CPUs: kind 'llvm'")
    return target


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


class TvmSession:
    """Runs what `emit_so` wrote, alike an ONNX Runtime session.

    Args:
        folder: with the library and its signature.
        threads: for the loops inside operators; 0 lets TVM choose. It holds for the whole process.

    Attributes:
        signature: the tensors at the edges.

    Raises:
        UserError: TVM is not installed, or the files are missing or not usable here.
    """

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        self._tvm = require_tvm()
        self.signature = Signature.read(folder / SIGNATURE)
        library = self._opened(folder / LIBRARY)
        if threads:
            self._tvm.get_global_func("runtime.config_threadpool")(1, threads)
        from tvm import relax

        self._main = relax.VirtualMachine(library, self._tvm.cpu())["main"]

    def _opened(self, path: Path) -> Any:
        """Open a copy: for a path that was opened before, the system would give the library that it held then."""
        try:
            with tempfile.TemporaryDirectory(prefix="qgraph-") as own:
                return self._tvm.runtime.load_module(shutil.copy(path, own))
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{path} cannot be opened here: {_last_line(error)}") from error

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run one feed of the model's own inputs, floats where it has floats, and return its outputs likewise.

        Raises:
            UserError: an input is missing or of another type or shape, or there is no such output.
        """
        arrays = []
        for edge in self.signature.inputs:
            if edge.name not in feeds:
                raise UserError(f"input '{edge.name}' is not fed (given: {', '.join(feeds)})")
            dtype = edge.dtype if edge.scale is None else "float32"
            arrays.append(edge.quantize(edge.checked(feeds[edge.name], dtype)))
        found = {
            edge.name: edge.dequantize(array)
            for edge, array in zip(self.signature.outputs, self._call(arrays), strict=True)
        }
        for name in output_names or ():
            if name not in found:
                raise UserError(f"there is no output '{name}'.{nearest(name, found)} There are: {', '.join(found)}.")
        return [found[name] for name in output_names or found]

    def run_quantized(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the integer tensors at the edges, all by the names of these tensors in the integer graph.

        Raises:
            UserError: as `run`.
        """
        arrays = []
        for edge in self.signature.inputs:
            if edge.tensor not in feeds:
                raise UserError(f"tensor '{edge.tensor}' is not fed (given: {', '.join(feeds)})")
            arrays.append(edge.checked(feeds[edge.tensor], edge.dtype))
        return {edge.tensor: array for edge, array in zip(self.signature.outputs, self._call(arrays), strict=True)}

    def _call(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        results = self._main(*(self._tvm.runtime.tensor(one) for one in arrays))
        return [one.numpy() for one in results]
