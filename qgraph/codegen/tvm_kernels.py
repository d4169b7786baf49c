"""What can be told of GPU code without a GPU: that each kernel spreads over threads and fits the limits of the device.

Read off the sources that TVM generates for CUDA and Metal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["Limits", "check_kernels", "sources"]

_KERNEL = re.compile(
    r'^(?:extern "C" )?(?:__global__ void|kernel void)\s*(?:__launch_bounds__\((?P<bound>\d+)\))?\s*(?P<name>\w+)\s*\(',
    re.MULTILINE,
)
_SHARED = re.compile(r"\b(?:__shared__(?: __align__\(\d+\))?|threadgroup)\s+(?P<type>\w+)\s+\w+\[(?P<count>\d+)\]")
_BYTES = {"double": 8, "float": 4, "half": 2, "int": 4, "int64_t": 8, "long": 8, "uchar": 1, "uint": 4, "short": 2}
_INDICES = ("threadIdx", "blockIdx", "threadgroup_position_in_grid", "thread_position_in_threadgroup")


class Limits(NamedTuple):
    """What a device allows: threads of a block, bytes that they share."""

    threads: int
    shared: int


def sources(executable: Any, kind: str) -> str:
    """Return the generated source of an executable's device code."""
    found: list[str] = []
    seen: list[Any] = [executable.mod]
    while seen:
        module = seen.pop()
        if str(module.kind) == kind:
            found.append(str(module.inspect_source()))
        seen.extend(module.imports)
    return "\n".join(sorted(found))


def check_kernels(source: str, limits: Limits) -> Iterator[str]:
    """Yield what is wrong with the kernels of a source, one line each."""
    starts = [match for match in _KERNEL.finditer(source) if not _is_declaration(source, match.end())]
    if not starts:
        yield "there are no kernels"
    for place, match in enumerate(starts):
        end = starts[place + 1].start() if place + 1 < len(starts) else len(source)
        body = source[match.start() : end]
        bound = int(match["bound"] or 1)
        shared = sum(int(one["count"]) * _BYTES.get(one["type"], 8) for one in _SHARED.finditer(body))
        if not any(index in body for index in _INDICES):
            yield f"{match['name']} is not spread over threads"
        if bound > limits.threads:
            yield f"{match['name']} wants {bound} threads of a block, of {limits.threads}"
        if shared > limits.shared:
            yield f"{match['name']} shares {shared} bytes, of {limits.shared}"


def _is_declaration(source: str, position: int) -> bool:
    semicolon, brace = source.find(";", position), source.find("{", position)
    return brace < 0 or 0 <= semicolon < brace
