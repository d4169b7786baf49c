"""A package written so that the same program gives the same bytes: no dates, no random identifiers."""

from __future__ import annotations

import json
import tempfile
import uuid
from pathlib import Path

from qgraph.coreml.lowering import Lowered
from qgraph.coreml.toolkit import SPECIFICATION, toolkit

__all__ = ["SIGNATURE", "write_package"]

SIGNATURE = "org.qgraph.signature"
"""Key in the model's metadata: inputs and outputs as the source has them."""
_AUTHOR = "com.apple.CoreML"
_NAMESPACE = uuid.UUID("6c2b3f0e-4f7d-5a52-9d0f-6d1f2a7f9c11")


def write_package(lowered: Lowered, folder: Path) -> None:
    """Write a program as the package `folder` (which ends in .mlpackage).

    Args:
        lowered: the program.
        folder: does not exist yet.
    """
    data = folder / "Data" / _AUTHOR
    weights = data / "weights"
    weights.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
        message = toolkit().write(lowered.program, scratch, specification_version=SPECIFICATION)
        written = Path(scratch) / "weight.bin"
        if written.is_file():
            (weights / "weight.bin").write_bytes(written.read_bytes())
    message.description.metadata.userDefined[SIGNATURE] = lowered.signature()
    (data / "model.mlmodel").write_bytes(message.SerializeToString(deterministic=True))
    (folder / "Manifest.json").write_text(json.dumps(_manifest(), indent=4) + "\n", encoding="utf-8")


def _manifest() -> dict[str, object]:
    items = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}
    identifiers = {name: str(uuid.uuid5(_NAMESPACE, name)).upper() for name in items}
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            identifiers[name]: {"author": _AUTHOR, "description": text, "name": name, "path": f"{_AUTHOR}/{name}"}
            for name, text in items.items()
        },
        "rootModelIdentifier": identifiers["model.mlmodel"],
    }
