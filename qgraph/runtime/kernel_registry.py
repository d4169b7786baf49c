"""What the installed ONNX Runtime says of its own kernels: its registry, in the words of a capability table."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qgraph.capabilities import Entry, Types, operator_name
from qgraph.errors import UserError
from qgraph.runtime.session import CPU_PROVIDER, installed_providers

__all__ = ["joined", "registry_entries", "runtime_schemas", "type_word"]

SOURCE = "registry"
_OPEN = 2**31 - 1
"""The end of a kernel's range of versions that has none."""
_NAMES = {"float": "float32", "double": "float64"}
_WITHOUT_LIBRARIES = (CPU_PROVIDER, "AzureExecutionProvider")
_ASK = "from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def as ask; ask()"


class _Kernel(NamedTuple):
    """Kernels of one version of an operator that differ in types only.

    `types` has, for each type parameter of the operator's schema, those that it may stand for.
    """

    since: int
    until: int | None
    types: Mapping[str, frozenset[str]]


def registry_entries(provider: str = CPU_PROVIDER) -> list[Entry]:
    """Return the kernels of a provider, those that differ in one type put together, sorted by name and version.

    A kernel's versions are those of operators; in an entry they are versions of the domain that a model imports: each
    holds from the version of the operator on to the one before its next.

    Raises:
        UserError: ONNX Runtime is not installed, or cannot tell its kernels here.
    """
    schemas = runtime_schemas()
    _require_registry()
    kernels: dict[tuple[str, str], list[_Kernel]] = defaultdict(list)
    for definition in _state().get_all_opkernel_def():
        if definition.provider == provider:
            key = (definition.domain, definition.op_name)
            kernels[key] += _by_version(definition, sorted(schemas[key]))
    found = []
    for key in sorted(kernels):
        entries = [_entry(key, kernel, schemas[key][kernel.since]) for kernel in _merged(kernels[key])]
        found += joined(sorted(entries, key=lambda entry: (entry.since, str(entry.inputs), str(entry.outputs))))
    return found


def runtime_schemas() -> Mapping[tuple[str, str], Mapping[int, Any]]:
    """Return (domain, operator) -> version -> the runtime's schema of it.

    Raises:
        UserError: ONNX Runtime is not installed.
    """
    schemas: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for schema in _state().get_all_operator_schema():
        schemas[schema.domain, schema.name][schema.since_version] = schema
    return schemas


def type_word(text: str) -> str:
    """Return a type as tables call it: "tensor(float)" => "float32", "seq(tensor(int8))" => "seq(int8)"."""
    text = text.replace("sparse_tensor(", "sparse(")
    text = re.sub(r"tensor\((\w+)\)", lambda match: _NAMES.get(match[1], match[1]), text)
    return re.sub(r"sparse\((\w+)\)", lambda match: f"sparse({_NAMES.get(match[1], match[1])})", text)


def _state() -> Any:
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state
    except ImportError:
        raise UserError("reading the kernel registry needs ONNX Runtime: pip install 'qgraph-compiler[cpu]'") from None
    return onnxruntime_pybind11_state


@functools.cache
def _require_registry() -> None:
    """Raise a UserError where asking for the registry would kill this process.

    A build with other providers than the CPU's makes one of each to ask it for its kernels, and goes down with those
    whose libraries do not load; a process of its own tries first.
    """
    others = [one for one in installed_providers() if one not in _WITHOUT_LIBRARIES]
    if others and subprocess.run([sys.executable, "-c", _ASK], capture_output=True, check=False).returncode:
        told = f"it was built with {', '.join(others)}, and not all of them load"
        raise UserError(f"ONNX Runtime cannot tell its kernels here: {told}")


def _by_version(definition: Any, versions: Sequence[int]) -> list[_Kernel]:
    """Return a kernel once for every version of its operator that it serves.

    One without an end serves its first version alone: the runtime takes it for no version that came later.
    """
    start, end = definition.version_range
    types = {name: frozenset(map(type_word, words)) for name, words in definition.type_constraints.items()}
    found = []
    for number, version in enumerate(versions):
        if version == start or (end != _OPEN and start <= version <= end):
            after = versions[number + 1 :]
            found.append(_Kernel(version, after[0] - 1 if after else None, types))
    return found


def _merged(kernels: Iterable[_Kernel]) -> list[_Kernel]:
    """Put kernels together that differ in what one type parameter stands for."""
    found: list[_Kernel] = []
    for kernel in kernels:
        one = kernel
        while (other := next((other for other in found if _differ_in_one(one, other)), None)) is not None:
            found.remove(other)
            one = one._replace(types={name: words | other.types[name] for name, words in one.types.items()})
        found.append(one)
    return found


def _differ_in_one(one: _Kernel, other: _Kernel) -> bool:
    if (one.since, one.until) != (other.since, other.until) or set(one.types) != set(other.types):
        return False
    return sum(words != other.types[name] for name, words in one.types.items()) <= 1


def _entry(key: tuple[str, str], kernel: _Kernel, schema: Any) -> Entry:
    inputs, outputs = (_slots(formal, kernel.types) for formal in (schema.inputs, schema.outputs))
    since = 0 if kernel.since == 1 else kernel.since  # there is no version before the first
    return Entry(operator_name(*key), since, kernel.until, inputs, outputs, source=SOURCE)


def _slots(formal: Sequence[Any], types: Mapping[str, frozenset[str]]) -> Types:
    by_index: dict[int, tuple[str, ...]] = {}
    for index, one in enumerate(formal):
        words = types.get(one.typeStr, types.get(one.name))
        if words is None:
            continue
        if one.option.name == "Variadic":
            return Types(by_index, tuple(sorted(words)))
        by_index[index] = tuple(sorted(words))
    return Types(by_index)


def joined(entries: Iterable[Entry]) -> list[Entry]:
    """Join entries of versions that follow one another and have the same types."""
    found: list[Entry] = []
    for entry in entries:
        before = next(
            (
                one
                for one in found
                if one.until == entry.since - 1 and (one.inputs, one.outputs) == (entry.inputs, entry.outputs)
            ),
            None,
        )
        if before is None:
            found.append(entry)
        else:
            found[found.index(before)] = dataclasses.replace(before, until=entry.until)
    return found
