"""The files of a model that TVM has compiled, and the link of its library.

model.so        the code; for a machine that nothing here links for, its objects lib*.o and devc.o instead
params.bin      the weights as they were stored, each at a multiple of 64 bytes
model.json      inputs, outputs, weights and the TVM target; signature.h says the same to C++
run.py, run.cc, Makefile    two runners that need TVM's runtime alone
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.codegen.tvm_import import Parameter
from qgraph.errors import UserError

__all__ = ["LIBRARY", "PARAMETERS", "SIGNATURE", "link", "objects", "write_parameters", "write_runners"]

LIBRARY = "model.so"
PARAMETERS = "params.bin"
SIGNATURE = "model.json"
_ALIGNMENT = 64
_DEVICES = {"cpu": "kDLCPU", "cuda": "kDLCUDA", "metal": "kDLMetal"}
_CODES = {"b": "kDLBool", "f": "kDLFloat", "i": "kDLInt", "u": "kDLUInt", "V": "kDLBfloat"}
_FILES = ("run.cc", "Makefile")


@dataclasses.dataclass(frozen=True)
class _Stored:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def objects(executable: Any, folder: Path) -> list[Path]:
    """Write the object files of an executable into `folder`: the same bytes for the same code."""
    written: list[Path] = []

    def keep(name: str, files: Sequence[str], **options: Any) -> None:
        del name, options
        written.extend(Path(shutil.copy(file, folder / Path(file).name)) for file in files)

    keep.output_format = "so"  # type: ignore[attr-defined] # TVM asks the function for it
    keep.object_format = "o"  # type: ignore[attr-defined]
    executable.export_library(str(folder / LIBRARY), fcompile=keep)
    return sorted(written)


def link(parts: Sequence[Path], library: Path) -> None:
    """Link objects for this machine.

    Raises:
        UserError: there is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UserError("the library cannot be linked: install a C++ compiler, or name one in CXX")
    # In a folder of its own and by bare names, so that no path gets into the file.
    with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
        names = [Path(shutil.copy(part, scratch)).name for part in parts]
        command = [compiler, "-shared", "-fPIC", "-o", library.name, *names]
        if os.uname().sysname == "Linux":
            command.append("-Wl,--build-id=none")
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"the library cannot be linked: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        shutil.copy(Path(scratch) / library.name, library)


def write_parameters(parameters: Sequence[Parameter], path: Path) -> list[dict[str, Any]]:
    """Write the weights one by one, and return where each is."""
    entries = []
    with path.open("wb") as file:
        for one in parameters:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            array = np.ascontiguousarray(one.tensor.numpy())
            entries.append(_Stored(one.name, one.dtype, one.shape, file.tell(), array.nbytes))
            file.write(array.reshape(-1).view(np.uint8).data)
    return [dataclasses.asdict(entry) for entry in entries]


def write_runners(
    model: ir.Model, folder: Path, entries: Sequence[dict[str, Any]], *, device: str, target: str, library: str
) -> None:
    """Write the signature in both its forms, and the runners."""
    facts = {
        "device": device,
        "inputs": [_tensor(value) for value in model.graph.inputs],
        "library": library,
        "outputs": [_tensor(value) for value in model.graph.outputs],
        "parameters": list(entries),
        "target": target,
    }
    (folder / SIGNATURE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "signature.h").write_text(_header(facts), encoding="utf-8")
    package = resources.files("qgraph.codegen")
    (folder / "run.py").write_text(package.joinpath("tvm_runner.py").read_text("utf-8"), encoding="utf-8")
    for name in _FILES:
        (folder / name).write_text(package.joinpath("tvm_files", name).read_text("utf-8"), encoding="utf-8")


def _tensor(value: ir.Value) -> dict[str, Any]:
    sizes = [] if value.shape is None else list(value.shape)
    shape = [size if isinstance(size, int) else str(size) for size in sizes]
    dtype = "" if value.dtype is None else str(value.dtype.numpy())
    return {"name": value.name or "", "dtype": dtype, "shape": shape}


def _header(facts: dict[str, Any]) -> str:
    """Return the signature as C++."""
    inputs = "\n".join(f"    {_signature(one)}," for one in facts["inputs"])
    stored = [f"    {{{_signature(one)}, {one['offset']}u, {one['bytes']}u}}," for one in facts["parameters"]]
    nothing = '    {{"", {kDLFloat, 32, 1}, 0, {0}}, 0u, 0u},'
    return f"""// The tensors of the model: name, type, number of axes, sizes (-1: open).
#pragma once
#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>

struct Signature {{
  const char* name;
  DLDataType dtype;
  int rank;
  int64_t shape[8];
}};

struct Parameter {{
  Signature tensor;
  size_t offset;
  size_t bytes;
}};

constexpr DLDeviceType kDevice = {_DEVICES[facts["device"]]};
constexpr int kInputCount = {len(facts["inputs"])};
constexpr int kParameterCount = {len(stored)};
const Signature kInputs[] = {{
{inputs}
}};
const Parameter kParameters[] = {{
{chr(10).join(stored or [nothing])}
}};
"""


def _signature(one: dict[str, Any]) -> str:
    dtype = np.dtype(one["dtype"])
    sizes = ", ".join(str(size) if isinstance(size, int) else "-1" for size in one["shape"]) or "1"
    kind = f"{{{_CODES[dtype.kind]}, {dtype.itemsize * 8}, 1}}"
    return f"{{{json.dumps(one['name'])}, {kind}, {len(one['shape'])}, {{{sizes}}}}}"
