"""The process that hands models to TVM's importer, which writes warnings of its own and may die of one.

    python -m qgraph.runtime.importer_worker

Speaks as `probe_worker` does: `none` with the importer's words, or `loaded` and `idle`, as nothing is run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from qgraph.runtime.probe_worker import serve

__all__ = ["answer"]


def answer(model: bytes) -> Iterator[str]:
    """Import one model, and yield what became of it."""
    import onnx
    from tvm.relax.frontend.onnx import from_onnx

    try:
        with contextlib.redirect_stdout(sys.stderr):
            from_onnx(onnx.load_model_from_string(model), keep_params_in_input=False)
    except Exception as error:  # noqa: BLE001 - the importer raises errors of every kind
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        yield f"none {lines[-1][:200] if lines else type(error).__name__}"
        return
    yield "loaded"
    yield "idle imported, not run"


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout, answer)
