"""A package as something with `run(None, feeds)`: on a Mac in Core ML, elsewhere in our interpreter."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qgraph.coreml.interpreter import Interpreter
from qgraph.coreml.lowering import Port
from qgraph.coreml.package import SIGNATURE
from qgraph.coreml.program import Feature, read_package
from qgraph.coreml.toolkit import toolkit
from qgraph.errors import UserError

__all__ = ["PackageSession", "on_device"]


def on_device() -> bool:
    """Tell whether Core ML itself is here."""
    return platform.system() == "Darwin"


class PackageSession:
    """Takes and gives what the source model does, by its names, in its types.

    Args:
        folder: the package.

    Raises:
        UserError: the package is damaged, was not written by qgraph, or, on a Mac, coremltools is not installed.
    """

    def __init__(self, folder: Path) -> None:
        package = read_package(folder)
        try:
            signature = json.loads(package.metadata[SIGNATURE])
            self.inputs = [_port(one) for one in signature["inputs"]]
            self.outputs = [_port(one) for one in signature["outputs"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{folder} does not say what its inputs and outputs stand for: it is not ours") from None
        self._inputs = {one.name: one for one in package.inputs}
        self._runner: Any = _Device(folder, package.outputs) if on_device() else Interpreter(folder)

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run one feed; what the model does not read may be missing.

        Raises:
            UserError: an input is missing or of another shape, or there is no such output.
        """
        given = {port.feature: self._given(port, feeds) for port in self.inputs}
        results = self._runner.run(given)
        named = {
            port.name: np.asarray(array).astype(port.dtype).reshape(port.shape)
            for port, array in zip(self.outputs, results, strict=True)
        }
        wanted = list(named) if output_names is None else list(output_names)
        missing = [name for name in wanted if name not in named]
        if missing:
            raise UserError(f"the model has no output '{missing[0]}' (it has: {', '.join(named)})")
        return [named[name] for name in wanted]

    def _given(self, port: Port, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        if port.name not in feeds:
            raise UserError(f"input '{port.name}' is missing")
        array, feature = np.asarray(feeds[port.name]), self._inputs[port.feature]
        if array.shape != port.shape:
            raise UserError(
                f"input '{port.name}' has the shape {list(array.shape)}, and the package was compiled for "
                f"{list(port.shape)}: compile it with --shape {port.name}={','.join(map(str, array.shape))}"
            )
        assert feature.type is not None
        return array.astype(feature.type.numpy).reshape(feature.shape)


class _Device:
    """The package in Core ML."""

    def __init__(self, folder: Path, outputs: Sequence[Feature]) -> None:
        toolkit()
        from coremltools.models import MLModel

        self._model = MLModel(str(folder))
        self._outputs = [one.name for one in outputs]

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run one feed."""
        results = self._model.predict(dict(feeds))
        return [np.asarray(results[name]) for name in self._outputs]


def _port(entry: Mapping[str, Any]) -> Port:
    return Port(str(entry["name"]), str(entry["feature"]), str(entry["dtype"]), tuple(entry["shape"]))
