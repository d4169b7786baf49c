"""What of a package can be known without a device: that it is well formed, and how its weights are stored.

Read from the bytes that were written: version and opset; inputs, outputs and the function's parameters agree, with
sizes that are numbers and types that Core ML has; every name is defined once and before it is read; every operation is
known; every weight lies inside the weight file, with the type and size that the program says, and none overlap.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from qgraph.coreml.blob import stored_bytes
from qgraph.coreml.data_types import MilType
from qgraph.coreml.interpreter import SEMANTICS
from qgraph.coreml.program import Argument, Block, Operation, Package, read_package
from qgraph.coreml.toolkit import SPECIFICATION
from qgraph.errors import UserError

__all__ = ["Stored", "Structure", "compressed_names", "examine", "reads"]

_OPSET = "CoreML8"
_OWN = frozenset({"const", "cond"})
_HEADER = 64
"""Bytes at the start of the weight file, and before each weight."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Weights of one form: how many, and their bytes in package and program, scales and tables included."""

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a package holds.

    Attributes:
        faults: what is wrong with it, in the order in which it was found; empty for a package that is well formed.
        operations: how many of each, without constants.
        weights: form -> the weights stored in it; 'dense' are those that are not compressed.
        reads_compressed: operation -> how many of them read a compressed weight.
    """

    faults: tuple[str, ...]
    operations: Mapping[str, int]
    weights: Mapping[str, Stored]
    reads_compressed: Mapping[str, int]


def examine(folder: Path) -> Structure:
    """Examine a package.

    Raises:
        UserError: it cannot be read at all.
    """
    package = read_package(folder)
    operations = list(package.block.walk())
    faults = [*_signature_faults(package), *_name_faults(package), *_weight_faults(package)]
    compressed = compressed_names(operations)
    readers = Counter(
        one.type for one in operations if not _is_compressed(one) and any(name in compressed for name in reads(one))
    )
    counts = Counter(one.type for one in operations if one.type != "const")
    return Structure(tuple(faults), dict(sorted(counts.items())), _weights(operations), dict(sorted(readers.items())))


def compressed_names(operations: Iterable[Operation]) -> set[str]:
    """Return the names of the weights that are compressed."""
    return {spec.name for one in operations if _is_compressed(one) for spec in one.outputs}


def reads(operation: Operation) -> Iterator[str]:
    """Yield the names of the values that an operation reads."""
    return (argument.name for argument in _arguments(operation) if argument.name)


def _signature_faults(package: Package) -> Iterator[str]:
    if (package.version, package.opset) != (SPECIFICATION, _OPSET):
        yield f"version {package.version} and opset {package.opset} are not {SPECIFICATION} and {_OPSET}"
    ports = [*package.inputs, *package.outputs]
    for one in ports:
        if one.type is None or not one.shape or min(one.shape) < 1:
            yield f"'{one.name}' is no array of known sizes and a type that Core ML has"
    if len({one.name for one in ports}) < len(ports):
        yield "two inputs or outputs have one name"
    declared = [(one.name, one.type, one.shape) for one in package.inputs]
    if declared != [(one.name, one.type, one.shape) for one in package.parameters]:
        yield "the inputs of the model are not those of its program"
    results = {spec.name: spec for one in package.block.walk() for spec in one.outputs}
    for feature, name in zip(package.outputs, package.block.outputs, strict=True):
        spec = results.get(name)
        if spec is None or (feature.name, feature.type, feature.shape) != (name, spec.type, spec.shape):
            yield f"the output '{feature.name}' is not what the program gives"


def _name_faults(package: Package) -> Iterator[str]:
    yield from _block_faults(package.block, {one.name for one in package.parameters})


def _block_faults(block: Block, outside: set[str]) -> Iterator[str]:
    defined = set(outside)
    for one in block.operations:
        if one.type not in SEMANTICS and one.type not in _OWN:
            yield f"the operation '{one.type}' is not known"
        for argument in _arguments(one):
            if argument.name and argument.name not in defined:
                yield f"'{argument.name}' is read before it is defined"
        for inner in one.blocks:
            yield from _block_faults(inner, defined)
        for spec in one.outputs:
            if spec.name in defined:
                yield f"'{spec.name}' is defined twice"
            if None in spec.shape:
                yield f"the sizes of '{spec.name}' are not known"
            defined.add(spec.name)
    yield from (f"'{name}' is given back, and not defined" for name in block.outputs if name not in defined)


def _weight_faults(package: Package) -> Iterator[str]:
    spans = {(0, _HEADER)}
    for one in package.block.walk():
        for argument in _arguments(one):
            if argument.offset is None or argument.spec is None:
                continue
            try:
                blob = package.blob(argument)
            except UserError as error:
                yield str(error)
                continue
            name = one.outputs[0].name
            if blob.type is not argument.spec.type or len(blob.data) != _bytes(argument):
                yield f"the weight of '{name}' is not what the program says"
            spans |= {(blob.start, blob.start + len(blob.data)), (argument.offset, argument.offset + _HEADER)}
    ends = 0
    for start, end in sorted(spans):
        if start < ends:
            yield f"two weights overlap at {start}"
        ends = end


def _weights(operations: list[Operation]) -> dict[str, Stored]:
    """Count the weights by form: a compressed one by the last operation of its chain, with all that the chain holds."""
    by_name = {spec.name: one for one in operations for spec in one.outputs}
    read = {argument.name for one in operations if _is_compressed(one) for argument in _arguments(one)}
    found: dict[str, Stored] = {}
    for one in operations:
        ends_chain = _is_compressed(one) and not any(spec.name in read for spec in one.outputs)
        if not ends_chain and not (one.type == "const" and one.inputs["val"][0].offset is not None):
            continue
        chain = _chain(one, by_name)
        form = " + ".join(sorted({part.type.removeprefix("constexpr_") for part in chain} - {"const"})) or "dense"
        size = sum(_bytes(argument) for part in chain for argument in _arguments(part) if argument.spec is not None)
        before = found.get(form, Stored(0, 0))
        found[form] = Stored(before.count + 1, before.bytes + size)
    return dict(sorted(found.items()))


def _chain(operation: Operation, by_name: Mapping[str, Operation]) -> list[Operation]:
    found, queue = {id(operation): operation}, [operation]
    while queue:
        for argument in _arguments(queue.pop()):
            before = by_name.get(argument.name)
            if before is not None and id(before) not in found:
                found[id(before)] = before
                queue.append(before)
    return list(found.values())


def _is_compressed(operation: Operation) -> bool:
    return operation.type.startswith("constexpr_")


def _arguments(operation: Operation) -> Iterator[Argument]:
    for arguments in operation.inputs.values():
        yield from arguments


def _bytes(argument: Argument) -> int:
    assert argument.spec is not None
    if argument.spec.type is MilType.STRING:
        return 0
    return stored_bytes(argument.spec.type, math.prod(size or 0 for size in argument.spec.shape))
