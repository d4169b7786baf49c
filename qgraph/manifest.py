"""What an artifact says of itself, checked: the part of opening one that needs nothing but Python.

Servers open artifacts where only the runtime is installed (`qgraph.runtime.open`), so nothing of a graph is imported
here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qgraph.errors import UserError

__all__ = ["FORMAT", "MANIFEST", "checked_manifest", "read_json", "sha256"]

FORMAT = 1
MANIFEST = "manifest.json"
_MODEL = "model.onnx"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of the artifact in a folder, every file of which has the hash that it names.

    Raises:
        UserError: it is no artifact, was written by a newer version, names files outside its folder, or a file is
            missing or differs from its hash.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{folder} does not exist")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is no qgraph artifact: it has no {MANIFEST}")
    manifest = read_json(folder / MANIFEST)
    _check_shape(folder, manifest)
    for name, entry in manifest["files"].items():
        _check_file(folder, name, entry)
    if (folder / _MODEL).exists() and _MODEL not in manifest["files"]:
        raise UserError(f"{folder / MANIFEST} is damaged: it has no hash of {_MODEL}")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return document


def _check_shape(folder: Path, manifest: Mapping[str, Any]) -> None:
    version = manifest.get("format")
    if not isinstance(version, int):
        raise UserError(f"{folder / MANIFEST} is damaged: it names no format version")
    if version > FORMAT:
        raise UserError(f"{folder} has format {version}, newer than this qgraph understands ({FORMAT}). Update qgraph.")
    needed = {"target": str, "files": dict, "verified": bool, "source": dict, "inputs": list, "outputs": list}
    for key, kind in needed.items():
        if not isinstance(manifest.get(key), kind):
            raise UserError(f"{folder / MANIFEST} is damaged: '{key}' is missing or of the wrong kind")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str) or "bytes" not in entry:
            raise UserError(f"{folder / MANIFEST} is damaged: '{name}' has no hash")


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or ":" in name:
        raise UserError(f"{folder / MANIFEST} names '{name}', which leaves the artifact's folder: do not trust it")
    path = folder / relative
    if not path.is_file():
        raise UserError(f"{folder} is incomplete: {name} is missing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: {name} is a link that leaves the artifact's folder: do not trust it")
    if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
        raise UserError(f"{folder}: {name} was changed after it was compiled (its hash differs). Compile it again.")
