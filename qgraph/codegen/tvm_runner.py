"""Runs a model that was compiled with TVM; needs numpy and TVM's runtime, nothing else.

    python run.py inputs.npz outputs.npz [--threads N]

The folder holds model.json (the tensors), params.bin (the weights as they were stored) and the library.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Model"]

_PREPARE = "main_transform_params"


class Model:
    """A compiled model with its weights, ready to run.

    Args:
        folder: with model.json and params.bin.
        library: the compiled library; the folder's own by default.
        device: "cpu", "cuda" or "metal"; what it was compiled for by default.
        threads: of the loops inside operators; 0 lets TVM choose. It holds for the whole process.

    Raises:
        OSError: a file is missing.
        ValueError: model.json is damaged.
    """

    def __init__(self, folder: Path, *, library: Path | None = None, device: str = "", threads: int = 0) -> None:
        import tvm_ffi
        from tvm import runtime
        from tvm.runtime.vm import VirtualMachine

        _load_extra(Path(runtime.__file__).parents[1] / "lib")
        facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.inputs: list[dict[str, Any]] = facts["inputs"]
        self.outputs: list[dict[str, Any]] = facts["outputs"]
        self._runtime = runtime
        self._device = runtime.device(device or facts["device"])
        if threads:
            tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
        module = runtime.load_module(str(library or folder / facts["library"]))
        machine = VirtualMachine(module, self._device)
        self._main = machine["main"]
        stored = [self._tensor(array) for array in _parameters(folder / "params.bin", facts["parameters"])]
        self._prepared = list(machine[_PREPARE](stored)) if stored else []

    def _tensor(self, array: np.ndarray) -> Any:
        return self._runtime.tensor(np.asarray(array, order="C"), device=self._device)

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run one feed and return the outputs that are named, or all.

        Raises:
            ValueError: an input is missing, or of another type or shape, or there is no such output.
        """
        arguments = [self._tensor(_checked(one, feeds)) for one in self.inputs]
        results = self._main(*arguments, *self._prepared)
        tensors = [results] if hasattr(results, "numpy") else list(results)
        found = {one["name"]: tensor.numpy() for one, tensor in zip(self.outputs, tensors, strict=True)}
        for name in output_names or ():
            if name not in found:
                raise ValueError(f"there is no output '{name}'; there are: {', '.join(found)}")
        return [found[name] for name in output_names or found]


def _load_extra(folder: Path) -> None:
    """Load the part of TVM's runtime that sorts; whole TVM has it loaded, its runtime alone has not."""
    for library in sorted(folder.glob("libtvm_runtime_extra.*")):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _parameters(path: Path, entries: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Return the weights as views of the mapped file."""
    if not entries:
        return []
    data = np.memmap(path, dtype=np.uint8, mode="r")
    arrays = []
    for entry in entries:
        part = data[entry["offset"] : entry["offset"] + entry["bytes"]]
        arrays.append(part.view(np.dtype(entry["dtype"])).reshape(entry["shape"]))
    return arrays


def _checked(entry: Mapping[str, Any], feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    name, wanted = entry["name"], entry["shape"]
    if name not in feeds:
        raise ValueError(f"input '{name}' is not fed (given: {', '.join(feeds)})")
    array = np.asarray(feeds[name])
    fits = len(wanted) == array.ndim and all(
        not isinstance(size, int) or size == found for size, found in zip(wanted, array.shape, strict=False)
    )
    if not fits or str(array.dtype) != entry["dtype"]:
        raise ValueError(f"input '{name}' is {array.dtype}{list(array.shape)}, not {entry['dtype']}{wanted}")
    return array


def main() -> int:
    """Run the arrays of a file, and write the outputs into another."""
    parser = argparse.ArgumentParser(description="Run a compiled model.")
    parser.add_argument("inputs", type=Path, help=".npz with an array for each input")
    parser.add_argument("outputs", type=Path, help=".npz to write")
    parser.add_argument("--threads", type=int, default=0)
    chosen = parser.parse_args()
    try:
        model = Model(Path(__file__).resolve().parent, threads=chosen.threads)
        with np.load(chosen.inputs) as feeds:
            results = model.run(None, feeds)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    found: dict[str, Any] = {one["name"]: array for one, array in zip(model.outputs, results, strict=True)}
    np.savez(chosen.outputs, **found)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    sys.exit(main())
