"""Write a reference model and its data: ``python -m qgraph.models digits_cnn -o DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qgraph import models
from qgraph.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

__all__ = ["export", "main"]


def export(name: str, directory: Path) -> list[Path]:
    """Write ``NAME.onnx``, ``NAME_calib.npz`` (inputs) and ``NAME_heldout.npz`` (inputs and ``labels``).

    The directory is made if need be; files of these names are replaced.

    Raises:
        UserError: the name is unknown, a package is missing or the directory cannot be written.
    """
    model, data = models.build(name), models.dataset(name)
    graph = directory / f"{name}.onnx"
    calibration = directory / f"{name}_calib.npz"
    held_out = directory / f"{name}_heldout.npz"
    labels = {} if data.labels is None else {"labels": data.labels}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        graph.write_bytes(_serialize(model))
        _save_arrays(calibration, data.calibration)
        _save_arrays(held_out, data.evaluation | labels)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}: choose another with -o") from error
    return [graph, calibration, held_out]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m qgraph.models", description="Write a reference model and its data."
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(models.names()))
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, default=Path(), help="directory (default: this one)"
    )
    options = parser.parse_args(arguments)
    try:
        files = export(options.name, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file in files:
        print(file)
    return 0


def _serialize(model: ir.Model) -> bytes:
    """Return the model as exporters write it: with no value_info for initializers.

    onnx_ir writes them. They are valid, but ONNX Runtime's quantize_dynamic transposes the weights of Gemm without
    them and then refuses its own result.
    """
    import onnx_ir as ir

    proto = ir.to_proto(model)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    others = [value for value in proto.graph.value_info if value.name not in initializers]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(others)
    serialized: bytes = proto.SerializeToString(deterministic=True)
    return serialized


def _save_arrays(file: Path, arrays: dict[str, Any]) -> None:
    np.savez_compressed(file, allow_pickle=False, **arrays)


if __name__ == "__main__":
    sys.exit(main())
