"""The process that loads and runs the models of probes: a runtime that aborts takes nothing else with it.

    python -m qgraph.runtime.probe_worker

Reads models from standard input, each behind the number of its bytes (4, little endian). For each it writes one line:
`none`, `refused` or `loaded`, with the runtime's words; behind `loaded` another, `ran` or `idle`. Starts fast, and
therefore knows nothing of the rest of the package.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TextIO

import numpy as np

__all__ = ["serve"]

_SHAPES = ((4, 4, 4, 4), (4, 4), (4,), ())
"""Shapes that are tried for all inputs alike; one of them suits most operators."""
_FATAL_ONLY = 4
_NO_KERNEL = ("NOT_IMPLEMENTED", "is not currently registered or supported")
"""Of an operator without a kernel, and of a type without any."""
_PROVIDER = "CPUExecutionProvider"


def serve(
    requests: BinaryIO, answers: TextIO, answer: Callable[[bytes], Iterator[str]] | None = None
) -> None:  # fmt: skip
    """Answer until the requests end, with the lines that `answer` gives for a model: by default, of ONNX Runtime."""
    answer = answer or _answer
    while len(head := requests.read(4)) == 4:
        for line in answer(requests.read(struct.unpack("<I", head)[0])):
            answers.write(line + "\n")
            answers.flush()


def _answer(model: bytes) -> Iterator[str]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = ort.InferenceSession(model, options, providers=[_PROVIDER])
    except Exception as error:  # noqa: BLE001 - the runtime has an exception for each of its codes
        yield f"{'none' if any(words in str(error) for words in _NO_KERNEL) else 'refused'} {_message(error)}"
        return
    yield "loaded"
    yield _run(session)


def _run(session: Any) -> str:
    message = ""
    for shape in _SHAPES:
        feeds = {one.name: _ones(one.type, shape) for one in session.get_inputs()}
        if any(array is None for array in feeds.values()):
            return "idle no such input can be made"
        try:
            session.run(None, feeds)
        except Exception as error:  # noqa: BLE001
            message = message or _message(error)
        else:
            return "ran"
    return f"idle {message}"


def _message(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _ones(kind: str, shape: tuple[int, ...]) -> np.ndarray | None:
    name = kind.removeprefix("tensor(").removesuffix(")")
    name = {"float": "float32", "double": "float64", "string": "str"}.get(name, name)
    try:
        return np.ones(shape, dtype=name)
    except TypeError:
        return None


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout)
