"""A package run in numpy, from the bytes that were written: slow, obvious, and without coremltools.

What it shows is that the package means what the source computes. It is no device: values of float16 are rounded to
float16 after every operation, but sums inside an operation are taken in float32, and devices may fuse, reorder and
accumulate otherwise. Compressed weights are expanded once, when the package is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qgraph.coreml import semantics_elementwise, semantics_layers, semantics_moves, semantics_weights
from qgraph.coreml.data_types import MilType
from qgraph.coreml.program import Argument, Block, Operation, Package, TensorSpec, read_package
from qgraph.coreml.semantics import Semantics
from qgraph.errors import UserError

__all__ = ["SEMANTICS", "Interpreter"]

SEMANTICS: Mapping[str, Semantics] = {
    name: function
    for family in (semantics_elementwise, semantics_layers, semantics_moves, semantics_weights)
    for name, function in family.SEMANTICS.items()
}
"""Operation -> what it computes. `const` and `cond` are the interpreter's own."""

_Values = dict[str, np.ndarray]


class Interpreter:
    """A package that is open for running.

    Raises:
        UserError: the package is damaged, or has an operation that is not known.
    """

    def __init__(self, folder: Path) -> None:
        self.package: Package = read_package(folder)
        self._constants: _Values = {}
        self._later = self._expand(self.package.block)

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run one feed.

        Args:
            feeds: feature -> array, of the types and sizes that the package declares.

        Returns:
            the outputs, in the package's order.
        """
        values = dict(self._constants)
        for spec in self.package.parameters:
            array = np.asarray(feeds[spec.name])
            if array.dtype != spec.type.numpy or array.shape != spec.shape:
                raise UserError(
                    f"input '{spec.name}' must be {spec.type.numpy} {list(spec.shape)}, "
                    f"not {array.dtype} {list(array.shape)}"
                )
            values[spec.name] = array
        with np.errstate(all="ignore"):
            for operation in self._later:
                self._step(operation, values)
        return [values[name] for name in self.package.block.outputs]

    def _expand(self, block: Block) -> list[Operation]:
        """Compute the constants; return the operations that are left."""
        later = []
        with np.errstate(all="ignore"):
            for operation in block.operations:
                if operation.type == "const" or operation.type.startswith("constexpr_"):
                    self._step(operation, self._constants)
                else:
                    later.append(operation)
        return later

    def _step(self, operation: Operation, values: _Values) -> None:
        if operation.type == "const":
            values[operation.outputs[0].name] = self.package.array(operation.inputs["val"][0])
            return
        results: Any
        if operation.type == "cond":
            results = self._branch(operation, values)
        else:
            if operation.type not in SEMANTICS:
                raise UserError(f"the package has the operation '{operation.type}', which is not known here")
            given = {name: self._given(name, arguments, values) for name, arguments in operation.inputs.items()}
            results = SEMANTICS[operation.type](**given)
        if not isinstance(results, list | tuple):
            results = [results]
        for spec, array in zip(operation.outputs, results, strict=True):
            values[spec.name] = _declared(spec, np.asarray(array), operation)

    def _branch(self, operation: Operation, values: _Values) -> list[np.ndarray]:
        taken = bool(self._fetch(operation.inputs["pred"][0], values))
        block = operation.blocks[0 if taken else 1]
        inner = dict(values)
        for one in block.operations:
            self._step(one, inner)
        return [inner[name] for name in block.outputs]

    def _given(self, name: str, arguments: Sequence[Argument], values: _Values) -> Any:
        arrays = [_widened(self._fetch(argument, values)) for argument in arguments]
        if name == "values":
            return arrays
        return str(arrays[0][()]) if arrays[0].dtype.kind == "U" else arrays[0]

    def _fetch(self, argument: Argument, values: _Values) -> np.ndarray:
        return values[argument.name] if argument.name else self.package.array(argument)


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _declared(spec: TensorSpec, array: np.ndarray, operation: Operation) -> np.ndarray:
    """Round a result to the type that the program declares for it, and hold it to the declared sizes."""
    if array.shape != spec.shape:
        raise UserError(
            f"the package declares '{spec.name}' ({operation.type}) as {list(spec.shape)}, "
            f"and it is {list(array.shape)}"
        )
    if spec.type is MilType.STRING or (array.dtype.kind == "b") != (spec.type is MilType.BOOL):
        raise UserError(f"the package declares '{spec.name}' as {spec.type.value}, and it is {array.dtype}")
    return array.astype(spec.type.numpy)
