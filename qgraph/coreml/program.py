"""A package on disk, read back: what was really written, in the words of MIL.

model.mlpackage/Manifest.json                           which item is the model
                Data/com.apple.CoreML/model.mlmodel     a protobuf: inputs, outputs, the program
                                      weights/weight.bin
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qgraph.coreml.blob import Blob, read_blob
from qgraph.coreml.data_types import ARRAY_TYPES, MilType
from qgraph.coreml.protobuf import decode
from qgraph.errors import UserError
from qgraph.wire import WireError

__all__ = ["Argument", "Block", "Feature", "Operation", "Package", "TensorSpec", "read_package"]

WEIGHT_FILE = "@model_path/weights/weight.bin"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, type and sizes of a value; a size that is not known is None."""

    name: str
    type: MilType
    shape: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Argument:
    """What an operation is given: the name of a value, or a value that stands in the program or the weight file.

    Attributes:
        name: of a value computed before; '' for a constant.
        spec: type and sizes of the constant.
        value: the constant; None if it stands in the weight file.
        offset: of the constant's blob in the weight file; None if it stands in the program.
    """

    name: str
    spec: TensorSpec | None = None
    value: np.ndarray | None = None
    offset: int | None = None


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation; `inputs` has several arguments for a parameter that is a tuple."""

    type: str
    inputs: Mapping[str, Sequence[Argument]]
    outputs: Sequence[TensorSpec]
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Block:
    """Operations in order, and the names of the values that they end in."""

    operations: Sequence[Operation]
    outputs: Sequence[str]

    def walk(self) -> Iterator[Operation]:
        """Yield every operation, those of inner blocks before the one that holds them."""
        for operation in self.operations:
            for inner in operation.blocks:
                yield from inner.walk()
            yield operation


@dataclasses.dataclass(frozen=True)
class Feature:
    """An input or an output of the model as applications see it."""

    name: str
    type: MilType | None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Package:
    """A package.

    Attributes:
        version: of the specification: 9 is iOS 18, macOS 15.
        opset: of the program's only function.
        inputs, outputs: as applications see them.
        parameters: the function's own inputs.
        block: the function's body.
        metadata: the model's own, text by text.
        weights: the weight file.
    """

    version: int
    opset: str
    inputs: Sequence[Feature]
    outputs: Sequence[Feature]
    parameters: Sequence[TensorSpec]
    block: Block
    metadata: Mapping[str, str]
    weights: memoryview

    def blob(self, argument: Argument) -> Blob:
        """Return the blob of a constant in the weight file."""
        assert argument.offset is not None
        return read_blob(self.weights, argument.offset)

    def array(self, argument: Argument) -> np.ndarray:
        """Return a constant, from the program or from the weight file.

        Raises:
            UserError: the weight file does not hold what the program says.
        """
        if argument.value is not None:
            return argument.value
        assert argument.spec is not None
        shape = _sizes(argument.spec)
        blob = self.blob(argument)
        if blob.type is not argument.spec.type:
            raise UserError(
                f"the weight file is damaged: '{argument.spec.name}' is {blob.type.value} there, and "
                f"{argument.spec.type.value} in the program"
            )
        return blob.array(math.prod(shape)).reshape(shape)


def read_package(folder: Path) -> Package:
    """Read a package.

    Raises:
        UserError: it is none, or is damaged.
    """
    root = _root(folder)
    weights = root.parent / "weights" / "weight.bin"
    try:
        message = decode(memoryview(root.read_bytes()))
        data = memoryview(weights.read_bytes()) if weights.is_file() else memoryview(b"")
        function = message["program"]["functions"]["main"]
        block = function["blocks"][function["opset"]]
        description = message["description"]
        return Package(
            version=message["version"],
            opset=function["opset"],
            inputs=[_feature(one) for one in description["inputs"]],
            outputs=[_feature(one) for one in description["outputs"]],
            parameters=[_spec(one["name"], one["type"]) for one in function["inputs"]],
            block=_block(block),
            metadata=description.get("metadata", {}).get("entries", {}),
            weights=data,
        )
    except (WireError, KeyError, OSError) as error:
        what = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{folder} is damaged: {what}") from None


def _root(folder: Path) -> Path:
    """Return the file of the model, as the package's manifest names it."""
    try:
        manifest = json.loads((folder / "Manifest.json").read_text(encoding="utf-8"))
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is no Core ML package: it has no Manifest.json that names a model") from None
    path = folder / "Data" / str(entry)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: its manifest names a file outside it: do not trust it")
    return path


def _feature(message: Mapping[str, Any]) -> Feature:
    array = message["type"].get("array", {"shape": [], "type": 0})
    return Feature(message["name"], ARRAY_TYPES.get(array.get("type", 0)), tuple(array["shape"]))


def _block(message: Mapping[str, Any]) -> Block:
    return Block([_operation(one) for one in message["operations"]], tuple(message["outputs"]))


def _operation(message: Mapping[str, Any]) -> Operation:
    attributes = {
        name: (_constant(name, value),) for name, value in sorted(message["attributes"].items()) if name != "name"
    }
    inputs = {
        name: tuple(_argument(name, binding) for binding in argument["bindings"])
        for name, argument in sorted(message["inputs"].items())
    }
    outputs = [_spec(one["name"], one["type"]) for one in message["outputs"]]
    return Operation(message["type"], {**attributes, **inputs}, outputs, [_block(one) for one in message["blocks"]])


def _argument(name: str, binding: Mapping[str, Any]) -> Argument:
    return _constant(name, binding["value"]) if "value" in binding else Argument(binding["name"])


def _spec(name: str, message: Mapping[str, Any]) -> TensorSpec:
    tensor = message["tensor"]
    kind = MilType.of_proto(tensor["type"])
    if kind is None:
        raise WireError(f"'{name}' has a data type that ML Programs do not have ({tensor['type']})")
    return TensorSpec(name, kind, tuple(one["constant"].get("size", 0) if "constant" in one else None
                                        for one in tensor["dimensions"]))  # fmt: skip


def _constant(name: str, message: Mapping[str, Any]) -> Argument:
    spec = _spec(name, message["type"])
    if "blob" in message:
        if message["blob"]["file"] != WEIGHT_FILE:
            raise WireError(f"'{name}' stands in {message['blob']['file']}, which is not the weight file")
        return Argument("", spec, offset=message["blob"]["offset"])
    return Argument("", spec, value=_immediate(spec, message["immediate"]["tensor"]))


def _immediate(spec: TensorSpec, tensor: Mapping[str, Any]) -> np.ndarray:
    """Return a value that stands in the program; what takes less than 32 bits stands there as bytes."""
    shape = _sizes(spec)
    kind: str
    message: Any
    kind, message = next(iter(tensor.items()), ("ints", {"values": []}))
    if kind == "bytes":
        values = Blob(spec.type, message.get("values", memoryview(b""))).array(math.prod(shape))
    elif kind == "strings":
        values = np.array(message["values"], dtype=np.str_)
    else:
        values = np.array(message["values"]).astype(spec.type.numpy)
    if values.size != math.prod(shape):
        raise WireError(f"'{spec.name}' has {values.size} numbers, and not {math.prod(shape)}")
    return values.reshape(shape)


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    sizes = tuple(size for size in spec.shape if size is not None)
    if len(sizes) != len(spec.shape):
        raise UserError(f"the constant '{spec.name}' has sizes that are not known")
    return sizes
