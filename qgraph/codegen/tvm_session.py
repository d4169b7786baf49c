"""A session on a compiled model, like one of ONNX Runtime."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qgraph.codegen.tvm_artifact import LIBRARY
from qgraph.codegen.tvm_lowering import require_tvm
from qgraph.codegen.tvm_runner import Model
from qgraph.errors import UserError

__all__ = ["ModelSession"]


class ModelSession:
    """Runs what a TVM target wrote.

    Args:
        folder: of the artifact.
        library: another library than the folder's own, for the same weights.
        device: that this library is for; what the model was compiled for by default.
        threads: for the loops inside operators; 0 lets TVM choose. It holds for the whole process.

    Raises:
        UserError: TVM is not installed, or the files are missing or not usable here.
    """

    def __init__(self, folder: Path, *, library: Path | None = None, device: str = "", threads: int = 0) -> None:
        require_tvm()
        found = library or folder / LIBRARY
        if not found.is_file():
            raise UserError(f"{folder} has no library to load here: link its objects for the machine they are for")
        try:
            # A copy: for a path that was opened before, the system would give the library that it held then.
            with tempfile.TemporaryDirectory(prefix="qgraph-") as own:
                copy = Path(shutil.copy(found, own))
                self._model = Model(folder, library=copy, device=device, threads=threads)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UserError(f"{folder} cannot be opened here: {reason}") from error

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run one feed and return the outputs that are named, or all.

        Raises:
            UserError: an input is missing, or of another type or shape, or there is no such output.
        """
        try:
            return self._model.run(output_names, feeds)
        except ValueError as error:
            raise UserError(str(error)) from error
