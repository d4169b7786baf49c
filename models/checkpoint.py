"""Trained parameters on disk: one compressed ``.npz`` per model, beside its card.

Arrays under ``reference/`` are no parameters. They hold a few inputs and what the torch model answered to them, with
the parameters as stored, so that a builder can be checked where torch is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from qgraph.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["Checkpoint", "load", "path", "save"]

_REFERENCE_INPUT = "reference/input"
_REFERENCE_LOGITS = "reference/logits"


@dataclass(frozen=True)
class Checkpoint:
    """Parameters as float32 under their torch names, and one recorded answer of the torch model."""

    parameters: dict[str, NDArray[np.float32]]
    reference_input: NDArray[np.generic]
    reference_logits: NDArray[np.float32]


def path(name: str) -> Path:
    """Return where the checkpoint of model ``name`` lies."""
    return Path(__file__).with_name(f"{name}.npz")


def load(name: str) -> Checkpoint:
    """Read the checkpoint of model ``name``; half-precision arrays come back as float32.

    Raises:
        UserError: the file is missing or not a checkpoint.
    """
    file = path(name)
    try:
        # Opened here, since np.load leaves its own file open when the content is broken.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
            reference_input = arrays.pop(_REFERENCE_INPUT)
            reference_logits = arrays.pop(_REFERENCE_LOGITS)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(
            f"cannot read the checkpoint {file}: {error}: reinstall qgraph, or train it again with "
            f"'python -m qgraph.models.train_{name}'"
        ) from error
    return Checkpoint(
        parameters={key: array.astype(np.float32) for key, array in arrays.items()},
        reference_input=reference_input,
        reference_logits=reference_logits.astype(np.float32),
    )


def save(
    file: Path,
    parameters: Mapping[str, NDArray[np.floating]],
    reference_input: NDArray[np.generic],
    reference_logits: NDArray[np.floating],
) -> None:
    """Write a checkpoint with the dtypes given; equal arrays give equal bytes."""
    arrays: dict[str, Any] = {key: parameters[key] for key in sorted(parameters)}
    arrays[_REFERENCE_INPUT] = reference_input
    arrays[_REFERENCE_LOGITS] = reference_logits.astype(np.float32)
    np.savez_compressed(file, allow_pickle=False, **arrays)
